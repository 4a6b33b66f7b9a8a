//! Optimizers whose steps are taken in the host's memory, a parameter at a time: on a GPU, gradient and
//! parameter are copied over, and the parameter back. What they keep stays in the host's memory.

use std::collections::BTreeMap;

use ferrotune_nn::Parameter;
use ferrotune_tensor::{DType, Device, Result, Tensor};

use super::{Optimizer, ParameterGroups, State, nothing_left, take, take_steps};

/// How a parameter is moved.
pub trait Rule: std::fmt::Debug {
    /// What is kept of a parameter of this shape: names, and shapes of f32 numbers.
    fn kept(&self, shape: (usize, usize)) -> Vec<(&'static str, (usize, usize))>;

    /// Moves one parameter.
    ///
    /// # Errors
    /// When a tensor isn't what it was made as.
    fn step(&self, it: Move<'_>) -> Result<()>;
}

/// One parameter about to be moved.
#[derive(Debug)]
pub struct Move<'a> {
    /// Rows and columns.
    pub shape: (usize, usize),
    /// Row after row.
    pub value: &'a mut [f32],
    /// Scaled as the step asks.
    pub grad: Vec<f32>,
    /// What [`Rule::kept`] named.
    pub kept: &'a mut [(&'static str, Tensor)],
    /// Of this parameter's group.
    pub learning_rate: f64,
    /// Of this parameter's group.
    pub weight_decay: f64,
    /// t: steps taken, this one included.
    pub step: u64,
}

/// A [`Rule`] for all parameters.
#[derive(Debug)]
pub struct OnHost<R> {
    rule: R,
    groups: ParameterGroups,
    steps: u64,
    kept: BTreeMap<String, Vec<(&'static str, Tensor)>>,
}

impl<R: Rule> OnHost<R> {
    /// Before the first step.
    pub fn new(rule: R, groups: ParameterGroups) -> OnHost<R> {
        OnHost { rule, groups, steps: 0, kept: BTreeMap::new() }
    }

    pub(super) fn restore_those<'a>(
        &mut self,
        mut state: State,
        parameters: impl Iterator<Item = &'a Parameter>,
    ) -> Result<()> {
        self.steps = take_steps(&mut state)?;
        self.kept.clear();
        for it in parameters {
            let kept = self.rule.kept(it.value.shape()).into_iter().map(|(kind, shape)| {
                let name = format!("{kind}.{}", it.name);
                Ok((kind, take::<f32>(&mut state, &name, shape, &Device::Cpu)?))
            });
            self.kept.insert(it.name.clone(), kept.collect::<Result<_>>()?);
        }
        nothing_left(&state)
    }
}

impl<R: Rule> Optimizer for OnHost<R> {
    fn step(&mut self, parameters: &mut [&mut Parameter], learning_rate: f64, grad_scale: f64) -> Result<()> {
        self.steps += 1;
        for parameter in parameters {
            let (shape, group) = (parameter.value.shape(), self.groups.of(parameter));
            if !self.kept.contains_key(&parameter.name) {
                let kept = self.rule.kept(shape).into_iter().map(|(kind, (rows, cols))| {
                    Ok((kind, Tensor::zeros(rows, cols, DType::F32, &Device::Cpu)?))
                });
                self.kept.insert(parameter.name.clone(), kept.collect::<Result<_>>()?);
            }
            let kept = self.kept.get_mut(&parameter.name).expect("put there above");
            in_host_memory(parameter, |value, grad| {
                let grad = grad.values::<f32>()?.iter().map(|g| g * grad_scale as f32).collect();
                self.rule.step(Move {
                    shape,
                    value: value.values_mut()?,
                    grad,
                    kept,
                    learning_rate: learning_rate * group.lr_ratio,
                    weight_decay: group.weight_decay,
                    step: self.steps,
                })
            })?;
        }
        Ok(())
    }

    fn state(&self) -> Result<State> {
        let mut state = State::new();
        for (name, kept) in &self.kept {
            for (kind, tensor) in kept {
                state.insert(format!("{kind}.{name}"), tensor.try_clone()?);
            }
        }
        state.insert("step".into(), Tensor::from_vec(1, 1, vec![self.steps as u32])?);
        Ok(state)
    }

    fn restore(&mut self, state: State, parameters: &[&mut Parameter]) -> Result<()> {
        self.restore_those(state, parameters.iter().map(|it| &**it))
    }
}

/// Runs a step over the numbers of a parameter and its gradient in the host's memory.
pub(super) fn in_host_memory(
    parameter: &mut Parameter,
    step: impl FnOnce(&mut Tensor, &Tensor) -> Result<()>,
) -> Result<()> {
    let device = parameter.value.device();
    if device.gpu().is_none() {
        return step(&mut parameter.value, &parameter.grad);
    }
    let mut value = parameter.value.to_cpu()?;
    step(&mut value, &parameter.grad.to_cpu()?)?;
    parameter.value.copy_from(&value.to_device(&device)?)?;
    match &mut parameter.copy {
        Some(copy) => parameter.value.cast_into(copy),
        None => Ok(()),
    }
}
