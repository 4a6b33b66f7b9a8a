//! NF4 with block-wise scales, the scales themselves quantised again ("double quantisation").
//!
//!   w ≈ level[code]·absmax,   a block is 64 elements of the row-major matrix
//!   absmax ≈ map[code]·nested_absmax + offset,   a group is 256 blocks
//! Two codes share a byte, the earlier element in the high half.
//! Source: bitsandbytes/functional.py and csrc/kernels.cu.

use std::ops::Range;

use ferrotune_nn::{Weight, backward_tiles, forward_tiles, widen};
use ferrotune_tensor::{DType, Error, Precision, Result, Tensor, Tiles};
use half::{bf16, f16};
use rayon::prelude::*;

use crate::mean::mean;
use crate::tables::{NF4_LEVELS, NF4_THRESHOLDS, dynamic_map};

/// Elements that share a scale.
pub const BLOCK: usize = 64;
/// Blocks that share a scale of scales.
pub const GROUP: usize = 256;

/// Keeps the reciprocal of a scale finite.
const SMALLEST: f32 = 1e-38;

/// How scales of blocks are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scales {
    /// In f32: 4.5 bits a weight.
    Plain,
    /// Quantised again: 4.127 bits a weight.
    Nested,
}

/// The scales of a weight's blocks.
#[derive(Clone, Debug, PartialEq)]
pub enum Absmax {
    /// One f32 a block.
    Plain(Vec<f32>),
    /// One byte a block, into the dynamic map.
    Nested {
        /// One a block.
        codes: Vec<u8>,
        /// One for 256 blocks.
        nested_absmax: Vec<f32>,
        /// Mean of all blocks' scales, taken off before quantising.
        offset: f32,
    },
}

impl Absmax {
    #[inline(always)]
    fn of_block(&self, map: &[f32; 256], block: usize) -> f32 {
        match self {
            Absmax::Plain(values) => values[block],
            Absmax::Nested { codes, nested_absmax, offset } => {
                map[codes[block] as usize] * nested_absmax[block / GROUP] + offset
            }
        }
    }

    fn bytes(&self) -> usize {
        match self {
            Absmax::Plain(values) => 4 * values.len(),
            Absmax::Nested { codes, nested_absmax, .. } => codes.len() + 4 * nested_absmax.len() + 4,
        }
    }
}

/// A frozen (output, input) matrix in 4 bits.
#[derive(Clone, Debug)]
pub struct Nf4Weight {
    rows: usize,
    cols: usize,
    /// ⌈rows·cols / 2⌉ bytes.
    pub codes: Vec<u8>,
    /// Scales of the ⌈rows·cols / 64⌉ blocks.
    pub absmax: Absmax,
    /// The original's type, which dequantised numbers are rounded to: f32, f16 or bf16.
    pub dtype: DType,
    /// How exactly its products are computed.
    pub precision: Precision,
}

impl Nf4Weight {
    /// Quantises a matrix (output, input) of f32, f16 or bf16 as bitsandbytes does.
    ///
    /// # Errors
    /// When the matrix holds NaN or infinity, or isn't of these types.
    pub fn quantize(value: &Tensor, scales: Scales, precision: Precision) -> Result<Nf4Weight> {
        let (rows, cols) = value.shape();
        let wide;
        let values = match value.dtype() {
            DType::F32 => value.values::<f32>()?,
            _ => {
                wide = value.to_f32()?;
                &wide
            }
        };
        let mut codes = vec![0; values.len().div_ceil(2)];
        let blocks = values.par_chunks(BLOCK).zip(codes.par_chunks_mut(BLOCK / 2));
        let absmax: Vec<f32> = blocks.map(|(values, codes)| quantize_block(values, codes)).collect();
        if let Some(block) = absmax.iter().position(|it| !it.is_finite()) {
            let row = block * BLOCK / cols;
            return Err(Error::msg(format!(
                "weight of {rows} rows and {cols} columns: row {row} holds NaN or infinity; the file is damaged or was saved by a failed run"
            )));
        }
        let absmax = match scales {
            Scales::Plain => Absmax::Plain(absmax),
            Scales::Nested => nest(&absmax),
        };
        Ok(Nf4Weight { rows, cols, codes, absmax, dtype: value.dtype(), precision })
    }

