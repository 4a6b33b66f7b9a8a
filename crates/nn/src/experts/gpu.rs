//! Experts on a GPU: `kernels/experts.cu`. Tokens are brought together by expert in one matrix, in slots; each expert's
//! projections read and write its rows of that, and all else is one launch for all experts.
//!   H = pₑ·act(gate)·up,  y = Σ Hₑ·Dₑᵀ over the slots of a token:  p is inside, so that nothing of (slots, C) is kept
//!   backward, dH = dy·D:  dpₑ = Σ act(gate)·up·dH
//! How many rows each expert has is copied to the host once a layer: products need it.

use std::ops::Range;
use std::sync::Arc;

use ferrotune_tensor::{DType, Error, Gpu, Result, Tensor};

use super::Experts;
use crate::mlp::{Mlp, blocks};
use crate::{Context, Room, Weight};

/// Threads of a block of `kernels/experts.cu`.
const BLOCK: u32 = 256;
/// Tokens that a block of it routes.
const TOKENS: usize = BLOCK as usize / 32;
/// An expert's slots are a multiple of this: rows begin at good addresses, and products of few sizes are planned.
const TOGETHER: usize = 16;

/// Which tokens go where.
pub(super) struct Routed {
    /// (N, E) in f32: p; where it is normalised, 0 but for the k.
    p: Tensor,
    /// (N, k): experts of each token.
    chosen: Tensor,
    /// (N, k): their slots.
    place: Tensor,
    /// (1, slots): the token of each slot, or none.
    token: Tensor,
    /// (1, slots) in f32: p of the token and the expert.
    weight: Tensor,
    /// The slots of each expert.
    slots: Vec<Range<usize>>,
}

impl Routed {
    fn rows(&self) -> usize {
        self.slots.last().map_or(0, |it| it.end)
    }
}

/// What the backward pass reads.
pub(super) struct GpuSaved {
    routed: Routed,
    /// (slots, 2F): gate, then up; (slots, F) without a gate.
    gate_up: Tensor,
    /// (slots, F): p·act(gate)·up, where it isn't made again.
    hidden: Option<Tensor>,
}

impl GpuSaved {
    pub(super) fn tensors(&mut self) -> Vec<&mut Tensor> {
        let Routed { p, chosen, place, token, weight, slots: _ } = &mut self.routed;
        [p, chosen, place, token, weight, &mut self.gate_up].into_iter().chain(&mut self.hidden).collect()
    }
}

impl Experts {
    pub(super) fn forward_on_gpu(
        &self,
        gpu: &Arc<Gpu>,
        ctx: &Context,
        x: &Tensor,
    ) -> Result<(Tensor, GpuSaved)> {
        let mut saved = self.recompute_on_gpu(gpu, ctx, x)?;
        let hidden = self.hidden(gpu, ctx, &saved)?;
        let out = x.empty_like(hidden.rows(), x.cols())?;
        for (expert, slots) in self.experts.iter().zip(&saved.routed.slots).filter(|it| !it.1.is_empty()) {
            let (hidden, mut out) = (hidden.shared_rows(slots.clone())?, out.shared_rows(slots.clone())?);
            expert.down.forward_into(ctx, &hidden, &mut out)?;
        }
        let y = self.combine(gpu, &saved.routed, &out)?;
        saved.hidden = Some(hidden);
        Ok((y, saved))
    }

    /// Stops at gate and up.
    pub(super) fn recompute_on_gpu(&self, gpu: &Arc<Gpu>, ctx: &Context, x: &Tensor) -> Result<GpuSaved> {
        self.check()?;
        let routed = self.route_on_gpu(gpu, x)?;
        let room = self.room_of(|it| it.gate_up.room(ctx, x)); // for gate and up's gradient too, which takes their place
        let gathered = gather(gpu, &routed, x, room)?;
        let outputs = self.experts.first().map_or(0, |it| it.gate_up.rows());
        let gate_up = x.empty_like(gathered.rows(), outputs + room)?;
        for (expert, slots) in self.experts.iter().zip(&routed.slots).filter(|it| !it.1.is_empty()) {
            let (x, mut y) = (gathered.shared_rows(slots.clone())?, gate_up.shared_rows(slots.clone())?);
            expert.gate_up.forward_into(ctx, &x, &mut y)?;
        }
        Ok(GpuSaved { routed, gate_up, hidden: None })
    }

