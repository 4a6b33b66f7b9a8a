//! tokens → embedding → blocks → norm → hidden states → head.

use ferrotune_nn::{
    Context, Embedding, Head, HeadPass, KeyValues, LanguageModel, Layer, Norm, Parameter, SavedTensors,
    Weight,
};
use ferrotune_tensor::{DType, Error, Result, Tensor};

use crate::block::{Block, BlockSaved};

/// What is kept of a block for its backward.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Recompute {
    /// All that backward reads.
    Keep,
    /// Only the block's input; the rest is computed again.
    Recompute,
    /// All that backward reads, in the host's memory until then (on a GPU; else as `Keep`).
    Offload,
}

/// A whole decoder, whatever its family.
pub struct Decoder {
    /// Tokens to vectors.
    pub embedding: Embedding,
    /// The layers.
    pub blocks: Vec<Block>,
    /// Before the head.
    pub norm: Norm,
    /// Vectors to logits.
    pub head: Head,
    /// One for each block.
    pub recompute: Vec<Recompute>,
    /// What activations are computed in: f32, or f64 to check gradients.
    pub dtype: DType,
}

/// What [`Decoder`]'s backward reads.
pub struct DecoderSaved {
    /// Each block's input (N, C), and what it kept.
    blocks: Vec<(Tensor, Option<BlockSaved>)>,
    /// (N, C): what the last norm read.
    last: Tensor,
}

/// Keys and values of every layer, for one sequence that grows.
#[derive(Debug)]
pub struct KvCache(Vec<KeyValues>);

impl KvCache {
    /// Tokens held.
    pub fn len(&self) -> usize {
        self.0.first().map_or(0, KeyValues::len)
    }

    /// Nothing is held.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    pub(crate) fn layers(&self) -> impl Iterator<Item = &KeyValues> {
        self.0.iter()
    }

    pub(crate) fn layers_mut(&mut self) -> impl Iterator<Item = &mut KeyValues> {
        self.0.iter_mut()
    }

    /// Forgets all but the first tokens.
    pub fn truncate(&mut self, len: usize) {
        self.0.iter_mut().for_each(|layer| layer.truncate(len));
    }
}

impl Decoder {
    /// A cache that holds nothing.
    pub fn cache(&self) -> KvCache {
        KvCache(self.blocks.iter().map(|_| KeyValues::default()).collect())
    }

    /// Hidden states (N, C) of the tokens that follow what the cache holds; they join it.
    ///
    /// # Errors
    /// When a token is outside the vocabulary.
    pub fn step(&self, tokens: &[u32], adapters: bool, cache: &mut KvCache) -> Result<Tensor> {
        let ctx = Context { first_position: cache.len(), adapters, ..Context::new(vec![0, tokens.len()]) };
        let mut x = self.embedding.forward(tokens, self.dtype)?;
        for (block, cache) in self.blocks.iter().zip(&mut cache.0) {
            x = block.step(&ctx, &x, cache)?;
        }
        self.norm.forward(&x)
    }

    /// Bytes of all weights: projections, embedding and head, the last two once where they are one.
    pub fn weight_bytes(&self) -> usize {
        let projections = self.blocks.iter().flat_map(|block| {
            let (attention, mlp) = (&block.attention.body, &block.mlp.body);
            [&attention.qkv, &attention.o, &mlp.gate_up, &mlp.down]
        });
        let parts: usize = projections.flat_map(|linear| &linear.parts).map(|part| part.weight.bytes()).sum();
        let head = if self.tied() { 0 } else { self.head.weight.bytes() };
        parts + self.embedding.table.bytes() + head
    }

    fn tied(&self) -> bool {
        std::ptr::addr_eq(
            std::sync::Arc::as_ptr(&self.embedding.table),
            std::sync::Arc::as_ptr(&self.head.weight),
        )
    }

    fn check(&self, ctx: &Context, tokens: &[u32]) -> Result<()> {
        if ctx.rows() == tokens.len() {
            return Ok(());
        }
        Err(Error::msg(format!(
            "{} tokens, but the sequences of the pass end at {}",
            tokens.len(),
            ctx.rows()
        )))
    }
}

impl LanguageModel for Decoder {
    type Saved = DecoderSaved;

    fn forward(&self, ctx: &Context, tokens: &[u32]) -> Result<(Tensor, DecoderSaved)> {
        self.check(ctx, tokens)?;
        let mut x = self.embedding.forward(tokens, self.dtype)?;
        let mut blocks = Vec::with_capacity(self.blocks.len());
        for (block, recompute) in self.blocks.iter().zip(&self.recompute) {
            let (y, mut saved) = block.forward(ctx, &x)?;
            if *recompute == Recompute::Offload {
                saved.tensors().into_iter().try_for_each(Tensor::offload)?;
            }
            blocks.push((x, (*recompute != Recompute::Recompute).then_some(saved)));
            x = y;
        }
        Ok((self.norm.forward(&x)?, DecoderSaved { blocks, last: x }))
    }

    fn hidden(&self, ctx: &Context, tokens: &[u32]) -> Result<Tensor> {
        self.check(ctx, tokens)?;
        let mut x = self.embedding.forward(tokens, self.dtype)?;
        for block in &self.blocks {
            x = block.forward(ctx, &x)?.0;
        }
        self.norm.forward(&x)
    }

    fn log_probs(&self, hidden: &Tensor, targets: &[u32], weights: &[f64]) -> Result<HeadPass> {
        self.head.log_probs(hidden, targets, weights)
    }

    fn head_backward(&self, hidden: &Tensor, targets: &[u32], dlogp: &[f64]) -> Result<HeadPass> {
        self.head.with_gradient(hidden, targets, dlogp)
    }

    /// Each block's saved tensors are freed as soon as its backward has read them.
    fn backward(&mut self, ctx: &Context, saved: DecoderSaved, dhidden: Tensor) -> Result<()> {
        let mut dy = self.norm.backward(&saved.last, dhidden)?;
        for (block, (x, saved)) in self.blocks.iter_mut().zip(saved.blocks).rev() {
            let saved = match saved {
                Some(mut saved) => {
                    saved.tensors().into_iter().try_for_each(Tensor::restore)?;
                    saved
                }
                None => block.recompute(ctx, &x)?,
            };
            dy = block.backward(ctx, &x, saved, dy)?;
        }
        // The embedding is frozen: dy ends here.
        Ok(())
    }

    fn parameters(&mut self) -> Vec<&mut Parameter> {
        self.blocks.iter_mut().flat_map(Layer::parameters).collect()
    }
}
