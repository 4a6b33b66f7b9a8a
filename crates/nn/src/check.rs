//! Gradients against finite differences, for the tests of every crate that has a backward.

use ferrotune_tensor::{Counter, Result, Tensor};

use crate::{Context, Layer};

/// f64 numbers in [-0.5, 0.5), the same for the same seed.
///
/// # Panics
/// Never: the count fits the shape.
pub fn seeded(rows: usize, cols: usize, seed: u64) -> Tensor {
    let stream = Counter::new(&[seed]);
    let values = (0..(rows * cols) as u64).map(|i| f64::from(stream.unit(i)) - 0.5).collect();
    Tensor::from_vec(rows, cols, values).expect("as many numbers as rows times columns")
}

/// The worst relative difference between the layer's gradients and central differences of
/// Σ g∘layer(x), over elements spread through x and through every parameter.
///
/// # Errors
/// What the layer's own passes give.
pub fn gradients<L: Layer>(layer: &mut L, ctx: &Context, x: &Tensor) -> Result<f64> {
    let (y, saved) = layer.forward(ctx, x)?;
    let g = seeded(y.rows(), y.cols(), 99);
    layer.parameters().into_iter().try_for_each(|it| it.grad.set_zero())?;
    let dx = layer.backward(ctx, x, saved, g.try_clone()?)?;
    let objective = |layer: &L, x: &Tensor| -> Result<f64> {
        let y = layer.forward(ctx, x)?.0;
        Ok(y.values::<f64>()?.iter().zip(g.values::<f64>()?).map(|(y, g)| y * g).sum())
    };
    let step = 1e-5;
    let mut worst: f64 = 0.0;
    let mut compare = |analytic: f64, high: f64, low: f64| {
        let numeric = (high - low) / (2.0 * step);
        worst = worst.max((numeric - analytic).abs() / (1e-3 + numeric.abs()));
    };
    let count = x.rows() * x.cols();
    for element in (0..count).step_by(1 + count / 40) {
        let at = |delta: f64| -> Result<f64> {
            let mut x = x.try_clone()?;
            x.values_mut::<f64>()?[element] += delta;
            objective(layer, &x)
        };
        compare(dx.values::<f64>()?[element], at(step)?, at(-step)?);
    }
    for parameter in 0..layer.parameters().len() {
        let grad = layer.parameters()[parameter].grad.values::<f64>()?.to_vec();
        for element in (0..grad.len()).step_by(1 + grad.len() / 8) {
            let mut at = |delta: f64| -> Result<f64> {
                layer.parameters()[parameter].value.values_mut::<f64>()?[element] += delta;
                let value = objective(layer, x);
                layer.parameters()[parameter].value.values_mut::<f64>()?[element] -= delta;
                value
            };
            let (high, low) = (at(step)?, at(-step)?);
            compare(grad[element], high, low);
        }
    }
    Ok(worst)
}

#[cfg(test)]
mod tests {
    use ferrotune_tensor::{DType, Precision};

    use super::*;
    use crate::{Activation, Attention, DenseWeight, Linear, Mlp, Norm, NormKind, Part, Rope};

    fn linear(sizes: &[usize], input: usize, seed: u64, bias: bool) -> Linear {
        let part = |(i, output): (usize, &usize)| {
            let value = seeded(*output, input, seed + i as u64).cast(DType::F32).unwrap();
            let bias = bias.then(|| seeded(1, *output, seed + 50 + i as u64).cast(DType::F32).unwrap());
            let weight = Box::new(DenseWeight { value, precision: Precision::Full });
            Part { name: format!("part{i}"), weight, bias, adapter: None }
        };
        Linear { parts: sizes.iter().enumerate().map(part).collect() }
    }

    fn norm(kind: NormKind, group: usize, seed: u64) -> Norm {
        let mut weight = seeded(1, group, seed).cast(DType::F32).unwrap();
        weight.values_mut::<f32>().unwrap().iter_mut().for_each(|it| *it += 1.0);
        Norm { kind, weight, bias: Some(seeded(1, group, seed + 1).cast(DType::F32).unwrap()), eps: 1e-5 }
    }

    fn attention() -> Attention {
        Attention {
            qkv: linear(&[16, 8, 8], 12, 10, true),
            o: linear(&[12], 16, 20, false),
            q_norm: None,
            k_norm: None,
            rope: Some(Rope::new(10_000.0, 4)),
            num_attention_heads: 4,
            num_key_value_heads: 2,
            head_dim: 4,
            scale: 0.5,
            window: None,
            softcap: None,
        }
    }

    fn check<L: Layer>(what: &str, mut layer: L) {
        let ctx = Context::new(vec![0, 5, 75, 90]);
        let x = seeded(90, 12, 7);
        let worst = gradients(&mut layer, &ctx, &x).unwrap();
        assert!(worst < 1e-6, "{what}: worst relative difference {worst:.1e}");
    }

