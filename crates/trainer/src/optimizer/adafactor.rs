//! Adafactor (Shazeer and Stern 2018) with the learning rate of the schedule, as transformers' trainer
//! sets it up (scale_parameter and relative_step off, no first moment):
//!   β = 1 − t^−0.8;  R = βR + (1 − β)·mean over columns of g² + 1e-30;  C likewise over rows
//!   u = g / √(R·Cᵀ/mean(R)),  or g/√V where a parameter is one row
//!   u /= max(1, rms(u));  p ·= 1 − lr·decay;  p −= lr·u

use ferrotune_tensor::Result;

use super::{Move, Rule};

/// Adafactor.
#[derive(Debug)]
pub struct Adafactor;

/// ε₁, added to squares.
const EPSILON: f32 = 1e-30;
/// Of rms(u).
const CLIP_THRESHOLD: f64 = 1.0;
/// Of β.
const DECAY_RATE: f64 = -0.8;

impl Rule for Adafactor {
    fn kept(&self, (rows, cols): (usize, usize)) -> Vec<(&'static str, (usize, usize))> {
        match rows {
            1 => vec![("exp_avg_sq", (1, cols))],
            _ => vec![("exp_avg_sq_row", (1, rows)), ("exp_avg_sq_col", (1, cols))],
        }
    }

    fn step(&self, mut it: Move<'_>) -> Result<()> {
        let beta = (1.0 - (it.step as f64).powf(DECAY_RATE)) as f32;
        let (rows, cols) = it.shape;
        match it.kept {
            [(_, square)] => {
                for (v, u) in square.values_mut::<f32>()?.iter_mut().zip(&mut it.grad) {
                    *v = *v * beta + (1.0 - beta) * (*u * *u + EPSILON);
                    *u /= v.sqrt();
                }
            }
            [(_, row), (_, col)] => {
                let (row, col) = (row.values_mut::<f32>()?, col.values_mut::<f32>()?);
                let mut columns = vec![0.0f64; cols];
                for (r, g) in row.iter_mut().zip(it.grad.chunks(cols)) {
                    let squares = g.iter().map(|g| f64::from(g * g + EPSILON));
                    let sum: f64 = squares.clone().sum();
                    columns.iter_mut().zip(squares).for_each(|(sum, square)| *sum += square);
                    *r = *r * beta + (1.0 - beta) * (sum / cols as f64) as f32;
                }
                for (c, sum) in col.iter_mut().zip(columns) {
                    *c = *c * beta + (1.0 - beta) * (sum / rows as f64) as f32;
                }
                let mean = (row.iter().map(|r| f64::from(*r)).sum::<f64>() / rows as f64) as f32;
                for (r, u) in row.iter().zip(it.grad.chunks_mut(cols)) {
                    let r = (*r / mean).sqrt();
                    u.iter_mut().zip(&*col).for_each(|(u, c)| *u /= r * c.sqrt());
                }
            }
            _ => {}
        }
        let square: f64 = it.grad.iter().map(|u| f64::from(*u) * f64::from(*u)).sum();
        let rms = (square / it.grad.len().max(1) as f64).sqrt();
        let rate = (it.learning_rate / (rms / CLIP_THRESHOLD).max(1.0)) as f32;
        let decay = (1.0 - it.learning_rate * it.weight_decay) as f32;
        it.value.iter_mut().zip(&it.grad).for_each(|(p, u)| *p = *p * decay - rate * u);
        Ok(())
    }
}
