//! Micro-kernels: one tile of `c`, up to 14 rows × 32 columns, held in 28 of the 32 registers while
//! k runs. The other operands stream past: two vectors of `b` are loaded, numbers of `a` broadcast.
#![allow(clippy::needless_range_loop, reason = "all loops over registers are counted alike")]

use std::arch::x86_64::*;

/// Rows of a tile.
pub(super) const ROWS: usize = 14;
/// Columns of a tile.
pub(super) const COLS: usize = 32;

/// A tile's operands in 32-bit words (a word is an f32, or two bf16 that are neighbours in k).
#[derive(Clone, Copy)]
pub(super) struct Tile {
    /// How many words k has.
    pub(super) words: usize,
    /// Word (r, p) of `a` is at `p · a_step + r`, or at `r · a_step + p` for the kernels of rows.
    pub(super) a: *const f32,
    pub(super) a_step: usize,
    /// Word (p, j) of `b` is at `p · b_step + j`.
    pub(super) b: *const f32,
    pub(super) b_step: usize,
    /// Where the tile goes.
    pub(super) c: *mut f32,
    pub(super) c_step: usize,
    /// Columns that exist in `c`; `b` can be read as far as the kernel's vectors reach.
    pub(super) cols: usize,
    pub(super) alpha: f32,
    pub(super) beta: f32,
}

/// # Safety
/// The CPU has the features that the kernel is compiled for, and all that [`Tile`] names can be
/// read and, in `c`, written.
pub(super) type Kernel = unsafe fn(&Tile);

/// `c = alpha·acc + beta·c`
///
/// # Safety
/// As [`Kernel`].
#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn store<const R: usize, const V: usize>(acc: &[[__m512; V]; R], tile: &Tile) {
    let (alpha, beta) = (_mm512_set1_ps(tile.alpha), _mm512_set1_ps(tile.beta));
    for (r, row) in acc.iter().enumerate() {
        for (v, acc) in row.iter().enumerate() {
            let mask = lanes(tile.cols.saturating_sub(16 * v));
            // SAFETY: the mask keeps to the columns of `c`.
            unsafe {
                let c = tile.c.add(r * tile.c_step + 16 * v);
                let mut value = _mm512_mul_ps(alpha, *acc);
                if tile.beta != 0.0 {
                    value = _mm512_fmadd_ps(beta, _mm512_maskz_loadu_ps(mask, c), value);
                }
                if mask == 0xffff {
                    _mm512_storeu_ps(c, value);
                } else {
                    _mm512_mask_storeu_ps(c, mask, value);
                }
            }
        }
    }
}

/// A mask of the first lanes, at most all 16.
pub(super) fn lanes(count: usize) -> u16 {
    if count >= 16 { 0xffff } else { (1 << count) - 1 }
}

/// Asks for the lines of `c` early, so that they are there when the tile is done.
///
/// # Safety
/// As [`Kernel`].
#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn prefetch<const R: usize, const V: usize>(tile: &Tile) {
    for r in 0..R {
        for v in 0..V {
            _mm_prefetch::<_MM_HINT_T0>(tile.c.wrapping_add(r * tile.c_step + 16 * v).cast());
        }
    }
}

macro_rules! interleaved {
    ($name:ident, $features:literal, $multiply:expr) => {
        /// `a` lies as k × rows.
        ///
        /// # Safety
        /// As [`Kernel`].
        #[target_feature(enable = $features)]
        unsafe fn $name<const R: usize, const V: usize>(tile: &Tile) {
            let mut acc = [[_mm512_setzero_ps(); V]; R];
            // SAFETY: the caller's: the operands can be read as far as `words`, R and V say.
            unsafe {
                prefetch::<R, V>(tile);
                let (mut a, mut b) = (tile.a, tile.b);
                for _ in 0..tile.words {
                    let mut cols = [_mm512_setzero_ps(); V];
                    for v in 0..V {
                        cols[v] = _mm512_loadu_ps(b.wrapping_add(16 * v));
                    }
                    for r in 0..R {
                        let x = _mm512_set1_ps(*a.wrapping_add(r));
                        for v in 0..V {
                            acc[r][v] = $multiply(acc[r][v], x, cols[v]);
                        }
                    }
                    a = a.wrapping_add(tile.a_step);
                    b = b.wrapping_add(tile.b_step);
                }
                store(&acc, tile);
            }
        }
    };
}

interleaved!(interleaved_f32, "avx512f", |acc, x, y| _mm512_fmadd_ps(x, y, acc));
interleaved!(interleaved_bf16, "avx512f,avx512bf16", |acc, x, y| {
    _mm512_dpbf16_ps(
        acc,
        std::mem::transmute::<__m512, __m512bh>(x),
        std::mem::transmute::<__m512, __m512bh>(y),
    )
});

/// `a` lies as rows × k, as the caller's matrix usually does.
///
/// # Safety
/// As [`Kernel`].
#[target_feature(enable = "avx512f")]
unsafe fn rows_f32<const R: usize, const V: usize>(tile: &Tile) {
    let mut acc = [[_mm512_setzero_ps(); V]; R];
    // SAFETY: the caller's: the operands can be read as far as `words`, R and V say.
    unsafe {
        prefetch::<R, V>(tile);
        let mut step = |p: usize| {
            let mut cols = [_mm512_setzero_ps(); V];
            for v in 0..V {
                cols[v] = _mm512_loadu_ps(tile.b.wrapping_add(p * tile.b_step + 16 * v));
            }
            for r in 0..R {
                let x = _mm512_set1_ps(*tile.a.wrapping_add(r * tile.a_step + p));
                for v in 0..V {
                    acc[r][v] = _mm512_fmadd_ps(x, cols[v], acc[r][v]);
                }
            }
        };
        let mut p = 0;
        while p + 4 <= tile.words {
            for q in 0..4 {
                step(p + q);
            }
            p += 4;
        }
        while p < tile.words {
            step(p);
            p += 1;
        }
        store(&acc, tile);
    }
}

macro_rules! table {
    ($name:ident) => {
        table!($name, 1 2 3 4 5 6 7 8 9 10 11 12 13 14)
    };
    ($name:ident, $($rows:literal)*) => {
        [[$($name::<$rows, 1> as Kernel),*], [$($name::<$rows, 2> as Kernel),*]]
    };
}

/// By vectors (1 or 2) less one, then rows less one.
pub(super) static INTERLEAVED_F32: [[Kernel; ROWS]; 2] = table!(interleaved_f32);
/// The same.
pub(super) static ROWS_F32: [[Kernel; ROWS]; 2] = table!(rows_f32);
/// The same.
pub(super) static INTERLEAVED_BF16: [[Kernel; ROWS]; 2] = table!(interleaved_bf16);
