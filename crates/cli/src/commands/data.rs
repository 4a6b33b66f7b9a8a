//! `ferrotune data`

use crate::Outcome;
use crate::args::DataArgs;
use crate::config::RunConfig;
use crate::console::Console;

/// Shows what the model will see.
pub fn run(args: &DataArgs, console: &Console) -> anyhow::Result<Outcome> {
    let config = RunConfig::load(Some(&args.config), &args.overrides)?;
    config.notes.iter().for_each(|note| console.note(note));
    anyhow::bail!("`ferrotune data` is not built yet")
}
