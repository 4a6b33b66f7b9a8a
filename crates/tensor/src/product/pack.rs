//! Rearranging operands into the order in which a micro-kernel reads them: 16 lanes (rows of `a`,
//! columns of `b`) side by side for each word of k.

use std::arch::x86_64::*;

use half::bf16;

use super::kernel_avx512::lanes;
use super::kernel_split::{PART, PARTS};

/// Numbers to be packed: that of lane l at depth p is at `l · lane_step + p · depth_step`.
#[derive(Clone, Copy)]
pub(super) struct Source<T = f32> {
    pub(super) data: *const T,
    pub(super) lane_step: usize,
    pub(super) depth_step: usize,
    /// How many lanes exist. At most 16 are packed; those that don't exist as zeros.
    pub(super) lanes: usize,
    pub(super) depth: usize,
}

impl Source {
    /// Of up to 32 lanes, the first 16 and the others.
    pub(super) fn halves(self) -> (Source, Source) {
        let lower = Source {
            data: self.data.wrapping_add(16 * self.lane_step),
            lanes: self.lanes.saturating_sub(16),
            ..self
        };
        (Source { lanes: self.lanes.min(16), ..self }, lower)
    }
}

/// Word p of lane l goes to `out[p · step + l]` for all 16 lanes.
///
/// # Safety
/// `source` can be read, `out` written, and the CPU has AVX-512F.
#[target_feature(enable = "avx512f")]
pub(super) unsafe fn pack_f32(source: Source, out: *mut f32, step: usize) {
    let Source { data, lane_step, depth_step, depth, .. } = source;
    if lane_step == 1 {
        let mask = lanes(source.lanes);
        for p in 0..depth {
            // SAFETY: the mask keeps to the lanes that exist.
            unsafe {
                let row = _mm512_maskz_loadu_ps(mask, data.add(p * depth_step));
                _mm512_storeu_ps(out.add(p * step), row);
            }
        }
    } else if depth_step == 1 {
        let mut p = 0;
        while p < depth {
            let mask = lanes(depth - p);
            let mut rows = [_mm512_setzero_si512(); 16];
            for (l, row) in rows.iter_mut().enumerate().take(source.lanes) {
                // SAFETY: the mask keeps to the depth that exists, `take` to the lanes.
                *row = unsafe { _mm512_maskz_loadu_epi32(mask, data.add(l * lane_step + p).cast()) };
            }
            let cols = transpose(rows);
            for (q, col) in cols.iter().enumerate().take(depth - p) {
                // SAFETY: word p + q < depth is inside `out`.
                unsafe { _mm512_storeu_si512(out.add((p + q) * step).cast(), *col) };
            }
            p += 16;
        }
    } else {
        for p in 0..depth {
            for l in 0..16 {
                // SAFETY: lane and depth exist.
                unsafe {
                    *out.add(p * step + l) =
                        if l < source.lanes { *data.add(l * lane_step + p * depth_step) } else { 0.0 };
                }
            }
        }
    }
}

