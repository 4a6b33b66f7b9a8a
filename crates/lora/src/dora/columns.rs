//! What DoRA does to columns: `kernels/dora.cu`, and the same on the CPU.

use ferrotune_tensor::{DType, Error, Gpu, Real, Result, Tensor, for_real};
use rayon::prelude::*;

const MODULE: &str = "dora";
/// Threads of a block of the kernels, and most parts that a sum over rows is taken in.
const THREADS: u32 = 256;
const PARTS: usize = 32;
/// Columns that the CPU sums together.
const TOGETHER: usize = 64;
/// The smallest squared norm: a row of zeros has no direction.
const SMALLEST: f64 = 1e-30;

/// Whether a result takes the place of what was there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Writes {
    Over,
    Onto,
}

/// norm = √(squares + Σ_k b[k]·(2s·p[k] + s²·Σ_l gram[k, l]·b[l])) and gain = m/norm, both (1, C).
///   m, squares (1, C);  p = A·Wᵀ (R, C);  b = B (C, R);  gram = A·Aᵀ (R, R)
pub(super) fn norm(
    m: &Tensor,
    squares: &Tensor,
    p: &Tensor,
    b: &Tensor,
    gram: &Tensor,
    s: f64,
) -> Result<(Tensor, Tensor)> {
    let (cols, rank) = b.shape();
    Error::check_shape("magnitudes of DoRA", (1, cols), m.shape())?;
    if let Some(gpu) = p.gpu() {
        let (norm, gain) = (m.empty_like(1, cols)?, m.empty_like(1, cols)?);
        let launch = gpu.kernel(MODULE, "dora_norm", p.dtype())?.grid(blocks(cols), THREADS);
        let launch = launch.tensor(&norm).tensor(&gain).tensor(m).tensor(squares).tensor(p).tensor(b);
        // SAFETY: dora_norm(norm, gain, m, squares, p, b, gram, s, cols, rank)
        unsafe { launch.tensor(gram).float(s).int(cols).int(rank).run() }?;
        return Ok((norm, gain));
    }
    let (m, p, b, gram) = (wide(m)?, wide(p)?, wide(b)?, wide(gram)?);
    let squares = squares.values::<f32>()?;
    let norm = |j: usize| {
        let own = &b[j * rank..(j + 1) * rank];
        let added = own.iter().enumerate().map(|(k, b)| {
            let inner: f64 = gram[k * rank..(k + 1) * rank].iter().zip(own).map(|(gram, b)| gram * b).sum();
            b * (2.0 * s * p[k * cols + j] + s * s * inner)
        });
        (f64::from(squares[j]) + added.sum::<f64>()).max(SMALLEST).sqrt()
    };
    let norm: Vec<f64> = (0..cols).into_par_iter().map(norm).collect();
    let gain = norm.iter().zip(m).map(|(norm, m)| m / norm).collect();
    Ok((Tensor::from_vec(1, cols, norm)?, Tensor::from_vec(1, cols, gain)?))
}

/// `out[:, at..] = gain⊙z`, or `+=`; z is columns of another tensor from some on, or those of out itself.
pub(super) fn scale(
    out: &mut Tensor,
    at: usize,
    z: Option<(&Tensor, usize)>,
    gain: &Tensor,
    writes: Writes,
) -> Result<()> {
    let (rows, stride, cols) = (out.rows(), out.cols(), gain.cols());
    if at + cols > stride || z.is_some_and(|(z, from)| z.rows() != rows || from + cols > z.cols()) {
        return Error::check_shape("columns that DoRA scales", (rows, at + cols), out.shape());
    }
    if let Some(gpu) = out.gpu() {
        let (z, from) = z.unwrap_or((out, at));
        let launch = gpu.kernel(MODULE, "dora_scale", out.dtype())?;
        let launch = launch.grid((rows * cols).div_ceil(1024).clamp(1, 8192), THREADS);
        let launch = launch.tensor_at(out, at).tensor_at(z, from).tensor(gain);
        let launch = launch.float(if writes == Writes::Onto { 1.0 } else { 0.0 }).int(rows).int(cols);
        // SAFETY: dora_scale(out, z, gain, keep, rows, cols, out_stride, z_stride)
        return unsafe { launch.int(stride).int(z.cols()).run() };
    }
    let gain = gain.values::<f64>()?;
    for_real!("DoRA", out.dtype(), T => {
        let z = match z {
            Some((z, from)) => Some((z.values::<T>()?, z.cols(), from)),
            None => None,
        };
        out.values_mut::<T>()?.par_chunks_mut(stride).enumerate().for_each(|(row, out)| {
            for (col, (out, gain)) in out[at..at + cols].iter_mut().zip(gain).enumerate() {
                let from = z.map_or(*out, |(z, stride, from)| z[row * stride + from + col]);
                let scaled = T::of(gain * from.wide());
                *out = if writes == Writes::Onto { *out + scaled } else { scaled };
            }
        });
        Ok(())
    })
}

