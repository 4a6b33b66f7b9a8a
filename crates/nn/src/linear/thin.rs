//! Thin products, which take as long as reading their larger operand does: low = s·x·Aᵀ (`kernels/low_rank_forward.cu`), and the
//! two that read dy, dlow = s·dy·B and dB += dyᵀ·low, in one pass over it (`kernels/low_rank_backward.cu`).

use ferrotune_tensor::{DType, Error, Gpu, Launch, LaunchFacts, Result, Tensor};

use super::fused::PARTS;

const MODULE: &str = "low_rank_backward";
const FORWARD_MODULE: &str = "low_rank_forward";
/// Largest ranks of the kernels, as their names have them.
const RANKS: [usize; 2] = [16, 32];
/// Bytes of shared memory that the driver takes for each block, from compute capability 8.0 on.
const RESERVED: usize = 1 << 10;
/// Stages of the pass over dy, as kernels' names have them.
const STAGES: [usize; 2] = [3, 2];
/// Strides, rows and ranks are multiples of this: what one access moves.
const TOGETHER: usize = 8;
/// Tokens that a step of a block takes.
const STEP: usize = 32;
/// With fewer tokens, launches take longer than reading.
const FEWEST_TOKENS: usize = 4096;
/// Threads of a block that sums, and the neighbouring numbers that each does at once.
const SUM_BLOCK: u32 = 256;
const SUM_RUN: usize = 4;

/// Tokens of a block of `low_rank_forward.cu`, as kernels' names have them.
const FORWARD_TOKENS: [usize; 2] = [32, 16];
/// With fewer tokens, there are too few blocks.
const FEWEST_FORWARD: usize = 512;

/// low = s·x·Aᵀ, all on one GPU.
pub(super) struct ThinForward<'a> {
    pub(super) scaling: f64,
    /// (N, inputs), and perhaps more columns.
    pub(super) x: &'a Tensor,
    pub(super) inputs: usize,
    /// A matrix, and the row of it at which A (R, inputs) begins.
    pub(super) a: (&'a Tensor, usize),
    /// A matrix, and the column of it at which low (N, R) begins.
    pub(super) low: (&'a Tensor, usize),
    /// R
    pub(super) rank: usize,
}

impl ThinForward<'_> {
    /// False, and nothing done, where the kernels don't take these sizes.
    pub(super) fn run(&self) -> Result<bool> {
        let ThinForward { scaling, x, inputs, a: (a, a_row), low: (low, low_column), rank } = *self;
        let gpu = x.gpu().ok_or_else(|| Error::msg("the input is not on a GPU"))?;
        let (n, dtype) = (x.rows(), x.dtype());
        let Some(padded) = RANKS.into_iter().find(|most| rank <= *most) else { return Ok(false) };
        let even = [x.cols(), inputs, a.cols(), low.cols(), low_column, rank];
        if !takes(x, FEWEST_FORWARD) || !even.into_iter().all(|it| it.is_multiple_of(TOGETHER)) {
            return Ok(false);
        }
        // Small blocks where there would be too few for all processors to have a large one.
        let small = n < FORWARD_TOKENS[0] * gpu.multiprocessors * 3 / 4;
        let names = FORWARD_TOKENS.map(|tokens| format!("low_rank_forward_{padded}_{tokens}"));
        let Some((kernel, facts, _)) = fitting(gpu, FORWARD_MODULE, dtype, &names[usize::from(small)..], 1)?
        else {
            return Ok(false);
        };
        let launch = gpu.kernel(FORWARD_MODULE, kernel, dtype)?;
        let launch = launch.grid(n.div_ceil(facts.rows), facts.threads).shared(facts.shared);
        let launch = launch.tensor_at(low, low_column).tensor(x).tensor_at(a, a_row * a.cols());
        let launch = launch.int(n).int(inputs).int(rank).int(x.cols()).int(a.cols());
        // SAFETY: low_rank_forward(low, x, a, n, inputs, room, x_stride, a_stride, low_stride, scaling); the shapes are those of
        // `Fused`.
        unsafe { launch.int(low.cols()).float(scaling).run() }?;
        Ok(true)
    }
}

/// Whether there are such kernels for x: they begin with the architecture that has bf16.
fn takes(x: &Tensor, fewest: usize) -> bool {
    x.gpu().is_some_and(|it| it.has_bf16())
        && matches!(x.dtype(), DType::F16 | DType::BF16)
        && x.rows() >= fewest
}

/// The first of some kernels whose blocks find room on a processor, `resident` of them at once if one of the kernels allows
/// that, and how many do.
fn fitting<'a>(
    gpu: &Gpu,
    module: &str,
    dtype: DType,
    kernels: &'a [String],
    resident: usize,
) -> Result<Option<(&'a str, LaunchFacts, usize)>> {
    for wanted in (1..=resident).rev() {
        for kernel in kernels {
            let facts = gpu.launch_facts(module, kernel, dtype)?;
            // Each block takes RESERVED more, and one can have all but those of a processor.
            if wanted * (facts.shared + RESERVED) <= gpu.shared_of_block + RESERVED {
                return Ok(Some((kernel, facts, wanted)));
            }
        }
    }
    Ok(None)
}

