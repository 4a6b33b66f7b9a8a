//! x = scale · E[token]

use ferrotune_tensor::{DType, Error, Real, Result, Tensor, Tiles, for_real};
use rayon::prelude::*;

use crate::DenseWeight;

/// The table of token vectors, frozen.
pub struct Embedding {
    /// (V, C), shared with the head where that is tied.
    pub table: std::sync::Arc<DenseWeight>,
    /// What vectors are multiplied by (Gemma: √C; else 1).
    pub scale: f64,
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
}
