//! f32 multiplied by AMX: each number is a sum of three bf16, `x = h + m + l`, eight bits of x each, and
//!
//! `a·b = ah·bh + (ah·bm + am·bh) + (ah·bl + am·bm + al·bh) + …`
//!
//! What is left out, `am·bl + al·bm + al·bl`, is at most 2⁻²³ of a·b and of either sign, so that six products are
//! as exact as f32's own (Henry, Tang, Heinecke 2019, "Leveraging the bfloat16 Artificial Intelligence
//! Datatype For Higher-Precision Computations"). Two parts and three products would be twice as fast, but have
//! errors of 4e-6, 12 to 17 times those of f32 where it adds up 576 to 8192 products of normally
//! distributed numbers; six have 0.4 of them, as every block of k is added up by itself. Where b is bf16
//! already, it is its own h, and three products give all there is.
//!
//! Numbers below 2⁻¹¹⁰ lose digits, for AMX takes what is denormal as 0. Infinities don't survive in parts:
//! a tile with a sum that isn't finite is computed again from whole numbers.

use std::arch::asm;
use std::arch::x86_64::*;
use std::mem::MaybeUninit;

#[cfg(test)]
use super::kernel_amx::available;
use super::kernel_amx::{Buffer, SIDE, WORDS, halves, store};
use super::kernel_avx512::{self as avx512, COLS, Tile};

/// Parts of a number.
pub(super) const PARTS: usize = 3;
/// Most numbers of k in a block. A panel of `a` then is larger than the L1 cache: the tiles' multiplications are slow
/// enough to load it from the L2 cache, and sums go to `c` less often.
pub(super) const DEPTH: usize = 576;
/// Words of a part in a step of 32 numbers of k: 32 rows of `a` × 16 words, or 16 words × 32 columns of `b`.
pub(super) const PART: usize = SIDE * WORDS;

/// In how many parts `b` is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Right {
    /// h alone: it is bf16.
    One,
    /// As many as `a`.
    Three,
}

impl Right {
    pub(super) fn parts(self) -> usize {
        match self {
            Right::One => 1,
            Right::Three => PARTS,
        }
    }
}

/// Multiplies a panel of `a` (steps of 32 numbers of k × parts × 32 rows × 16 words) by one of `b` (steps × parts
/// × 16 words × 32 columns).
///
/// # Safety
/// As [`avx512::Kernel`], within [`super::kernel_amx::with_tiles`]; `words` counts those of all parts of `b`.
pub(super) unsafe fn multiply(right: Right, rows: usize, tile: &Tile) {
    let steps = tile.words / WORDS / right.parts();
    let mut buffer = MaybeUninit::<Buffer>::uninit();
    // SAFETY: the caller's; all of the buffer is written.
    unsafe {
        let to = buffer.as_mut_ptr().cast();
        match right {
            #[cfg(test)]
            _ if !available() => model(tile, steps, right, to),
            Right::One => three_products(tile, steps, to),
            Right::Three => six_products(tile, steps, to),
        }
        let buffer = buffer.assume_init_ref();
        if is_finite(buffer) { store(rows, tile, buffer) } else { multiply_whole(right, rows, tile, steps) }
    }
}

