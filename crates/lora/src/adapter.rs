//! y = x·Wᵀ + s·(drop(x)·Aᵀ)·Bᵀ.  A is (R, input), B is (output, R), s the scaling.
//!   backward, low = drop(x)·Aᵀ:  dlow = s·dy·B;  dA += dlowᵀ·drop(x);  dB += s·dyᵀ·low;
//!   dx = dy·W + drop′(dlow·A)

use ferrotune_nn::{Adapter, Context, LowRank, Parameter, Weight};
use ferrotune_tensor::{
    Counter, DType, Device, Operand, Precision, Real, Result, Tensor, for_real, multiply, stream_of, uniform,
};
use rayon::prelude::*;

use crate::{Change, LoraConfig};

/// The adapter of one projection.
#[derive(Debug)]
pub struct LoraAdapter {
    /// (R, input)
    pub a: Parameter,
    /// (output, R)
    pub b: Parameter,
    /// s
    pub scaling: f64,
    /// Share of inputs dropped in training.
    pub dropout: f64,
    /// How exactly its products are computed.
    pub precision: Precision,
    /// Tells this projection's randomness from the others'.
    stream: u64,
}

impl LoraAdapter {
    /// As PEFT initialises: A uniform in ±1/√input (Kaiming, a = √5), B zero.
    ///
    /// # Errors
    /// When there is no room.
    pub fn new(
        name: &str,
        output: usize,
        input: usize,
        config: &LoraConfig,
        precision: Precision,
    ) -> Result<Self> {
        let counter = Counter::new(&[config.seed, stream_of(name)]);
        let a = uniform(counter, 1.0 / (input as f64).sqrt(), config.r * input);
        let b = vec![0.0f32; output * config.r];
        let (a, b) = (Tensor::from_vec(config.r, input, a)?, Tensor::from_vec(output, config.r, b)?);
        LoraAdapter::from_parts(name, a, b, config.scaling(), config.lora_dropout, precision)
    }

    /// From tensors that were trained before.
    ///
    /// # Errors
    /// When there is no room.
    pub fn from_parts(
        name: &str,
        a: Tensor,
        b: Tensor,
        scaling: f64,
        dropout: f64,
        precision: Precision,
    ) -> Result<Self> {
        Ok(LoraAdapter {
            a: Parameter::new(format!("{name}.lora_A.weight"), a)?,
            b: Parameter::new(format!("{name}.lora_B.weight"), b)?,
            scaling,
            dropout,
            precision,
            stream: stream_of(name),
        })
    }

    /// On a device, with copies for products in the type of its activations.
    ///
    /// # Errors
    /// When the device has no room.
    pub fn to_device(self, device: &Device, dtype: DType) -> Result<Self> {
        let place = |parameter: Parameter| -> Result<Parameter> {
            Parameter::new(parameter.name, parameter.value.to_device(device)?)?.with_copy(dtype)
        };
        Ok(LoraAdapter { a: place(self.a)?, b: place(self.b)?, ..self })
    }

    /// drop(x) in training; none when nothing is dropped.
    pub(crate) fn dropped(&self, ctx: &Context, x: &Tensor) -> Result<Option<Tensor>> {
        if !ctx.training || self.dropout == 0.0 {
            return Ok(None);
        }
        let mut out = x.try_clone()?;
        self.drop_in_place(ctx, &mut out)?;
        Ok(Some(out))
    }

    /// Zeroes a share of the elements and scales up the others, the same ones for the same step.
    pub(crate) fn drop_in_place(&self, ctx: &Context, x: &mut Tensor) -> Result<()> {
        let counter = Counter::new(&[ctx.seed, ctx.step, ctx.micro_step, self.stream]);
        let (width, dropout) = (x.cols(), self.dropout as f32);
        if let Some(gpu) = x.gpu() {
            let blocks = x.len().div_ceil(1024).min(8192);
            let launch =
                gpu.kernel("elementwise", "dropout", x.dtype())?.grid(blocks, 256).tensor(x).tensor(x);
            let launch = launch.int(x.rows()).int(width).int(width).int(width).word(counter.key());
            // SAFETY: dropout(out, x, rows, width, out_stride, x_stride, key, p); out may be x.
            return unsafe { launch.float(self.dropout).run() };
        }
        for_real!("dropout", x.dtype(), T => {
            let keep = T::of(1.0 / (1.0 - self.dropout));
            x.values_mut::<T>()?.par_chunks_mut(width).enumerate().for_each(|(row, values)| {
                for (col, value) in values.iter_mut().enumerate() {
                    let kept = counter.unit((row * width + col) as u64) >= dropout;
                    *value = if kept { *value * keep } else { T::of(0.0) };
                }
            });
            Ok(())
        })
    }

