//! The k-quants: blocks of 256 numbers, whose sub-blocks share scales that are themselves in few bits. Forms and search
//! are those of ggml's `quantize_row_q4_K_ref`, `_q5_K_ref` and `_q6_K_ref`, whose files llama.cpp publishes; candle's
//! `from_float` is an older search, with a larger error.

use ferrotune_tensor::f16;

const BLOCK: usize = 256;
/// Below this everything in a sub-block counts as zero.
const NOTHING: f32 = 1e-15;

/// How the numbers of Q4_K and Q5_K are kept: x ≈ d·scale·l − dmin·min, l in 0..=top.
#[derive(Clone, Copy, PartialEq)]
pub(super) enum Levels {
    /// Q4_K: 16 levels.
    Four,
    /// Q5_K: 32 levels, the fifth bits by themselves.
    Five,
}

/// Writes one block of Q4_K (144 bytes) or Q5_K (176 bytes): d, dmin, eight 6-bit scales and minima, for Q5_K
/// the fifth bits, and four bits of each number.
pub(super) fn with_minima(levels: Levels, x: &[f32], out: &mut [u8]) {
    let top: f32 = if levels == Levels::Four { 15.0 } else { 31.0 };
    let (mut scales, mut minima) = ([0.0f32; 8], [0.0f32; 8]);
    for (part, x) in x.chunks_exact(32).enumerate() {
        let mean_square = x.iter().map(|it| it * it).sum::<f32>() / 32.0;
        let weights: Vec<f32> = x.iter().map(|it| mean_square.sqrt() + it.abs()).collect();
        (scales[part], minima[part]) = scale_and_minimum(levels, x, &weights);
    }
    let most = |values: &[f32]| values.iter().copied().fold(0.0, f32::max);
    let (most_scale, most_minimum) = (most(&scales), most(&minima));
    let six_bits = |value: f32, most: f32| {
        let inverse = if most > 0.0 { 63.0 / most } else { 0.0 };
        (nearest(inverse * value) as u8).min(63)
    };
    let (d, dmin) = (f16::from_f32(most_scale / 63.0), f16::from_f32(most_minimum / 63.0));
    out.fill(0);
    out[..2].copy_from_slice(&d.to_le_bytes());
    out[2..4].copy_from_slice(&dmin.to_le_bytes());
    let mut numbers = [0u8; BLOCK];
    for (part, x) in x.chunks_exact(32).enumerate() {
        let (scale, minimum) = (six_bits(scales[part], most_scale), six_bits(minima[part], most_minimum));
        // The first four have bytes of their own; the upper two bits of the others stand above these.
        let packed = &mut out[4..16];
        if part < 4 {
            packed[part] |= scale;
            packed[part + 4] |= minimum;
        } else {
            packed[part + 4] = (scale & 15) | (minimum & 15) << 4;
            packed[part - 4] |= (scale >> 4) << 6;
            packed[part] |= (minimum >> 4) << 6;
        }
        let (step, below) = (d.to_f32() * f32::from(scale), dmin.to_f32() * f32::from(minimum));
        if step != 0.0 {
            let level = |x: &f32| nearest((x + below) / step).clamp(0, top as i32) as u8;
            numbers[32 * part..][..32].iter_mut().zip(x).for_each(|(number, x)| *number = level(x));
        }
    }
    let (fifth, lower) = if levels == Levels::Four { (0, 16) } else { (16, 48) };
    for (pair, both) in numbers.chunks_exact(64).enumerate() {
        for i in 0..32 {
            let (one, other) = (both[i], both[i + 32]);
            out[lower + 32 * pair + i] = (one & 15) | (other & 15) << 4;
            if levels == Levels::Five {
                out[fifth + i] |= (one >> 4) << (2 * pair) | (other >> 4) << (2 * pair + 1);
            }
        }
    }
}

