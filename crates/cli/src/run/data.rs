//! The data: names to files, to marked samples, mixed, with a part set apart for evaluation.

use std::cell::Cell;
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use anyhow::bail;
use ferrotune_data::cache::{self, CacheKey, Cached};
use ferrotune_data::{
    BatchOptions, Conversation, DataSet, Error as DataError, HubSet, Long, MarkOptions, Noticed, Place,
    PreparedSet, Purpose, Report, Result as DataResult, Sample, SetCounts, SourceOptions, StreamOptions,
    StreamedBatches, encode_conversation, encode_set, named_template, order, split, split_long,
};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde_json::{Map, Value};

use super::hub::fetch_data_set;
use super::mistake;
use super::model::Vocabulary;
use crate::config::{self, RunConfig, Stage, TemplateName};
use crate::console::{Console, Usage, counted, thousands};

/// Rows of each set of a stream that `ferrotune data` looks at.
const LOOK: usize = 1000;

/// What the data is opened for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DataUse {
    /// To be shown, whatever it is.
    Show,
    /// To be trained on, by a model of so many tokens.
    Train(usize),
    /// To be evaluated on by such a model, and answered.
    Evaluate(usize),
}

/// Where a sample was before samples were mixed.
#[derive(Clone, Copy, Debug, Default)]
struct Origin {
    set: usize,
    index: usize,
}

/// The data sets of a run, read and encoded.
pub struct OpenData {
    /// Every conversation that was read, with the place of its row; empty where they are only trained on.
    pub conversations: Vec<(Place, Conversation)>,
    /// Name and format of each data set.
    pub sets: Vec<(String, String)>,
    /// What reading each data set gave, and then each of `eval_dataset`.
    pub counts: Vec<SetCounts>,
    /// What is trained on, mixed; without the conversations that gave nothing.
    pub samples: Vec<Sample>,
    /// What is set apart for evaluation.
    pub evaluation: Vec<Sample>,
    /// Data set and number of each sample, both from 0.
    origins: Vec<Origin>,
    /// What was cut and left out.
    pub report: Report,
    /// Instead of `samples` where the data is read as it is needed.
    pub stream: Option<StreamedBatches>,
}

impl OpenData {
    /// Reads and encodes all data sets of the config.
    ///
    /// # Errors
    /// When a set is not found or is of no use for the stage, a row is malformed (with file and line, where
    /// `on_bad_row` is stop), or nothing is left to train on.
    pub fn open(
        config: &RunConfig,
        vocabulary: &Arc<Vocabulary>,
        wanted: DataUse,
        console: &Console,
    ) -> anyhow::Result<OpenData> {
        let opener = Opener { config, vocabulary, wanted, console };
        if let (DataUse::Train(tokens), true) = (wanted, config.streaming) {
            return opener.stream(tokens);
        }
        let mut data = OpenData::empty();
        let mut sets = Vec::new();
        for name in &config.dataset {
            let (conversations, set) = opener.set(name)?;
            data.conversations.extend(conversations);
            sets.push(set);
        }
        let mut dropped = Vec::new();
        let mut samples: Vec<Vec<(Sample, Origin)>> = Vec::new();
        for set in sets {
            data.sets.push((set.counts.name.clone(), set.counts.format.clone()));
            data.counts.push(set.counts);
            dropped.extend(set.dropped);
            let number = samples.len();
            let origin = |index| Origin { set: number, index };
            samples
                .push(set.samples.into_iter().enumerate().map(|(index, it)| (it, origin(index))).collect());
        }
        if samples.iter().all(Vec::is_empty) {
            let first = dropped.first().map(|it| format!("; the first one: {}: {}", it.place, it.reason));
            bail!("no conversation gives anything to train on{}", first.unwrap_or_default());
        }
        // A run opens these by themselves.
        let shown = if wanted == DataUse::Show { &config.eval_dataset[..] } else { &[] };
        for name in shown {
            let (_, set) = opener.set(name)?;
            data.counts.push(set.counts);
            data.evaluation.extend(set.samples);
            dropped.extend(set.dropped);
        }
        if config.val_size > 0.0 {
            data.evaluation = set_apart(&mut samples, config.val_size, config.seed);
            if samples.iter().all(Vec::is_empty) {
                return Err(nothing_left(config, data.evaluation.len()));
            }
        }
        (data.samples, data.origins) = mixed(samples, config).into_iter().unzip();
        data.report = Report::new(&data.samples, dropped);
        Ok(data)
    }

