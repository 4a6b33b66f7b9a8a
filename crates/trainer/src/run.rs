//! A run: step after step, with reports, checkpoints and an orderly end.

use std::path::{Path, PathBuf};
use std::time::Instant;

use ferrotune_data::{BatchSource, Cursor};
use ferrotune_nn::LanguageModel;
use ferrotune_tensor::{Error, Result};

use crate::optimizer::State;
use crate::step::{StepOutcome, StepSettings, optimizer_step};
use crate::{LossScale, Objective, Optimizer, RunState, Schedule, checkpoint};

/// What the trainer can't do itself, because it knows neither files of models nor generation.
pub trait RunHooks<M> {
    /// Puts the trained model's files into a folder.
    ///
    /// # Errors
    /// When a file can't be written.
    fn save_model(&mut self, model: &mut M, folder: &Path) -> Result<()>;

    /// Is told of every step; says whether to go on.
    ///
    /// # Errors
    /// When a report can't be written; the run stops.
    fn report(&mut self, report: &StepReport) -> Result<Control>;
}

/// Whether to go on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Control {
    /// The next step.
    Continue,
    /// Save and stop.
    Stop,
}

/// What a run is made with.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Where checkpoints go.
    pub output_dir: PathBuf,
    /// Learning rates, and the number of steps.
    pub schedule: Schedule,
    /// Batches of a step.
    pub gradient_accumulation_steps: usize,
    /// Gradients are scaled down to this norm; 0 leaves them.
    pub max_grad_norm: f64,
    /// Seed of dropout.
    pub seed: u64,
    /// Of the first step: dynamic for f16.
    pub loss_scale: LossScale,
    /// A checkpoint after every so many steps; 0: none but when stopped.
    pub save_steps: usize,
    /// Checkpoints that are kept; none: all.
    pub save_total_limit: Option<usize>,
    /// What must be the same for a run to go on from a checkpoint, as (what, value).
    pub identity: Vec<(String, String)>,
}

/// One step, told.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct StepReport {
    /// Steps taken, this one included.
    pub step: usize,
    /// Steps of the run.
    pub total_steps: usize,
    /// Epochs passed, in parts.
    pub epoch: f64,
    /// Over the trained tokens of this step.
    pub loss: f64,
    /// The one this step was taken with.
    pub learning_rate: f64,
    /// Before clipping.
    pub grad_norm: f64,
    /// Share of trained tokens whose target was the most likely one.
    pub accuracy: f64,
    /// Tokens through the model in a second, over the whole run so far.
    pub tokens_per_second: f64,
    /// Tokens through the model so far.
    pub total_tokens: u64,
    /// Seconds trained so far.
    pub elapsed_seconds: f64,
    /// Seconds that the rest will take at this pace.
    pub remaining_seconds: f64,
}

/// How a run ended.
#[derive(Clone, Debug, PartialEq)]
pub enum Ending {
    /// All steps were taken.
    Finished,
    /// It was stopped after saving here.
    Stopped(PathBuf),
}

/// What a run gave.
#[derive(Clone, Debug)]
pub struct Summary {
    /// How it ended.
    pub ending: Ending,
    /// Steps taken in all.
    pub steps: usize,
    /// Steps taken in this sitting.
    pub sitting_steps: usize,
    /// Mean of the steps' losses in this sitting.
    pub mean_loss: f64,
    /// Tokens through the model in all.
    pub total_tokens: u64,
    /// Seconds trained in all.
    pub elapsed_seconds: f64,
    /// Tokens in a second in this sitting.
    pub tokens_per_second: f64,
}

