//! `ferrotune train`

use std::fs;
use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use std::io::Write as _;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::Context as _;
use ferrotune_data::BatchSource as _;
use ferrotune_export::{ModelCard, PeftAdapter, SavedAs};
use ferrotune_model::spec::MemoryPlan;
use ferrotune_model::{BuildOptions, Decoder, Recompute};
use ferrotune_nn::LanguageModel as _;
use ferrotune_tensor::{DType, Error, Result, peak_resident_bytes, resident_bytes};
use ferrotune_trainer::{
    Adafactor, AdamW, AdamW8bit, Control, Ending, EvalReport, Evaluation, EventWriter, Lion, LogWriter,
    LossScale, Metric, Muon, NextToken, OnHost, Optimizer, ParameterGroups, RunHooks, Schedule, Settings,
    Sgd, Skipped, StateMemory, StepReport, Summary, checkpoints, clear_leftovers, discard, read_state, train,
};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use super::predict;
use crate::args::TrainArgs;
use crate::config::{
    self, BestMetric, EvalStrategy, FinetuningType, InitLoraWeights, Resume, RunConfig, SaveStrategy,
};
use crate::console::{Console, Usage, bytes, clock, thousands};
use crate::machine::write_kernel_times;
use crate::plot::plot_losses;
use crate::results::{forget_results, has_results, train_results, write_results};
use crate::run::{
    Adapters, Run, RunBatches, Subtracted, available_memory, build_decoder, load_trained, memory_plan,
    save_trained, warn_of_rows,
};
use crate::{INTERRUPTED, Outcome};

/// Keys that a resumed run may change.
const FREE_KEYS: [&str; 31] = [
    "overwrite_cache",
    "tokenized_path",
    "plot_loss",
    "report_to",
    "per_device_eval_batch_size",
    "do_eval",
    "do_predict",
    "predict_with_generate",
    "max_time",
    "cache_dir",
    "output_dir",
    "overwrite_output_dir",
    "resume_from_checkpoint",
    "logging_steps",
    "save_strategy",
    "save_steps",
    "save_total_limit",
    "num_threads",
    "device",
    "recompute",
    "disable_gradient_checkpointing",
    "max_new_tokens",
    "do_sample",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "do_train",
    "dataset_dir",
    "model_name_or_path",
    "model_revision",
];

