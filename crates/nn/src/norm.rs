//! RMSNorm:   y = x·r·w,            r = 1/√(mean(x²) + ε)
//!   backward dx = r·(g − x̂·mean(g·x̂)),  x̂ = x·r,  g = dy·w
//! LayerNorm is the same with x − mean(x) for x, and g − mean(g) for the first g.
//! Where they are trained, dw = Σ dy·x̂ and dbias = Σ dy. A weight narrower than a row norms each group of it by itself (Qwen3's q and k).
//! Zhang and Sennrich 2019, "Root Mean Square Layer Normalization".

use ferrotune_tensor::{Error, Gpu, Launch, Real, Result, Tensor, for_real};
use rayon::prelude::*;

use crate::lanes::{sum_of, sum_of_pairs, vectorised};
use crate::numbers::{add_column_sums, on_host};
use crate::{Numbers, Parameter};

/// Threads of a block of `kernels/norm.cu`, and the widest group that a warp takes.
const BLOCK: u32 = 128;
const WARP_GROUP: usize = 1024;

/// Which statistics a norm takes out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NormKind {
    /// Root mean square.
    Rms,
    /// Mean and variance.
    Layer,
}

/// A norm over groups of `weight.cols()` channels.
#[derive(Debug)]
pub struct Norm {
    /// Which statistics.
    pub kind: NormKind,
    /// (1, group), f32.
    pub weight: Numbers,
    /// (1, group), f32.
    pub bias: Option<Numbers>,
    /// Added to the variance.
    pub eps: f64,
}

impl Norm {
    /// (N, C) → (N, C); C is a multiple of the group.
    ///
    /// # Errors
    /// When the type is not a real one.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        self.forward_with_room(x, 0)
    }

    /// The same, with some columns to spare.
    ///
    /// # Errors
    /// When the type is not a real one.
    pub fn forward_with_room(&self, x: &Tensor, room: usize) -> Result<Tensor> {
        let mut y = x.empty_like(x.rows(), x.cols() + room)?;
        self.forward_into(x, 0..x.cols(), &mut y)?;
        Ok(y)
    }

    /// Norms some columns of x into the same columns of y.
    ///
    /// # Errors
    /// When the type is not a real one.
    pub fn forward_into(&self, x: &Tensor, columns: std::ops::Range<usize>, y: &mut Tensor) -> Result<()> {
        if let Some(gpu) = x.gpu() {
            let launch = self.launch(gpu, "norm_forward", x, &columns)?;
            let launch = launch.tensor_at(y, columns.start).tensor_at(x, columns.start).tensor(&self.weight);
            let launch =
                launch.optional(self.bias.as_deref()).int(x.rows()).int(columns.len() / self.weight.cols());
            let launch = launch.int(self.weight.cols()).int(y.cols()).int(x.cols());
            // SAFETY: norm_forward(y, x, weight, bias, rows, groups, group, y_stride, x_stride, eps, centered)
            return unsafe { launch.float(self.eps).flag(self.kind == NormKind::Layer).run() };
        }
        let (weight, width) = (self.weight.values::<f32>()?, x.cols());
        let bias = self.bias.as_ref().map(|it| it.values::<f32>()).transpose()?;
        for_real!("norm", x.dtype(), T => {
            let stride = y.cols();
            let rows = y.values_mut::<T>()?.par_chunks_mut(stride).zip(x.values::<T>()?.par_chunks(width));
            rows.for_each(|(y, x)| {
                let groups = y[columns.clone()].chunks_mut(weight.len());
                for (y, x) in groups.zip(x[columns.clone()].chunks(weight.len())) {
                    norm_group::<T>(self.kind, weight, bias, T::of(self.eps), x, y);
                }
            });
            Ok(())
        })
    }

    /// The gradients of weight and bias, where these are trained.
    fn add_gradients(&mut self, x: &Tensor, columns: std::ops::Range<usize>, dy: &Tensor) -> Result<()> {
        if !self.weight.is_trained() && !self.bias.as_ref().is_some_and(Numbers::is_trained) {
            return Ok(());
        }
        // No kernel does this yet: a GPU's numbers come over.
        let (x_here, dy_here) = (on_host(x)?, on_host(dy)?);
        let (group, rows, kind, eps) = (self.weight.cols(), x.rows(), self.kind, self.eps);
        let pairs = |row: usize| {
            let x = &x_here[row * x.cols()..][columns.clone()];
            x.chunks(group).zip(dy_here[row * dy.cols()..][columns.clone()].chunks(group))
        };
        if let Some(grad) = self.weight.grad_mut() {
            add_column_sums(grad, rows, |row, sum| {
                for (x, dy) in pairs(row) {
                    let (mean, r) = statistics(kind, eps, x);
                    let normed = x.iter().map(|x| (x - mean) * r);
                    sum.iter_mut().zip(dy.iter().zip(normed)).for_each(|(sum, (dy, x))| *sum += dy * x);
                }
            })?;
        }
        if let Some(grad) = self.bias.as_mut().and_then(Numbers::grad_mut) {
            add_column_sums(grad, rows, |row, sum| {
                for (_, dy) in pairs(row) {
                    sum.iter_mut().zip(dy).for_each(|(sum, dy)| *sum += dy);
                }
            })?;
        }
        Ok(())
    }

    /// Weight and bias, where they are trained.
    pub fn parameters(&mut self) -> impl Iterator<Item = &mut Parameter> {
        self.weight.parameter().into_iter().chain(self.bias.as_mut().and_then(Numbers::parameter))
    }

    fn launch<'a>(
        &self,
        gpu: &'a Gpu,
        kernel: &str,
        x: &Tensor,
        columns: &std::ops::Range<usize>,
    ) -> Result<Launch<'a>> {
        let group = self.weight.cols();
        let groups = x.rows() * columns.len() / group;
        let per_block = if group <= WARP_GROUP { BLOCK as usize / 32 } else { 1 };
        Ok(gpu.kernel("norm", kernel, x.dtype())?.grid(groups.div_ceil(per_block), BLOCK))
    }

    /// Columns of dx, which may be dy, out of the same columns of the others.
    fn launch_backward(
        &self,
        dx: &Tensor,
        dy: &Tensor,
        x: &Tensor,
        add: Option<&Tensor>,
        columns: &std::ops::Range<usize>,
    ) -> Result<()> {
        let gpu = x.gpu().ok_or_else(|| Error::msg("norm: the numbers are not on a GPU"))?;
        let at = columns.start;
        let launch = self.launch(gpu, "norm_backward", x, columns)?;
        let launch = launch.tensor_at(dx, at).tensor_at(dy, at).tensor_at(x, at);
        let launch = match add {
            Some(add) => launch.tensor_at(add, at),
            None => launch.word(0),
        };
        let launch = launch.tensor(&self.weight);
        let launch = launch.int(x.rows()).int(columns.len() / self.weight.cols()).int(self.weight.cols());
        let launch = launch.int(dx.cols()).int(dy.cols()).int(x.cols()).int(add.map_or(0, Tensor::cols));
        // SAFETY: norm_backward(dx, dy, x, add, weight, rows, groups, group, strides of dx, dy, x, add, eps, centered)
        unsafe { launch.float(self.eps).flag(self.kind == NormKind::Layer).run() }
    }

    /// dx, written over dy. Needs only x: a row's statistics are recomputed.
    ///
    /// # Errors
    /// When the type is not a real one.
    pub fn backward(&mut self, x: &Tensor, mut dy: Tensor) -> Result<Tensor> {
        self.backward_columns(x, 0..x.cols(), &mut dy)?;
        Ok(dy)
    }

    /// dx + residual on a GPU, with some columns to spare: what goes on down the residual stream.
    ///
    /// # Errors
    /// When the numbers are not on a GPU, or shapes don't fit.
    pub fn backward_joined(
        &mut self,
        x: &Tensor,
        dy: Tensor,
        residual: &Tensor,
        room: usize,
    ) -> Result<Tensor> {
        if residual.rows() != x.rows() || residual.cols() < x.cols() {
            Error::check_shape("the residual's gradient", x.shape(), residual.shape())?;
        }
        let columns = 0..x.cols();
        self.add_gradients(x, columns.clone(), &dy)?;
        let dx = x.empty_like(x.rows(), x.cols() + room)?;
        self.launch_backward(&dx, &dy, x, Some(residual), &columns)?;
        Ok(dx)
    }

    /// The same for some of the columns.
    ///
    /// # Errors
    /// When the type is not a real one.
    pub fn backward_columns(
        &mut self,
        x: &Tensor,
        columns: std::ops::Range<usize>,
        dy: &mut Tensor,
    ) -> Result<()> {
        self.add_gradients(x, columns.clone(), dy)?;
        if x.gpu().is_some() {
            return self.launch_backward(dy, dy, x, None, &columns);
        }
        let (weight, width) = (self.weight.values::<f32>()?, x.cols());
        for_real!("norm", x.dtype(), T => {
            let rows = dy.values_mut::<T>()?.par_chunks_mut(width).zip(x.values::<T>()?.par_chunks(width));
            rows.for_each(|(dy, x)| {
                let groups = dy[columns.clone()].chunks_mut(weight.len());
                for (dy, x) in groups.zip(x[columns.clone()].chunks(weight.len())) {
                    norm_group_backward::<T>(self.kind, weight, T::of(self.eps), x, dy);
                }
            });
            Ok(())
        })
    }
}