    /// From stored parts.
    ///
    /// # Errors
    /// When a part's length doesn't fit the shape.
    pub fn from_parts(
        shape: (usize, usize),
        codes: Vec<u8>,
        absmax: Absmax,
        dtype: DType,
        precision: Precision,
    ) -> Result<Nf4Weight> {
        let n = shape.0 * shape.1;
        let blocks = n.div_ceil(BLOCK);
        let check = |what: &str, expected: usize, got: usize| match expected == got {
            true => Ok(()),
            false => Err(Error::msg(format!(
                "{what} of a 4-bit weight of {shape:?}: expected {expected}, got {got}"
            ))),
        };
        check("bytes of codes", n.div_ceil(2), codes.len())?;
        match &absmax {
            Absmax::Plain(values) => check("scales", blocks, values.len())?,
            Absmax::Nested { codes, nested_absmax, .. } => {
                check("scales", blocks, codes.len())?;
                check("scales of scales", blocks.div_ceil(GROUP), nested_absmax.len())?;
            }
        }
        Ok(Nf4Weight { rows: shape.0, cols: shape.1, codes, absmax, dtype, precision })
    }

    /// Dequantises elements of the row-major matrix.
    fn decode(&self, elements: Range<usize>, out: &mut [f32]) {
        let map = dynamic_map();
        let (mut at, mut out) = (elements.start, out);
        while at < elements.end {
            let block = at / BLOCK;
            let end = ((block + 1) * BLOCK).min(elements.end);
            let (piece, rest) = out.split_at_mut(end - at);
            let absmax = self.absmax.of_block(map, block);
            if piece.len() == BLOCK {
                decode_block(&self.codes[at / 2..end / 2], absmax, self.dtype, piece);
            } else {
                for (i, out) in (at..end).zip(piece.iter_mut()) {
                    let code = if i % 2 == 0 { self.codes[i / 2] >> 4 } else { self.codes[i / 2] & 15 };
                    *out = NF4_LEVELS[code as usize] * absmax;
                }
                round_to(self.dtype, piece);
            }
            (at, out) = (end, rest);
        }
    }
}

impl Tiles for Nf4Weight {
    fn rows(&self) -> usize {
        self.rows
    }

    fn cols(&self) -> usize {
        self.cols
    }

    fn read(&self, rows: Range<usize>, cols: Range<usize>, out: &mut [f32]) {
        for (row, out) in rows.zip(out.chunks_mut(cols.len())) {
            self.decode(row * self.cols + cols.start..row * self.cols + cols.end, out);
        }
    }
}

impl Weight for Nf4Weight {
    fn rows(&self) -> usize {
        self.rows
    }

    fn cols(&self) -> usize {
        self.cols
    }

    fn bytes(&self) -> usize {
        self.codes.len() + self.absmax.bytes()
    }

    fn forward(&self, x: &Tensor, y: &mut Tensor, at: usize) -> Result<()> {
        forward_tiles(self, self.precision, x, y, at)
    }

    fn backward(&self, dy: &Tensor, at: usize, beta: f64, dx: &mut Tensor) -> Result<()> {
        backward_tiles(self, self.precision, dy, at, beta, dx)
    }

    fn to_dense(&self) -> Result<Tensor> {
        Ok(widen(self))
    }
}

/// Writes the codes of up to 64 numbers, returns their scale.
fn quantize_block(values: &[f32], codes: &mut [u8]) -> f32 {
    #[cfg(target_arch = "x86_64")]
    if values.len() == BLOCK && std::is_x86_feature_detected!("avx512f") {
        // SAFETY: the CPU has AVX-512.
        return unsafe { quantize_block_avx512(values, codes) };
    }
    quantize_block_plain(values, codes)
}

fn quantize_block_plain(values: &[f32], codes: &mut [u8]) -> f32 {
    let largest = |max: f32, it: &f32| if it.abs() > max || it.is_nan() { it.abs() } else { max };
    let mut absmax = values.iter().fold(0.0, largest);
    if values.len() < BLOCK && absmax < SMALLEST {
        absmax = SMALLEST; // bitsandbytes stores a last, partial block of zeros so
    }
    // A block of zeros gets the code of zero.
    let inverse = 1.0 / absmax.max(SMALLEST);
    let mut of_element = [7u8; BLOCK];
    for (code, value) in of_element.iter_mut().zip(values) {
        let x = value * inverse;
        *code = NF4_THRESHOLDS.iter().map(|threshold| u8::from(x > *threshold)).sum();
    }
    pack(&of_element, codes);
    absmax
}