    fn empty() -> OpenData {
        OpenData {
            conversations: Vec::new(),
            sets: Vec::new(),
            counts: Vec::new(),
            samples: Vec::new(),
            evaluation: Vec::new(),
            origins: Vec::new(),
            report: Report::default(),
            stream: None,
        }
    }

    /// What the config evaluates on, if it names data sets for it.
    ///
    /// # Errors
    /// As [`OpenData::open`].
    pub fn open_evaluation(
        config: &RunConfig,
        vocabulary: &Arc<Vocabulary>,
        tokens: usize,
        console: &Console,
    ) -> anyhow::Result<Option<OpenData>> {
        if config.eval_dataset.is_empty() {
            return Ok(None);
        }
        let config = RunConfig {
            dataset: config.eval_dataset.clone(),
            eval_dataset: Vec::new(),
            val_size: 0.0,
            streaming: false,
            mix_strategy: config::MixStrategy::Concat,
            ..config.clone()
        };
        OpenData::open(&config, vocabulary, DataUse::Evaluate(tokens), console).map(Some)
    }

    /// The samples that `val_size` has set apart, if any.
    pub fn take_evaluation(&mut self) -> Option<OpenData> {
        let samples = std::mem::take(&mut self.evaluation);
        let report = Report::new(&samples, Vec::new());
        (!samples.is_empty()).then(|| OpenData { samples, report, ..OpenData::empty() })
    }

    /// Where a sample comes from, for people.
    pub fn origin(&self, sample: usize) -> String {
        let origin = self.origins.get(sample).and_then(|it| Some((&self.sets.get(it.set)?.0, it.index + 1)));
        origin.map_or_else(
            || format!("sample {} of the run", sample + 1),
            |(set, number)| format!("sample {number} of data set `{set}`"),
        )
    }

    /// Says what was cut and left out.
    pub fn warn(&self, console: &Console) {
        for counts in &self.counts {
            warn_of_rows(counts, console);
        }
        let report = &self.report;
        if let Some(first) = report.dropped.first() {
            let rows = rows(report.dropped.len(), "is left out", "are left out");
            console.warn(format!("{rows}; the first, {}: {}", first.place, first.reason));
        }
        if report.truncated > 0 {
            console.warn(format!(
                "{} of {} samples are longer than `cutoff_len` and lose {} tokens",
                thousands(report.truncated as u64),
                thousands(report.samples as u64),
                thousands(report.cut_tokens as u64)
            ));
        }
    }

    /// Tokens of the largest micro-batch there can be.
    pub fn longest_batch(&self, config: &RunConfig) -> usize {
        let size = config.per_device_train_batch_size;
        if self.stream.is_some() {
            return size * config.cutoff_len;
        }
        if config.packs() {
            return size.min(self.samples.len()) * config.cutoff_len;
        }
        self.report.lengths.iter().rev().take(size).sum()
    }
}

/// Says which rows of a set were left out, and what looks wrong with others.
pub fn warn_of_rows(counts: &SetCounts, console: &Console) {
    let name = &counts.name;
    for it in &counts.skipped {
        let rows = rows(it.rows, "is left out", "are left out");
        console.warn(format!("data set `{name}`: {rows}{}: {}", first(it), it.reason));
    }
    for it in &counts.doubtful {
        let rows = rows(it.rows, "has", "have");
        console.warn(format!("data set `{name}`: {rows} {}{}", it.reason, first(it)));
    }
}

fn rows(count: usize, one: &str, many: &str) -> String {
    format!("{} {}", counted(count as u64, "row"), if count == 1 { one } else { many })
}

/// Where the first of several rows is.
fn first(it: &Noticed) -> String {
    match it.first.first() {
        Some(place) => format!("; the first, {place}"),
        None => String::new(),
    }
}

/// What opening one data set after another needs.
struct Opener<'a> {
    config: &'a RunConfig,
    vocabulary: &'a Arc<Vocabulary>,
    wanted: DataUse,
    console: &'a Console,
}

