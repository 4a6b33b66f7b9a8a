//! Matrix products: `c = alpha·a·b + beta·c`.
//!
//! Operands are views with strides, so that parts of stacked outputs and transposes need no copy.
//! The right operand may also be a [`Tiles`], a matrix that can only write out pieces of itself
//! (a quantised weight): it is never whole in memory.

use std::ops::Range;

use crate::tensor::Real;

/// How exactly products are computed on the CPU. Sums are always kept in f32 (or f64).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Precision {
    /// Operands as they are.
    Full,
    /// f32 operands are rounded to bf16 first, where the CPU multiplies these faster.
    Bf16,
}

/// A matrix that is read.
#[derive(Clone, Copy, Debug)]
pub struct Matrix<'a, T> {
    /// Element (r, c) is at `r · row_stride + c · col_stride`.
    pub data: &'a [T],
    /// Rows.
    pub rows: usize,
    /// Columns.
    pub cols: usize,
    /// From one row to the next, in elements.
    pub row_stride: usize,
    /// From one column to the next, in elements.
    pub col_stride: usize,
}

impl<'a, T> Matrix<'a, T> {
    /// A contiguous matrix, row after row.
    pub fn new(data: &'a [T], rows: usize, cols: usize) -> Matrix<'a, T> {
        assert!(data.len() >= rows * cols);
        Matrix { data, rows, cols, row_stride: cols, col_stride: 1 }
    }

    /// Rows and columns exchanged.
    pub fn transposed(self) -> Matrix<'a, T> {
        Matrix {
            rows: self.cols,
            cols: self.rows,
            row_stride: self.col_stride,
            col_stride: self.row_stride,
            ..self
        }
    }

    /// Some of the columns.
    pub fn columns(self, cols: Range<usize>) -> Matrix<'a, T> {
        assert!(cols.end <= self.cols);
        let start = (cols.start * self.col_stride).min(self.data.len());
        Matrix { data: &self.data[start..], cols: cols.len(), ..self }
    }

    /// Some of the rows.
    pub fn rows(self, rows: Range<usize>) -> Matrix<'a, T> {
        assert!(rows.end <= self.rows);
        let start = (rows.start * self.row_stride).min(self.data.len());
        Matrix { data: &self.data[start..], rows: rows.len(), ..self }
    }
}

/// A matrix that is written.
#[derive(Debug)]
pub struct MatrixMut<'a, T> {
    /// Element (r, c) is at `r · row_stride + c`.
    pub data: &'a mut [T],
    /// Rows.
    pub rows: usize,
    /// Columns.
    pub cols: usize,
    /// From one row to the next, in elements.
    pub row_stride: usize,
}

impl<'a, T> MatrixMut<'a, T> {
    /// A contiguous matrix, row after row.
    pub fn new(data: &'a mut [T], rows: usize, cols: usize) -> MatrixMut<'a, T> {
        assert!(data.len() >= rows * cols);
        MatrixMut { data, rows, cols, row_stride: cols }
    }

    /// Some of the columns.
    pub fn columns(self, cols: Range<usize>) -> MatrixMut<'a, T> {
        assert!(cols.end <= self.cols);
        let start = cols.start.min(self.data.len());
        MatrixMut { data: &mut self.data[start..], cols: cols.len(), ..self }
    }
}

/// A matrix that writes out any piece of itself: weights in few bits, or in another type.
pub trait Tiles: Sync {
    /// Rows.
    fn rows(&self) -> usize;
    /// Columns.
    fn cols(&self) -> usize;
    /// Writes the piece row after row: element (r, c) goes to
    /// `out[(r − rows.start) · cols.len() + (c − cols.start)]`.
    fn read(&self, rows: Range<usize>, cols: Range<usize>, out: &mut [f32]);
}