/// Two codes into each byte, the earlier in the high half.
fn pack(of_element: &[u8; BLOCK], codes: &mut [u8]) {
    for (byte, pair) in codes.iter_mut().zip(of_element.chunks_exact(2)) {
        *byte = pair[0] << 4 | pair[1];
    }
}

/// Sixteen numbers at a time are compared with each threshold.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f")]
fn quantize_block_avx512(values: &[f32], codes: &mut [u8]) -> f32 {
    use std::arch::x86_64::*;
    assert!(values.len() == BLOCK);
    // SAFETY: sixteen f32 are read from each sixteenth of sixty-four.
    let load = |sixteen: usize| unsafe { _mm512_loadu_ps(values.as_ptr().add(16 * sixteen)) };
    let (mut largest, mut ordered) = (_mm512_setzero_ps(), !0);
    for sixteen in 0..BLOCK / 16 {
        let absolute = _mm512_abs_ps(load(sixteen));
        largest = _mm512_max_ps(largest, absolute);
        ordered &= _mm512_cmp_ps_mask::<_CMP_ORD_Q>(absolute, absolute);
    }
    if ordered != !0 {
        return f32::NAN;
    }
    let absmax = _mm512_reduce_max_ps(largest);
    let inverse = _mm512_set1_ps(1.0 / absmax.max(SMALLEST));
    let mut of_element = [0u8; BLOCK];
    for (sixteen, of_element) in of_element.chunks_exact_mut(16).enumerate() {
        let x = _mm512_mul_ps(load(sixteen), inverse);
        let (mut code, one) = (_mm512_setzero_si512(), _mm512_set1_epi32(1));
        for threshold in NF4_THRESHOLDS {
            let above = _mm512_cmp_ps_mask::<_CMP_GT_OQ>(x, _mm512_set1_ps(threshold));
            code = _mm512_mask_add_epi32(code, above, code, one);
        }
        // SAFETY: sixteen bytes are written to a slice of sixteen.
        unsafe { _mm_storeu_si128(of_element.as_mut_ptr().cast(), _mm512_cvtepi32_epi8(code)) };
    }
    pack(&of_element, codes);
    absmax
}

fn nest(absmax: &[f32]) -> Absmax {
    let map = dynamic_map();
    let midpoints: Vec<f32> = map.windows(2).map(|pair| (pair[0] + pair[1]) / 2.0).collect();
    let offset = mean(absmax);
    let mut codes = vec![0; absmax.len()];
    let mut nested_absmax = Vec::new();
    for (group, codes) in absmax.chunks(GROUP).zip(codes.chunks_mut(GROUP)) {
        let largest = group.iter().fold(0.0f32, |max, it| max.max((it - offset).abs()));
        let inverse = 1.0 / largest.max(SMALLEST);
        for (code, absmax) in codes.iter_mut().zip(group) {
            let x = (absmax - offset) * inverse;
            *code = midpoints.partition_point(|midpoint| x > *midpoint) as u8;
        }
        nested_absmax.push(largest);
    }
    Absmax::Nested { codes, nested_absmax, offset }
}

fn round_to(dtype: DType, values: &mut [f32]) {
    match dtype {
        DType::BF16 => values.iter_mut().for_each(|it| *it = bf16::from_f32(*it).to_f32()),
        DType::F16 => values.iter_mut().for_each(|it| *it = f16::from_f32(*it).to_f32()),
        _ => {}
    }
}

fn decode_block(codes: &[u8], absmax: f32, dtype: DType, out: &mut [f32]) {
    #[cfg(target_arch = "x86_64")]
    if std::is_x86_feature_detected!("avx512f") {
        // SAFETY: the CPU has AVX-512.
        return unsafe { decode_block_avx512(codes, absmax, dtype, out) };
    }
    #[cfg(target_arch = "x86_64")]
    if std::is_x86_feature_detected!("avx2") {
        // SAFETY: the CPU has AVX2.
        return unsafe { decode_block_avx2(codes, absmax, dtype, out) };
    }
    decode_block_plain(codes, absmax, dtype, out);
}

fn decode_block_plain(codes: &[u8], absmax: f32, dtype: DType, out: &mut [f32]) {
    for (pair, byte) in out.chunks_exact_mut(2).zip(codes) {
        pair[0] = NF4_LEVELS[(byte >> 4) as usize] * absmax;
        pair[1] = NF4_LEVELS[(byte & 15) as usize] * absmax;
    }
    round_to(dtype, out);
}

