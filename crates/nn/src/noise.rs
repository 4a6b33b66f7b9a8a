//! NEFTune (Jain et al. 2023): in training, x += uniform noise within ± alpha/√(L·C), L being the length of
//! a row's sequence. The noise is a function of (seed, step, micro-step, element).

use ferrotune_tensor::{Counter, Real, Result, Tensor, for_real};
use rayon::prelude::*;

use crate::Context;

/// Tells this randomness from that of dropout.
const STREAM: u64 = 0x4E45_4654;

/// Adds noise to embedded tokens (N, C), in training alone.
///
/// # Errors
/// When the device has no room.
pub fn add_noise(ctx: &Context, alpha: f64, x: &mut Tensor) -> Result<()> {
    if !ctx.training || alpha == 0.0 {
        return Ok(());
    }
    if x.gpu().is_some() {
        // No kernel does this yet: the noise is made here and sent over.
        let mut noise = Tensor::from_vec(x.rows(), x.cols(), vec![0.0f32; x.len()])?;
        add_noise(ctx, alpha, &mut noise)?;
        return x.add_scaled(1.0, &noise.to_device_as(&x.device(), x.dtype())?);
    }
    let counter = Counter::new(&[ctx.seed, ctx.step, ctx.micro_step, STREAM]);
    let width = x.cols();
    for_real!("noise", x.dtype(), T => {
        let values = x.values_mut::<T>()?;
        for sequence in ctx.sequences() {
            let most = alpha / ((sequence.len() * width) as f64).sqrt();
            let rows = values[sequence.start * width..sequence.end * width].par_chunks_mut(width);
            rows.enumerate().for_each(|(row, values)| {
                let first = ((sequence.start + row) * width) as u64;
                for (x, element) in values.iter_mut().zip(first..) {
                    *x += T::of(most * (2.0 * f64::from(counter.unit(element)) - 1.0));
                }
            });
        }
        Ok(())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn noise_is_as_wide_as_the_sequence_says_and_off_outside_training() {
        let noise = |step: u64, training: bool| {
            let ctx = Context { seed: 3, step, training, ..Context::new(vec![0, 50, 60]) };
            let mut x = Tensor::from_vec(60, 100, vec![0.0f64; 6000]).unwrap();
            add_noise(&ctx, 5.0, &mut x).unwrap();
            x.values::<f64>().unwrap().to_vec()
        };
        let first = noise(1, true);
        for (values, length) in [(&first[..5000], 50.0f64), (&first[5000..], 10.0)] {
            let (most, n) = (5.0 / (length * 100.0).sqrt(), values.len() as f64);
            let highest = values.iter().fold(0.0f64, |most, it| most.max(it.abs()));
            assert!(highest <= most && highest > 0.99 * most, "{highest} {most}");
            let mean = values.iter().sum::<f64>() / n;
            let square = values.iter().map(|it| it * it).sum::<f64>() / n;
            // Of uniform numbers: mean 0, mean square most²/3.
            assert!(mean.abs() < 0.05 * most, "{mean}");
            assert!((square / (most * most / 3.0) - 1.0).abs() < 0.05, "{square}");
        }
        assert_eq!(first, noise(1, true));
        assert_ne!(first, noise(2, true));
        assert!(noise(1, false).iter().all(|it| *it == 0.0));
    }
}
