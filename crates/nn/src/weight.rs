//! The matrix of a linear layer, in whatever format it is stored.

use std::ops::Range;

use ferrotune_tensor::{
    DType, Error, Operand, Precision, Result, Tensor, Tiles, bf16, f16, for_real, multiply, product,
};
use half::slice::HalfFloatSliceExt;

use crate::{Numbers, Parameter, StoredRows};

/// A matrix W of (output, input) features.
pub trait Weight: Send + Sync {
    /// Output features.
    fn rows(&self) -> usize;
    /// Input features.
    fn cols(&self) -> usize;
    /// Bytes held.
    fn bytes(&self) -> usize;

    /// `y[:, at..at + rows] = x·Wᵀ`
    ///
    /// # Errors
    /// When shapes or types don't fit.
    fn forward(&self, x: &Tensor, y: &mut Tensor, at: usize) -> Result<()>;

    /// `dx = dy[:, at..at + rows]·W + beta·dx`
    ///
    /// # Errors
    /// When shapes or types don't fit.
    fn backward(&self, dy: &Tensor, at: usize, beta: f64, dx: &mut Tensor) -> Result<()>;

    /// Makes W trained, under this name.
    ///
    /// # Errors
    /// When its numbers are kept in a form that can't be, or the device has no room.
    fn train(&mut self, name: &str) -> Result<()> {
        Err(Error::msg(format!("`{name}` can't be trained: its numbers are quantised")))
    }

    /// Adds `dy[:, at..at + rows]ᵀ·x[:, 0..cols]` to W's own gradient; nothing unless W is trained.
    ///
    /// # Errors
    /// When shapes or types don't fit.
    fn accumulate_grad(&mut self, _x: &Tensor, _dy: &Tensor, _at: usize) -> Result<()> {
        Ok(())
    }

    /// W's own trained tensor, if it is trained.
    fn parameters(&mut self) -> Vec<&mut Parameter> {
        Vec::new()
    }

    /// W as f32 numbers (output, input), on the CPU.
    ///
    /// # Errors
    /// When there is no room.
    fn to_dense(&self) -> Result<Tensor>;

    /// `out[row..row + rows, 0..cols] = W` in out's type, on a GPU.
    ///
    /// # Errors
    /// When out has no such room, or W is not on its device.
    fn write_dense(&self, _out: &mut Tensor, _row: usize) -> Result<()> {
        Err(Error::msg("this kind of weight is not built for GPUs"))
    }

    /// W as kernels that multiply a single row read it; none where there is none for its form.
    fn stored_rows(&self) -> Option<StoredRows<'_>> {
        None
    }
}

/// A weight stored as plain numbers: f32, bf16 or f16.
pub struct DenseWeight {
    /// (output, input)
    pub value: Numbers,
    /// How exactly its products are computed.
    pub precision: Precision,
}

impl DenseWeight {
    /// Products with such activations read W as it is; others in pieces.
    fn is_operand_for(&self, x: &Tensor) -> bool {
        self.value.gpu().is_some() || self.value.dtype() == x.dtype()
    }
}

impl Tiles for DenseWeight {
    fn rows(&self) -> usize {
        self.value.rows()
    }

    fn cols(&self) -> usize {
        self.value.cols()
    }

    fn read(&self, rows: Range<usize>, cols: Range<usize>, out: &mut [f32]) {
        let width = self.value.cols();
        for (row, out) in rows.zip(out.chunks_mut(cols.len())) {
            let piece = row * width + cols.start..row * width + cols.end;
            if let Ok(values) = self.value.values::<f32>() {
                out.copy_from_slice(&values[piece]);
            } else if let Ok(values) = self.value.values::<bf16>() {
                // A bf16 is the upper half of an f32; written so, the loop vectorises.
                let widen = |it: &bf16| f32::from_bits(u32::from(it.to_bits()) << 16);
                out.iter_mut().zip(&values[piece]).for_each(|(out, it)| *out = widen(it));
            } else if let Ok(values) = self.value.values::<f16>() {
                values[piece].convert_to_f32_slice(out);
            }
        }
    }

    fn as_bf16(&self) -> Option<&[bf16]> {
        self.value.values().ok()
    }
}

impl Weight for DenseWeight {
    fn rows(&self) -> usize {
        self.value.rows()
    }

    fn cols(&self) -> usize {
        self.value.cols()
    }

    fn bytes(&self) -> usize {
        self.value.bytes()
    }

    fn forward(&self, x: &Tensor, y: &mut Tensor, at: usize) -> Result<()> {
        if self.is_operand_for(x) {
            return forward_whole(&self.value, self.precision, x, y, at);
        }
        forward_tiles(self, self.precision, x, y, at)
    }

    fn backward(&self, dy: &Tensor, at: usize, beta: f64, dx: &mut Tensor) -> Result<()> {
        if self.is_operand_for(dy) {
            return backward_whole(&self.value, self.precision, dy, at, beta, dx);
        }
        backward_tiles(self, self.precision, dy, at, beta, dx)
    }

