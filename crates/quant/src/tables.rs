//! Code tables, as bitsandbytes has them (bitsandbytes/functional.py, csrc/kernels.cu).

/// The map that scales of blocks are stored by.
pub use ferrotune_tensor::dynamic_map;

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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn thresholds_lie_midway_between_levels() {
        for (k, threshold) in NF4_THRESHOLDS.iter().enumerate() {
            let midway = (f64::from(NF4_LEVELS[k]) + f64::from(NF4_LEVELS[k + 1])) / 2.0;
            assert!((midway - f64::from(*threshold)).abs() < 1e-7);
        }
    }
}
