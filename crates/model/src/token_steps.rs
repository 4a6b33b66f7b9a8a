//! Decoding on a GPU: what is launched for a token is the same for each, so it is recorded once and repeated.

use ferrotune_nn::{Context, KeyValues, RowState, Weight as _};
use ferrotune_tensor::{Error, Graph, Rehearsal, Result, Tensor};

use crate::decoder::{Decoder, KvCache};

/// Passes of one token after the other over one cache.
pub struct TokenSteps<'a> {
    model: &'a Decoder,
    cache: &'a mut KvCache,
    ctx: Context,
    /// (1, V), written by every pass.
    logits: Tensor,
    /// What the card has as the next token and its position, where the host knows them.
    there: Option<(u32, usize)>,
    pass: Pass,
}

/// How far the pass has come.
enum Pass {
    /// Nothing has run over the cache as it lies in memory now.
    Cold,
    /// It has run once, which is what recording takes.
    Warm(Rehearsal),
    /// It is recorded, over the cache as it lies in memory now.
    Recorded(Graph),
}

impl<'a> TokenSteps<'a> {
    /// Whether a model's device has kernels for all of it; else [`Decoder::step`] goes on alone.
    ///
    /// # Errors
    /// When the device has no room.
    pub fn are_for(model: &Decoder, adapters: bool) -> Result<bool> {
        let device = model.norm.weight.device();
        if device.gpu().is_none() {
            return Ok(false);
        }
        let ctx = Context { adapters, ..Context::new(vec![0, 1]) };
        let hidden = Tensor::empty(1, model.norm.weight.cols(), model.dtype, &device)?;
        let head = model.head.takes_row(model.output_weight(), &hidden);
        let table = model.embedding.table.value.gpu().is_some();
        Ok(table && head && model.blocks.iter().all(|block| block.takes_row(&ctx, &hidden)))
    }

    /// Over a cache, for a model that [`TokenSteps::are_for`].
    ///
    /// # Errors
    /// When the device has no room.
    pub fn new(model: &'a Decoder, cache: &'a mut KvCache, adapters: bool) -> Result<TokenSteps<'a>> {
        let device = model.norm.weight.device();
        let ctx = Context { adapters, row: Some(RowState::new(&device)?), ..Context::new(vec![0, 1]) };
        let logits = Tensor::empty(1, model.output_weight().rows(), model.dtype, &device)?;
        Ok(TokenSteps { model, cache, ctx, logits, there: None, pass: Pass::Cold })
    }

    /// The pass of the token that follows what the cache holds; it joins the cache.
    ///
    /// # Errors
    /// When the token is outside the vocabulary, or the device has no room.
    pub fn step(&mut self, token: u32) -> Result<()> {
        let vocab_size = self.model.embedding.table.value.rows();
        if token as usize >= vocab_size {
            return Err(Error::msg(format!("token {token} is outside the vocabulary of {vocab_size}")));
        }
        self.make_room()?;
        self.go_to(token)?;
        let pass = std::mem::replace(&mut self.pass, Pass::Cold);
        self.pass = self.run(pass)?;
        self.cache.layers_mut().for_each(KeyValues::advance);
        Ok(())
    }

    fn make_room(&mut self) -> Result<()> {
        let tokens = self.cache.len() + 1;
        let mut moved = false;
        for (block, layer) in self.model.blocks.iter().zip(self.cache.layers_mut()) {
            moved |= layer.make_room(&block.attention.body, &self.logits, tokens)?;
        }
        if moved {
            self.pass = Pass::Cold;
        }
        Ok(())
    }

    /// Tells the card the token and its position, unless it has come to them by itself.
    fn go_to(&mut self, token: u32) -> Result<()> {
        let position = self.cache.len();
        if self.there.take() != Some((token, position)) {
            let device = self.logits.device();
            let word = |value: u32| Tensor::from_vec(1, 1, vec![value])?.to_device(&device);
            let row = self.ctx.row.as_mut().ok_or_else(without_state)?;
            row.token.copy_from(&word(token)?)?;
            row.position.copy_from(&word(position as u32)?)?;
        }
        Ok(())
    }

    fn run(&mut self, pass: Pass) -> Result<Pass> {
        let gpu = self.logits.gpu().cloned().ok_or_else(without_state)?;
        let graph = match pass {
            Pass::Recorded(graph) => graph,
            Pass::Warm(rehearsal) => gpu.record(rehearsal, || self.launch())?,
            Pass::Cold if gpu.can_record() => return Ok(Pass::Warm(gpu.rehearse(|| self.launch())?)),
            Pass::Cold => {
                self.launch()?;
                return Ok(Pass::Cold);
            }
        };
        // SAFETY: model and cache are borrowed, and `make_room` sees to it that the cache lies where it did.
        unsafe { graph.launch() }?;
        Ok(Pass::Recorded(graph))
    }

    fn launch(&mut self) -> Result<()> {
        let row = self.ctx.row.as_ref().ok_or_else(without_state)?;
        let mut x = self.model.embedding.look_up(&row.token, self.model.dtype)?;
        for (block, layer) in self.model.blocks.iter().zip(self.cache.layers()) {
            x = block.step_row(&self.ctx, &x, layer)?;
        }
        let logits = self.model.head.row(self.model.output_weight(), &x, &self.model.norm)?;
        row.go_on(&logits)?;
        self.logits.copy_from(&logits)?;
        // What belongs to this pass is freed in it.
        self.ctx.shared.forget_angles();
        Ok(())
    }

    /// The most likely token after the last pass; of equals the first.
    ///
    /// # Errors
    /// When the device can't be read.
    pub fn most_likely(&mut self) -> Result<u32> {
        let token = self.ctx.row.as_ref().ok_or_else(without_state)?.token.to_cpu()?.values::<u32>()?[0];
        self.there = Some((token, self.cache.len()));
        Ok(token)
    }

    /// Logits (V) after the last pass.
    ///
    /// # Errors
    /// When the device can't be read.
    pub fn logits(&self) -> Result<Vec<f32>> {
        self.logits.to_f32()
    }
}

fn without_state() -> Error {
    Error::msg("decoding row by row without a GPU's state")
}