/// Trains what the config says.
pub fn run(args: &TrainArgs, console: &Console) -> anyhow::Result<Outcome> {
    let started = Instant::now();
    let config = RunConfig::load(Some(&args.config), &args.overrides)?;
    if !config.trains() {
        return predict::run(&config, console);
    }
    let mut run = Run::open(config, console)?;
    let longest_batch = run.data.longest_batch(&run.config);
    let mut batches = run.batches()?;
    let steps_per_epoch = batches.steps_per_epoch(run.config.gradient_accumulation_steps);
    let total_steps = run.config.total_steps(steps_per_epoch);
    let settings = settings(&run, &batches, total_steps, steps_per_epoch as u64, started)?;
    let resumed = match &run.resume_from {
        Some(checkpoint) => {
            let (state, optimizer) = read_state(checkpoint)?;
            state.check_identity(&settings.identity).map_err(|error| Usage::one(error.to_string()))?;
            console.note(format!("going on from {} after step {}", checkpoint.display(), state.step));
            Some((state, optimizer))
        }
        None => {
            for (_, checkpoint) in checkpoints(&run.output_dir) {
                // A new run in a folder that held one: the old ones would be taken for its own.
                discard(&checkpoint)?;
            }
            None
        }
    };
    let adapters = match &run.resume_from {
        Some(checkpoint) if run.config.pissa_init => {
            Adapters::Resumed(Box::new(PeftAdapter::read(checkpoint)?))
        }
        _ => Adapters::ToTrain(run.adapter.take()),
    };
    let model = build_decoder(&run.config, &run.model.files, &run.computing, adapters);
    let (mut model, subtracted) = model.map_err(|error| match error.downcast::<Error>() {
        Ok(error) => out_of_memory(error, &run, longest_batch),
        Err(error) => error,
    })?;
    if let Some(checkpoint) = &run.resume_from {
        load_trained(&run.config, &mut model, checkpoint)?;
    }
    model.neftune_noise_alpha = run.config.neftune_noise_alpha.unwrap_or(0.0);
    model.recompute = recompute(&run, longest_batch);
    describe(&run, &mut model, &batches, total_steps, console)?;
    let mut optimizer = optimizer(&run.config);
    clear_leftovers(&run.output_dir)?;
    let done = resumed.as_ref().map(|(state, _)| state.step);
    if done.is_none_or(|done| (done as u64) < total_steps) {
        forget_results(&run.output_dir)?;
    }
    let mut hooks = Hooks {
        run: &run,
        subtracted,
        console,
        bar: bar(console, total_steps),
        log: LogWriter::new(&run.output_dir, done),
        events: run.config.reports_to_tensorboard().then(|| EventWriter::new(&run.output_dir)),
        interrupted: interrupted()?,
    };
    let summary =
        train(&settings, resumed, &mut model, batches.source(), &NextToken, optimizer.as_mut(), &mut hooks);
    hooks.bar.finish_and_clear();
    let summary = summary.map_err(|error| out_of_memory(error, &run, longest_batch))?;
    if let RunBatches::Streamed(batches) = &batches {
        batches.counts().iter().for_each(|counts| warn_of_rows(counts, console));
    }
    let stopped = match &summary.ending {
        Ending::Finished | Ending::Early => None,
        Ending::Stopped(checkpoint) => Some((checkpoint, "interrupted", " resume_from_checkpoint=true")),
        Ending::OutOfTime(checkpoint) => {
            Some((checkpoint, "`max_time` is over", " resume_from_checkpoint=true"))
        }
    };
    if let Some((checkpoint, why, resume)) = stopped {
        console.warn(format!(
            "{why} after step {} of {total_steps}; saved to {}. Go on with: ferrotune train {}{}{}",
            summary.steps,
            checkpoint.display(),
            args.config.display(),
            args.overrides.iter().map(|word| format!(" '{word}'")).collect::<String>(),
            // Restarted by the same command, a run with `auto` goes on by itself.
            if run.config.resume_from_checkpoint == Resume::No { resume } else { "" },
        ));
        return Ok(Outcome::Interrupted);
    }
    if summary.ending == Ending::Early {
        console.note(format!("stopped after step {}: evaluations got no better", summary.steps));
    }
    if let Some(best) = &summary.loaded {
        console.note(format!("the model of step {} is the best: {:.4}", best.step, best.metric));
    }
    hooks.save_model(&mut model, &run.output_dir)?;
    let samples_in_step = run.config.per_device_train_batch_size * run.config.gradient_accumulation_steps;
    // A run that was over before has them already, unless it was killed just before they were written.
    if summary.sitting_steps > 0 || !has_results(&run.output_dir) {
        write_results(&run.output_dir, "train", &train_results(&summary, samples_in_step))?;
    }
    if run.config.plot_loss {
        plot_losses(&run.output_dir)?;
    }
    if let Some(data) = &run.evaluation {
        predict::evaluate_at_end(&run.config, &model, data, &run.output_dir, console)?;
        if run.config.do_predict {
            predict::predict(&run.config, &run.model, &model, data, &run.output_dir, console)?;
        }
    }
    finish(&run, &summary, console)
}

/// Where memory ran out, says with what the whole was reckoned and which keys change it.
fn out_of_memory(error: Error, run: &Run, longest_batch: usize) -> anyhow::Error {
    if !matches!(error, Error::OutOfMemory { .. }) {
        return error.into();
    }
    let plan = memory_plan(&run.config, &run.model.files.spec, &run.computing, longest_batch);
    let lean = MemoryPlan { recompute: true, ..plan };
    let spec = &run.model.files.spec;
    anyhow::anyhow!(
        "{error}. Micro-batches of {} tokens were reckoned to take about {}, and {} with `recompute: all`; lower `per_device_train_batch_size` or `cutoff_len`{}",
        thousands(longest_batch as u64),
        bytes(spec.memory(&plan).total()),
        bytes(spec.memory(&lean).total()),
        if run.config.quantization_bit.is_none() { ", or set `quantization_bit: 4`" } else { "" },
    )
}