impl Opener<'_> {
    fn find(&self, name: &str) -> anyhow::Result<DataSet> {
        let fetching = Cell::new(false);
        let fetch = |set: &HubSet| -> Result<Vec<PathBuf>, String> {
            fetching.set(true);
            fetch_data_set(self.config, set, self.console).map_err(|error| format!("{error:#}"))
        };
        DataSet::find(name, &self.config.dataset_dir, &fetch).map_err(|error| match error {
            // What a hub or a disk says is no mistake in the config.
            error @ DataError::File { .. } => error.into(),
            error if fetching.get() => error.into(),
            error => Usage::one(error.to_string()).into(),
        })
    }

    fn source_options(&self) -> SourceOptions {
        let config = self.config;
        let look = (config.streaming && self.wanted == DataUse::Show).then_some(LOOK);
        SourceOptions {
            substitute: config.dataset_values.clone(),
            max_samples: config.max_samples.into_iter().chain(look).min(),
            on_bad_row: match config.on_bad_row {
                config::OnBadRow::Skip => ferrotune_data::OnBadRow::Skip,
                config::OnBadRow::Stop => ferrotune_data::OnBadRow::Stop,
            },
            seed: config.seed,
        }
    }

    /// One data set, encoded or out of the cache; its conversations only where they are shown.
    fn set(&self, name: &str) -> anyhow::Result<(Vec<(Place, Conversation)>, PreparedSet)> {
        let (config, console) = (self.config, self.console);
        let set = self.find(name)?;
        let options = self.source_options();
        let path = self.cache_path(&set, &options)?;
        let cached = match &path {
            Some(path) if !config.overwrite_cache => cache::read(path),
            _ => Cached::Nothing,
        };
        if let (Cached::Broken(why), Some(path)) = (&cached, &path) {
            let path = path.display();
            console.warn(format!("the tokens of data set `{name}` in {path} are made anew: {why}"));
        }
        match cached {
            Cached::Whole(prepared) => {
                tracing::info!("data set `{name}`: {} samples out of the cache", prepared.samples.len());
                check_purpose(config, self.wanted, &prepared.counts)?;
                let conversations = match self.wanted {
                    DataUse::Show | DataUse::Evaluate(_) => set.load(&options)?.conversations,
                    DataUse::Train(_) => Vec::new(),
                };
                Ok((conversations, *prepared))
            }
            Cached::Nothing | Cached::Broken(_) => {
                let start = Instant::now();
                let loaded = set.load(&options)?;
                let (read, counts) = (start.elapsed().as_secs_f64(), &loaded.counts);
                tracing::info!(
                    "data set `{name}`: {} rows of {} read in {read:.3} s",
                    counts.rows,
                    counts.format
                );
                check_purpose(config, self.wanted, &loaded.counts)?;
                let prepared = self.encode(loaded.counts, &loaded.conversations)?;
                let encoded = start.elapsed().as_secs_f64() - read;
                tracing::info!(
                    "data set `{name}`: {} samples encoded in {encoded:.3} s",
                    prepared.samples.len()
                );
                if let Some(path) = &path
                    && let Err(error) = cache::write(path, &prepared)
                {
                    console.warn(format!("the tokens of data set `{name}` are not kept: {error}"));
                }
                Ok((loaded.conversations, prepared))
            }
        }
    }

    fn encode(
        &self,
        counts: SetCounts,
        conversations: &[(Place, Conversation)],
    ) -> anyhow::Result<PreparedSet> {
        let bar =
            ProgressBar::with_draw_target(Some(conversations.len() as u64), ProgressDrawTarget::hidden());
        let style =
            ProgressStyle::with_template("{msg} [{bar:24}] {pos} of {len} rows, {per_sec}, {eta} left");
        bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()).progress_chars("=> "));
        bar.set_message(counts.name.clone());
        if self.console.shows_progress() && conversations.len() > 5000 {
            bar.set_draw_target(ProgressDrawTarget::stderr());
        }
        let encode = encoder(self.config, self.vocabulary.clone(), None);
        let encoded = encode_set(counts, conversations, &encode, &mut |done| bar.set_position(done as u64));
        bar.finish_and_clear();
        let mut set = encoded?;
        if self.config.stage == Stage::Pt {
            set.samples = split_long(set.samples, self.config.cutoff_len);
        }
        Ok(set)
    }

    /// Where the samples of a set are kept, by everything that they depend on; none without a folder for them.
    fn cache_path(&self, set: &DataSet, options: &SourceOptions) -> anyhow::Result<Option<PathBuf>> {
        let folder = match &self.config.tokenized_path {
            Some(folder) => folder.clone(),
            None => match ferrotune_hub::cache_dir() {
                Ok(folder) => folder.join("tokens"),
                Err(_) => return Ok(None),
            },
        };
        let mut key = CacheKey::new(&set.files)?;
        key.add(program_identity());
        key.add(&set.name);
        key.add(set.form());
        key.add(format!("{options:?}"));
        key.add(format!("{:?} {:?}", mark_options(self.config), self.config.stage));
        key.add(self.config.cutoff_len.to_le_bytes());
        key.add(self.vocabulary.tokenizer.identity()?);
        let template = &self.vocabulary.template;
        key.add(format!("{} {:?}", template.source(), template.special_tokens()));
        Ok(Some(key.path(&folder)))
    }

    /// The data as a stream.
    fn stream(&self, tokens: usize) -> anyhow::Result<OpenData> {
        let config = self.config;
        let mut data = OpenData::empty();
        let sets = config.dataset.iter().map(|name| self.find(name)).collect::<anyhow::Result<Vec<_>>>()?;
        let options = StreamOptions {
            batch: batch_options(config),
            buffer_size: config.buffer_size,
            strategy: mix_strategy(config),
            chances: config.interleave_probs.0.clone(),
            evaluation: config.val_size as usize,
            long: if config.stage == Stage::Pt { Long::Split } else { Long::AsEncoded },
        };
        let encode = encoder(config, self.vocabulary.clone(), Some(tokens));
        let stream = StreamedBatches::new(sets, self.source_options(), encode, options)?;
        for counts in stream.counts() {
            check_purpose(config, self.wanted, &counts)?;
            data.sets.push((counts.name, counts.format));
        }
        data.evaluation.extend(stream.evaluation()?);
        if stream.is_empty() {
            return Err(nothing_left(config, data.evaluation.len()));
        }
        data.stream = Some(stream);
        Ok(data)
    }
}

