//! What training on a data set takes: steps, tokens, and time on this machine.

use std::time::{Duration, Instant};

use ferrotune_model::BuildOptions;
use ferrotune_model::spec::ModelSpec;
use ferrotune_tensor::{Operand, Tensor, multiply};

use crate::config::{Recompute, RunConfig};
use crate::console::Console;
use crate::run::{OpenData, model_spec, open_device};

/// Rows of the product that is timed.
const ROWS: usize = 512;
/// How long products are timed.
const TIMED: Duration = Duration::from_millis(300);
/// The share of a large product's speed that a training step has, as measured with the quick start's model.
const SHARE: f64 = 0.6;

/// An estimate.
pub struct Cost {
    /// Optimizer steps.
    pub steps: u64,
    /// Samples, or packed rows, of a step.
    pub rows_per_step: usize,
    /// Tokens of the whole run.
    pub tokens: u64,
    /// Speed here; none without a model's config.
    pub tokens_per_second: Option<f64>,
}

impl Cost {
    /// Counts, and times a product the size of the model's.
    pub fn of(config: &RunConfig, data: &OpenData, console: &Console) -> Cost {
        let report = &data.report;
        let rows = if config.packs() { report.tokens.div_ceil(config.cutoff_len) } else { report.samples };
        let batches = rows.div_ceil(config.per_device_train_batch_size);
        let steps_per_epoch = batches.div_ceil(config.gradient_accumulation_steps);
        let steps = config.total_steps(steps_per_epoch);
        let epochs = steps as f64 / steps_per_epoch.max(1) as f64;
        let spec = model_spec(config, console);
        let computing = spec.as_ref().and_then(|_| open_device(config, console).ok());
        let speed = spec.zip(computing).and_then(|(spec, computing)| {
            let share = report.trained_share();
            Some(SHARE * products_per_second(&spec, &computing)? / products_per_token(&spec, config, share))
        });
        Cost {
            steps,
            rows_per_step: config.per_device_train_batch_size * config.gradient_accumulation_steps,
            tokens: (epochs * report.tokens as f64).round() as u64,
            tokens_per_second: speed.filter(|speed| speed.is_finite() && *speed > 0.0),
        }
    }

    /// Time of the whole run.
    pub fn seconds(&self) -> Option<f64> {
        self.tokens_per_second.map(|speed| self.tokens as f64 / speed)
    }
}

/// Multiplications and additions of a step for each token: 2 for each weight forward, 2 for its backward, which gives dx
/// alone, and 2 more where blocks are computed again; the head's for tokens that are trained on.
fn products_per_token(spec: &ModelSpec, config: &RunConfig, trained_share: f64) -> f64 {
    let passes =
        if matches!(config.recompute_policy(), Recompute::All | Recompute::Lean) { 3.0 } else { 2.0 };
    let head = (spec.vocab_size * spec.hidden_size) as f64;
    let adapters = spec.adapter_parameter_count(config.lora_rank) as f64;
    2.0 * passes * spec.linear_parameters_of_a_token() as f64 + 6.0 * adapters + 4.0 * head * trained_share
}

/// Multiplications and additions a second in products the shape of the model's.
fn products_per_second(spec: &ModelSpec, computing: &BuildOptions) -> Option<f64> {
    let (inner, width) = (spec.hidden_size, spec.layers.first()?.mlp.intermediate_size);
    let tensor = |rows, cols| Tensor::zeros(rows, cols, computing.dtype, &computing.device).ok();
    let (x, weight, mut y) = (tensor(ROWS, inner)?, tensor(width, inner)?, tensor(ROWS, width)?);
    let mut product = || {
        let (a, b) = (Operand::new(&x), Operand::new(&weight).transposed());
        multiply(computing.precision, 1.0, a, b, 0.0, &mut y, 0..width).ok()?;
        // A GPU works on after it was asked.
        y.gpu().map_or(Some(()), |gpu| gpu.synchronize().ok())
    };
    product()?;
    let (start, mut count) = (Instant::now(), 0);
    while start.elapsed() < TIMED {
        product()?;
        count += 1;
    }
    Some(2.0 * (ROWS * inner * width * count) as f64 / start.elapsed().as_secs_f64())
}
