//! The second half of a block: one mlp for all tokens, or experts.

use ferrotune_tensor::{Error, Result, Tensor};

use crate::experts::{Experts, ExpertsSaved};
use crate::mlp::{Mlp, MlpSaved};
use crate::{Context, Layer, Linear, Norm, Parameter, SavedTensors};

/// What stands behind attention.
pub enum FeedForward {
    /// The same for every token.
    Dense(Mlp),
    /// Some of many for each token.
    Experts(Box<Experts>),
}

/// What [`FeedForward`]'s backward reads.
pub enum FeedForwardSaved {
    /// Of [`FeedForward::Dense`].
    Dense(MlpSaved),
    /// Of [`FeedForward::Experts`].
    Experts(ExpertsSaved),
}

impl SavedTensors for FeedForwardSaved {
    fn tensors(&mut self) -> Vec<&mut Tensor> {
        match self {
            FeedForwardSaved::Dense(saved) => saved.tensors(),
            FeedForwardSaved::Experts(saved) => saved.tensors(),
        }
    }
}

impl FeedForward {
    /// All projections.
    pub fn linears(&self) -> Vec<&Linear> {
        let mlps = match self {
            FeedForward::Dense(mlp) => std::slice::from_ref(mlp),
            FeedForward::Experts(it) => it.experts.as_slice(),
        };
        mlps.iter().flat_map(|it| [&it.gate_up, &it.down]).collect()
    }

    /// The same, to be changed.
    pub fn linears_mut(&mut self) -> Vec<&mut Linear> {
        let mlps = match self {
            FeedForward::Dense(mlp) => std::slice::from_mut(mlp),
            FeedForward::Experts(it) => it.experts.as_mut_slice(),
        };
        mlps.iter_mut().flat_map(|it| [&mut it.gate_up, &mut it.down]).collect()
    }

    /// Whether [`FeedForward::step_row`] takes such rows.
    pub fn takes_row(&self, ctx: &Context, like: &Tensor) -> bool {
        matches!(self, FeedForward::Dense(mlp) if mlp.takes_row(ctx, like))
    }

    /// x + scale·mlp(norm(x)) for one row on a GPU.
    ///
    /// # Errors
    /// When [`FeedForward::takes_row`] says no.
    pub fn step_row(&self, ctx: &Context, x: &Tensor, norm: &Norm, scale: f64) -> Result<Tensor> {
        match self {
            FeedForward::Dense(mlp) => mlp.step_row(ctx, x, norm, scale),
            FeedForward::Experts(_) => Err(Error::msg("no kernel takes experts row by row")),
        }
    }
}

impl Layer for FeedForward {
    type Saved = FeedForwardSaved;

    fn forward(&self, ctx: &Context, x: &Tensor) -> Result<(Tensor, FeedForwardSaved)> {
        match self {
            FeedForward::Dense(it) => {
                it.forward(ctx, x).map(|(y, saved)| (y, FeedForwardSaved::Dense(saved)))
            }
            FeedForward::Experts(it) => {
                it.forward(ctx, x).map(|(y, saved)| (y, FeedForwardSaved::Experts(saved)))
            }
        }
    }

    fn recompute(&self, ctx: &Context, x: &Tensor) -> Result<FeedForwardSaved> {
        match self {
            FeedForward::Dense(it) => it.recompute(ctx, x).map(FeedForwardSaved::Dense),
            FeedForward::Experts(it) => it.recompute(ctx, x).map(FeedForwardSaved::Experts),
        }
    }

    fn backward(&mut self, ctx: &Context, x: &Tensor, saved: FeedForwardSaved, dy: Tensor) -> Result<Tensor> {
        match (self, saved) {
            (FeedForward::Dense(it), FeedForwardSaved::Dense(saved)) => it.backward(ctx, x, saved, dy),
            (FeedForward::Experts(it), FeedForwardSaved::Experts(saved)) => it.backward(ctx, x, saved, dy),
            _ => Err(Error::msg("what was saved belongs to another kind of layer")),
        }
    }

    fn room(&self, ctx: &Context, like: &Tensor) -> usize {
        match self {
            FeedForward::Dense(it) => it.room(ctx, like),
            FeedForward::Experts(it) => it.room(ctx, like),
        }
    }

    fn gradient_room(&self, ctx: &Context, like: &Tensor) -> usize {
        match self {
            FeedForward::Dense(it) => it.gradient_room(ctx, like),
            FeedForward::Experts(it) => it.gradient_room(ctx, like),
        }
    }

    fn parameters(&mut self) -> Vec<&mut Parameter> {
        match self {
            FeedForward::Dense(it) => it.parameters(),
            FeedForward::Experts(it) => it.parameters(),
        }
    }
}
