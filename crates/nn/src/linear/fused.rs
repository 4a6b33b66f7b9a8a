//! On a GPU, weights and low-rank adapters of all parts as one product each way.
//!   E = [ W  B ]   (output + R, input + R); parts of W and A one below the other, blocks of B on their
//!       [ A  · ]   parts' rows and ranks, 0 beside them
//!   forward:  low = s·x·Aᵀ,   y = [x low]·[W B]ᵀ
//!   backward: dlow = s·dy·B,  dx = [dy dlow]·[W; A],  dA += dlowᵀ·x,  dB += dyᵀ·low
//! What adapters add then costs R more columns of a large product, not another pass over y and dx. The
//! tensors x and dy have room for low and dlow beside their own columns; one without is copied.

use ferrotune_tensor::{DType, Error, Operand, Result, Tensor, multiply, multiply_on_gpu};

use super::thin::{self, Shares, Thin};
use super::{Linear, LowRank, Part, add_bias};
use crate::{Coded, Context, StoredRows};

/// Widths are kept multiples of this, so that rows begin at addresses that are read fastest.
const ALIGNMENT: usize = 8;
/// Larger widths than this are multiples of it: cuBLASLt takes longer for 48 columns than for 64.
const WIDE_ALIGNMENT: usize = 32;
/// Threads of a block of `kernels/low_rank.cu`, and the numbers that one writes of the border, and of codes.
const BLOCK: u32 = 256;
const BORDER_PIECE: usize = 2048;
const CODED_PIECE: usize = 8192;
/// Parts that `kernels/low_rank.cu` takes: q, k and v.
pub(super) const PARTS: usize = 3;

/// What the columns beside an input hold when the backward pass reads it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Room {
    /// Nothing in particular.
    Empty,
    /// What the forward pass wrote there: it is the same tensor.
    Low,
}

/// A [`Linear`] whose adapters are all of low rank with one scaling.
pub(super) struct Fused<'a> {
    parts: Vec<(&'a Part, Option<LowRank<'a>>)>,
    scaling: f64,
    inputs: usize,
    outputs: usize,
    /// R of all parts together, rounded up.
    room: usize,
}

/// What the backward pass leaves for the adapters' gradients.
pub(crate) struct Low {
    /// (N, input + R): x where it had no room, and low.
    x: Option<Tensor>,
    /// (N, R): low, where it isn't beside x.
    low: Option<Tensor>,
    /// (N, output + R): dy where it had no room, and dlow.
    dy: Option<Tensor>,
    /// dB, where one pass over dy has made it together with dlow.
    shares: Option<Shares>,
    inputs: usize,
    outputs: usize,
}

impl Linear {
    /// Columns that this layer's input and its output's gradient should have beside their own.
    pub fn room(&self, ctx: &Context, like: &Tensor) -> usize {
        self.fused(ctx, like).map_or(0, |fused| fused.room)
    }

    /// A copy of what the forward pass has written beside this input.
    ///
    /// # Errors
    /// When there is no room.
    pub(crate) fn low_beside(&self, ctx: &Context, x: &Tensor) -> Result<Option<Tensor>> {
        let (inputs, room) = (self.cols(), self.room(ctx, x));
        if room == 0 || x.cols() < inputs + room {
            return Ok(None);
        }
        let mut low = x.empty_like(x.rows(), room)?;
        low.write_block((0, 0), x, (0..x.rows(), inputs..inputs + room))?;
        Ok(Some(low))
    }

    /// dx (N, input) before x itself is there, and what [`Linear::backward_after`] then does with it; none where weights and
    /// adapters are not one product. `low` is what the forward pass made of x, if that was kept.
    ///
    /// # Errors
    /// When shapes or types don't fit.
    pub(crate) fn backward_ahead(
        &self,
        ctx: &Context,
        low: Option<Tensor>,
        dy: &Tensor,
    ) -> Result<Option<(Tensor, Low)>> {
        let Some(fused) = self.fused(ctx, dy) else { return Ok(None) };
        let dx = dy.empty_like(dy.rows(), fused.inputs)?;
        let weights = fused.weights(dy)?;
        let (dy, shares) = fused.input_gradient(&weights, low.as_ref().map(|low| (low, 0)), dy, &dx)?;
        let (inputs, outputs) = (fused.inputs, fused.outputs);
        Ok(Some((dx, Low { x: None, low, dy, shares, inputs, outputs })))
    }

