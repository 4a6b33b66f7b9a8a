//! Fuzzing chat templates and the readers of data and of models: with cargo-fuzz where it is installed, else by mutations within a
//! test.

use std::fs;
use std::process::{Command, Stdio};

use crate::{Result, cargo, root, run};

/// Chat templates, the kinds of files of data, and those of models, each a target of its own.
const TARGETS: [&str; 11] =
    ["template", "json", "jsonl", "csv", "tsv", "txt", "parquet", "arrow", "safetensors", "bnb", "gguf"];

/// `cargo xtask fuzz [target] [--runs N]`
pub fn run_all(words: &[&str]) -> Result<()> {
    let (mut targets, mut runs) = (TARGETS.to_vec(), "100000".to_string());
    let mut words = words.iter();
    while let Some(word) = words.next() {
        match *word {
            "--runs" => runs = words.next().ok_or("`--runs`: expected a number")?.to_string(),
            target if TARGETS.contains(&target) => targets = vec![target],
            other => return Err(format!("`{other}` is no target; expected one of {}", TARGETS.join(", "))),
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
        if with_fuzzer {
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
                "safetensors" | "bnb" => &FILES,
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

/// The test that makes small models and damages them.
const FILES: [&str; 3] = ["ferrotune-tests", "--test", "fuzz_files"];

/// Puts the small files of the tests where cargo-fuzz begins.
fn seed(target: &str) -> Result<()> {
    let (folder, ending) = match target {
        "safetensors" | "bnb" => return seed_model(target),
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

/// Puts a small model there, which the test of damaged files makes.
fn seed_model(target: &str) -> Result<()> {
    let corpus = root().join("fuzz/corpus").join(target);
    fs::create_dir_all(&corpus).map_err(|error| format!("{}: {error}", corpus.display()))?;
    let words = [&["test", "--release", "--quiet", "--package"], &FILES[..]].concat();
    let mut test = cargo(&words);
    run(test.env("FUZZ_TARGET", target).env("FUZZ_RUNS", "0").env("FUZZ_CORPUS", corpus))
}