/// The sixteen levels stay in one register, and a permutation looks up sixteen codes at once.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f")]
fn decode_block_avx512(codes: &[u8], absmax: f32, dtype: DType, out: &mut [f32]) {
    use std::arch::x86_64::*;
    assert!(codes.len() == BLOCK / 2 && out.len() == BLOCK);
    // SAFETY: sixteen f32 are read from a table of sixteen.
    let levels = unsafe { _mm512_loadu_ps(NF4_LEVELS.as_ptr()) };
    let shifts = _mm512_set_epi32(0, 4, 0, 4, 0, 4, 0, 4, 0, 4, 0, 4, 0, 4, 0, 4);
    let scale = _mm512_set1_ps(absmax);
    for (bytes, out) in codes.chunks_exact(8).zip(out.chunks_exact_mut(16)) {
        // SAFETY: eight bytes are read from a slice of eight.
        let bytes = unsafe { _mm_loadl_epi64(bytes.as_ptr().cast()) };
        let twice = _mm512_cvtepu8_epi32(_mm_unpacklo_epi8(bytes, bytes));
        // The permutation reads only the low four bits of each index.
        let mut values =
            _mm512_mul_ps(_mm512_permutexvar_ps(_mm512_srlv_epi32(twice, shifts), levels), scale);
        match dtype {
            DType::BF16 => {
                let bits = _mm512_castps_si512(values);
                let odd = _mm512_and_si512(_mm512_srli_epi32::<16>(bits), _mm512_set1_epi32(1));
                let rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
                values = _mm512_castsi512_ps(_mm512_and_si512(rounded, _mm512_set1_epi32(!0xffff)));
            }
            DType::F16 => {
                values = _mm512_cvtph_ps(_mm512_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(values));
            }
            _ => {}
        }
        // SAFETY: sixteen f32 are written to a slice of sixteen.
        unsafe { _mm512_storeu_ps(out.as_mut_ptr(), values) };
    }
}

/// Eight levels in each of two registers; the fourth bit of a code chooses between what they give.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn decode_block_avx2(codes: &[u8], absmax: f32, dtype: DType, out: &mut [f32]) {
    use std::arch::x86_64::*;
    assert!(codes.len() == BLOCK / 2 && out.len() == BLOCK);
    // SAFETY: twice eight f32 are read from a table of sixteen.
    let (lower, upper) =
        unsafe { (_mm256_loadu_ps(NF4_LEVELS.as_ptr()), _mm256_loadu_ps(NF4_LEVELS.as_ptr().add(8))) };
    let shifts = _mm256_set_epi32(0, 4, 0, 4, 0, 4, 0, 4);
    let scale = _mm256_set1_ps(absmax);
    for (bytes, out) in codes.chunks_exact(4).zip(out.chunks_exact_mut(8)) {
        let bytes = _mm_cvtsi32_si128(i32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]));
        let twice = _mm256_cvtepu8_epi32(_mm_unpacklo_epi8(bytes, bytes));
        // Permutations read only the low three bits of each index, the choice only the sign.
        let code = _mm256_srlv_epi32(twice, shifts);
        let fourth = _mm256_castsi256_ps(_mm256_slli_epi32::<28>(code));
        let (low, high) = (_mm256_permutevar8x32_ps(lower, code), _mm256_permutevar8x32_ps(upper, code));
        let values = _mm256_mul_ps(_mm256_blendv_ps(low, high, fourth), scale);
        // SAFETY: eight f32 are written to a slice of eight.
        unsafe { _mm256_storeu_ps(out.as_mut_ptr(), values) };
    }
    round_to(dtype, out);
}

#[cfg(test)]
mod tests {
    use ferrotune_tensor::{Counter, uniform};

    use super::*;

    fn random(rows: usize, cols: usize, dtype: DType) -> Tensor {
        Tensor::from_vec(rows, cols, uniform(Counter::new(&[3]), 0.1, rows * cols))
            .unwrap()
            .cast(dtype)
            .unwrap()
    }

