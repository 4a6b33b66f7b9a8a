//! Lion (Chen et al. 2023, "Symbolic Discovery of Optimization Algorithms", algorithm 2):
//!   p ·= 1 − lr·decay;  p −= lr·sign(β₁m + (1 − β₁)g);  m = β₂m + (1 − β₂)g

use ferrotune_tensor::Result;

use super::{Move, Rule};

/// Lion with f32 momentum.
#[derive(Debug)]
pub struct Lion {
    /// β₁
    pub beta1: f64,
    /// β₂
    pub beta2: f64,
}

impl Rule for Lion {
    fn kept(&self, shape: (usize, usize)) -> Vec<(&'static str, (usize, usize))> {
        vec![("exp_avg", shape)]
    }

    fn step(&self, it: Move<'_>) -> Result<()> {
        let (rate, decay) = (it.learning_rate as f32, (1.0 - it.learning_rate * it.weight_decay) as f32);
        let (beta1, beta2) = (self.beta1 as f32, self.beta2 as f32);
        for (_, m) in it.kept {
            let numbers = it.value.iter_mut().zip(&it.grad).zip(m.values_mut::<f32>()?);
            for ((p, g), m) in numbers {
                let direction = *m * beta1 + (1.0 - beta1) * g;
                // Unlike f32's signum, 0 has none.
                let sign = if direction == 0.0 { 0.0 } else { direction.signum() };
                *p = *p * decay - rate * sign;
                *m = *m * beta2 + (1.0 - beta2) * g;
            }
        }
        Ok(())
    }
}