/// A micro-kernel: `to = a·b`. Meanwhile lines of `c` are asked for, those of eight rows each turn: the stores would wait
/// for them. Products are added from small to large.
macro_rules! kernel {
    ($(#[$doc:meta])* $name:ident, $b_bytes:literal, $($line:expr),* $(,)?) => {
        $(#[$doc])*
        ///
        /// # Safety
        /// As [`multiply`].
        unsafe fn $name(tile: &Tile, steps: usize, to: *mut f32) {
            // SAFETY: the caller's.
            unsafe {
                asm!(
                    "tilezero tmm0",
                    "tilezero tmm1",
                    "tilezero tmm2",
                    "tilezero tmm3",
                    "2:",
                    "sub {rows}, 8",
                    "js 3f",
                    ".rept 8",
                    "prefetcht1 [{c}]",
                    "prefetcht1 [{c} + 64]",
                    "add {c}, {c_step}",
                    ".endr",
                    "3:",
                    $($line,)*
                    "add {a}, 6144",
                    concat!("add {b}, ", $b_bytes),
                    "dec {steps}",
                    "jnz 2b",
                    "tilestored [{to} + {wide}], tmm0",
                    "tilestored [{to} + {wide} + 64], tmm1",
                    "tilestored [{to} + {wide} + 2048], tmm2",
                    "tilestored [{to} + {wide} + 2112], tmm3",
                    a = inout(reg) tile.a => _,
                    b = inout(reg) tile.b => _,
                    c = inout(reg) tile.c => _,
                    c_step = in(reg) 4 * tile.c_step,
                    rows = inout(reg) SIDE => _,
                    steps = inout(reg) steps => _,
                    narrow = in(reg) 64_usize,
                    wide = in(reg) 128_usize,
                    to = in(reg) to,
                    out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                    out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
                    options(nostack),
                );
            }
        }
    };
}

/// The four products of the tiles that are loaded.
macro_rules! products {
    () => {
        "tdpbf16ps tmm0, tmm4, tmm6
        tdpbf16ps tmm1, tmm4, tmm7
        tdpbf16ps tmm2, tmm5, tmm6
        tdpbf16ps tmm3, tmm5, tmm7"
    };
}

/// Loads both tiles of a part of `a`, so many bytes on, and multiplies what is loaded of `b`.
macro_rules! times_b {
    ($upper:literal, $lower:literal) => {
        concat!(
            "tileloadd tmm4, [{a} + {narrow} + ",
            $upper,
            "]\n",
            "tdpbf16ps tmm0, tmm4, tmm6\n",
            "tdpbf16ps tmm1, tmm4, tmm7\n",
            "tileloadd tmm5, [{a} + {narrow} + ",
            $lower,
            "]\n",
            "tdpbf16ps tmm2, tmm5, tmm6\n",
            "tdpbf16ps tmm3, tmm5, tmm7",
        )
    };
}

/// The same for both tiles of a part of `b`, loaded between.
macro_rules! first_times_b {
    ($upper:literal, $lower:literal, $left:literal, $right:literal) => {
        concat!(
            "tileloaddt1 tmm6, [{b} + {wide} + ",
            $left,
            "]\n",
            "tileloadd tmm4, [{a} + {narrow} + ",
            $upper,
            "]\n",
            "tdpbf16ps tmm0, tmm4, tmm6\n",
            "tileloaddt1 tmm7, [{b} + {wide} + ",
            $right,
            "]\n",
            "tdpbf16ps tmm1, tmm4, tmm7\n",
            "tileloadd tmm5, [{a} + {narrow} + ",
            $lower,
            "]\n",
            "tdpbf16ps tmm2, tmm5, tmm6\n",
            "tdpbf16ps tmm3, tmm5, tmm7",
        )
    };
}

kernel! {
    /// `am·b + al·b + ah·b`, with 8 tiles loaded: what six products give where two parts of `b` are 0, to the bit.
    three_products, "2048",
    first_times_b!(2048, 3072, 0, 64),
    times_b!(4096, 5120),
    times_b!(0, 1024),
}

kernel! {
    /// `ah·bl + am·bm + ah·bm + al·bh + am·bh + ah·bh`, with 14 tiles loaded.
    six_products, "6144",
    first_times_b!(0, 1024, 4096, 4160),
    "tileloaddt1 tmm6, [{b} + {wide} + 2048]",
    "tileloaddt1 tmm7, [{b} + {wide} + 2112]",
    products!(),
    times_b!(2048, 3072),
    "tileloaddt1 tmm6, [{b} + {wide}]",
    "tileloaddt1 tmm7, [{b} + {wide} + 64]",
    products!(),
    times_b!(4096, 5120),
    times_b!(0, 1024),
}

/// The same, number by number. Sums are f64, for the instruction's own are more exact than f32's one by one.
#[cfg(test)]
unsafe fn model(tile: &Tile, steps: usize, right: Right, to: *mut f32) {
    let products: &[(usize, usize)] = match right {
        Right::One => &[(1, 0), (2, 0), (0, 0)],
        Right::Three => &[(0, 2), (0, 1), (1, 1), (1, 0), (2, 0), (0, 0)],
    };
    for row in 0..SIDE {
        for col in 0..COLS {
            let mut sum = 0.0_f64;
            for step in 0..steps {
                for (left, other) in products {
                    for word in 0..WORDS {
                        // SAFETY: the caller's.
                        let (a, b) = unsafe {
                            let a = tile.a.add((step * PARTS + left) * PART + row * WORDS + word);
                            let b = tile.b.add((step * right.parts() + other) * PART + word * COLS + col);
                            (halves(*a), halves(*b))
                        };
                        sum += f64::from(a[0] * b[0]) + f64::from(a[1] * b[1]);
                    }
                }
            }
            // SAFETY: the caller's.
            unsafe { *to.add(row * SIDE + col) = sum as f32 };
        }
    }
}

/// Whether all sums are.
#[target_feature(enable = "avx512f")]
fn is_finite(buffer: &Buffer) -> bool {
    let mut zeros = [_mm512_setzero_ps(); 4];
    for sums in buffer.0.chunks_exact(64) {
        for (zero, sums) in zeros.iter_mut().zip(sums.chunks_exact(16)) {
            // SAFETY: 16 numbers are read. 0 times what isn't finite is NaN.
            *zero = unsafe { _mm512_fmadd_ps(_mm512_loadu_ps(sums.as_ptr()), _mm512_setzero_ps(), *zero) };
        }
    }
    let zero = _mm512_add_ps(_mm512_add_ps(zeros[0], zeros[1]), _mm512_add_ps(zeros[2], zeros[3]));
    _mm512_cmp_ps_mask::<_CMP_UNORD_Q>(zero, zero) == 0
}

/// The same product in f32, of the numbers that the parts add up to.
///
/// # Safety
/// As [`multiply`].
#[cold]
#[target_feature(enable = "avx512f")]
unsafe fn multiply_whole(right: Right, rows: usize, tile: &Tile, steps: usize) {
    const STEPS: usize = 6;
    let mut a = [0.0; 32 * STEPS * SIDE]; // k × rows
    let mut b = [0.0; 32 * STEPS * COLS]; // k × columns
    for first in (0..steps).step_by(STEPS) {
        let steps = (steps - first).min(STEPS);
        for step in 0..steps {
            for at in 0..PART {
                // SAFETY: the caller's.
                let (left, other) = unsafe {
                    let a = tile.a.add((first + step) * PARTS * PART + at);
                    let b = tile.b.add((first + step) * right.parts() * PART + at);
                    (whole(a, PARTS), whole(b, right.parts()))
                };
                for half in 0..2 {
                    a[(32 * step + 2 * (at % WORDS) + half) * SIDE + at / WORDS] = left[half];
                    b[(32 * step + 2 * (at / COLS) + half) * COLS + at % COLS] = other[half];
                }
            }
        }
        for row in (0..rows).step_by(avx512::ROWS) {
            let rows = (rows - row).min(avx512::ROWS);
            let tile = Tile {
                words: 32 * steps,
                a: a[row..].as_ptr(),
                a_step: SIDE,
                b: b.as_ptr(),
                b_step: COLS,
                c: tile.c.wrapping_add(row * tile.c_step),
                beta: if first == 0 { tile.beta } else { 1.0 },
                ..*tile
            };
            // SAFETY: a, b are there for so many words, rows and columns; `c` is the caller's.
            unsafe { avx512::INTERLEAVED_F32[usize::from(tile.cols > 16)][rows - 1](&tile) };
        }
    }
}

/// The two numbers of a word, of which parts are [`PART`] apart. Of an infinity or NaN, m is one.
///
/// # Safety
/// The parts can be read.
unsafe fn whole(word: *const f32, parts: usize) -> [f32; 2] {
    // SAFETY: the caller's.
    let part = |part: usize| if part < parts { unsafe { halves(*word.add(part * PART)) } } else { [0.0; 2] };
    let (h, m, l) = (part(0), part(1), part(2));
    std::array::from_fn(|it| if m[it].is_finite() { h[it] + (m[it] + l[it]) } else { m[it] })
}
