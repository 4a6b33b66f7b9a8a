//! x = scale · E[token];  where E is trained, dE[token] += scale · dx

use std::collections::BTreeMap;

use ferrotune_tensor::{DType, Device, Element, Error, Real, Result, Tensor, Tiles, bf16, f16, for_real};
use rayon::prelude::*;

use crate::numbers::on_host;
use crate::{DenseWeight, Numbers};

/// The table of token vectors.
pub struct Embedding {
    /// (V, C), the head's too where that is tied.
    pub table: DenseWeight,
    /// What vectors are multiplied by (Gemma: √C; else 1).
    pub scale: f64,
    /// Where vectors are given, if the table stays on the host: a batch needs few of its rows.
    pub vectors_to: Option<Device>,
}

impl Embedding {
    /// (N,) tokens → (N, C) in this type.
    ///
    /// # Errors
    /// When a token is outside the vocabulary.
    pub fn forward(&self, tokens: &[u32], dtype: DType) -> Result<Tensor> {
        let (vocab_size, width) = (self.table.rows(), self.table.cols());
        if let Some((row, token)) = tokens.iter().enumerate().find(|(_, it)| **it as usize >= vocab_size) {
            let message = format!(
                "token {token} at row {row} is outside the vocabulary of {vocab_size}; does the tokenizer belong to this model?"
            );
            return Err(Error::msg(message));
        }
        if let Some(device) = &self.vectors_to {
            let table: &Tensor = &self.table.value;
            let rows = match dtype {
                DType::BF16 => rows_of::<bf16>(table, tokens),
                DType::F16 => rows_of::<f16>(table, tokens),
                _ => rows_of::<f32>(table, tokens),
            };
            return rows?.to_device(device);
        }
        let device = self.table.value.device();
        if device.gpu().is_some() {
            return self
                .look_up(&Tensor::from_vec(1, tokens.len(), tokens.to_vec())?.to_device(&device)?, dtype);
        }
        let mut x = Tensor::empty(tokens.len(), width, dtype, &device)?;
        for_real!("embedding", dtype, T => {
            let rows = x.values_mut::<T>()?.par_chunks_mut(width).zip(tokens);
            rows.for_each_init(|| vec![0.0; width], |vector, (x, token)| {
                self.table.read(*token as usize..*token as usize + 1, 0..width, vector);
                x.iter_mut().zip(vector).for_each(|(x, v)| *x = T::of(f64::from(*v) * self.scale));
            });
            Ok(())
        })?;
        Ok(x)
    }

    /// Moves the table to the host. False where it stays: it is trained, or vectors are more than its rows.
    ///
    /// # Errors
    /// When the device can't be read.
    pub fn to_host(&mut self, dtype: DType) -> Result<bool> {
        let Numbers::Frozen(table) = &mut self.table.value else { return Ok(false) };
        if table.gpu().is_none() || table.dtype() != dtype || self.scale != 1.0 {
            return Ok(false);
        }
        let device = table.device();
        *table = table.to_cpu()?;
        self.vectors_to = Some(device);
        Ok(true)
    }

    /// (1, N) tokens, which are inside the vocabulary, on a GPU → (N, C) in this type.
    ///
    /// # Errors
    /// When the table is not on their GPU.
    pub fn look_up(&self, tokens: &Tensor, dtype: DType) -> Result<Tensor> {
        let gpu = tokens.gpu().ok_or_else(|| Error::msg("the tokens are not on a GPU"))?;
        let (count, width) = (tokens.cols(), self.table.cols());
        let x = Tensor::empty(count, width, dtype, &tokens.device())?;
        let launch = gpu.kernel("embedding", "embedding", dtype)?.grid(count, 256);
        let launch = launch.tensor(&x).tensor(&self.table.value).tensor(tokens).int(count).int(width);
        // SAFETY: embedding(out, table, tokens, rows, width, scale); the tokens are rows of the table.
        unsafe { launch.float(self.scale).run() }?;
        Ok(x)
    }

    /// Adds to the gradient of the table, where it is trained.
    ///
    /// # Errors
    /// When the device can't.
    pub fn backward(&mut self, tokens: &[u32], dx: &Tensor) -> Result<()> {
        let (width, scale) = (self.table.cols(), self.scale);
        let Some(grad) = self.table.value.grad_mut() else { return Ok(()) };
        let dx = on_host(dx)?;
        // Rows of one token after another, in the order of the tokens.
        let mut rows: BTreeMap<u32, Vec<f64>> = BTreeMap::new();
        for (token, dx) in tokens.iter().zip(dx.chunks(width)) {
            let row = rows.entry(*token).or_insert_with(|| vec![0.0; width]);
            row.iter_mut().zip(dx).for_each(|(sum, dx)| *sum += scale * dx);
        }
        let device = grad.device();
        let Some(gpu) = device.gpu() else {
            return for_real!("embedding", grad.dtype(), T => {
                let grad = grad.values_mut::<T>()?;
                for (token, row) in &rows {
                    let grad = &mut grad[*token as usize * width..][..width];
                    grad.iter_mut().zip(row).for_each(|(grad, dx)| *grad += T::of(*dx));
                }
                Ok(())
            });
        };
        let count = rows.len();
        let ids = Tensor::from_vec(1, count, rows.keys().copied().collect())?.to_device(&device)?;
        let sums = rows.values().flatten().map(|it| *it as f32).collect();
        let sums = Tensor::from_vec(count, width, sums)?.to_device(&device)?;
        let mut gathered = grad.empty_like(count, width)?;
        let launch = gpu.kernel("embedding", "gather_rows", grad.dtype())?.grid(count, 256);
        let launch = launch.tensor(&gathered).tensor(grad).tensor(&ids).int(count).int(width);
        // SAFETY: gather_rows(out, x, rows, n, width); forward has seen that the tokens are rows of the table.
        unsafe { launch.run() }?;
        gathered.add_scaled(1.0, &sums)?;
        let launch = gpu.kernel("embedding", "scatter_rows", grad.dtype())?.grid(count, 256);
        let launch = launch.tensor(grad).tensor(&gathered).tensor(&ids).int(count).int(width);
        // SAFETY: scatter_rows(out, x, rows, n, width), as above; no row is there twice.
        unsafe { launch.run() }
    }
}

/// Rows of a table on the host, (tokens, C).
fn rows_of<T: Element + Copy + Default>(table: &Tensor, tokens: &[u32]) -> Result<Tensor> {
    let (width, values) = (table.cols(), table.values::<T>()?);
    let mut rows = vec![T::default(); tokens.len() * width];
    rows.par_chunks_mut(width.max(1)).zip(tokens).for_each(|(row, token)| {
        row.copy_from_slice(&values[*token as usize * width..][..width]);
    });
    Tensor::from_vec(tokens.len(), width, rows)
}
