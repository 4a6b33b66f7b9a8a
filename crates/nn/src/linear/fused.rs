//! On a GPU, weights and low-rank adapters of all parts as one product each way.
//!   E = [ W  B ]   (output + R, input + R); parts of W and A one below the other, blocks of B on their
//!       [ A  · ]   parts' rows and ranks, 0 beside them
//!   forward:  low = s·x·Aᵀ,   y = [x low]·[W B]ᵀ
//!   backward: dlow = s·dy·B,  dx = [dy dlow]·[W; A],  dA += dlowᵀ·x,  dB += dyᵀ·low
//! What adapters add then costs R more columns of a large product, not another pass over y and dx. The
//! tensors x and dy have room for low and dlow beside their own columns; one without is copied.

use std::ops::Range;
use std::sync::OnceLock;

use ferrotune_tensor::{DType, Error, Operand, Result, Tensor, multiply_on_gpu};

use super::thin::{Thin, ThinForward};
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

/// Where the backward pass finds what the forward pass made of an input for the adapters, low.
pub enum Room {
    /// Nowhere: it is made again.
    Empty,
    /// Beside the input, which is the same tensor.
    Low,
    /// (N, R): in a tensor of its own.
    Kept(Tensor),
}

impl From<Option<Tensor>> for Room {
    fn from(low: Option<Tensor>) -> Room {
        low.map_or(Room::Empty, Room::Kept)
    }
}

/// A [`Linear`] whose adapters are all of low rank with one scaling.
pub(super) struct Fused<'a> {
    parts: Vec<(&'a Part, Option<LowRank<'a>>)>,
    scaling: f64,
    whole: Option<&'a OnceLock<Tensor>>,
    inputs: usize,
    outputs: usize,
    /// R of all parts together, rounded up.
    room: usize,
}

/// What the backward pass leaves for the adapters' gradients.
pub(crate) struct Ahead {
    /// (N, R): low, if it was kept.
    low: Option<Tensor>,
    dy: WithLow,
}

/// The gradient of an output once dlow is beside it.
struct WithLow {
    /// (N, output + R), where the gradient itself had no room.
    copied: Option<Tensor>,
    /// Whether the pass over it that made dlow has also added to dB.
    b_added: bool,
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
    ) -> Result<Option<(Tensor, Ahead)>> {
        let Some(fused) = self.fused(ctx, dy) else { return Ok(None) };
        let dx = dy.empty_like(dy.rows(), fused.inputs)?;
        let weights = fused.weights(dy)?;
        let dy = fused.input_gradient(&weights, low.as_ref().map(|low| (low, 0)), dy, &dx)?;
        Ok(Some((dx, Ahead { low, dy })))
    }

    /// The gradients of adapters and biases.
    ///
    /// # Errors
    /// When shapes or types don't fit.
    pub(crate) fn backward_after(
        &mut self,
        ctx: &Context,
        ahead: Ahead,
        x: &Tensor,
        dy: &Tensor,
    ) -> Result<()> {
        self.add_bias_gradients(dy)?;
        if let Some(fused) = self.fused(ctx, x) {
            let low = ahead.low.map_or_else(|| fused.low(x), Ok)?;
            fused.add_gradients(x, (&low, 0), dy, &ahead.dy)?;
        }
        self.add_weight_gradients(x, dy)
    }

    pub(super) fn fused(&self, ctx: &Context, like: &Tensor) -> Option<Fused<'_>> {
        like.gpu().and_then(|_| self.fused_on_gpu(ctx))
    }

    /// As it would be with an input on a GPU.
    pub(super) fn fused_on_gpu(&self, ctx: &Context) -> Option<Fused<'_>> {
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
            if let Some(LowRank { a, b, scaling: own, .. }) = &low_rank {
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
            whole: self.whole.as_deref(),
            inputs: self.cols(),
            outputs: self.rows(),
            room: ranks.next_multiple_of(if ranks > WIDE_ALIGNMENT { WIDE_ALIGNMENT } else { ALIGNMENT }),
            parts,
        })
    }
}

