//! Code tables, as bitsandbytes computes them (bitsandbytes/functional.py, csrc/kernels.cu).

use std::sync::LazyLock;

/// The sixteen values of NF4.
pub const NF4_LEVELS: [f32; 16] = [
    -1.0,
    -0.696_192_8,
    -0.525_073_05,
    -0.394_917_5,
    -0.284_441_38,
    -0.184_773_43,
    -0.091_050_036,
    0.0,
    0.079_580_3,
    0.160_930_2,
    0.246_112_3,
    0.337_915_24,
    0.440_709_83,
    0.562_617,
    0.722_956_84,
    1.0,
];

/// A number above the k-th of these has a code above k.
#[expect(clippy::excessive_precision, reason = "as the source states them")]
pub(crate) const NF4_THRESHOLDS: [f32; 15] = [
    -0.8480964004993439,
    -0.6106329262256622,
    -0.4599952697753906,
    -0.33967943489551544,
    -0.23460740596055984,
    -0.13791173323988914,
    -0.045525018125772476,
    0.03979014977812767,
    0.1202552504837513,
    0.2035212516784668,
    0.2920137718319893,
    0.3893125355243683,
    0.5016634166240692,
    0.6427869200706482,
    0.8614784178118011,
];

/// The signed dynamic 8-bit map that scales of blocks are stored by, ascending.
///
/// For each i in 0..7, the 2ⁱ means of neighbours in linspace(0.1, 1, 2ⁱ + 1), times 10^(i − 6), with
/// both signs; and 0 and 1.
pub fn dynamic_map() -> &'static [f32; 256] {
    static MAP: LazyLock<[f32; 256]> = LazyLock::new(|| {
        let mut values = vec![0.0f32, 1.0];
        for i in 0..7 {
            let count = 1usize << i;
            // As torch.linspace steps in f32: from both ends towards the middle, with fused products.
            let step = (1.0 - 0.1f32) / count as f32;
            let boundary = |j: usize| match j < count.div_ceil(2) {
                true => step.mul_add(j as f32, 0.1),
                false => (-step).mul_add((count - j) as f32, 1.0),
            };
            let scale = 10f64.powi(i - 6) as f32;
            for j in 0..count {
                let mean = (boundary(j) + boundary(j + 1)) / 2.0;
                values.extend([scale * mean, -scale * mean]);
            }
        }
        values.sort_by(f32::total_cmp);
        values.try_into().expect("2 + 2·(1 + 2 + … + 64) values")
    });
    &MAP
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_dynamic_map_has_its_known_landmarks() {
        let map = dynamic_map();
        assert!((map[0] + 0.992_968_74).abs() < 1e-7);
        assert_eq!((map[127], map[255]), (0.0, 1.0));
        assert!((map[128] - 5.5e-7).abs() < 1e-12);
        assert!(map.windows(2).all(|pair| pair[0] < pair[1]));
    }

    #[test]
    fn thresholds_lie_midway_between_levels() {
        for (k, threshold) in NF4_THRESHOLDS.iter().enumerate() {
            let midway = (f64::from(NF4_LEVELS[k]) + f64::from(NF4_LEVELS[k + 1])) / 2.0;
            assert!((midway - f64::from(*threshold)).abs() < 1e-7);
        }
    }
}
