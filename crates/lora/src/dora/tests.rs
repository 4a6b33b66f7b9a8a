use ferrotune_nn::check::{gradients, seeded};
use ferrotune_nn::{DenseWeight, Layer, Linear, Part};

use super::*;

/// Which gradients a check moves along.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Along {
    /// x, A and B, past the adapter's back, so that the norm stays what it was.
    Directions,
    /// m, on which no norm depends.
    Magnitude,
}

/// A layer of two adapted parts.
struct Adapted {
    parts: [(DoraAdapter, DenseWeight); 2],
    along: Along,
}

impl Layer for Adapted {
    type Saved = ();
    fn forward(&self, ctx: &Context, x: &Tensor) -> Result<(Tensor, ())> {
        let mut y = x.empty_like(x.rows(), 14)?;
        for ((adapter, weight), at) in self.parts.iter().zip([0, 9]) {
            adapter.forward(ctx, x, weight, &mut y, at)?;
        }
        Ok((y, ()))
    }
    fn backward(&mut self, ctx: &Context, x: &Tensor, (): (), dy: Tensor) -> Result<Tensor> {
        let mut dx = x.empty_like(x.rows(), x.cols())?;
        for ((adapter, weight), (at, beta)) in self.parts.iter_mut().zip([(0, 0.0), (9, 1.0)]) {
            adapter.backward(ctx, x, weight, &dy, at, beta, &mut dx)?;
        }
        Ok(dx)
    }
    fn parameters(&mut self) -> Vec<&mut Parameter> {
        let along = self.along;
        let parameters = self.parts.iter_mut().flat_map(|(adapter, _)| match along {
            Along::Directions => vec![&mut adapter.lora.a, &mut adapter.lora.b],
            Along::Magnitude => adapter.parameters().pop().into_iter().collect(),
        });
        parameters.collect()
    }
}

fn weight(rows: usize, seed: u64) -> DenseWeight {
    let value = seeded(rows, 12, seed).cast(DType::F32).unwrap();
    DenseWeight { value: value.into(), precision: Precision::Full }
}

fn adapter(rows: usize, seed: u64, dropout: f64) -> DoraAdapter {
    let (a, b) = (seeded(3, 12, seed + 1), seeded(rows, 3, seed + 2));
    let lora = LoraAdapter::from_parts("q", a, b, 0.7, dropout, Precision::Full).unwrap();
    let mut magnitude = seeded(1, rows, seed + 3);
    magnitude.values_mut::<f64>().unwrap().iter_mut().for_each(|it| *it += 1.5);
    DoraAdapter::from_parts(lora, magnitude, &weight(rows, seed)).unwrap()
}

#[test]
fn gradients_equal_differences_with_the_norm_held() {
    for (dropout, along) in
        [0.0, 0.3].into_iter().flat_map(|it| [(it, Along::Directions), (it, Along::Magnitude)])
    {
        let ctx = Context { training: true, seed: 4, step: 2, ..Context::new(vec![0, 7]) };
        let parts = [(adapter(9, 10, dropout), weight(9, 10)), (adapter(5, 20, dropout), weight(5, 20))];
        let worst = gradients(&mut Adapted { parts, along }, &ctx, &seeded(7, 12, 1)).unwrap();
        assert!(worst < 1e-6, "dropout {dropout}, {along:?}: worst relative difference {worst:.1e}");
    }
}

#[test]
fn the_merged_weight_gives_the_adapted_outputs() {
    let (base, x) = (weight(9, 10), seeded(4, 12, 6));
    let adapter = adapter(9, 10, 0.0);
    let merged = DenseWeight { value: adapter.merged(&base).unwrap().into(), precision: Precision::Full };
    let (mut expected, mut got) = (x.zeros_like(4, 9).unwrap(), x.zeros_like(4, 9).unwrap());
    merged.forward(&x, &mut expected, 0).unwrap();
    adapter.forward(&Context::new(vec![0, 4]), &x, &base, &mut got, 0).unwrap();
    let pairs = got.values::<f64>().unwrap().iter().zip(expected.values::<f64>().unwrap());
    assert!(pairs.map(|(a, b)| (a - b).abs()).fold(0.0, f64::max) < 1e-6);
    // Its rows are as long as the magnitudes say.
    let lengths = row_squares(&adapter.merged(&base).unwrap()).unwrap();
    let magnitudes = adapter.magnitude.value.values::<f64>().unwrap();
    assert!(lengths.iter().zip(magnitudes).all(|(a, b)| (a.sqrt() - b).abs() < 1e-6));
}

#[test]
fn a_new_one_changes_nothing_and_follows_its_parameters() {
    let base = weight(9, 10);
    let x = seeded(4, 12, 6).cast(DType::F32).unwrap();
    let a = seeded(3, 12, 1).cast(DType::F32).unwrap();
    let ctx = Context::new(vec![0, 4]);
    let of = |adapter: &dyn Fn(&mut Tensor)| {
        let mut y = x.zeros_like(4, 9).unwrap();
        adapter(&mut y);
        y.to_f32().unwrap()
    };
    let plain = of(&|y| base.forward(&x, y, 0).unwrap());
    for scale in [0.0, 1.0] {
        let mut b = seeded(9, 3, 2).cast(DType::F32).unwrap();
        b.scale(scale).unwrap();
        let lora = || {
            let (a, b) = (a.try_clone().unwrap(), b.try_clone().unwrap());
            LoraAdapter::from_parts("q", a, b, 0.7, 0.0, Precision::Full).unwrap()
        };
        let magnitude = magnitudes(&lora(), &base).unwrap();
        let mut adapter = DoraAdapter::from_parts(lora(), magnitude, &base).unwrap();
        assert_eq!(adapter.magnitude.name, "q.lora_magnitude_vector");
        let expected = of(&|y| lora().forward(&ctx, &x, &base, y, 0).unwrap());
        let got = of(&|y| adapter.forward(&ctx, &x, &base, y, 0).unwrap());
        let off = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        assert!(off(&got, &expected) < 1e-6 && (scale == 0.0) == (off(&got, &plain) < 1e-6));
        // Twice the magnitudes are twice the outputs, once they are changed by way of the parameters.
        adapter.parameters().pop().unwrap().value.scale(2.0).unwrap();
        let twice = of(&|y| adapter.forward(&ctx, &x, &base, y, 0).unwrap());
        assert!(got.iter().zip(&twice).all(|(one, two)| (2.0 * one - two).abs() < 1e-6));
    }
}

#[test]
fn parts_of_a_layer_are_adapted_side_by_side() {
    let part = |rows: usize, seed: u64| {
        let adapter: Box<dyn Adapter> = Box::new(adapter(rows, seed, 0.0));
        Part { name: "q".into(), weight: Box::new(weight(rows, seed)), bias: None, adapter: Some(adapter) }
    };
    let layer = Linear::new(vec![part(9, 10), part(5, 20)]);
    let (ctx, x) = (Context::new(vec![0, 7]), seeded(7, 12, 1));
    let parts = [(adapter(9, 10, 0.0), weight(9, 10)), (adapter(5, 20, 0.0), weight(5, 20))];
    let expected = Adapted { parts, along: Along::Magnitude }.forward(&ctx, &x).unwrap().0;
    let got = layer.forward(&ctx, &x).unwrap();
    assert_eq!(got.values::<f64>().unwrap(), expected.values::<f64>().unwrap());
}