    #[test]
    fn dequantised_numbers_are_near_and_need_few_bits() {
        let value = random(300, 320, DType::F32);
        for (scales, bits) in [(Scales::Plain, 4.5), (Scales::Nested, 4.13)] {
            let weight = Nf4Weight::quantize(&value, scales, Precision::Full).unwrap();
            assert!((8.0 * weight.bytes() as f64 / 96_000.0 - bits).abs() < 0.01);
            let got = weight.to_dense().unwrap();
            let pairs = got.values::<f32>().unwrap().iter().zip(value.values::<f32>().unwrap());
            let worst = pairs.map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
            assert!(worst < 0.1 * 0.16, "{worst}");
        }
    }

    #[test]
    fn any_piece_equals_the_same_piece_of_the_whole() {
        for dtype in [DType::F32, DType::BF16, DType::F16] {
            let (rows, cols) = (37, 101);
            let weight =
                Nf4Weight::quantize(&random(rows, cols, dtype), Scales::Nested, Precision::Full).unwrap();
            let map = dynamic_map();
            let mut whole: Vec<f32> = (0..rows * cols)
                .map(|i| {
                    let code = if i % 2 == 0 { weight.codes[i / 2] >> 4 } else { weight.codes[i / 2] & 15 };
                    NF4_LEVELS[code as usize] * weight.absmax.of_block(map, i / BLOCK)
                })
                .collect();
            round_to(dtype, &mut whole);
            for (r, c) in [(0..rows, 0..cols), (3..9, 1..100), (36..37, 100..101), (5..6, 7..7 + 70)] {
                let mut piece = vec![f32::NAN; r.len() * c.len()];
                weight.read(r.clone(), c.clone(), &mut piece);
                for (row, piece) in r.zip(piece.chunks(c.len())) {
                    assert_eq!(piece, &whole[row * cols + c.start..row * cols + c.end]);
                }
            }
        }
    }

    #[test]
    fn wide_registers_give_what_plain_loops_give() {
        for seed in 0..200 {
            let values = uniform(Counter::new(&[seed]), f64::from(seed as u32) * 0.01, BLOCK);
            let (mut wide, mut plain) = ([0; BLOCK / 2], [0; BLOCK / 2]);
            assert_eq!(quantize_block(&values, &mut wide), quantize_block_plain(&values, &mut plain));
            assert_eq!(wide, plain);
        }
    }

    #[test]
    fn registers_of_any_width_give_the_same_numbers() {
        for seed in 0..50 {
            let values = uniform(Counter::new(&[seed]), 256.0, BLOCK / 2);
            let codes: Vec<u8> = values.iter().map(|it| *it as i32 as u8).collect();
            for dtype in [DType::F32, DType::F16, DType::BF16] {
                let (mut plain, mut wide) = ([0.0; BLOCK], [0.0; BLOCK]);
                decode_block_plain(&codes, 0.37, dtype, &mut plain);
                decode_block(&codes, 0.37, dtype, &mut wide);
                assert_eq!(wide, plain);
                #[cfg(target_arch = "x86_64")]
                if std::is_x86_feature_detected!("avx2") {
                    // SAFETY: the CPU has AVX2.
                    unsafe { decode_block_avx2(&codes, 0.37, dtype, &mut wide) };
                    assert_eq!(wide, plain);
                }
            }
        }
    }

    #[test]
    fn damaged_weights_are_refused() {
        let mut value = random(4, 64, DType::F32);
        value.values_mut::<f32>().unwrap()[130] = f32::NAN;
        let error = Nf4Weight::quantize(&value, Scales::Nested, Precision::Full).unwrap_err().to_string();
        assert!(error.contains("row 2 holds NaN"), "{error}");
        let partial = Tensor::from_vec(1, 3, vec![1.0, f32::NAN, 2.0]).unwrap();
        assert!(Nf4Weight::quantize(&partial, Scales::Nested, Precision::Full).is_err());
        let parts = Absmax::Plain(vec![1.0; 3]);
        let error = Nf4Weight::from_parts((4, 64), vec![0; 128], parts, DType::F32, Precision::Full);
        assert!(error.unwrap_err().to_string().contains("expected 4, got 3"));
    }

    #[test]
    fn zeros_stay_zeros() {
        let value = Tensor::from_vec(2, 64, vec![0.0f32; 128]).unwrap();
        for scales in [Scales::Plain, Scales::Nested] {
            let weight = Nf4Weight::quantize(&value, scales, Precision::Full).unwrap();
            assert!(weight.to_dense().unwrap().values::<f32>().unwrap().iter().all(|it| *it == 0.0));
        }
    }
}
