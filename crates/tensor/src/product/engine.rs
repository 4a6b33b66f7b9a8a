//! Which instructions multiply, and the shapes that they ask for.

use std::arch::x86_64::__cpuid;

use half::bf16;

pub(super) use super::kernel_avx512::{COLS, Tile};
use super::pack::{self, Beside, Source};
use super::{Precision, kernel_amx as amx, kernel_avx512 as avx512, kernel_split as split};

/// A family of micro-kernels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Engine {
    /// AVX-512 on f32.
    F32,
    /// AVX512_BF16 on pairs of bf16.
    Bf16,
    /// AMX on pairs of bf16.
    Amx,
    /// AMX on f32, in parts of bf16.
    Split(split::Right),
}

impl Engine {
    /// The fastest of this CPU, if any is ours.
    pub(super) fn of(precision: Precision, m: usize, k: usize, n: usize) -> Option<Engine> {
        // Thin products wait for memory: rounding would only add to them.
        let thin = m.min(n).min(k) < THIN;
        match precision {
            _ if thin => Engine::plain(),
            Precision::Bf16 => Engine::bf16().or(Engine::plain()),
            // Numbers are packed in the time of multiplying them so many times.
            Precision::Full if m * n < SPLIT_FROM * (m + n) => Engine::plain(),
            Precision::Full => Engine::f32(),
        }
    }

    /// The one for f32.
    pub(super) fn f32() -> Option<Engine> {
        if amx::available() { Some(Engine::Split(split::Right::Three)) } else { Engine::plain() }
    }

    /// The one for f32 that takes its numbers whole.
    fn plain() -> Option<Engine> {
        is_x86_feature_detected!("avx512f").then_some(Engine::F32)
    }

    /// The one for bf16.
    pub(super) fn bf16() -> Option<Engine> {
        if amx::available() {
            Some(Engine::Amx)
        } else if is_amd() && is_x86_feature_detected!("avx512bf16") && is_x86_feature_detected!("avx512bw") {
            Some(Engine::Bf16)
        } else {
            None
        }
    }

