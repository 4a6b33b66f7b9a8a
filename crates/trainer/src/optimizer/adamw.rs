//! AdamW.

use std::collections::BTreeMap;

use ferrotune_nn::Parameter;
use ferrotune_tensor::{DType, Result, Tensor};
use rayon::prelude::*;

use super::gpu::{Chunks, Moved};
use super::groups::Group;
use super::{Optimizer, ParameterGroups, State, StateMemory, in_host_memory, nothing_left, take, take_steps};

/// Elements that one task of the CPU takes.
const CHUNK: usize = 16 * 1024;

/// What one step is computed with, alike on every device.
pub(super) struct StepNumbers {
    pub(super) decay: f64,
    pub(super) beta1: f64,
    pub(super) beta2: f64,
    pub(super) epsilon: f64,
    pub(super) step_size: f64,
    pub(super) root: f64,
    pub(super) grad_scale: f64,
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
    /// decay, and lr, of each parameter
    pub groups: ParameterGroups,
    /// Where m and v are.
    pub memory: StateMemory,
    /// t: steps taken.
    steps: u64,
    /// m and v of each parameter, by its name.
    moments: BTreeMap<String, (Tensor, Tensor)>,
}

impl AdamW {
    /// Before the first step.
    pub fn new(beta1: f64, beta2: f64, epsilon: f64, groups: ParameterGroups, memory: StateMemory) -> AdamW {
        AdamW { beta1, beta2, epsilon, groups, memory, steps: 0, moments: BTreeMap::new() }
    }

    /// Of step t, for one group.
    pub(super) fn numbers(&self, group: Group, learning_rate: f64, grad_scale: f64) -> StepNumbers {
        let correction = |beta: f64| 1.0 - beta.powf(self.steps as f64);
        let learning_rate = learning_rate * group.lr_ratio;
        StepNumbers {
            decay: 1.0 - learning_rate * group.weight_decay,
            beta1: self.beta1,
            beta2: self.beta2,
            epsilon: self.epsilon,
            step_size: learning_rate / correction(self.beta1),
            root: correction(self.beta2).sqrt(),
            grad_scale,
        }
    }

    pub(super) fn restore_those<'a>(
        &mut self,
        mut state: State,
        parameters: impl Iterator<Item = &'a Parameter>,
    ) -> Result<()> {
        self.steps = take_steps(&mut state)?;
        self.moments.clear();
        for parameter in parameters {
            let mut take = |kind: &str| {
                let (value, name) = (&parameter.value, format!("{kind}.{}", parameter.name));
                take::<f32>(&mut state, &name, value.shape(), &self.memory.of(parameter))
            };
            let moments = (take("exp_avg")?, take("exp_avg_sq")?);
            self.moments.insert(parameter.name.clone(), moments);
        }
        nothing_left(&state)
    }
}

impl Optimizer for AdamW {
    fn step(&mut self, parameters: &mut [&mut Parameter], learning_rate: f64, grad_scale: f64) -> Result<()> {
        self.steps += 1;
        for parameter in parameters.iter() {
            if !self.moments.contains_key(&parameter.name) {
                let (rows, cols) = parameter.value.shape();
                let zeros = || Tensor::zeros(rows, cols, DType::F32, &self.memory.of(parameter));
                self.moments.insert(parameter.name.clone(), (zeros()?, zeros()?));
            }
        }
        let on_gpu = self.memory == StateMemory::Device;
        let gpu = parameters.first().and_then(|it| it.value.gpu().cloned()).filter(|_| on_gpu);
        for group in self.groups.among(parameters.iter().map(|it| &**it)) {
            let numbers = self.numbers(group, learning_rate, grad_scale);
            let of_group = |it: &Parameter| self.groups.of(it) == group;
            if let Some(gpu) = &gpu {
                let moved = parameters.iter().filter(|it| of_group(it)).map(|it| Moved {
                    parameter: it,
                    moments: self.moments.get(&it.name).map(|(m, v)| [m, v]),
                    scales: None,
                });
                Chunks::new(moved).step(gpu, "adamw_f32", &[], &numbers)?;
                continue;
            }
            for parameter in parameters.iter_mut().filter(|it| of_group(it)) {
                let moments = self.moments.get_mut(&parameter.name).expect("put there above");
                in_host_memory(parameter, |value, grad| step_on_cpu(value, grad, moments, &numbers))?;
            }
        }
        Ok(())
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

fn step_on_cpu(
    value: &mut Tensor,
    grad: &Tensor,
    (m, v): &mut (Tensor, Tensor),
    it: &StepNumbers,
) -> Result<()> {
    let (decay, step_size, root) = (it.decay as f32, it.step_size as f32, it.root as f32);
    let (beta1, beta2, epsilon) = (it.beta1 as f32, it.beta2 as f32, it.epsilon as f32);
    let (rest1, rest2) = ((1.0 - it.beta1) as f32, (1.0 - it.beta2) as f32);
    let grad_scale = it.grad_scale as f32;
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

    fn adamw() -> AdamW {
        AdamW::new(0.9, 0.99, 1e-8, ParameterGroups::with_decay(0.1), StateMemory::Device)
    }

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
    fn a_restored_optimizer_goes_on_bit_for_bit() {
        let (mut whole, mut p) = (adamw(), parameter(vec![1.0, -2.0, 0.5]));
        descend(&mut whole, &mut p, 3);
        let mut q = parameter(numbers(&p));
        let mut resumed = adamw();
        resumed.restore(whole.state().unwrap(), &[&mut q]).unwrap();
        descend(&mut whole, &mut p, 4);
        descend(&mut resumed, &mut q, 4);
        assert_eq!(numbers(&p), numbers(&q));
    }

    #[test]
    fn a_foreign_state_is_refused() {
        let (mut optimizer, mut p) = (adamw(), parameter(vec![1.0]));
        descend(&mut optimizer, &mut p, 1);
        let mut other = parameter(vec![1.0, 2.0]);
        let error = optimizer.restore(optimizer.state().unwrap(), &[&mut other]).unwrap_err().to_string();
        assert!(error.contains("exp_avg.p") && error.contains("(1, 2)"), "{error}");
    }
}