    pub(super) fn backward_on_gpu(
        &mut self,
        ctx: &Context,
        x: &Tensor,
        saved: GpuSaved,
        dy: Tensor,
    ) -> Result<Tensor> {
        let gpu = x.gpu().ok_or_else(|| Error::msg("the input of experts is not on a GPU"))?;
        let beside = saved.hidden.is_some();
        let hidden = match &saved.hidden {
            Some(_) => None,
            None => Some(self.hidden(gpu, ctx, &saved)?),
        };
        let GpuSaved { routed, gate_up, hidden: kept } = saved;
        let hidden = kept.or(hidden).ok_or_else(|| Error::msg("experts have kept nothing"))?;
        let inner = self.experts.first().map_or(0, |it| it.down.cols());
        let room = self.room_of(|it| it.down.room(ctx, x));
        let dout = gather(gpu, &routed, &dy, room)?;
        drop(dy);
        let dhidden = x.empty_like(dout.rows(), inner)?;
        for (expert, slots) in self.experts.iter_mut().zip(&routed.slots).filter(|it| !it.1.is_empty()) {
            let (hidden, dout) = (hidden.shared_rows(slots.clone())?, dout.shared_rows(slots.clone())?);
            let mut dhidden = dhidden.shared_rows(slots.clone())?;
            let holds = if beside { Room::Low } else { Room::Empty };
            expert.down.backward_into(ctx, &hidden, holds, &dout, &mut dhidden)?;
        }
        drop((hidden, dout));
        let dots = self.hidden_gradient(gpu, &routed, &gate_up, &dhidden)?;
        drop(dhidden);

        let room = self.room_of(|it| it.gate_up.room(ctx, x));
        let gathered = gather(gpu, &routed, x, room)?;
        let dgathered = x.empty_like(gathered.rows(), x.cols())?;
        for (expert, slots) in self.experts.iter_mut().zip(&routed.slots).filter(|it| !it.1.is_empty()) {
            let (x, dy) = (gathered.shared_rows(slots.clone())?, gate_up.shared_rows(slots.clone())?);
            let mut dx = dgathered.shared_rows(slots.clone())?;
            expert.gate_up.backward_into(ctx, &x, Room::Empty, &dy, &mut dx)?;
        }
        drop((gathered, gate_up));
        let mut dx = self.combine(gpu, &routed, &dgathered)?;
        drop(dgathered);

        let dscores = x.empty_like(x.rows(), self.experts.len())?;
        let launch =
            gpu.kernel("experts", "route_backward", x.dtype())?.grid(x.rows().div_ceil(TOKENS), BLOCK);
        let launch = launch.tensor(&dscores).tensor(&routed.p).tensor(&routed.chosen).tensor(&routed.place);
        let launch = launch.tensor(&dots).int(x.rows()).int(self.experts.len());
        // SAFETY: route_backward(dscores, p, chosen, place, dots, tokens, experts, k); places are slots.
        unsafe { launch.int(self.num_experts_per_tok).run() }?;
        self.router.accumulate_grad(x, &dscores, 0)?;
        self.router.backward(&dscores, 0, 1.0, &mut dx)?;
        Ok(dx)
    }

    /// All experts are of one shape, and nothing stands behind their last product that p would have to weight too.
    fn check(&self) -> Result<()> {
        let shape = |it: &Mlp| (it.gate_up.parts.len(), it.gate_up.rows(), it.down.cols(), it.activation);
        let alike = self.experts.windows(2).all(|it| shape(&it[0]) == shape(&it[1]));
        let biased = self.experts.iter().flat_map(|it| &it.down.parts).any(|it| it.bias.is_some());
        match alike && !biased {
            true => Ok(()),
            false => Err(Error::msg(
                "experts of several shapes, or with biases behind them, are not built for GPUs",
            )),
        }
    }

    /// The most room that an expert's projection wants.
    fn room_of(&self, of: impl Fn(&Mlp) -> usize) -> usize {
        self.experts.iter().map(of).max().unwrap_or(0)
    }

    fn route_on_gpu(&self, gpu: &Arc<Gpu>, x: &Tensor) -> Result<Routed> {
        let (tokens, experts, k) = (x.rows(), self.experts.len(), self.num_experts_per_tok);
        let device = x.device();
        let empty = |rows: usize, cols: usize, dtype: DType| Tensor::empty(rows, cols, dtype, &device);
        // In f32 whatever x is in: a token's experts hang on it.
        let mut p = empty(tokens, experts, DType::F32)?;
        self.router.forward(x, &mut p, 0)?;
        let chosen = empty(tokens, k, DType::U32)?;
        let launch = gpu.plain_kernel("experts", "route")?.grid(tokens.div_ceil(TOKENS), BLOCK);
        let launch = launch.tensor(&p).tensor(&chosen).int(tokens).int(experts).int(k);
        // SAFETY: route(scores, chosen, tokens, experts, k, normalised); k is at most `experts`.
        unsafe { launch.flag(self.normalised).run() }?;
        let place = empty(tokens, k, DType::U32)?;
        let most = tokens * k + experts * (TOGETHER - 1);
        let (token, weight) = (empty(1, most, DType::U32)?, empty(1, most, DType::F32)?);
        let count = empty(1, experts, DType::U32)?;
        let launch = gpu.plain_kernel("experts", "arrange")?.grid(experts, BLOCK).shared(4 * experts);
        let launch = launch.tensor(&token).tensor(&weight).tensor(&place).tensor(&count).tensor(&chosen);
        let launch = launch.tensor(&p).int(tokens).int(k).int(experts).int(TOGETHER);
        // SAFETY: arrange(token, weight, place, count, chosen, p, tokens, k, experts, together); there are no more
        // slots than room for them.
        unsafe { launch.run() }?;
        let mut end = 0;
        let count = count.to_cpu()?;
        let slots = count.values::<u32>()?.iter().map(|count| {
            let start = end;
            end += (*count as usize).next_multiple_of(TOGETHER);
            start..end
        });
        let slots = slots.collect();
        Ok(Routed { p, chosen, place, token, weight, slots })
    }

