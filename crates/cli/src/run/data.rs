//! The data: files to marked samples.

use std::collections::HashSet;
use std::fmt::Display;

use ferrotune_data::{Conversation, MarkOptions, Place, Report, Sample, SourceOptions, encode_all, load};

use super::model::Vocabulary;
use crate::config::RunConfig;
use crate::console::Console;

/// The data sets of a run, read and encoded.
pub struct OpenData {
    /// Every conversation that was read, with the place of its row.
    pub conversations: Vec<(Place, Conversation)>,
    /// Name and format of each data set.
    pub sets: Vec<(String, String)>,
    /// What is trained on; without the conversations that gave nothing.
    pub samples: Vec<Sample>,
    /// Where each sample was read.
    places: Vec<Place>,
    /// What was cut and left out.
    pub report: Report,
}

impl OpenData {
    /// Reads and encodes all data sets of the config, one after another.
    ///
    /// # Errors
    /// When a set is not found, a row is malformed (with file and line), or nothing is left to train on.
    pub fn open(config: &RunConfig, vocabulary: &Vocabulary) -> anyhow::Result<OpenData> {
        let options = SourceOptions {
            substitute: config.dataset_values.clone(),
            max_samples: config.max_samples,
            ..SourceOptions::default()
        };
        let (mut conversations, mut sets, mut dropped) = (Vec::new(), Vec::new(), Vec::new());
        for name in &config.dataset {
            let loaded = load(name, &config.dataset_dir, &options)?;
            tracing::info!("data set `{name}`: {} rows of {}", loaded.conversations.len(), loaded.format);
            sets.push((name.clone(), loaded.format));
            conversations.extend(loaded.conversations);
            dropped.extend(loaded.dropped);
        }
        let (samples, mut report) =
            encode_all(&conversations, &vocabulary.template, &vocabulary.tokenizer, &mark_options(config))?;
        let without: HashSet<&Place> = report.dropped.iter().map(|it| &it.place).collect();
        let places = conversations.iter().map(|(place, _)| place).filter(|it| !without.contains(it)).cloned();
        let places = places.collect();
        dropped.append(&mut report.dropped);
        report.dropped = dropped;
        Ok(OpenData { conversations, sets, samples, places, report })
    }

    /// What the config evaluates on, if anything.
    ///
    /// # Errors
    /// As [`OpenData::open`].
    pub fn open_evaluation(config: &RunConfig, vocabulary: &Vocabulary) -> anyhow::Result<Option<OpenData>> {
        if config.eval_dataset.is_empty() {
            return Ok(None);
        }
        let config = RunConfig { dataset: config.eval_dataset.clone(), ..config.clone() };
        OpenData::open(&config, vocabulary).map(Some)
    }

    /// Where a sample was read.
    pub fn place(&self, sample: usize) -> &dyn Display {
        self.places.get(sample).map_or(&"unknown", |place| place)
    }

    /// Says what was cut and left out.
    pub fn warn(&self, console: &Console) {
        let report = &self.report;
        if let Some(first) = report.dropped.first() {
            let count = report.dropped.len();
            console.warn(format!("{count} rows are left out; the first, {}: {}", first.place, first.reason));
        }
        if report.truncated > 0 {
            console.warn(format!(
                "{} of {} samples are longer than `cutoff_len` and lose {} tokens at their ends",
                report.truncated, report.samples, report.cut_tokens
            ));
        }
    }

    /// Tokens of the largest micro-batch there can be.
    pub fn longest_batch(&self, config: &RunConfig) -> usize {
        let size = config.per_device_train_batch_size;
        if config.packing {
            return size.min(self.samples.len()) * config.cutoff_len;
        }
        self.report.lengths.iter().rev().take(size).sum()
    }
}

/// How conversations are marked and cut, by the config.
pub fn mark_options(config: &RunConfig) -> MarkOptions {
    MarkOptions {
        train_on_prompt: config.train_on_prompt,
        mask_history: config.mask_history,
        default_system: config.default_system.clone(),
        split_control_tokens: !config.allow_control_tokens,
        ..MarkOptions::new(config.cutoff_len)
    }
}
