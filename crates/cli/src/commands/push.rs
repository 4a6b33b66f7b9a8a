//! `ferrotune push`, and what `train` and `export` send.

use std::path::Path;

use ferrotune_hub::{HubOptions, Push, check_push, model_files, push};

use crate::Outcome;
use crate::args::PushArgs;
use crate::config::RunConfig;
use crate::console::{Console, bytes};
use crate::run::{download_bar, hub_options};

/// Sends a folder.
pub fn run(args: &PushArgs, console: &Console) -> anyhow::Result<Outcome> {
    let mut words = args.overrides.clone();
    words.extend(args.private.then(|| "hub_private_repo=true".to_string()));
    let config = RunConfig::load(None, &words)?;
    Destination::known(&config, &args.name, &args.message)?.send(&args.folder, console)?;
    Ok(Outcome::Done)
}

/// A name on the hub that may be written to.
pub struct Destination {
    options: HubOptions,
    name: String,
    private: Option<bool>,
    summary: String,
}

impl Destination {
    /// Asks the hub whether it may be; nothing is changed there.
    ///
    /// # Errors
    /// When it may not, or nobody can be asked.
    pub fn known(config: &RunConfig, name: &str, summary: &str) -> anyhow::Result<Destination> {
        let (options, private) = (hub_options(config), config.hub_private_repo);
        let name = check_push(&Push { name, private, summary }, &options)?;
        Ok(Destination { options, name, private, summary: summary.to_string() })
    }

    /// Sends a folder's model or adapter, and says where it is.
    ///
    /// # Errors
    /// When the hub doesn't take it; the message says how to try again.
    pub fn send(&self, folder: &Path, console: &Console) -> anyhow::Result<()> {
        let files = model_files(folder)?;
        let Destination { name, private, summary, .. } = self;
        let wanted = Push { name, private: *private, summary };
        let mut progress = download_bar(console);
        let pushed = push(&files, &wanted, &self.options, &mut progress).map_err(|error| {
            let folder = folder.display();
            anyhow::anyhow!("{error}. {folder} is whole; to send it again: ferrotune push {folder} {name}")
        })?;
        if pushed.had > 0 {
            console.note(format!("the hub had {} of it already", bytes(pushed.had)));
        }
        console.plain(format!("sent {} files to {}", files.len(), pushed.page));
        Ok(())
    }
}