/// `c = alpha·a·b + beta·c` on all cores. With `beta` 0, what `c` held is not read.
pub fn matmul<T: Real>(
    precision: Precision,
    alpha: T,
    a: Matrix<'_, T>,
    b: Matrix<'_, T>,
    beta: T,
    c: MatrixMut<'_, T>,
) {
    let _ = precision;
    with_gemm(alpha, a, b, beta, c, gemm::Parallelism::Rayon(0));
}

/// [`matmul`] on the calling thread alone, for many small products side by side.
pub fn matmul_serial<T: Real>(
    precision: Precision,
    alpha: T,
    a: Matrix<'_, T>,
    b: Matrix<'_, T>,
    beta: T,
    c: MatrixMut<'_, T>,
) {
    let _ = precision;
    with_gemm(alpha, a, b, beta, c, gemm::Parallelism::None);
}

/// `c = alpha·a·w + beta·c`, or with `transposed` `c = alpha·a·wᵀ + beta·c`, on all cores.
/// `w` is read piece by piece into reused buffers.
pub fn matmul_tiles(
    precision: Precision,
    alpha: f32,
    a: Matrix<'_, f32>,
    w: &dyn Tiles,
    transposed: bool,
    beta: f32,
    c: MatrixMut<'_, f32>,
) {
    let (rows, cols) = (w.rows(), w.cols());
    let mut dense = vec![0.0; rows * cols];
    w.read(0..rows, 0..cols, &mut dense);
    let w = Matrix::new(&dense, rows, cols);
    matmul(precision, alpha, a, if transposed { w.transposed() } else { w }, beta, c);
}

fn with_gemm<T: Real>(
    alpha: T,
    a: Matrix<'_, T>,
    b: Matrix<'_, T>,
    beta: T,
    c: MatrixMut<'_, T>,
    parallelism: gemm::Parallelism,
) {
    assert_eq!((a.rows, a.cols, b.cols), (c.rows, b.rows, c.cols), "shapes of a product");
    if c.rows == 0 || c.cols == 0 {
        return;
    }
    let last =
        |rows: usize, cols: usize, rs: usize, cs: usize| (rows.max(1) - 1) * rs + (cols.max(1) - 1) * cs;
    assert!(a.data.len() > last(a.rows, a.cols, a.row_stride, a.col_stride) || a.cols == 0);
    assert!(b.data.len() > last(b.rows, b.cols, b.row_stride, b.col_stride) || b.rows == 0);
    assert!(c.data.len() > last(c.rows, c.cols, c.row_stride, 1));
    // SAFETY: every element that the strides reach lies inside its slice, as asserted above, and
    // `c` is borrowed exclusively.
    unsafe {
        gemm::gemm(
            c.rows,
            c.cols,
            a.cols,
            c.data.as_mut_ptr(),
            1,
            c.row_stride as isize,
            beta != T::zero(),
            a.data.as_ptr(),
            a.col_stride as isize,
            a.row_stride as isize,
            b.data.as_ptr(),
            b.col_stride as isize,
            b.row_stride as isize,
            beta,
            alpha,
            false,
            false,
            false,
            parallelism,
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random::{Counter, uniform};

    #[test]
    fn strided_products_equal_plain_loops() {
        let (m, k, n) = (7, 33, 19);
        let a = uniform(Counter::new(&[1]), 1.0, m * k);
        let b = uniform(Counter::new(&[2]), 1.0, n * k);
        let mut c = vec![1.0f32; m * (n + 3)];
        let out = MatrixMut::new(&mut c, m, n + 3).columns(2..n + 2);
        let (a, b) = (Matrix::new(&a, m, k), Matrix::new(&b, n, k));
        matmul(Precision::Full, 2.0, a, b.transposed(), 0.5, out);
        for i in 0..m {
            for j in 0..n {
                let sum: f32 = (0..k).map(|p| a.data[i * k + p] * b.data[j * k + p]).sum();
                assert!((c[i * (n + 3) + j + 2] - (2.0 * sum + 0.5)).abs() < 1e-5);
            }
            assert_eq!((c[i * (n + 3)], c[i * (n + 3) + n + 2]), (1.0, 1.0));
        }
    }
}
