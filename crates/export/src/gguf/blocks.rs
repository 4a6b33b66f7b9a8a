//! Numbers into the types of GGUF. The small blocks are candle's, which rounds as ggml does.

use candle_core::quantized::GgmlType;
use candle_core::quantized::k_quants::{BlockQ4_0, BlockQ4_1, BlockQ5_0, BlockQ5_1, BlockQ8_0};
use ferrotune_model::source::GgufType;
use ferrotune_tensor::{bf16, f16};
use rayon::prelude::*;

use super::k_quants::{Levels, six_bits, with_minima};

/// Numbers that one task converts; whole blocks of every type.
const CHUNK: usize = 16 * 1024;

/// Bytes of so many numbers.
pub(super) fn length(kind: GgufType, count: usize) -> usize {
    count / kind.block() * kind.block_bytes()
}

/// Writes numbers, whole blocks of them, on all cores.
///
/// # Errors
/// Where one isn't finite, or is too large for the type; it is named.
pub(super) fn write(kind: GgufType, numbers: &[f32], out: &mut [u8]) -> Result<(), String> {
    debug_assert_eq!(length(kind, numbers.len()), out.len(), "numbers and bytes");
    let parts = out.par_chunks_mut(length(kind, CHUNK)).zip(numbers.par_chunks(CHUNK));
    parts.try_for_each(|(out, numbers)| {
        let largest = if kind == GgufType::F32 || kind == GgufType::Bf16 { f32::MAX } else { 65504.0 };
        if let Some(wrong) = numbers.iter().find(|it| !it.is_finite() || it.abs() > largest) {
            return Err(if wrong.is_finite() {
                format!("holds {wrong}, which is too large for {}; write BF16 or F32", kind.name())
            } else {
                format!("holds {wrong}")
            });
        }
        each(kind, numbers, out);
        Ok(())
    })
}

fn each(kind: GgufType, x: &[f32], out: &mut [u8]) {
    match kind {
        GgufType::F32 => plain(x, out, f32::to_le_bytes),
        GgufType::F16 => plain(x, out, |it| f16::from_f32(it).to_le_bytes()),
        GgufType::Bf16 => plain(x, out, |it| bf16::from_f32(it).to_le_bytes()),
        GgufType::Q4_0 => blocks::<BlockQ4_0>(x, out),
        GgufType::Q4_1 => blocks::<BlockQ4_1>(x, out),
        GgufType::Q5_0 => blocks::<BlockQ5_0>(x, out),
        GgufType::Q5_1 => blocks::<BlockQ5_1>(x, out),
        GgufType::Q8_0 => blocks::<BlockQ8_0>(x, out),
        GgufType::Q4K => many(x, out, 144, |x, out| with_minima(Levels::Four, x, out)),
        GgufType::Q5K => many(x, out, 176, |x, out| with_minima(Levels::Five, x, out)),
        GgufType::Q6K => many(x, out, 210, six_bits),
    }
}

fn plain<const N: usize>(x: &[f32], out: &mut [u8], bytes: impl Fn(f32) -> [u8; N]) {
    out.chunks_exact_mut(N).zip(x).for_each(|(out, x)| out.copy_from_slice(&bytes(*x)));
}

fn many(x: &[f32], out: &mut [u8], bytes: usize, one: impl Fn(&[f32], &mut [u8])) {
    out.chunks_exact_mut(bytes).zip(x.chunks_exact(256)).for_each(|(out, x)| one(x, out));
}

fn blocks<B: GgmlType>(x: &[f32], out: &mut [u8]) {
    let mut blocks = vec![B::zeros(); x.len() / B::BLCK_SIZE];
    B::from_float(x, &mut blocks);
    // SAFETY: candle's blocks are `repr(C)` structs of bytes and f16 without gaps, as their asserted sizes say, so each
    // of their bytes is initialised; the slice lives no longer than the blocks.
    let bytes = unsafe { std::slice::from_raw_parts(blocks.as_ptr().cast::<u8>(), size_of_val(&blocks[..])) };
    out.copy_from_slice(bytes);
}
