//! The product of a row, and how it is spread over a card.

use ferrotune_tensor::{DType, Error, Gpu, Launch, Result, Tensor};

use super::{Coded, FirstHalf, MODULE, PARTS, Row, RowOutput, RowPart, StoredRows, on_gpu};
use crate::Norm;
use crate::mlp::Activation;

/// Its products, by how a matrix is stored.
const PLAIN: &str = "row_product_plain";
const CODED: &str = "row_product_coded";
/// Blocks of a product of plain numbers that a multiprocessor holds at once: more would copy the row again.
const BLOCKS_AT_ONCE: usize = 6;
/// Rows that a block of a product of codes does: so many at a time, and at most; their sums are in shared memory.
const CODED_ROWS: usize = 8;
const MOST_ROWS: usize = 512;

/// What a product reads.
pub(super) struct Input<'a> {
    pub(super) x: &'a Tensor,
    /// It normalises x by itself.
    pub(super) norm: Option<&'a Norm>,
    /// (R, blocks): added up, and scaled.
    pub(super) low: Option<&'a Tensor>,
    pub(super) low_scale: f64,
}

/// (1, rows of all parts), or half of them.
pub(super) fn product(
    input: Input<'_>,
    cols: usize,
    output: RowOutput<'_>,
    parts: &[RowPart<'_>],
    next: Option<FirstHalf<'_>>,
) -> Result<Row> {
    let Input { x, norm, low, low_scale } = input;
    let mut rows: usize = parts.iter().map(|it| it.rows).sum();
    let (mut halves, mut add, mut scale, mut gelu) = (Halves::One, None, 1.0, false);
    match output {
        RowOutput::Plain => {}
        RowOutput::Joined(row, by) => {
            Error::check_shape("the row that a product is added to", (1, rows), row.shape())?;
            (add, scale) = (Some(row), by);
        }
        RowOutput::Gated(activation) => {
            rows /= 2;
            (halves, gelu) = (Halves::Two, activation == Activation::GeluTanh);
        }
    }
    let tables = match parts.first().map(|it| &it.weight) {
        Some(StoredRows::Coded(coded)) => Some(coded.tables),
        _ => None,
    };
    let (gpu, y) = (on_gpu(x)?, x.empty_like(1, rows)?);
    let mut shares = None;
    let launch = match tables {
        Some(tables) => {
            let grid = |next_ranks| CodedGrid::new(gpu, x.dtype(), cols, parts, halves, next_ranks);
            // Only one row that begins with the block's can be shared out, in whole packs.
            let one = (halves == Halves::Two || parts.len() == 1) && rows.is_multiple_of(CODED_ROWS);
            let next = next.filter(|_| one);
            let (grid, next) = match next.map(|it| Ok::<_, Error>((grid(it.ranks)?, it))).transpose()? {
                Some((Some(grid), next)) => (grid, Some(next)),
                _ => {
                    let none = || Error::msg("no kernel takes a row of this length");
                    (grid(0)?.ok_or_else(none)?, None)
                }
            };
            shares = next.as_ref().map(|it| it.shares(grid.blocks, x)).transpose()?;
            let launch = gpu.kernel(MODULE, CODED, x.dtype())?.early().grid(grid.blocks, grid.threads);
            let launch = launch.shared(grid.shared).tensor(&y).tensor(x);
            let launch = launch.optional(norm.map(|it| &*it.weight)).float(norm.map_or(0.0, |it| it.eps));
            let launch = launch.optional(low).int(low.map_or(0, Tensor::cols)).float(low_scale);
            let launch = launch.optional(add).float(scale).flag(halves == Halves::Two).flag(gelu);
            let launch = launch.tensor(tables).int(cols).int(grid.rows_per_block).int(grid.tiles);
            let a = |i: usize| next.as_ref().and_then(|it| it.a[i]);
            let launch = (0..PARTS).fold(launch, |launch, i| launch.optional(a(i)));
            let launch = (0..PARTS).fold(launch, |launch, i| launch.int(a(i).map_or(0, Tensor::rows)));
            let next_norm = next.as_ref().and_then(|it| it.norm);
            launch.optional(next_norm.map(|it| &*it.weight)).optional(shares.as_ref())
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
    // SAFETY: row_product_coded(y, x, norm, eps, low, low_blocks, low_scale, add, scale, output, kind, levels, cols,
    // rows_per_block, tiles, a0 … a2, their ranks, next_norm, next_low, parts) or row_product_plain(y, x, low, add,
    // scale, cols, parts), and for each part weight, absmax, nested, offset, map, b, bias, rows, rank; `takes` has seen
    // that the shapes fit.
    unsafe { (0..PARTS).fold(launch, |launch, i| part_arguments(launch, parts.get(i))).run() }?;
    Ok(Row { value: y, shares })
}

/// Rows of a block that belong together: a gate's and those that it lets through are two times as many.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Halves {
    One,
    Two,
}

/// How a product of codes is spread over a card.
pub(super) struct CodedGrid {
    blocks: usize,
    threads: u32,
    shared: usize,
    rows_per_block: usize,
    /// Warps that have a row's columns.
    tiles: usize,
}

impl CodedGrid {
    /// None where it doesn't fit into shared memory.
    pub(super) fn new(
        gpu: &Gpu,
        dtype: DType,
        cols: usize,
        parts: &[RowPart<'_>],
        halves: Halves,
        next_ranks: usize,
    ) -> Result<Option<CodedGrid>> {
        // Its rows are the columns that a warp has of a row, its bytes those that the kernel declares.
        let facts = gpu.launch_facts(MODULE, CODED, dtype)?;
        let (warps, chunks) = (facts.threads as usize / 32, cols.div_ceil(facts.rows).max(1));
        let tiles = chunks.div_ceil(chunks.div_ceil(warps));
        let ranks: usize = parts.iter().map(RowPart::rank).sum();
        let (parts, halves) = match halves {
            Halves::One => (parts, 1),
            Halves::Two => (&parts[..1], 2),
        };
        let groups = warps / tiles / halves * halves;
        let fixed = chunks * facts.rows * dtype.size_in_bytes() + ranks * size_of::<f32>();
        let row = (tiles + 1) * halves * size_of::<f32>() + next_ranks * dtype.size_in_bytes();
        let most = gpu.shared_of_block.saturating_sub(facts.shared + fixed) / row;
        if groups == 0 || most < CODED_ROWS {
            return Ok(None);
        }
        let blocks = |rows: usize| parts.iter().map(|it| it.rows.div_ceil(rows)).sum::<usize>();
        // As few as let all blocks run at once, one on each multiprocessor.
        let all: usize = parts.iter().map(|it| it.rows).sum();
        let even = all.div_ceil(gpu.multiprocessors).max(1).next_multiple_of(CODED_ROWS);
        let fitting = (even..=2 * even).step_by(CODED_ROWS).find(|it| blocks(*it) <= gpu.multiprocessors);
        let rows_per_block = fitting.unwrap_or(even).min(most / CODED_ROWS * CODED_ROWS).min(MOST_ROWS);
        Ok(Some(CodedGrid {
            blocks: blocks(rows_per_block),
            threads: (groups * tiles * 32) as u32,
            shared: fixed + row * rows_per_block,
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
        StoredRows::Coded(Coded { codes, tables, absmax, nested }) => {
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
