//! Which instructions multiply, and the shapes that they ask for.

use super::Precision;
use super::kernel_avx512 as avx512;
pub(super) use super::kernel_avx512::{COLS, Tile};
use super::pack::{self, Source};

/// A family of micro-kernels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Engine {
    /// AVX-512 on f32.
    F32,
}

impl Engine {
    /// The fastest of this CPU, if any is ours.
    pub(super) fn of(precision: Precision) -> Option<Engine> {
        let _ = precision;
        is_x86_feature_detected!("avx512f").then_some(Engine::F32)
    }

    /// Most rows of a tile.
    pub(super) fn rows(self) -> usize {
        avx512::ROWS
    }

    /// Rows of each tile, as even as may be.
    pub(super) fn tile_rows(self, rows: usize) -> usize {
        rows.div_ceil(rows.div_ceil(self.rows()))
    }

    /// 32-bit words that so many numbers of k take.
    pub(super) fn words(self, depth: usize) -> usize {
        depth
    }

    /// 32-bit words that a panel of `a` takes.
    pub(super) fn panel(self, words: usize) -> usize {
        16 * words
    }

    /// Operands needn't be packed.
    pub(super) fn reads_in_place(self) -> bool {
        self == Engine::F32
    }

    /// A number of `b` is packed in the time of multiplying it by so many rows.
    pub(super) fn rows_per_packing(self) -> usize {
        8
    }

    /// # Safety
    /// `source` can be read, and `out` written for [`Engine::panel`] words.
    pub(super) unsafe fn pack_rows(self, source: Source, out: *mut f32) {
        // SAFETY: the caller's; the engine exists only where its instructions do.
        unsafe { pack::pack_f32(source, out, 16) }
    }

    /// Packs 16 columns of a panel; `last` when k ends here.
    ///
    /// # Safety
    /// `source` can be read, and `out` written in steps of [`COLS`].
    pub(super) unsafe fn pack_cols(self, source: Source, out: *mut f32, last: bool) {
        let _ = last;
        // SAFETY: the caller's; the engine exists only where its instructions do.
        unsafe { pack::pack_f32(source, out, COLS) }
    }

    /// # Safety
    /// As [`avx512::Kernel`], for so many rows.
    pub(super) unsafe fn multiply(self, rows: usize, by_rows: bool, tile: &Tile) {
        let table = if by_rows { &avx512::ROWS_F32 } else { &avx512::INTERLEAVED_F32 };
        // SAFETY: the caller's; the engine exists only where its instructions do.
        unsafe { table[usize::from(tile.cols > 16)][rows - 1](tile) }
    }
}
