//! `ferrotune train`

mod hooks;
mod live;
mod settings;

use std::fs;
use std::io::Write as _;
use std::time::Instant;

use anyhow::Context as _;
use ferrotune_data::BatchSource as _;
use ferrotune_export::PeftAdapter;
use ferrotune_model::spec::MemoryPlan;
use ferrotune_model::{BuildOptions, Decoder, Recompute};
use ferrotune_nn::LanguageModel as _;
use ferrotune_tensor::{Error, peak_resident_bytes};
use ferrotune_trainer::{
    Ending, EventWriter, LogWriter, NextToken, RunHooks as _, Summary, checkpoints, clear_leftovers, discard,
    read_state, train,
};

use super::predict;
use super::push::Destination;
use crate::Outcome;
use crate::args::TrainArgs;
use crate::config::{FinetuningType, Resume, RunConfig};
use crate::console::{Console, Usage, bytes, clock, thousands};
use crate::machine::write_kernel_times;
use crate::plot::plot_losses;
use crate::results::{forget_results, has_results, train_results, write_results};
use crate::run::{
    Adapters, Run, RunBatches, build_decoder, load_trained, memory_plan, mistake, warn_of_rows,
};
use hooks::{Hooks, interrupted};
use live::LiveLine;
use settings::{optimizer, recompute, settings, weight_cache};

pub use hooks::evaluation_line;

/// Trains what the config says.
pub fn run(args: &TrainArgs, console: &Console) -> anyhow::Result<Outcome> {
    let started = Instant::now();
    let config = RunConfig::load(Some(&args.config), &args.overrides)?;
    if !config.trains() {
        return predict::run(&config, console);
    }
    let hub = destination(&config)?;
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
    let cached = model.keep_whole(weight_cache(&run, longest_batch));
    if cached > 0 {
        tracing::info!("{} of memory for weights as products read them", bytes(cached));
    }
    if !model.recompute.contains(&Recompute::Keep) {
        model.embedding_to_host()?;
    }
    describe(&run, &mut model, &batches, total_steps, console)?;
    let mut optimizer = optimizer(&run.config);
    clear_leftovers(&run.output_dir)?;
    let done = resumed.as_ref().map(|(state, _)| state.step);
    if done.is_none_or(|done| (done as u64) < total_steps) {
        forget_results(&run.output_dir)?;
    }
    // The length of the sequence that a token is in, on average.
    let sequence = match &batches {
        RunBatches::InMemory(batches) => {
            let lengths = || batches.samples().iter().map(|it| it.tokens.len() as f64);
            lengths().map(|it| it * it).sum::<f64>() / lengths().sum::<f64>().max(1.0)
        }
        RunBatches::Streamed(_) => run.config.cutoff_len as f64,
    };
    let mut hooks = Hooks {
        run: &run,
        subtracted,
        console,
        live: LiveLine::new(console),
        log: LogWriter::new(&run.output_dir, done),
        events: run.config.reports_to_tensorboard().then(|| EventWriter::new(&run.output_dir)),
        interrupted: interrupted()?,
        weights_cached: cached > 0,
    };
    let summary =
        train(&settings, resumed, &mut model, batches.source(), &NextToken, optimizer.as_mut(), &mut hooks);
    hooks.live.clear();
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
    let outcome = finish(&run, &summary, sequence, console)?;
    if let Some(hub) = hub {
        hub.send(&run.output_dir, console)?;
    }
    Ok(outcome)
}

/// Where the run's result is sent to, known before the first step.
fn destination(config: &RunConfig) -> anyhow::Result<Option<Destination>> {
    if !config.push_to_hub {
        return Ok(None);
    }
    let folder = config.output_dir.as_ref().and_then(|it| it.file_name());
    let named = config.hub_model_id.clone().or_else(|| Some(folder?.to_string_lossy().into_owned()));
    let Some(name) = named else {
        return Err(mistake(
            config,
            "push_to_hub",
            "there is no name to send the model by; set `hub_model_id`",
        ));
    };
    Destination::known(config, &name, "Trained with Ferrotune").map(Some)
}

/// Where memory ran out, says with what the whole was reckoned and which keys change it.
fn out_of_memory(error: Error, run: &Run, longest_batch: usize) -> anyhow::Error {
    if !matches!(error, Error::OutOfMemory { .. }) {
        return error.into();
    }
    let plan = memory_plan(&run.config, &run.model.files, &run.computing, longest_batch);
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

/// What is about to be trained, in PEFT's words where it has them.
fn describe(
    run: &Run,
    model: &mut Decoder,
    batches: &RunBatches,
    total_steps: u64,
    console: &Console,
) -> anyhow::Result<()> {
    let trainable: usize = model.parameters().iter().map(|it| it.value.rows() * it.value.cols()).sum();
    let spec = &run.model.files.spec;
    // As PEFT counts: the base, in which embedding and head may be one, and what is trained beside it.
    let all = match run.config.finetuning_type {
        FinetuningType::Lora => {
            let apart = run.unchanged.tied && !spec.tie_word_embeddings;
            let twice = if apart { spec.vocab_size * spec.hidden_size } else { 0 };
            spec.parameter_count() - twice as u64 + trainable as u64
        }
        _ => spec.parameter_count(),
    };
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

/// Time, pace, memory, and what was written where.
fn finish(run: &Run, summary: &Summary, sequence: f64, console: &Console) -> anyhow::Result<Outcome> {
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
        if let Some(rates) = write_kernel_times(gpu, run.computing.dtype, &mut out)? {
            let flops = run.model.files.spec.flops_of_a_token(run.config.lora_rank, sequence);
            let reached = flops * summary.tokens_per_second;
            writeln!(
                out,
                "adapters on frozen weights: {:.2} TFLOP for 1000 tokens, {:.0} TFLOP/s reached, {:.1} % of the card's products",
                flops / 1e9,
                reached / 1e12,
                100.0 * reached / rates.flops
            )?;
        }
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
