use std::fs::{self, File};
use std::io::Write;
use std::path::Path;

use ferrotune_tensor::{Error, Result};

/// Writes a file so that its name never means half of it: beside, to the disk, then renamed.
///
/// # Errors
/// When the folder can't be written to or the disk is full; the message names the file, and nothing
/// is left of it.
pub fn write_whole(path: &Path, bytes: &[u8]) -> Result<()> {
    write_with(path, |file| file.write_all(bytes).map_err(|source| Error::io(path, source)))
}

/// The same for what is written piece by piece.
///
/// # Errors
/// Those of `write`, and those of [`write_whole`].
pub(crate) fn write_with(path: &Path, write: impl FnOnce(&mut File) -> Result<()>) -> Result<()> {
    let Some(name) = path.file_name() else {
        return Err(Error::file(path, "expected the name of a file"));
    };
    let beside = path.with_file_name(format!(".{}.{}.part", name.to_string_lossy(), std::process::id()));
    let io = |source| Error::io(path, source);
    let written = File::create(&beside).map_err(io).and_then(|mut file| {
        write(&mut file)?;
        file.sync_all().map_err(io)
    });
    let renamed = written.and_then(|()| fs::rename(&beside, path).map_err(io));
    if renamed.is_err() {
        let _ = fs::remove_file(&beside);
        return renamed;
    }
    // The rename itself is on the disk when its folder is; systems that can't do this need not.
    if let Some(folder) = path.parent()
        && let Ok(folder) = File::open(folder)
    {
        let _ = folder.sync_all();
    }
    Ok(())
}
