//! Fuzzing the readers of data, chat templates and models' files: with cargo-fuzz where it is installed, else by mutations
//! within a test. Folders of models, which are mapped from the disk, are always fuzzed within a test.

use std::fs;
use std::process::{Command, Stdio};

use crate::{Result, cargo, root, run};

/// Chat templates, the kinds of files of data, and GGUF files, each a target of its own.
const TARGETS: [&str; 9] = ["template", "json", "jsonl", "csv", "tsv", "txt", "parquet", "arrow", "gguf"];

/// Kinds of folders of models.
const FOLDERS: [&str; 2] = ["safetensors", "bnb"];

/// `cargo xtask fuzz [target] [--runs N]`
pub fn run_all(words: &[&str]) -> Result<()> {
    let all = [&TARGETS[..], &FOLDERS[..]].concat();
    let (mut targets, mut runs) = (all.clone(), "100000".to_string());
    let mut words = words.iter();
    while let Some(word) = words.next() {
        match *word {
            "--runs" => runs = words.next().ok_or("`--runs`: expected a number")?.to_string(),
            target if all.contains(&target) => targets = vec![target],
            other => return Err(format!("`{other}` is no target; expected one of {}", all.join(", "))),
        }
    }
    runs.parse::<u64>().map_err(|_| format!("`--runs`: expected a number, found `{runs}`"))?;
    let fuzzer = Command::new("cargo")
        .args(["fuzz", "--version"])
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status();
    let with_fuzzer = fuzzer.is_ok_and(|status| status.success());
    for target in targets {
        if FOLDERS.contains(&target) {
            let words = [
                "test",
                "--release",
                "--package",
                "ferrotune-tests",
                "--test",
                "fuzz_files",
                "--",
                "--nocapture",
            ];
            run(cargo(&words).env("FUZZ_TARGET", target).env("FUZZ_RUNS", &runs))?;
        } else if with_fuzzer {
            seed(target)?;
            let limit = "-rss_limit_mb=2048";
            // Without a sanitizer, the stable compiler has all that is needed; it only has to be told so.
            let words = ["fuzz", "run", "--sanitizer", "none", target, "--", limit, "-timeout=30"];
            let mut command = Command::new("cargo");
            command.args(words).arg(format!("-runs={runs}")).env("RUSTC_BOOTSTRAP", "1");
            run(command.current_dir(root()))?;
        } else {
            eprintln!("{target}: by mutations; `cargo install cargo-fuzz` looks deeper");
            let test: &[&str] = match target {
                "template" => &["ferrotune-data", "--test", "fuzz_templates"],
                "gguf" => &["ferrotune-model", "--lib", "gguf::tests::damaged"],
                _ => &["ferrotune-data", "--test", "fuzz_readers"],
            };
            let words = [&["test", "--release", "--package"], test, &["--", "--nocapture"]].concat();
            run(cargo(&words).env("FUZZ_TARGET", target).env("FUZZ_RUNS", &runs))?;
        }
    }
    Ok(())
}

/// Puts the small files of the tests where cargo-fuzz begins.
fn seed(target: &str) -> Result<()> {
    let (folder, ending) = match target {
        "template" => ("tests/fixtures/llama_tiny", "jinja"),
        "gguf" => ("tests/fixtures/gguf", "gguf"),
        kind => ("tests/fixtures/rows", kind),
    };
    let corpus = root().join("fuzz/corpus").join(target);
    let wrong = |error: std::io::Error| format!("{}: {error}", corpus.display());
    fs::create_dir_all(&corpus).map_err(wrong)?;
    for entry in fs::read_dir(root().join(folder)).map_err(wrong)?.flatten() {
        let path = entry.path();
        if path.extension().is_some_and(|it| it == ending) {
            fs::copy(&path, corpus.join(entry.file_name())).map_err(wrong)?;
        }
    }
    Ok(())
}
