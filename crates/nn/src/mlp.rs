//! y = down(act(gate(x)) · up(x)), or down(act(up(x))) without a gate.
//!   backward, h = act(g)·u:  dg = dh·u·act′(g),  du = dh·act(g)

use ferrotune_tensor::{Real, Result, Tensor, for_real};
use rayon::prelude::*;

use crate::lanes::{sigmoid, tanh, vectorised};
use crate::row::RowSource;
use crate::{Context, Layer, Linear, Norm, Parameter, SavedTensors};

/// Threads of a block of `kernels/activation.cu`.
const BLOCK: u32 = 256;

/// Blocks for this many outputs, which then stride.
pub(crate) fn blocks(n: usize) -> usize {
    n.div_ceil(8 * BLOCK as usize).min(8192)
}

/// What a gate is passed through.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activation {
    /// x·σ(x)
    Silu,
    /// The tanh form of GELU.
    GeluTanh,
}

impl Activation {
    /// act(x) and act′(x)
    #[inline(always)]
    fn at<T: Real>(self, x: T) -> (T, T) {
        let one = T::one();
        match self {
            Activation::Silu => {
                let s = sigmoid(x);
                (x * s, s * (one + x * (one - s)))
            }
            Activation::GeluTanh => {
                let (c, k, half) = (T::of((2.0 / std::f64::consts::PI).sqrt()), T::of(0.044715), T::of(0.5));
                let t = tanh(c * (x + k * x * x * x));
                let inner = c * (one + T::of(3.0) * k * x * x);
                (half * x * (one + t), half * (one + t) + half * x * (one - t * t) * inner)
            }
        }
    }
}

/// The feed-forward half of a block.
pub struct Mlp {
    /// Parts gate and up, or up alone.
    pub gate_up: Linear,
    /// Back to the width of the residual stream.
    pub down: Linear,
    /// What the gate (or up, without one) is passed through.
    pub activation: Activation,
}

/// What [`Mlp`]'s backward reads.
pub struct MlpSaved {
    /// (N, 2F): gate, then up; (N, F) without a gate.
    pub gate_up: Tensor,
    /// (N, R): what the adapters of gate and up made of the input, on a GPU.
    pub low: Option<Tensor>,
    /// (N, R): what `down`'s adapter made of act(gate)·up, where it isn't made again.
    pub down_low: Option<Tensor>,
}

impl SavedTensors for MlpSaved {
    fn tensors(&mut self) -> Vec<&mut Tensor> {
        [&mut self.gate_up].into_iter().chain(&mut self.low).chain(&mut self.down_low).collect()
    }
}

impl Mlp {
    pub(crate) fn gated(&self) -> bool {
        self.gate_up.parts.len() == 2
    }

    /// Whether [`Mlp::step_row`] takes such rows.
    pub fn takes_row(&self, ctx: &Context, like: &Tensor) -> bool {
        self.gate_up.takes_row(ctx, like) && self.down.takes_row(ctx, like)
    }

    /// x + scale·mlp(norm(x)) for one row on a GPU.
    ///
    /// # Errors
    /// When [`Mlp::takes_row`] says no.
    pub fn step_row(&self, ctx: &Context, x: &Tensor, norm: &Norm, scale: f64) -> Result<Tensor> {
        let gate_up = self.gate_up.row(ctx, x, RowSource::Normed(norm), None)?;
        self.down.row(ctx, &gate_up, RowSource::Activated(self), Some((x, scale)))
    }

    pub(crate) fn gelu(&self) -> bool {
        self.activation == Activation::GeluTanh
    }

    /// act(gate)·up, (N, F) with room for what reads it.
    fn hidden(&self, ctx: &Context, gate_up: &Tensor) -> Result<Tensor> {
        let (width, inner) = (gate_up.cols(), self.down.cols());
        let mut hidden = gate_up.empty_like(gate_up.rows(), inner + self.down.room(ctx, gate_up))?;
        if let Some(gpu) = gate_up.gpu() {
            let launch = gpu.kernel("activation", "gate_forward", gate_up.dtype())?;
            let launch = launch.grid(blocks(hidden.rows() * inner), BLOCK).tensor(&hidden).tensor(gate_up);
            let launch = launch.int(hidden.rows()).int(inner).int(hidden.cols()).int(width);
            let launch = launch.flag(self.gated()).flag(self.gelu());
            // SAFETY: gate_forward(hidden, gate_up, rows, inner, hidden_stride, gate_up_stride, gated, kind)
            unsafe { launch.run() }?;
            return Ok(hidden);
        }
        for_real!("mlp", gate_up.dtype(), T => {
            let rows = hidden.values_mut::<T>()?.par_chunks_mut(inner).zip(gate_up.values::<T>()?.par_chunks(width));
            rows.for_each(|(hidden, row)| {
                let (gate, up) = row.split_at(inner);
                activate::<T>(self.activation, gate, up, hidden);
            });
            Ok(())
        })?;
        Ok(hidden)
    }