/// The operands, all on one GPU.
pub(super) struct Thin<'a> {
    /// Rows and rank of each part; a part without an adapter has rank 0.
    pub(super) parts: [(usize, usize); PARTS],
    pub(super) scaling: f64,
    /// (N, outputs + room): dlow is written into the room.
    pub(super) dy: &'a Tensor,
    /// E, and the column of it at which B begins.
    pub(super) weights: (&'a Tensor, usize),
    /// A tensor, and the column of it at which low begins.
    pub(super) low: (&'a Tensor, usize),
    /// dB (rows, rank) of each part.
    pub(super) b_gradients: [Option<&'a Tensor>; PARTS],
}

impl Thin<'_> {
    /// dlow =, dB +=; false, and nothing done, where the kernels don't take these sizes.
    pub(super) fn run(&self) -> Result<bool> {
        let Thin { parts, dy, weights: (weights, b_column), low: (low, low_column), .. } = *self;
        let gpu = dy.gpu().ok_or_else(|| Error::msg("the gradient is not on a GPU"))?;
        let dtype = dy.dtype();
        let rank = parts.iter().map(|it| it.1).max().unwrap_or(0);
        let Some(padded) = RANKS.into_iter().find(|most| rank <= *most) else { return Ok(false) };
        let sizes = [dy.cols(), weights.cols(), b_column, low.cols(), low_column];
        let even = sizes.into_iter().chain(parts.iter().flat_map(|it| [it.0, it.1]));
        let outputs: usize = parts.iter().map(|it| it.0).sum();
        if !takes(dy, FEWEST_TOKENS) || !even.into_iter().all(|it| it.is_multiple_of(TOGETHER)) {
            return Ok(false);
        }
        let names = STAGES.map(|stages| format!("low_rank_backward_{padded}_{stages}"));
        let most = if padded == RANKS[0] { 2 } else { 1 }; // what the kernels' registers allow
        let Some((kernel, facts, resident)) = fitting(gpu, MODULE, dtype, &names, most)? else {
            return Ok(false);
        };
        let adapted = parts.iter().filter(|it| it.1 > 0);
        let column_blocks: usize = adapted.map(|it| it.0.div_ceil(facts.rows)).sum();
        // As many as run at once: more blocks of tokens are more shares of dB.
        let at_once = gpu.multiprocessors * resident;
        let steps = dy.rows().div_ceil(STEP);
        let tokens = steps.div_ceil((at_once / column_blocks).clamp(1, steps)) * STEP;
        let token_blocks = dy.rows().div_ceil(tokens);
        let floats = |rows: usize, cols: usize| Tensor::empty(rows, cols, DType::F32, &dy.device());
        let dlow = floats(column_blocks, dy.rows() * padded)?;
        let db = floats(token_blocks, column_blocks * facts.rows * padded)?;
        let launch = gpu.kernel(MODULE, kernel, dtype)?.grid_of((column_blocks, token_blocks), facts.threads);
        let launch = launch.shared(facts.shared).tensor(&dlow).tensor(&db).tensor(dy);
        let launch = launch.tensor_at(weights, b_column).tensor_at(low, low_column);
        let launch = sizes_of(launch, &parts).int(dy.rows()).int(dy.cols()).int(weights.cols());
        // SAFETY: low_rank_backward(dlow_shares, db_shares, dy, b, low, rows0 … rows2, rank0 … rank2, n, dy_stride, b_stride,
        // low_stride, tokens); the shapes are those of `Fused`.
        unsafe { launch.int(low.cols()).int(tokens).run() }?;
        let room = dy.cols() - outputs;
        let b_sums: usize = parts.iter().map(|(rows, rank)| rows * rank).sum();
        let runs = (b_sums + dy.rows() * room) / SUM_RUN;
        let launch = gpu.kernel(MODULE, "low_rank_backward_sum", dtype)?;
        let launch =
            launch.grid(runs.div_ceil(SUM_BLOCK as usize), SUM_BLOCK).tensor_at(dy, outputs).tensor(&dlow);
        let launch = self.b_gradients.into_iter().fold(launch, Launch::optional).tensor(&db);
        let launch = sizes_of(launch, &parts).int(dy.rows()).int(room).int(dy.cols()).int(padded);
        // SAFETY: low_rank_backward_sum(dlow, dlow_shares, db0 … db2, db_shares, rows0 … rows2, rank0 … rank2, n, room, stride,
        // padded, token_blocks, column_blocks, scaling)
        unsafe { launch.int(token_blocks).int(column_blocks).float(self.scaling).run() }?;
        Ok(true)
    }
}

fn sizes_of<'a>(launch: Launch<'a>, parts: &[(usize, usize); PARTS]) -> Launch<'a> {
    let launch = parts.iter().fold(launch, |launch, (rows, _)| launch.int(*rows));
    parts.iter().fold(launch, |launch, (_, rank)| launch.int(*rank))
}
