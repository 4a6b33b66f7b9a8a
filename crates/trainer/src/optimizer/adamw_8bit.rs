//! AdamW with moments in 8 bits (Dettmers et al. 2022), as bitsandbytes' CUDA kernel takes its steps:
//!   m = map(code)·absmax, v likewise, both moved as in [`AdamW`]
//!   p −= lr/(1 − β₁ᵗ) · √(1 − β₂ᵗ) · m / (√v + √(1 − β₂ᵗ)·ε),  then p ·= 1 − lr·decay
//!   absmax = max |m| of a block,  code = that of the number of the map nearest to m/absmax
//!
//! The head of `kernels/optimizer.cu` has the details. Both arms round each operation by itself, in the
//! same order, and give the same bits.

use std::collections::BTreeMap;

use ferrotune_nn::Parameter;
use ferrotune_tensor::{DType, Device, Result, Tensor, dynamic_map, unsigned_dynamic_map};
use rayon::prelude::*;

use super::adamw::StepNumbers;
use super::gpu::{Chunks, Moved};
use super::{AdamW, Optimizer, ParameterGroups, State, StateMemory, in_host_memory, take};

#[cfg(test)]
mod tests;

/// Elements that share a scale.
pub(super) const BLOCK: usize = 256;
/// A tensor of fewer elements keeps its moments in f32.
const FEWEST: usize = 4096;
/// What a state calls m and v.
const KINDS: [&str; 2] = ["exp_avg", "exp_avg_sq"];

/// AdamW with a byte for each moment of each element. Tensors of fewer than 4096 elements are stepped as
/// by [`AdamW`].
#[derive(Debug)]
pub struct AdamW8bit {
    /// Steps the small tensors, and counts for all.
    small: AdamW,
    /// m and v of each other parameter, by its name.
    moments: BTreeMap<String, [Moment; 2]>,
}

#[derive(Debug)]
struct Moment {
    /// Into the signed map for m, the unsigned one for v; of the parameter's shape.
    codes: Tensor,
    /// (1, ⌈n/256⌉)
    absmax: Tensor,
}

impl AdamW8bit {
    /// Before the first step: [`AdamW::new`].
    pub fn new(
        beta1: f64,
        beta2: f64,
        epsilon: f64,
        groups: ParameterGroups,
        memory: StateMemory,
    ) -> AdamW8bit {
        AdamW8bit { small: AdamW::new(beta1, beta2, epsilon, groups, memory), moments: BTreeMap::new() }
    }
}

impl Optimizer for AdamW8bit {
    fn step(&mut self, parameters: &mut [&mut Parameter], learning_rate: f64, grad_scale: f64) -> Result<()> {
        let (mut small, mut large): (Vec<_>, Vec<_>) =
            parameters.iter_mut().map(|it| &mut **it).partition(|it| is_small(it));
        self.small.step(&mut small, learning_rate, grad_scale)?;
        for parameter in &large {
            if !self.moments.contains_key(&parameter.name) {
                let (value, device) = (&parameter.value, self.small.memory.of(parameter));
                let zeros = || -> Result<Moment> {
                    Ok(Moment {
                        codes: Tensor::zeros(value.rows(), value.cols(), DType::U8, &device)?,
                        absmax: Tensor::zeros(1, value.len().div_ceil(BLOCK), DType::F32, &device)?,
                    })
                };
                self.moments.insert(parameter.name.clone(), [zeros()?, zeros()?]);
            }
        }
        let on_gpu = self.small.memory == StateMemory::Device;
        let gpu = large.first().and_then(|it| it.value.gpu().cloned()).filter(|_| on_gpu);
        let maps = [Map::new(dynamic_map()), Map::new(unsigned_dynamic_map())];
        for group in self.small.groups.among(large.iter().map(|it| &**it)) {
            let numbers = self.small.numbers(group, learning_rate, grad_scale);
            let of_group = |it: &Parameter| self.small.groups.of(it) == group;
            if let Some(gpu) = &gpu {
                let moved = large.iter().filter(|it| of_group(it)).map(|it| {
                    let both = self.moments.get(&it.name).map(|both| both.each_ref());
                    Moved {
                        parameter: it,
                        moments: both.map(|both| both.map(|it| &it.codes)),
                        scales: both.map(|both| both.map(|it| &it.absmax)),
                    }
                });
                let device = Device::Cuda(gpu.clone());
                let upload = |it: &Map| Tensor::from_vec(1, 256, it.numbers.to_vec())?.to_device(&device);
                let maps = [upload(&maps[0])?, upload(&maps[1])?];
                Chunks::new(moved).step(gpu, "adamw_8bit", &maps, &numbers)?;
                continue;
            }
            for parameter in large.iter_mut().filter(|it| of_group(it)) {
                let moments = self.moments.get_mut(&parameter.name).expect("put there above");
                in_host_memory(parameter, |value, grad| step_on_cpu(value, grad, moments, &maps, &numbers))?;
            }
        }
        Ok(())
    }

    fn state(&self) -> Result<State> {
        let mut state = self.small.state()?;
        for (name, moments) in &self.moments {
            for (kind, moment) in KINDS.iter().zip(moments) {
                state.insert(format!("{kind}.{name}"), moment.codes.to_cpu()?);
                state.insert(format!("{kind}_absmax.{name}"), moment.absmax.to_cpu()?);
            }
        }
        Ok(state)
    }

