//! Runs the program as a user does, in a folder of its own.

use std::env;
use std::fs;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};

/// A tiny Llama with random weights, in the repository.
pub const TINY: &str = "tests/fixtures/llama_tiny";

/// A folder that is gone when the test is over.
pub struct Dir(PathBuf);

impl Dir {
    /// An empty folder.
    pub fn new() -> Dir {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let name = format!("ferrotune-{}-{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
        let path = env::temp_dir().join(name);
        fs::create_dir_all(&path).expect("a temporary folder");
        Dir(path)
    }

    /// The folder.
    pub fn path(&self) -> &Path {
        &self.0
    }

    /// Writes a file and returns its path.
    pub fn file(&self, name: &str, text: impl AsRef<[u8]>) -> PathBuf {
        let path = self.0.join(name);
        fs::create_dir_all(path.parent().expect("a folder")).expect("a folder");
        fs::write(&path, text).expect("a file");
        path
    }

    /// The losses in the log of the run in this folder.
    pub fn losses(&self, output_dir: &str) -> Vec<f64> {
        let log = fs::read_to_string(self.0.join(output_dir).join("trainer_log.jsonl")).expect("the log");
        let loss =
            |line: &str| serde_json::from_str::<serde_json::Value>(line).expect("JSON")["loss"].as_f64();
        log.lines().filter_map(loss).collect()
    }

    /// The logits that `debug logits` prints for these words, position after position.
    #[track_caller]
    pub fn logits(&self, words: &[&str]) -> Vec<f64> {
        let ran = self.ferrotune(&[&["debug", "logits"], words].concat()).succeeds();
        let value: serde_json::Value = serde_json::from_str(&ran.stdout).expect("JSON");
        let rows = value["logits"].as_array().expect("rows").iter();
        let numbers = rows.flat_map(|it| it.as_array().expect("a row"));
        numbers.map(|it| it.as_f64().expect("a number")).collect()
    }

    /// The program, run in this folder and without what the developer's environment sets.
    pub fn ferrotune(&self, words: &[&str]) -> Run {
        let mut command = Command::new(program());
        command.args(words).current_dir(&self.0).stdin(Stdio::null());
        command
            .env("FERROTUNE_HOME", self.0.join("home"))
            .env("HF_HOME", self.0.join("hf"))
            .env("HF_HUB_OFFLINE", "1");
        for name in
            ["NO_COLOR", "FERROTUNE_LOG", "HF_TOKEN", "HF_HUB_CACHE", "RUST_BACKTRACE", "USE_MODELSCOPE_HUB"]
        {
            command.env_remove(name);
        }
        Run(command)
    }
}

impl Drop for Dir {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// A run that is about to start.
pub struct Run(Command);

impl Run {
    /// With this variable.
    pub fn env(mut self, name: &str, value: impl AsRef<std::ffi::OsStr>) -> Run {
        self.0.env(name, value);
        self
    }

    /// The command itself, for what the helpers don't cover.
    pub fn command(self) -> Command {
        self.0
    }

    /// Runs it with this on standard input.
    #[track_caller]
    pub fn input(mut self, text: &str) -> Ran {
        let mut child = self
            .0
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("the program");
        child.stdin.take().expect("its input").write_all(text.as_bytes()).expect("a program that reads");
        Ran::new(child.wait_with_output().expect("the program"))
    }

    /// Runs it, and expects success.
    #[track_caller]
    pub fn succeeds(mut self) -> Ran {
        let ran = Ran::new(self.0.output().expect("the program"));
        assert_eq!(ran.code, Some(0), "stdout:\n{}\nstderr:\n{}", ran.stdout, ran.stderr);
        ran
    }

    /// Runs it, and expects this exit code, nothing on standard output and no panic.
    #[track_caller]
    pub fn fails(mut self, code: i32) -> Ran {
        let ran = Ran::new(self.0.output().expect("the program"));
        assert_eq!(ran.code, Some(code), "stdout:\n{}\nstderr:\n{}", ran.stdout, ran.stderr);
        assert_eq!(ran.stdout, "", "an error is no result");
        ran
    }

    /// Runs it, and expects this exit code and exactly these lines on standard error.
    #[track_caller]
    pub fn fails_with(self, code: i32, stderr: &str) {
        let ran = self.fails(code);
        assert_eq!(ran.stderr.trim_end(), stderr);
    }
}

/// A run that is over.
#[derive(Debug)]
pub struct Ran {
    /// Its exit code; none when a signal ended it.
    pub code: Option<i32>,
    /// Its results.
    pub stdout: String,
    /// Everything else that it said.
    pub stderr: String,
}

impl Ran {
    #[track_caller]
    fn new(output: Output) -> Ran {
        let text = |bytes: Vec<u8>| String::from_utf8(bytes).expect("UTF-8");
        let ran =
            Ran { code: output.status.code(), stdout: text(output.stdout), stderr: text(output.stderr) };
        assert!(!ran.stderr.contains("panicked"), "{}", ran.stderr);
        ran
    }

    /// Expects this on standard error.
    #[track_caller]
    pub fn says(self, part: &str) -> Ran {
        assert!(self.stderr.contains(part), "`{part}` is not in:\n{}", self.stderr);
        self
    }

    /// Expects this on standard output.
    #[track_caller]
    pub fn prints(self, part: &str) -> Ran {
        assert!(self.stdout.contains(part), "`{part}` is not in:\n{}", self.stdout);
        self
    }
}

/// The program that lies beside this test in the target folder.
pub fn program() -> PathBuf {
    let test = env::current_exe().expect("the test's own path");
    let folder = test.parent().and_then(Path::parent).expect("target/release");
    let path = folder.join(format!("ferrotune{}", env::consts::EXE_SUFFIX));
    assert!(
        path.is_file(),
        "{} is missing; build it first: `cargo build --release -p ferrotune-cli`",
        path.display()
    );
    path
}

/// A file of the repository.
pub fn repository(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the repository").join(name)
}

/// SmolLM2's file, which `cargo xtask test` fetches; without it a test on the real model does nothing and says so.
pub fn test_model() -> Option<PathBuf> {
    let Some(path) = env::var_os("FERROTUNE_TEST_MODEL") else {
        eprintln!(
            "skipped: FERROTUNE_TEST_MODEL is not set; `cargo xtask test` fetches the model and sets it"
        );
        return None;
    };
    let path = PathBuf::from(path);
    assert!(path.is_file(), "FERROTUNE_TEST_MODEL: {} is missing", path.display());
    Some(path)
}
