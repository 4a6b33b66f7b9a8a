//! `ferrotune`: what was typed, opened and checked, handed to the crates.
//!
//! [`RunConfig`](config::RunConfig) is exactly what was typed; each verb has its file in [`commands`].

// A program has no outside: `pub` here means "for the other files".
#![allow(unreachable_pub)]

mod args;
mod commands;
mod config;
mod console;
mod machine;
mod plot;
mod results;
mod run;
mod run_log;
mod similarity;

use std::process::ExitCode;

use args::{Command, DebugCommand, Program};
use console::{Console, Usage};

/// How a verb ended without an error.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// All of it was done.
    Done,
    /// Stopped before the end, by a signal or `max_time`; all has been saved, and the same run can go on.
    Interrupted,
}

/// The exit code of what was stopped and saved: sysexits.h's EX_TEMPFAIL, "try again later".
const SAVED: u8 = 75;
/// The exit code of what was stopped at once.
pub const INTERRUPTED: u8 = 130;

fn main() -> ExitCode {
    let program = Program::read();
    let console = Console::new(program.quiet, program.color);
    start_tracing(program.verbose, console.color_err);
    let outcome = run(&program.command, &console);
    run::wait_for_writers();
    match outcome {
        Ok(Outcome::Done) => ExitCode::SUCCESS,
        Ok(Outcome::Interrupted) => ExitCode::from(SAVED),
        // The reader of a pipe went away (`| head`): it has what it wanted.
        Err(error) if is_broken_pipe(&error) => ExitCode::SUCCESS,
        Err(error) => {
            console.error(&error);
            ExitCode::from(if error.is::<Usage>() { 2 } else { 1 })
        }
    }
}

fn run(command: &Command, console: &Console) -> anyhow::Result<Outcome> {
    match command {
        Command::Train(args) => commands::train::run(args, console),
        Command::Chat(args) => commands::chat::run(args, console),
        Command::Export(args) => commands::export::run(args, console),
        Command::Push(args) => commands::push::run(args, console),
        Command::Data(args) => commands::data::run(args, console),
        Command::Model(args) => commands::model::run(args, console),
        Command::Debug(args) => match &args.command {
            DebugCommand::Logits(args) => commands::debug::logits(args, console),
            DebugCommand::Gradients(args) => commands::debug::gradients(args, console),
            DebugCommand::Tokenize(args) => commands::debug::tokenize(args, console),
            DebugCommand::Render(args) => commands::debug::render(args, console),
        },
        Command::Runs(args) => commands::runs::run(args, console),
        Command::Watch(args) => commands::watch::run(args, console),
        Command::Doctor => commands::doctor::run(console),
    }
}

fn is_broken_pipe(error: &anyhow::Error) -> bool {
    error.chain().any(|cause| {
        cause.downcast_ref::<std::io::Error>().is_some_and(|it| it.kind() == std::io::ErrorKind::BrokenPipe)
    })
}

/// `-v` and FERROTUNE_LOG (as in `FERROTUNE_LOG=ferrotune_model=debug`) choose what is traced, to standard error.
fn start_tracing(verbose: u8, color: bool) {
    let level = match verbose {
        0 => "warn",
        1 => "info",
        2 => "debug",
        _ => "trace",
    };
    let filter = tracing_subscriber::EnvFilter::try_from_env("FERROTUNE_LOG")
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new(level));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(color)
        .without_time()
        .with_target(verbose > 1)
        .init();
}
