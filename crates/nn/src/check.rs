//! Gradients against finite differences, for the tests of every crate that has a backward.

use ferrotune_tensor::{Counter, Result, Tensor};

use crate::numbers::on_host;
use crate::{Context, Layer, Parameter};

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
        let grad = on_host(&layer.parameters()[parameter].grad)?;
        for element in (0..grad.len()).step_by(1 + grad.len() / 8) {
            let mut at = |delta: f64| -> Result<(f64, f64)> {
                let before = nudge(layer.parameters()[parameter], element, |it| it + delta)?;
                let value = objective(layer, x)?;
                let after = nudge(layer.parameters()[parameter], element, |_| before)?;
                Ok((value, after))
            };
            let ((high, up), (low, down)) = (at(FLOAT_STEP)?, at(-FLOAT_STEP)?);
            // As if it had been a step of the usual size.
            let slope = (high - low) / (up - down);
            compare(grad[element], slope * step, -slope * step);
        }
    }
    Ok(worst)
}

/// Of parameters: those in f32 can't be moved by less.
const FLOAT_STEP: f64 = 1.0 / 32768.0;

/// Changes a number of a parameter; what it was.
fn nudge(parameter: &mut Parameter, element: usize, change: impl Fn(f64) -> f64) -> Result<f64> {
    if let Ok(values) = parameter.value.values_mut::<f64>() {
        let before = values[element];
        values[element] = change(before);
        return Ok(before);
    }
    let value = &mut parameter.value.values_mut::<f32>()?[element];
    let before = *value;
    *value = change(f64::from(before)) as f32;
    Ok(f64::from(before))
}

#[cfg(test)]
mod tests {
    use ferrotune_tensor::{DType, Precision};

    use super::*;
    use crate::{
        Activation, Attention, DenseWeight, Experts, Linear, Mlp, Norm, NormKind, Part, Rope, Weight as _,
    };

    fn linear(sizes: &[usize], input: usize, seed: u64, bias: bool) -> Linear {
        let part = |(i, output): (usize, &usize)| {
            let value = seeded(*output, input, seed + i as u64).cast(DType::F32).unwrap();
            let bias =
                bias.then(|| seeded(1, *output, seed + 50 + i as u64).cast(DType::F32).unwrap().into());
            let weight = Box::new(DenseWeight { value: value.into(), precision: Precision::Full });
            Part { name: format!("part{i}"), weight, bias, adapter: None }
        };
        Linear::new(sizes.iter().enumerate().map(part).collect())
    }

