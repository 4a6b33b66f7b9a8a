//! [`Nf4Weight`] in the memory of a GPU: `kernels/nf4.cu`.

use std::sync::Arc;

use ferrotune_nn::{Coded, StoredRows, Weight, backward_whole, forward_whole};
use ferrotune_tensor::{DType, Device, Error, Gpu, Precision, Result, Tensor};

use crate::nf4::{Absmax, BLOCK, GROUP, Nf4Weight, Scales};
use crate::tables::{NF4_LEVELS, dynamic_map};

/// Threads of a block of the kernels, and the sums that a mean is taken in.
const THREADS: u32 = 256;
const PARTS: usize = 256;
/// Numbers before the map in the tables.
const LEVELS: usize = NF4_LEVELS.len();

/// A frozen (output, input) matrix in 4 bits on a GPU. Each product dequantises it into memory that is
/// free again right after.
#[derive(Debug)]
pub struct Nf4GpuWeight {
    rows: usize,
    cols: usize,
    /// (1, ⌈rows·cols / 2⌉)
    codes: Tensor,
    scales: GpuScales,
    /// (1, 16 + 256): the levels, then the map of nested scales.
    tables: Tensor,
    /// The original's type, which dequantised numbers are rounded to.
    dtype: DType,
}

/// [`Absmax`] in tensors of one row.
#[derive(Debug)]
enum GpuScales {
    Plain(Tensor),
    Nested { codes: Tensor, nested_absmax: Tensor, offset: Tensor },
}

impl Nf4GpuWeight {
    /// Quantises a matrix that is on a GPU, with the bits that [`Nf4Weight::quantize`] gives, but for
    /// the last bit of the offset.
    ///
    /// # Errors
    /// When the matrix holds NaN or infinity, isn't f32, f16 or bf16, or there is no room.
    pub fn quantize(value: &Tensor, scales: Scales) -> Result<Nf4GpuWeight> {
        let device = value.device();
        let gpu = device.gpu().ok_or_else(|| Error::msg("the weight to quantise is not on a GPU"))?;
        let (rows, cols) = value.shape();
        let blocks = value.len().div_ceil(BLOCK);
        let empty = |len: usize, dtype: DType| Tensor::empty(1, len, dtype, &device);
        let (codes, absmax) = (empty(value.len().div_ceil(2), DType::U8)?, empty(blocks, DType::F32)?);
        let launch =
            gpu.kernel("nf4", "nf4_quantize", value.dtype())?.grid(blocks.div_ceil(32).min(65535), THREADS);
        // SAFETY: nf4_quantize(codes, absmax, x, n)
        unsafe { launch.tensor(&codes).tensor(&absmax).tensor(value).long(value.len()).run() }?;

        let (partials, offset) = (Tensor::empty(1, PARTS, DType::F64, &device)?, empty(1, DType::F32)?);
        let launch = gpu.plain_kernel("nf4", "nf4_mean")?.grid(PARTS, THREADS).tensor(&partials);
        // SAFETY: nf4_mean(partials, absmax, n); one partial sum for each block of the grid
        unsafe { launch.tensor(&absmax).int(blocks).run() }?;
        let launch =
            gpu.plain_kernel("nf4", "nf4_offset")?.grid(1, THREADS).tensor(&offset).tensor(&partials);
        // SAFETY: nf4_offset(offset, partials, parts, n)
        unsafe { launch.int(PARTS).int(blocks).run() }?;
        if blocks > 0 && !offset.to_f32()?[0].is_finite() {
            let bad = absmax.to_f32()?.iter().position(|it| !it.is_finite()).unwrap_or(0);
            return Err(Error::msg(format!(
                "weight of {rows} rows and {cols} columns: row {} holds NaN or infinity; the file is damaged or was saved by a failed run",
                bad * BLOCK / cols
            )));
        }
        let tables = tables_on(&device)?;
        let scales = match scales {
            Scales::Plain => GpuScales::Plain(absmax),
            Scales::Nested => {
                let groups = blocks.div_ceil(GROUP);
                let (codes, nested_absmax) = (empty(blocks, DType::U8)?, empty(groups, DType::F32)?);
                let launch = gpu.plain_kernel("nf4", "nf4_nest")?.grid(groups, THREADS).tensor(&codes);
                let launch = launch.tensor(&nested_absmax).tensor(&absmax).tensor(&offset);
                let launch = launch.tensor_at(&tables, LEVELS);
                // SAFETY: nf4_nest(codes, nested_absmax, absmax, offset, map, blocks)
                unsafe { launch.int(blocks).run() }?;
                GpuScales::Nested { codes, nested_absmax, offset }
            }
        };
        Ok(Nf4GpuWeight { rows, cols, codes, scales, tables, dtype: value.dtype() })
    }

