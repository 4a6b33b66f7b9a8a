//! The project's own chores: `cargo xtask <verb>`. Standard library only, so that it builds in a second anywhere.

mod arrows;
mod bench;
mod check;
mod fixtures;
mod fuzz;
mod gpu_test;
mod kernels;
mod peers;
mod python;
mod quickstart;
mod sha256;
mod test_model;

use std::env;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

const USAGE: &str = "cargo xtask <verb>

  check [--no-model]   everything a change has to pass, cheapest first (test is the same)
  arrows               which crate may know which
  kernels              compiles kernels/*.cu to the PTX that is checked in; with
    --check              only compares the PTX with its sources, without a compiler
    --fetch-nvcc         brings nvcc where there is none (100 MB, with pip, into target/cuda)
    --verbose            shows the registers, spills and shared memory of every kernel
  quickstart           builds, fetches SmolLM2, fine-tunes it, shows its answers before and after
  gpu-test             builds what tests/gpu/run.py needs on a machine with a GPU, into target/gpu-test
  bench cpu            speed and memory of training on this machine's cores
  bench gpu CONFIG [key=value …]  a few steps of a config (a path from the top) on the GPU: speed, operations, and how far each kernel is from its bound
  fuzz [kind] [--runs N]   hostile chat templates (template), damaged files: json, jsonl, csv, tsv, txt, parquet, arrow,
                       safetensors, bnb, gguf
  peers [words]        trains a tiny model of each family, and lets transformers, PEFT and bitsandbytes read what leaves;
                       words go to tests/peers.py; FERROTUNE_PEERS_PYTHON names a Python that has these already
  peers llama.cpp [words]  llama.cpp reads the GGUF files; FERROTUNE_PEERS_LLAMA_CPP_PYTHON likewise
  peers outcome        both on the files of tests/outcome.rs; what they agree with is recorded in tests/fixtures/outcome.json
  fetch-model          only brings SmolLM2 into the model cache, and prints where it is";

/// What went wrong, in one line.
type Result<T> = std::result::Result<T, String>;

fn main() -> ExitCode {
    let words: Vec<String> = env::args().skip(1).collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    if let Err(error) = env::set_current_dir(root()) {
        eprintln!("xtask: can't enter {}: {error}", root().display());
        return ExitCode::FAILURE;
    }
    let done = match words.as_slice() {
        ["check" | "test"] => check::run(check::Model::Fetch),
        ["check" | "test", "--no-model"] => check::run(check::Model::None),
        ["arrows"] => arrows::run(),
        ["kernels", options @ ..] => kernels::run(options),
        ["quickstart"] => quickstart::run_all(),
        ["gpu-test"] => gpu_test::prepare(),
        ["bench", "cpu"] => bench::cpu(),
        ["bench", "gpu", config, keys @ ..] => bench::gpu(config, keys),
        ["fuzz", words @ ..] => fuzz::run_all(words),
        ["peers", words @ ..] => peers::run_all(words),
        ["fetch-model"] => test_model::fetch().map(|path| println!("{}", path.display())),
        _ => {
            eprintln!("{USAGE}");
            return ExitCode::from(2);
        }
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("xtask: {error}");
            ExitCode::FAILURE
        }
    }
}

/// The top of the repository.
fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap_or(Path::new("."))
}

/// The program, where `cargo build --release` leaves it.
fn program() -> PathBuf {
    let target = env::var_os("CARGO_TARGET_DIR").map_or_else(|| root().join("target"), PathBuf::from);
    target.join("release").join(format!("ferrotune{}", env::consts::EXE_SUFFIX))
}

/// `cargo` with these words.
fn cargo(words: &[&str]) -> Command {
    let mut command = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.args(words);
    command
}

/// Runs a command to its end; anything but success is an error that shows what was run.
fn run(command: &mut Command) -> Result<()> {
    let shown = shown(command);
    match command.status() {
        Ok(status) if status.success() => Ok(()),
        Ok(status) => Err(format!("`{shown}` failed ({status})")),
        Err(error) => Err(format!("can't run `{shown}`: {error}")),
    }
}

/// A command as one would type it.
fn shown(command: &Command) -> String {
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    words.map(|word| word.to_string_lossy()).collect::<Vec<_>>().join(" ")
}
