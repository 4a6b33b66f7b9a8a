//! One row through a linear layer on a GPU, for decoding: `kernels/row.cu` reads each matrix once, as it is
//! stored. Two launches: what comes before the product (a norm, an activation) and the low-rank half of the
//! adapters; then the product, the other half, and the sum with the residual stream.

use ferrotune_tensor::{DType, Device, Error, Gpu, Launch, Result, Tensor};

use crate::linear::Part;
use crate::mlp::{Activation, Mlp};
use crate::norm::NormKind;
use crate::{Context, Linear, LowRank, Norm, Weight};

/// The kernels' file.
const MODULE: &str = "row";
/// Its products, by how a matrix is stored.
const PLAIN: &str = "row_product_plain";
const CODED: &str = "row_product_coded";
/// Parts that the kernels take: q, k and v.
const PARTS: usize = 3;
/// Rows are multiples of this, so that all accesses are whole; those of codes of that.
const COLUMNS: usize = 32;
const CODED_COLUMNS: usize = 64;
/// Blocks of a product of plain numbers that a multiprocessor holds at once: more would copy the row again.
const BLOCKS_AT_ONCE: usize = 6;
/// Rows that a block of a product of codes does, at most: their sums are in shared memory.
const MOST_ROWS: usize = 512;
/// Threads of a block of `row_prepare` and `row_next`, and blocks of the latter.
const PREPARE_BLOCK: u32 = 512;
const NEXT_BLOCK: u32 = 256;
const NEXT_BLOCKS: usize = 64;

/// A matrix as a GPU reads it, row by row.
pub enum StoredRows<'a> {
    /// Plain numbers (output, input).
    Plain(&'a Tensor),
    /// Codes of levels, scaled by block.
    Coded(Coded<'a>),
}

/// A matrix in 4-bit codes: w = level\[code\]·absmax, with an absmax for each 64 numbers.
pub struct Coded<'a> {
    /// (1, ⌈numbers/2⌉): the earlier of two in the high half.
    pub codes: &'a Tensor,
    /// f32: the 16 levels, and from element 16 on the 256 of absmax, where it is nested; the same for all parts of a layer.
    pub tables: &'a Tensor,
    /// (1, blocks): f32, or bytes where it is nested.
    pub absmax: &'a Tensor,
    /// (1, ⌈blocks/256⌉) and (1, 1): absmax = table\[code\]·nested + offset.
    pub nested: Option<(&'a Tensor, &'a Tensor)>,
    /// The original's type, which numbers are rounded to where the matrix is written out.
    pub dtype: DType,
}

impl Coded<'_> {
    /// A type as kernels/codes.cuh counts them.
    pub fn round_to(dtype: DType) -> usize {
        match dtype {
            DType::F16 => 1,
            DType::BF16 => 2,
            _ => 0,
        }
    }
}

/// What becomes of a row before it is multiplied.
#[derive(Clone, Copy)]
pub(crate) enum RowSource<'a> {
    Plain,
    Normed(&'a Norm),
    /// act(gate)·up
    Activated(&'a Mlp),
}

/// A part as the kernels take it.
struct RowPart<'a> {
    weight: StoredRows<'a>,
    rows: usize,
    low_rank: Option<LowRank<'a>>,
    bias: Option<&'a Tensor>,
}

impl Linear {
    /// Whether [`Linear::row`] takes such activations.
    pub(crate) fn takes_row(&self, ctx: &Context, like: &Tensor) -> bool {
        self.row_parts(ctx, like).is_some()
    }

    fn row_parts(&self, ctx: &Context, like: &Tensor) -> Option<Vec<RowPart<'_>>> {
        if self.parts.len() > PARTS {
            return None;
        }
        let parts: Option<Vec<_>> = self.parts.iter().map(|part| row_part(ctx, part)).collect();
        let parts = parts?;
        takes(&parts, self.cols(), like).then_some(parts)
    }

    /// y (1, output) = W·x′ + adapters + bias, or added to a row: `row + scale·y`.
    ///
    /// # Errors
    /// When [`Linear::takes_row`] says no, or shapes don't fit.
    pub(crate) fn row(
        &self,
        ctx: &Context,
        x: &Tensor,
        source: RowSource<'_>,
        join: Option<(&Tensor, f64)>,
    ) -> Result<Tensor> {
        let parts =
            self.row_parts(ctx, x).ok_or_else(|| Error::msg("no kernel takes this layer row by row"))?;
        let cols = self.cols();
        let wide = matches!(source, RowSource::Activated(mlp) if mlp.gated());
        if x.rows() != 1 || x.cols() < if wide { 2 * cols } else { cols } {
            return Error::check_shape("a row", (1, cols), x.shape())
                .and(Err(Error::msg("a row is too short")));
        }
        let (prepared, low) = prepare(x, source, cols, &parts)?;
        product(prepared.as_ref().unwrap_or(x), cols, low.as_ref(), join, &parts)
    }
}