fn settings(
    run: &Run,
    batches: &RunBatches,
    total_steps: u64,
    steps_per_epoch: u64,
    started: Instant,
) -> anyhow::Result<Settings> {
    let config = &run.config;
    let save_steps = match config.save_strategy {
        SaveStrategy::No => 0,
        SaveStrategy::Epoch => steps_per_epoch,
        SaveStrategy::Steps => config.save_steps.of(total_steps),
    };
    Ok(Settings {
        output_dir: run.output_dir.clone(),
        schedule: Schedule {
            kind: config.schedule_kind().map_err(anyhow::Error::msg)?,
            learning_rate: config.learning_rate,
            warmup_steps: config.warmup(total_steps) as usize,
            total_steps: total_steps as usize,
        },
        train_batch_size: config.per_device_train_batch_size,
        num_train_epochs: (total_steps as f64 / steps_per_epoch as f64).ceil() as usize,
        evaluation: evaluation(run, total_steps, steps_per_epoch),
        gradient_accumulation_steps: config.gradient_accumulation_steps,
        max_grad_norm: config.max_grad_norm,
        seed: config.seed,
        loss_scale: match run.computing.dtype {
            DType::F16 => LossScale::dynamic(),
            _ => LossScale::none(),
        },
        logging_steps: config.logging_steps.of(total_steps).max(1) as usize,
        save_steps: save_steps as usize,
        deadline: config.max_time.map(|it| started + Duration::from_secs_f64(it.0)),
        save_total_limit: config.save_total_limit,
        identity: identity(run, batches),
    })
}

/// What is evaluated during the run, and at its end.
fn evaluation(run: &Run, total_steps: u64, steps_per_epoch: u64) -> Option<Evaluation> {
    let (data, config) = (run.evaluation.as_ref()?, &run.config);
    let steps = match config.eval_strategy {
        EvalStrategy::No => 0,
        EvalStrategy::Epoch => steps_per_epoch,
        EvalStrategy::Steps => config.eval_steps.unwrap_or(config.logging_steps).of(total_steps).max(1),
    };
    let metric = match config.metric_for_best_model {
        BestMetric::Loss => Metric::Loss,
        BestMetric::Accuracy => Metric::Accuracy,
        BestMetric::Perplexity => Metric::Perplexity,
    };
    Some(Evaluation {
        samples: data.samples.clone(),
        batch_size: config.per_device_eval_batch_size,
        steps: steps as usize,
        on_start: config.eval_on_start,
        metric,
        greater_is_better: config.greater_is_better.unwrap_or(metric == Metric::Accuracy),
        patience: config.early_stopping_steps,
        load_best_model_at_end: config.load_best_model_at_end,
    })
}

fn optimizer(config: &RunConfig) -> Box<dyn Optimizer> {
    use config::Optimizer as Kind;
    let (beta1, beta2, epsilon) = (config.adam_beta1, config.adam_beta2, config.adam_epsilon);
    let groups =
        ParameterGroups { weight_decay: config.weight_decay, loraplus_lr_ratio: config.loraplus_lr_ratio };
    let adamw = |memory| AdamW::new(beta1, beta2, epsilon, groups, memory);
    let adamw_8bit = |memory| AdamW8bit::new(beta1, beta2, epsilon, groups, memory);
    let momentum = config.optim_args.momentum;
    match config.optimizer() {
        Kind::AdamW => Box::new(adamw(StateMemory::Device)),
        Kind::AdamW8bit => Box::new(adamw_8bit(StateMemory::Device)),
        Kind::PagedAdamW => Box::new(adamw(StateMemory::Host)),
        Kind::PagedAdamW8bit => Box::new(adamw_8bit(StateMemory::Host)),
        Kind::Sgd => Box::new(OnHost::new(Sgd { momentum: momentum.unwrap_or(0.0) }, groups)),
        Kind::Lion => Box::new(OnHost::new(Lion { beta1, beta2 }, groups)),
        Kind::Adafactor => Box::new(OnHost::new(Adafactor, groups)),
        Kind::Muon => Box::new(Muon::new(momentum.unwrap_or(0.95), groups, adamw(StateMemory::Device))),
    }
}

