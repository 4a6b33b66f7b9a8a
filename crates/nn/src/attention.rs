//! Causal attention over packed sequences, grouped queries.
//!   s = q·kᵀ·scale,  t = cap·tanh(s/cap) if capped,  p = exp(t − lse),  o = p·v
//!   backward: dv = pᵀ·do,  dt = p·(do·vᵀ − do·o),  ds = dt·(1 − (t/cap)²)
//! Scores exist for a block of queries at a time, never for a whole sequence.

mod decoding;
mod gpu;

use std::ops::Range;

use ferrotune_tensor::{Matrix, MatrixMut, Precision, Real, Result, Tensor, for_real, product};
use rayon::prelude::*;

use crate::lanes::{exp, max_of, sum_of, sum_of_pairs, tanh, vectorised};
use crate::rope::Direction;
use crate::{Context, Layer, Linear, Norm, Parameter, Room, Rope, SavedTensors};

pub use decoding::KeyValues;
use gpu::Source;

/// Queries that one task takes at a time.
const QUERY_BLOCK: usize = 64;

/// The attention half of a block.
pub struct Attention {
    /// Parts q, k, v.
    pub qkv: Linear,
    /// Back to the width of the residual stream.
    pub o: Linear,
    /// Over each query head, or over all of a row's queries, as its weight is wide.
    pub q_norm: Option<Norm>,
    /// The same for keys.
    pub k_norm: Option<Norm>,
    /// Positions; none in layers without.
    pub rope: Option<Rope>,
    /// H
    pub num_attention_heads: usize,
    /// K
    pub num_key_value_heads: usize,
    /// D
    pub head_dim: usize,
    /// What scores are multiplied by.
    pub scale: f64,
    /// Keys that a query sees, itself included; none: all before it.
    pub window: Option<usize>,
    /// Scores are squeezed to ± this.
    pub softcap: Option<f64>,
    /// How exactly products of whole sequences are computed on the CPU.
    pub precision: Precision,
}

/// What [`Attention`]'s backward reads.
pub struct AttentionSaved {
    /// (N, (H + 2K)·D) as projected, where q or k are normed after it.
    pub projected: Option<Tensor>,
    /// (N, (H + 2K)·D): q and k turned, v.
    pub qkv: Tensor,
    /// (N, H·D): what the heads gave.
    pub out: Tensor,
    /// (N, H): log Σ exp of each query's scores; f32 on a GPU.
    pub lse: Tensor,
    /// (N, R): what the adapters of q, k and v made of the input, on a GPU.
    pub low: Option<Tensor>,
    /// Whether what `o`'s adapter made of `out` is beside it.
    pub low_beside_out: bool,
}

impl SavedTensors for AttentionSaved {
    fn tensors(&mut self) -> Vec<&mut Tensor> {
        let always = [&mut self.qkv, &mut self.out, &mut self.lse];
        self.projected.iter_mut().chain(always).chain(&mut self.low).collect()
    }
}

impl Attention {
    fn q_columns(&self) -> Range<usize> {
        0..self.num_attention_heads * self.head_dim
    }

    fn k_columns(&self) -> Range<usize> {
        let start = self.q_columns().end;
        start..start + self.num_key_value_heads * self.head_dim
    }

    fn v_columns(&self) -> Range<usize> {
        let start = self.k_columns().end;
        start..start + self.num_key_value_heads * self.head_dim
    }

    fn scores(&self) -> Scores {
        Scores { scale: self.scale, window: self.window, softcap: self.softcap }
    }

    /// Projects, norms and turns; also what was projected, where it is normed.
    fn project(&self, ctx: &Context, x: &Tensor) -> Result<(Option<Tensor>, Tensor)> {
        let mut qkv = self.qkv.forward(ctx, x)?;
        let projected = self.norm_heads(&mut qkv)?;
        if let Some(rope) = &self.rope {
            rope.turn(ctx, &mut qkv, 0..self.k_columns().end, self.head_dim, Direction::Forward)?;
        }
        Ok((projected, qkv))
    }

    /// What was there before, if there are norms.
    fn norm_heads(&self, qkv: &mut Tensor) -> Result<Option<Tensor>> {
        let normed = self.q_norm.is_some() || self.k_norm.is_some();
        let projected = normed.then(|| qkv.try_clone()).transpose()?;
        if let Some(projected) = &projected {
            if let Some(norm) = &self.q_norm {
                norm.forward_into(projected, self.q_columns(), qkv)?;
            }
            if let Some(norm) = &self.k_norm {
                norm.forward_into(projected, self.k_columns(), qkv)?;
            }
        }
        Ok(projected)
    }