/// Trains from the start, or from where a checkpoint stood. The caller restored the parameters.
///
/// # Errors
/// When a step fails or a file can't be written.
pub fn train<M: LanguageModel>(
    settings: &Settings,
    resumed: Option<(RunState, State)>,
    model: &mut M,
    batches: &mut dyn BatchSource,
    objective: &dyn Objective,
    optimizer: &mut dyn Optimizer,
    hooks: &mut dyn RunHooks<M>,
) -> Result<Summary> {
    let total_steps = settings.schedule.total_steps;
    let mut done = Progress::default();
    let mut loss_scale = settings.loss_scale;
    if let Some((state, optimizer_state)) = resumed {
        state.check_identity(&settings.identity)?;
        optimizer.restore(optimizer_state, &model.parameters())?;
        loss_scale = loss_scale.resumed_from(state.loss_scale);
        batches.seek(Cursor { epoch: state.epoch, position: state.position });
        done =
            Progress { step: state.step, tokens: state.total_tokens, seconds_before: state.elapsed_seconds };
    }
    let (started, first_step, first_tokens) = (Instant::now(), done.step, done.tokens);
    let (mut losses, mut ending) = (0.0, Ending::Finished);
    while done.step < total_steps {
        let step = StepSettings {
            gradient_accumulation_steps: settings.gradient_accumulation_steps,
            max_grad_norm: settings.max_grad_norm,
            seed: settings.seed,
            step: done.step as u64,
            learning_rate: settings.schedule.at(done.step),
            loss_scale: loss_scale.value,
        };
        let outcome = optimizer_step(&step, model, batches, objective, optimizer)?
            .ok_or_else(|| Error::msg("the data gives no batches"))?;
        loss_scale.update(outcome.skipped)?;
        done.step += 1;
        done.tokens += outcome.tokens as u64;
        losses += outcome.loss;
        let sitting = started.elapsed().as_secs_f64();
        let pace = (done.step - first_step) as f64 / sitting;
        let report = StepReport {
            step: done.step,
            total_steps,
            epoch: epochs(batches),
            loss: outcome.loss,
            learning_rate: step.learning_rate,
            grad_norm: outcome.grad_norm,
            accuracy: accuracy(&outcome),
            tokens_per_second: (done.tokens - first_tokens) as f64 / sitting,
            total_tokens: done.tokens,
            elapsed_seconds: done.seconds_before + sitting,
            remaining_seconds: (total_steps - done.step) as f64 / pace,
        };
        let control = hooks.report(&report)?;
        let stop = control == Control::Stop && done.step < total_steps;
        if stop || (settings.save_steps > 0 && done.step % settings.save_steps == 0) {
            let cursor = batches.cursor();
            let state = RunState {
                step: done.step,
                epoch: cursor.epoch,
                position: cursor.position,
                total_tokens: done.tokens,
                elapsed_seconds: report.elapsed_seconds,
                loss_scale: Some(loss_scale),
                identity: settings.identity.clone(),
            };
            let fill = |folder: &Path| hooks.save_model(model, folder);
            let written = checkpoint::write(&settings.output_dir, &state, &optimizer.state()?, fill)?;
            if let Some(keep) = settings.save_total_limit {
                checkpoint::rotate(&settings.output_dir, keep.max(1))?;
            }
            if stop {
                ending = Ending::Stopped(written);
                break;
            }
        }
    }
    let sitting = started.elapsed().as_secs_f64();
    Ok(Summary {
        ending,
        steps: done.step,
        sitting_steps: done.step - first_step,
        mean_loss: losses / (done.step - first_step).max(1) as f64,
        total_tokens: done.tokens,
        elapsed_seconds: done.seconds_before + sitting,
        tokens_per_second: (done.tokens - first_tokens) as f64 / sitting.max(1e-9),
    })
}

/// How far a run is.
#[derive(Default)]
struct Progress {
    step: usize,
    tokens: u64,
    seconds_before: f64,
}

fn epochs(batches: &dyn BatchSource) -> f64 {
    let cursor = batches.cursor();
    cursor.epoch as f64 + cursor.position as f64 / batches.batches_per_epoch().max(1) as f64
}

fn accuracy(outcome: &StepOutcome) -> f64 {
    outcome.correct as f64 / outcome.trained_tokens.max(1) as f64
}
