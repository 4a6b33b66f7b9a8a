//! Products through the `gemm` crate: f64, and f32 on CPUs that we have no kernels for.

use std::ops::Range;

use rayon::prelude::*;

use super::scratch::{self, lend};
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

/// Most rows of `a` with which each row of a [`Tiles`] is multiplied as soon as it is written out, as in generating text.
const FEW_ROWS: usize = 4;

/// `c = alpha·a·wᵀ + beta·c` for few rows of `a`: what `w` writes out stays in the L1 cache.
pub(super) fn few_rows(
    alpha: f32,
    a: Matrix<'_, f32>,
    w: &dyn Tiles,
    beta: f32,
    c: MatrixMut<'_, f32>,
    threads: usize,
) {
    let (k, n) = (a.cols, w.rows());
    if n == 0 {
        return;
    }
    let lines = n.div_ceil(threads * 4);
    let part = |(index, sums): (usize, &mut [f32])| {
        lend(&scratch::PIECE, k, |row| {
            for (line, sums) in sums.chunks_mut(a.rows).enumerate() {
                let line = index * lines + line;
                w.read(line..line + 1, 0..k, &mut row[..k]);
                for (i, sum) in sums.iter_mut().enumerate() {
                    *sum = alpha * dot(&a.data[i * a.row_stride..][..k], &row[..k]);
                }
            }
        });
    };
    lend(&scratch::LEFT, n * a.rows, |sums| {
        let sums = &mut sums[..n * a.rows];
        match threads {
            1 => sums.chunks_mut(lines * a.rows).enumerate().for_each(part),
            _ => sums.par_chunks_mut(lines * a.rows).enumerate().for_each(part),
        }
        for (i, c) in c.data.chunks_mut(c.row_stride).take(a.rows).enumerate() {
            for (c, sums) in c[..n].iter_mut().zip(sums.chunks(a.rows)) {
                *c = if beta == 0.0 { sums[i] } else { sums[i] + beta * *c };
            }
        }
    });
}

/// Whether [`few_rows`] takes this left operand.
pub(super) fn is_few(a: &Matrix<'_, f32>) -> bool {
    (1..=FEW_ROWS).contains(&a.rows) && (a.col_stride == 1 || a.cols == 1)
}

/// A matrix whose rows are each in one piece, as a [`Tiles`].
pub(super) struct Lines<'a>(pub(super) Matrix<'a, f32>);

impl Tiles for Lines<'_> {
    fn rows(&self) -> usize {
        self.0.rows
    }

    fn cols(&self) -> usize {
        self.0.cols
    }

    fn read(&self, rows: Range<usize>, cols: Range<usize>, out: &mut [f32]) {
        for (row, out) in rows.zip(out.chunks_mut(cols.len())) {
            out.copy_from_slice(&self.0.data[row * self.0.row_stride..][cols.clone()]);
        }
    }
}

/// Sixteen sums side by side, which a compiler keeps in registers of any width.
fn dot(a: &[f32], b: &[f32]) -> f32 {
    const WIDTH: usize = 16;
    let mut sums = [0.0; WIDTH];
    let (a, b) = (a.chunks_exact(WIDTH), b.chunks_exact(WIDTH));
    let rest: f32 = a.remainder().iter().zip(b.remainder()).map(|(a, b)| a * b).sum();
    for (a, b) in a.zip(b) {
        sums.iter_mut().zip(a.iter().zip(b)).for_each(|(sum, (a, b))| *sum += a * b);
    }
    sums.iter().sum::<f32>() + rest
}

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
    if transposed && is_few(&a) {
        return few_rows(alpha, a, w, beta, c, threads);
    }
    let (rows, cols) = (w.rows(), w.cols());
    let step = (PIECE / cols.max(1)).clamp(1, rows.max(1));
    lend(&scratch::RIGHT, step * cols, |room| {
        for start in (0..rows).step_by(step) {
            let part = start..rows.min(start + step);
            let piece = &mut room[..part.len() * cols];
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
    });
}
