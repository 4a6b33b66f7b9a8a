//! A run: step after step, with reports, checkpoints and an orderly end.

#[cfg(test)]
mod tests;

use std::path::{Path, PathBuf};
use std::time::Instant;

use ferrotune_data::{BatchSource, Cursor};
use ferrotune_nn::LanguageModel;
use ferrotune_tensor::{Error, Result};

use crate::optimizer::State;
use crate::step::{StepOutcome, StepSettings, add_gradients, apply_gradients};
use crate::{
    Best, EvalReport, Evaluation, LossScale, Objective, Optimizer, RunState, Schedule, Skipped, Window,
    checkpoint, evaluate, history,
};

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

    /// Is told of an evaluation.
    ///
    /// # Errors
    /// When a report can't be written; the run stops.
    fn report_evaluation(&mut self, _report: &EvalReport) -> Result<()> {
        Ok(())
    }

    /// Puts the numbers that [`RunHooks::save_model`] wrote back into the model.
    ///
    /// # Errors
    /// When a file is missing or of another model.
    fn load_model(&mut self, model: &mut M, folder: &Path) -> Result<()>;

    /// Makes the model take less memory after a step has run out of it; false when nothing is left to spare.
    fn spare_memory(&mut self, _model: &mut M, _error: &Error) -> bool {
        false
    }
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
    /// Samples of a batch, and epochs of the run, as they are told to transformers' readers.
    pub train_batch_size: usize,
    /// See above.
    pub num_train_epochs: usize,
    /// What is evaluated.
    pub evaluation: Option<Evaluation>,
    /// Gradients are scaled down to this norm; 0 leaves them.
    pub max_grad_norm: f64,
    /// Seed of dropout.
    pub seed: u64,
    /// Of the first step: dynamic for f16.
    pub loss_scale: LossScale,
    /// A line of the log after every so many steps.
    pub logging_steps: usize,
    /// A checkpoint after every so many steps, and after the last; 0: none but when stopped.
    pub save_steps: usize,
    /// When to have saved and stopped.
    pub deadline: Option<Instant>,
    /// Checkpoints that are kept; none: all.
    pub save_total_limit: Option<usize>,
    /// What must be the same for a run to go on from a checkpoint, as (what, value).
    pub identity: Vec<(String, String)>,
}

/// One step, told.
#[derive(Clone, Debug, PartialEq)]
pub struct StepReport {
    /// Steps taken, this one included.
    pub step: usize,
    /// Steps of the run.
    pub total_steps: usize,
    /// Epochs passed, in parts.
    pub epoch: f64,
    /// Over the trained tokens of this step.
    pub loss: f64,
    /// Mean of the steps' losses since the last line of the log, this one's included; those that aren't
    /// finite aside.
    pub mean_loss: f64,
    /// A line of the log is due.
    pub logged: bool,
    /// Why the step was left out.
    pub skipped: Option<Skipped>,
    /// The step's samples, where loss or gradients weren't finite.
    pub samples: Vec<usize>,
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
    /// Evaluations got no better for long enough.
    Early,
    /// It was stopped after saving here.
    Stopped(PathBuf),
    /// The deadline was near; it was saved here.
    OutOfTime(PathBuf),
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
    /// Mean of the steps' losses in this sitting; of all that were logged, where it had no steps.
    pub mean_loss: Option<f64>,
    /// Tokens through the model in all.
    pub total_tokens: u64,
    /// Seconds trained in all.
    pub elapsed_seconds: f64,
    /// Tokens in a second in this sitting.
    pub tokens_per_second: f64,
    /// Epochs passed, in parts.
    pub epoch: f64,
    /// The best evaluation, where that is what the model is now.
    pub loaded: Option<Best>,
}

/// Steps in a row without a finite loss and finite gradients, after which a run stops.
const MOST_NOT_FINITE: u32 = 3;

