//! From the config to what the trainer takes.

use std::fs;
use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use std::time::{Duration, Instant};

use ferrotune_model::Recompute;
use ferrotune_tensor::DType;
use ferrotune_trainer::{
    Adafactor, AdamW, AdamW8bit, Evaluation, Lion, LossScale, Metric, Muon, OnHost, Optimizer,
    ParameterGroups, Schedule, Settings, Sgd, StateMemory,
};

use crate::config::{self, BestMetric, EvalStrategy, RunConfig, SaveStrategy};
use crate::run::{Run, RunBatches, available_memory, memory_plan};

/// Keys that a resumed run may change.
const FREE_KEYS: [&str; 37] = [
    "export_dir",
    "export_format",
    "export_size",
    "infer_dtype",
    "export_verify",
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
    "weight_cache_gib",
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

/// How the trainer is to go about it.
///
/// # Errors
/// When the schedule's arguments don't fit its kind.
pub(super) fn settings(
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

/// The optimizer that the config names.
pub(super) fn optimizer(config: &RunConfig) -> Box<dyn Optimizer> {
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
pub(super) fn recompute(run: &Run, longest_batch: usize) -> Vec<Recompute> {
    let blocks = run.model.files.spec.layers.len();
    let kept = match run.config.recompute_policy() {
        config::Recompute::Keep => blocks,
        config::Recompute::All => 0,
        config::Recompute::Lean => return vec![Recompute::Lean; blocks],
        config::Recompute::Offload => return vec![Recompute::Offload; blocks],
        config::Recompute::Auto => {
            let plan = memory_plan(&run.config, &run.model.files, &run.computing, longest_batch);
            let cached = asked_cache(run).unwrap_or(0);
            available_memory(&run.computing).map_or(blocks, |available| {
                run.model.files.spec.blocks_kept(&plan, (available / 10 * 9).saturating_sub(cached))
            })
        }
    };
    (0..blocks).map(|block| if block < kept { Recompute::Keep } else { Recompute::Recompute }).collect()
}

/// Bytes for weights as a GPU's products read them.
pub(super) fn weight_cache(run: &Run, longest_batch: usize) -> u64 {
    match (asked_cache(run), run.config.recompute_policy(), run.computing.device.gpu()) {
        (_, _, None) => 0,
        (Some(bytes), ..) => bytes,
        (None, config::Recompute::Auto, Some(gpu)) => {
            let plan = memory_plan(&run.config, &run.model.files, &run.computing, longest_batch);
            run.model.files.spec.left_beside(&plan, gpu.available_memory() / 10 * 9) / 2
        }
        _ => 0,
    }
}

/// What `weight_cache_gib` asks for, in bytes.
fn asked_cache(run: &Run) -> Option<u64> {
    run.config.weight_cache_gib.map(|gib| (gib * f64::from(1 << 30)) as u64)
}
