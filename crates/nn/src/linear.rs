//! y = x·Wᵀ + adapter + bias, for several W that read the same x.
//!
//! Projections that read the same input are parts of one `Linear` (q, k, v; gate, up): their outputs
//! stand side by side in one tensor, and each part keeps its own name, weight, adapter and bias.

mod fused;
mod thin;

pub use fused::Room;

use std::sync::OnceLock;

use ferrotune_tensor::{DType, Real, Result, Tensor, for_real};
use rayon::prelude::*;

use crate::numbers::{add_column_sums, on_host};
use crate::{Context, Numbers, Parameter, Weight};

/// A trained change of a weight.
pub trait Adapter: Send + Sync {
    /// `y[:, at..] = ` the adapted product, which calls the weight's own.
    ///
    /// # Errors
    /// When shapes or types don't fit.
    fn forward(
        &self,
        ctx: &Context,
        x: &Tensor,
        weight: &dyn Weight,
        y: &mut Tensor,
        at: usize,
    ) -> Result<()>;

    /// `dx = ` the gradient through weight and adapter `+ beta·dx`; adds to the adapter's gradients.
    ///
    /// # Errors
    /// When shapes or types don't fit.
    #[expect(clippy::too_many_arguments, reason = "the operands of one product and where they stand")]
    fn backward(
        &mut self,
        ctx: &Context,
        x: &Tensor,
        weight: &dyn Weight,
        dy: &Tensor,
        at: usize,
        beta: f64,
        dx: &mut Tensor,
    ) -> Result<()>;

    /// The trained tensors, in a fixed order.
    fn parameters(&mut self) -> Vec<&mut Parameter>;

    /// The adapted weight as W + scaling·B·A, where it is no more than that in this pass: then a GPU
    /// computes it together with the weight's own product.
    fn low_rank(&self, _ctx: &Context) -> Option<LowRank<'_>> {
        None
    }

    /// The adapted weight as f32 numbers (output, input).
    ///
    /// # Errors
    /// When there is no room.
    fn merged(&self, weight: &dyn Weight) -> Result<Tensor>;
}

/// W + scaling·B·A, the numbers in the type of activations.
pub struct LowRank<'a> {
    /// A (R, input)
    pub a: &'a Tensor,
    /// B (output, R)
    pub b: &'a Tensor,
    /// What B·A is multiplied by.
    pub scaling: f64,
    /// (R, input), f32; kernels add to it.
    pub a_gradient: &'a Tensor,
    /// (output, R), f32; kernels add to it.
    pub b_gradient: &'a Tensor,
}

/// One projection of a [`Linear`].
pub struct Part {
    /// Canonical name, such as `model.layers.0.self_attn.q_proj`.
    pub name: String,
    /// (output, input), frozen or trained.
    pub weight: Box<dyn Weight>,
    /// (1, output), f32.
    pub bias: Option<Numbers>,
    /// The trained change, if there is one.
    pub adapter: Option<Box<dyn Adapter>>,
}

impl Part {
    fn parameters(&mut self) -> Vec<&mut Parameter> {
        let adapter = self.adapter.iter_mut().flat_map(|it| it.parameters());
        let bias = self.bias.iter_mut().filter_map(Numbers::parameter);
        self.weight.parameters().into_iter().chain(bias).chain(adapter).collect()
    }
}

/// Projections side by side.
pub struct Linear {
    /// In the order of their columns in the output.
    pub parts: Vec<Part>,
    /// Weights and adapters as a GPU's products read them (`fused.rs`), from one pass to the next.
    whole: Option<Box<OnceLock<Tensor>>>,
}

impl Linear {
    /// Of projections that read the same input.
    pub fn new(parts: Vec<Part>) -> Linear {
        Linear { parts, whole: None }
    }

    /// Whether weights and adapters stay in memory as a GPU's products read them. Else they are laid out so for each
    /// pass, for which weights in codes are dequantised. Weights that are trained when this is called never stay.
    pub fn keep_whole(&mut self, keep: bool) {
        let frozen = self.parts.iter_mut().all(|it| it.weight.parameters().is_empty());
        self.whole = (keep && frozen).then(Box::default);
    }

    /// Bytes that [`Linear::keep_whole`] takes on a GPU, for activations of this type; none where it keeps nothing in such a
    /// pass: without adapters, or where they are more than low-rank products.
    pub fn whole_bytes(&self, ctx: &Context, dtype: DType) -> Option<u64> {
        self.fused_on_gpu(ctx).map(|fused| fused.bytes(dtype))
    }

    /// Output features of all parts.
    pub fn rows(&self) -> usize {
        self.parts.iter().map(|part| part.weight.rows()).sum()
    }

    /// Input features.
    pub fn cols(&self) -> usize {
        self.parts.first().map_or(0, |part| part.weight.cols())
    }

    /// (N, input) → (N, output). The input may have [`Linear::room`] beside its own columns, the output
    /// may be asked to have `room` for its gradient.
    ///
    /// # Errors
    /// When shapes or types don't fit.
    pub fn forward_with_room(&self, ctx: &Context, x: &Tensor, room: usize) -> Result<Tensor> {
        let mut y = x.empty_like(x.rows(), self.rows() + room)?;
        self.forward_into(ctx, x, &mut y)?;
        Ok(y)
    }

    /// (N, input) → (N, output)
    ///
    /// # Errors
    /// When shapes or types don't fit.
    pub fn forward(&self, ctx: &Context, x: &Tensor) -> Result<Tensor> {
        self.forward_with_room(ctx, x, 0)
    }