    /// The gradients of adapters and biases.
    ///
    /// # Errors
    /// When shapes or types don't fit.
    pub(crate) fn backward_after(
        &mut self,
        ctx: &Context,
        mut ahead: Low,
        x: &Tensor,
        dy: &Tensor,
    ) -> Result<()> {
        self.add_bias_gradients(dy)?;
        if let (None, Some(fused)) = (&ahead.low, self.fused(ctx, x)) {
            ahead.low = Some(fused.low(x)?);
        }
        ahead.add_gradients(&mut self.parts, x, dy)
    }

    pub(super) fn fused(&self, ctx: &Context, like: &Tensor) -> Option<Fused<'_>> {
        like.gpu()?;
        if self.parts.len() > PARTS {
            return None;
        }
        let mut scaling = None;
        let mut parts = Vec::with_capacity(self.parts.len());
        for part in &self.parts {
            let low_rank = match &part.adapter {
                Some(adapter) if ctx.adapters => Some(adapter.low_rank(ctx)?),
                _ => None,
            };
            if let Some(LowRank { a, b, scaling: own }) = &low_rank {
                let rank = a.rows();
                let fits = (a.shape(), b.shape()) == ((rank, self.cols()), (part.weight.rows(), rank));
                if !fits || *scaling.get_or_insert(*own) != *own {
                    return None;
                }
            }
            parts.push((part, low_rank));
        }
        let ranks: usize = parts.iter().filter_map(|(_, low_rank)| Some(low_rank.as_ref()?.a.rows())).sum();
        // Without adapters there is nothing to fuse: weights are multiplied where they are.
        (ranks > 0).then(|| Fused {
            scaling: scaling.unwrap_or(0.0),
            inputs: self.cols(),
            outputs: self.rows(),
            room: ranks.next_multiple_of(if ranks > WIDE_ALIGNMENT { WIDE_ALIGNMENT } else { ALIGNMENT }),
            parts,
        })
    }
}

