//! The micro-kernel of CPUs with AMX: 32 rows × 32 columns of `c` in four of the eight tile
//! registers, two tiles of `a` (16 rows × 32 numbers of k) and two of `b` per step. The instructions
//! are written out because stable Rust has no names for them.
//!
//! To check it on a machine that has AMX: `cargo test --release -p ferrotune-tensor amx` there. The
//! same tests run everywhere else on [`model`], which reads the same packed layout number by number.

use std::arch::asm;
use std::arch::x86_64::*;
use std::mem::MaybeUninit;
use std::sync::OnceLock;

use super::kernel_avx512::{Tile, lanes};

/// Rows and columns of a tile.
pub(super) const SIDE: usize = 32;
/// Words of k that one tile register holds.
pub(super) const WORDS: usize = 16;

/// Whether the CPU has AMX and the system lets this process use it.
pub(super) fn available() -> bool {
    static ANSWER: OnceLock<bool> = OnceLock::new();
    *ANSWER.get_or_init(|| {
        let tile_and_bf16 = 1 << 24 | 1 << 22;
        __cpuid(0).eax >= 7
            && __cpuid_count(7, 0).edx & tile_and_bf16 == tile_and_bf16
            && is_x86_feature_detected!("avx512bf16")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512dq")
            && permitted()
    })
}

/// Asks Linux to keep tile registers for all threads of this process.
#[cfg(target_os = "linux")]
fn permitted() -> bool {
    const ARCH_PRCTL: i64 = 158;
    const ARCH_REQ_XCOMP_PERM: i64 = 0x1023;
    const XTILEDATA: i64 = 18;
    let mut result = ARCH_PRCTL;
    // SAFETY: this call takes two numbers and touches no memory of ours.
    unsafe {
        asm!(
            "syscall", inlateout("rax") result, in("rdi") ARCH_REQ_XCOMP_PERM, in("rsi") XTILEDATA,
            lateout("rcx") _, lateout("r11") _, options(nostack),
        );
    }
    result == 0
}

#[cfg(not(target_os = "linux"))]
fn permitted() -> bool {
    false
}

/// Eight tiles of 16 rows of 64 bytes.
#[repr(C, align(64))]
struct Shape {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    bytes_per_row: [u16; 16],
    rows: [u8; 16],
}

static SHAPE: Shape = Shape {
    palette: 1,
    start_row: 0,
    reserved: [0; 14],
    bytes_per_row: [64, 64, 64, 64, 64, 64, 64, 64, 0, 0, 0, 0, 0, 0, 0, 0],
    rows: [16, 16, 16, 16, 16, 16, 16, 16, 0, 0, 0, 0, 0, 0, 0, 0],
};

/// Runs `work`, which may multiply and must not run foreign code: tiles belong to the thread.
pub(super) fn with_tiles<R>(work: impl FnOnce() -> R) -> R {
    if !available() {
        return work();
    }
    // SAFETY: AMX is there, and the shape is a valid one.
    unsafe { asm!("ldtilecfg [{}]", in(reg) &SHAPE, options(nostack, readonly)) };
    let result = work();
    // SAFETY: AMX is there.
    unsafe { asm!("tilerelease", options(nostack, nomem)) };
    result
}

/// A row of zeros, twice as long as a tile's.
#[repr(align(64))]
struct Zeros([f32; SIDE]);
static ZEROS: Zeros = Zeros([0.0; SIDE]);

/// A tile that is not yet in `c`.
#[repr(align(64))]
pub(super) struct Buffer(pub(super) [f32; SIDE * SIDE]);

/// Multiplies a panel of `a` (packed as k in steps of 16 words × 32 rows × 16 words) by one of `b`.
///
/// # Safety
/// As [`super::kernel_avx512::Kernel`], within [`with_tiles`]; `words` is a multiple of 16.
pub(super) unsafe fn multiply(rows: usize, tile: &Tile) {
    let whole = rows == SIDE && tile.cols == SIDE;
    // SAFETY: the caller's; when not all is stored straight to `c`, it is to a buffer of our own.
    unsafe {
        if whole && tile.alpha == 1.0 && (tile.beta == 0.0 || tile.beta == 1.0) {
            let zeros = (ZEROS.0.as_ptr(), 0);
            let from = if tile.beta == 0.0 { zeros } else { (tile.c.cast_const(), tile.c_step) };
            add_up(tile, from, (tile.c, tile.c_step));
        } else {
            let mut buffer = MaybeUninit::<Buffer>::uninit();
            add_up(tile, (ZEROS.0.as_ptr(), 0), (buffer.as_mut_ptr().cast(), SIDE));
            store(rows, tile, buffer.assume_init_ref());
        }
    }
}

