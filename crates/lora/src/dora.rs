//! DoRA (Liu et al. 2024): y = g⊙(x·Wᵀ + s·(x·Aᵀ)·Bᵀ),  g = m/norm,  norm = ‖W + s·B·A‖ of each output row.
//! With dropout, as PEFT has it, x̂ = drop(x):  y = (x − x̂)·Wᵀ + g⊙(x̂·Wᵀ + s·(x̂·Aᵀ)·Bᵀ)
//!   backward, norm taken as a constant, z what g multiplies:  dm += Σ dy⊙z / norm;  dz = g⊙dy, and on as in LoRA
//! norm² = ‖W‖² + 2s·b·(A·Wᵀ) + s²·b·(A·Aᵀ)·bᵀ of each row b of B: ‖W‖² once, A·Wᵀ as a pass of R rows through W after each
//! step of the optimizer. W + s·B·A is never there. The backward pass computes z again: one more product than LoRA's two.

mod columns;

use std::sync::OnceLock;

use ferrotune_nn::{Adapter, Context, Parameter, Weight};
use ferrotune_tensor::{DType, Device, Operand, Precision, Result, Tensor, multiply};
use rayon::prelude::*;

use crate::{Change, LoraAdapter};
use columns::Writes;

/// The adapter of one projection, with a magnitude for each of its outputs.
#[derive(Debug)]
pub struct DoraAdapter {
    /// A and B.
    pub lora: LoraAdapter,
    /// m (1, output)
    pub magnitude: Parameter,
    /// ‖W‖² of each row (1, output), f32.
    squares: Tensor,
    /// Of the present A, B and m; gone as soon as somebody may change them.
    scale: OnceLock<Scale>,
}

/// (1, output): on the CPU in f64, on a GPU in f32.
#[derive(Debug)]
struct Scale {
    norm: Tensor,
    gain: Tensor,
}

impl DoraAdapter {
    /// With magnitudes (1, output); all still on the CPU, but the weight.
    ///
    /// # Errors
    /// When there is no room.
    pub fn from_parts(lora: LoraAdapter, magnitude: Tensor, weight: &dyn Weight) -> Result<DoraAdapter> {
        let squares: Vec<f32> = row_squares(&weight.to_dense()?)?.into_iter().map(|it| it as f32).collect();
        let name = lora.a.name.trim_end_matches("lora_A.weight").to_string() + "lora_magnitude_vector";
        Ok(DoraAdapter {
            magnitude: Parameter::new(name, magnitude)?,
            squares: Tensor::from_vec(1, squares.len(), squares)?,
            lora,
            scale: OnceLock::new(),
        })
    }

    /// On a device, with copies for products in the type of its activations.
    ///
    /// # Errors
    /// When the device has no room.
    pub fn to_device(self, device: &Device, dtype: DType) -> Result<DoraAdapter> {
        Ok(DoraAdapter {
            lora: self.lora.to_device(device, dtype)?,
            magnitude: Parameter::new(self.magnitude.name, self.magnitude.value.to_device(device)?)?,
            squares: self.squares.to_device(device)?,
            scale: OnceLock::new(),
        })
    }

    fn scale(&self, weight: &dyn Weight) -> Result<&Scale> {
        if let Some(scale) = self.scale.get() {
            return Ok(scale);
        }
        let (a, b) = (self.lora.a.operand(), &self.lora.b.value);
        let (rank, rows) = (a.rows(), weight.rows());
        let mut through = a.empty_like(rank, rows)?;
        weight.forward(a, &mut through, 0)?;
        let value = Operand::new(&self.lora.a.value);
        let mut gram = self.lora.a.value.empty_like(rank, rank)?;
        multiply(Precision::Full, 1.0, value.clone(), value.transposed(), 0.0, &mut gram, 0..rank)?;
        let (norm, gain) =
            columns::norm(&self.magnitude.value, &self.squares, &through, b, &gram, self.lora.scaling)?;
        Ok(self.scale.get_or_init(|| Scale { norm, gain }))
    }

    /// x·Wᵀ + s·(x·Aᵀ)·Bᵀ, (N, output)
    fn product(&self, x: &Tensor, weight: &dyn Weight) -> Result<Tensor> {
        let mut z = x.empty_like(x.rows(), weight.rows())?;
        weight.forward(x, &mut z, 0)?;
        self.lora.add(x, &mut z, 0)?;
        Ok(z)
    }
}

