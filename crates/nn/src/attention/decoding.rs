//! Attention of further tokens of one sequence to those before, whose keys and values are kept.

use ferrotune_tensor::{DType, Error, Matrix, MatrixMut, Result, Tensor};
use rayon::prelude::*;

use super::gpu::Source;
use super::{Attention, attend_block, blocks};
use crate::Context;
use crate::pass::descriptors;

/// Keys and values of one sequence so far.
#[derive(Debug, Default)]
pub struct KeyValues {
    kept: Option<Kept>,
    len: usize,
}

/// (capacity, K·D) each, filled from the top.
#[derive(Debug)]
struct Kept {
    k: Tensor,
    v: Tensor,
}

impl KeyValues {
    /// Tokens held.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Nothing is held.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Forgets all but the first tokens.
    pub fn truncate(&mut self, len: usize) {
        self.len = self.len.min(len);
    }

    /// Appends columns of every row of `qkv`.
    fn append(&mut self, attention: &Attention, qkv: &Tensor) -> Result<&Kept> {
        let (rows, width) = (qkv.rows(), attention.k_columns().len());
        let (from, to) = (self.len, self.len + rows);
        let held = self.kept.as_ref().map_or(0, |kept| kept.k.rows());
        if held < to {
            let capacity = to.next_power_of_two().max(256);
            let grown = |old: Option<&Tensor>| -> Result<Tensor> {
                let mut new = qkv.empty_like(capacity, width)?;
                if let Some(old) = old {
                    new.write_block((0, 0), old, (0..from, 0..width))?;
                }
                Ok(new)
            };
            let old = self.kept.as_ref();
            self.kept = Some(Kept { k: grown(old.map(|it| &it.k))?, v: grown(old.map(|it| &it.v))? });
        }
        let kept = self.kept.as_mut().ok_or_else(|| Error::msg("a cache without room"))?;
        kept.k.write_block((from, 0), qkv, (0..rows, attention.k_columns()))?;
        kept.v.write_block((from, 0), qkv, (0..rows, attention.v_columns()))?;
        self.len = to;
        Ok(kept)
    }
}

impl Attention {
    /// Forward of further tokens, whose keys and values join the cache; f32 on the CPU.
    ///
    /// # Errors
    /// When shapes don't fit.
    pub fn step(&self, ctx: &Context, x: &Tensor, cache: &mut KeyValues) -> Result<Tensor> {
        let (_, qkv) = self.project(ctx, x)?;
        let before = cache.len();
        let kept = cache.append(self, &qkv)?;
        let out = match qkv.gpu() {
            None => self.attend_to_cache(&qkv, kept, before)?,
            Some(_) => {
                let (rows, most) = (x.rows(), self.block_rows(&qkv)?);
                let starts = (0..rows).step_by(most);
                let block = |start: usize| [start, most.min(rows - start), 0, before + start];
                let blocks = descriptors(starts.map(block), &x.device())?;
                let source = Source { q: (&qkv, 0), k: (&kept.k, 0), v: (&kept.v, 0) };
                self.attend_on_gpu(&blocks, source, self.o.room(ctx, x))?.0
            }
        };
        self.o.forward(ctx, &out)
    }

    fn attend_to_cache(&self, qkv: &Tensor, kept: &Kept, before: usize) -> Result<Tensor> {
        let (heads, d, rows) = (self.num_attention_heads, self.head_dim, qkv.rows());
        let group = heads / self.num_key_value_heads;
        let all = qkv.matrix::<f32>()?;
        let (k, v): (Matrix<'_, f32>, Matrix<'_, f32>) = (kept.k.matrix()?, kept.v.matrix()?);
        let of_head = |head: usize| {
            let shared = head / group * d..(head / group + 1) * d;
            let (mut out, mut scratch) = (vec![0.0; rows * d], Vec::new());
            let mut lse = vec![0.0; rows];
            for block in blocks(&(0..rows)) {
                let keys = 0..before + block.end;
                let (k, v) =
                    (k.columns(shared.clone()).rows(keys.clone()), v.columns(shared.clone()).rows(keys));
                let q = all.columns(head * d..(head + 1) * d).rows(block.clone());
                let out = MatrixMut::new(&mut out[block.start * d..], block.len(), d);
                attend_block(self.scores(), q, k, v, out, lse[block.clone()].iter_mut(), &mut scratch);
            }
            out
        };
        let heads_out: Vec<Vec<f32>> = (0..heads).into_par_iter().map(of_head).collect();
        let mut out = Tensor::zeros(rows, heads * d, DType::F32, &qkv.device())?;
        for (row, out) in out.values_mut::<f32>()?.chunks_mut(heads * d).enumerate() {
            for (out, head) in out.chunks_mut(d).zip(&heads_out) {
                out.copy_from_slice(&head[row * d..(row + 1) * d]);
            }
        }
        Ok(out)
    }
}