    /// x·Aᵀ, (N, R)
    fn low(&self, x: &Tensor) -> Result<Tensor> {
        let a = Operand::new(self.a.operand());
        let mut low = x.empty_like(x.rows(), self.a.value.rows())?;
        let all = 0..low.cols();
        multiply(self.precision, 1.0, Operand::new(x), a.transposed(), 0.0, &mut low, all)?;
        Ok(low)
    }

    /// `y[:, at..] += s·(x·Aᵀ)·Bᵀ`, with x as it is.
    pub(crate) fn add(&self, x: &Tensor, y: &mut Tensor, at: usize) -> Result<()> {
        let low = self.low(x)?;
        let (b, part) = (Operand::new(self.b.operand()), at..at + self.b.value.rows());
        multiply(self.precision, self.scaling, Operand::new(&low), b.transposed(), 1.0, y, part)
    }

    /// `dx = s·dy·B·A + beta·dx`; adds to the gradients of A and B.
    pub(crate) fn add_backward(
        &mut self,
        x: &Tensor,
        dy: &Tensor,
        at: usize,
        beta: f64,
        dx: &mut Tensor,
    ) -> Result<()> {
        let (low, precision) = (self.low(x)?, self.precision);
        let (rank, width) = (low.cols(), x.cols());
        let dy = Operand::columns(dy, at..at + self.b.value.rows());
        let mut dlow = low.empty_like(low.rows(), rank)?;
        let b = Operand::new(self.b.operand());
        multiply(precision, self.scaling, dy.clone(), b, 0.0, &mut dlow, 0..rank)?;
        let dlow_t = Operand::new(&dlow).transposed();
        multiply(precision, 1.0, dlow_t, Operand::new(x), 1.0, &mut self.a.grad, 0..width)?;
        let low = Operand::new(&low);
        multiply(precision, self.scaling, dy.transposed(), low, 1.0, &mut self.b.grad, 0..rank)?;
        let (dlow, a) = (Operand::new(&dlow), Operand::new(self.a.operand()));
        multiply(precision, 1.0, dlow, a, beta, dx, 0..width)
    }
}

impl Adapter for LoraAdapter {
    fn forward(
        &self,
        ctx: &Context,
        x: &Tensor,
        weight: &dyn Weight,
        y: &mut Tensor,
        at: usize,
    ) -> Result<()> {
        weight.forward(x, y, at)?;
        let dropped = self.dropped(ctx, x)?;
        self.add(dropped.as_ref().unwrap_or(x), y, at)
    }

    fn backward(
        &mut self,
        ctx: &Context,
        x: &Tensor,
        weight: &dyn Weight,
        dy: &Tensor,
        at: usize,
        beta: f64,
        dx: &mut Tensor,
    ) -> Result<()> {
        weight.backward(dy, at, beta, dx)?;
        let Some(dropped) = self.dropped(ctx, x)? else { return self.add_backward(x, dy, at, 1.0, dx) };
        let mut through = x.empty_like(x.rows(), x.cols())?;
        self.add_backward(&dropped, dy, at, 0.0, &mut through)?;
        self.drop_in_place(ctx, &mut through)?;
        dx.add_scaled(1.0, &through)
    }

    fn parameters(&mut self) -> Vec<&mut Parameter> {
        vec![&mut self.a, &mut self.b]
    }

