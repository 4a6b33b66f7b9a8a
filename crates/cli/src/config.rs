//! A run as it was typed: a YAML file and `key=value` words over the defaults.
//!
//! Keys are LLaMA-Factory's (which are transformers' `TrainingArguments` and a few), so that its
//! files run unchanged or say which key does not. [`RunConfig`] opens nothing: that is `Run`'s part.

mod checks;
mod choices;
mod kinds;
mod others;
mod settings;
mod yaml;

use std::fmt::Write as _;
use std::path::Path;

use anyhow::Context as _;

use crate::console::Usage;
use others::{Fate, other_key, other_names};

pub use choices::{
    BestMetric, EvalStrategy, ExportFormat, FinetuningType, HubName, InferDtype, InitLoraWeights,
    MixStrategy, OnBadRow, Optimizer, QuantizationBit, Recompute, SaveStrategy, Stage, TemplateName,
};
pub use kinds::Resume;
pub use settings::RunConfig;
pub use yaml::{Data, Node, parse as parse_yaml};

impl RunConfig {
    /// Reads the file, if one is given, and then the words of the command line.
    ///
    /// # Errors
    /// When the file can't be read or any key or value is wrong: one [`Usage`] error that lists all of them.
    pub fn load(file: Option<&Path>, words: &[String]) -> anyhow::Result<RunConfig> {
        let text = match file {
            Some(path) if path.extension().is_some_and(|it| it == "jsonl") => {
                let shown = path.display();
                let message = format!(
                    "{shown}: this is data; a config is a YAML file, in which `dataset: {shown}` names it"
                );
                return Err(Usage::one(message).into());
            }
            Some(path) => Some(read_file(path)?),
            None => None,
        };
        let name = file.map(|path| path.display().to_string()).unwrap_or_default();
        RunConfig::from_text(&name, text.as_deref().unwrap_or(""), words)
    }

    /// [`RunConfig::load`] with the file's text already read.
    fn from_text(name: &str, text: &str, words: &[String]) -> anyhow::Result<RunConfig> {
        let mut config = RunConfig::default();
        let mut problems = Vec::new();
        match yaml::parse(text) {
            Err(error) => return Err(Usage::one(format!("{name}:{}: {}", error.line, error.message)).into()),
            Ok(node) if node.is_null() => {}
            Ok(Node { data: Data::Map(entries), .. }) => {
                // What the command line replaces need not be right in the file.
                let replaced =
                    |key: &str| words.iter().any(|word| word.split_once('=').is_some_and(|it| it.0 == key));
                for (key, value) in entries.iter().filter(|(key, _)| !replaced(key)) {
                    config.take(key, value, &format!("{name}:{}: ", value.line), &mut problems);
                }
            }
            Ok(node) => {
                let message =
                    format!("{name}:{}: expected lines of `key: value`, found {}", node.line, node.shown());
                return Err(Usage::one(message).into());
            }
        }
        for word in words {
            config.take_word(word, &mut problems);
        }
        for (key, message) in config.contradictions() {
            problems.push(format!("{}`{key}`: {message}", config.place(key)));
        }
        if problems.is_empty() { Ok(config) } else { Err(Usage(problems).into()) }
    }

    /// One `key=value` of the command line. A dot reaches into a mapping: `dataset_values.name=Ada`.
    fn take_word(&mut self, word: &str, problems: &mut Vec<String>) {
        let place = "command line: ";
        let Some((key, text)) = word.split_once('=') else {
            problems.push(format!("{place}expected `key=value`, found `{word}`"));
            return;
        };
        let key = key.trim_start_matches("--");
        if let Some(name) = key.strip_prefix("dataset_values.") {
            self.dataset_values.insert(name.to_string(), text.to_string());
            self.places.insert("dataset_values", place.to_string());
            return;
        }
        // Lists and mappings are YAML; anything else is text as it stands, `#` and `: ` included.
        let value = match text.trim_start().starts_with(['[', '{', '"', '\'']).then(|| yaml::parse(text)) {
            Some(Ok(node)) => node,
            Some(Err(error)) => {
                problems.push(format!("{place}`{key}`: {}", error.message));
                return;
            }
            None => Node::plain(0, text),
        };
        self.take(key, &value, place, problems);
    }

    /// Sets a key, or says what becomes of it.
    fn take(&mut self, key: &str, value: &Node, place: &str, problems: &mut Vec<String>) {
        match self.set(key, value) {
            Some(Ok(name)) => {
                self.places.insert(name, place.to_string());
                return;
            }
            Some(Err(message)) => {
                problems.push(format!("{place}`{key}`: {message}"));
                return;
            }
            None => {}
        }
        match other_key(key) {
            Some(other) if other.is_off(value) => {}
            Some(other) => match other.fate {
                Fate::Ignored(reason) => {
                    self.notes.push(format!("{place}`{}` does nothing: {reason}", other.name))
                }
                Fate::Later => {
                    problems.push(format!("{place}`{}` is not there yet; leave it out", other.name))
                }
                Fate::Instead(remedy) => {
                    problems.push(format!("{place}`{}` is not supported: {remedy}", other.name));
                }
            },
            None => problems.push(format!("{place}`{key}` is not a key{}", nearest(key))),
        }
    }

    /// All keys that work, for help.
    pub fn help() -> String {
        let mut text = String::from("Keys of CONFIG, with their defaults:\n");
        let mut group = "";
        for key in RunConfig::keys() {
            if key.group != group {
                group = key.group;
                let _ = write!(text, "\n  {group}\n");
            }
            let _ = writeln!(
                text,
                "    {}: {}\n        {}",
                key.name,
                key.default,
                key.help.trim_end_matches('.')
            );
        }
        text
    }
}

fn read_file(path: &Path) -> anyhow::Result<String> {
    let shown = path.display();
    match std::fs::read(path) {
        Ok(bytes) => String::from_utf8(bytes)
            .map_err(|_| Usage::one(format!("{shown}: not UTF-8 text; a config is a YAML file")).into()),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            Err(Usage::one(format!("{shown}: no such file")).into())
        }
        Err(error) => Err(error).with_context(|| format!("can't read {shown}")),
    }
}

/// `; did you mean …?`, or where the keys are listed.
fn nearest(key: &str) -> String {
    let settings = RunConfig::keys().into_iter().map(|it| it.name);
    let typed = key.to_ascii_lowercase().replace('-', "_");
    let best = settings
        .chain(other_names())
        .map(|name| (strsim::normalized_damerau_levenshtein(&typed, name), name))
        .max_by(|a, b| a.0.total_cmp(&b.0));
    match best {
        Some((likeness, name)) if likeness >= 0.5 => format!("; did you mean `{name}`?"),
        _ => "; `ferrotune train --help` lists the keys".to_string(),
    }
}

#[cfg(test)]
#[path = "config/tests.rs"]
mod tests;
