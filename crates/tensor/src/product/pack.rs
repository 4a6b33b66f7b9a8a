//! Rearranging operands into the order in which a micro-kernel reads them: 16 lanes (rows of `a`,
//! columns of `b`) side by side for each word of k.

use std::arch::x86_64::*;

use super::kernel_avx512::lanes;

/// Numbers to be packed: that of lane l at depth p is at `l · lane_step + p · depth_step`.
#[derive(Clone, Copy)]
pub(super) struct Source {
    pub(super) data: *const f32,
    pub(super) lane_step: usize,
    pub(super) depth_step: usize,
    /// At most 16 lanes exist; the others are packed as zeros.
    pub(super) lanes: usize,
    pub(super) depth: usize,
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
