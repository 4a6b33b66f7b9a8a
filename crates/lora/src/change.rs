//! What an adapter makes of a weight: W′ = g⊙(W + s·B·A); with DoRA g = m/‖W + s·B·A‖ for each row, else 1.

use std::ops::Range;

use ferrotune_tensor::product::matmul;
use ferrotune_tensor::{DType, Error, MatrixMut, Precision, Result, Tensor};
use rayon::prelude::*;

/// The change of one projection's weight, in f32 on the CPU.
#[derive(Debug)]
pub struct Change {
    a: Tensor,
    b: Tensor,
    scaling: f64,
    magnitude: Option<Tensor>,
}

impl Change {
    /// From A (R, input), B (output, R), s, and DoRA's m (1, output).
    ///
    /// # Errors
    /// When the shapes don't fit each other.
    pub fn new(a: Tensor, b: Tensor, scaling: f64, magnitude: Option<Tensor>) -> Result<Change> {
        Error::check_shape("B of an adapter", (b.rows(), a.rows()), b.shape())?;
        if let Some(magnitude) = &magnitude {
            Error::check_shape("the magnitudes of an adapter", (1, b.rows()), magnitude.shape())?;
        }
        let here = |it: Tensor| it.to_cpu()?.cast(DType::F32);
        Ok(Change { a: here(a)?, b: here(b)?, scaling, magnitude: magnitude.map(here).transpose()? })
    }

    /// A, B and m, whatever of them there is.
    pub fn tensors(&self) -> impl Iterator<Item = &Tensor> {
        [&self.a, &self.b].into_iter().chain(&self.magnitude)
    }

    /// Some rows of W (rows, input) become those of W′. A row needs no other one.
    ///
    /// # Errors
    /// When there are no such rows.
    pub fn merge_rows(&self, rows: Range<usize>, weight: &mut [f32]) -> Result<()> {
        let (count, input) = (rows.len(), self.a.cols());
        if rows.end > self.b.rows() || weight.len() != count * input {
            return Err(Error::msg(format!(
                "an adapter of {} x {input} is merged into rows {rows:?} of {} numbers",
                self.b.rows(),
                weight.len()
            )));
        }
        let b = self.b.matrix::<f32>()?.rows(rows.clone());
        let out = MatrixMut::new(weight, count, input);
        matmul(Precision::Full, self.scaling as f32, b, self.a.matrix()?, 1.0, out);
        let Some(magnitude) = &self.magnitude else { return Ok(()) };
        let magnitude = &magnitude.values::<f32>()?[rows];
        weight.par_chunks_mut(input.max(1)).zip(magnitude).for_each(|(row, magnitude)| {
            let norm = row.iter().map(|it| f64::from(*it) * f64::from(*it)).sum::<f64>().sqrt();
            let gain = (f64::from(*magnitude) / norm) as f32;
            row.iter_mut().for_each(|it| *it *= gain);
        });
        Ok(())
    }
}
