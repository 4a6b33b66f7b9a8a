//! `ferrotune train`

use crate::Outcome;
use crate::args::TrainArgs;
use crate::config::RunConfig;
use crate::console::Console;

/// Trains what the config says.
pub fn run(args: &TrainArgs, console: &Console) -> anyhow::Result<Outcome> {
    let config = RunConfig::load(Some(&args.config), &args.overrides)?;
    config.notes.iter().for_each(|note| console.note(note));
    anyhow::bail!("`ferrotune train` is not built yet")
}