    /// The same into the first columns of y.
    pub(crate) fn forward_into(&self, ctx: &Context, x: &Tensor, y: &mut Tensor) -> Result<()> {
        if let Some(fused) = self.fused(ctx, x) {
            return fused.forward(x, y);
        }
        let own = self.without_room(x)?;
        let x = own.as_ref().unwrap_or(x);
        let mut at = 0;
        for part in &self.parts {
            match &part.adapter {
                Some(adapter) if ctx.adapters => adapter.forward(ctx, x, part.weight.as_ref(), y, at)?,
                _ => part.weight.forward(x, y, at)?,
            }
            if let Some(bias) = &part.bias {
                add_bias(bias, y, at)?;
            }
            at += part.weight.rows();
        }
        Ok(())
    }

    /// dx (N, input). Nothing is saved: the caller keeps x once, for every `Linear` that reads it.
    ///
    /// # Errors
    /// When shapes or types don't fit.
    pub fn backward(&mut self, ctx: &Context, x: &Tensor, dy: &Tensor) -> Result<Tensor> {
        self.backward_with_room(ctx, x, Room::Empty, dy)
    }

    /// The same, for an input that may still hold what the forward pass wrote beside it.
    ///
    /// # Errors
    /// When shapes or types don't fit.
    pub fn backward_with_room(
        &mut self,
        ctx: &Context,
        x: &Tensor,
        holds: Room,
        dy: &Tensor,
    ) -> Result<Tensor> {
        let mut dx = x.empty_like(x.rows(), self.cols())?;
        self.backward_into(ctx, x, holds, dy, &mut dx)?;
        Ok(dx)
    }

    /// The same into dx (N, input).
    pub(crate) fn backward_into(
        &mut self,
        ctx: &Context,
        x: &Tensor,
        holds: Room,
        dy: &Tensor,
        dx: &mut Tensor,
    ) -> Result<()> {
        self.add_bias_gradients(dy)?;
        if let Some(fused) = self.fused(ctx, x) {
            fused.backward(x, holds, dy, dx)?;
            return self.add_weight_gradients(x, dy);
        }
        let own = self.without_room(x)?;
        let x = own.as_ref().unwrap_or(x);
        let mut at = 0;
        for part in &mut self.parts {
            let beta = if at == 0 { 0.0 } else { 1.0 };
            let weight = part.weight.as_ref();
            match &mut part.adapter {
                Some(adapter) if ctx.adapters => adapter.backward(ctx, x, weight, dy, at, beta, dx)?,
                _ => weight.backward(dy, at, beta, dx)?,
            }
            part.weight.accumulate_grad(x, dy, at)?;
            at += part.weight.rows();
        }
        Ok(())
    }

    /// A copy of an input on a GPU that has room which nothing here fills.
    fn without_room(&self, x: &Tensor) -> Result<Option<Tensor>> {
        if x.gpu().is_none() || x.cols() <= self.cols() {
            return Ok(None);
        }
        let mut own = x.empty_like(x.rows(), self.cols())?;
        own.write_block((0, 0), x, (0..x.rows(), 0..self.cols()))?;
        Ok(Some(own))
    }

    /// dW += dyᵀ·x
    fn add_weight_gradients(&mut self, x: &Tensor, dy: &Tensor) -> Result<()> {
        let mut at = 0;
        for part in &mut self.parts {
            part.weight.accumulate_grad(x, dy, at)?;
            at += part.weight.rows();
        }
        Ok(())
    }

    /// dbias += Σ dy
    fn add_bias_gradients(&mut self, dy: &Tensor) -> Result<()> {
        if !self.parts.iter().any(|it| it.bias.as_ref().is_some_and(Numbers::is_trained)) {
            return Ok(());
        }
        let (dy_here, stride, mut at) = (on_host(dy)?, dy.cols(), 0);
        for part in &mut self.parts {
            let rows = part.weight.rows();
            if let Some(grad) = part.bias.as_mut().and_then(Numbers::grad_mut) {
                add_column_sums(grad, dy.rows(), |row, sum| {
                    let dy = &dy_here[row * stride + at..][..rows];
                    sum.iter_mut().zip(dy).for_each(|(sum, dy)| *sum += dy);
                })?;
            }
            at += rows;
        }
        Ok(())
    }

    /// The trained tensors of all parts.
    pub fn parameters(&mut self) -> Vec<&mut Parameter> {
        self.parts.iter_mut().flat_map(Part::parameters).collect()
    }
}

fn add_bias(bias: &Tensor, y: &mut Tensor, at: usize) -> Result<()> {
    if let Some(gpu) = y.gpu() {
        let n = y.rows() * bias.cols();
        let launch = gpu.kernel("elementwise", "add_bias", y.dtype())?.grid(n.div_ceil(1024).min(4096), 256);
        let launch = launch.tensor_at(y, at).tensor(bias).int(y.rows()).int(bias.cols()).int(y.cols());
        // SAFETY: add_bias(y, bias, rows, cols, stride)
        return unsafe { launch.run() };
    }
    let (width, bias) = (y.cols(), bias.values::<f32>()?);
    for_real!("bias", y.dtype(), T => {
        y.values_mut::<T>()?.par_chunks_mut(width).for_each(|row| {
            row[at..].iter_mut().zip(bias).for_each(|(y, b)| *y += T::of(f64::from(*b)));
        });
        Ok(())
    })
}
