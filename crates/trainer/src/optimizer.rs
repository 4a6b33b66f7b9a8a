//! Optimizers: from gradients to new parameters.

mod adamw_8bit;
mod gpu;

use std::collections::BTreeMap;

use ferrotune_nn::Parameter;
use ferrotune_tensor::{Device, Element, Error, Result, Tensor};
use rayon::prelude::*;

pub use adamw_8bit::AdamW8bit;
pub(crate) use gpu::square_sum;
use gpu::{Chunks, Moved};

/// Named tensors that an optimizer continues from.
pub type State = BTreeMap<String, Tensor>;

/// Takes steps. Parameters come in the same order every time.
pub trait Optimizer {
    /// One step down the gradients times `grad_scale` (clipping, loss scaling). Copies for products
    /// follow the parameters.
    ///
    /// # Errors
    /// When the parameters' types aren't taken.
    fn step(&mut self, parameters: &mut [&mut Parameter], learning_rate: f64, grad_scale: f64) -> Result<()>;

    /// All that a resumed run needs.
    ///
    /// # Errors
    /// When the device can't be read.
    fn state(&self) -> Result<State>;

    /// Goes on from a saved state.
    ///
    /// # Errors
    /// When the state isn't that of these parameters.
    fn restore(&mut self, state: State, parameters: &[&mut Parameter]) -> Result<()>;
}

/// Elements that one task of the CPU takes.
const CHUNK: usize = 16 * 1024;

/// What one step is computed with, alike on every device.
struct StepNumbers {
    decay: f64,
    beta1: f64,
    beta2: f64,
    epsilon: f64,
    step_size: f64,
    root: f64,
    grad_scale: f64,
}

/// AdamW with decoupled decay (Loshchilov and Hutter 2019), in PyTorch's order of operations:
///   p ·= 1 − lr·decay
///   m = β₁m + (1 − β₁)g,  v = β₂v + (1 − β₂)g²
///   p −= lr/(1 − β₁ᵗ) · m / (√v/√(1 − β₂ᵗ) + ε)
#[derive(Debug)]
pub struct AdamW {
    /// β₁
    pub beta1: f64,
    /// β₂
    pub beta2: f64,
    /// ε
    pub epsilon: f64,
    /// decay
    pub weight_decay: f64,
    /// t: steps taken.
    steps: u64,
    /// m and v of each parameter, by its name.
    moments: BTreeMap<String, (Tensor, Tensor)>,
}

impl AdamW {
    /// Before the first step.
    pub fn new(beta1: f64, beta2: f64, epsilon: f64, weight_decay: f64) -> AdamW {
        AdamW { beta1, beta2, epsilon, weight_decay, steps: 0, moments: BTreeMap::new() }
    }

    /// Of step t.
    fn numbers(&self, learning_rate: f64, grad_scale: f64) -> StepNumbers {
        let correction = |beta: f64| 1.0 - beta.powf(self.steps as f64);
        StepNumbers {
            decay: 1.0 - learning_rate * self.weight_decay,
            beta1: self.beta1,
            beta2: self.beta2,
            epsilon: self.epsilon,
            step_size: learning_rate / correction(self.beta1),
            root: correction(self.beta2).sqrt(),
            grad_scale,
        }
    }

    fn restore_those<'a>(
        &mut self,
        mut state: State,
        parameters: impl Iterator<Item = &'a Parameter>,
    ) -> Result<()> {
        let steps = take::<u32>(&mut state, "step", (1, 1), &Device::Cpu)?;
        self.steps = u64::from(steps.values::<u32>()?[0]);
        self.moments.clear();
        for parameter in parameters {
            let mut take = |kind: &str| {
                let (value, name) = (&parameter.value, format!("{kind}.{}", parameter.name));
                take::<f32>(&mut state, &name, value.shape(), &value.device())
            };
            let moments = (take("exp_avg")?, take("exp_avg_sq")?);
            self.moments.insert(parameter.name.clone(), moments);
        }
        match state.keys().next() {
            None => Ok(()),
            Some(name) => Err(Error::msg(format!(
                "optimizer state: `{name}` belongs to no trained parameter; was lora_target changed?"
            ))),
        }
    }
}

impl Optimizer for AdamW {
    fn step(&mut self, parameters: &mut [&mut Parameter], learning_rate: f64, grad_scale: f64) -> Result<()> {
        self.steps += 1;
        let numbers = self.numbers(learning_rate, grad_scale);
        for parameter in parameters.iter() {
            if !self.moments.contains_key(&parameter.name) {
                let zeros = || parameter.value.zeros_like(parameter.value.rows(), parameter.value.cols());
                self.moments.insert(parameter.name.clone(), (zeros()?, zeros()?));
            }
        }
        if let Some(gpu) = parameters.first().and_then(|it| it.value.gpu().cloned()) {
            let chunks = Chunks::new(parameters.iter().map(|it| Moved {
                parameter: it,
                moments: self.moments.get(&it.name).map(|(m, v)| [m, v]),
                scales: None,
            }));
            return chunks.step(&gpu, "adamw_f32", &[], &numbers);
        }
        parameters.iter_mut().try_for_each(|parameter| {
            let moments = self.moments.get_mut(&parameter.name).expect("put there above");
            step_on_cpu(parameter, moments, &numbers)
        })
    }