impl Fused<'_> {
    /// Bytes of E.
    pub(super) fn bytes(&self, dtype: DType) -> u64 {
        ((self.outputs + self.room) * (self.inputs + self.room) * dtype.size_in_bytes()) as u64
    }

    /// E. Of one that was kept only the border is written: the rest doesn't change.
    fn weights(&self, like: &Tensor) -> Result<Tensor> {
        let (inputs, outputs, room) = (self.inputs, self.outputs, self.room);
        let shape = (outputs + room, inputs + room);
        let kept = self.whole.and_then(OnceLock::get);
        let kept = kept.filter(|it| it.shape() == shape && it.dtype() == like.dtype());
        let mut all = match kept {
            Some(kept) => kept.shared_rows(0..shape.0)?,
            None => like.empty_like(shape.0, shape.1)?,
        };
        let coded = if kept.is_some() { None } else { self.coded() };
        if kept.is_none() && coded.is_none() {
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
        if let (Some(whole), None) = (self.whole, kept) {
            let _ = whole.set(all.shared_rows(0..shape.0)?);
        }
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
        let copied = self.with_low(x, &weights)?;
        let wide = self.inputs + self.room;
        let x = Operand::columns(copied.as_ref().unwrap_or(x), 0..wide);
        let weights = Operand::block(&weights, 0..self.outputs, 0..wide);
        multiply_on_gpu(1.0, x, weights.transposed(), 0.0, y, 0..self.outputs)?;
        self.add_biases(y)
    }

    /// dx =, dA +=, dB +=
    pub(super) fn backward(&self, x: &Tensor, holds: Room, dy: &Tensor, dx: &Tensor) -> Result<()> {
        let weights = self.weights(x)?;
        let (copied, kept) = match holds {
            Room::Kept(low) => (None, Some(low)),
            Room::Low if x.cols() >= self.inputs + self.room => (None, None),
            Room::Low | Room::Empty => (self.with_low(x, &weights)?, None),
        };
        let low = kept.as_ref().map_or((copied.as_ref().unwrap_or(x), self.inputs), |low| (low, 0));
        let with_low = self.input_gradient(&weights, Some(low), dy, dx)?;
        self.add_gradients(x, low, dy, &with_low)
    }

    /// dx =, dlow = beside dy; dB += if low (a tensor and its first column) is there and one pass can do both.
    fn input_gradient(
        &self,
        weights: &Tensor,
        low: Option<(&Tensor, usize)>,
        dy: &Tensor,
        dx: &Tensor,
    ) -> Result<WithLow> {
        let (inputs, outputs, room) = (self.inputs, self.outputs, self.room);
        let copied = with_room(dy, outputs, room)?;
        let wide = copied.as_ref().unwrap_or(dy);
        let b_added = match low {
            None => false,
            Some(low) => {
                let (parts, b_gradients) = (self.sizes(), self.b_gradients());
                let weights = (weights, inputs);
                Thin { parts, scaling: self.scaling, dy: wide, weights, low, b_gradients }.run()?
            }
        };
        if !b_added {
            let b = Operand::block(weights, 0..outputs, inputs..inputs + room);
            let own = Operand::columns(wide, 0..outputs);
            multiply_on_gpu(self.scaling, own, b, 0.0, wide, outputs..outputs + room)?;
        }
        let dy = Operand::columns(wide, 0..outputs + room);
        multiply_on_gpu(1.0, dy, Operand::columns(weights, 0..inputs), 0.0, dx, 0..inputs)?;
        Ok(WithLow { copied, b_added })
    }

    /// dA += dlowᵀ·x,  dB += dyᵀ·low unless that is done
    fn add_gradients(
        &self,
        x: &Tensor,
        (low, first): (&Tensor, usize),
        dy: &Tensor,
        with_low: &WithLow,
    ) -> Result<()> {
        let (mut row, mut rank) = (0, 0);
        let mut a_gradients = Vec::with_capacity(self.parts.len());
        for (part, low_rank) in &self.parts {
            let rows = part.weight.rows();
            if let Some(LowRank { a, b_gradient, a_gradient, .. }) = low_rank {
                let ranks = first + rank..first + rank + a.rows();
                if !with_low.b_added {
                    let dy = Operand::columns(dy, row..row + rows).transposed();
                    multiply_on_gpu(1.0, dy, Operand::columns(low, ranks), 1.0, b_gradient, 0..a.rows())?;
                }
                rank += a.rows();
                a_gradients.push(*a_gradient);
            }
            row += rows;
        }
        let dlow = with_low.copied.as_ref().unwrap_or(dy);
        let dlow = Operand::columns(dlow, self.outputs..self.outputs + rank).transposed();
        let own = Operand::columns(x, 0..self.inputs);
        if let [a] = a_gradients[..] {
            return multiply_on_gpu(1.0, dlow, own, 1.0, a, 0..self.inputs);
        }
        // x is read once for all parts.
        let sum = Tensor::empty(rank, self.inputs, DType::F32, &x.device())?;
        multiply_on_gpu(1.0, dlow, own, 0.0, &sum, 0..self.inputs)?;
        let gpu = x.gpu().ok_or_else(|| Error::msg("the gradients are not on a GPU"))?;
        let part = |i: usize| a_gradients.get(i).copied();
        let launch =
            gpu.plain_kernel("low_rank", "low_rank_add")?.grid(sum.len().div_ceil(BLOCK as usize), BLOCK);
        let launch = (0..PARTS).fold(launch, |it, i| it.optional(part(i))).tensor(&sum);
        let launch = (0..PARTS).fold(launch, |it, i| it.int(part(i).map_or(0, Tensor::rows)));
        // SAFETY: low_rank_add(da0 … da2, sum, rank0 … rank2, inputs)
        unsafe { launch.int(self.inputs).run() }
    }

    /// Rows and rank of each part.
    fn sizes(&self) -> [(usize, usize); PARTS] {
        std::array::from_fn(|i| {
            self.parts.get(i).map_or((0, 0), |(part, low_rank)| {
                (part.weight.rows(), low_rank.as_ref().map_or(0, |it| it.a.rows()))
            })
        })
    }

    fn b_gradients(&self) -> [Option<&Tensor>; PARTS] {
        std::array::from_fn(|i| self.parts.get(i).and_then(|it| Some(it.1.as_ref()?.b_gradient)))
    }

    /// low (N, R), by itself.
    fn low(&self, x: &Tensor) -> Result<Tensor> {
        let (low, mut first) = (x.empty_like(x.rows(), self.room)?, 0);
        for LowRank { a, .. } in self.parts.iter().filter_map(|(_, low_rank)| low_rank.as_ref()) {
            self.low_of(x, (a, 0..a.rows()), (&low, first))?;
            first += a.rows();
        }
        Ok(low)
    }

    /// low of some rows of A, from some column of a matrix on.
    fn low_of(
        &self,
        x: &Tensor,
        (a, rows): (&Tensor, Range<usize>),
        (low, first): (&Tensor, usize),
    ) -> Result<()> {
        let (inputs, rank, scaling) = (self.inputs, rows.len(), self.scaling);
        if (ThinForward { scaling, x, inputs, a: (a, rows.start), low: (low, first), rank }).run()? {
            return Ok(());
        }
        let a = Operand::block(a, rows, 0..inputs).transposed();
        multiply_on_gpu(scaling, Operand::columns(x, 0..inputs), a, 0.0, low, first..first + rank)
    }

    /// Writes low beside x; the copy of x, where it had no room.
    fn with_low(&self, x: &Tensor, weights: &Tensor) -> Result<Option<Tensor>> {
        let (inputs, room) = (self.inputs, self.room);
        let copied = with_room(x, inputs, room)?;
        let wide = copied.as_ref().unwrap_or(x);
        self.low_of(wide, (weights, self.outputs..self.outputs + room), (wide, inputs))?;
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

/// A copy with room, unless the tensor has it.
fn with_room(x: &Tensor, own: usize, room: usize) -> Result<Option<Tensor>> {
    if x.cols() >= own + room {
        return Ok(None);
    }
    let mut wide = x.empty_like(x.rows(), own + room)?;
    wide.write_block((0, 0), x, (0..x.rows(), 0..own))?;
    Ok(Some(wide))
}
