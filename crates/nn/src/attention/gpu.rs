//! Attention's CUDA arm: `kernels/attention_forward.cu` and `kernels/attention_backward.cu`.

use ferrotune_tensor::{DType, Error, Gpu, Launch, Result, Tensor};

use super::{Attention, AttentionSaved};
use crate::Context;

/// The kernels' files.
const FORWARD: &str = "attention_forward";
const BACKWARD: &str = "attention_backward";
/// Head sizes that kernels are compiled for.
const HEAD_SIZES: [usize; 7] = [16, 32, 64, 80, 96, 128, 256];

/// Where queries, keys and values stand: tensors and the first column of each.
#[derive(Clone, Copy)]
pub(super) struct Source<'a> {
    pub(super) q: (&'a Tensor, usize),
    pub(super) k: (&'a Tensor, usize),
    pub(super) v: (&'a Tensor, usize),
}

impl<'a> Source<'a> {
    /// All three side by side, as they are projected.
    pub(super) fn stacked(attention: &Attention, qkv: &'a Tensor) -> Source<'a> {
        Source {
            q: (qkv, attention.q_columns().start),
            k: (qkv, attention.k_columns().start),
            v: (qkv, attention.v_columns().start),
        }
    }

    fn arguments<'l>(&self, launch: Launch<'l>) -> Launch<'l> {
        [self.q, self.k, self.v]
            .iter()
            .fold(launch, |launch, (tensor, column)| launch.tensor_at(tensor, *column))
    }
}

impl Attention {
    /// out (queries, H·D) with `room` to spare, and lse (queries, H).
    pub(super) fn attend_on_gpu(
        &self,
        blocks: &Tensor,
        source: Source<'_>,
        room: usize,
    ) -> Result<(Tensor, Tensor)> {
        let (heads, q) = (self.num_attention_heads, source.q.0);
        let gpu = q.gpu().ok_or_else(|| Error::msg("attention: the queries are not on a GPU"))?;
        let out = q.empty_like(q.rows(), heads * self.head_dim + room)?;
        let lse = Tensor::empty(q.rows(), heads, DType::F32, &q.device())?;
        let grid = (heads, blocks.rows());
        let launch = self.kernel(gpu, FORWARD, "attention_forward", q.dtype(), grid)?;
        let launch = source.arguments(launch.tensor(&out).tensor(&lse));
        let launch = launch.tensor(blocks).int(out.cols()).int(q.cols()).int(source.k.0.cols());
        // SAFETY: attention_forward(out, lse, q, k, v, blocks, out_stride, q_stride, kv_stride, heads, group,
        // scale, window, softcap); blocks name rows of these tensors.
        unsafe { self.scores_arguments(launch).run() }?;
        Ok((out, lse))
    }

    pub(super) fn attend_backward_on_gpu(
        &self,
        ctx: &Context,
        saved: &AttentionSaved,
        dout: &Tensor,
    ) -> Result<Tensor> {
        let (heads, qkv, device) = (self.num_attention_heads, &saved.qkv, saved.qkv.device());
        let gpu = device.gpu().ok_or_else(|| Error::msg("attention: the queries are not on a GPU"))?;
        let (dtype, rows, stride) = (qkv.dtype(), qkv.rows(), qkv.cols());
        let dqkv = qkv.empty_like(rows, stride + self.qkv.room(ctx, qkv))?;
        let source = Source::stacked(self, qkv);
        let delta = Tensor::empty(rows, heads, DType::F32, &device)?;
        let facts = gpu.launch_facts(&self.module(BACKWARD)?, "attention_delta", dtype)?;
        let grid = ((rows * heads).div_ceil(facts.rows), 1);
        let launch = self.kernel(gpu, BACKWARD, "attention_delta", dtype, grid)?;
        let launch = launch.tensor(&delta).tensor(&saved.out).tensor(dout);
        // SAFETY: attention_delta(delta, out, dout, rows, out_stride, dout_stride, heads)
        unsafe { launch.int(rows).int(saved.out.cols()).int(dout.cols()).int(heads).run() }?;

        let blocks = ctx.query_blocks(&device, self.block_rows(qkv)?)?;
        let launch = self.kernel(gpu, BACKWARD, "attention_backward_dq", dtype, (heads, blocks.rows()))?;
        let launch = source.arguments(launch.tensor_at(&dqkv, self.q_columns().start)).tensor(dout);
        let launch = launch.tensor(&saved.lse).tensor(&delta).tensor(blocks);
        let launch = launch.int(dqkv.cols()).int(stride).int(stride).int(dout.cols());
        // SAFETY: attention_backward_dq(dq, q, k, v, dout, lse, delta, blocks, dq_stride, q_stride, kv_stride,
        // dout_stride, heads, group, scale, window, softcap)
        unsafe { self.scores_arguments(launch).run() }?;

        let facts = gpu.launch_facts(&self.module(BACKWARD)?, "attention_backward_dkv", dtype)?;
        let blocks = ctx.key_blocks(&device, facts.rows)?;
        let (kv_heads, group) = (self.num_key_value_heads, heads / self.num_key_value_heads);
        // The blocks at the ends of a sequence differ much in length: where there is hardly one for each multiprocessor, all
        // wait for the longest.
        let few = 2 * kv_heads * blocks.rows() < 3 * gpu.multiprocessors;
        let share = if few { 1 } else { group };
        let parts = || qkv.empty_like(rows, heads * self.head_dim);
        let apart = if share < group { Some((parts()?, parts()?)) } else { None };
        let launch =
            self.kernel(gpu, BACKWARD, "attention_backward_dkv", dtype, (heads / share, blocks.rows()))?;
        let (k_start, v_start) = (self.k_columns().start, self.v_columns().start);
        let launch = match &apart {
            Some((dk, dv)) => launch.tensor(dk).tensor(dv),
            None => launch.tensor_at(&dqkv, k_start).tensor_at(&dqkv, v_start),
        };
        let launch = source.arguments(launch).tensor(dout).tensor(&saved.lse).tensor(&delta).tensor(blocks);
        let out_stride = apart.as_ref().map_or(dqkv.cols(), |(dk, _)| dk.cols());
        let launch = launch.int(out_stride).int(stride).int(stride).int(dout.cols());
        // SAFETY: attention_backward_dkv(dk, dv, q, k, v, dout, lse, delta, blocks, dkv_stride, q_stride,
        // kv_stride, dout_stride, heads, group, scale, window, softcap, share)
        unsafe { self.scores_arguments(launch).int(share).run() }?;
        if let Some((dk, dv)) = apart {
            let facts = gpu.launch_facts(&self.module(BACKWARD)?, "attention_backward_sum", dtype)?;
            let cols = kv_heads * self.head_dim;
            let grid = ((rows * cols).div_ceil(facts.rows), 2);
            let launch = self.kernel(gpu, BACKWARD, "attention_backward_sum", dtype, grid)?;
            let launch = launch.tensor_at(&dqkv, k_start).tensor_at(&dqkv, v_start).tensor(&dk).tensor(&dv);
            // SAFETY: attention_backward_sum(dk, dv, dk_parts, dv_parts, rows, cols, stride, parts)
            unsafe { launch.int(rows).int(cols).int(dqkv.cols()).int(group).run() }?;
        }
        Ok(dqkv)
    }

    /// Queries of a block of the forward kernel on this card.
    pub(super) fn block_rows(&self, like: &Tensor) -> Result<usize> {
        let gpu = like.gpu().ok_or_else(|| Error::msg("attention: the queries are not on a GPU"))?;
        let module = self.module(FORWARD)?;
        Ok(gpu.launch_facts(&module, "attention_forward", like.dtype())?.rows)
    }

    /// A kernel over so many heads and blocks, as its source says it is launched.
    fn kernel<'a>(
        &self,
        gpu: &'a Gpu,
        file: &str,
        kernel: &str,
        dtype: DType,
        grid: (usize, usize),
    ) -> Result<Launch<'a>> {
        let module = self.module(file)?;
        let facts = gpu.launch_facts(&module, kernel, dtype)?;
        Ok(gpu.kernel(&module, kernel, dtype)?.grid_of(grid, facts.threads).shared(facts.shared))
    }

    pub(super) fn module(&self, file: &str) -> Result<String> {
        if HEAD_SIZES.contains(&self.head_dim) {
            return Ok(format!("{file}.{}", self.head_dim));
        }
        let size = self.head_dim;
        Err(Error::msg(format!(
            "attention heads of {size} channels are not built for GPUs (there are {HEAD_SIZES:?}); set `device: cpu`"
        )))
    }

    /// What the three kernels over scores end with.
    fn scores_arguments<'a>(&self, launch: Launch<'a>) -> Launch<'a> {
        let group = self.num_attention_heads / self.num_key_value_heads;
        let launch = launch.int(self.num_attention_heads).int(group).float(self.scale);
        launch.int(self.window.unwrap_or(0)).float(self.softcap.unwrap_or(0.0))
    }
}
