use ferrotune_tensor::{Result, Tensor};

use crate::{Context, HeadPass, Parameter};

/// A language model as a trainer sees it.
pub trait LanguageModel {
    /// What a forward keeps for its backward.
    type Saved;

    /// (N,) tokens → hidden states (N, C) after the last norm.
    ///
    /// # Errors
    /// When a token is outside the vocabulary or the device can't.
    fn forward(&self, ctx: &Context, tokens: &[u32]) -> Result<(Tensor, Self::Saved)>;

    /// The same with nothing kept, for evaluation.
    ///
    /// # Errors
    /// As `forward`.
    fn hidden(&self, ctx: &Context, tokens: &[u32]) -> Result<Tensor>;

    /// log p(target) of every row whose weight isn't 0.
    ///
    /// # Errors
    /// When a target is outside the vocabulary.
    fn log_probs(&self, hidden: &Tensor, targets: &[u32], weights: &[f64]) -> Result<HeadPass>;

    /// Log-probabilities and dhidden, given ∂loss/∂log p of every row; adds to the gradient of the head where
    /// that is trained.
    ///
    /// # Errors
    /// When a target is outside the vocabulary.
    fn head_backward(&mut self, hidden: &Tensor, targets: &[u32], dlogp: &[f64]) -> Result<HeadPass>;

    /// Adds to the gradients of all parameters.
    ///
    /// # Errors
    /// When the device can't.
    fn backward(&mut self, ctx: &Context, saved: Self::Saved, dhidden: Tensor) -> Result<()>;

    /// All trained tensors, in a fixed order.
    fn parameters(&mut self) -> Vec<&mut Parameter>;
}
