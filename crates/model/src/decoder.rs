//! tokens → embedding → blocks → norm → hidden states → head.

use ferrotune_nn::{
    Context, DenseWeight, Embedding, FeedForward, Head, HeadPass, KeyValues, LanguageModel, Layer, Norm,
    Numbers, Parameter, SavedTensors, Weight, add_noise,
};
use ferrotune_tensor::{DType, Error, Result, Tensor};

use crate::block::{Block, BlockSaved, without_room};
use crate::spec::{ModelSpec, names};

/// What is kept of a block for its backward.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Recompute {
    /// All that backward reads.
    Keep,
    /// Only the block's input; the rest is computed again.
    Recompute,
    /// Only the block's input, in the host's memory until then (on a GPU; else as `Recompute`).
    Lean,
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
    /// (V, C); none where the embedding's table is the head's too.
    pub head_weight: Option<DenseWeight>,
    /// Noise on embedded tokens in training ([`add_noise`]); 0: none.
    pub neftune_noise_alpha: f64,
    /// One for each block.
    pub recompute: Vec<Recompute>,
    /// What activations are computed in: f32, or f64 to check gradients.
    pub dtype: DType,
}

/// What [`Decoder`]'s backward reads.
pub struct DecoderSaved {
    tokens: Vec<u32>,
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

    /// Logits (N, V) of hidden states.
    ///
    /// # Errors
    /// When shapes don't fit.
    pub fn logits(&self, hidden: &Tensor) -> Result<Tensor> {
        self.head.logits(self.output_weight(), hidden)
    }

    /// The head's weight (V, C): the embedding's where they are tied.
    pub(crate) fn output_weight(&self) -> &DenseWeight {
        self.head_weight.as_ref().unwrap_or(&self.embedding.table)
    }

    /// Lets projections stay in memory as a GPU's products read them ([`Linear::keep_whole`]), as many as `bytes` are
    /// enough for; the bytes that they will take in training.
    pub fn keep_whole(&mut self, bytes: u64) -> u64 {
        let (mut left, dtype) = (bytes, self.dtype);
        let ctx = Context { training: true, ..Context::new(vec![0]) };
        for block in &mut self.blocks {
            let (attention, mlp) = (&mut block.attention.body, &mut block.mlp.body);
            for linear in [&mut attention.qkv, &mut attention.o].into_iter().chain(mlp.linears_mut()) {
                let rest = linear.whole_bytes(&ctx, dtype).and_then(|taken| left.checked_sub(taken));
                linear.keep_whole(rest.is_some());
                left = rest.unwrap_or(left);
            }
        }
        bytes - left
    }

    /// Moves the embedding's table to the host, unless it is the head's too or is trained: a gigabyte of a large model,
    /// of which a batch needs a few rows. False where it stays.
    ///
    /// # Errors
    /// When the device can't be read.
    pub fn embedding_to_host(&mut self) -> Result<bool> {
        Ok(self.head_weight.is_some() && self.embedding.to_host(self.dtype)?)
    }

    /// Makes weights trained, those that are wanted by their canonical names.
    ///
    /// # Errors
    /// When one of them is quantised, or the device has no room.
    pub fn train(&mut self, spec: &ModelSpec, wanted: &dyn Fn(&str) -> bool) -> Result<()> {
        let numbers = |name: String, it: &mut Numbers| if wanted(&name) { it.train(&name) } else { Ok(()) };
        let norm = |module: String, it: Option<&mut Norm>| -> Result<()> {
            let Some(it) = it else { return Ok(()) };
            numbers(format!("{module}.weight"), &mut it.weight)?;
            it.bias.as_mut().map_or(Ok(()), |bias| numbers(format!("{module}.bias"), bias))
        };
        numbers(names::EMBEDDING.to_string(), &mut self.embedding.table.value)?;
        for (index, (block, layer)) in self.blocks.iter_mut().zip(&spec.layers).enumerate() {
            let places = layer.norms.names();
            let at = |part: Option<&str>| part.map(|part| names::module(index, part)).unwrap_or_default();
            let first = block.norm_in.as_mut().or(block.attention.norm_in.as_mut());
            norm(at(places.attention_in), first)?;
            norm(at(places.attention_out), block.attention.norm_out.as_mut())?;
            norm(at(places.mlp_in), block.mlp.norm_in.as_mut())?;
            norm(at(places.mlp_out), block.mlp.norm_out.as_mut())?;
            let (attention, mlp) = (&mut block.attention.body, &mut block.mlp.body);
            norm(names::module(index, names::Q_NORM), attention.q_norm.as_mut())?;
            norm(names::module(index, names::K_NORM), attention.k_norm.as_mut())?;
            if let FeedForward::Experts(experts) = mlp {
                numbers(names::weight(index, names::ROUTER), &mut experts.router.value)?;
            }
            for linear in [&mut attention.qkv, &mut attention.o].into_iter().chain(mlp.linears_mut()) {
                for part in &mut linear.parts {
                    let weight = format!("{}.weight", part.name);
                    if wanted(&weight) {
                        part.weight.train(&weight)?;
                    }
                    if let Some(bias) = &mut part.bias {
                        numbers(format!("{}.bias", part.name), bias)?;
                    }
                }
            }
        }
        norm(names::FINAL_NORM.trim_end_matches(".weight").to_string(), Some(&mut self.norm))?;
        let head = self.head_weight.as_mut();
        head.map_or(Ok(()), |it| numbers(names::HEAD.to_string(), &mut it.value))
    }

