//! One row through a linear layer on a GPU, for decoding: `kernels/row.cu` reads each matrix once, as it is
//! stored. What makes a row also does the first half of the adapters that read it, so that a product of codes is one launch:
//! the norm before it, both halves of the adapters, the sum with the residual stream or the gate. Elsewhere it is two: what
//! comes before the product with the adapters' first half, then the product.

mod product;

use ferrotune_tensor::{DType, Device, Error, Gpu, Result, Tensor};

use crate::linear::Part;
use crate::mlp::{Activation, Mlp};
use crate::norm::NormKind;
use crate::{Context, Linear, LowRank, Norm, Weight};
use product::{CodedGrid, Halves, Input, product};

/// The kernels' file.
const MODULE: &str = "row";
/// Parts that the kernels take: q, k and v.
const PARTS: usize = 3;
/// Rows are multiples of this, so that all accesses are whole; those of codes of that.
const COLUMNS: usize = 32;
const CODED_COLUMNS: usize = 64;
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
}

/// A row (1, C) of activations, with what is known of what reads it next.
pub struct Row {
    /// The numbers.
    pub value: Tensor,
    /// (R, blocks) in f32: what each block that made some of the row adds to A·row, of the adapters of who reads
    /// it next; each number times its norm's weight, if there is one.
    pub(crate) shares: Option<Tensor>,
}

impl From<Tensor> for Row {
    fn from(value: Tensor) -> Row {
        Row { value, shares: None }
    }
}

/// Who reads a row next, so that the launch that makes the row also does the first half of its adapters.
#[derive(Clone, Copy)]
pub struct Reader<'a> {
    /// What multiplies the row.
    pub linear: &'a Linear,
    /// What comes before that.
    pub norm: Option<&'a Norm>,
}

/// What becomes of a row before it is multiplied.
#[derive(Clone, Copy)]
pub(crate) enum RowSource<'a> {
    Plain,
    Normed(&'a Norm),
    /// act(gate)·up
    Activated(&'a Mlp),
}

/// What becomes of a product W·x′ + adapters + bias.
#[derive(Clone, Copy)]
pub(crate) enum RowOutput<'a> {
    Plain,
    /// row + scale·product
    Joined(&'a Tensor, f64),
    /// act(gate)·up, where these are the two parts: see [`Linear::gates_row`].
    Gated(Activation),
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

    /// Whether [`Linear::row`] has an output that is [`RowOutput::Gated`].
    pub(crate) fn gates_row(&self, ctx: &Context, like: &Tensor) -> bool {
        let Some((parts, gpu)) = self.row_parts(ctx, like).zip(like.gpu()) else { return false };
        let same = parts.len() == 2 && parts[0].rows == parts[1].rows;
        same && is_coded(&parts)
            && CodedGrid::new(gpu, like.dtype(), self.cols(), &parts, Halves::Two, 0)
                .is_ok_and(|it| it.is_some())
    }

    /// What becomes of W·x′ + adapters + bias, (1, output).
    ///
    /// # Errors
    /// When [`Linear::takes_row`] says no, or shapes don't fit.
    pub(crate) fn row(
        &self,
        ctx: &Context,
        x: &Row,
        source: RowSource<'_>,
        output: RowOutput<'_>,
        next: Option<Reader<'_>>,
    ) -> Result<Row> {
        let Row { value, shares } = x;
        let parts =
            self.row_parts(ctx, value).ok_or_else(|| Error::msg("no kernel takes this layer row by row"))?;
        let cols = self.cols();
        let wide = matches!(source, RowSource::Activated(mlp) if mlp.gated());
        if value.rows() != 1 || value.cols() < if wide { 2 * cols } else { cols } {
            return Error::check_shape("a row", (1, cols), value.shape())
                .and(Err(Error::msg("a row is too short")));
        }
        let next = next.and_then(|reader| FirstHalf::of(ctx, reader, value));
        let ranks: usize = parts.iter().map(RowPart::rank).sum();
        let norm = match source {
            RowSource::Plain => Some(None),
            RowSource::Normed(norm) => is_plain_rms(norm).then_some(Some(norm)),
            RowSource::Activated(_) => None,
        };
        // A product of codes normalises x by itself, if it need not be normalised for the adapters before.
        if let (true, Some(norm)) = (is_coded(&parts) && (ranks == 0 || shares.is_some()), norm) {
            if let Some(norm) = norm {
                Error::check_shape("a norm's weight", (1, cols), norm.weight.shape())?;
            }
            let scaling = parts.iter().find_map(|it| Some(it.low_rank.as_ref()?.scaling));
            let input = Input { x: value, norm, low: shares.as_ref(), low_scale: scaling.unwrap_or(1.0) };
            return product(input, cols, output, &parts, next);
        }
        let (prepared, low) = prepare(value, source, cols, &parts)?;
        let x = prepared.as_ref().unwrap_or(value);
        product(Input { x, norm: None, low: low.as_ref(), low_scale: 1.0 }, cols, output, &parts, next)
    }
}

impl RowPart<'_> {
    fn rank(&self) -> usize {
        self.low_rank.as_ref().map_or(0, |it| it.a.rows())
    }
}

fn is_coded(parts: &[RowPart<'_>]) -> bool {
    matches!(parts.first().map(|it| &it.weight), Some(StoredRows::Coded(_)))
}

/// A norm that a product does by itself.
fn is_plain_rms(norm: &Norm) -> bool {
    norm.kind == NormKind::Rms && norm.bias.is_none()
}

/// The adapters' first halves of who reads a row.
pub(crate) struct FirstHalf<'a> {
    /// A (R, C) of each part.
    pub(crate) a: [Option<&'a Tensor>; PARTS],
    norm: Option<&'a Norm>,
    pub(crate) ranks: usize,
}

impl<'a> FirstHalf<'a> {
    /// None where the reader would not use it.
    pub(crate) fn of(ctx: &Context, reader: Reader<'a>, like: &Tensor) -> Option<FirstHalf<'a>> {
        let parts = reader.linear.row_parts(ctx, like)?;
        let ranks = parts.iter().map(RowPart::rank).sum();
        let usable = is_coded(&parts) && ranks > 0 && reader.norm.is_none_or(is_plain_rms);
        let mut a = [None; PARTS];
        for (a, part) in a.iter_mut().zip(&parts) {
            *a = part.low_rank.as_ref().map(|it| it.a);
        }
        usable.then_some(FirstHalf { a, norm: reader.norm, ranks })
    }

    /// Where so many blocks write their shares.
    pub(crate) fn shares(&self, blocks: usize, like: &Tensor) -> Result<Tensor> {
        Tensor::empty(self.ranks, blocks, DType::F32, &like.device())
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
    let x = prepared.as_ref().unwrap_or(x);
    Ok(product(Input { x, norm: None, low: None, low_scale: 1.0 }, cols, RowOutput::Plain, &[part], None)?
        .value)
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
        true => {
            let grid = CodedGrid::new(gpu, like.dtype(), cols, parts, Halves::One, 0);
            grid.is_ok_and(|it| it.is_some())
        }
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
    let low = (all > 0).then(|| Tensor::empty(all, 1, DType::F32, &x.device())).transpose()?;
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

fn on_gpu(x: &Tensor) -> Result<&Gpu> {
    x.gpu().map(|gpu| &**gpu).ok_or_else(|| Error::msg("the row is not on a GPU"))
}
