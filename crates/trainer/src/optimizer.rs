//! Optimizers: from gradients to new parameters.

use std::collections::BTreeMap;

use ferrotune_nn::Parameter;
use ferrotune_tensor::{Error, Result, Tensor};
use rayon::prelude::*;

/// Named tensors that an optimizer continues from.
pub type State = BTreeMap<String, Tensor>;

/// Takes steps. Parameters come in the same order every time.
pub trait Optimizer {
    /// One step down the gradients.
    ///
    /// # Errors
    /// When the parameters' types aren't taken.
    fn step(&mut self, parameters: &mut [&mut Parameter], learning_rate: f64) -> Result<()>;

    /// All that a resumed run needs.
    fn state(&self) -> State;

    /// Goes on from a saved state.
    ///
    /// # Errors
    /// When the state isn't that of these parameters.
    fn restore(&mut self, state: State, parameters: &[&mut Parameter]) -> Result<()>;
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
}

impl Optimizer for AdamW {
    fn step(&mut self, parameters: &mut [&mut Parameter], learning_rate: f64) -> Result<()> {
        self.steps += 1;
        let correction = |beta: f64| 1.0 - beta.powf(self.steps as f64);
        let decay = (1.0 - learning_rate * self.weight_decay) as f32;
        let step_size = (learning_rate / correction(self.beta1)) as f32;
        let root = correction(self.beta2).sqrt() as f32;
        let (beta1, beta2, epsilon) = (self.beta1 as f32, self.beta2 as f32, self.epsilon as f32);
        let (rest1, rest2) = ((1.0 - self.beta1) as f32, (1.0 - self.beta2) as f32);
        for parameter in parameters {
            let Parameter { name, value, grad } = &mut **parameter;
            if !self.moments.contains_key(name) {
                let zeros = || value.zeros_like(value.rows(), value.cols());
                self.moments.insert(name.clone(), (zeros()?, zeros()?));
            }
            let (m, v) = self.moments.get_mut(name).expect("put there above");
            let moments = m.values_mut::<f32>()?.par_iter_mut().zip(v.values_mut::<f32>()?);
            let numbers = value.values_mut::<f32>()?.par_iter_mut().zip(grad.values::<f32>()?);
            numbers.zip(moments).with_min_len(4096).for_each(|((p, g), (m, v))| {
                *p *= decay;
                *m = *m * beta1 + rest1 * g;
                *v = *v * beta2 + rest2 * g * g;
                *p -= step_size * (*m / (v.sqrt() / root + epsilon));
            });
        }
        Ok(())
    }

    fn state(&self) -> State {
        let mut state = State::new();
        for (name, (m, v)) in &self.moments {
            state.insert(format!("exp_avg.{name}"), m.clone());
            state.insert(format!("exp_avg_sq.{name}"), v.clone());
        }
        let steps = vec![self.steps as u32];
        state.insert("step".into(), Tensor::from_vec(1, 1, steps).expect("one number"));
        state
    }

    fn restore(&mut self, mut state: State, parameters: &[&mut Parameter]) -> Result<()> {
        let missing = |name: &str| Error::msg(format!("optimizer state: `{name}` is missing"));
        let steps = state.remove("step").ok_or_else(|| missing("step"))?;
        self.steps = u64::from(*steps.values::<u32>()?.first().ok_or_else(|| missing("step"))?);
        self.moments.clear();
        for parameter in parameters {
            let mut take = |kind: &str| -> Result<Tensor> {
                let name = format!("{kind}.{}", parameter.name);
                let tensor = state.remove(&name).ok_or_else(|| missing(&name))?;
                Error::check_shape(
                    &format!("optimizer state `{name}`"),
                    parameter.value.shape(),
                    tensor.shape(),
                )?;
                tensor.values::<f32>()?;
                Ok(tensor)
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
            p.grad = p.value.clone();
            optimizer.step(&mut [&mut *p], 0.1).unwrap();
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
        resumed.restore(whole.state(), &[&mut q]).unwrap();
        descend(&mut whole, &mut p, 4);
        descend(&mut resumed, &mut q, 4);
        assert_eq!(numbers(&p), numbers(&q));
    }

    #[test]
    fn a_foreign_state_is_refused() {
        let (mut optimizer, mut p) = (AdamW::new(0.9, 0.99, 1e-8, 0.1), parameter(vec![1.0]));
        descend(&mut optimizer, &mut p, 1);
        let mut other = parameter(vec![1.0, 2.0]);
        let error = optimizer.restore(optimizer.state(), &[&mut other]).unwrap_err().to_string();
        assert!(error.contains("exp_avg.p") && error.contains("(1, 2)"), "{error}");
    }
}