/// Whether [`plain_row`] takes a weight.
pub(crate) fn takes_plain(weight: &dyn Weight, like: &Tensor) -> bool {
    plain_part(weight).is_some_and(|part| takes(&[part], weight.cols(), like))
}

/// norm(x)·Wᵀ (1, output), without adapters.
pub(crate) fn plain_row(weight: &dyn Weight, x: &Tensor, norm: Option<&Norm>) -> Result<Tensor> {
    let part = plain_part(weight).ok_or_else(|| Error::msg("no kernel takes this weight row by row"))?;
    let cols = weight.cols();
    let prepared = norm.map(|norm| prepare(x, RowSource::Normed(norm), cols, &[])).transpose()?;
    let prepared = prepared.and_then(|(prepared, _)| prepared);
    product(prepared.as_ref().unwrap_or(x), cols, None, None, &[part])
}

fn plain_part(weight: &dyn Weight) -> Option<RowPart<'_>> {
    Some(RowPart { weight: weight.stored_rows()?, rows: weight.rows(), low_rank: None, bias: None })
}

/// Where a sequence stands that grows by a token a time, on a GPU: then what is launched for a token is the same
/// for each.
#[derive(Debug)]
pub struct RowState {
    /// (1, 1), u32: the token that comes next.
    pub token: Tensor,
    /// (1, 1), u32: its position.
    pub position: Tensor,
    /// (1, 4), u32: zeros, where the search for the next token is.
    search: Tensor,
}

impl RowState {
    /// Of a token at a position that are written later.
    ///
    /// # Errors
    /// When the device has no room.
    pub fn new(device: &Device) -> Result<RowState> {
        let words = |count| Tensor::from_vec(1, count, vec![0u32; count])?.to_device(device);
        Ok(RowState { token: words(1)?, position: words(1)?, search: words(4)? })
    }

    /// The first of the largest logits (1, V) becomes the token, at the next position.
    ///
    /// # Errors
    /// When the launch fails.
    pub fn go_on(&self, logits: &Tensor) -> Result<()> {
        let launch = on_gpu(logits)?.kernel(MODULE, "row_next", logits.dtype())?.early();
        let launch = launch.grid(NEXT_BLOCKS, NEXT_BLOCK).tensor(&self.token).tensor(&self.position);
        // SAFETY: row_next(token, position, search, x, n)
        unsafe { launch.tensor(&self.search).tensor(logits).int(logits.cols()).run() }
    }
}

fn row_part<'a>(ctx: &Context, part: &'a Part) -> Option<RowPart<'a>> {
    let low_rank = match &part.adapter {
        Some(adapter) if ctx.adapters => Some(adapter.low_rank(ctx)?),
        _ => None,
    };
    let (weight, rows) = (part.weight.stored_rows()?, part.weight.rows());
    Some(RowPart { weight, rows, low_rank, bias: part.bias.as_deref() })
}

/// Whether the kernels take these parts for activations of this kind.
fn takes(parts: &[RowPart<'_>], cols: usize, like: &Tensor) -> bool {
    let Some(gpu) = like.gpu() else { return false };
    let (coded, columns) = match parts.first().map(|it| &it.weight) {
        Some(StoredRows::Coded(_)) => (true, CODED_COLUMNS),
        _ => (false, COLUMNS),
    };
    let fits = match coded {
        true => CodedGrid::new(gpu, like.dtype(), cols, parts).is_ok_and(|it| it.is_some()),
        false => cols * like.dtype().size_in_bytes() <= gpu.shared_of_block,
    };
    if cols == 0 || !cols.is_multiple_of(columns) || !fits {
        return false;
    }
    let form = |part: &RowPart<'_>| match &part.weight {
        StoredRows::Plain(_) => None,
        StoredRows::Coded(coded) => Some(coded.nested.is_some()),
    };
    let scaling = |part: &RowPart<'_>| part.low_rank.as_ref().map(|it| it.scaling);
    let first = parts.iter().find_map(scaling);
    parts.iter().all(|part| {
        let stored = match &part.weight {
            StoredRows::Plain(value) => value.dtype() == like.dtype(),
            StoredRows::Coded(_) => true,
        };
        let low_rank = part.low_rank.as_ref().is_none_or(|it| {
            let rank = it.a.rows();
            (it.a.shape(), it.b.shape()) == ((rank, cols), (part.rows, rank)) && Some(it.scaling) == first
        });
        stored && low_rank && form(part) == form(&parts[0])
    })
}