impl Fused<'_> {
    /// E
    fn weights(&self, like: &Tensor) -> Result<Tensor> {
        let (inputs, outputs, room) = (self.inputs, self.outputs, self.room);
        let mut all = like.empty_like(outputs + room, inputs + room)?;
        let coded = self.coded();
        if coded.is_none() {
            let mut row = 0;
            for (part, _) in &self.parts {
                part.weight.write_dense(&mut all, row)?;
                row += part.weight.rows();
            }
        }
        let gpu = all.gpu().ok_or_else(|| Error::msg("the weights are not on a GPU"))?;
        let low_rank = |i: usize| self.parts.get(i).and_then(|(_, low_rank)| low_rank.as_ref());
        let rows = |i: usize| self.parts.get(i).map_or(0, |it| it.0.weight.rows());
        let border = ((inputs + outputs) * room).div_ceil(BORDER_PIECE);
        let (name, blocks) = match &coded {
            Some(_) => ("low_rank_coded", (0..PARTS).map(|i| (rows(i) * inputs).div_ceil(CODED_PIECE)).sum()),
            None => ("low_rank_border", 0),
        };
        let mut launch = gpu.kernel("low_rank", name, all.dtype())?.grid(border + blocks, BLOCK).tensor(&all);
        launch = (0..PARTS).fold(launch, |it, i| it.optional(low_rank(i).map(|it| it.a)));
        launch = (0..PARTS).fold(launch, |it, i| it.optional(low_rank(i).map(|it| it.b)));
        launch = (0..PARTS).fold(launch, |it, i| it.int(rows(i)));
        launch = (0..PARTS).fold(launch, |it, i| it.int(low_rank(i).map_or(0, |it| it.a.rows())));
        launch = launch.int(inputs).int(outputs).int(room);
        if let Some(parts) = coded {
            launch = launch.int(border).int(Coded::round_to(parts[0].dtype)).tensor(parts[0].tables);
            launch = (0..PARTS).fold(launch, |it, i| it.optional(parts.get(i).map(|it| it.codes)));
            launch = (0..PARTS).fold(launch, |it, i| it.optional(parts.get(i).map(|it| it.absmax)));
            let nested = |i: usize| parts.get(i).and_then(|it| it.nested);
            launch = (0..PARTS).fold(launch, |it, i| it.optional(nested(i).map(|it| it.0)));
            launch = (0..PARTS).fold(launch, |it, i| it.optional(nested(i).map(|it| it.1)));
        }
        // SAFETY: low_rank_border(e, a0 … a2, b0 … b2, rows0 … rows2, rank0 … rank2, inputs, outputs, room), and
        // low_rank_coded, which goes on with border_blocks, round_to, tables, codes0 …, absmax0 …, nested0 …,
        // offset0 …; `fused` has seen that there are no more parts and that the shapes fit.
        unsafe { launch.run() }?;
        Ok(all)
    }

    /// The weights, where all are in codes of one kind: then one launch writes them and what is beside them.
    fn coded(&self) -> Option<Vec<Coded<'_>>> {
        let mut parts = Vec::with_capacity(self.parts.len());
        for (part, _) in &self.parts {
            let Some(StoredRows::Coded(coded)) = part.weight.stored_rows() else { return None };
            parts.push(coded);
        }
        let first = parts.first()?.dtype;
        parts.iter().all(|it| it.dtype == first).then_some(parts)
    }

    /// The first columns of y.
    pub(super) fn forward(&self, x: &Tensor, y: &mut Tensor) -> Result<()> {
        let weights = self.weights(x)?;
        let copied = self.with_low(x, Room::Empty, &weights)?;
        let wide = self.inputs + self.room;
        let x = Operand::columns(copied.as_ref().unwrap_or(x), 0..wide);
        let weights = Operand::block(&weights, 0..self.outputs, 0..wide);
        multiply_on_gpu(1.0, x, weights.transposed(), 0.0, y, 0..self.outputs)?;
        self.add_biases(y)
    }

    /// dx =, and what the gradients of the adapters are made of.
    pub(super) fn backward(&self, x: &Tensor, holds: Room, dy: &Tensor, dx: &Tensor) -> Result<Low> {
        let weights = self.weights(x)?;
        let copied = self.with_low(x, holds, &weights)?;
        let low = (copied.as_ref().unwrap_or(x), self.inputs);
        let (dy, shares) = self.input_gradient(&weights, Some(low), dy, dx)?;
        Ok(Low { x: copied, low: None, dy, shares, inputs: self.inputs, outputs: self.outputs })
    }

    /// dx =, dlow = beside dy; the copy of dy, where it had no room, and dB, if low (a tensor and its first column) is there.
    fn input_gradient(
        &self,
        weights: &Tensor,
        low: Option<(&Tensor, usize)>,
        dy: &Tensor,
        dx: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Shares>)> {
        let (inputs, outputs, room) = (self.inputs, self.outputs, self.room);
        let copied = with_room(dy, outputs, room)?;
        let wide = copied.as_ref().unwrap_or(dy);
        let one_pass = |low| {
            Thin { parts: self.sizes(), scaling: self.scaling, dy: wide, weights: (weights, inputs), low }
                .run()
        };
        let shares = low.map(one_pass).transpose()?.flatten();
        if shares.is_none() {
            let b = Operand::block(weights, 0..outputs, inputs..inputs + room);
            let own = Operand::columns(wide, 0..outputs);
            multiply_on_gpu(self.scaling, own, b, 0.0, wide, outputs..outputs + room)?;
        }
        let dy = Operand::columns(wide, 0..outputs + room);
        multiply_on_gpu(1.0, dy, Operand::columns(weights, 0..inputs), 0.0, dx, 0..inputs)?;
        Ok((copied, shares))
    }

    fn sizes(&self) -> thin::Parts {
        std::array::from_fn(|i| {
            self.parts.get(i).map_or((0, 0), |(part, low_rank)| {
                (part.weight.rows(), low_rank.as_ref().map_or(0, |it| it.a.rows()))
            })
        })
    }

    /// low (N, R), by itself.
    fn low(&self, x: &Tensor) -> Result<Tensor> {
        let (low, mut rank) = (x.empty_like(x.rows(), self.room)?, 0);
        for LowRank { a, .. } in self.parts.iter().filter_map(|(_, low_rank)| low_rank.as_ref()) {
            let own = Operand::columns(x, 0..self.inputs);
            multiply_on_gpu(
                self.scaling,
                own,
                Operand::new(a).transposed(),
                0.0,
                &low,
                rank..rank + a.rows(),
            )?;
            rank += a.rows();
        }
        Ok(low)
    }

    /// Writes low beside x, unless it is there; the copy of x, where it had no room.
    fn with_low(&self, x: &Tensor, holds: Room, weights: &Tensor) -> Result<Option<Tensor>> {
        let (inputs, room) = (self.inputs, self.room);
        let copied = with_room(x, inputs, room)?;
        if holds == Room::Empty || copied.is_some() {
            let a = Operand::block(weights, self.outputs..self.outputs + room, 0..inputs);
            let wide = copied.as_ref().unwrap_or(x);
            let x = Operand::columns(wide, 0..inputs);
            multiply_on_gpu(self.scaling, x, a.transposed(), 0.0, wide, inputs..inputs + room)?;
        }
        Ok(copied)
    }

    fn add_biases(&self, y: &mut Tensor) -> Result<()> {
        let mut at = 0;
        for (part, _) in &self.parts {
            if let Some(bias) = &part.bias {
                add_bias(bias, y, at)?;
            }
            at += part.weight.rows();
        }
        Ok(())
    }
}

