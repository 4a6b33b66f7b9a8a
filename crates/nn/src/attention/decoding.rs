//! Attention of further tokens of one sequence to those before, whose keys and values are kept.

use ferrotune_tensor::{DType, Error, Gpu, Matrix, MatrixMut, Precision, Result, Tensor};
use rayon::prelude::*;

use super::gpu::Source;
use super::{Attention, attend_block, blocks};
use crate::pass::descriptors;
use crate::row::RowSource;
use crate::{Context, Norm};

/// Keys and values of one sequence so far.
#[derive(Debug, Default)]
pub struct KeyValues {
    kept: Option<Kept>,
    len: usize,
}

#[derive(Debug)]
struct Kept {
    /// (capacity, K·D), filled from the top.
    k: Tensor,
    /// The same.
    v: Tensor,
    /// (1, K) on a GPU: zeros, where blocks of `kernels/attention_decoding.cu` count themselves.
    arrived: Option<Tensor>,
}

/// The kernel's file.
const DECODING: &str = "attention_decoding";
/// Blocks that share the keys of a head, at most.
const MOST_BLOCKS: usize = 128;
/// Shared memory that each card has for a block.
const SHARED_BYTES: usize = 60 << 10;

impl KeyValues {
    /// Tokens held.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Nothing is held.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Room for so many tokens. True when what was recorded with the old memory no longer holds.
    ///
    /// # Errors
    /// When there is no memory.
    pub fn make_room(&mut self, attention: &Attention, like: &Tensor, tokens: usize) -> Result<bool> {
        let held = self.kept.as_ref().map_or(0, |kept| kept.k.rows());
        self.reserve(attention, like, tokens)?;
        Ok(held < tokens)
    }

    /// One more token is held: a recorded pass has written it.
    pub fn advance(&mut self) {
        self.len += 1;
    }

    /// Forgets all but the first tokens.
    pub fn truncate(&mut self, len: usize) {
        self.len = self.len.min(len);
    }

    /// Room for so many rows in all.
    fn reserve(&mut self, attention: &Attention, like: &Tensor, rows: usize) -> Result<&mut Kept> {
        let held = self.kept.as_ref().map_or(0, |kept| kept.k.rows());
        if held < rows {
            let (capacity, width) = (rows.next_power_of_two().max(256), attention.k_columns().len());
            let grown = |old: Option<&Tensor>| -> Result<Tensor> {
                let mut new = like.empty_like(capacity, width)?;
                if let Some(old) = old {
                    new.write_block((0, 0), old, (0..self.len, 0..width))?;
                }
                Ok(new)
            };
            let old = self.kept.as_ref();
            let (k, v) = (grown(old.map(|it| &it.k))?, grown(old.map(|it| &it.v))?);
            let zeros = || vec![0u32; attention.num_key_value_heads];
            let zeros =
                || Tensor::from_vec(1, attention.num_key_value_heads, zeros())?.to_device(&like.device());
            self.kept = Some(Kept { k, v, arrived: like.gpu().map(|_| zeros()).transpose()? });
        }
        self.kept.as_mut().ok_or_else(|| Error::msg("a cache without room"))
    }