/// Rows of 16 words become columns.
#[inline]
#[target_feature(enable = "avx512f")]
pub(super) fn transpose(r: [__m512i; 16]) -> [__m512i; 16] {
    // Pairs of rows, then fours, within each 128-bit quarter; then the quarters.
    let mut t = [_mm512_setzero_si512(); 16];
    for i in 0..8 {
        t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
        t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
    }
    let mut u = t;
    for i in 0..4 {
        u[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
        u[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
        u[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
        u[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
    }
    // u[4 i + j] holds, in quarter q, column 4 q + j of rows 4 i ..
    let mut out = u;
    for j in 0..4 {
        let a = _mm512_shuffle_i32x4::<0x44>(u[j], u[4 + j]); // a0 a1 b0 b1
        let b = _mm512_shuffle_i32x4::<0xee>(u[j], u[4 + j]); // a2 a3 b2 b3
        let c = _mm512_shuffle_i32x4::<0x44>(u[8 + j], u[12 + j]);
        let d = _mm512_shuffle_i32x4::<0xee>(u[8 + j], u[12 + j]);
        out[j] = _mm512_shuffle_i32x4::<0x88>(a, c);
        out[4 + j] = _mm512_shuffle_i32x4::<0xdd>(a, c);
        out[8 + j] = _mm512_shuffle_i32x4::<0x88>(b, d);
        out[12 + j] = _mm512_shuffle_i32x4::<0xdd>(b, d);
    }
    out
}

/// The same in bf16: word p of lane l holds depths 2 p (low half) and 2 p + 1.
///
/// # Safety
/// As [`pack_f32`], with AVX512_BF16 and AVX-512BW.
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
pub(super) unsafe fn pack_bf16(source: Source, out: *mut f32, step: usize) {
    let words = source.depth.div_ceil(2);
    let mut word = 0;
    while word < words {
        let count = (words - word).min(16);
        let out = out.wrapping_add(word * step);
        // SAFETY: the caller's.
        unsafe {
            if source.lane_step == 1 {
                for (q, col) in columns(source, word, count).iter().enumerate().take(count) {
                    _mm512_storeu_si512(out.add(q * step).cast(), *col);
                }
            } else {
                for (q, col) in transpose(rows(source, word)).iter().enumerate().take(count) {
                    _mm512_storeu_si512(out.add(q * step).cast(), *col);
                }
            }
        }
        word += 16;
    }
}

/// What [`pack_bf16`] makes, of numbers that are bf16 already. Either lanes or depth are side by side.
///
/// # Safety
/// As [`pack_bf16`].
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
pub(super) unsafe fn pack_halves(source: Source<bf16>, out: *mut f32, step: usize) {
    let Source { data, lane_step, depth_step, depth, .. } = source;
    let words = depth.div_ceil(2);
    if lane_step == 1 {
        let mask = lanes(source.lanes);
        for word in 0..words {
            let at = data.wrapping_add(2 * word * depth_step);
            // SAFETY: the mask keeps to the lanes that exist, the comparison to the depth.
            unsafe {
                let even = _mm256_maskz_loadu_epi16(mask, at.cast());
                let mask = if 2 * word + 1 < depth { mask } else { 0 };
                let odd = _mm256_maskz_loadu_epi16(mask, at.wrapping_add(depth_step).cast());
                let odd = _mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(odd));
                let pairs = _mm512_or_si512(_mm512_cvtepu16_epi32(even), odd);
                _mm512_storeu_si512(out.add(word * step).cast(), pairs);
            }
        }
        return;
    }
    debug_assert_eq!(depth_step, 1);
    for word in (0..words).step_by(16) {
        let left = depth - 2 * word;
        let mask = if left >= 32 { u32::MAX } else { (1 << left) - 1 };
        let mut rows = [_mm512_setzero_si512(); 16];
        for (l, row) in rows.iter_mut().enumerate().take(source.lanes) {
            let at = data.wrapping_add(l * lane_step + 2 * word);
            // SAFETY: the mask keeps to the depth that exists, `take` to the lanes.
            *row = unsafe { _mm512_maskz_loadu_epi16(mask, at.cast()) };
        }
        for (q, col) in transpose(rows).iter().enumerate().take(words - word) {
            // SAFETY: this word of the depth is inside `out`.
            unsafe { _mm512_storeu_si512(out.add((word + q) * step).cast(), *col) };
        }
    }
}

/// In bf16 as tile registers take `a`: 16 words of a lane side by side, then the next lane. Words
/// past the depth are zeros, to a multiple of 16.
///
/// # Safety
/// As [`pack_bf16`].
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
pub(super) unsafe fn pack_bf16_tiles(source: Source, out: *mut f32, step: usize) {
    let words = source.depth.div_ceil(2);
    for (index, word) in (0..words).step_by(16).enumerate() {
        let out = out.wrapping_add(index * step);
        // SAFETY: the caller's.
        unsafe {
            let rows = if source.lane_step == 1 {
                transpose(columns(source, word, (words - word).min(16)))
            } else {
                rows(source, word)
            };
            for (l, row) in rows.iter().enumerate() {
                _mm512_storeu_si512(out.add(16 * l).cast(), *row);
            }
        }
    }
}

/// 16 words of each lane from `word` on, where a lane's numbers are side by side or anywhere.
///
/// # Safety
/// As [`pack_bf16`].
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
unsafe fn rows(source: Source, word: usize) -> [__m512i; 16] {
    let left = source.depth - 2 * word;
    let (low, high) = (lanes(left), lanes(left.saturating_sub(16)));
    let mut rows = [_mm512_setzero_si512(); 16];
    for (l, row) in rows.iter_mut().enumerate().take(source.lanes) {
        let at = source.data.wrapping_add(l * source.lane_step + 2 * word * source.depth_step);
        // SAFETY: masks and counts keep to the depth that exists.
        *row = unsafe {
            if source.depth_step == 1 {
                let low = _mm512_maskz_loadu_ps(low, at);
                round(low, _mm512_maskz_loadu_ps(high, at.wrapping_add(16)))
            } else {
                let mut numbers = [0.0; 32];
                for (p, number) in numbers.iter_mut().enumerate().take(left) {
                    *number = *at.add(p * source.depth_step);
                }
                round(_mm512_loadu_ps(numbers.as_ptr()), _mm512_loadu_ps(numbers.as_ptr().add(16)))
            }
        };
    }
    rows
}

/// So many words of all lanes from `word` on, where numbers of one depth are side by side.
///
/// # Safety
/// As [`pack_bf16`].
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
unsafe fn columns(source: Source, word: usize, count: usize) -> [__m512i; 16] {
    let mask = lanes(source.lanes);
    let pairs = _mm512_set_epi16(
        31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18,
        2, 17, 1, 16, 0,
    );
    let mut columns = [_mm512_setzero_si512(); 16];
    for (q, column) in columns.iter_mut().enumerate().take(count) {
        let p = 2 * (word + q);
        // SAFETY: the mask keeps to the lanes that exist, the comparison to the depth.
        let (even, odd) = unsafe {
            let at = source.data.wrapping_add(p * source.depth_step);
            let even = _mm512_maskz_loadu_ps(mask, at);
            let mask = if p + 1 < source.depth { mask } else { 0 };
            (even, _mm512_maskz_loadu_ps(mask, at.wrapping_add(source.depth_step)))
        };
        *column = _mm512_permutexvar_epi16(pairs, round(even, odd));
    }
    columns
}

/// To bf16, nearest even; the first 16 come first.
#[inline]
#[target_feature(enable = "avx512f,avx512bf16")]
fn round(first: __m512, second: __m512) -> __m512i {
    // SAFETY: both are 512 bits without meaning.
    unsafe { std::mem::transmute(_mm512_cvtne2ps_pbh(second, first)) }
}

/// What lies side by side in what is packed.
#[derive(Clone, Copy, PartialEq)]
pub(super) enum Beside {
    /// 16 lanes of a word, so many numbers before those of the next word: `b`.
    Lanes(usize),
    /// 16 words of a lane, then those of the next lane: `a` as tile registers take it.
    Words,
}

/// In parts of bf16 (see [`super::kernel_split`]), each of 16 words, which are [`PART`] apart. Words past the depth are zeros,
/// to a multiple of 16.
///
/// # Safety
/// `source` can be read, `out` written for so many parts, and the CPU has AVX-512F and DQ.
#[target_feature(enable = "avx512f,avx512dq")]
pub(super) unsafe fn pack_parts(source: Source, out: *mut f32, beside: Beside) {
    let even = _mm512_set_epi32(30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
    let odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
    for (index, start) in (0..source.depth).step_by(32).enumerate() {
        let out = out.wrapping_add(index * PARTS * PART);
        // SAFETY: the caller's.
        unsafe {
            let (first, second) = (square(source, start, beside), square(source, start + 16, beside));
            for i in 0..16 {
                let (parts, at) = match beside {
                    Beside::Lanes(step) => {
                        let depths = if i < 8 { &first } else { &second };
                        (parts(depths[2 * i % 16], depths[2 * i % 16 + 1]), i * step)
                    }
                    Beside::Words => {
                        let even = _mm512_permutex2var_ps(first[i], even, second[i]);
                        let odd = _mm512_permutex2var_ps(first[i], odd, second[i]);
                        (parts(even, odd), 16 * i)
                    }
                };
                for (part, words) in parts.iter().enumerate() {
                    _mm512_storeu_si512(out.add(part * PART + at).cast(), *words);
                }
            }
        }
    }
}

/// 16 depths from `start` on of 16 lanes, a vector for each depth or for each lane.
///
/// # Safety
/// As [`pack_parts`].
#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn square(source: Source, start: usize, beside: Beside) -> [__m512; 16] {
    let Source { lane_step, depth_step, .. } = source;
    let depth = source.depth.saturating_sub(start).min(16);
    let data = source.data.wrapping_add(start * depth_step);
    let mut rows = [_mm512_setzero_si512(); 16];
    let along_lanes = lane_step == 1;
    if along_lanes {
        let mask = lanes(source.lanes);
        for (p, row) in rows.iter_mut().enumerate().take(depth) {
            // SAFETY: the mask keeps to the lanes that exist, `take` to the depth.
            *row = unsafe { _mm512_maskz_loadu_epi32(mask, data.wrapping_add(p * depth_step).cast()) };
        }
    } else {
        let mask = lanes(depth);
        for (l, row) in rows.iter_mut().enumerate().take(source.lanes) {
            let lane = data.wrapping_add(l * lane_step);
            // SAFETY: masks and counts keep to the depth that exists, `take` to the lanes.
            *row = unsafe {
                if depth_step == 1 {
                    _mm512_maskz_loadu_epi32(mask, lane.cast())
                } else {
                    let mut numbers = [0.0_f32; 16];
                    for (p, number) in numbers.iter_mut().enumerate().take(depth) {
                        *number = *lane.add(p * depth_step);
                    }
                    _mm512_loadu_si512(numbers.as_ptr().cast())
                }
            };
        }
    }
    let rows = if along_lanes == (beside != Beside::Words) { rows } else { transpose(rows) };
    rows.map(|it| _mm512_castsi512_ps(it))
}

/// Words of h, m and l of 16 even and 16 odd depths.
#[inline]
#[target_feature(enable = "avx512f,avx512dq")]
fn parts(even: __m512, odd: __m512) -> [__m512i; PARTS] {
    let (even, odd) = (split(even), split(odd));
    std::array::from_fn(|it| _mm512_or_si512(_mm512_srli_epi32::<16>(even[it]), odd[it]))
}

/// `x = h + m + l`, exactly, each in the upper half of 32 bits. h is the nearest, so that m is of either sign
/// and what is left out of products has no bias; near f32's largest number it is the largest there is. Of
/// an infinity or NaN, m is that.
#[inline]
#[target_feature(enable = "avx512f,avx512dq")]
fn split(x: __m512) -> [__m512i; PARTS] {
    const SMALLER_WITH_SIGN_OF_FIRST: i32 = 2;
    let upper = _mm512_set1_epi32(0xffff_0000_u32 as i32);
    let largest = _mm512_set1_ps(f32::from_bits(0x7f7f_0000));
    let bounded = _mm512_castps_si512(_mm512_range_ps::<SMALLER_WITH_SIGN_OF_FIRST>(x, largest));
    let h = _mm512_and_si512(_mm512_add_epi32(bounded, _mm512_set1_epi32(0x8000)), upper);
    let rest = _mm512_sub_ps(x, _mm512_castsi512_ps(h));
    let m = _mm512_and_si512(_mm512_castps_si512(rest), upper);
    let l = _mm512_castps_si512(_mm512_sub_ps(rest, _mm512_castsi512_ps(m)));
    // Of numbers so small that they are denormal, l may have more bits.
    [h, m, _mm512_and_si512(l, upper)]
}
