//! Products of tensors, wherever they are.

use std::ops::Range;
use std::sync::Arc;

use super::{Matrix, Precision, matmul};
use crate::{DType, Element, Error, Result, Tensor, for_real};

/// An operand of a product: a tensor, or some of its rows and columns, as it is or transposed.
#[derive(Clone, Debug)]
pub struct Operand<'a> {
    tensor: &'a Tensor,
    rows: Range<usize>,
    columns: Range<usize>,
    transposed: bool,
}

impl<'a> Operand<'a> {
    /// All of a tensor.
    pub fn new(tensor: &'a Tensor) -> Operand<'a> {
        Operand::columns(tensor, 0..tensor.cols())
    }

    /// Some columns of a tensor.
    pub fn columns(tensor: &'a Tensor, columns: Range<usize>) -> Operand<'a> {
        Operand::block(tensor, 0..tensor.rows(), columns)
    }

    /// Some columns of some rows.
    pub fn block(tensor: &'a Tensor, rows: Range<usize>, columns: Range<usize>) -> Operand<'a> {
        Operand { tensor, rows, columns, transposed: false }
    }

    /// Rows and columns exchanged.
    pub fn transposed(self) -> Operand<'a> {
        Operand { transposed: !self.transposed, ..self }
    }

    fn shape(&self) -> (usize, usize) {
        let (rows, cols) = (self.rows.len(), self.columns.len());
        if self.transposed { (cols, rows) } else { (rows, cols) }
    }

    fn matrix<T: Element>(&self) -> Result<Matrix<'a, T>> {
        let matrix = self.tensor.matrix()?.rows(self.rows.clone()).columns(self.columns.clone());
        Ok(if self.transposed { matrix.transposed() } else { matrix })
    }
}

/// `c[:, columns] = alpha·a·b + beta·c[:, columns]`. With `beta` 0, what `c` held is not read. On a GPU,
/// operands are of one type and `c` is of that type or f32; sums are f32.
///
/// # Errors
/// When shapes, types or devices don't fit each other.
pub fn multiply(
    precision: Precision,
    alpha: f64,
    a: Operand<'_>,
    b: Operand<'_>,
    beta: f64,
    c: &mut Tensor,
    columns: Range<usize>,
) -> Result<()> {
    if c.gpu().is_some() {
        return multiply_on_gpu(alpha, a, b, beta, c, columns);
    }
    check(&a, &b, c, &columns)?;
    for_real!("product", c.dtype(), T => {
        let (a, b) = (a.matrix::<T>()?, b.matrix::<T>()?);
        matmul(precision, alpha as T, a, b, beta as T, c.matrix_mut::<T>()?.columns(columns));
        Ok(())
    })
}

/// [`multiply`] where `c` is on a GPU. It is written though it is shared: columns that a tensor has room
/// for beside its own may be filled while others read those, since a GPU's work runs in order.
///
/// # Errors
/// As [`multiply`].
pub fn multiply_on_gpu(
    alpha: f64,
    a: Operand<'_>,
    b: Operand<'_>,
    beta: f64,
    c: &Tensor,
    columns: Range<usize>,
) -> Result<()> {
    check(&a, &b, c, &columns)?;
    let Some(gpu) = c.gpu() else { return Err(Error::msg("the result of a product is not on a GPU")) };
    for operand in [&a, &b] {
        if !operand.tensor.gpu().is_some_and(|it| Arc::ptr_eq(it, gpu)) {
            return Err(Error::msg("operands and result of a product are on different devices"));
        }
    }
    let layout = Layout::of(a.transposed, b.transposed)?;
    let c = Operand::columns(c, columns);
    let (a, b, c) = (Placed::of(&a), Placed::of(&b), Placed::of(&c));
    gpu.multiply(&Product { layout, alpha: alpha as f32, a, b, beta: beta as f32, c })
}

fn check(a: &Operand<'_>, b: &Operand<'_>, c: &Tensor, columns: &Range<usize>) -> Result<()> {
    let ((m, k), (inner, n)) = (a.shape(), b.shape());
    Error::check_shape("right operand of a product", (k, n), (inner, n))?;
    Error::check_shape("result of a product", (m, n), (c.rows(), columns.len()))?;
    for it in [a, b, &Operand::columns(c, columns.clone())] {
        if it.rows.end > it.tensor.rows() || it.columns.end > it.tensor.cols() {
            let needed = (it.rows.end, it.columns.end);
            return Error::check_shape("an operand's part of its tensor", needed, it.tensor.shape());
        }
    }
    Ok(())
}

/// Which operand is stored the other way round.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Layout {
    /// a·b
    Nn,
    /// a·bᵀ
    Nt,
    /// aᵀ·b
    Tn,
}

impl Layout {
    fn of(a_transposed: bool, b_transposed: bool) -> Result<Layout> {
        match (a_transposed, b_transposed) {
            (false, false) => Ok(Layout::Nn),
            (false, true) => Ok(Layout::Nt),
            (true, false) => Ok(Layout::Tn),
            (true, true) => Err(Error::msg("a product of two transposed operands is not built for GPUs")),
        }
    }
}

/// `c = alpha·op(a)·op(b) + beta·c` in a card's memory.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Product {
    pub(crate) layout: Layout,
    pub(crate) alpha: f32,
    pub(crate) a: Placed,
    pub(crate) b: Placed,
    pub(crate) beta: f32,
    pub(crate) c: Placed,
}

impl Product {
    /// The length that is summed over.
    pub(crate) fn inner(&self) -> usize {
        if self.layout == Layout::Tn { self.a.rows } else { self.a.cols }
    }
}

/// A matrix in a card's memory, as stored.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Placed {
    pub(crate) address: u64,
    pub(crate) rows: usize,
    pub(crate) cols: usize,
    pub(crate) stride: usize,
    pub(crate) dtype: DType,
}

impl Placed {
    fn of(it: &Operand<'_>) -> Placed {
        let (dtype, stride) = (it.tensor.dtype(), it.tensor.cols());
        let first = it.rows.start * stride + it.columns.start;
        let address = it.tensor.device_pointer() + (first * dtype.size_in_bytes()) as u64;
        Placed { address, rows: it.rows.len(), cols: it.columns.len(), stride, dtype }
    }
}