    fn norm(kind: NormKind, group: usize, seed: u64) -> Norm {
        let mut weight = seeded(1, group, seed).cast(DType::F32).unwrap();
        weight.values_mut::<f32>().unwrap().iter_mut().for_each(|it| *it += 1.0);
        let bias = Some(seeded(1, group, seed + 1).cast(DType::F32).unwrap().into());
        Norm { kind, weight: weight.into(), bias, eps: 1e-5 }
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
            precision: Precision::Full,
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
            self.0.parameters().collect()
        }
    }

    fn trained(mut norm: Norm) -> Norm {
        norm.weight.train("norm.weight").unwrap();
        norm.bias.iter_mut().for_each(|it| it.train("norm.bias").unwrap());
        norm
    }

    /// Weights in f64, and all of it trained.
    fn trained_linear(sizes: &[usize], input: usize, seed: u64) -> Linear {
        let mut linear = linear(sizes, input, seed, true);
        for (part, seed) in linear.parts.iter_mut().zip(seed + 100..) {
            let value = seeded(part.weight.rows(), input, seed).into();
            let mut weight = DenseWeight { value, precision: Precision::Full };
            weight.train(&format!("{}.weight", part.name)).unwrap();
            part.weight = Box::new(weight);
            part.bias.iter_mut().for_each(|it| it.train("bias").unwrap());
        }
        linear
    }

    #[test]
    fn norms() {
        for kind in [NormKind::Rms, NormKind::Layer] {
            for it in [|it| it, trained] {
                check("whole rows", Alone(it(norm(kind, 12, 1))));
                check("groups", Alone(it(norm(kind, 4, 1))));
            }
        }
        assert_eq!(Alone(trained(norm(NormKind::Layer, 12, 1))).parameters().len(), 2);
    }

    #[test]
    fn trained_weights_and_biases() {
        let (gate_up, down) = (trained_linear(&[20, 20], 12, 1), trained_linear(&[12], 20, 5));
        let mut mlp = Mlp { gate_up, down, activation: Activation::Silu };
        assert_eq!(mlp.parameters().len(), 6);
        check("mlp", mlp);
        let (qkv, o) = (trained_linear(&[16, 8, 8], 12, 10), trained_linear(&[12], 16, 20));
        let norms = || Some(trained(norm(NormKind::Rms, 4, 3)));
        check("attention", Attention { qkv, o, q_norm: norms(), k_norm: norms(), ..attention() });
    }

    #[test]
    fn experts() {
        for normalised in [true, false] {
            let mlp = |seed| Mlp {
                gate_up: trained_linear(&[10, 10], 12, seed),
                down: trained_linear(&[12], 10, seed + 5),
                activation: Activation::Silu,
            };
            let mut router = DenseWeight { value: seeded(4, 12, 31).into(), precision: Precision::Full };
            router.train("router").unwrap();
            let experts = (0..4).map(|expert| mlp(10 * expert)).collect();
            check("experts", Experts { router, experts, num_experts_per_tok: 2, normalised });
        }
    }

    /// The embedding of some tokens, as a layer whose input counts for nothing.
    struct Tokens(crate::Embedding);

    impl Layer for Tokens {
        type Saved = ();
        fn forward(&self, ctx: &Context, _: &Tensor) -> Result<(Tensor, ())> {
            let tokens: Vec<u32> = (0..ctx.rows() as u32).map(|i| i * i % 7).collect();
            Ok((self.0.forward(&tokens, DType::F64)?, ()))
        }
        fn backward(&mut self, ctx: &Context, x: &Tensor, (): (), dy: Tensor) -> Result<Tensor> {
            let tokens: Vec<u32> = (0..ctx.rows() as u32).map(|i| i * i % 7).collect();
            self.0.backward(&tokens, &dy)?;
            x.zeros_like(x.rows(), x.cols())
        }
        fn parameters(&mut self) -> Vec<&mut Parameter> {
            self.0.table.parameters()
        }
    }

    #[test]
    fn the_embedding() {
        let value = seeded(9, 12, 4).cast(DType::F32).unwrap().into();
        let mut table = DenseWeight { value, precision: Precision::Full };
        table.train("model.embed_tokens.weight").unwrap();
        check("embedding", Tokens(crate::Embedding { table, scale: 3.0, vectors_to: None }));
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
            let weight = DenseWeight { value: seeded(31, 12, 4).into(), precision: Precision::Full };
            let mut weight = weight;
            weight.train("lm_head.weight").unwrap();
            let head = crate::Head { scale: 1.7, softcap };
            let (hidden, targets) = (seeded(5, 12, 8), [3, 30, 0, 9, 9]);
            let dlogp = [0.5, 0.0, -1.0, 2.0, -0.1];
            let loss = |weight: &DenseWeight, hidden: &Tensor| -> f64 {
                let logp = head.log_probs(weight, hidden, &targets, &dlogp).unwrap().logp;
                logp.iter().zip(&dlogp).map(|(l, d)| l * d).sum()
            };
            let got = head.with_gradient(&mut weight, &hidden, &targets, &dlogp).unwrap();
            assert_eq!(got.logp[1], 0.0);
            for element in 0..60 {
                let at = |delta: f64| {
                    let mut hidden = hidden.try_clone().unwrap();
                    hidden.values_mut::<f64>().unwrap()[element] += delta;
                    loss(&weight, &hidden)
                };
                let numeric = (at(1e-5) - at(-1e-5)) / 2e-5;
                let analytic = got.dhidden.as_ref().unwrap().values::<f64>().unwrap()[element];
                assert!((numeric - analytic).abs() < 1e-7, "{numeric} {analytic}");
            }
            let dw = weight.parameters()[0].grad.values::<f64>().unwrap().to_vec();
            for element in (0..dw.len()).step_by(5) {
                let mut at = |delta: f64| {
                    let before = nudge(weight.parameters()[0], element, |it| it + delta).unwrap();
                    let value = loss(&weight, &hidden);
                    nudge(weight.parameters()[0], element, |_| before).unwrap();
                    value
                };
                let numeric = (at(1e-5) - at(-1e-5)) / 2e-5;
                assert!((numeric - dw[element]).abs() < 1e-7, "{numeric} {}", dw[element]);
            }
        }
    }
}