    /// p·act(gate)·up, (slots, F) with room for what reads it.
    fn hidden(&self, gpu: &Arc<Gpu>, ctx: &Context, saved: &GpuSaved) -> Result<Tensor> {
        let GpuSaved { routed, gate_up, hidden: _ } = saved;
        let Some(first) = self.experts.first() else { return Err(Error::msg("there are no experts")) };
        let (rows, inner) = (gate_up.rows(), first.down.cols());
        let room = self.room_of(|it| it.down.room(ctx, gate_up));
        let hidden = gate_up.empty_like(rows, inner + room)?;
        let launch =
            gpu.kernel("experts", "gate_forward", gate_up.dtype())?.grid(blocks(rows * inner), BLOCK);
        let launch = launch.tensor(&hidden).tensor(gate_up).tensor(&routed.weight).int(rows).int(inner);
        let launch = launch.int(hidden.cols()).int(gate_up.cols()).flag(first.gated()).flag(first.gelu());
        // SAFETY: gate_forward(hidden, gate_up, weight, slots, inner, hidden_stride, gate_up_stride, gated, kind)
        unsafe { launch.run() }?;
        Ok(hidden)
    }

    /// The gradient of gate and up, written over them; the sums that are p's gradient, (1, slots) in f32.
    fn hidden_gradient(
        &self,
        gpu: &Arc<Gpu>,
        routed: &Routed,
        gate_up: &Tensor,
        dhidden: &Tensor,
    ) -> Result<Tensor> {
        let Some(first) = self.experts.first() else { return Err(Error::msg("there are no experts")) };
        let (rows, inner) = dhidden.shape();
        let dots = Tensor::empty(1, rows, DType::F32, &gate_up.device())?;
        let launch = gpu.kernel("experts", "gate_backward", gate_up.dtype())?.grid(rows, BLOCK);
        let launch = launch.tensor(gate_up).tensor(&dots).tensor(dhidden).tensor(&routed.weight).int(inner);
        let launch = launch.int(inner).int(gate_up.cols()).flag(first.gated()).flag(first.gelu());
        // SAFETY: gate_backward(gate_up, dots, dhidden, weight, inner, hidden_stride, gate_up_stride, gated, kind);
        // a block for each slot
        unsafe { launch.run() }?;
        Ok(dots)
    }

    /// The sum of each token's slots.
    fn combine(&self, gpu: &Arc<Gpu>, routed: &Routed, x: &Tensor) -> Result<Tensor> {
        let (tokens, width) = (routed.place.rows(), x.cols());
        let y = x.empty_like(tokens, width)?;
        let launch = gpu.kernel("experts", "combine", x.dtype())?.grid(blocks(tokens * width), BLOCK);
        let launch = launch.tensor(&y).tensor(x).tensor(&routed.place).int(tokens);
        // SAFETY: combine(y, x, place, tokens, k, width); places are slots.
        unsafe { launch.int(self.num_experts_per_tok).int(width).run() }?;
        Ok(y)
    }
}

/// The row of each slot's token, and 0 where there is none; with room beside it.
fn gather(gpu: &Arc<Gpu>, routed: &Routed, x: &Tensor, room: usize) -> Result<Tensor> {
    let (rows, width) = (routed.rows(), x.cols());
    let out = x.empty_like(rows, width + room)?;
    let launch = gpu.kernel("experts", "gather", x.dtype())?.grid(blocks(rows * width), BLOCK);
    let launch = launch.tensor(&out).tensor(x).tensor(&routed.token).int(rows).int(width);
    // SAFETY: gather(out, x, token, slots, width, out_stride); tokens are rows of x.
    unsafe { launch.int(out.cols()).run() }?;
    Ok(out)
}
