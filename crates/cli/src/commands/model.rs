//! `ferrotune model`

use crate::Outcome;
use crate::args::ModelArgs;
use crate::config::RunConfig;
use crate::console::Console;

/// Shows family, parameters and memory.
pub fn run(args: &ModelArgs, _console: &Console) -> anyhow::Result<Outcome> {
    let _config = RunConfig::load(None, &args.overrides)?;
    anyhow::bail!("`ferrotune model` is not built yet")
}