    fn restore(&mut self, mut state: State, parameters: &[&mut Parameter]) -> Result<()> {
        self.moments.clear();
        for parameter in parameters.iter().filter(|it| !is_small(it)) {
            let (value, device, name) = (&parameter.value, self.small.memory.of(parameter), &parameter.name);
            let mut moment = |kind: &str| -> Result<Moment> {
                let absmax = (1, value.len().div_ceil(BLOCK));
                Ok(Moment {
                    codes: take::<u8>(&mut state, &format!("{kind}.{name}"), value.shape(), &device)?,
                    absmax: take::<f32>(&mut state, &format!("{kind}_absmax.{name}"), absmax, &device)?,
                })
            };
            let [m, v] = KINDS;
            self.moments.insert(name.clone(), [moment(m)?, moment(v)?]);
        }
        self.small.restore_those(state, parameters.iter().map(|it| &**it).filter(|it| is_small(it)))
    }
}

fn is_small(parameter: &Parameter) -> bool {
    parameter.value.len() < FEWEST
}

/// A map with what the nearest code is found by.
struct Map {
    numbers: &'static [f32; 256],
    /// The k-th lies between the codes k and k + 1.
    midpoints: [f32; 255],
}

impl Map {
    fn new(numbers: &'static [f32; 256]) -> Map {
        Map { numbers, midpoints: std::array::from_fn(|k| 0.5 * (numbers[k] + numbers[k + 1])) }
    }

    /// Of two that are as near, the even code, where bitsandbytes' search ends; of NaN, 0.
    fn nearest(&self, x: f32) -> u8 {
        let below = self.midpoints.partition_point(|midpoint| x > *midpoint);
        let between = self.midpoints.get(below) == Some(&x);
        (below + (below & usize::from(between))) as u8
    }
}

/// One moment in one block.
struct BlockMoment<'a> {
    codes: &'a mut [u8],
    absmax: &'a mut f32,
}

impl Moment {
    fn blocks(&mut self) -> Result<impl IndexedParallelIterator<Item = BlockMoment<'_>>> {
        let codes = self.codes.values_mut::<u8>()?.par_chunks_mut(BLOCK);
        let absmax = self.absmax.values_mut::<f32>()?.par_iter_mut();
        Ok(codes.zip(absmax).map(|(codes, absmax)| BlockMoment { codes, absmax }))
    }
}

fn step_on_cpu(
    value: &mut Tensor,
    grad: &Tensor,
    moments: &mut [Moment; 2],
    maps: &[Map; 2],
    it: &StepNumbers,
) -> Result<()> {
    let [m, v] = moments;
    let numbers =
        value.values_mut::<f32>()?.par_chunks_mut(BLOCK).zip(grad.values::<f32>()?.par_chunks(BLOCK));
    let moments = m.blocks()?.zip(v.blocks()?);
    numbers
        .zip(moments)
        .with_min_len(16)
        .for_each(|((values, grads), (m, v))| step_block(values, grads, m, v, maps, it));
    Ok(())
}

fn step_block(
    values: &mut [f32],
    grads: &[f32],
    m: BlockMoment,
    v: BlockMoment,
    [map_m, map_v]: &[Map; 2],
    it: &StepNumbers,
) {
    let (decay, step_size, root) = (it.decay as f32, it.step_size as f32, it.root as f32);
    let (beta1, beta2, epsilon) = (it.beta1 as f32, it.beta2 as f32, it.epsilon as f32);
    let grad_scale = it.grad_scale as f32;
    // Taken of the f32s, as bitsandbytes does.
    let (rest1, rest2) = (1.0 - beta1, 1.0 - beta2);
    let (mut new_m, mut new_v) = ([0.0f32; BLOCK], [0.0f32; BLOCK]);
    let (mut largest_m, mut largest_v) = (0.0f32, 0.0f32);
    for (i, g) in grads.iter().enumerate() {
        if g.is_finite() {
            let g = g * grad_scale;
            new_m[i] = map_m.numbers[m.codes[i] as usize] * *m.absmax * beta1 + rest1 * g;
            new_v[i] = map_v.numbers[v.codes[i] as usize] * *v.absmax * beta2 + rest2 * g * g;
        }
        largest_m = largest_m.max(new_m[i].abs());
        largest_v = largest_v.max(new_v[i].abs());
    }
    (*m.absmax, *v.absmax) = (largest_m, largest_v);
    for (i, (p, g)) in values.iter_mut().zip(grads).enumerate() {
        let (new_m, new_v) = (new_m[i], new_v[i]);
        if g.is_finite() {
            let direction = new_m / (new_v.sqrt() + root * epsilon);
            *p = (*p - step_size * root * direction) * decay;
        }
        let code = map_m.nearest(new_m / largest_m);
        // A moment keeps its sign; that of 0, and of a block of zeros, wraps around as in bitsandbytes.
        let turned = map_m.numbers[code as usize].is_sign_negative() != new_m.is_sign_negative();
        m.codes[i] = match turned {
            true if new_m > 0.0 => code.wrapping_add(1),
            true => code.wrapping_sub(1),
            false => code,
        };
        v.codes[i] = map_v.nearest(new_v / largest_v);
    }
}
