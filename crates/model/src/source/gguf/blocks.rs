//! Types that GGUF stores numbers in. Plain ones are converted here, blocks by candle's routines.

use candle_core::quantized::GgmlType;
use candle_core::quantized::k_quants::{
    BlockQ4_0, BlockQ4_1, BlockQ4K, BlockQ5_0, BlockQ5_1, BlockQ5K, BlockQ6K, BlockQ8_0,
};

use crate::source::mapped::Plain;

/// A type that tensors of GGUF files have here. Others are refused by name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum GgufType {
    F32,
    F16,
    Bf16,
    Q4_0,
    Q4_1,
    Q5_0,
    Q5_1,
    Q8_0,
    Q4K,
    Q5K,
    Q6K,
}

/// Type, its number in files, numbers in a block, bytes of a block.
const TYPES: &[(GgufType, u32, usize, usize)] = &[
    (GgufType::F32, 0, 1, 4),
    (GgufType::F16, 1, 1, 2),
    (GgufType::Bf16, 30, 1, 2),
    (GgufType::Q4_0, 2, 32, 18),
    (GgufType::Q4_1, 3, 32, 20),
    (GgufType::Q5_0, 6, 32, 22),
    (GgufType::Q5_1, 7, 32, 24),
    (GgufType::Q8_0, 8, 32, 34),
    (GgufType::Q4K, 12, 256, 144),
    (GgufType::Q5K, 13, 256, 176),
    (GgufType::Q6K, 14, 256, 210),
];

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

impl GgufType {
    /// The type of this number; its name where it can't be read.
    pub(super) fn from_id(id: u32) -> Result<GgufType, String> {
        let found = TYPES.iter().find(|it| it.1 == id).map(|it| it.0);
        found.ok_or_else(|| NAMES.get(id as usize).map_or(format!("type {id}"), |it| it.to_string()))
    }

    fn facts(self) -> (u32, usize, usize) {
        let (_, id, block, bytes) = TYPES[self as usize];
        (id, block, bytes)
    }

    /// Its number in files.
    pub fn id(self) -> u32 {
        self.facts().0
    }

    /// As llama.cpp writes it.
    pub fn name(self) -> &'static str {
        NAMES[self.id() as usize]
    }

    /// Numbers in a block; rows are whole blocks.
    pub fn block(self) -> usize {
        self.facts().1
    }

    /// Bytes of a block.
    pub fn block_bytes(self) -> usize {
        self.facts().2
    }

    /// Writes the numbers of whole blocks on the calling thread.
    ///
    /// # Panics
    /// When bytes and numbers aren't as many blocks of this type.
    pub fn read(self, bytes: &[u8], out: &mut [f32]) {
        match self {
            GgufType::F32 => Plain::F32.read_serial(bytes, out),
            GgufType::F16 => Plain::F16.read_serial(bytes, out),
            GgufType::Bf16 => Plain::Bf16.read_serial(bytes, out),
            GgufType::Q4_0 => blocks::<BlockQ4_0>(bytes, out),
            GgufType::Q4_1 => blocks::<BlockQ4_1>(bytes, out),
            GgufType::Q5_0 => blocks::<BlockQ5_0>(bytes, out),
            GgufType::Q5_1 => blocks::<BlockQ5_1>(bytes, out),
            GgufType::Q8_0 => blocks::<BlockQ8_0>(bytes, out),
            GgufType::Q4K => blocks::<BlockQ4K>(bytes, out),
            GgufType::Q5K => blocks::<BlockQ5K>(bytes, out),
            GgufType::Q6K => blocks::<BlockQ6K>(bytes, out),
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