/// The scale and the minimum (as −min ≥ 0) of 32 numbers. For some steps around the plain one, the levels that they
/// give, counted from the best minimum so far, are fitted to the numbers by weighted least squares; the fit with the
/// least error is taken.
fn scale_and_minimum(levels: Levels, x: &[f32], weights: &[f32]) -> (f32, f32) {
    let (top, first, tries) = match levels {
        Levels::Four => (15.0f32, -1.0f32, 20),
        Levels::Five => (31.0, -0.5, 15),
    };
    let mut low = x.iter().copied().fold(x[0], f32::min).min(0.0);
    let high = x.iter().copied().fold(x[0], f32::max);
    if high == low {
        return (0.0, -low);
    }
    let level = |inverse: f32, from: f32, x: f32| nearest(inverse * (x - from)).clamp(0, top as i32) as f32;
    let error = |inverse: f32, from: f32, scale: f32, low: f32| -> f32 {
        let off = |(x, w): (&f32, &f32)| {
            let off = scale * level(inverse, from, *x) + low - x;
            w * (off * off)
        };
        x.iter().zip(weights).map(off).sum()
    };
    let plain = top / (high - low);
    let mut scale = 1.0 / plain;
    let mut best = error(plain, low, scale, low);
    let sum_w: f32 = weights.iter().sum();
    let sum_x: f32 = x.iter().zip(weights).map(|(x, w)| w * x).sum();
    for step in 0..=tries {
        let (inverse, from) = ((first + 0.1 * step as f32 + top) / (high - low), low);
        let (mut sum_l, mut sum_l2, mut sum_xl) = (0.0f32, 0.0f32, 0.0f32);
        for (x, w) in x.iter().zip(weights) {
            let l = level(inverse, from, *x);
            sum_l += w * l;
            sum_l2 += w * l * l;
            sum_xl += w * l * x;
        }
        let determinant = sum_w * sum_l2 - sum_l * sum_l;
        if determinant <= 0.0 {
            continue;
        }
        let mut this_scale = (sum_w * sum_xl - sum_x * sum_l) / determinant;
        let mut this_low = (sum_l2 * sum_x - sum_l * sum_xl) / determinant;
        if this_low > 0.0 {
            (this_low, this_scale) = (0.0, sum_xl / sum_l2);
        }
        let this = error(inverse, from, this_scale, this_low);
        if this < best {
            (best, scale, low) = (this, this_scale, this_low);
        }
    }
    (scale, -low)
}

/// Writes one block of Q6_K, 210 bytes: x ≈ d·scale·(l − 32); four bits of each number, the upper two, sixteen
/// signed scales, d.
pub(super) fn six_bits(x: &[f32], out: &mut [u8]) {
    out.fill(0);
    let mut scales = [0.0f32; 16];
    let mut most = 0.0f32;
    for (scale, x) in scales.iter_mut().zip(x.chunks_exact(16)) {
        *scale = symmetric_scale(x);
        if scale.abs() > most.abs() {
            most = *scale;
        }
    }
    if most.abs() < NOTHING {
        return;
    }
    let inverse = -128.0 / most;
    let d = f16::from_f32(1.0 / inverse);
    let mut numbers = [0u8; BLOCK];
    for (part, x) in x.chunks_exact(16).enumerate() {
        let scale = nearest(inverse * scales[part]).min(127) as i8;
        out[192 + part] = scale as u8;
        let step = d.to_f32() * f32::from(scale);
        // What has no scale stays at the level of −32, as in ggml; times zero it is zero.
        if step != 0.0 {
            let level = |x: &f32| (nearest(x / step).clamp(-32, 31) + 32) as u8;
            numbers[16 * part..][..16].iter_mut().zip(x).for_each(|(number, x)| *number = level(x));
        }
    }
    for (half, numbers) in numbers.chunks_exact(128).enumerate() {
        for i in 0..32 {
            let [a, b, c, e] = [numbers[i], numbers[i + 32], numbers[i + 64], numbers[i + 96]];
            out[64 * half + i] = (a & 15) | (c & 15) << 4;
            out[64 * half + 32 + i] = (b & 15) | (e & 15) << 4;
            out[128 + 32 * half + i] = a >> 4 | (b >> 4) << 2 | (c >> 4) << 4 | (e >> 4) << 6;
        }
    }
    out[208..].copy_from_slice(&d.to_le_bytes());
}

/// The scale of 16 numbers with levels −32..=31, weighted by their squares: the best of the least-squares fits to the
/// levels that steps around −32 / (the number farthest from zero) give.
fn symmetric_scale(x: &[f32]) -> f32 {
    let farthest = x.iter().copied().fold(0.0f32, |far, it| if it.abs() > far.abs() { it } else { far });
    if farthest.abs() < NOTHING {
        return 0.0;
    }
    let fit = |inverse: f32| {
        let (mut sum_lx, mut sum_l2) = (0.0f32, 0.0f32);
        for x in x {
            let l = nearest(inverse * x).clamp(-32, 31) as f32;
            let w = x * x;
            sum_lx += w * x * l;
            sum_l2 += w * l * l;
        }
        (sum_lx, sum_l2)
    };
    let (sum_lx, sum_l2) = fit(-32.0 / farthest);
    let mut scale = if sum_l2 > 0.0 { sum_lx / sum_l2 } else { 0.0 };
    let mut best = scale * sum_lx;
    for step in (-9..=9).filter(|it| *it != 0) {
        let (sum_lx, sum_l2) = fit(-(32.0 + 0.1 * step as f32) / farthest);
        if sum_l2 > 0.0 && sum_lx * sum_lx > best * sum_l2 {
            scale = sum_lx / sum_l2;
            best = scale * sum_lx;
        }
    }
    scale
}

/// The nearest whole number, the even one of two, for what is far below 2²²: adding 1.5 · 2²³ leaves it in the lower bits. Every
/// processor has that, where rounding itself may be a call.
fn nearest(x: f32) -> i32 {
    let bits = (x.clamp(-4e6, 4e6) + 12_582_912.0).to_bits();
    (bits & 0x007f_ffff) as i32 - 0x0040_0000
}