/// What must be the same for a run to go on: base model, data, and every key that changes the numbers.
fn identity(run: &Run, batches: &RunBatches) -> Vec<(String, String)> {
    let mut hash = DefaultHasher::new();
    match batches {
        RunBatches::InMemory(batches) => {
            batches.samples().iter().for_each(|it| (&it.tokens, &it.trained).hash(&mut hash));
        }
        // Of a stream: its files, which are too large to be read for this.
        RunBatches::Streamed(batches) => batches.files().for_each(|file| {
            let metadata = fs::metadata(file).ok();
            (file, metadata.map(|it| (it.len(), it.modified().ok()))).hash(&mut hash);
        }),
    }
    let mut all = vec![
        ("the base model".to_string(), run.model.files.fingerprint()),
        ("the data".to_string(), format!("{:016x}", hash.finish())),
    ];
    let values = run.config.values().into_iter().filter(|(key, _)| !FREE_KEYS.contains(key));
    all.extend(values.map(|(key, value)| (format!("`{key}`"), value)));
    all
}

/// What each block keeps. `auto` keeps as many blocks whole as memory allows.
fn recompute(run: &Run, longest_batch: usize) -> Vec<Recompute> {
    let blocks = run.model.files.spec.layers.len();
    let kept = match run.config.recompute_policy() {
        config::Recompute::Keep => blocks,
        config::Recompute::All => 0,
        config::Recompute::Offload => return vec![Recompute::Offload; blocks],
        config::Recompute::Auto => {
            let plan = memory_plan(&run.config, &run.model.files.spec, &run.computing, longest_batch);
            available_memory(&run.computing)
                .map_or(blocks, |available| run.model.files.spec.blocks_kept(&plan, available / 10 * 9))
        }
    };
    (0..blocks).map(|block| if block < kept { Recompute::Keep } else { Recompute::Recompute }).collect()
}

/// What is about to be trained, in PEFT's words where it has them.
fn describe(
    run: &Run,
    model: &mut Decoder,
    batches: &RunBatches,
    total_steps: u64,
    console: &Console,
) -> anyhow::Result<()> {
    let trainable: usize = model.parameters().iter().map(|it| it.value.rows() * it.value.cols()).sum();
    let added = if run.config.finetuning_type == FinetuningType::Lora { trainable as u64 } else { 0 };
    let all = run.model.files.spec.parameter_count() + added;
    let share = 100.0 * trainable as f64 / all as f64;
    console.note(format!(
        "trainable params: {} || all params: {} || trainable%: {share:.4}",
        thousands(trainable as u64),
        thousands(all)
    ));
    let config = &run.config;
    let step = config.per_device_train_batch_size * config.gradient_accumulation_steps;
    let samples = match batches {
        RunBatches::InMemory(batches) => format!(
            "{} samples, {:.0} % of their tokens trained; {} batches in an epoch",
            thousands(batches.samples().len() as u64),
            100.0 * run.data.report.trained_share(),
            thousands(batches.batches_per_epoch() as u64),
        ),
        RunBatches::Streamed(_) => "samples as they are read".to_string(),
    };
    if let Some(data) = &run.evaluation {
        console.note(format!("{} samples to evaluate on", thousands(data.samples.len() as u64)));
    }
    console.note(format!(
        "{samples}, {step} samples in a step, {total_steps} steps on {}; weights {} in memory",
        device_name(&run.computing),
        bytes(model.weight_bytes() as u64),
    ));
    Ok(())
}

/// `cpu`, or the card and the type it computes in.
fn device_name(computing: &BuildOptions) -> String {
    match computing.device.gpu() {
        Some(gpu) => format!("{gpu:?} in {}", computing.dtype.as_str()),
        None => computing.device.name(),
    }
}

fn bar(console: &Console, total_steps: u64) -> ProgressBar {
    let bar = ProgressBar::with_draw_target(Some(total_steps), ProgressDrawTarget::hidden());
    let template = "step {pos}/{len} [{bar:24}] {msg}";
    let style = ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar());
    bar.set_style(style.progress_chars("=> "));
    if console.shows_progress() {
        bar.set_draw_target(ProgressDrawTarget::stderr());
    }
    bar
}