    fn attend(&self, ctx: &Context, qkv: &Tensor) -> Result<(Tensor, Tensor)> {
        if qkv.gpu().is_some() {
            let blocks = ctx.query_blocks(&qkv.device(), self.block_rows(qkv)?)?;
            return self.attend_on_gpu(blocks, Source::stacked(self, qkv), self.o.room(ctx, qkv));
        }
        let (heads, d) = (self.num_attention_heads, self.head_dim);
        let group = heads / self.num_key_value_heads;
        let mut out = qkv.empty_like(qkv.rows(), heads * d)?;
        let mut lse = qkv.empty_like(qkv.rows(), heads)?;
        for_real!("attention", qkv.dtype(), T => {
            let all = qkv.matrix::<T>()?;
            let mut tasks = Vec::new();
            let (mut out_rest, mut lse_rest) = (out.values_mut::<T>()?, lse.values_mut::<T>()?);
            for sequence in ctx.sequences() {
                for block in blocks(&sequence) {
                    let (out, rest) = std::mem::take(&mut out_rest).split_at_mut(block.len() * heads * d);
                    out_rest = rest;
                    let (lse, rest) = std::mem::take(&mut lse_rest).split_at_mut(block.len() * heads);
                    lse_rest = rest;
                    tasks.push((sequence.start, block, out, lse));
                }
            }
            tasks.into_par_iter().for_each_init(Vec::new, |scratch, (start, block, out, lse)| {
                for head in 0..heads {
                    let keys = start..block.end;
                    let part = |columns: Range<usize>, head: usize, rows: Range<usize>| {
                        let first = columns.start + head * d;
                        all.columns(first..first + d).rows(rows)
                    };
                    let q = part(self.q_columns(), head, block.clone());
                    let k = part(self.k_columns(), head / group, keys.clone());
                    let v = part(self.v_columns(), head / group, keys);
                    let out = MatrixMut::new(out, block.len(), heads * d).columns(head * d..(head + 1) * d);
                    let lse = lse[head..].iter_mut().step_by(heads);
                    attend_block::<T>((self.scores(), self.precision), q, k, v, out, lse, scratch);
                }
            });
            Ok(())
        })?;
        Ok((out, lse))
    }

    /// (N, (H + 2K)·D): the gradient of q and k turned, and of v.
    fn attend_backward(&self, ctx: &Context, saved: &AttentionSaved, dout: &Tensor) -> Result<Tensor> {
        if saved.qkv.gpu().is_some() {
            return self.attend_backward_on_gpu(ctx, saved, dout);
        }
        let (heads, d) = (self.num_attention_heads, self.head_dim);
        let group = heads / self.num_key_value_heads;
        let mut dqkv = saved.qkv.empty_like(saved.qkv.rows(), saved.qkv.cols())?;
        for_real!("attention", saved.qkv.dtype(), T => {
            let width = saved.qkv.cols();
            for sequence in ctx.sequences() {
                // A task for each head; the heads of a group are added up afterwards, in order.
                let of_head = |head: usize| self.head_backward::<T>(&sequence, head, head / group, saved, dout);
                let grads = (0..heads).into_par_iter().map(of_head).collect::<Result<Vec<_>>>()?;
                let rows = sequence.start * width..sequence.end * width;
                let rows = dqkv.values_mut::<T>()?[rows].par_chunks_mut(width).enumerate();
                rows.for_each(|(row, out)| {
                    let (q, kv) = out.split_at_mut(heads * d);
                    let (k, v) = kv.split_at_mut(self.num_key_value_heads * d);
                    k.fill(0.0);
                    v.fill(0.0);
                    for (head, HeadGrads { dq, dk, dv }) in grads.iter().enumerate() {
                        let (own, shared) = (head * d..(head + 1) * d, head / group * d..(head / group + 1) * d);
                        let row = row * d..(row + 1) * d;
                        q[own].copy_from_slice(&dq[row.clone()]);
                        k[shared.clone()].iter_mut().zip(&dk[row.clone()]).for_each(|(a, b)| *a += *b);
                        v[shared].iter_mut().zip(&dv[row]).for_each(|(a, b)| *a += *b);
                    }
                });
            }
            Ok(())
        })?;
        Ok(dqkv)
    }

