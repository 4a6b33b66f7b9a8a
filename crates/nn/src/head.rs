//! Hidden states to log-probabilities of target tokens, and back.
//!   z = scale·h·Wᵀ (capped: cap·tanh(z/cap)),  log p = z[target] − log Σ exp(z)
//!   ∂/∂z = dlogp·(1[target] − p)
//! Logits exist for a chunk of tokens at a time; rows without weight are never computed.

use ferrotune_tensor::{DType, Error, Gpu, Real, Result, Tensor, for_real};
use rayon::prelude::*;

use crate::lanes::{exp, max_of, sum_of, tanh, vectorised};
use crate::row::{plain_row, takes_plain};
use crate::{Norm, Weight};

/// Bytes of logits that exist at once.
const CHUNK_BYTES: usize = 48 << 20;
/// The same on a GPU, where a chunk has to fill more cores.
const GPU_CHUNK_BYTES: usize = 256 << 20;
/// Threads of a block of `kernels/cross_entropy.cu`.
const LOSS_BLOCK: u32 = 1024;

/// The output projection; its weight (V, C) comes with each call, being the embedding's where they are tied.
#[derive(Clone, Copy, Debug)]
pub struct Head {
    /// What logits are multiplied by.
    pub scale: f64,
    /// Logits are squeezed to ± this.
    pub softcap: Option<f64>,
}

/// What one pass through the head gives.
#[derive(Debug)]
pub struct HeadPass {
    /// log p(target) of each row; 0 where a row has no weight.
    pub logp: Vec<f64>,
    /// The target was the most likely token (false where a row has no weight).
    pub correct: Vec<bool>,
    /// (N, C): the gradient of the hidden states.
    pub dhidden: Option<Tensor>,
}

/// The weight, and what is wanted besides the log-probabilities.
enum Wanted<'a> {
    /// Nothing.
    LogProbs(&'a dyn Weight),
    /// The hidden states' gradient, and the weight's own where it is trained.
    Gradient(&'a mut dyn Weight),
}

impl Wanted<'_> {
    fn weight(&self) -> &dyn Weight {
        match self {
            Wanted::LogProbs(weight) => *weight,
            Wanted::Gradient(weight) => *weight,
        }
    }

    /// hidden = dz·W, and dW += dzᵀ·hidden, where gradients are wanted.
    fn backward(&mut self, dz: &Tensor, hidden: &mut Tensor) -> Result<()> {
        let Wanted::Gradient(weight) = self else { return Ok(()) };
        weight.accumulate_grad(hidden, dz, 0)?;
        weight.backward(dz, 0, 0.0, hidden)
    }
}

impl Head {
    /// (N, C) → (N, V)
    ///
    /// # Errors
    /// When shapes don't fit.
    pub fn logits(&self, weight: &dyn Weight, hidden: &Tensor) -> Result<Tensor> {
        let mut logits = hidden.empty_like(hidden.rows(), weight.rows())?;
        weight.forward(hidden, &mut logits, 0)?;
        self.bend(logits)
    }

    /// Whether [`Head::row`] takes this weight and such a hidden state.
    pub fn takes_row(&self, weight: &dyn Weight, like: &Tensor) -> bool {
        takes_plain(weight, like)
    }

    /// norm(x) of a row (1, C) → (1, V) on a GPU.
    ///
    /// # Errors
    /// When [`Head::takes_row`] says no.
    pub fn row(&self, weight: &dyn Weight, x: &Tensor, norm: &Norm) -> Result<Tensor> {
        self.bend(plain_row(weight, x, Some(norm))?)
    }

    fn bend(&self, mut logits: Tensor) -> Result<Tensor> {
        let width = logits.cols();
        if let Some(gpu) = logits.gpu() {
            if self.scale != 1.0 || self.softcap.is_some() {
                let launch = gpu.kernel("cross_entropy", "bend", logits.dtype())?.grid(4096, 256);
                let launch = launch.tensor(&logits).long(logits.len()).float(self.scale);
                // SAFETY: bend(logits, n, scale, softcap)
                unsafe { launch.float(self.softcap.unwrap_or(0.0)).run() }?;
            }
            return Ok(logits);
        }
        for_real!("head", logits.dtype(), T => {
            let rows = logits.values_mut::<T>()?.par_chunks_mut(width);
            rows.for_each(|row| bend::<T>(self.scale, self.softcap, row));
            Ok(())
        })?;
        Ok(logits)
    }

