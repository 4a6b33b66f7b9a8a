//! One optimizer step: batches → forward → objective → backward → clip → step.

use ferrotune_data::{Batch, BatchSource};
use ferrotune_nn::{Context, LanguageModel};
use ferrotune_tensor::{Error, Result};

use crate::optimizer::square_sum;
use crate::{Objective, Optimizer};

/// What one step is taken with.
#[derive(Clone, Copy, Debug)]
pub struct StepSettings {
    /// Batches of a step; the last step of an epoch may have fewer.
    pub gradient_accumulation_steps: usize,
    /// Gradients are scaled down to this norm; 0 leaves them.
    pub max_grad_norm: f64,
    /// Seed of dropout.
    pub seed: u64,
    /// Step of the run, counted from 0.
    pub step: u64,
    /// Of this step.
    pub learning_rate: f64,
    /// What the loss is multiplied by for the backward pass, so that f16 doesn't lose small gradients;
    /// 1 where it isn't needed.
    pub loss_scale: f64,
}

/// What one step gave.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct StepOutcome {
    /// Over all trained tokens of the step.
    pub loss: f64,
    /// Of all gradients, before clipping.
    pub grad_norm: f64,
    /// Trained tokens whose target was the most likely one.
    pub correct: usize,
    /// Tokens that were trained on.
    pub trained_tokens: usize,
    /// Tokens that went through the model.
    pub tokens: usize,
    /// Why no step was taken.
    pub skipped: Option<Skipped>,
}

/// Why a step was left out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Skipped {
    /// The scaled gradients overflowed f16, which is no news of the model.
    Overflow,
    /// The loss or the gradients aren't finite.
    NotFinite,
}

/// Takes one step, in the next epoch where this one has ended; none when there is no data.
///
/// # Errors
/// When the data can't be read or the device can't.
pub fn optimizer_step<M: LanguageModel>(
    settings: &StepSettings,
    model: &mut M,
    batches: &mut dyn BatchSource,
    objective: &dyn Objective,
    optimizer: &mut dyn Optimizer,
) -> Result<Option<StepOutcome>> {
    let Some(outcome) = add_gradients(settings, model, batches, objective)? else { return Ok(None) };
    apply_gradients(settings, outcome, model, optimizer).map(Some)
}

/// The first half of a step: adds to the gradients of all parameters, which were zero.
pub(crate) fn add_gradients<M: LanguageModel>(
    settings: &StepSettings,
    model: &mut M,
    batches: &mut dyn BatchSource,
    objective: &dyn Objective,
) -> Result<Option<StepOutcome>> {
    let accumulation = settings.gradient_accumulation_steps;
    if batches.trained_ahead(accumulation) == 0 {
        next_batch(batches)?; // the end of an epoch, given once
    }
    // Divided once, by the trained tokens of the whole step: never an average of averages.
    let trained_total = batches.trained_ahead(accumulation) as f64;
    let mut outcome = StepOutcome::default();
    for micro_step in 0..accumulation as u64 {
        let Some(batch) = next_batch(batches)? else { break };
        let ctx = Context {
            seed: settings.seed,
            step: settings.step,
            micro_step,
            training: true,
            ..context(&batch)
        };
        let (hidden, saved) = model.forward(&ctx, &batch.tokens)?;
        let (loss, correct, dhidden) = match objective.known_weights(&batch, trained_total) {
            Some(dlogp) => {
                let pass =
                    model.head_backward(&hidden, &batch.targets, &scaled(&dlogp, settings.loss_scale))?;
                let loss = dlogp.iter().zip(&pass.logp).map(|(d, l)| d * l).sum();
                (loss, pass.correct, pass.dhidden)
            }
            None => {
                let trained: Vec<f64> = batch.trained.iter().map(|it| f64::from(u8::from(*it))).collect();
                let pass = model.log_probs(&hidden, &batch.targets, &trained)?;
                let reference = reference(model, objective, &batch, &trained)?;
                let loss = objective.loss(&batch, &pass.logp, &reference, trained_total);
                let dlogp = scaled(&loss.dlogp, settings.loss_scale);
                let dhidden = model.head_backward(&hidden, &batch.targets, &dlogp)?.dhidden;
                (loss.value, pass.correct, dhidden)
            }
        };
        drop(hidden);
        let dhidden = dhidden.ok_or_else(|| Error::msg("the head gave no gradient"))?;
        model.backward(&ctx, saved, dhidden)?;
        outcome.loss += loss;
        outcome.correct += correct.iter().filter(|it| **it).count();
        outcome.trained_tokens += batch.trained_tokens();
        outcome.tokens += batch.tokens.len();
    }
    Ok((outcome.tokens > 0).then_some(outcome))
}

/// The second half: moves the parameters, and sets their gradients to zero. One whose loss or gradients
/// aren't finite moves nothing.
pub(crate) fn apply_gradients<M: LanguageModel>(
    settings: &StepSettings,
    mut outcome: StepOutcome,
    model: &mut M,
    optimizer: &mut dyn Optimizer,
) -> Result<StepOutcome> {
    let mut parameters = model.parameters();
    outcome.grad_norm = square_sum(&parameters)?.sqrt() / settings.loss_scale;
    outcome.skipped = match (outcome.loss.is_finite(), outcome.grad_norm.is_finite()) {
        (true, true) => None,
        (true, false) if settings.loss_scale != 1.0 => Some(Skipped::Overflow),
        _ => Some(Skipped::NotFinite),
    };
    if outcome.skipped.is_none() {
        let clip = match settings.max_grad_norm > 0.0 && outcome.grad_norm > settings.max_grad_norm {
            true => settings.max_grad_norm / (outcome.grad_norm + 1e-6),
            false => 1.0,
        };
        optimizer.step(&mut parameters, settings.learning_rate, clip / settings.loss_scale)?;
    }
    parameters.iter_mut().try_for_each(|it| it.grad.set_zero())?;
    Ok(outcome)
}

fn scaled(dlogp: &[f64], scale: f64) -> Vec<f64> {
    dlogp.iter().map(|it| it * scale).collect()
}

fn next_batch(batches: &mut dyn BatchSource) -> Result<Option<Batch>> {
    batches.next().map_err(|error| Error::msg(error.to_string()))
}

pub(crate) fn context(batch: &Batch) -> Context {
    Context::new(batch.sequence_starts.iter().map(|it| *it as usize).collect())
}

/// Log-probabilities with adapters off, where the objective wants them.
fn reference<M: LanguageModel>(
    model: &M,
    objective: &dyn Objective,
    batch: &Batch,
    trained: &[f64],
) -> Result<Vec<f64>> {
    if !objective.needs_reference() {
        return Ok(Vec::new());
    }
    let ctx = Context { adapters: false, ..context(batch) };
    let hidden = model.hidden(&ctx, &batch.tokens)?;
    Ok(model.log_probs(&hidden, &batch.targets, trained)?.logp)
}
