//! `ferrotune train`

use crate::Outcome;
use crate::args::TrainArgs;
use crate::config::RunConfig;
use crate::console::Console;
use crate::run::Run;

/// Trains what the config says.
pub fn run(args: &TrainArgs, console: &Console) -> anyhow::Result<Outcome> {
    let mut run = Run::open(RunConfig::load(Some(&args.config), &args.overrides)?, console)?;
    let batches = run.batches()?;
    let steps = run.config.total_steps(batches.steps_per_epoch(run.config.gradient_accumulation_steps));
    console.note(format!("{steps} steps"));
    anyhow::bail!("`ferrotune train` is not built yet")
}
