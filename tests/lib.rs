//! What test binaries share.

/// In −1..1: FNV-1a of the name, then lowbias32 (Wellons) of that plus a multiple of the index.
pub fn hashed(name: &str, count: usize) -> Vec<f32> {
    let seed =
        name.bytes().fold(2_166_136_261, |seed: u32, byte| (seed ^ u32::from(byte)).wrapping_mul(16_777_619));
    let number = |index: usize| {
        let mut x = (index as u32).wrapping_mul(0x9E37_79B9).wrapping_add(seed);
        x = (x ^ (x >> 16)).wrapping_mul(0x7FEB_352D);
        x = (x ^ (x >> 15)).wrapping_mul(0x846C_A68B);
        x ^= x >> 16;
        (f64::from(x >> 8) / f64::from(1 << 23) - 1.0) as f32
    };
    (0..count).map(number).collect()
}
