//! Muon (Jordan et al. 2024) as torch.optim.Muon has it, with the step of AdamW's size (Liu et al. 2025,
//! "Muon is Scalable for LLM Training"), for matrices but embedding and head; AdamW for all others.
//!   m += (1 − μ)(g − m);  u = g + μ(m − g);  o = u/‖u‖, then five times o = a·o + (b·S + c·S²)·o, S = o·oᵀ
//!   p ·= 1 − lr·decay;  p −= lr·0.2·√max(rows, columns)·o
//! torch computes o in bf16; here it is f32.

use ferrotune_nn::Parameter;
use ferrotune_tensor::{Matrix, MatrixMut, Precision, Result, product};

use super::{AdamW, Move, OnHost, Optimizer, ParameterGroups, Rule, State};

const COEFFICIENTS: [f32; 3] = [3.4445, -4.7750, 2.0315];
const ITERATIONS: usize = 5;
const EPSILON: f32 = 1e-7;

/// Muon for matrices, AdamW for what it isn't made for.
#[derive(Debug)]
pub struct Muon {
    matrices: OnHost<Orthogonal>,
    others: AdamW,
}

impl Muon {
    /// Before the first step; `others` is for all that Muon doesn't move.
    pub fn new(momentum: f64, groups: ParameterGroups, others: AdamW) -> Muon {
        Muon { matrices: OnHost::new(Orthogonal { momentum }, groups), others }
    }
}

fn is_for_muon(parameter: &Parameter) -> bool {
    let name = &parameter.name;
    parameter.value.rows() > 1 && !name.contains("embed") && !name.contains("lm_head")
}

impl Optimizer for Muon {
    fn step(&mut self, parameters: &mut [&mut Parameter], learning_rate: f64, grad_scale: f64) -> Result<()> {
        let (mut matrices, mut others): (Vec<_>, Vec<_>) =
            parameters.iter_mut().map(|it| &mut **it).partition(|it| is_for_muon(it));
        self.matrices.step(&mut matrices, learning_rate, grad_scale)?;
        self.others.step(&mut others, learning_rate, grad_scale)
    }

    fn state(&self) -> Result<State> {
        let mut state = self.others.state()?;
        state.extend(self.matrices.state()?);
        Ok(state)
    }

    fn restore(&mut self, state: State, parameters: &[&mut Parameter]) -> Result<()> {
        let steps = state.get("step").map(ferrotune_tensor::Tensor::try_clone).transpose()?;
        let (mut ours, others): (State, State) =
            state.into_iter().partition(|(name, _)| name.starts_with(MOMENTUM));
        ours.extend(steps.map(|steps| ("step".to_string(), steps)));
        let all = || parameters.iter().map(|it| &**it);
        self.matrices.restore_those(ours, all().filter(|it| is_for_muon(it)))?;
        self.others.restore_those(others, all().filter(|it| !is_for_muon(it)))
    }
}

/// What a state calls m.
const MOMENTUM: &str = "momentum_buffer";

#[derive(Debug)]
struct Orthogonal {
    momentum: f64,
}

impl Rule for Orthogonal {
    fn kept(&self, shape: (usize, usize)) -> Vec<(&'static str, (usize, usize))> {
        vec![(MOMENTUM, shape)]
    }

    fn step(&self, mut it: Move<'_>) -> Result<()> {
        let momentum = self.momentum as f32;
        for (_, m) in it.kept {
            for (m, g) in m.values_mut::<f32>()?.iter_mut().zip(&mut it.grad) {
                *m += (1.0 - momentum) * (*g - *m);
                *g += momentum * (*m - *g);
            }
        }
        let (rows, cols) = it.shape;
        let step = orthogonal(it.grad, rows, cols);
        let rate = (it.learning_rate * 0.2 * (rows.max(cols) as f64).sqrt()) as f32;
        let decay = (1.0 - it.learning_rate * it.weight_decay) as f32;
        it.value.iter_mut().zip(&step).for_each(|(p, o)| *p = *p * decay - rate * o);
        Ok(())
    }
}

/// The nearest matrix with orthogonal rows or columns, roughly: Newton and Schulz's iteration.
fn orthogonal(mut o: Vec<f32>, rows: usize, cols: usize) -> Vec<f32> {
    let norm = o.iter().map(|it| f64::from(*it) * f64::from(*it)).sum::<f64>().sqrt() as f32;
    let norm = norm.max(EPSILON);
    o.iter_mut().for_each(|it| *it /= norm);
    let [a, b, c] = COEFFICIENTS;
    let k = rows.min(cols);
    let (mut gram, mut update) = (vec![0.0f32; k * k], vec![0.0f32; k * k]);
    for _ in 0..ITERATIONS {
        let it = Matrix::new(&o, rows, cols);
        // S is of the shorter side: o·oᵀ, or oᵀ·o.
        let (left, right) = if rows <= cols { (it, it.transposed()) } else { (it.transposed(), it) };
        product::matmul(Precision::Full, 1.0, left, right, 0.0, MatrixMut::new(&mut gram, k, k));
        update.copy_from_slice(&gram);
        let s = Matrix::new(&gram, k, k);
        product::matmul(Precision::Full, c, s, s, b, MatrixMut::new(&mut update, k, k));
        let mut next = o.clone();
        let (update, out) = (Matrix::new(&update, k, k), MatrixMut::new(&mut next, rows, cols));
        let (left, right) = if rows <= cols { (update, it) } else { (it, update) };
        product::matmul(Precision::Full, 1.0, left, right, a, out);
        o = next;
    }
    o
}