    /// log p(target) of every row with a weight other than 0.
    ///
    /// # Errors
    /// When shapes don't fit or a target is outside the vocabulary.
    pub fn log_probs(
        &self,
        weight: &dyn Weight,
        hidden: &Tensor,
        targets: &[u32],
        weights: &[f64],
    ) -> Result<HeadPass> {
        self.pass(hidden, targets, weights, Wanted::LogProbs(weight))
    }

    /// Log-probabilities and the hidden states' gradient, given how much each row's log-probability
    /// moves the loss (`dlogp`, known ahead for next-token losses), in one pass over the weight.
    ///
    /// # Errors
    /// When shapes don't fit or a target is outside the vocabulary.
    pub fn with_gradient(
        &self,
        weight: &mut dyn Weight,
        hidden: &Tensor,
        targets: &[u32],
        dlogp: &[f64],
    ) -> Result<HeadPass> {
        self.pass(hidden, targets, dlogp, Wanted::Gradient(weight))
    }

    fn pass(
        &self,
        hidden: &Tensor,
        targets: &[u32],
        dlogp: &[f64],
        mut wanted: Wanted<'_>,
    ) -> Result<HeadPass> {
        let (n, width, vocab_size) = (hidden.rows(), hidden.cols(), wanted.weight().rows());
        if targets.len() != n || dlogp.len() != n {
            let message =
                format!("head: {n} rows, but {} targets and {} weights", targets.len(), dlogp.len());
            return Err(Error::msg(message));
        }
        let rows: Vec<usize> = (0..n).filter(|row| dlogp[*row] != 0.0).collect();
        if let Some(row) = rows.iter().find(|row| targets[**row] as usize >= vocab_size) {
            let message = format!("target {} is outside the vocabulary of {vocab_size}", targets[*row]);
            return Err(Error::msg(message));
        }
        if let Some(gpu) = hidden.gpu() {
            return self.pass_on_gpu(gpu, hidden, targets, dlogp, &rows, wanted);
        }
        let (mut logp, mut correct) = (vec![0.0; n], vec![false; n]);
        let gradient = matches!(wanted, Wanted::Gradient(_));
        let mut dhidden = gradient.then(|| hidden.zeros_like(n, width)).transpose()?;
        let chunk = (CHUNK_BYTES / (vocab_size * hidden.dtype().size_in_bytes())).max(16);
        for_real!("head", hidden.dtype(), T => {
            for rows in rows.chunks(chunk) {
                let gathered = gather::<T>(hidden, rows)?;
                let mut logits = self.logits(wanted.weight(), &gathered)?;
                let by_row = logits.values_mut::<T>()?.par_chunks_mut(vocab_size).zip(rows);
                let facts: Vec<(f64, bool)> = by_row
                    .map(|(z, row)| {
                        let target = targets[*row] as usize;
                        let (lse, best) = log_sum_exp::<T>(z);
                        let logp = (z[target] - lse).wide();
                        let correct = z[target] >= best;
                        if gradient {
                            let d = T::of(dlogp[*row]);
                            logits_backward::<T>(self.scale, self.softcap, lse, d, target, z);
                        }
                        (logp, correct)
                    })
                    .collect();
                for (row, (lp, hit)) in rows.iter().zip(facts) {
                    (logp[*row], correct[*row]) = (lp, hit);
                }
                if let Some(dhidden) = &mut dhidden {
                    let mut chunk_grad = gathered;
                    wanted.backward(&logits, &mut chunk_grad)?;
                    let all = dhidden.values_mut::<T>()?;
                    for (row, grad) in rows.iter().zip(chunk_grad.values::<T>()?.chunks(width)) {
                        all[row * width..(row + 1) * width].copy_from_slice(grad);
                    }
                }
            }
            Ok(())
        })?;
        Ok(HeadPass { logp, correct, dhidden })
    }
}

