//! What a change has to pass, cheapest first, with the time of each phase.

use std::time::Instant;

use crate::{Result, arrows, cargo, fixtures, kernels, run as run_command, test_model};

/// Whether the tests on the real model run.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Model {
    /// It is fetched first where it isn't cached.
    Fetch,
    /// They are skipped, each saying so.
    None,
}

type Phase = Box<dyn FnOnce() -> Result<()>>;

/// `cargo xtask check`
pub fn run(model: Model) -> Result<()> {
    let step = |words: &'static [&'static str]| -> Phase { Box::new(move || run_command(&mut cargo(words))) };
    run_phases(vec![
        ("format", step(&["fmt", "--all", "--check"])),
        ("arrows", Box::new(arrows::run)),
        ("fixtures", Box::new(fixtures::run)),
        ("kernels", Box::new(|| kernels::run(&["--check"]))),
        (
            "clippy",
            step(&[
                "clippy",
                "--release",
                "--locked",
                "--workspace",
                "--all-targets",
                "--",
                "-D",
                "warnings",
            ]),
        ),
        // The integration tests run the program, so it is built before them.
        ("build", step(&["build", "--release", "--locked", "--workspace", "--all-targets"])),
        ("tests", Box::new(move || tests(model))),
        ("doc tests", step(&["test", "--release", "--locked", "--workspace", "--doc", "--quiet"])),
    ])
}

fn tests(model: Model) -> Result<()> {
    let mut command =
        cargo(&["test", "--release", "--locked", "--workspace", "--lib", "--bins", "--tests", "--quiet"]);
    match model {
        Model::Fetch => command.env("FERROTUNE_TEST_MODEL", test_model::fetch()?),
        Model::None => command.env_remove("FERROTUNE_TEST_MODEL"),
    };
    run_command(&mut command)
}

/// Runs the phases up to the first that fails, and prints their times in any case.
fn run_phases(phases: Vec<(&'static str, Phase)>) -> Result<()> {
    let mut times = Vec::new();
    let mut outcome = Ok(());
    for (name, phase) in phases {
        eprintln!("── {name}");
        let start = Instant::now();
        outcome = phase();
        times.push((name, start.elapsed().as_secs_f64()));
        if outcome.is_err() {
            break;
        }
    }
    eprintln!("── times");
    for (name, seconds) in &times {
        eprintln!("{name:<10} {seconds:>7.1} s");
    }
    eprintln!("{:<10} {:>7.1} s", "together", times.iter().map(|it| it.1).sum::<f64>());
    outcome
}
