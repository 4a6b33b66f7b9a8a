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
    let (file, mut words) = split_words(&args.words)?;
    let mut flag =
        |key: &str, value: Option<String>| words.extend(value.map(|value| format!("{key}={value}")));
    flag("model_name_or_path", args.model.clone());
    flag("adapter_name_or_path", args.adapter.as_ref().map(|path| path.display().to_string()));
    flag("default_system", args.system.clone());
    flag("do_sample", args.greedy.then(|| "false".to_string()));
    flag("temperature", args.temperature.map(|it| it.to_string()));
    flag("top_p", args.top_p.map(|it| it.to_string()));
    flag("min_p", args.min_p.map(|it| it.to_string()));
    flag("seed", args.seed.map(|it| it.to_string()));
    flag("max_new_tokens", args.max_new_tokens.map(|it| it.to_string()));
    RunConfig::load(file.as_deref(), &words)
}
