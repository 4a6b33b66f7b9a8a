use std::fs::{File, OpenOptions, TryLockError};
use std::io::{Read as _, Seek as _, Write as _};
use std::path::Path;

use ferrotune_tensor::{Error, Result};

/// Keeps a second run out of an output_dir for as long as it lives; the system lifts it when the process
/// ends, however that happens.
#[derive(Debug)]
pub struct RunLock {
    _file: File,
}

impl RunLock {
    /// Which process writes into a folder, if any does.
    pub fn holder(output_dir: &Path) -> Option<String> {
        let path = output_dir.join(LOCK_FILE);
        let file = File::open(&path).ok()?;
        match file.try_lock_shared() {
            Err(TryLockError::WouldBlock) => {
                let process = std::fs::read_to_string(&path).unwrap_or_default();
                Some(format!("process {process}"))
            }
            _ => None,
        }
    }
}

/// The file that is locked.
pub const LOCK_FILE: &str = ".ferrotune.lock";

impl RunLock {
    /// Locks a folder that is there.
    ///
    /// # Errors
    /// When another process holds the lock, which is named, or the folder can't be written to.
    pub fn take(output_dir: &Path) -> Result<RunLock> {
        let path = output_dir.join(LOCK_FILE);
        let opened = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(&path);
        let mut file = opened.map_err(|source| Error::io(&path, source))?;
        match file.try_lock() {
            Ok(()) => {
                let written = file.set_len(0).and_then(|()| write!(file, "{}", std::process::id()));
                written.map_err(|source| Error::io(&path, source))?;
                Ok(RunLock { _file: file })
            }
            Err(TryLockError::WouldBlock) => {
                let mut process = String::new();
                let _ = file.rewind().and_then(|()| file.read_to_string(&mut process));
                Err(Error::file(
                    output_dir,
                    format!(
                        "another run (process {process}) writes into this folder; stop it, or name another output_dir"
                    ),
                ))
            }
            // A file system without locks can't keep anybody out.
            Err(TryLockError::Error(_)) => Ok(RunLock { _file: file }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_is_locked_once_at_a_time() {
        let dir = std::env::temp_dir().join(format!("ferrotune-lock-{}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        let lock = RunLock::take(&dir).unwrap();
        let error = RunLock::take(&dir).unwrap_err().to_string();
        assert!(error.contains(&format!("process {}", std::process::id())), "{error}");
        assert_eq!(RunLock::holder(&dir), Some(format!("process {}", std::process::id())));
        drop(lock);
        assert_eq!(RunLock::holder(&dir), None);
        drop(RunLock::take(&dir).unwrap());
        std::fs::remove_dir_all(&dir).unwrap();
    }
}