/// `val_size` takes all samples.
fn nothing_left(config: &RunConfig, samples: usize) -> anyhow::Error {
    let message = format!("it leaves nothing to train on: there are {samples} samples; set fewer apart");
    mistake(config, "val_size", &message)
}

/// Makes samples of conversations; one with a token that the model doesn't have ends the run.
fn encoder(
    config: &RunConfig,
    vocabulary: Arc<Vocabulary>,
    tokens: Option<usize>,
) -> impl Fn(&Conversation) -> DataResult<Sample> + Send + Sync + 'static {
    let options = mark_options(config);
    move |conversation| {
        let sample =
            encode_conversation(conversation, &vocabulary.template, &vocabulary.tokenizer, &options)?;
        match sample.tokens.iter().find(|token| tokens.is_some_and(|all| **token as usize >= all)) {
            None => Ok(sample),
            Some(token) => Err(ferrotune_data::Error::Dataset(unknown_token(*token, tokens.unwrap_or(0)))),
        }
    }
}

/// What is wrong when the tokenizer gives a token that a model of `tokens` tokens doesn't have.
pub fn unknown_token(token: u32, tokens: usize) -> String {
    format!(
        "the tokenizer gives token {token}, and the model has {tokens} (0 to {}): they don't belong together",
        tokens.saturating_sub(1)
    )
}

/// Refuses data that the stage can't be trained on.
fn check_purpose(config: &RunConfig, wanted: DataUse, counts: &SetCounts) -> anyhow::Result<()> {
    let name = &counts.name;
    match (counts.purpose, config.stage) {
        _ if wanted == DataUse::Show => Ok(()),
        (Purpose::Preference, _) => {
            bail!("data set `{name}` has preference pairs; training on these (`stage: dpo`) is not there yet")
        }
        (Purpose::Labelled, _) => {
            bail!("data set `{name}` has labelled answers; training on these (`stage: kto`) is not there yet")
        }
        (Purpose::Supervised, Stage::Pt) => bail!(
            "`stage: pt` trains on plain texts, and data set `{name}` has conversations ({}); use `stage: sft`, or \
             name the column of its texts in dataset_info.json (`\"columns\": {{\"prompt\": …}}`)",
            counts.format
        ),
        _ => Ok(()),
    }
}