    /// The same bits on a GPU.
    ///
    /// # Errors
    /// When there is no room.
    pub fn from_cpu(weight: Nf4Weight, gpu: &Arc<Gpu>) -> Result<Nf4GpuWeight> {
        let device = Device::Cuda(gpu.clone());
        let bytes = |bytes: Vec<u8>| Tensor::from_vec(1, bytes.len(), bytes)?.to_device(&device);
        let floats = |floats: Vec<f32>| Tensor::from_vec(1, floats.len(), floats)?.to_device(&device);
        let (rows, cols, dtype) = (weight.rows(), weight.cols(), weight.dtype);
        let scales = match weight.absmax {
            Absmax::Plain(values) => GpuScales::Plain(floats(values)?),
            Absmax::Nested { codes, nested_absmax, offset } => GpuScales::Nested {
                codes: bytes(codes)?,
                nested_absmax: floats(nested_absmax)?,
                offset: floats(vec![offset])?,
            },
        };
        let (codes, tables) = (bytes(weight.codes)?, tables_on(&device)?);
        Ok(Nf4GpuWeight { rows, cols, codes, scales, tables, dtype })
    }

    /// The same bits on the CPU.
    ///
    /// # Errors
    /// When the device can't be read.
    pub fn to_cpu(&self) -> Result<Nf4Weight> {
        let bytes = |tensor: &Tensor| -> Result<Vec<u8>> { Ok(tensor.to_cpu()?.values::<u8>()?.to_vec()) };
        let absmax = match &self.scales {
            GpuScales::Plain(values) => Absmax::Plain(values.to_f32()?),
            GpuScales::Nested { codes, nested_absmax, offset } => Absmax::Nested {
                codes: bytes(codes)?,
                nested_absmax: nested_absmax.to_f32()?,
                offset: offset.to_f32()?[0],
            },
        };
        Nf4Weight::from_parts(
            (self.rows, self.cols),
            bytes(&self.codes)?,
            absmax,
            self.dtype,
            Precision::Full,
        )
    }

    /// The weight in plain numbers of this type.
    ///
    /// # Errors
    /// When there is no room.
    pub fn dequantize(&self, dtype: DType) -> Result<Tensor> {
        let mut out = Tensor::empty(self.rows, self.cols, dtype, &self.codes.device())?;
        self.write_dense(&mut out, 0)?;
        Ok(out)
    }
}

impl Weight for Nf4GpuWeight {
    fn rows(&self) -> usize {
        self.rows
    }

    fn cols(&self) -> usize {
        self.cols
    }

    fn bytes(&self) -> usize {
        let scales = match &self.scales {
            GpuScales::Plain(absmax) => absmax.bytes(),
            GpuScales::Nested { codes, nested_absmax, offset } => {
                codes.bytes() + nested_absmax.bytes() + offset.bytes()
            }
        };
        self.codes.bytes() + scales
    }

    fn forward(&self, x: &Tensor, y: &mut Tensor, at: usize) -> Result<()> {
        forward_whole(&self.dequantize(x.dtype())?, Precision::Full, x, y, at)
    }

    fn backward(&self, dy: &Tensor, at: usize, beta: f64, dx: &mut Tensor) -> Result<()> {
        backward_whole(&self.dequantize(dy.dtype())?, Precision::Full, dy, at, beta, dx)
    }

    fn to_dense(&self) -> Result<Tensor> {
        self.to_cpu()?.to_dense()
    }

    fn write_dense(&self, out: &mut Tensor, row: usize) -> Result<()> {
        let gpu = self.codes.gpu().ok_or_else(|| Error::msg("the weight is not on a GPU"))?;
        if row + self.rows > out.rows() || self.cols > out.cols() {
            return Error::check_shape("room for a weight", (row + self.rows, self.cols), out.shape());
        }
        let n = self.rows * self.cols;
        let launch = gpu.kernel("nf4", "nf4_dequantize", out.dtype())?.grid(n.div_ceil(8192), THREADS);
        let launch = launch.tensor_at(out, row * out.cols()).tensor(&self.tables).tensor(&self.codes);
        let launch = match &self.scales {
            GpuScales::Plain(absmax) => launch.tensor(absmax).word(0).word(0),
            GpuScales::Nested { codes, nested_absmax, offset } => {
                launch.tensor(codes).tensor(nested_absmax).tensor(offset)
            }
        };
        let launch = launch.long(n).int(self.cols).int(out.cols()).int(Coded::round_to(self.dtype));
        // SAFETY: nf4_dequantize(out, tables, codes, absmax, nested_absmax, offset, n, cols, stride, round_to);
        // out has the room.
        unsafe { launch.run() }
    }

    fn stored_rows(&self) -> Option<StoredRows<'_>> {
        let (absmax, nested) = match &self.scales {
            GpuScales::Plain(absmax) => (absmax, None),
            GpuScales::Nested { codes, nested_absmax, offset } => (codes, Some((nested_absmax, offset))),
        };
        Some(StoredRows::Coded(Coded {
            codes: &self.codes,
            tables: &self.tables,
            absmax,
            nested,
            dtype: self.dtype,
        }))
    }
}

fn tables_on(device: &Device) -> Result<Tensor> {
    let tables = [&NF4_LEVELS[..], dynamic_map()].concat();
    Tensor::from_vec(1, tables.len(), tables)?.to_device(device)
}
