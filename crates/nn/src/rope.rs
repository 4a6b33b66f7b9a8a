//! Turns pairs of a head's channels by position · inverse frequency. The backward turns back.
//! Every scaling (linear, llama3, yarn, longrope) is only another list of inverse frequencies.
//! Su et al. 2021, "RoFormer".

use std::sync::Arc;

use ferrotune_tensor::{DType, Device, Gpu, Real, Result, Tensor, for_real};
use rayon::prelude::*;

use crate::Context;
use crate::lanes::vectorised;

/// Threads of a block of `kernels/rope.cu`.
const BLOCK: u32 = 256;

/// How a head's channels are turned.
#[derive(Clone, Debug, PartialEq)]
pub struct Rope {
    /// Half the rotary width; the other channels of a head pass unturned.
    pub inverse_frequencies: Vec<f64>,
    /// What cosine and sine are multiplied by (yarn, longrope; else 1).
    pub attention_factor: f64,
    /// Pairs are (2i, 2i+1), not (i, i + width/2).
    pub interleaved: bool,
}

/// Which way to turn.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Direction {
    Forward,
    Backward,
}

impl Rope {
    /// Unscaled frequencies: theta^(−2i/width).
    pub fn new(theta: f64, rotary_width: usize) -> Rope {
        let inverse_frequencies =
            (0..rotary_width / 2).map(|i| theta.powf(-2.0 * i as f64 / rotary_width as f64)).collect();
        Rope { inverse_frequencies, attention_factor: 1.0, interleaved: false }
    }

    /// Turns the heads in some columns of x, in place.
    pub(crate) fn turn(
        &self,
        ctx: &Context,
        x: &mut Tensor,
        columns: std::ops::Range<usize>,
        head_dim: usize,
        direction: Direction,
    ) -> Result<()> {
        let width = x.cols();
        if let Some(gpu) = x.gpu() {
            let table = self.table_on_gpu(ctx, gpu)?;
            let (half, heads) = (self.inverse_frequencies.len(), columns.len() / head_dim);
            let pairs = x.rows() * heads * half;
            let launch = gpu.kernel("rope", "rope", x.dtype())?.grid(pairs.div_ceil(4096), BLOCK);
            let launch =
                launch.tensor_at(x, columns.start).tensor(&table).int(x.rows()).int(width).int(heads);
            let launch = launch.int(head_dim).int(half).flag(self.interleaved);
            let sign = if direction == Direction::Forward { 1.0 } else { -1.0 };
            // SAFETY: rope(x, table, rows, stride, heads, head_dim, half, interleaved, sign)
            return unsafe { launch.float(sign).run() };
        }
        for_real!("rope", x.dtype(), T => {
            let table = self.table::<T>(ctx)?;
            let half = self.inverse_frequencies.len();
            let rows = x.values_mut::<T>()?.par_chunks_mut(width).zip(table.values::<T>()?.par_chunks(2 * half));
            rows.for_each(|(row, angles)| {
                let (cos, sin) = angles.split_at(half);
                turn_heads::<T>(&mut row[columns.clone()], cos, sin, head_dim, self.interleaved, direction);
            });
            Ok(())
        })
    }

    /// (N, rotary width) in f32: cosines and sines.
    pub(crate) fn table_on_gpu(&self, ctx: &Context, gpu: &Arc<Gpu>) -> Result<Arc<Tensor>> {
        let mut tables = ctx.shared.rope.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        if let Some((.., table)) = tables.iter().find(|(rope, ..)| rope == self) {
            return Ok(table.clone());
        }
        let device = Device::Cuda(gpu.clone());
        let (rows, half) = (ctx.rows(), self.inverse_frequencies.len());
        let frequencies = self.frequencies_on_gpu(ctx, &device)?;
        let uploaded;
        let positions = match &ctx.row {
            Some(row) => &row.position,
            None => {
                let positions =
                    ctx.sequences().flat_map(|rows| 0..rows.len()).map(|it| (it + ctx.first_position) as u32);
                uploaded = Tensor::from_vec(1, rows, positions.collect())?.to_device(&device)?;
                &uploaded
            }
        };
        let table = Tensor::empty(rows, 2 * half, DType::F32, &device)?;
        let launch =
            gpu.plain_kernel("rope", "rope_table")?.grid((rows * half).div_ceil(BLOCK as usize), BLOCK);
        let launch = launch.tensor(&table).tensor(&frequencies).tensor(positions).int(rows).int(half);
        // SAFETY: rope_table(table, inverse_frequencies, positions, rows, half, factor)
        unsafe { launch.float(self.attention_factor).run() }?;
        let table = Arc::new(table);
        tables.push((self.clone(), DType::F32, table.clone()));
        Ok(table)
    }

    fn frequencies_on_gpu(&self, ctx: &Context, device: &Device) -> Result<Arc<Tensor>> {
        let mut all = ctx.shared.frequencies.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        if let Some((_, frequencies)) = all.iter().find(|(rope, _)| rope == self) {
            return Ok(frequencies.clone());
        }
        let frequencies: Vec<f32> = self.inverse_frequencies.iter().map(|it| *it as f32).collect();
        let frequencies = Arc::new(Tensor::from_vec(1, frequencies.len(), frequencies)?.to_device(device)?);
        all.push((self.clone(), frequencies.clone()));
        Ok(frequencies)
    }

    /// (N, rotary width): cosines and sines. Angles are rounded as transformers rounds them.
    fn table<T: Real>(&self, ctx: &Context) -> Result<Arc<Tensor>> {
        let mut tables = ctx.shared.rope.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        if let Some((.., table)) = tables.iter().find(|(rope, dtype, _)| *dtype == T::DTYPE && rope == self) {
            return Ok(table.clone());
        }
        let frequencies: Vec<T> = self.inverse_frequencies.iter().map(|it| T::of(*it)).collect();
        let (half, factor) = (frequencies.len(), T::of(self.attention_factor));
        let mut values = vec![T::zero(); ctx.rows() * 2 * half];
        for sequence in ctx.sequences() {
            for row in sequence.clone() {
                let position = T::of((row - sequence.start + ctx.first_position) as f64);
                for (i, frequency) in frequencies.iter().enumerate() {
                    let (sin, cos) = (position * *frequency).sin_cos();
                    values[row * 2 * half + i] = cos * factor;
                    values[row * 2 * half + half + i] = sin * factor;
                }
            }
        }
        let table = Arc::new(Tensor::from_vec(ctx.rows(), 2 * half, values)?);
        tables.push((self.clone(), T::DTYPE, table.clone()));
        Ok(table)
    }
}

vectorised! {
    fn turn_heads<T>(
        heads: &mut [T],
        cos: &[T],
        sin: &[T],
        head_dim: usize,
        interleaved: bool,
        direction: Direction,
    ) {
        let half = cos.len();
        let sign = if direction == Direction::Forward { T::one() } else { -T::one() };
        for head in heads.chunks_mut(head_dim) {
            if interleaved {
                for (i, pair) in head[..2 * half].chunks_mut(2).enumerate() {
                    let (a, b, sin) = (pair[0], pair[1], sin[i] * sign);
                    (pair[0], pair[1]) = (a * cos[i] - b * sin, a * sin + b * cos[i]);
                }
            } else {
                let (first, second) = head[..2 * half].split_at_mut(half);
                for i in 0..half {
                    let (a, b, sin) = (first[i], second[i], sin[i] * sign);
                    (first[i], second[i]) = (a * cos[i] - b * sin, a * sin + b * cos[i]);
                }
            }
        }
    }
}