/// Is set by Ctrl-C or a termination signal; a second one ends the process at once.
fn interrupted() -> anyhow::Result<Arc<AtomicBool>> {
    let flag = Arc::new(AtomicBool::new(false));
    let set = flag.clone();
    ctrlc::set_handler(move || {
        if set.swap(true, Ordering::SeqCst) {
            std::process::exit(i32::from(INTERRUPTED));
        }
        let _ = writeln!(std::io::stderr(), "\nfinishing the step, then saving; once more to leave at once");
    })
    .context("can't listen for Ctrl-C")?;
    Ok(flag)
}

struct Hooks<'a> {
    run: &'a Run,
    subtracted: Subtracted,
    console: &'a Console,
    bar: ProgressBar,
    log: LogWriter,
    events: Option<EventWriter>,
    interrupted: Arc<AtomicBool>,
}

impl RunHooks<Decoder> for Hooks<'_> {
    fn save_model(&mut self, model: &mut Decoder, folder: &Path) -> Result<()> {
        let saved = self.run.model.vocabulary.tokenizer.save(folder);
        saved.map_err(|error| Error::msg(error.to_string()))?;
        let exact = if folder == self.run.output_dir { SavedAs::Stored } else { SavedAs::Trained };
        let (config, base) = (&self.run.config, &self.run.model);
        // Last, with its config at the very end: where that is, the model is whole.
        save_trained(config, base, (model, &self.subtracted), folder, exact, &card(self.run))
    }

    fn report(&mut self, report: &StepReport) -> Result<Control> {
        if report.skipped == Some(Skipped::NotFinite) {
            let places: Vec<String> = report.samples.iter().map(|it| self.run.data.origin(*it)).collect();
            self.console.warn(format!(
                "step {} is left out: its loss is {} and its gradients' norm {}; its samples: {}",
                report.step,
                report.loss,
                report.grad_norm,
                places.join(", ")
            ));
        }
        self.bar.set_position(report.step as u64);
        let line = format!(
            "loss {:.4}  lr {:.2e}  {:.0} tokens/s  {} left",
            report.mean_loss,
            report.learning_rate,
            report.tokens_per_second,
            clock(report.remaining_seconds)
        );
        if report.logged {
            self.log.write(report)?;
            self.events.as_mut().map_or(Ok(()), |events| events.write(report))?;
            if !self.console.shows_progress() && !self.console.quiet {
                self.console.plain(format!("step {}/{}  {line}", report.step, report.total_steps));
            }
        }
        let memory = match self.run.computing.device.gpu() {
            Some(gpu) => Some(gpu.memory().in_use),
            None => resident_bytes(),
        };
        let memory = memory.map_or_else(String::new, |it| format!("  {}", bytes(it)));
        self.bar.set_message(format!("{line}  norm {:.2}{memory}", report.grad_norm));
        let stop = self.interrupted.load(Ordering::SeqCst);
        Ok(if stop { Control::Stop } else { Control::Continue })
    }

    fn load_model(&mut self, model: &mut Decoder, folder: &Path) -> Result<()> {
        load_trained(&self.run.config, model, folder)
    }

    fn report_evaluation(&mut self, report: &EvalReport) -> Result<()> {
        self.log.write_evaluation(report)?;
        self.events.as_mut().map_or(Ok(()), |events| events.write_evaluation(report))?;
        let line = format!("step {}/{}  {}", report.step, report.total_steps, evaluation_line(report));
        if self.console.shows_progress() {
            self.bar.println(line);
        } else if !self.console.quiet {
            self.console.plain(line);
        }
        Ok(())
    }

    /// `recompute: auto` computes half of the blocks that were kept again.
    fn spare_memory(&mut self, model: &mut Decoder, error: &Error) -> bool {
        let kept = model.recompute.iter().filter(|it| **it == Recompute::Keep).count();
        if kept == 0 || self.run.config.recompute_policy() != config::Recompute::Auto {
            return false;
        }
        let (left, blocks) = (kept / 2, model.recompute.len());
        model.recompute[left..].fill(Recompute::Recompute);
        self.console.warn(format!(
            "{error}; going on with the activations of {left} of {blocks} blocks kept instead of {kept}"
        ));
        true
    }
}

