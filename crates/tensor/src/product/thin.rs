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
/// Running sums of a dot product.
const SUMS: usize = 4;
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
            let count = (end - row).min((PIECE / k).max(1));
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
    for row in 0..count {
        let w = w.wrapping_add(row * step);
        // SAFETY: the caller's.
        let sums = unsafe {
            match a.rows {
                1 => dots::<1>(a, w),
                2 => dots::<2>(a, w),
                3 => dots::<3>(a, w),
                _ => dots::<4>(a, w),
            }
        };
        for (i, sum) in sums.iter().enumerate().take(a.rows) {
            // SAFETY: the caller's.
            unsafe {
                let c = c.0.wrapping_add(i * c.1 + row);
                *c = if beta == 0.0 { alpha * sum } else { alpha * sum + beta * *c };
            }
        }
    }
}

/// The dot products of M rows of `a` and one of `w`, each in several running sums because a
/// multiply-add takes several cycles.
///
/// # Safety
/// As [`sums`]; `a` has M rows.
#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn dots<const M: usize>(a: &Matrix<'_, f32>, w: *const f32) -> [f32; ROWS] {
    let mut acc = [[_mm512_setzero_ps(); SUMS]; M];
    let (x, k) = (a.data.as_ptr(), a.cols);
    let mut add = |p: usize, sum: usize, mask: u16| {
        // SAFETY: the mask keeps to the depth that exists.
        unsafe {
            let w = _mm512_maskz_loadu_ps(mask, w.wrapping_add(p));
            for (i, acc) in acc.iter_mut().enumerate() {
                let x = _mm512_maskz_loadu_ps(mask, x.wrapping_add(i * a.row_stride + p));
                acc[sum] = _mm512_fmadd_ps(x, w, acc[sum]);
            }
        }
    };
    let mut p = 0;
    while p + 16 * SUMS <= k {
        for sum in 0..SUMS {
            add(p + 16 * sum, sum, 0xffff);
        }
        p += 16 * SUMS;
    }
    while p < k {
        add(p, 0, lanes(k - p));
        p += 16;
    }
    let mut sums = [0.0; ROWS];
    for (sum, acc) in sums.iter_mut().zip(acc) {
        *sum = _mm512_reduce_add_ps(acc.into_iter().reduce(|a, b| _mm512_add_ps(a, b)).expect("SUMS > 0"));
    }
    sums
}