    /// Appends columns of every row of `qkv`.
    fn append(&mut self, attention: &Attention, qkv: &Tensor) -> Result<&Kept> {
        let (from, rows) = (self.len, qkv.rows());
        let kept = self.reserve(attention, qkv, from + rows)?;
        kept.k.write_block((from, 0), qkv, (0..rows, attention.k_columns()))?;
        kept.v.write_block((from, 0), qkv, (0..rows, attention.v_columns()))?;
        self.len += rows;
        self.kept.as_ref().ok_or_else(|| Error::msg("a cache without room"))
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

    /// Whether [`Attention::step_row`] takes such rows.
    pub fn takes_row(&self, ctx: &Context, like: &Tensor) -> bool {
        let shared = like.gpu().and_then(|gpu| self.decoding_shared(gpu, like.dtype(), MOST_BLOCKS).ok());
        shared.is_some_and(|bytes| bytes <= SHARED_BYTES)
            && self.qkv.takes_row(ctx, like)
            && self.o.takes_row(ctx, like)
    }

    /// x + scale·attention(norm(x)) for the token at `ctx.row` on a GPU. Its key and value are written to the
    /// cache, which has room for it; [`KeyValues::advance`] then counts it.
    ///
    /// # Errors
    /// When [`Attention::takes_row`] says no.
    pub fn step_row(
        &self,
        ctx: &Context,
        x: &Tensor,
        norm: &Norm,
        cache: &KeyValues,
        scale: f64,
    ) -> Result<Tensor> {
        // Before the product, so that nothing stands between it and what reads it.
        if let (Some(rope), Some(gpu)) = (&self.rope, x.gpu()) {
            rope.table_on_gpu(ctx, gpu)?;
        }
        let mut qkv = self.qkv.row(ctx, x, RowSource::Normed(norm), None)?;
        self.norm_heads(&mut qkv)?;
        let out = self.attend_row(ctx, &qkv, cache)?;
        self.o.row(ctx, &out, RowSource::Plain, Some((x, scale)))
    }

    /// What the heads (1, H·D) give, q and k not turned yet.
    fn attend_row(&self, ctx: &Context, qkv: &Tensor, cache: &KeyValues) -> Result<Tensor> {
        let without = || Error::msg("attention: a row without its state or a cache without room");
        let (state, kept) = ctx.row.as_ref().zip(cache.kept.as_ref()).ok_or_else(without)?;
        let gpu = qkv.gpu().ok_or_else(without)?;
        let heads = self.num_attention_heads;
        let module = self.module(DECODING)?;
        let facts = gpu.launch_facts(&module, DECODING, qkv.dtype())?;
        // As many blocks as all that the cache can hold would need: those without keys leave at once.
        let visible = self.window.unwrap_or(usize::MAX).min(kept.k.rows());
        let keys_per_block = facts.rows * visible.div_ceil(facts.rows).div_ceil(MOST_BLOCKS);
        let blocks = visible.div_ceil(keys_per_block);
        let out = qkv.empty_like(1, heads * self.head_dim)?;
        let partial = Tensor::empty(heads * blocks, self.head_dim + 2, DType::F32, &qkv.device())?;
        let table = self.rope.as_ref().map(|rope| rope.table_on_gpu(ctx, gpu)).transpose()?;
        let launch = gpu.kernel(&module, DECODING, qkv.dtype())?.early();
        let launch = launch.grid_of((blocks, self.num_key_value_heads), facts.threads);
        let launch = launch.shared(self.decoding_shared(gpu, qkv.dtype(), blocks)?);
        let launch = launch.tensor(&out).tensor(&partial).optional(kept.arrived.as_ref());
        let launch = launch.tensor(&kept.k).tensor(&kept.v).tensor(qkv).optional(table.as_deref());
        let launch = launch.int(self.rope.as_ref().map_or(0, |it| it.inverse_frequencies.len()));
        let launch = launch.flag(self.rope.as_ref().is_some_and(|it| it.interleaved)).tensor(&state.position);
        let launch = launch.int(self.window.unwrap_or(0)).int(keys_per_block).int(heads);
        let launch = launch.int(heads / self.num_key_value_heads).float(self.scale);
        // SAFETY: attention_decoding(out, partial, arrived, keys, values, qkv, table, half, interleaved, position, window,
        // keys_per_block, heads, group, scale, softcap); whoever sets the position has made room for it.
        unsafe { launch.float(self.softcap.unwrap_or(0.0)).run() }?;
        Ok(out)
    }

    /// Bytes of shared memory, as the kernel's source counts them.
    fn decoding_shared(&self, gpu: &Gpu, dtype: DType, blocks: usize) -> Result<usize> {
        let facts = gpu.launch_facts(&self.module(DECODING)?, DECODING, dtype)?;
        let group = self.num_attention_heads / self.num_key_value_heads;
        Ok(facts.shared + group * (2 * self.head_dim + facts.rows + 3 + blocks) * 4)
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
                attend_block(
                    (self.scores(), Precision::Full),
                    q,
                    k,
                    v,
                    out,
                    lse[block.clone()].iter_mut(),
                    &mut scratch,
                );
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