    /// A norm as a layer, to check it alone.
    struct Alone(Norm);

    impl Layer for Alone {
        type Saved = ();
        fn forward(&self, _: &Context, x: &Tensor) -> Result<(Tensor, ())> {
            Ok((self.0.forward(x)?, ()))
        }
        fn backward(&mut self, _: &Context, x: &Tensor, (): (), dy: Tensor) -> Result<Tensor> {
            self.0.backward(x, dy)
        }
        fn parameters(&mut self) -> Vec<&mut crate::Parameter> {
            Vec::new()
        }
    }

    #[test]
    fn norms() {
        for kind in [NormKind::Rms, NormKind::Layer] {
            check("whole rows", Alone(norm(kind, 12, 1)));
            check("groups", Alone(norm(kind, 4, 1)));
        }
    }

    #[test]
    fn mlps() {
        for activation in [Activation::Silu, Activation::GeluTanh] {
            let gated = Mlp {
                gate_up: linear(&[20, 20], 12, 1, true),
                down: linear(&[12], 20, 5, false),
                activation,
            };
            check("gated", gated);
            let plain =
                Mlp { gate_up: linear(&[20], 12, 1, true), down: linear(&[12], 20, 5, true), activation };
            check("plain", plain);
        }
    }

    #[test]
    fn attentions() {
        check("llama", attention());
        check("window", Attention { window: Some(3), ..attention() });
        check("softcap", Attention { softcap: Some(0.6), ..attention() });
        check("no positions", Attention { rope: None, ..attention() });
        let half = Rope { interleaved: true, attention_factor: 1.3, ..Rope::new(100.0, 2) };
        check("part of a head, interleaved", Attention { rope: Some(half), ..attention() });
        let per_head = |seed| Some(norm(NormKind::Rms, 4, seed));
        check("qk norm per head", Attention { q_norm: per_head(3), k_norm: per_head(4), ..attention() });
        let (q_norm, k_norm) = (Some(norm(NormKind::Rms, 16, 3)), Some(norm(NormKind::Rms, 8, 4)));
        check("qk norm over the row", Attention { q_norm, k_norm, ..attention() });
    }

    #[test]
    fn decoding_gives_what_a_whole_pass_gives() {
        for window in [None, Some(3)] {
            let layer = Attention { window, ..attention() };
            let x = seeded(70, 12, 3).cast(DType::F32).unwrap();
            let (whole, _) = layer.forward(&Context::new(vec![0, 70]), &x).unwrap();
            let (mut cache, mut got) = (crate::KeyValues::default(), Vec::new());
            for rows in [0..66, 66..67, 67..70] {
                let part = x.values::<f32>().unwrap()[rows.start * 12..rows.end * 12].to_vec();
                let part = Tensor::from_vec(rows.len(), 12, part).unwrap();
                let ctx = Context { first_position: rows.start, ..Context::new(vec![0, rows.len()]) };
                got.extend(layer.step(&ctx, &part, &mut cache).unwrap().to_f32().unwrap());
            }
            let pairs = got.iter().zip(whole.values::<f32>().unwrap());
            let worst = pairs.map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
            assert!(worst < 1e-5, "{worst}");
        }
    }

    #[test]
    fn the_head_moves_each_log_probability_as_asked() {
        for softcap in [None, Some(0.7)] {
            let weight = DenseWeight {
                value: seeded(31, 12, 4).cast(DType::F32).unwrap(),
                precision: Precision::Full,
            };
            let head = crate::Head { weight: std::sync::Arc::new(weight), scale: 1.7, softcap };
            let (hidden, targets) = (seeded(5, 12, 8), [3, 30, 0, 9, 9]);
            let dlogp = [0.5, 0.0, -1.0, 2.0, -0.1];
            let loss = |hidden: &Tensor| -> f64 {
                let logp = head.log_probs(hidden, &targets, &dlogp).unwrap().logp;
                logp.iter().zip(&dlogp).map(|(l, d)| l * d).sum()
            };
            let got = head.with_gradient(&hidden, &targets, &dlogp).unwrap();
            assert_eq!(got.logp[1], 0.0);
            for element in 0..60 {
                let at = |delta: f64| {
                    let mut hidden = hidden.try_clone().unwrap();
                    hidden.values_mut::<f64>().unwrap()[element] += delta;
                    loss(&hidden)
                };
                let numeric = (at(1e-5) - at(-1e-5)) / 2e-5;
                let analytic = got.dhidden.as_ref().unwrap().values::<f64>().unwrap()[element];
                assert!((numeric - analytic).abs() < 1e-7, "{numeric} {analytic}");
            }
        }
    }
}
