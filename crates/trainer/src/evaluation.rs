//! Evaluation: the loss on samples that aren't trained on, what counts as better, and when to stop.

use std::time::Instant;

use ferrotune_data::{Batch, Sample};
use ferrotune_nn::LanguageModel;
use ferrotune_tensor::{Error, Result};
use serde::{Deserialize, Serialize};

use crate::step::context;

/// What is evaluated during a run, and what comes of it.
#[derive(Clone, Debug)]
pub struct Evaluation {
    /// Not trained on.
    pub samples: Vec<Sample>,
    /// Samples in a batch; fewer where memory runs out.
    pub batch_size: usize,
    /// After every so many steps, and after the last; 0: never in the run.
    pub steps: usize,
    /// Before the first step as well.
    pub on_start: bool,
    /// Which number says how good the model is.
    pub metric: Metric,
    /// Whether more of it is better.
    pub greater_is_better: bool,
    /// Evaluations without a better one after which the run ends.
    pub patience: Option<usize>,
    /// The run ends with the best model that was evaluated, not the last.
    pub load_best_model_at_end: bool,
}

/// A number that an evaluation gives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Metric {
    /// Mean loss of the tokens.
    Loss,
    /// exp(loss)
    Perplexity,
    /// Share of tokens that were the most likely ones.
    Accuracy,
}

/// What one evaluation gave.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct EvalReport {
    /// Steps taken.
    pub step: usize,
    /// Steps of the run.
    pub total_steps: usize,
    /// Epochs passed, in parts.
    pub epoch: f64,
    /// Mean over all trained tokens of all samples.
    pub loss: f64,
    /// Share of trained tokens whose target was the most likely one.
    pub accuracy: f64,
    /// Seconds that it took.
    pub runtime: f64,
    /// Samples.
    pub samples: usize,
    /// Batches.
    pub batches: usize,
}

impl EvalReport {
    /// exp(loss)
    pub fn perplexity(&self) -> f64 {
        self.loss.exp()
    }

    /// One of its numbers.
    pub fn metric(&self, metric: Metric) -> f64 {
        match metric {
            Metric::Loss => self.loss,
            Metric::Perplexity => self.perplexity(),
            Metric::Accuracy => self.accuracy,
        }
    }
}

/// The best evaluation so far.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Best {
    /// Its metric.
    pub metric: f64,
    /// Steps taken then.
    pub step: usize,
}

/// Loss and accuracy over samples; nothing is trained. A batch that doesn't fit in memory is halved.
///
/// # Errors
/// When no token is trained on, or not even one sample fits.
pub fn evaluate<M: LanguageModel>(model: &M, samples: &[Sample], batch_size: usize) -> Result<EvalReport> {
    let started = Instant::now();
    let (mut sum, mut correct, mut count, mut batches) = (0.0, 0, 0, 0);
    let (mut at, mut size) = (0, batch_size.max(1));
    while at < samples.len() {
        let end = samples.len().min(at + size);
        let batch = Batch::new(&samples[at..end]);
        match pass(model, &batch) {
            Ok((loss, hits)) => {
                (sum, correct, count, batches) =
                    (sum + loss, correct + hits, count + batch.trained_tokens(), batches + 1);
                at = end;
            }
            Err(Error::OutOfMemory { .. }) if size > 1 => size = size.min(end - at).div_ceil(2).max(1),
            Err(error) => return Err(error),
        }
    }
    if count == 0 {
        return Err(Error::msg("no token to take the loss of"));
    }
    Ok(EvalReport {
        step: 0,
        total_steps: 0,
        epoch: 0.0,
        loss: sum / count as f64,
        accuracy: correct as f64 / count as f64,
        runtime: started.elapsed().as_secs_f64(),
        samples: samples.len(),
        batches,
    })
}

/// The sum of the losses of one batch, and how many targets were the most likely.
fn pass<M: LanguageModel>(model: &M, batch: &Batch) -> Result<(f64, usize)> {
    let hidden = model.hidden(&context(batch), &batch.tokens)?;
    let trained: Vec<f64> = batch.trained.iter().map(|it| f64::from(u8::from(*it))).collect();
    let pass = model.log_probs(&hidden, &batch.targets, &trained)?;
    Ok((-pass.logp.iter().sum::<f64>(), pass.correct.iter().filter(|it| **it).count()))
}
