//! An objective sees only log-probabilities of target tokens, and says how each moves the loss.

use ferrotune_data::Batch;

/// A loss, and how it moves.
#[derive(Clone, Debug, PartialEq)]
pub struct Loss {
    /// This batch's part of the step's loss.
    pub value: f64,
    /// (N,): ∂loss/∂log p of each row's target.
    pub dlogp: Vec<f64>,
}

/// What training lowers.
pub trait Objective {
    /// The loss of one batch of a step in which `trained_total` tokens are trained.
    /// `reference` holds the log-probabilities with adapters off, where they are needed.
    fn loss(&self, batch: &Batch, logp: &[f64], reference: &[f64], trained_total: f64) -> Loss;

    /// ∂loss/∂log p where it doesn't depend on the log-probabilities: then the head is passed once.
    fn known_weights(&self, _batch: &Batch, _trained_total: f64) -> Option<Vec<f64>> {
        None
    }

    /// Needs the log-probabilities with adapters off.
    fn needs_reference(&self) -> bool {
        false
    }
}

/// loss = −mean of log p over the step's trained tokens
#[derive(Clone, Copy, Debug)]
pub struct NextToken;

impl Objective for NextToken {
    fn loss(&self, batch: &Batch, logp: &[f64], _: &[f64], trained_total: f64) -> Loss {
        let dlogp = weights(batch, trained_total);
        Loss { value: dlogp.iter().zip(logp).map(|(d, l)| d * l).sum(), dlogp }
    }

    fn known_weights(&self, batch: &Batch, trained_total: f64) -> Option<Vec<f64>> {
        Some(weights(batch, trained_total))
    }
}

fn weights(batch: &Batch, trained_total: f64) -> Vec<f64> {
    batch.trained.iter().map(|trained| if *trained { -1.0 / trained_total } else { 0.0 }).collect()
}