/// An evaluation in a line.
pub fn evaluation_line(report: &EvalReport) -> String {
    format!(
        "eval_loss {:.4}  perplexity {:.3}  token accuracy {:.1} %",
        report.loss,
        report.perplexity(),
        100.0 * report.accuracy
    )
}

fn card(run: &Run) -> ModelCard {
    let config = &run.config;
    let mut training = Vec::new();
    let mut row = |name: &str, value: String| training.push((name.to_string(), value));
    row("Learning rate", config.learning_rate.to_string());
    row("Epochs", config.num_train_epochs.to_string());
    row("Samples in a step", {
        (config.per_device_train_batch_size * config.gradient_accumulation_steps).to_string()
    });
    row("Longest sample", format!("{} tokens", config.cutoff_len));
    if config.pissa_init {
        row("Initialisation", "PiSSA; saved for the unchanged base, with twice the rank".to_string());
    }
    if config.init_lora_weights == InitLoraWeights::Loftq {
        row("Initialisation", "LoftQ: made for the base in NF4, whose losses it makes up for".to_string());
    }
    let base = if config.quantization_bit.is_some() { "4 bits (NF4)" } else { "as stored" };
    row("Base in training", base.to_string());
    if let beneath @ [_, ..] = config.merged_adapters() {
        let names: Vec<String> = beneath.iter().map(|it| it.display().to_string()).collect();
        row("Merged into the base before", names.join(", "));
    }
    ModelCard { title: String::new(), datasets: config.dataset.clone(), training }
}

/// Time, pace, memory, and what was written where.
fn finish(run: &Run, summary: &Summary, console: &Console) -> anyhow::Result<Outcome> {
    let mut out = console.out();
    let of = match summary.sitting_steps {
        all if all == summary.steps => String::new(),
        some => format!(" of the last {some}"),
    };
    match summary.mean_loss {
        Some(mean_loss) if summary.sitting_steps > 0 => writeln!(
            out,
            "trained {} steps in {} ({:.0} tokens/s, mean loss{of} {mean_loss:.4})",
            summary.steps,
            clock(summary.elapsed_seconds),
            summary.tokens_per_second,
        )?,
        _ => writeln!(out, "all {} steps were taken before", summary.steps)?,
    }
    if let Some(peak) = peak_resident_bytes() {
        writeln!(out, "peak memory {}", bytes(peak))?;
    }
    if let Some(gpu) = run.computing.device.gpu() {
        write_kernel_times(gpu, &mut out)?;
        let memory = gpu.memory();
        writeln!(
            out,
            "peak GPU memory {} allocated, {} reserved; {} of {} in use on the card",
            bytes(memory.peak_allocated),
            bytes(memory.peak_reserved),
            bytes(memory.in_use),
            bytes(memory.total)
        )?;
        if memory.peak_pinned > 0 {
            writeln!(out, "peak page-locked memory of the host {}", bytes(memory.peak_pinned))?;
        }
    }
    writeln!(out, "{}:", run.output_dir.display())?;
    let entries =
        fs::read_dir(&run.output_dir).with_context(|| format!("can't read {}", run.output_dir.display()))?;
    let mut names: Vec<(String, u64)> = entries
        .flatten()
        .filter(|entry| !entry.file_name().to_string_lossy().starts_with('.'))
        .filter_map(|entry| {
            let metadata = entry.metadata().ok()?;
            let slash = if metadata.is_dir() { "/" } else { "" };
            let size = if metadata.is_dir() { 0 } else { metadata.len() };
            Some((format!("{}{slash}", entry.file_name().to_string_lossy()), size))
        })
        .collect();
    names.sort();
    for (name, size) in names {
        let size = if name.ends_with('/') { String::new() } else { bytes(size) };
        writeln!(out, "  {name:<28} {size}")?;
    }
    out.flush()?;
    Ok(Outcome::Done)
}