    /// Not while inputs are dropped: those of the weight are whole.
    fn low_rank(&self, ctx: &Context) -> Option<LowRank<'_>> {
        let whole = !ctx.training || self.dropout == 0.0;
        whole.then(|| LowRank {
            a: self.a.operand(),
            b: self.b.operand(),
            scaling: self.scaling,
            a_gradient: &self.a.grad,
            b_gradient: &self.b.grad,
        })
    }

    fn merged(&self, weight: &dyn Weight) -> Result<Tensor> {
        let mut merged = weight.to_dense()?;
        let all = 0..merged.rows();
        let change = Change::new(self.a.value.to_cpu()?, self.b.value.to_cpu()?, self.scaling, None)?;
        change.merge_rows(all, merged.values_mut()?)?;
        Ok(merged)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ferrotune_nn::check::{gradients, seeded};
    use ferrotune_nn::{DenseWeight, Layer, Linear, Part};

    /// A linear layer of two adapted parts, as a layer.
    struct Adapted(Linear);

    impl Layer for Adapted {
        type Saved = ();
        fn forward(&self, ctx: &Context, x: &Tensor) -> Result<(Tensor, ())> {
            Ok((self.0.forward(ctx, x)?, ()))
        }
        fn backward(&mut self, ctx: &Context, x: &Tensor, (): (), dy: Tensor) -> Result<Tensor> {
            self.0.backward(ctx, x, &dy)
        }
        fn parameters(&mut self) -> Vec<&mut Parameter> {
            self.0.parameters()
        }
    }

    fn weight(rows: usize, cols: usize, seed: u64) -> DenseWeight {
        DenseWeight {
            value: seeded(rows, cols, seed).cast(DType::F32).unwrap().into(),
            precision: Precision::Full,
        }
    }

    fn adapted(dropout: f64) -> Adapted {
        let part = |name: &str, rows: usize, seed: u64| {
            let (a, b) = (seeded(3, 12, seed + 1), seeded(rows, 3, seed + 2));
            let adapter = LoraAdapter::from_parts(name, a, b, 0.7, dropout, Precision::Full).unwrap();
            let weight = Box::new(weight(rows, 12, seed));
            Part { name: name.into(), weight, bias: None, adapter: Some(Box::new(adapter)) }
        };
        Adapted(Linear::new(vec![part("q", 9, 10), part("k", 5, 20)]))
    }

    #[test]
    fn gradients_equal_differences() {
        for dropout in [0.0, 0.3] {
            let ctx = Context { training: true, seed: 4, step: 2, ..Context::new(vec![0, 7]) };
            let worst = gradients(&mut adapted(dropout), &ctx, &seeded(7, 12, 1)).unwrap();
            assert!(worst < 1e-6, "dropout {dropout}: worst relative difference {worst:.1e}");
        }
    }

    #[test]
    fn dropout_is_a_function_of_the_step_and_off_outside_training() {
        let layer = adapted(0.5);
        let x = seeded(7, 12, 1);
        let run = |training: bool, step: u64| {
            let ctx = Context { training, step, ..Context::new(vec![0, 7]) };
            layer.forward(&ctx, &x).unwrap().0.values::<f64>().unwrap().to_vec()
        };
        assert_eq!(run(true, 1), run(true, 1));
        assert_ne!(run(true, 1), run(true, 2));
        assert_eq!(run(false, 1), run(false, 2));
    }

    #[test]
    fn the_merged_weight_gives_the_adapted_outputs() {
        let (base, x) = (weight(9, 12, 5), seeded(4, 12, 6).cast(DType::F32).unwrap());
        let (a, b) = (seeded(3, 12, 7).cast(DType::F32).unwrap(), seeded(9, 3, 8).cast(DType::F32).unwrap());
        let adapter = LoraAdapter::from_parts("q", a, b, 2.0, 0.0, Precision::Full).unwrap();
        let merged = DenseWeight { value: adapter.merged(&base).unwrap().into(), precision: Precision::Full };
        let mut expected = x.zeros_like(4, 9).unwrap();
        let mut got = x.zeros_like(4, 9).unwrap();
        merged.forward(&x, &mut expected, 0).unwrap();
        adapter.forward(&Context::new(vec![0, 4]), &x, &base, &mut got, 0).unwrap();
        let pairs = got.values::<f32>().unwrap().iter().zip(expected.values::<f32>().unwrap());
        assert!(pairs.map(|(a, b)| (a - b).abs()).fold(0.0, f32::max) < 1e-5);
    }

    #[test]
    fn a_new_adapter_changes_nothing_and_is_the_same_for_the_same_seed() {
        let config = LoraConfig { r: 4, seed: 9, ..LoraConfig::default() };
        let new = |name: &str| LoraAdapter::new(name, 5, 16, &config, Precision::Full).unwrap();
        assert_eq!(new("q").a.value.values::<f32>().unwrap(), new("q").a.value.values::<f32>().unwrap());
        assert_ne!(new("q").a.value.values::<f32>().unwrap(), new("k").a.value.values::<f32>().unwrap());
        assert!(new("q").a.value.values::<f32>().unwrap().iter().all(|it| it.abs() <= 0.25));
        assert!(new("q").b.value.values::<f32>().unwrap().iter().all(|it| *it == 0.0));
    }
}
