//! Counted randomness: a number is a function of who asks for it, not of who asked before.
//!
//! The mixer is SplitMix64's finaliser (Steele, Lea, Flood 2014, "Fast splittable pseudorandom
//! number generators"), applied to every part of the key in turn.

/// A stream of numbers with a key, readable at any index and on any device alike.
#[derive(Clone, Copy, Debug)]
pub struct Counter {
    key: u64,
}

impl Counter {
    /// The stream of this key, such as (seed, step, micro-step, parameter).
    pub fn new(key: &[u64]) -> Counter {
        Counter { key: key.iter().fold(0x243F_6A88_85A3_08D3, |state, part| mix(state ^ mix(*part))) }
    }

    /// What all its parts come to, for kernels that read the same stream.
    pub fn key(self) -> u64 {
        self.key
    }

    /// The 64 bits at `index`.
    pub fn bits(self, index: u64) -> u64 {
        mix(self.key ^ mix(index))
    }

    /// The number at `index`, uniform in [0, 1), with 24 bits: exact in f32.
    pub fn unit(self, index: u64) -> f32 {
        (self.bits(index) >> 40) as f32 / (1u64 << 24) as f32
    }

    /// The number at `index`, normal with mean 0 and variance 1 (Box, Muller 1958).
    pub fn normal(self, index: u64) -> f64 {
        let unit = |at: u64| f64::from(self.unit(at));
        let radius = (-2.0 * (1.0 - unit(2 * index)).ln()).sqrt();
        radius * (std::f64::consts::TAU * unit(2 * index + 1)).cos()
    }
}

/// A part of a key that stands for a name: its FNV-1a hash.
pub fn stream_of(name: &str) -> u64 {
    name.bytes()
        .fold(0xCBF2_9CE4_8422_2325, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01B3))
}

/// `n` numbers uniform in [-bound, bound).
pub fn uniform(counter: Counter, bound: f64, n: usize) -> Vec<f32> {
    (0..n as u64).map(|index| ((2.0 * f64::from(counter.unit(index)) - 1.0) * bound) as f32).collect()
}

fn mix(mut z: u64) -> u64 {
    z = z.wrapping_add(0x9E37_79B9_7F4A_7C15);
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_key_and_index_give_the_same_number() {
        let (a, b) = (Counter::new(&[1, 2, 3]), Counter::new(&[1, 2, 4]));
        assert_eq!(a.bits(7), Counter::new(&[1, 2, 3]).bits(7));
        assert_ne!(a.bits(7), b.bits(7));
        assert_ne!(a.bits(7), a.bits(8));
    }

    #[test]
    fn normal_numbers_have_their_moments() {
        let values: Vec<f64> = (0..100_000).map(|index| Counter::new(&[6]).normal(index)).collect();
        let moment = |power: i32| values.iter().map(|it| it.powi(power)).sum::<f64>() / 1e5;
        let (mean, variance, fourth) = (moment(1), moment(2), moment(4));
        assert!(mean.abs() < 0.02 && (variance - 1.0).abs() < 0.02 && (fourth - 3.0).abs() < 0.15);
    }

    #[test]
    fn numbers_fill_the_interval_evenly() {
        let values = uniform(Counter::new(&[5]), 2.0, 100_000);
        let mean = values.iter().sum::<f32>() / 1e5;
        let variance = values.iter().map(|it| it * it).sum::<f32>() / 1e5;
        assert!(mean.abs() < 0.02, "{mean}");
        assert!((variance - 4.0 / 3.0).abs() < 0.02, "{variance}");
        assert!(values.iter().all(|it| (-2.0..2.0).contains(it)));
    }
}