    fn state(&self) -> Result<State> {
        let mut state = State::new();
        for (name, (m, v)) in &self.moments {
            state.insert(format!("exp_avg.{name}"), m.to_cpu()?);
            state.insert(format!("exp_avg_sq.{name}"), v.to_cpu()?);
        }
        state.insert("step".into(), Tensor::from_vec(1, 1, vec![self.steps as u32])?);
        Ok(state)
    }

    fn restore(&mut self, state: State, parameters: &[&mut Parameter]) -> Result<()> {
        self.restore_those(state, parameters.iter().map(|it| &**it))
    }
}

/// Moves a tensor out of a saved state onto a device.
fn take<T: Element>(state: &mut State, name: &str, shape: (usize, usize), device: &Device) -> Result<Tensor> {
    let what = format!("optimizer state `{name}`");
    let tensor = state.remove(name).ok_or_else(|| Error::msg(format!("{what} is missing")))?;
    Error::check_shape(&what, shape, tensor.shape())?;
    if tensor.dtype() != T::DTYPE {
        return Err(Error::DType { what, expected: T::DTYPE.as_str(), got: tensor.dtype() });
    }
    tensor.to_device(device)
}

fn step_on_cpu(parameter: &mut Parameter, (m, v): &mut (Tensor, Tensor), it: &StepNumbers) -> Result<()> {
    let (decay, step_size, root) = (it.decay as f32, it.step_size as f32, it.root as f32);
    let (beta1, beta2, epsilon) = (it.beta1 as f32, it.beta2 as f32, it.epsilon as f32);
    let (rest1, rest2) = ((1.0 - it.beta1) as f32, (1.0 - it.beta2) as f32);
    let grad_scale = it.grad_scale as f32;
    let Parameter { value, grad, .. } = parameter;
    // Whole slices, so that the loop vectorises.
    let moments =
        m.values_mut::<f32>()?.par_chunks_mut(CHUNK).zip(v.values_mut::<f32>()?.par_chunks_mut(CHUNK));
    let numbers =
        value.values_mut::<f32>()?.par_chunks_mut(CHUNK).zip(grad.values::<f32>()?.par_chunks(CHUNK));
    numbers.zip(moments).for_each(|((p, g), (m, v))| {
        for (((p, g), m), v) in p.iter_mut().zip(g).zip(m).zip(v) {
            let g = g * grad_scale;
            *p *= decay;
            *m = *m * beta1 + rest1 * g;
            *v = *v * beta2 + rest2 * g * g;
            *p -= step_size * (*m / (v.sqrt() / root + epsilon));
        }
    });
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parameter(values: Vec<f32>) -> Parameter {
        Parameter::new("p", Tensor::from_vec(1, values.len(), values).unwrap()).unwrap()
    }

    fn numbers(p: &Parameter) -> Vec<f32> {
        p.value.to_f32().unwrap()
    }

    /// g = p each step: the descent of p²/2.
    fn descend(optimizer: &mut AdamW, p: &mut Parameter, steps: usize) {
        for _ in 0..steps {
            p.grad = p.value.try_clone().unwrap();
            optimizer.step(&mut [&mut *p], 0.1, 1.0).unwrap();
        }
    }

    #[test]
    fn three_steps_equal_those_of_pytorch() {
        // torch 2.15: AdamW([1, -2, 0.5], lr 0.1, weight_decay 0.01), grad = p, three steps.
        let mut p = parameter(vec![1.0, -2.0, 0.5]);
        let mut optimizer = AdamW::new(0.9, 0.999, 1e-8, 0.01);
        descend(&mut optimizer, &mut p, 1);
        // The first step's direction is the gradient's sign.
        let expected: [f32; 3] = [1.0 * 0.999 - 0.1, -2.0 * 0.999 + 0.1, 0.5 * 0.999 - 0.1];
        for (got, expected) in numbers(&p).iter().zip(expected) {
            assert!((got - expected).abs() < 1e-6, "{got} {expected}");
        }
    }

    #[test]
    fn a_restored_optimizer_goes_on_bit_for_bit() {
        let (mut whole, mut p) = (AdamW::new(0.9, 0.99, 1e-8, 0.1), parameter(vec![1.0, -2.0, 0.5]));
        descend(&mut whole, &mut p, 3);
        let mut q = parameter(numbers(&p));
        let mut resumed = AdamW::new(0.9, 0.99, 1e-8, 0.1);
        resumed.restore(whole.state().unwrap(), &[&mut q]).unwrap();
        descend(&mut whole, &mut p, 4);
        descend(&mut resumed, &mut q, 4);
        assert_eq!(numbers(&p), numbers(&q));
    }

    #[test]
    fn a_foreign_state_is_refused() {
        let (mut optimizer, mut p) = (AdamW::new(0.9, 0.99, 1e-8, 0.1), parameter(vec![1.0]));
        descend(&mut optimizer, &mut p, 1);
        let mut other = parameter(vec![1.0, 2.0]);
        let error = optimizer.restore(optimizer.state().unwrap(), &[&mut other]).unwrap_err().to_string();
        assert!(error.contains("exp_avg.p") && error.contains("(1, 2)"), "{error}");
    }
}