    /// The instruction set's name.
    pub(super) fn name(self) -> &'static str {
        match self {
            Engine::F32 => "AVX-512",
            Engine::Bf16 => "AVX512_BF16",
            Engine::Amx => "AMX-BF16",
            Engine::Split(_) => "AMX-BF16 in six products",
        }
    }

    /// The same for a right operand that is bf16 as it is.
    pub(super) fn with_right_in_bf16(self) -> Engine {
        if let Engine::Split(_) = self { Engine::Split(split::Right::One) } else { self }
    }

    /// Operands are packed for tile registers.
    fn has_tiles(self) -> bool {
        matches!(self, Engine::Amx | Engine::Split(_))
    }

    /// Most rows of a tile.
    pub(super) fn rows(self) -> usize {
        if self.has_tiles() { amx::SIDE } else { avx512::ROWS }
    }

    /// Rows of each tile, at most so many where that can be chosen, and as even as may be.
    pub(super) fn tile_rows(self, rows: usize, most: usize) -> usize {
        match self {
            _ if self.has_tiles() => amx::SIDE,
            _ => rows.div_ceil(rows.div_ceil(avx512::ROWS.min(most))),
        }
    }

    /// k is cut into equal blocks of at most so many numbers: a panel of `a` is to stay in the L1 cache.
    pub(super) fn depth(self) -> usize {
        match self {
            Engine::F32 => 384,
            Engine::Bf16 | Engine::Amx => 768,
            Engine::Split(_) => split::DEPTH,
        }
    }

    /// Bytes of packed `b` that a task keeps in the L2 cache.
    pub(super) fn block_bytes(self) -> usize {
        // Every CPU with AMX has 2 MiB of it.
        if let Engine::Split(_) = self { 1 << 20 } else { 512 << 10 }
    }

    /// 32-bit words that so many numbers of a column of `b` take.
    pub(super) fn words(self, depth: usize) -> usize {
        match self {
            Engine::F32 => depth,
            Engine::Bf16 => depth.div_ceil(2),
            Engine::Amx => depth.div_ceil(2).next_multiple_of(amx::WORDS),
            Engine::Split(right) => right.parts() * Engine::Amx.words(depth),
        }
    }

    /// 32-bit words that a panel of `a` takes.
    pub(super) fn panel(self, depth: usize) -> usize {
        match self {
            Engine::F32 | Engine::Bf16 => LANES * self.words(depth),
            Engine::Amx => amx::SIDE * self.words(depth),
            Engine::Split(_) => split::PARTS * Engine::Amx.panel(depth),
        }
    }

    /// Words of a column of `b` are pairs of bf16.
    pub(super) fn takes_bf16(self) -> bool {
        !matches!(self, Engine::F32 | Engine::Split(split::Right::Three))
    }

    /// Operands needn't be packed.
    pub(super) fn reads_in_place(self) -> bool {
        self == Engine::F32
    }

    /// A number of `b` is packed in the time of multiplying it by so many rows.
    pub(super) fn rows_per_packing(self) -> usize {
        match self {
            Engine::F32 => 8,
            Engine::Bf16 => 16,
            Engine::Amx => 128,
            Engine::Split(_) => 64,
        }
    }

    /// Packs a panel of `a`.
    ///
    /// # Safety
    /// `source` can be read, and `out` written for [`Engine::panel`] words.
    pub(super) unsafe fn pack_rows(self, source: Source, out: *mut f32) {
        // SAFETY: the caller's; the engine exists only where its instructions do.
        unsafe {
            match self {
                Engine::F32 => pack::pack_f32(source, out, LANES),
                Engine::Bf16 => pack::pack_bf16(source, out, LANES),
                Engine::Amx => {
                    let step = amx::SIDE * amx::WORDS;
                    let (upper, lower) = source.halves();
                    pack::pack_bf16_tiles(upper, out, step);
                    if lower.lanes > 0 {
                        pack::pack_bf16_tiles(lower, out.wrapping_add(step / 2), step);
                    }
                }
                Engine::Split(_) => {
                    let (upper, lower) = source.halves();
                    pack::pack_parts(upper, out, Beside::Words);
                    if lower.lanes > 0 {
                        pack::pack_parts(lower, out.wrapping_add(split::PART / 2), Beside::Words);
                    }
                }
            }
        }
    }

    /// Packs 16 columns of a panel; `last` when k ends here.
    ///
    /// # Safety
    /// `source` can be read, and `out` written in steps of [`COLS`].
    pub(super) unsafe fn pack_cols(self, source: Source, out: *mut f32, last: bool) {
        // SAFETY: the caller's; the engine exists only where its instructions do.
        unsafe {
            match self {
                Engine::F32 => pack::pack_f32(source, out, COLS),
                Engine::Split(_) => pack::pack_parts(source, out, Beside::Lanes(COLS)),
                Engine::Bf16 | Engine::Amx => {
                    pack::pack_bf16(source, out, COLS);
                    if last {
                        self.pad(source.depth, out);
                    }
                }
            }
        }
    }

    /// Of numbers that are bf16 already, for the engines that multiply those; k ends with them.
    ///
    /// # Safety
    /// As [`Engine::pack_cols`]; lanes or depth are side by side.
    pub(super) unsafe fn pack_halves(self, source: Source<bf16>, out: *mut f32) {
        // SAFETY: the caller's; the engine exists only where its instructions do.
        unsafe {
            pack::pack_halves(source, out, COLS);
            self.pad(source.depth, out);
        }
    }

    /// Zeros from where k ends to where the engine reads.
    ///
    /// # Safety
    /// As [`Engine::pack_cols`].
    unsafe fn pad(self, depth: usize, out: *mut f32) {
        for word in depth.div_ceil(2)..self.words(depth) {
            // SAFETY: the caller's.
            unsafe { out.wrapping_add(word * COLS).write_bytes(0, LANES) };
        }
    }

    /// Runs `work`, in which [`Engine::multiply`] may be called and foreign code may not.
    pub(super) fn ready<R>(self, work: impl FnOnce() -> R) -> R {
        if self.has_tiles() { amx::with_tiles(work) } else { work() }
    }

    /// # Safety
    /// As [`avx512::Kernel`], for so many rows.
    pub(super) unsafe fn multiply(self, rows: usize, by_rows: bool, tile: &Tile) {
        let table = match self {
            // SAFETY: the caller's.
            Engine::Amx => return unsafe { amx::multiply(rows, tile) },
            // SAFETY: the same.
            Engine::Split(right) => return unsafe { split::multiply(right, rows, tile) },
            Engine::Bf16 => &avx512::INTERLEAVED_BF16,
            Engine::F32 if by_rows => &avx512::ROWS_F32,
            Engine::F32 => &avx512::INTERLEAVED_F32,
        };
        // SAFETY: the caller's; the engine exists only where its instructions do.
        unsafe { table[usize::from(tile.cols > LANES)][rows - 1](tile) }
    }
}

/// AMD multiplies bf16 at twice the speed of f32. Intel does so at half of it: it has AMX for that.
fn is_amd() -> bool {
    let vendor = __cpuid(0);
    [vendor.ebx, vendor.edx, vendor.ecx] == [b"Auth", b"enti", b"cAMD"].map(|it| u32::from_le_bytes(*it))
}

/// Lanes of a vector.
const LANES: usize = 16;
/// A side shorter than this makes a product thin.
const THIN: usize = 32;
/// From so many products on for each number that is packed, on average, splitting numbers pays.
const SPLIT_FROM: usize = 80;
