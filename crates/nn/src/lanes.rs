//! Element loops compiled for the CPU's widest vectors, chosen at run time.

/// Defines a function whose body is compiled three times: for AVX-512, for AVX2 and plainly.
/// The compiler vectorises the plain `for` loops inside; a `for_each` may stay a call, compiled plainly.
/// `mul_add` is avoided, since without FMA it is a call.
macro_rules! vectorised {
    ($(#[$meta:meta])* fn $name:ident<$T:ident>($($arg:ident: $type:ty),* $(,)?) $(-> $ret:ty)? $body:block) => {
        $(#[$meta])*
        fn $name<$T: ferrotune_tensor::Real>($($arg: $type),*) $(-> $ret)? {
            #[inline(always)]
            fn plain<$T: ferrotune_tensor::Real>($($arg: $type),*) $(-> $ret)? $body
            #[cfg(target_arch = "x86_64")]
            {
                #[target_feature(enable = "avx512f,avx512vl,avx512bw,avx512dq,fma")]
                fn avx512<$T: ferrotune_tensor::Real>($($arg: $type),*) $(-> $ret)? { plain::<$T>($($arg),*) }
                #[target_feature(enable = "avx2,fma")]
                fn avx2<$T: ferrotune_tensor::Real>($($arg: $type),*) $(-> $ret)? { plain::<$T>($($arg),*) }
                if std::is_x86_feature_detected!("avx512bw")
                    && std::is_x86_feature_detected!("avx512dq")
                    && std::is_x86_feature_detected!("avx512vl")
                {
                    // SAFETY: the CPU has these features.
                    return unsafe { avx512::<$T>($($arg),*) };
                }
                if std::is_x86_feature_detected!("avx2") && std::is_x86_feature_detected!("fma") {
                    // SAFETY: the CPU has these features.
                    return unsafe { avx2::<$T>($($arg),*) };
                }
            }
            plain::<$T>($($arg),*)
        }
    };
}
pub(crate) use vectorised;

use ferrotune_tensor::Real;

/// Partial sums that a reduction keeps, so that it vectorises; fixed, so that results don't depend on the CPU.
const LANES: usize = 16;

/// Terms that are computed before they are added up: their loop is then one of its own, and vectorises.
const TERMS: usize = 16 * LANES;

/// Σ term(value), in a fixed order.
#[inline(always)]
pub(crate) fn sum_of<T: Real>(values: &[T], term: impl Fn(T) -> T) -> T {
    sum_of_pairs(values, values, |value, _| term(value))
}

/// Σ term(a, b) over two slices of one length, in a fixed order.
#[inline(always)]
pub(crate) fn sum_of_pairs<T: Real>(a: &[T], b: &[T], term: impl Fn(T, T) -> T) -> T {
    let whole = a.len() / LANES * LANES;
    let ((a, a_rest), (b, b_rest)) = (a.split_at(whole), b.split_at(whole));
    let mut lanes = [T::zero(); LANES];
    let mut terms = [T::zero(); TERMS];
    for (a, b) in a.chunks(TERMS).zip(b.chunks(TERMS)) {
        for (term_of, (a, b)) in terms.iter_mut().zip(a.iter().zip(b)) {
            *term_of = term(*a, *b);
        }
        for terms in terms[..a.len()].chunks_exact(LANES) {
            for (sum, term) in lanes.iter_mut().zip(terms) {
                *sum += *term;
            }
        }
    }
    let mut sum: T = lanes.iter().copied().sum();
    for (a, b) in a_rest.iter().zip(b_rest) {
        sum += term(*a, *b);
    }
    sum
}

/// The largest of n numbers.
#[inline(always)]
pub(crate) fn max_of<T: Real>(values: &[T]) -> T {
    let larger = |a: T, b: T| if a > b { a } else { b };
    let mut lanes = [T::neg_infinity(); LANES];
    let chunks = values.chunks_exact(LANES);
    let rest = chunks.remainder();
    for chunk in chunks {
        for (lane, value) in lanes.iter_mut().zip(chunk) {
            *lane = larger(*lane, *value);
        }
    }
    lanes.iter().chain(rest).copied().fold(T::neg_infinity(), larger)
}

/// eˣ: for f32 a polynomial that vectorises (relative error below 2e-7; Cephes' reduction and
/// degree), for f64 the library's.
#[inline(always)]
pub(crate) fn exp<T: Real>(x: T) -> T {
    if size_of::<T>() == size_of::<f32>() { T::of(f64::from(exp_f32(x.wide() as f32))) } else { x.exp() }
}

#[inline(always)]
fn exp_f32(x: f32) -> f32 {
    const ROUND: f32 = 12_582_912.0; // 1.5·2²³: adding it rounds to an integer
    let clamped = x.clamp(-87.3, 88.3);
    let rounded = clamped * std::f32::consts::LOG2_E + ROUND;
    let k = rounded - ROUND;
    let r = clamped - k * 0.693_359_4 - k * -2.121_944_4e-4;
    let mut p = 1.987_569_1e-4;
    for coefficient in [1.398_2e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 5e-1] {
        p = p * r + coefficient;
    }
    let mantissa = p * r * r + r + 1.0;
    // Very negative scores are masked ones: exactly zero there.
    // The low bits of `rounded` are k: a cast, which saturates, would not vectorise.
    let scale = f32::from_bits((rounded.to_bits() << 23).wrapping_add(127 << 23));
    if x < -87.3 { 0.0 } else { mantissa * scale }
}

/// σ(x) = 1/(1 + e⁻ˣ)
#[inline(always)]
pub(crate) fn sigmoid<T: Real>(x: T) -> T {
    T::one() / (T::one() + exp(-x))
}

/// tanh(x) = 2σ(2x) − 1
#[inline(always)]
pub(crate) fn tanh<T: Real>(x: T) -> T {
    let two = T::of(2.0);
    two * sigmoid(two * x) - T::one()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_exact_to_a_few_units() {
        for i in -8700..8800 {
            let x = i as f32 / 100.0;
            let exact = f64::from(x).exp();
            let got = f64::from(exp(x));
            assert!((got - exact).abs() <= 3e-7 * exact, "exp({x}) = {got}, not {exact}");
        }
        assert_eq!(exp(-1e30f32), 0.0);
        assert_eq!(exp(f32::NEG_INFINITY), 0.0);
        assert!(exp(f32::NAN).is_nan());
    }

    #[test]
    fn sums_take_every_element() {
        let values: Vec<f64> = (0..45).map(f64::from).collect();
        assert_eq!(sum_of(&values, |it| it), 990.0);
        let many: Vec<f64> = (0..1000).map(f64::from).collect();
        assert_eq!(sum_of_pairs(&many, &many, |a, b| a * b), 332_833_500.0);
        assert_eq!(max_of(&values), 44.0);
        assert_eq!(max_of::<f32>(&[-3.0]), -3.0);
    }
}