impl Low {
    /// dA += dlowᵀ·x,  dB += dyᵀ·low
    pub(super) fn add_gradients(&self, parts: &mut [Part], x: &Tensor, dy: &Tensor) -> Result<()> {
        let (x, dy) = (self.x.as_ref().unwrap_or(x), self.dy.as_ref().unwrap_or(dy));
        let (low, first) = self.low.as_ref().map_or((x, self.inputs), |low| (low, 0));
        let (mut row, mut rank) = (0, 0);
        let mut a_gradients = Vec::with_capacity(parts.len());
        let mut b_gradients = [None; PARTS];
        for (part, b_gradient) in parts.iter_mut().zip(&mut b_gradients) {
            let rows = part.weight.rows();
            part.weight.accumulate_grad(x, dy, row)?;
            if let Some((a, b)) = part.adapter.as_mut().and_then(|it| it.low_rank_gradients()) {
                if self.shares.is_none() {
                    let dy = Operand::columns(dy, row..row + rows).transposed();
                    let low = Operand::columns(low, first + rank..first + rank + a.rows());
                    multiply(Default::default(), 1.0, dy, low, 1.0, b, 0..a.rows())?;
                }
                *b_gradient = Some(&*b);
                rank += a.rows();
                a_gradients.push(a);
            }
            row += rows;
        }
        if let Some(shares) = &self.shares {
            shares.add_to(b_gradients)?;
        }
        let dlow = Operand::columns(dy, self.outputs..self.outputs + rank).transposed();
        let own = Operand::columns(x, 0..self.inputs);
        if let [a] = &mut a_gradients[..] {
            return multiply(Default::default(), 1.0, dlow, own, 1.0, a, 0..self.inputs);
        }
        // x is read once for all parts.
        let mut sum = Tensor::empty(rank, self.inputs, DType::F32, &x.device())?;
        multiply(Default::default(), 1.0, dlow, own, 0.0, &mut sum, 0..self.inputs)?;
        let gpu = x.gpu().ok_or_else(|| Error::msg("the gradients are not on a GPU"))?;
        let part = |i: usize| a_gradients.get(i).map(|it| &**it);
        let launch =
            gpu.plain_kernel("low_rank", "low_rank_add")?.grid(sum.len().div_ceil(BLOCK as usize), BLOCK);
        let launch = (0..PARTS).fold(launch, |it, i| it.optional(part(i))).tensor(&sum);
        let launch = (0..PARTS).fold(launch, |it, i| it.int(part(i).map_or(0, Tensor::rows)));
        // SAFETY: low_rank_add(da0 … da2, sum, rank0 … rank2, inputs)
        unsafe { launch.int(self.inputs).run() }
    }
}

/// A copy with room, unless the tensor has it.
fn with_room(x: &Tensor, own: usize, room: usize) -> Result<Option<Tensor>> {
    if x.cols() >= own + room {
        return Ok(None);
    }
    let mut wide = x.empty_like(x.rows(), own + room)?;
    wide.write_block((0, 0), x, (0..x.rows(), 0..own))?;
    Ok(Some(wide))
}