    fn head_backward<T: Real>(
        &self,
        sequence: &Range<usize>,
        head: usize,
        kv_head: usize,
        saved: &AttentionSaved,
        dout: &Tensor,
    ) -> Result<HeadGrads<T>> {
        let (heads, d, len) = (self.num_attention_heads, self.head_dim, sequence.len());
        let all = saved.qkv.matrix::<T>()?;
        let part = |columns: Range<usize>, head: usize, rows: Range<usize>| {
            all.columns(columns.start + head * d..columns.start + (head + 1) * d).rows(rows)
        };
        let own = head * d..(head + 1) * d;
        let (out, dout) = (saved.out.matrix::<T>()?.columns(own.clone()), dout.matrix::<T>()?.columns(own));
        let lse = saved.lse.values::<T>()?;
        let zeros = || vec![T::zero(); len * d];
        let mut grads = HeadGrads { dq: zeros(), dk: zeros(), dv: zeros() };
        let (mut p_scratch, mut ds_scratch) = (Vec::new(), Vec::new());
        let (one, zero, precision) = (T::one(), T::zero(), self.precision);
        for block in blocks(sequence) {
            let (rows, keys) = (block.len(), block.end - sequence.start);
            let q = part(self.q_columns(), head, block.clone());
            let k = part(self.k_columns(), kv_head, sequence.start..block.end);
            let v = part(self.v_columns(), kv_head, sequence.start..block.end);
            let (out, dout) = (out.rows(block.clone()), dout.rows(block.clone()));
            let p = sized(&mut p_scratch, rows * keys);
            let ds = sized(&mut ds_scratch, rows * keys);
            product::matmul_serial(
                precision,
                T::of(self.scale),
                q,
                k.transposed(),
                zero,
                MatrixMut::new(p, rows, keys),
            );
            product::matmul_serial(
                precision,
                one,
                dout,
                v.transposed(),
                zero,
                MatrixMut::new(ds, rows, keys),
            );
            for (i, (p, ds)) in p.chunks_mut(keys).zip(ds.chunks_mut(keys)).enumerate() {
                let (out, dout) =
                    (&out.data[i * out.row_stride..][..d], &dout.data[i * dout.row_stride..][..d]);
                let lse = lse[(block.start + i) * heads + head];
                let visible = self.scores().visible(block.start - sequence.start + i);
                score_backward::<T>(self.scores(), visible, lse, out, dout, p, ds);
            }
            let (p, ds) = (Matrix::new(p, rows, keys), Matrix::new(ds, rows, keys));
            let dv = MatrixMut::new(&mut grads.dv, keys, d);
            product::matmul_serial(precision, one, p.transposed(), dout, one, dv);
            let dk = MatrixMut::new(&mut grads.dk, keys, d);
            product::matmul_serial(precision, one, ds.transposed(), q, one, dk);
            let dq = &mut grads.dq[(block.start - sequence.start) * d..][..rows * d];
            product::matmul_serial(precision, one, ds, k, zero, MatrixMut::new(dq, rows, d));
        }
        Ok(grads)
    }
}

impl Layer for Attention {
    type Saved = AttentionSaved;

    fn forward(&self, ctx: &Context, x: &Tensor) -> Result<(Tensor, AttentionSaved)> {
        let mut saved = self.recompute(ctx, x)?;
        let y = self.o.forward(ctx, &saved.out)?;
        saved.low_beside_out = true;
        Ok((y, saved))
    }

    fn recompute(&self, ctx: &Context, x: &Tensor) -> Result<AttentionSaved> {
        let (projected, qkv) = self.project(ctx, x)?;
        let (out, lse) = self.attend(ctx, &qkv)?;
        Ok(AttentionSaved {
            projected,
            qkv,
            out,
            lse,
            low: self.qkv.low_beside(ctx, x)?,
            low_beside_out: false,
        })
    }

    fn backward(&mut self, ctx: &Context, x: &Tensor, saved: AttentionSaved, dy: Tensor) -> Result<Tensor> {
        let room = if saved.low_beside_out { Room::Low } else { Room::Empty };
        let dout = self.o.backward_with_room(ctx, &saved.out, room, &dy)?;
        let mut dqkv = self.attend_backward(ctx, &saved, &dout)?;
        if let Some(rope) = &self.rope {
            rope.turn(ctx, &mut dqkv, 0..self.k_columns().end, self.head_dim, Direction::Backward)?;
        }
        if let Some(projected) = &saved.projected {
            let (q, k) = (self.q_columns(), self.k_columns());
            if let Some(norm) = &mut self.q_norm {
                norm.backward_columns(projected, q, &mut dqkv)?;
            }
            if let Some(norm) = &mut self.k_norm {
                norm.backward_columns(projected, k, &mut dqkv)?;
            }
        }
        self.qkv.backward_with_room(ctx, x, saved.low.into(), &dqkv)
    }

    fn room(&self, ctx: &Context, like: &Tensor) -> usize {
        self.qkv.room(ctx, like)
    }

