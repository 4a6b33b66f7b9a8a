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
    let Some(name) = path.file_name() else {
        return Err(Error::file(path, "expected the name of a file"));
    };
    let beside = path.with_file_name(format!(".{}.{}.part", name.to_string_lossy(), std::process::id()));
    let written = File::create(&beside).and_then(|mut file| {
        file.write_all(bytes)?;
        file.sync_all()
    });
    let renamed = written.and_then(|()| fs::rename(&beside, path));
    if let Err(source) = renamed {
        let _ = fs::remove_file(&beside);
        return Err(Error::io(path, source));
    }
    // The rename itself is on the disk when its folder is; systems that can't do this need not.
    if let Some(folder) = path.parent()
        && let Ok(folder) = File::open(folder)
    {
        let _ = folder.sync_all();
    }
    Ok(())
}