#[inline(always)]
fn statistics<T: Real>(kind: NormKind, eps: T, x: &[T]) -> (T, T) {
    let n = T::of(x.len() as f64);
    let mean = match kind {
        NormKind::Rms => T::zero(),
        NormKind::Layer => sum_of(x, |x| x) / n,
    };
    let variance = sum_of(x, |x| (x - mean) * (x - mean)) / n;
    (mean, T::one() / (variance + eps).sqrt())
}

vectorised! {
    fn norm_group<T>(kind: NormKind, weight: &[f32], bias: Option<&[f32]>, eps: T, x: &[T], y: &mut [T]) {
        let (mean, r) = statistics(kind, eps, x);
        for ((y, x), w) in y.iter_mut().zip(x).zip(weight) {
            *y = (*x - mean) * r * T::of(f64::from(*w));
        }
        if let Some(bias) = bias {
            for (y, b) in y.iter_mut().zip(bias) {
                *y += T::of(f64::from(*b));
            }
        }
    }
}

vectorised! {
    fn norm_group_backward<T>(kind: NormKind, weight: &[f32], eps: T, x: &[T], dy: &mut [T]) {
        let (mean, r) = statistics(kind, eps, x);
        let n = T::of(x.len() as f64);
        for (dy, w) in dy.iter_mut().zip(weight) {
            *dy *= T::of(f64::from(*w));
        }
        let dot = sum_of_pairs(dy, x, |dy, x| dy * (x - mean)) * r / n;
        let g_mean = match kind {
            NormKind::Rms => T::zero(),
            NormKind::Layer => sum_of(dy, |dy| dy) / n,
        };
        for (dy, x) in dy.iter_mut().zip(x) {
            *dy = r * (*dy - g_mean - (*x - mean) * r * dot);
        }
    }
}