    fn gradient_room(&self, ctx: &Context, like: &Tensor) -> usize {
        self.o.room(ctx, like)
    }

    fn parameters(&mut self) -> Vec<&mut Parameter> {
        let norms = self.q_norm.iter_mut().chain(&mut self.k_norm).flat_map(Norm::parameters);
        self.qkv.parameters().into_iter().chain(norms).chain(self.o.parameters()).collect()
    }
}

/// The gradients of one head over one sequence, (T, D) each.
struct HeadGrads<T> {
    dq: Vec<T>,
    dk: Vec<T>,
    dv: Vec<T>,
}

/// How raw products become scores.
#[derive(Clone, Copy)]
struct Scores {
    scale: f64,
    window: Option<usize>,
    softcap: Option<f64>,
}

impl Scores {
    /// The keys that the query at `position` sees.
    fn visible(self, position: usize) -> Range<usize> {
        self.window.map_or(0, |window| (position + 1).saturating_sub(window))..position + 1
    }
}

/// Blocks of a sequence's rows.
fn blocks(sequence: &Range<usize>) -> impl Iterator<Item = Range<usize>> + use<> {
    let end = sequence.end;
    sequence.clone().step_by(QUERY_BLOCK).map(move |start| start..(start + QUERY_BLOCK).min(end))
}

/// A buffer that only grows.
fn sized<T: Real>(buffer: &mut Vec<T>, n: usize) -> &mut [T] {
    if buffer.len() < n {
        buffer.resize(n, T::zero());
    }
    &mut buffer[..n]
}

/// out = softmax(q·kᵀ)·v for the last `q.rows` of `k.rows` positions.
fn attend_block<'a, T: Real>(
    (scores, precision): (Scores, Precision),
    q: Matrix<'_, T>,
    k: Matrix<'_, T>,
    v: Matrix<'_, T>,
    out: MatrixMut<'_, T>,
    lse: impl Iterator<Item = &'a mut T>,
    scratch: &mut Vec<T>,
) {
    let (rows, keys) = (q.rows, k.rows);
    let p = sized(scratch, rows * keys);
    let (scale, zero) = (T::of(scores.scale), T::zero());
    product::matmul_serial(precision, scale, q, k.transposed(), zero, MatrixMut::new(p, rows, keys));
    for ((i, p), lse) in p.chunks_mut(keys).enumerate().zip(lse) {
        *lse = softmax::<T>(scores, scores.visible(keys - rows + i), p);
    }
    product::matmul_serial(precision, T::one(), Matrix::new(p, rows, keys), v, zero, out);
}

vectorised! {
    /// Scores to probabilities in place, 0 where not visible; returns log Σ exp.
    fn softmax<T>(scores: Scores, visible: Range<usize>, p: &mut [T]) -> T {
        p[..visible.start].fill(T::zero());
        p[visible.end..].fill(T::zero());
        let p = &mut p[visible];
        if let Some(cap) = scores.softcap {
            let cap = T::of(cap);
            for it in &mut *p {
                *it = cap * tanh(*it / cap);
            }
        }
        let max = max_of(p);
        for it in &mut *p {
            *it = exp(*it - max);
        }
        let sum = sum_of(p, |it| it);
        let inverse = T::one() / sum;
        for it in p {
            *it *= inverse;
        }
        max + sum.ln()
    }
}

vectorised! {
    /// From scaled scores in p and do·vᵀ in ds to probabilities and the scores' gradient (times scale).
    fn score_backward<T>(
        scores: Scores,
        visible: Range<usize>,
        lse: T,
        out: &[T],
        dout: &[T],
        p: &mut [T],
        ds: &mut [T],
    ) {
        let dot = sum_of_pairs(out, dout, |out, dout| out * dout);
        let scale = T::of(scores.scale);
        for row in [&mut *p, &mut *ds] {
            row[..visible.start].fill(T::zero());
            row[visible.end..].fill(T::zero());
        }
        let (p, ds) = (&mut p[visible.clone()], &mut ds[visible]);
        match scores.softcap {
            None => {
                for (p, ds) in p.iter_mut().zip(ds) {
                    *p = exp(*p - lse);
                    *ds = *p * (*ds - dot) * scale;
                }
            }
            Some(cap) => {
                let cap = T::of(cap);
                for (p, ds) in p.iter_mut().zip(ds) {
                    let bent = tanh(*p / cap);
                    *p = exp(cap * bent - lse);
                    *ds = *p * (*ds - dot) * scale * (T::one() - bent * bent);
                }
            }
        }
    }
}
