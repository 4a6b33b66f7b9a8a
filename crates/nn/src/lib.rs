//! Differentiable pieces, each with its forward and its backward side by side.
//!
//! There is no autograd graph: in (Q)LoRA only the adapters have weight gradients, so a backward is
//! `dx` for a handful of rules, written out below each forward. Every rule is checked against finite
//! differences in f64 ([`check::gradients`]). This crate knows no model, no NF4 and no LoRA: those
//! come in through [`Weight`] and [`Adapter`].
//!
//! Letters for shapes: N tokens, C width, H heads, K key-value heads, D head width, F mlp width,
//! V vocabulary, R rank.

mod attention;
pub mod check;
mod embedding;
mod experts;
mod feed_forward;
mod head;
mod lanes;
mod linear;
mod mlp;
mod model;
mod noise;
mod norm;
mod numbers;
mod pass;
mod rope;
mod row;
mod weight;

use ferrotune_tensor::{DType, Result, Tensor};

pub use attention::{Attention, AttentionSaved, KeyValues};
pub use embedding::Embedding;
pub use experts::{Experts, ExpertsSaved};
pub use feed_forward::{FeedForward, FeedForwardSaved};
pub use head::{Head, HeadPass};
pub use linear::{Adapter, Linear, LowRank, Part, Room};
pub use mlp::{Activation, Mlp, MlpSaved};
pub use model::LanguageModel;
pub use noise::add_noise;
pub use norm::{Norm, NormKind};
pub use numbers::Numbers;
pub use pass::PassCache;
pub use rope::Rope;
pub use row::{Coded, RowState, StoredRows};
pub use weight::{DenseWeight, Weight, backward_tiles, backward_whole, forward_tiles, forward_whole, widen};

/// What every layer of one pass shares.
#[derive(Debug, Default)]
pub struct Context {
    /// First row of each packed sequence, then the number of rows.
    pub sequence_starts: Vec<usize>,
    /// Position of the first row of each sequence: 0 but when decoding goes on.
    pub first_position: usize,
    /// Seed of the run.
    pub seed: u64,
    /// Optimizer step, counted from 0.
    pub step: u64,
    /// Micro-step within the optimizer step.
    pub micro_step: u64,
    /// Dropout and noise are on.
    pub training: bool,
    /// Adapters take part; off, the model is the base model.
    pub adapters: bool,
    /// Of a pass of one token on a GPU: where the sequence stands, so that the pass can be recorded.
    pub row: Option<RowState>,
    /// What layers of this pass share, made by the first that asks.
    pub shared: PassCache,
}

impl Context {
    /// A pass over packed sequences outside training, adapters on.
    pub fn new(sequence_starts: Vec<usize>) -> Context {
        Context { sequence_starts, adapters: true, ..Context::default() }
    }

    /// Rows of the pass.
    pub fn rows(&self) -> usize {
        self.sequence_starts.last().copied().unwrap_or(0)
    }

    /// First row and end of each sequence.
    pub fn sequences(&self) -> impl Iterator<Item = std::ops::Range<usize>> + '_ {
        self.sequence_starts.windows(2).map(|bounds| bounds[0]..bounds[1])
    }
}

/// A differentiable piece: `forward` hands back what its own `backward` will need.
pub trait Layer {
    /// A readable struct of tensors, freed as `backward` takes it.
    type Saved: SavedTensors;

    /// (N, C) → (N, C′)
    ///
    /// # Errors
    /// When shapes don't fit or the device can't.
    fn forward(&self, ctx: &Context, x: &Tensor) -> Result<(Tensor, Self::Saved)>;

    /// What [`Layer::forward`] saves, without its output where that is cheaper.
    ///
    /// # Errors
    /// As `forward`.
    fn recompute(&self, ctx: &Context, x: &Tensor) -> Result<Self::Saved> {
        Ok(self.forward(ctx, x)?.1)
    }

    /// Returns dx, adds to this layer's own gradients, and uses up what forward saved.
    ///
    /// # Errors
    /// As `forward`.
    fn backward(&mut self, ctx: &Context, x: &Tensor, saved: Self::Saved, dy: Tensor) -> Result<Tensor>;

    /// Columns that its input should have to spare on the device of `like`; one without is copied.
    fn room(&self, _ctx: &Context, _like: &Tensor) -> usize {
        0
    }

    /// The same of its output's gradient.
    fn gradient_room(&self, _ctx: &Context, _like: &Tensor) -> usize {
        0
    }

    /// All trained tensors, in a fixed order.
    fn parameters(&mut self) -> Vec<&mut Parameter>;
}

/// What a forward saves, as a list: whoever moves it elsewhere needs to know no more.
pub trait SavedTensors {
    /// All tensors.
    fn tensors(&mut self) -> Vec<&mut Tensor>;
}

impl SavedTensors for () {
    fn tensors(&mut self) -> Vec<&mut Tensor> {
        Vec::new()
    }
}

/// A trained tensor and its gradient.
#[derive(Debug)]
pub struct Parameter {
    /// Canonical name, such as `model.layers.0.self_attn.q_proj.lora_A.weight`.
    pub name: String,
    /// The trained numbers.
    pub value: Tensor,
    /// Added to by every backward, set to zero by the trainer.
    pub grad: Tensor,
    /// The numbers in the type that products take, where that is another one; kept by the optimizer.
    pub copy: Option<Tensor>,
}

impl Parameter {
    /// With a gradient of zero.
    ///
    /// # Errors
    /// When the device has no room.
    pub fn new(name: impl Into<String>, value: Tensor) -> Result<Parameter> {
        let grad = value.zeros_like(value.rows(), value.cols())?;
        Ok(Parameter { name: name.into(), value, grad, copy: None })
    }

    /// With a copy for products in this type, where it isn't that of the numbers.
    ///
    /// # Errors
    /// When the device has no room.
    pub fn with_copy(mut self, dtype: DType) -> Result<Parameter> {
        if dtype != self.value.dtype() {
            let (rows, cols) = self.value.shape();
            let mut copy = Tensor::empty(rows, cols, dtype, &self.value.device())?;
            self.value.cast_into(&mut copy)?;
            self.copy = Some(copy);
        }
        Ok(self)
    }

    /// What products read.
    pub fn operand(&self) -> &Tensor {
        self.copy.as_ref().unwrap_or(&self.value)
    }
}