/// Trains from the start, or from where a checkpoint stood. The caller restored the parameters.
///
/// # Errors
/// When a step fails or a file can't be written, or loss or gradients stay infinite.
pub fn train<M: LanguageModel>(
    settings: &Settings,
    resumed: Option<(RunState, State)>,
    model: &mut M,
    batches: &mut dyn BatchSource,
    objective: &dyn Objective,
    optimizer: &mut dyn Optimizer,
    hooks: &mut dyn RunHooks<M>,
) -> Result<Summary> {
    let mut state = RunState::new(settings);
    if let Some((saved, optimizer_state)) = resumed {
        saved.check_identity(&settings.identity)?;
        optimizer.restore(optimizer_state, &model.parameters())?;
        let loss_scale = settings.loss_scale.resumed_from(saved.loss_scale);
        batches.seek(Cursor { epoch: saved.epoch, position: saved.position });
        state = RunState { loss_scale: Some(loss_scale), identity: settings.identity.clone(), ..saved };
    }
    let sitting = Sitting::begin(&state);
    let mut run = Run { settings, model, batches, objective, optimizer, hooks, state, sitting };
    let ending = run.steps()?;
    let loaded = match ending {
        Ending::Finished | Ending::Early => {
            history::write(&settings.output_dir, settings, &run.state)?;
            run.load_best()?
        }
        _ => None,
    };
    Ok(run.summary(ending, loaded))
}

/// A run under way.
struct Run<'a, M> {
    settings: &'a Settings,
    model: &'a mut M,
    batches: &'a mut dyn BatchSource,
    objective: &'a dyn Objective,
    optimizer: &'a mut dyn Optimizer,
    hooks: &'a mut dyn RunHooks<M>,
    state: RunState,
    sitting: Sitting,
}

/// What is counted from the start of the process on.
struct Sitting {
    started: Instant,
    first_step: usize,
    first_tokens: u64,
    seconds_before: f64,
    /// Of all finite steps.
    losses: Window,
    longest_step: f64,
    longest_save: f64,
}

impl Sitting {
    fn begin(state: &RunState) -> Sitting {
        Sitting {
            started: Instant::now(),
            first_step: state.step,
            first_tokens: state.total_tokens,
            seconds_before: state.elapsed_seconds,
            losses: Window::default(),
            longest_step: 0.0,
            longest_save: 0.0,
        }
    }

    fn seconds(&self) -> f64 {
        self.started.elapsed().as_secs_f64()
    }
}