    /// The gradient of gate and up, written over them; on a GPU, if `again`, act(gate)·up over its own gradient.
    fn hidden_backward(&self, gate_up: &mut Tensor, dhidden: &Tensor, again: bool) -> Result<()> {
        let (width, inner) = (gate_up.cols(), dhidden.cols());
        if let Some(gpu) = gate_up.gpu() {
            let launch = gpu.kernel("activation", "gate_backward", gate_up.dtype())?;
            let launch = launch.grid(blocks(dhidden.len()), BLOCK).tensor(gate_up).tensor(dhidden);
            let launch = launch.int(dhidden.rows()).int(inner).int(inner).int(width);
            let launch = launch.flag(self.gated()).flag(self.gelu()).flag(again);
            // SAFETY: gate_backward(gate_up, dhidden, rows, inner, dhidden_stride, gate_up_stride, gated, kind, again)
            return unsafe { launch.run() };
        }
        for_real!("mlp", gate_up.dtype(), T => {
            let rows = gate_up.values_mut::<T>()?.par_chunks_mut(width).zip(dhidden.values::<T>()?.par_chunks(inner));
            rows.for_each(|(row, dhidden)| {
                let (gate, up) = row.split_at_mut(inner);
                activate_backward::<T>(self.activation, gate, up, dhidden);
            });
            Ok(())
        })
    }
}

impl Layer for Mlp {
    type Saved = MlpSaved;

    fn forward(&self, ctx: &Context, x: &Tensor) -> Result<(Tensor, MlpSaved)> {
        let mut saved = self.recompute(ctx, x)?;
        let hidden = self.hidden(ctx, &saved.gate_up)?;
        let y = self.down.forward(ctx, &hidden)?;
        saved.down_low = self.down.low_beside(ctx, &hidden)?;
        Ok((y, saved))
    }

    fn recompute(&self, ctx: &Context, x: &Tensor) -> Result<MlpSaved> {
        let room = self.gate_up.room(ctx, x); // for its gradient, which takes its place
        let gate_up = self.gate_up.forward_with_room(ctx, x, room)?;
        Ok(MlpSaved { gate_up, low: self.gate_up.low_beside(ctx, x)?, down_low: None })
    }

    fn backward(&mut self, ctx: &Context, x: &Tensor, saved: MlpSaved, dy: Tensor) -> Result<Tensor> {
        let MlpSaved { mut gate_up, low, down_low } = saved;
        if let Some((dhidden, ahead)) = self.down.backward_ahead(ctx, down_low, &dy)? {
            self.hidden_backward(&mut gate_up, &dhidden, true)?;
            self.down.backward_after(ctx, ahead, &dhidden, &dy)?;
        } else {
            let hidden = self.hidden(ctx, &gate_up)?;
            let dhidden = self.down.backward(ctx, &hidden, &dy)?;
            drop(hidden);
            self.hidden_backward(&mut gate_up, &dhidden, false)?;
        }
        self.gate_up.backward_with_room(ctx, x, low.into(), &gate_up)
    }

    fn room(&self, ctx: &Context, like: &Tensor) -> usize {
        self.gate_up.room(ctx, like)
    }

    fn gradient_room(&self, ctx: &Context, like: &Tensor) -> usize {
        self.down.room(ctx, like)
    }

    fn parameters(&mut self) -> Vec<&mut Parameter> {
        self.gate_up.parameters().into_iter().chain(self.down.parameters()).collect()
    }
}

vectorised! {
    fn activate<T>(activation: Activation, gate: &[T], up: &[T], hidden: &mut [T]) {
        if up.is_empty() {
            for (h, g) in hidden.iter_mut().zip(gate) {
                *h = activation.at(*g).0;
            }
        } else {
            for ((h, g), u) in hidden.iter_mut().zip(gate).zip(up) {
                *h = activation.at(*g).0 * *u;
            }
        }
    }
}

vectorised! {
    fn activate_backward<T>(activation: Activation, gate: &mut [T], up: &mut [T], dhidden: &[T]) {
        if up.is_empty() {
            for (g, dh) in gate.iter_mut().zip(dhidden) {
                *g = *dh * activation.at(*g).1;
            }
        } else {
            for ((g, u), dh) in gate.iter_mut().zip(up).zip(dhidden) {
                let (act, slope) = activation.at(*g);
                (*g, *u) = (*dh * *u * slope, *dh * act);
            }
        }
    }
}