/// `to = from + a·b`, rows being so many numbers apart. `b` streams past (`t1`: it isn't to displace
/// `a`, which is wanted again for the next columns, from the L1 cache). Meanwhile lines of the next tile of
/// `c` are asked for, some each turn: the stores would wait for them.
///
/// # Safety
/// As [`multiply`].
unsafe fn add_up(tile: &Tile, from: (*const f32, usize), to: (*mut f32, usize)) {
    #[cfg(test)]
    if !available() {
        // SAFETY: the caller's.
        return unsafe { model(tile, from, to) };
    }
    // SAFETY: the caller's. Of the rows apart, 16 are stepped over for the lower tiles.
    unsafe {
        asm!(
            "tileloadd tmm0, [{from} + {from_step}]",
            "tileloadd tmm1, [{from} + {from_step} + 64]",
            "tileloadd tmm2, [{from_low} + {from_step}]",
            "tileloadd tmm3, [{from_low} + {from_step} + 64]",
            // From here on `from` is the next tile, and `from_low` counts pairs of its rows.
            "lea {from}, [{to} + 128]",
            "mov {from_low}, 16",
            "2:",
            "sub {from_low}, 1",
            "js 3f",
            "prefetchw [{from}]",
            "prefetchw [{from} + 64]",
            "prefetchw [{from} + {to_step}]",
            "prefetchw [{from} + {to_step} + 64]",
            "lea {from}, [{from} + 2*{to_step}]",
            "3:",
            "tileloaddt1 tmm6, [{b} + {b_step}]",
            "tileloadd tmm4, [{a} + {a_step}]",
            "tdpbf16ps tmm0, tmm4, tmm6",
            "tileloaddt1 tmm7, [{b} + {b_step} + 64]",
            "tdpbf16ps tmm1, tmm4, tmm7",
            "tileloadd tmm5, [{a} + {a_step} + 1024]",
            "tdpbf16ps tmm2, tmm5, tmm6",
            "tdpbf16ps tmm3, tmm5, tmm7",
            "add {a}, 2048",
            "add {b}, 2048",
            "dec {turns}",
            "jnz 2b",
            "tilestored [{to} + {to_step}], tmm0",
            "tilestored [{to} + {to_step} + 64], tmm1",
            "tilestored [{to_low} + {to_step}], tmm2",
            "tilestored [{to_low} + {to_step} + 64], tmm3",
            a = inout(reg) tile.a => _,
            b = inout(reg) tile.b => _,
            turns = inout(reg) tile.words / WORDS => _,
            a_step = in(reg) 64_usize,
            b_step = in(reg) 128_usize,
            from = inout(reg) from.0 => _,
            from_low = inout(reg) from.0.wrapping_add(16 * from.1) => _,
            from_step = in(reg) 4 * from.1,
            to = in(reg) to.0,
            to_low = in(reg) to.0.wrapping_add(16 * to.1),
            to_step = in(reg) 4 * to.1,
            out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
            out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
            options(nostack),
        );
    }
}

/// The two bf16 of a word.
pub(super) fn halves(word: f32) -> [f32; 2] {
    let bits = word.to_bits();
    [f32::from_bits(bits << 16), f32::from_bits(bits & 0xffff_0000)]
}

/// The same, number by number.
#[cfg(test)]
unsafe fn model(tile: &Tile, from: (*const f32, usize), to: (*mut f32, usize)) {
    for row in 0..SIDE {
        for col in 0..SIDE {
            // SAFETY: the caller's.
            unsafe {
                let mut sum = *from.0.add(row * from.1 + col);
                for word in 0..tile.words {
                    let a = halves(*tile.a.add(word / WORDS * SIDE * WORDS + row * WORDS + word % WORDS));
                    let b = halves(*tile.b.add(word * SIDE + col));
                    sum += a[0] * b[0] + a[1] * b[1];
                }
                *to.0.add(row * to.1 + col) = sum;
            }
        }
    }
}

/// `c = alpha·buffer + beta·c`
///
/// # Safety
/// As [`multiply`].
#[target_feature(enable = "avx512f")]
pub(super) unsafe fn store(rows: usize, tile: &Tile, buffer: &Buffer) {
    let (alpha, beta) = (_mm512_set1_ps(tile.alpha), _mm512_set1_ps(tile.beta));
    for row in 0..rows {
        for col in [0, 16] {
            let mask = lanes(tile.cols.saturating_sub(col));
            // SAFETY: the mask keeps to the columns of `c`.
            unsafe {
                let c = tile.c.wrapping_add(row * tile.c_step + col);
                let sum = _mm512_loadu_ps(buffer.0.as_ptr().add(row * SIDE + col));
                let mut value = _mm512_mul_ps(alpha, sum);
                if tile.beta != 0.0 {
                    value = _mm512_fmadd_ps(beta, _mm512_maskz_loadu_ps(mask, c), value);
                }
                _mm512_mask_storeu_ps(c, mask, value);
            }
        }
    }
}