impl Head {
    /// The CUDA arm: `kernels/cross_entropy.cu`. One read-back at the end.
    fn pass_on_gpu(
        &self,
        gpu: &Gpu,
        hidden: &Tensor,
        targets: &[u32],
        dlogp: &[f64],
        rows: &[usize],
        mut wanted: Wanted<'_>,
    ) -> Result<HeadPass> {
        let (n, width, vocab_size, device) =
            (hidden.rows(), hidden.cols(), wanted.weight().rows(), hidden.device());
        let (count, dtype) = (rows.len(), hidden.dtype());
        let upload = |words: Vec<u32>| Tensor::from_vec(1, count, words)?.to_device(&device);
        let row_ids = upload(rows.iter().map(|it| *it as u32).collect())?;
        let target_ids = upload(rows.iter().map(|it| targets[*it]).collect())?;
        let weights = rows.iter().map(|it| dlogp[*it] as f32).collect();
        let weights = Tensor::from_vec(1, count, weights)?.to_device(&device)?;
        let logp_out = Tensor::empty(1, count, DType::F32, &device)?;
        let correct_out = Tensor::empty(1, count, DType::U32, &device)?;
        let gradient = matches!(wanted, Wanted::Gradient(_));
        let dhidden = if gradient { Some(hidden.zeros_like(n, width)?) } else { None };
        let chunk = (GPU_CHUNK_BYTES / (vocab_size * dtype.size_in_bytes())).max(64);
        for start in (0..count).step_by(chunk) {
            let len = chunk.min(count - start);
            let mut gathered = hidden.empty_like(len, width)?;
            let launch = gpu.kernel("embedding", "gather_rows", dtype)?.grid(len, 256);
            let launch = launch.tensor(&gathered).tensor(hidden).tensor_at(&row_ids, start);
            // SAFETY: gather_rows(out, x, rows, n, width); the rows are those of `hidden`.
            unsafe { launch.int(len).int(width).run() }?;
            let mut logits = hidden.empty_like(len, vocab_size)?;
            wanted.weight().forward(&gathered, &mut logits, 0)?;
            let launch = gpu.kernel("cross_entropy", "cross_entropy", dtype)?.grid(len, LOSS_BLOCK);
            let launch = launch.tensor(&logits).tensor_at(&target_ids, start).tensor_at(&weights, start);
            let launch = launch.tensor_at(&logp_out, start).tensor_at(&correct_out, start).int(len);
            let launch = launch.int(vocab_size).float(self.scale).float(self.softcap.unwrap_or(0.0));
            // SAFETY: cross_entropy(logits, targets, dlogp, logp, correct, n, vocab, scale, softcap, gradient);
            // targets are within the vocabulary.
            unsafe { launch.flag(gradient).run() }?;
            if let Some(dhidden) = &dhidden {
                wanted.backward(&logits, &mut gathered)?;
                let launch = gpu.kernel("embedding", "scatter_rows", dtype)?.grid(len, 256);
                let launch = launch.tensor(dhidden).tensor(&gathered).tensor_at(&row_ids, start);
                // SAFETY: scatter_rows(out, x, rows, n, width); the rows are those of `dhidden`.
                unsafe { launch.int(len).int(width).run() }?;
            }
        }
        let (mut logp, mut correct) = (vec![0.0; n], vec![false; n]);
        let (logp_out, correct_out) = (logp_out.to_cpu()?, correct_out.to_cpu()?);
        let facts = logp_out.values::<f32>()?.iter().zip(correct_out.values::<u32>()?);
        for (row, (lp, hit)) in rows.iter().zip(facts) {
            (logp[*row], correct[*row]) = (f64::from(*lp), *hit != 0);
        }
        Ok(HeadPass { logp, correct, dhidden })
    }
}

/// Some rows, side by side.
pub(crate) fn gather<T: Real>(hidden: &Tensor, rows: &[usize]) -> Result<Tensor> {
    let width = hidden.cols();
    let mut out = hidden.empty_like(rows.len(), width)?;
    let values = hidden.values::<T>()?;
    for (out, row) in out.values_mut::<T>()?.chunks_mut(width).zip(rows) {
        out.copy_from_slice(&values[row * width..(row + 1) * width]);
    }
    Ok(out)
}

vectorised! {
    fn bend<T>(scale: f64, softcap: Option<f64>, z: &mut [T]) {
        if scale != 1.0 {
            for it in &mut *z {
                *it *= T::of(scale);
            }
        }
        if let Some(cap) = softcap {
            let cap = T::of(cap);
            for it in z {
                *it = cap * tanh(*it / cap);
            }
        }
    }
}

vectorised! {
    /// log Σ exp(z), and the largest z.
    fn log_sum_exp<T>(z: &[T]) -> (T, T) {
        let max = max_of(z);
        (max + sum_of(z, |it| exp(it - max)).ln(), max)
    }
}

vectorised! {
    /// Logits to the gradient of the raw products, in place.
    fn logits_backward<T>(scale: f64, softcap: Option<f64>, lse: T, dlogp: T, target: usize, z: &mut [T]) {
        let (scale, bent) = (T::of(scale), z[target]);
        match softcap {
            None => {
                for it in &mut *z {
                    *it = -dlogp * exp(*it - lse) * scale;
                }
                z[target] += dlogp * scale;
            }
            Some(cap) => {
                let cap = T::of(cap);
                let slope = |it: T| (T::one() - (it / cap) * (it / cap)) * scale;
                for it in &mut *z {
                    *it = -dlogp * exp(*it - lse) * slope(*it);
                }
                z[target] += dlogp * slope(bent);
            }
        }
    }
}
