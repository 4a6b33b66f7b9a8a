//! Types that GGUF stores numbers in. Plain ones are converted here, blocks by candle's routines.

use candle_core::quantized::GgmlType;
use candle_core::quantized::k_quants::{
    BlockQ4_0, BlockQ4_1, BlockQ4K, BlockQ5_0, BlockQ5_1, BlockQ5K, BlockQ6K, BlockQ8_0,
};

use crate::source::mapped::Plain;

/// A type that can be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Type {
    Plain(Plain),
    Q4_0,
    Q4_1,
    Q5_0,
    Q5_1,
    Q8_0,
    Q4K,
    Q5K,
    Q6K,
}

/// All types by their number, for messages.
const NAMES: &[&str] = &[
    "F32",
    "F16",
    "Q4_0",
    "Q4_1",
    "Q4_2",
    "Q4_3",
    "Q5_0",
    "Q5_1",
    "Q8_0",
    "Q8_1",
    "Q2_K",
    "Q3_K",
    "Q4_K",
    "Q5_K",
    "Q6_K",
    "Q8_K",
    "IQ2_XXS",
    "IQ2_XS",
    "IQ3_XXS",
    "IQ1_S",
    "IQ4_NL",
    "IQ3_S",
    "IQ2_S",
    "IQ4_XS",
    "I8",
    "I16",
    "I32",
    "I64",
    "F64",
    "IQ1_M",
    "BF16",
    "Q4_0_4_4",
    "Q4_0_4_8",
    "Q4_0_8_8",
    "TQ1_0",
    "TQ2_0",
    "IQ4_NL_4_4",
    "IQ4_NL_4_8",
    "IQ4_NL_8_8",
    "MXFP4",
];

impl Type {
    /// The type of this number; its name where it can't be read.
    pub(super) fn from_id(id: u32) -> Result<Type, String> {
        Ok(match id {
            0 => Type::Plain(Plain::F32),
            1 => Type::Plain(Plain::F16),
            2 => Type::Q4_0,
            3 => Type::Q4_1,
            6 => Type::Q5_0,
            7 => Type::Q5_1,
            8 => Type::Q8_0,
            12 => Type::Q4K,
            13 => Type::Q5K,
            14 => Type::Q6K,
            30 => Type::Plain(Plain::Bf16),
            _ => return Err(NAMES.get(id as usize).map_or(format!("type {id}"), |it| it.to_string())),
        })
    }

    pub(super) fn name(self) -> &'static str {
        match self {
            Type::Plain(Plain::F32) => "F32",
            Type::Plain(Plain::F16) => "F16",
            Type::Plain(Plain::Bf16) => "BF16",
            Type::Q4_0 => "Q4_0",
            Type::Q4_1 => "Q4_1",
            Type::Q5_0 => "Q5_0",
            Type::Q5_1 => "Q5_1",
            Type::Q8_0 => "Q8_0",
            Type::Q4K => "Q4_K",
            Type::Q5K => "Q5_K",
            Type::Q6K => "Q6_K",
        }
    }

    /// Numbers in a block.
    pub(super) fn block(self) -> usize {
        match self {
            Type::Plain(_) => 1,
            Type::Q4_0 | Type::Q4_1 | Type::Q5_0 | Type::Q5_1 | Type::Q8_0 => 32,
            Type::Q4K | Type::Q5K | Type::Q6K => 256,
        }
    }

    /// Bytes of a block.
    pub(super) fn block_bytes(self) -> usize {
        match self {
            Type::Plain(plain) => plain.bytes(),
            Type::Q4_0 => 18,
            Type::Q4_1 => 20,
            Type::Q5_0 => 22,
            Type::Q5_1 => 24,
            Type::Q8_0 => 34,
            Type::Q4K => 144,
            Type::Q5K => 176,
            Type::Q6K => 210,
        }
    }

    /// Writes the numbers of whole blocks on the calling thread.
    pub(super) fn read(self, bytes: &[u8], out: &mut [f32]) {
        match self {
            Type::Plain(plain) => plain.read_serial(bytes, out),
            Type::Q4_0 => blocks::<BlockQ4_0>(bytes, out),
            Type::Q4_1 => blocks::<BlockQ4_1>(bytes, out),
            Type::Q5_0 => blocks::<BlockQ5_0>(bytes, out),
            Type::Q5_1 => blocks::<BlockQ5_1>(bytes, out),
            Type::Q8_0 => blocks::<BlockQ8_0>(bytes, out),
            Type::Q4K => blocks::<BlockQ4K>(bytes, out),
            Type::Q5K => blocks::<BlockQ5K>(bytes, out),
            Type::Q6K => blocks::<BlockQ6K>(bytes, out),
        }
    }
}

fn blocks<B: GgmlType>(bytes: &[u8], out: &mut [f32]) {
    assert_eq!(bytes.len() / size_of::<B>() * B::BLCK_SIZE, out.len(), "blocks and numbers");
    assert!(bytes.as_ptr().cast::<B>().is_aligned(), "blocks lie at even addresses");
    // SAFETY: candle's blocks are `repr(C)` structs of bytes and f16, for which every bit pattern is
    // a value; length and alignment were asserted above, and the slice lives no longer than `bytes`.
    let blocks =
        unsafe { std::slice::from_raw_parts(bytes.as_ptr().cast::<B>(), bytes.len() / size_of::<B>()) };
    B::to_float(blocks, out);
}
