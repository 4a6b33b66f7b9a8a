//! Products through the `gemm` crate: f64, and f32 on CPUs that we have no kernels for.

use rayon::prelude::*;

use super::{Matrix, MatrixMut, Tiles};
use crate::tensor::Real;

/// `c = alpha·a·b + beta·c`; shapes are checked.
pub(super) fn product<T: Real>(
    alpha: T,
    a: Matrix<'_, T>,
    b: Matrix<'_, T>,
    beta: T,
    c: MatrixMut<'_, T>,
    threads: usize,
) {
    let parallelism = if threads == 1 { gemm::Parallelism::None } else { gemm::Parallelism::Rayon(threads) };
    // SAFETY: every element that the strides reach lies inside its slice, as `super::check` has
    // asserted, and `c` is borrowed exclusively.
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

/// Numbers of a [`Tiles`] that are written out at once.
const PIECE: usize = 1 << 20;

/// The same with a matrix that writes out pieces of itself: some of its rows at a time.
pub(super) fn product_tiles(
    alpha: f32,
    a: Matrix<'_, f32>,
    w: &dyn Tiles,
    transposed: bool,
    beta: f32,
    c: MatrixMut<'_, f32>,
    threads: usize,
) {
    let (rows, cols) = (w.rows(), w.cols());
    let step = (PIECE / cols.max(1)).clamp(1, rows.max(1));
    let mut piece = vec![0.0; step * cols];
    for start in (0..rows).step_by(step) {
        let part = start..rows.min(start + step);
        let piece = &mut piece[..part.len() * cols];
        let lines = part.len().div_ceil(threads).max(1);
        piece.par_chunks_mut(lines * cols).enumerate().for_each(|(index, out)| {
            let first = start + index * lines;
            w.read(first..first + out.len() / cols, 0..cols, out);
        });
        let b = Matrix::new(piece, part.len(), cols);
        let MatrixMut { rows, row_stride, .. } = c;
        let c = &mut *c.data;
        if transposed {
            let c = MatrixMut { data: c, rows, cols: w.rows(), row_stride }.columns(part);
            product(alpha, a, b.transposed(), beta, c, threads);
        } else {
            let beta = if start == 0 { beta } else { 1.0 };
            let c = MatrixMut { data: c, rows, cols, row_stride };
            product(alpha, a.columns(part), b, beta, c, threads);
        }
    }
}
