//! `cargo xtask peers`: the programs that models leave for, on what Ferrotune writes.

use std::env;
use std::fs;
use std::path::PathBuf;
use std::process::Command;

use crate::{Result, cargo, program, python, root, run};

/// A script, its environment in target, and what it imports, in the versions of `tests/fixtures/versions.json`.
struct Peers {
    script: &'static str,
    /// Names a Python that has it all already.
    variable: &'static str,
    folder: &'static str,
    packages: &'static [&'static str],
}

const PYTHON: Peers = Peers {
    script: "tests/peers.py",
    variable: "FERROTUNE_PEERS_PYTHON",
    folder: "peers",
    packages: &[
        "torch",
        "transformers",
        "peft",
        "bitsandbytes",
        "safetensors",
        "tokenizers",
        "numpy",
        "gguf",
    ],
};

/// llama.cpp is built from its source, which takes a C++ compiler and minutes.
const LLAMA_CPP: Peers = Peers {
    script: "tests/peers_llama_cpp.py",
    variable: "FERROTUNE_PEERS_LLAMA_CPP_PYTHON",
    folder: "peers-llama-cpp",
    packages: &["llama-cpp-python", "numpy", "gguf"],
};

/// Builds the program and runs the script, that of llama.cpp where it is named first; words are its options.
pub fn run_all(words: &[&str]) -> Result<()> {
    if words == ["outcome"] {
        return outcome();
    }
    let (peers, words) = match words {
        ["llama.cpp", words @ ..] => (&LLAMA_CPP, words),
        words => (&PYTHON, words),
    };
    // The whole workspace, as `cargo xtask check` builds it: other packages would be other features, and all built anew.
    run(&mut cargo(&["build", "--release", "--locked", "--workspace", "--bins"]))?;
    run(Command::new(python_of(peers)?).arg(peers.script).arg(program()).args(words))
}

/// Has the files of `tests/outcome.rs` written, lets the peers compute with them, and records what they agree with.
fn outcome() -> Result<()> {
    let folder = root().join("target").join("outcome");
    let _ = fs::remove_dir_all(&folder);
    let words = ["test", "--release", "--locked", "--workspace", "--test", "outcome"];
    run(cargo(&words).env("FERROTUNE_OUTCOME", &folder))?;
    for peers in [&PYTHON, &LLAMA_CPP] {
        run(Command::new(python_of(peers)?).arg("tests/peers_outcome.py").arg(&folder))?;
    }
    Ok(())
}

/// The one that is named, or one of our own.
fn python_of(peers: &Peers) -> Result<PathBuf> {
    env::var_os(peers.variable).map_or_else(|| own_python(peers), |python| Ok(python.into()))
}

/// A virtual environment in target; it is made anew when versions change.
fn own_python(peers: &Peers) -> Result<PathBuf> {
    let versions = root().join("tests").join("fixtures").join("versions.json");
    let versions =
        fs::read_to_string(&versions).map_err(|error| format!("{}: {error}", versions.display()))?;
    let packages = packages(&versions, peers.packages)?;
    let folder = root().join("target").join(peers.folder);
    let bin = folder.join(if cfg!(windows) { "Scripts" } else { "bin" }).join("python");
    let (done, wanted) = (folder.join("packages.txt"), packages.join("\n"));
    if fs::read_to_string(&done).is_ok_and(|it| it == wanted) {
        return Ok(bin);
    }
    let base = python::with_pip("the programs to compare with")?;
    run(Command::new(base).args(["-m", "venv", "--clear"]).arg(&folder))?;
    println!("installing {} (some GB, once)", packages.join(" "));
    run(Command::new(&bin).args(["-m", "pip", "install", "--quiet"]).args(&packages))?;
    fs::write(&done, wanted).map_err(|error| format!("{}: {error}", done.display()))?;
    Ok(bin)
}

/// `name==version` of each package, out of lines of `"name": "version"`.
fn packages(versions: &str, names: &[&str]) -> Result<Vec<String>> {
    let version = |name: &str| {
        let line = versions.lines().find(|line| line.trim_start().starts_with(&format!("\"{name}\"")))?;
        line.split('"').nth(3).map(|version| format!("{name}=={version}"))
    };
    let missing = |name: &str| format!("tests/fixtures/versions.json has no version of {name}");
    names.iter().map(|name| version(name).ok_or_else(|| missing(name))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_package_has_a_version() {
        let text = fs::read_to_string(root().join("tests/fixtures/versions.json")).unwrap();
        let packages: Vec<String> =
            [PYTHON, LLAMA_CPP].iter().flat_map(|it| packages(&text, it.packages).unwrap()).collect();
        assert!(
            packages.iter().all(|it| it.split("==").nth(1).is_some_and(|it| !it.is_empty())),
            "{packages:?}"
        );
        assert!(super::packages("{}", PYTHON.packages).unwrap_err().contains("torch"));
    }
}
