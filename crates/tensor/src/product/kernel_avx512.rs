//! Micro-kernels: one tile of `c`, up to 14 rows × 32 columns, held in 28 of the 32 registers while
//! k runs. The other operands stream past: two vectors of `b` are loaded, numbers of `a` broadcast.
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

/// The sums of a tile; of a smaller one the first rows and vectors are used.
type Sums = [[__m512; 2]; ROWS];

/// Repeats what is to be done for each row of R and each vector of V. A loop would do, but is
/// unrolled too late: the sums would live in memory.
macro_rules! each {
    ($row:ident, $rows:ident => $body:block) => {
        each!(@ $row, $rows, $body, 0 1 2 3 4 5 6 7 8 9 10 11 12 13)
    };
    (@ $index:ident, $count:ident, $body:block, $($number:literal)*) => {
        $(if $count > $number {
            let $index = $number;
            $body
        })*
    };
    ($vector:ident of $vectors:ident => $body:block) => {
        each!(@ $vector, $vectors, $body, 0 1)
    };
}

/// `c = alpha·acc + beta·c`, as a macro because a call would take the sums through memory.
macro_rules! store {
    ($acc:ident, $tile:ident, $rows:ident, $vectors:ident) => {
        let (alpha, beta) = (_mm512_set1_ps($tile.alpha), _mm512_set1_ps($tile.beta));
        let last = lanes($tile.cols + 16 - 16 * $vectors);
        if last != 0xffff {
            each!(r, $rows => {
                each!(v of $vectors => {
                    let c = $tile.c.wrapping_add(r * $tile.c_step + 16 * v);
                    let mask = if v + 1 == $vectors { last } else { 0xffff };
                    let mut value = _mm512_mul_ps(alpha, $acc[r][v]);
                    if $tile.beta != 0.0 {
                        value = _mm512_fmadd_ps(beta, _mm512_maskz_loadu_ps(mask, c), value);
                    }
                    _mm512_mask_storeu_ps(c, mask, value);
                });
            });
        } else if $tile.beta == 0.0 {
            each!(r, $rows => {
                each!(v of $vectors => {
                    let c = $tile.c.wrapping_add(r * $tile.c_step + 16 * v);
                    _mm512_storeu_ps(c, _mm512_mul_ps(alpha, $acc[r][v]));
                });
            });
        } else {
            each!(r, $rows => {
                each!(v of $vectors => {
                    let c = $tile.c.wrapping_add(r * $tile.c_step + 16 * v);
                    let value = _mm512_mul_ps(alpha, $acc[r][v]);
                    _mm512_storeu_ps(c, _mm512_fmadd_ps(beta, _mm512_loadu_ps(c), value));
                });
            });
        }
    };
}

/// A mask of the first lanes, at most all 16.
pub(super) fn lanes(count: usize) -> u16 {
    if count >= 16 { 0xffff } else { (1 << count) - 1 }
}

/// Asks for the lines of `c` early, so that they are there when the tile is done, unless that is soon.
///
/// # Safety
/// As [`Kernel`].
#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn prefetch<const R: usize, const V: usize>(tile: &Tile) {
    for r in 0..if tile.words < 32 { 0 } else { R } {
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
            let mut acc: Sums = [[_mm512_setzero_ps(); 2]; ROWS];
            let mut y = [_mm512_setzero_ps(); 2];
            // SAFETY: the caller's: the operands can be read as far as `words`, R and V say.
            unsafe {
                prefetch::<R, V>(tile);
                let (mut a, mut b) = (tile.a, tile.b);
                for _ in 0..tile.words {
                    each!(v of V => { y[v] = _mm512_loadu_ps(b.wrapping_add(16 * v)); });
                    each!(r, R => {
                        let x = _mm512_set1_ps(*a.wrapping_add(r));
                        each!(v of V => { acc[r][v] = $multiply(acc[r][v], x, y[v]); });
                    });
                    a = a.wrapping_add(tile.a_step);
                    b = b.wrapping_add(tile.b_step);
                }
                store!(acc, tile, R, V);
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
    let mut acc: Sums = [[_mm512_setzero_ps(); 2]; ROWS];
    let mut y = [_mm512_setzero_ps(); 2];
    // SAFETY: the caller's: the operands can be read as far as `words`, R and V say.
    unsafe {
        prefetch::<R, V>(tile);
        let (mut a, mut b) = (tile.a, tile.b);
        for _ in 0..tile.words {
            each!(v of V => { y[v] = _mm512_loadu_ps(b.wrapping_add(16 * v)); });
            each!(r, R => {
                let x = _mm512_set1_ps(*a.wrapping_add(r * tile.a_step));
                each!(v of V => { acc[r][v] = _mm512_fmadd_ps(x, y[v], acc[r][v]); });
                // Else all loads are moved ahead, and there are too few registers for them.
                std::arch::asm!("", options(nostack, preserves_flags));
            });
            a = a.wrapping_add(1);
            b = b.wrapping_add(tile.b_step);
        }
        store!(acc, tile, R, V);
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
