//! Products with very few rows, as in generating text: each row of `w` is read once, straight
//! through, and multiplied into sums for all rows of `a`. Nothing is packed; memory sets the speed.

use std::arch::x86_64::*;

use rayon::prelude::*;

use super::blocked::{Right, Target};
use super::kernel_avx512::lanes;
use super::scratch::{self, lend};
use super::{Matrix, MatrixMut};

/// Most rows of `a`.
pub(super) const ROWS: usize = 4;
/// Rows of `w` whose sums run side by side.
const SIDE: usize = 4;
/// Numbers of `w` that are written out at once: they stay in the L1 cache.
const PIECE: usize = 6 * 1024;

/// Whether [`product`] takes these operands: both must lie along k.
pub(super) fn takes(a: &Matrix<'_, f32>, b: &Right<'_>) -> bool {
    let along = match b {
        Right::Dense(b) => b.row_stride == 1,
        Right::Tiles { transposed, .. } => *transposed,
    };
    along && a.rows <= ROWS && (a.col_stride == 1 || a.cols == 1)
}

/// `c = alpha·a·b + beta·c` on a CPU with AVX-512.
pub(super) fn product(
    alpha: f32,
    a: Matrix<'_, f32>,
    b: Right<'_>,
    beta: f32,
    c: MatrixMut<'_, f32>,
    threads: usize,
) {
    let (k, n) = (a.cols, c.cols);
    let target = Target(c.data.as_mut_ptr(), c.row_stride);
    let part = |part: usize| {
        let (mut row, end) = (n * part / threads, n * (part + 1) / threads);
        while row < end {
            let count = (end - row).min((PIECE / k).next_multiple_of(SIDE).max(SIDE));
            let c = target.columns_from(row);
            match b {
                Right::Dense(b) => {
                    let w = b.data[row * b.col_stride..].as_ptr();
                    // SAFETY: the rows exist in `b`, and their sums are this part's alone.
                    unsafe { sums(alpha, &a, (w, b.col_stride), count, beta, c) };
                }
                Right::Tiles { w, .. } => lend(&scratch::PIECE, count * k, |piece| {
                    let piece = &mut piece[..count * k];
                    w.read(row..row + count, 0..k, piece);
                    // SAFETY: the rows are in `piece`, and their sums are this part's alone.
                    unsafe { sums(alpha, &a, (piece.as_ptr(), k), count, beta, c) };
                }),
            }
            row += count;
        }
    };
    if threads == 1 { part(0) } else { (0..threads).into_par_iter().with_max_len(1).for_each(part) }
}

/// `c = alpha·a·wᵀ + beta·c` for so many rows of `w`, which are a step apart.
///
/// # Safety
/// The CPU has AVX-512F, the rows of `w` can be read, and so many columns of `c` written.
#[target_feature(enable = "avx512f")]
unsafe fn sums(
    alpha: f32,
    a: &Matrix<'_, f32>,
    (w, step): (*const f32, usize),
    count: usize,
    beta: f32,
    c: Target,
) {
    let mut row = 0;
    while row < count {
        let side = (count - row).min(SIDE);
        let w = (w.wrapping_add(row * step), step);
        // SAFETY: the caller's; no more rows are read than there are.
        let sums = unsafe {
            match (a.rows, side) {
                (1, SIDE) => dots::<1, SIDE>(a, w),
                (2, SIDE) => dots::<2, SIDE>(a, w),
                (3, SIDE) => dots::<3, SIDE>(a, w),
                (_, SIDE) => dots::<4, SIDE>(a, w),
                (1, _) => dots::<1, 1>(a, w),
                (2, _) => dots::<2, 1>(a, w),
                (3, _) => dots::<3, 1>(a, w),
                _ => dots::<4, 1>(a, w),
            }
        };
        let side = if side == SIDE { SIDE } else { 1 };
        for (i, sums) in sums.iter().enumerate().take(a.rows) {
            for (j, sum) in sums.iter().enumerate().take(side) {
                // SAFETY: the caller's.
                unsafe {
                    let c = c.0.wrapping_add(i * c.1 + row + j);
                    *c = if beta == 0.0 { alpha * sum } else { alpha * sum + beta * *c };
                }
            }
        }
        row += side;
    }
}

/// The dot products of M rows of `a` and N of `w`. Each has one running sum, so that it doesn't
/// matter which others are computed beside it.
///
/// # Safety
/// As [`sums`]; `a` has M rows.
#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn dots<const M: usize, const N: usize>(
    a: &Matrix<'_, f32>,
    (w, step): (*const f32, usize),
) -> [[f32; SIDE]; ROWS] {
    let mut acc = [[_mm512_setzero_ps(); N]; M];
    let x = a.data.as_ptr();
    let mut p = 0;
    while p < a.cols {
        let mask = lanes(a.cols - p);
        let ws: [__m512; N] = std::array::from_fn(|j| {
            // SAFETY: the mask keeps to the depth that exists.
            unsafe { _mm512_maskz_loadu_ps(mask, w.wrapping_add(j * step + p)) }
        });
        for (i, acc) in acc.iter_mut().enumerate() {
            // SAFETY: the same.
            let x = unsafe { _mm512_maskz_loadu_ps(mask, x.wrapping_add(i * a.row_stride + p)) };
            for (acc, w) in acc.iter_mut().zip(ws) {
                *acc = _mm512_fmadd_ps(x, w, *acc);
            }
        }
        p += 16;
    }
    let mut sums = [[0.0; SIDE]; ROWS];
    for (sums, acc) in sums.iter_mut().zip(acc) {
        for (sum, acc) in sums.iter_mut().zip(acc) {
            *sum = _mm512_reduce_add_ps(acc);
        }
    }
    sums
}