impl<M: LanguageModel> Run<'_, M> {
    fn steps(&mut self) -> Result<Ending> {
        // A run that was killed may have been about to.
        self.rotate()?;
        let total_steps = self.settings.schedule.total_steps;
        if self.state.step == 0 && self.settings.evaluation.as_ref().is_some_and(|it| it.on_start) {
            self.evaluate()?;
        }
        while self.state.step < total_steps {
            if self.is_hopeless() {
                return Ok(Ending::Early);
            }
            let control = self.step()?;
            let (step, save_steps) = (self.state.step, self.settings.save_steps);
            let last = step == total_steps;
            let mut due = save_steps > 0 && (last || step.is_multiple_of(save_steps));
            if let Some(it) = &self.settings.evaluation
                && it.steps > 0
                && (last || step.is_multiple_of(it.steps))
            {
                let keep_best = it.load_best_model_at_end;
                let better = self.evaluate()?;
                due |= (better && keep_best) || (save_steps > 0 && self.is_hopeless());
            }
            let (stop, late) = (control == Control::Stop && !last, self.is_late() && !last);
            if due || stop || late {
                let written = self.save()?;
                if stop {
                    return Ok(Ending::Stopped(written));
                }
                if late {
                    return Ok(Ending::OutOfTime(written));
                }
            }
        }
        Ok(Ending::Finished)
    }

    /// Another step and saving might take longer than there is time.
    fn is_late(&self) -> bool {
        let Some(deadline) = self.settings.deadline else { return false };
        let left = deadline.saturating_duration_since(Instant::now()).as_secs_f64();
        left < 2.0 * (self.sitting.longest_step + self.sitting.longest_save)
    }

    /// No evaluation has been better for long enough.
    fn is_hopeless(&self) -> bool {
        let patience = self.settings.evaluation.as_ref().and_then(|it| it.patience);
        patience.is_some_and(|it| self.state.without_progress >= it)
    }

    /// Evaluates, and tells of it; whether the model is better than it was.
    fn evaluate(&mut self) -> Result<bool> {
        let Some(it) = &self.settings.evaluation else { return Ok(false) };
        let report = EvalReport {
            step: self.state.step,
            total_steps: self.settings.schedule.total_steps,
            epoch: epochs(self.batches),
            ..evaluate(self.model, &it.samples, it.batch_size)?
        };
        let metric = report.metric(it.metric);
        let state = &mut self.state;
        let better = state.best.is_none_or(|best| match it.greater_is_better {
            true => metric > best.metric,
            false => metric < best.metric,
        });
        if better {
            state.best = Some(Best { metric, step: state.step });
        }
        state.without_progress = if better { 0 } else { state.without_progress + 1 };
        if let Some((plateau, rate)) = &mut state.plateau {
            *rate = plateau.after(metric, *rate);
        }
        state.history.push(history::eval_entry(&report));
        self.hooks.report_evaluation(&report)?;
        Ok(better)
    }

    /// Puts the best model back, where that is wanted.
    fn load_best(&mut self) -> Result<Option<Best>> {
        let wanted = self.settings.evaluation.as_ref().is_some_and(|it| it.load_best_model_at_end);
        let Some(best) = self.state.best.filter(|_| wanted) else { return Ok(None) };
        let folder = self.settings.output_dir.join(format!("checkpoint-{}", best.step));
        if best.step == 0 || !folder.is_dir() {
            // Better before training than ever after; or the checkpoint was taken away.
            return Ok(None);
        }
        self.hooks.load_model(self.model, &folder)?;
        Ok(Some(best))
    }

    /// Takes a step and tells of it.
    fn step(&mut self) -> Result<Control> {
        let started = Instant::now();
        let loss_scale = self.state.loss_scale.unwrap_or(self.settings.loss_scale);
        let settings = StepSettings {
            gradient_accumulation_steps: self.settings.gradient_accumulation_steps,
            max_grad_norm: self.settings.max_grad_norm,
            seed: self.settings.seed,
            step: self.state.step as u64,
            learning_rate: match &self.state.plateau {
                Some((_, rate)) => *rate,
                None => self.settings.schedule.at(self.state.step),
            },
            loss_scale: loss_scale.value,
        };
        let first_batch = self.batches.cursor();
        let outcome = self.gradients(&settings)?;
        let outcome = apply_gradients(&settings, outcome, self.model, self.optimizer)?;
        self.note(&outcome)?;
        let samples = match outcome.skipped {
            Some(Skipped::NotFinite) => self.samples_from(first_batch)?,
            _ => Vec::new(),
        };
        let (state, sitting) = (&mut self.state, &mut self.sitting);
        let seconds = sitting.seconds();
        sitting.longest_step = sitting.longest_step.max(started.elapsed().as_secs_f64());
        state.elapsed_seconds = sitting.seconds_before + seconds;
        let total_steps = self.settings.schedule.total_steps;
        let pace = (state.step - sitting.first_step) as f64 / seconds;
        let report = StepReport {
            step: state.step,
            total_steps,
            epoch: epochs(self.batches),
            loss: outcome.loss,
            mean_loss: state.window.mean(),
            logged: state.step.is_multiple_of(self.settings.logging_steps) || state.step == total_steps,
            skipped: outcome.skipped,
            samples,
            learning_rate: settings.learning_rate,
            grad_norm: outcome.grad_norm,
            accuracy: accuracy(&outcome),
            tokens_per_second: (state.total_tokens - sitting.first_tokens) as f64 / seconds,
            total_tokens: state.total_tokens,
            elapsed_seconds: state.elapsed_seconds,
            remaining_seconds: (total_steps - state.step) as f64 / pace,
        };
        if report.logged {
            state.history.push(history::train_entry(&report));
            state.window = Window::default();
        }
        let control = self.hooks.report(&report)?;
        match state.not_finite_in_a_row < MOST_NOT_FINITE {
            true => Ok(control),
            false => Err(Error::msg(format!(
                "step {}: the loss is {} and the gradients' norm {}, and {MOST_NOT_FINITE} steps in a row were left out; lower learning_rate, or look at the samples named above. The last checkpoint is as good as it was",
                report.step, report.loss, report.grad_norm
            ))),
        }
    }

    /// The gradients of a step; one that runs out of memory is tried again with less of it, where that
    /// can be.
    fn gradients(&mut self, settings: &StepSettings) -> Result<StepOutcome> {
        let cursor = self.batches.cursor();
        loop {
            match add_gradients(settings, self.model, self.batches, self.objective) {
                Ok(outcome) => return outcome.ok_or_else(|| Error::msg("the data gives no batches")),
                Err(error @ Error::OutOfMemory { .. }) if self.hooks.spare_memory(self.model, &error) => {
                    self.model.parameters().into_iter().try_for_each(|it| it.grad.set_zero())?;
                    self.batches.seek(cursor);
                }
                Err(error) => return Err(error),
            }
        }
    }

    /// Counts a step that was taken or left out.
    fn note(&mut self, outcome: &StepOutcome) -> Result<()> {
        let state = &mut self.state;
        let mut loss_scale = state.loss_scale.unwrap_or(self.settings.loss_scale);
        loss_scale.update(outcome.skipped == Some(Skipped::Overflow))?;
        state.loss_scale = Some(loss_scale);
        state.step += 1;
        state.total_tokens += outcome.tokens as u64;
        match outcome.skipped {
            Some(Skipped::NotFinite) => state.not_finite_in_a_row += 1,
            Some(Skipped::Overflow) => {}
            None => state.not_finite_in_a_row = 0,
        }
        state.window.add(outcome.loss);
        self.sitting.losses.add(outcome.loss);
        let cursor = self.batches.cursor();
        (state.epoch, state.position) = (cursor.epoch, cursor.position);
        Ok(())
    }

    /// The samples of the step that began at a cursor.
    fn samples_from(&mut self, first: Cursor) -> Result<Vec<usize>> {
        let now = self.batches.cursor();
        // A step lies within one epoch.
        let position = if first.epoch == now.epoch { first.position } else { 0 };
        self.batches.seek(Cursor { epoch: now.epoch, position });
        let samples = self.batches.samples_ahead(self.settings.gradient_accumulation_steps);
        self.batches.seek(now);
        Ok(samples)
    }

    fn save(&mut self) -> Result<PathBuf> {
        let started = Instant::now();
        let Run { settings, model, hooks, optimizer, state, .. } = self;
        let fill = |folder: &Path| hooks.save_model(model, folder);
        let written = checkpoint::write(settings, state, &optimizer.state()?, fill)?;
        self.rotate()?;
        self.sitting.longest_save = self.sitting.longest_save.max(started.elapsed().as_secs_f64());
        Ok(written)
    }

    fn rotate(&self) -> Result<()> {
        match self.settings.save_total_limit {
            Some(keep) => {
                let keeps_best = |it: &&Evaluation| it.load_best_model_at_end;
                let best = self.settings.evaluation.as_ref().filter(keeps_best).and(self.state.best);
                let best = best.map(|it| it.step);
                checkpoint::rotate(&self.settings.output_dir, keep.max(1), best)
            }
            None => Ok(()),
        }
    }

    fn summary(&self, ending: Ending, loaded: Option<Best>) -> Summary {
        let (state, sitting) = (&self.state, &self.sitting);
        let seconds = sitting.seconds();
        Summary {
            ending,
            steps: state.step,
            sitting_steps: state.step - sitting.first_step,
            mean_loss: match state.step > sitting.first_step {
                true => Some(sitting.losses.mean()),
                false => history::mean_loss(&state.history),
            },
            total_tokens: state.total_tokens,
            elapsed_seconds: sitting.seconds_before + seconds,
            tokens_per_second: (state.total_tokens - sitting.first_tokens) as f64 / seconds.max(1e-9),
            epoch: epochs(self.batches),
            loaded,
        }
    }
}

fn epochs(batches: &dyn BatchSource) -> f64 {
    let cursor = batches.cursor();
    cursor.epoch as f64 + cursor.position as f64 / batches.batches_per_epoch().max(1) as f64
}

fn accuracy(outcome: &StepOutcome) -> f64 {
    outcome.correct as f64 / outcome.trained_tokens.max(1) as f64
}
