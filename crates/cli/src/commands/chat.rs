//! `ferrotune chat`

use crate::Outcome;
use crate::args::{ChatArgs, split_words};
use crate::config::RunConfig;
use crate::console::Console;

/// Talks, or answers one prompt.
pub fn run(args: &ChatArgs, console: &Console) -> anyhow::Result<Outcome> {
    let config = config(args)?;
    config.notes.iter().for_each(|note| console.note(note));
    anyhow::bail!("`ferrotune chat` is not built yet")
}

/// The config with the flags over it.
fn config(args: &ChatArgs) -> anyhow::Result<RunConfig> {
    let (file, words) = split_words(&args.words)?;
    let mut config = RunConfig::load(file.as_deref(), &words)?;
    let _ = &mut config;
    Ok(config)
}