/// grad += Σ over rows of `a[:, at..]`⊙b / norm.
///   grad, norm (1, C);  b (N, C)
pub(super) fn add_dots(grad: &mut Tensor, a: &Tensor, at: usize, b: &Tensor, norm: &Tensor) -> Result<()> {
    let (rows, cols) = b.shape();
    if a.rows() != rows || at + cols > a.cols() {
        return Error::check_shape("gradient of a DoRA layer's output", (rows, at + cols), a.shape());
    }
    if let Some(gpu) = b.gpu() {
        return add_dots_on_gpu(gpu, grad, a, at, b, norm);
    }
    let (width, norm) = (a.cols(), norm.values::<f64>()?);
    let mut sums = vec![0.0f64; cols];
    for_real!("DoRA", b.dtype(), T => {
        let (a, b) = (a.values::<T>()?, b.values::<T>()?);
        // A column is one sum in the rows' order, whatever the number of threads.
        sums.par_chunks_mut(TOGETHER).enumerate().for_each(|(chunk, sums)| {
            let first = chunk * TOGETHER;
            for row in 0..rows {
                let (a, b) = (&a[row * width + at + first..], &b[row * cols + first..]);
                sums.iter_mut().zip(a.iter().zip(b)).for_each(|(sum, (a, b))| *sum += a.wide() * b.wide());
            }
        });
        Ok(())
    })?;
    for_real!("DoRA", grad.dtype(), T => {
        let grad = grad.values_mut::<T>()?.iter_mut().zip(sums.iter().zip(norm));
        grad.for_each(|(grad, (sum, norm))| *grad += T::of(sum / norm));
        Ok(())
    })
}

fn add_dots_on_gpu(gpu: &Gpu, grad: &Tensor, a: &Tensor, at: usize, b: &Tensor, norm: &Tensor) -> Result<()> {
    let (rows, cols) = b.shape();
    let parts = rows.div_ceil(64).clamp(1, PARTS);
    let partials = grad.empty_like(parts, cols)?;
    let launch = gpu.kernel(MODULE, "dora_dots", b.dtype())?.grid_of((blocks(cols), parts), THREADS);
    let launch = launch.tensor(&partials).tensor_at(a, at).tensor(b).int(rows).int(cols);
    // SAFETY: dora_dots(partials, a, b, rows, cols, a_stride, b_stride); grid.y is the number of parts
    unsafe { launch.int(a.cols()).int(cols).run() }?;
    let launch = gpu.plain_kernel(MODULE, "dora_gradient")?.grid(blocks(cols), THREADS);
    // SAFETY: dora_gradient(grad, partials, norm, parts, cols)
    unsafe { launch.tensor(grad).tensor(&partials).tensor(norm).int(parts).int(cols).run() }
}

fn blocks(cols: usize) -> usize {
    cols.div_ceil(THREADS as usize)
}

fn wide(x: &Tensor) -> Result<Vec<f64>> {
    Ok(match x.dtype() {
        DType::F64 => x.values::<f64>()?.to_vec(),
        _ => x.to_f32()?.into_iter().map(f64::from).collect(),
    })
}