/// x′, unless it is x itself, and low, unless there are no adapters.
fn prepare(
    x: &Tensor,
    source: RowSource<'_>,
    cols: usize,
    parts: &[RowPart<'_>],
) -> Result<(Option<Tensor>, Option<Tensor>)> {
    let ranks = |i: usize| parts.get(i).and_then(|it| Some(it.low_rank.as_ref()?.a.rows())).unwrap_or(0);
    let all: usize = (0..PARTS).map(ranks).sum();
    if all == 0 && matches!(source, RowSource::Plain) {
        return Ok((None, None));
    }
    let low = (all > 0).then(|| Tensor::empty(1, all, DType::F32, &x.device())).transpose()?;
    let prepared = match source {
        RowSource::Plain => None,
        _ => Some(x.empty_like(1, cols)?),
    };
    let launch = on_gpu(x)?.kernel(MODULE, "row_prepare", x.dtype())?.early();
    let launch = launch.grid(all.max(1), PREPARE_BLOCK);
    let launch = launch.optional(prepared.as_ref()).optional(low.as_ref()).tensor(x);
    let launch = match source {
        RowSource::Plain => launch.int(0).word(0).word(0).float(0.0).flag(false).flag(false).int(0),
        RowSource::Normed(norm) => {
            Error::check_shape("a norm's weight", (1, cols), norm.weight.shape())?;
            let launch = launch.int(1).tensor(&norm.weight).optional(norm.bias.as_deref()).float(norm.eps);
            launch.flag(norm.kind == NormKind::Layer).flag(false).int(0)
        }
        RowSource::Activated(mlp) => {
            let launch = launch.int(2).word(0).word(0).float(0.0).flag(false).flag(mlp.gated());
            launch.flag(mlp.activation == Activation::GeluTanh)
        }
    };
    let low_rank = |i: usize| parts.get(i).and_then(|it| it.low_rank.as_ref());
    let scaling = (0..PARTS).find_map(|i| Some(low_rank(i)?.scaling)).unwrap_or(0.0);
    let launch = launch.int(cols).float(scaling);
    let launch = (0..PARTS).fold(launch, |it, i| it.optional(low_rank(i).map(|it| it.a)));
    // SAFETY: row_prepare(out, low, x, source, weight, bias, eps, centered, gated, kind, cols, scaling, a0 … a2,
    // rank0 … rank2); `takes` has seen that the shapes fit.
    unsafe { (0..PARTS).fold(launch, |it, i| it.int(ranks(i))).run() }?;
    Ok((prepared, low))
}

/// y (1, rows of all parts)
fn product(
    x: &Tensor,
    cols: usize,
    low: Option<&Tensor>,
    join: Option<(&Tensor, f64)>,
    parts: &[RowPart<'_>],
) -> Result<Tensor> {
    let rows: usize = parts.iter().map(|it| it.rows).sum();
    if let Some((row, _)) = join {
        Error::check_shape("the row that a product is added to", (1, rows), row.shape())?;
    }
    let tables = match parts.first().map(|it| &it.weight) {
        Some(StoredRows::Coded(coded)) => Some(coded.tables),
        _ => None,
    };
    let (gpu, y) = (on_gpu(x)?, x.empty_like(1, rows)?);
    let (add, scale) = join.map_or((None, 1.0), |(row, scale)| (Some(row), scale));
    let launch = match tables {
        Some(tables) => {
            let none = || Error::msg("no kernel takes a row of this length");
            let grid = CodedGrid::new(gpu, x.dtype(), cols, parts)?.ok_or_else(none)?;
            let launch = gpu.kernel(MODULE, CODED, x.dtype())?.early().grid(grid.blocks, grid.threads);
            let launch =
                launch.shared(grid.shared).tensor(&y).tensor(x).optional(low).optional(add).float(scale);
            launch.tensor(tables).int(cols).int(grid.rows_per_block).int(grid.tiles)
        }
        None => {
            let facts = gpu.launch_facts(MODULE, PLAIN, x.dtype())?;
            let units: usize = parts.iter().map(|it| it.rows.div_ceil(facts.rows)).sum();
            let blocks = units.div_ceil(facts.threads as usize / 32);
            let launch = gpu.kernel(MODULE, PLAIN, x.dtype())?.early();
            let launch = launch.grid(blocks.min(gpu.multiprocessors * BLOCKS_AT_ONCE), facts.threads);
            let launch = launch.shared(cols * x.dtype().size_in_bytes()).tensor(&y).tensor(x);
            launch.optional(low).optional(add).float(scale).int(cols)
        }
    };
    // SAFETY: row_product_coded(y, x, low, add, scale, levels, cols, rows_per_block, tiles, parts) or
    // row_product_plain(y, x, low, add, scale, cols, parts), and for each part weight, absmax, nested, offset, map,
    // b, bias, rows, rank; `takes` has seen that the shapes fit.
    unsafe { (0..PARTS).fold(launch, |launch, i| part_arguments(launch, parts.get(i))).run() }?;
    Ok(y)
}

/// How a product of codes is spread over a card.
struct CodedGrid {
    blocks: usize,
    threads: u32,
    shared: usize,
    rows_per_block: usize,
    /// Warps that have a row's columns.
    tiles: usize,
}

impl CodedGrid {
    /// None where a row doesn't fit into shared memory.
    fn new(gpu: &Gpu, dtype: DType, cols: usize, parts: &[RowPart<'_>]) -> Result<Option<CodedGrid>> {
        // Its rows are the columns that a warp has of a row, its bytes those that the kernel declares.
        let facts = gpu.launch_facts(MODULE, CODED, dtype)?;
        let (warps, chunks) = (facts.threads as usize / 32, cols.div_ceil(facts.rows).max(1));
        let tiles = chunks.div_ceil(chunks.div_ceil(warps));
        let groups = warps / tiles;
        let row = chunks * facts.rows * dtype.size_in_bytes();
        let sums = (tiles + 1) * size_of::<f32>();
        let most = gpu.shared_of_block.saturating_sub(facts.shared + row) / sums;
        if most < groups {
            return Ok(None);
        }
        let blocks = |rows: usize| parts.iter().map(|it| it.rows.div_ceil(rows)).sum::<usize>();
        // As few as let all blocks run at once, one on each multiprocessor.
        let all: usize = parts.iter().map(|it| it.rows).sum();
        let even = all.div_ceil(gpu.multiprocessors).max(1);
        let fitting = (even..=2 * even).find(|rows| blocks(*rows) <= gpu.multiprocessors);
        let rows_per_block = fitting.unwrap_or(even).min(most).min(MOST_ROWS);
        Ok(Some(CodedGrid {
            blocks: blocks(rows_per_block),
            threads: (groups * tiles * 32) as u32,
            shared: row + sums * rows_per_block,
            rows_per_block,
            tiles,
        }))
    }
}

fn part_arguments<'a>(launch: Launch<'a>, part: Option<&RowPart<'_>>) -> Launch<'a> {
    let Some(part) = part else {
        return (0..9).fold(launch, |launch, _| launch.word(0));
    };
    let launch = match &part.weight {
        StoredRows::Plain(value) => launch.tensor(value).word(0).word(0).word(0).word(0),
        StoredRows::Coded(Coded { codes, tables, absmax, nested, .. }) => {
            let launch = launch.tensor(codes).tensor(absmax);
            match nested {
                Some((scales, offset)) => launch.tensor(scales).tensor(offset).tensor_at(tables, 16),
                None => launch.word(0).word(0).word(0),
            }
        }
    };
    let launch = launch.optional(part.low_rank.as_ref().map(|it| it.b)).optional(part.bias);
    launch.int(part.rows).int(part.low_rank.as_ref().map_or(0, |it| it.a.rows()))
}

fn on_gpu(x: &Tensor) -> Result<&Gpu> {
    x.gpu().map(|gpu| &**gpu).ok_or_else(|| Error::msg("the row is not on a GPU"))
}