impl Adapter for DoraAdapter {
    fn forward(
        &self,
        ctx: &Context,
        x: &Tensor,
        weight: &dyn Weight,
        y: &mut Tensor,
        at: usize,
    ) -> Result<()> {
        let gain = &self.scale(weight)?.gain;
        let Some(dropped) = self.lora.dropped(ctx, x)? else {
            weight.forward(x, y, at)?;
            self.lora.add(x, y, at)?;
            return columns::scale(y, at, None, gain, Writes::Over);
        };
        let mut rest = x.try_clone()?;
        rest.add_scaled(-1.0, &dropped)?;
        weight.forward(&rest, y, at)?;
        let z = self.product(&dropped, weight)?;
        columns::scale(y, at, Some((&z, 0)), gain, Writes::Onto)
    }

    fn backward(
        &mut self,
        ctx: &Context,
        x: &Tensor,
        weight: &dyn Weight,
        dy: &Tensor,
        at: usize,
        beta: f64,
        dx: &mut Tensor,
    ) -> Result<()> {
        let dropped = self.lora.dropped(ctx, x)?;
        let input = dropped.as_ref().unwrap_or(x);
        let mut z = self.product(input, weight)?;
        // A, B and m don't change before the gradients are used, so that the scale is the forward's.
        self.scale(weight)?;
        let Some(Scale { norm, gain }) = self.scale.get() else { return Ok(()) };
        columns::add_dots(&mut self.magnitude.grad, dy, at, &z, norm)?;
        columns::scale(&mut z, 0, Some((dy, at)), gain, Writes::Over)?;
        let dz = z;
        if dropped.is_none() {
            weight.backward(&dz, 0, beta, dx)?;
            return self.lora.add_backward(x, &dz, 0, 1.0, dx);
        }
        let (mut rest, mut through) =
            (dx.empty_like(dx.rows(), dx.cols())?, dx.empty_like(dx.rows(), dx.cols())?);
        weight.backward(dy, at, 0.0, &mut rest)?;
        weight.backward(&dz, 0, 0.0, &mut through)?;
        self.lora.add_backward(input, &dz, 0, 1.0, &mut through)?;
        through.add_scaled(-1.0, &rest)?;
        self.lora.drop_in_place(ctx, &mut through)?;
        match beta == 0.0 {
            true => dx.copy_from(&rest)?,
            false => {
                dx.scale(beta)?;
                dx.add_scaled(1.0, &rest)?;
            }
        }
        dx.add_scaled(1.0, &through)
    }

    fn parameters(&mut self) -> Vec<&mut Parameter> {
        self.scale.take();
        let mut parameters = self.lora.parameters();
        parameters.push(&mut self.magnitude);
        parameters
    }

    fn merged(&self, weight: &dyn Weight) -> Result<Tensor> {
        let mut merged = weight.to_dense()?;
        let (a, b) = (self.lora.a.value.to_cpu()?, self.lora.b.value.to_cpu()?);
        let change = Change::new(a, b, self.lora.scaling, Some(self.magnitude.value.to_cpu()?))?;
        change.merge_rows(0..merged.rows(), merged.values_mut()?)?;
        Ok(merged)
    }
}

/// The magnitudes (1, output) that an adapted weight has: with them, DoRA changes nothing at first.
///
/// # Errors
/// When there is no room.
pub fn magnitudes(lora: &LoraAdapter, weight: &dyn Weight) -> Result<Tensor> {
    let lengths = row_squares(&lora.merged(weight)?)?;
    Tensor::from_vec(1, lengths.len(), lengths.into_iter().map(|it| it.sqrt() as f32).collect())
}

/// ‖row‖² of each row of an f32 matrix on the CPU.
fn row_squares(dense: &Tensor) -> Result<Vec<f64>> {
    let rows = dense.values::<f32>()?.par_chunks(dense.cols().max(1));
    Ok(rows.map(|row| row.iter().map(|it| f64::from(*it) * f64::from(*it)).sum()).collect())
}

#[cfg(test)]
mod tests;
