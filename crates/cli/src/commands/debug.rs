//! `ferrotune debug`: JSON for bug reports and comparisons.

use crate::Outcome;
use crate::args::{LogitsArgs, RenderArgs, TokenizeArgs};
use crate::config::RunConfig;
use crate::console::Console;

/// Logits of token ids.
pub fn logits(args: &LogitsArgs, _console: &Console) -> anyhow::Result<Outcome> {
    let _config = RunConfig::load(None, &args.overrides)?;
    anyhow::bail!("`ferrotune debug logits` is not built yet")
}

/// Token ids of a text.
pub fn tokenize(_args: &TokenizeArgs, _console: &Console) -> anyhow::Result<Outcome> {
    anyhow::bail!("`ferrotune debug tokenize` is not built yet")
}

/// A rendered conversation.
pub fn render(_args: &RenderArgs, _console: &Console) -> anyhow::Result<Outcome> {
    anyhow::bail!("`ferrotune debug render` is not built yet")
}
