//! Stochastic gradient descent as torch.optim.SGD has it:
//!   g += decay·p;  with momentum b = μb + g (b = g at first) and g = b;  p −= lr·g

use ferrotune_tensor::Result;

use super::{Move, Rule};

/// SGD, with momentum or without.
#[derive(Debug)]
pub struct Sgd {
    /// μ; 0 keeps no state.
    pub momentum: f64,
}

impl Rule for Sgd {
    fn kept(&self, shape: (usize, usize)) -> Vec<(&'static str, (usize, usize))> {
        if self.momentum > 0.0 { vec![("momentum_buffer", shape)] } else { Vec::new() }
    }

    fn step(&self, mut it: Move<'_>) -> Result<()> {
        let (rate, decay, momentum) = (it.learning_rate as f32, it.weight_decay as f32, self.momentum as f32);
        it.grad.iter_mut().zip(&*it.value).for_each(|(g, p)| *g += decay * p);
        if let [(_, buffer)] = it.kept {
            // It begins as zeros, to which the first gradient is added whole.
            for (b, g) in buffer.values_mut::<f32>()?.iter_mut().zip(&mut it.grad) {
                *b = *b * momentum + *g;
                *g = *b;
            }
        }
        it.value.iter_mut().zip(&it.grad).for_each(|(p, g)| *p -= rate * g);
        Ok(())
    }
}