    fn train(&mut self, name: &str) -> Result<()> {
        self.value.train(name)
    }

    fn accumulate_grad(&mut self, x: &Tensor, dy: &Tensor, at: usize) -> Result<()> {
        let (rows, cols, precision) = (self.value.rows(), self.value.cols(), self.precision);
        let Some(grad) = self.value.grad_mut() else { return Ok(()) };
        let (dy, x) = (Operand::columns(dy, at..at + rows).transposed(), Operand::columns(x, 0..cols));
        multiply(precision, 1.0, dy, x, 1.0, grad, 0..cols)
    }

    fn parameters(&mut self) -> Vec<&mut Parameter> {
        self.value.parameter().into_iter().collect()
    }

    fn to_dense(&self) -> Result<Tensor> {
        self.value.to_cpu()?.cast(DType::F32)
    }

    fn write_dense(&self, out: &mut Tensor, row: usize) -> Result<()> {
        out.write_block((row, 0), &self.value, (0..self.value.rows(), 0..self.value.cols()))
    }

    fn stored_rows(&self) -> Option<StoredRows<'_>> {
        Some(StoredRows::Plain(&self.value))
    }
}

/// `y[:, at..at + rows] = x·Wᵀ` for a weight that is read in pieces.
///
/// # Errors
/// When shapes or types don't fit.
pub fn forward_tiles(
    w: &dyn Tiles,
    precision: Precision,
    x: &Tensor,
    y: &mut Tensor,
    at: usize,
) -> Result<()> {
    Error::check_shape("input of a linear layer", (x.rows(), w.cols()), x.shape())?;
    let part = at..at + w.rows();
    if y.rows() != x.rows() || part.end > y.cols() {
        return Error::check_shape("output of a linear layer", (x.rows(), part.end), y.shape());
    }
    if x.dtype() == DType::F32 {
        product::matmul_tiles(precision, 1.0, x.matrix()?, w, true, 0.0, y.matrix_mut()?.columns(part));
        return Ok(());
    }
    for_real!("linear", x.dtype(), T => {
        let dense = widen(w).cast(x.dtype())?;
        let w = dense.matrix::<T>()?.transposed();
        product::matmul(precision, 1.0, x.matrix::<T>()?, w, 0.0, y.matrix_mut()?.columns(part));
        Ok(())
    })
}

/// `dx = dy[:, at..at + rows]·W + beta·dx` for a weight that is read in pieces.
///
/// # Errors
/// When shapes or types don't fit.
pub fn backward_tiles(
    w: &dyn Tiles,
    precision: Precision,
    dy: &Tensor,
    at: usize,
    beta: f64,
    dx: &mut Tensor,
) -> Result<()> {
    Error::check_shape("input gradient of a linear layer", (dy.rows(), w.cols()), dx.shape())?;
    let part = at..at + w.rows();
    if part.end > dy.cols() {
        return Error::check_shape("output gradient of a linear layer", (dx.rows(), part.end), dy.shape());
    }
    if dy.dtype() == DType::F32 {
        let dy = dy.matrix()?.columns(part);
        product::matmul_tiles(precision, 1.0, dy, w, false, beta as f32, dx.matrix_mut()?);
        return Ok(());
    }
    for_real!("linear", dy.dtype(), T => {
        let dense = widen(w).cast(dy.dtype())?;
        let dy = dy.matrix::<T>()?.columns(part);
        product::matmul(precision, 1.0, dy, dense.matrix::<T>()?, beta as T, dx.matrix_mut()?);
        Ok(())
    })
}

/// `y[:, at..at + rows] = x·Wᵀ` for a weight that is there as it is multiplied.
///
/// # Errors
/// When shapes or types don't fit.
pub fn forward_whole(w: &Tensor, precision: Precision, x: &Tensor, y: &mut Tensor, at: usize) -> Result<()> {
    let w_t = Operand::new(w).transposed();
    multiply(precision, 1.0, Operand::new(x), w_t, 0.0, y, at..at + w.rows())
}

/// `dx = dy[:, at..at + rows]·W + beta·dx` for a weight that is there as it is multiplied.
///
/// # Errors
/// When shapes or types don't fit.
pub fn backward_whole(
    w: &Tensor,
    precision: Precision,
    dy: &Tensor,
    at: usize,
    beta: f64,
    dx: &mut Tensor,
) -> Result<()> {
    let (dy, columns) = (Operand::columns(dy, at..at + w.rows()), 0..dx.cols());
    multiply(precision, 1.0, dy, Operand::new(w), beta, dx, columns)
}

/// All of a weight as f32, for f64 gradient checks and merging.
pub fn widen(w: &dyn Tiles) -> Tensor {
    let mut values = vec![0.0; w.rows() * w.cols()];
    w.read(0..w.rows(), 0..w.cols(), &mut values);
    Tensor::from_vec(w.rows(), w.cols(), values).expect("as many numbers as rows times columns")
}