/// Takes a share of the samples (or so many) out of the sets.
fn set_apart(sets: &mut [Vec<(Sample, Origin)>], val_size: f64, seed: u64) -> Vec<Sample> {
    let length: usize = sets.iter().map(Vec::len).sum();
    let count = if val_size < 1.0 { (val_size * length as f64).ceil() } else { val_size };
    let chosen = split(length, count as usize, seed);
    let mut evaluation = Vec::with_capacity(chosen.len());
    let (mut index, mut next) = (0, chosen.iter().peekable());
    for set in sets {
        let mut kept = Vec::with_capacity(set.len());
        for sample in set.drain(..) {
            if next.next_if(|it| **it == index).is_some() {
                evaluation.push(sample.0);
            } else {
                kept.push(sample);
            }
            index += 1;
        }
        *set = kept;
    }
    evaluation
}

/// The samples of all sets in one order.
fn mixed(mut sets: Vec<Vec<(Sample, Origin)>>, config: &RunConfig) -> Vec<(Sample, Origin)> {
    let lengths: Vec<usize> = sets.iter().map(Vec::len).collect();
    let order = order(mix_strategy(config), &lengths, &config.interleave_probs.0, config.seed);
    let mut uses: BTreeMap<(usize, usize), usize> = BTreeMap::new();
    for at in &order {
        *uses.entry(*at).or_default() += 1;
    }
    // The last use of a sample takes it; earlier ones copy.
    let take = |at: &(usize, usize)| {
        let left = uses.entry(*at).or_default();
        *left -= 1;
        let sample = &mut sets[at.0][at.1];
        if *left == 0 { std::mem::take(sample) } else { sample.clone() }
    };
    order.iter().map(take).collect()
}

fn mix_strategy(config: &RunConfig) -> ferrotune_data::MixStrategy {
    match config.mix_strategy {
        config::MixStrategy::Concat => ferrotune_data::MixStrategy::Concat,
        config::MixStrategy::InterleaveUnder => ferrotune_data::MixStrategy::InterleaveUnder,
        config::MixStrategy::InterleaveOver => ferrotune_data::MixStrategy::InterleaveOver,
        config::MixStrategy::InterleaveOnce => ferrotune_data::MixStrategy::InterleaveOnce,
    }
}

/// How samples become batches, by the config.
pub fn batch_options(config: &RunConfig) -> BatchOptions {
    BatchOptions {
        per_device_train_batch_size: config.per_device_train_batch_size,
        packing: config.packs(),
        cutoff_len: config.cutoff_len,
        seed: config.seed,
        shuffle: !config.disable_shuffling,
        group_by_length: match config.group_by_length {
            true => config.per_device_train_batch_size * config.gradient_accumulation_steps,
            false => 0,
        },
    }
}

/// Another build may encode otherwise.
fn program_identity() -> String {
    let program = std::env::current_exe().and_then(std::fs::metadata);
    let built = program.ok().map(|it| (it.len(), it.modified().ok()));
    format!("{} {built:?}", env!("CARGO_PKG_VERSION"))
}

/// How conversations are marked and cut, by the config.
pub fn mark_options(config: &RunConfig) -> MarkOptions {
    // Long texts of pretraining become several samples, and nothing is cut off.
    let longest = if config.stage == Stage::Pt { u32::MAX as usize } else { config.cutoff_len };
    MarkOptions {
        train_on_prompt: config.train_on_prompt,
        mask_history: config.mask_history,
        default_system: config.default_system.clone(),
        split_control_tokens: !config.allow_control_tokens,
        template_variables: template_variables(config),
        ..MarkOptions::new(longest)
    }
}

/// Variables of the template. One of ours that knows thoughts thinks unless told otherwise, as in LLaMA-Factory; the
/// model's own is told only what was asked for.
fn template_variables(config: &RunConfig) -> Map<String, Value> {
    let mut variables = Map::new();
    let asked = !config.place("enable_thinking").is_empty();
    let ours = matches!(&config.template, TemplateName::Named(name) if named_template(name).is_some_and(|it| it.thinks));
    match config.enable_thinking {
        Some(think) => variables.insert("enable_thinking".to_string(), Value::from(think)),
        None if ours => variables
            .insert("enable_thinking".to_string(), if asked { Value::Null } else { Value::from(true) }),
        None => None,
    };
    if ours && config.mask_history {
        variables.insert("discard_thoughts".to_string(), Value::from(true));
    }
    variables
}
