//! How much room the tests' data takes.

use std::fs;
use std::path::Path;

use crate::{Result, root};

/// Bytes of all data beside the scripts that make it.
const MOST: u64 = 2_000_000;

/// Fixtures stay small, so that a clone does.
pub fn run() -> Result<()> {
    let found = size(&root().join("tests").join("fixtures"))?;
    if found > MOST {
        return Err(format!(
            "tests/fixtures holds {found} bytes of data, {MOST} are allowed: compare with hashes, make weights of hashed \
             names (tests/hashed.rs), or make the models smaller"
        ));
    }
    Ok(())
}

fn size(path: &Path) -> Result<u64> {
    let failed = |error| format!("can't look at {}: {error}", path.display());
    if !path.is_dir() {
        let script = path.extension().is_some_and(|it| it == "py");
        return Ok(if script { 0 } else { fs::metadata(path).map_err(failed)?.len() });
    }
    fs::read_dir(path).map_err(failed)?.map(|entry| size(&entry.map_err(failed)?.path())).sum()
}