    /// Bytes of all weights: projections, embedding and head, the last two once where they are one.
    pub fn weight_bytes(&self) -> usize {
        let projections = self.blocks.iter().flat_map(|block| {
            let (attention, mlp) = (&block.attention.body, &block.mlp.body);
            [&attention.qkv, &attention.o].into_iter().chain(mlp.linears())
        });
        let parts: usize = projections.flat_map(|linear| &linear.parts).map(|part| part.weight.bytes()).sum();
        let head = self.head_weight.as_ref().map_or(0, Weight::bytes);
        parts + self.embedding.table.bytes() + head
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
        add_noise(ctx, self.neftune_noise_alpha, &mut x)?;
        let mut blocks = Vec::with_capacity(self.blocks.len());
        for (block, recompute) in self.blocks.iter().zip(&self.recompute) {
            let (y, mut saved) = block.forward(ctx, &x)?;
            if *recompute == Recompute::Offload {
                saved.tensors().into_iter().try_for_each(Tensor::offload)?;
            }
            if *recompute == Recompute::Lean {
                x.offload()?;
            }
            let kept = matches!(recompute, Recompute::Keep | Recompute::Offload);
            blocks.push((x, kept.then_some(saved)));
            x = y;
        }
        Ok((self.norm.forward(&x)?, DecoderSaved { tokens: tokens.to_vec(), blocks, last: x }))
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
        let weight = self.output_weight();
        self.head.log_probs(weight, hidden, targets, weights)
    }

    fn head_backward(&mut self, hidden: &Tensor, targets: &[u32], dlogp: &[f64]) -> Result<HeadPass> {
        let weight = self.head_weight.as_mut().unwrap_or(&mut self.embedding.table);
        self.head.with_gradient(weight, hidden, targets, dlogp)
    }

    /// Each block's saved tensors are freed as soon as its backward has read them.
    fn backward(&mut self, ctx: &Context, saved: DecoderSaved, dhidden: Tensor) -> Result<()> {
        let mut dy = self.norm.backward(&saved.last, dhidden)?;
        // Nothing reads a gradient below the first thing that is trained.
        let down_to_embedding = self.embedding.table.value.is_trained();
        let first = match down_to_embedding {
            true => 0,
            false => self.blocks.iter_mut().map(|it| it.parameters().is_empty()).take_while(|it| *it).count(),
        };
        let mut left = saved.blocks;
        for (index, block) in self.blocks.iter_mut().enumerate().skip(first).rev() {
            let Some((mut x, saved)) = left.pop() else { break };
            x.restore()?;
            // The input of the block below comes meanwhile.
            left.last_mut().filter(|_| index > first).map_or(Ok(()), |(x, _)| x.fetch())?;
            let saved = match saved {
                Some(mut saved) => {
                    saved.tensors().into_iter().try_for_each(Tensor::restore)?;
                    saved
                }
                None => block.recompute(ctx, &x)?,
            };
            dy = block.backward(ctx, &x, saved, dy)?;
        }
        if !down_to_embedding {
            return Ok(());
        }
        self.embedding.backward(&saved.tokens, &without_room(dy, saved.last.cols())?)
    }

    fn parameters(&mut self) -> Vec<&mut Parameter> {
        let embedding = self.embedding.table.value.parameter();
        let head = self.head_weight.as_mut().and_then(|it| it.value.parameter());
        let blocks = self.blocks.iter_mut().flat_map(Layer::parameters);
        embedding.into_iter().chain(blocks).chain(self.norm.parameters()).chain(head).collect()
    }
}
