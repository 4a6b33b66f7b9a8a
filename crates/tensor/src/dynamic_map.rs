//! The dynamic 8-bit maps (Dettmers 2016): 256 numbers that a byte stands for, ascending, finer towards 0.
//! To the bit as bitsandbytes makes them (`create_dynamic_map` in bitsandbytes/functional.py).
//!
//! For each i in 0..7, the k means of neighbours in linspace(0.1, 1, k + 1), times 10^(i − 6); and 0 and 1.
//!   signed: k = 2ⁱ, with both signs;   unsigned: k = 2ⁱ⁺¹

use std::sync::LazyLock;

/// The signed map.
pub fn dynamic_map() -> &'static [f32; 256] {
    static MAP: LazyLock<[f32; 256]> =
        LazyLock::new(|| ascending((0..7).flat_map(|i| means(i, 1 << i)).flat_map(|it| [it, -it])));
    &MAP
}

/// The unsigned map.
pub fn unsigned_dynamic_map() -> &'static [f32; 256] {
    static MAP: LazyLock<[f32; 256]> = LazyLock::new(|| ascending((0..7).flat_map(|i| means(i, 2 << i))));
    &MAP
}

fn means(i: i32, count: usize) -> impl Iterator<Item = f32> {
    // As torch.linspace steps in f32: from both ends towards the middle, with fused products.
    let step = (1.0 - 0.1f32) / count as f32;
    let boundary = move |j: usize| match j < count.div_ceil(2) {
        true => step.mul_add(j as f32, 0.1),
        false => (-step).mul_add((count - j) as f32, 1.0),
    };
    let scale = 10f64.powi(i - 6) as f32;
    (0..count).map(move |j| scale * ((boundary(j) + boundary(j + 1)) / 2.0))
}

fn ascending(means: impl Iterator<Item = f32>) -> [f32; 256] {
    let mut values: Vec<f32> = [0.0, 1.0].into_iter().chain(means).collect();
    values.sort_by(f32::total_cmp);
    values.try_into().expect("2 + 2·(1 + 2 + … + 64) = 2 + (2 + 4 + … + 128) values")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_maps_have_their_known_landmarks() {
        let (signed, unsigned) = (dynamic_map(), unsigned_dynamic_map());
        assert!((signed[0] + 0.992_968_74).abs() < 1e-7);
        assert_eq!((signed[127], signed[255]), (0.0, 1.0));
        assert!((signed[128] - 5.5e-7).abs() < 1e-12);
        assert_eq!((unsigned[0], unsigned[255]), (0.0, 1.0));
        assert!((unsigned[1] - 3.25e-7).abs() < 1e-12 && (unsigned[254] - 0.996_484_4).abs() < 1e-7);
        for map in [signed, unsigned] {
            assert!(map.windows(2).all(|pair| pair[0] < pair[1]));
        }
    }
}
