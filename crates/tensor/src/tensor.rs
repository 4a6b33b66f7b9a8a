use std::ops::Range;
use std::sync::Arc;

use candle_core::{CpuStorage, DType};
use half::{bf16, f16};
use num_traits::{Float, NumAssign};
use rayon::prelude::*;

use crate::cuda::{Buffer, Gpu, PinnedBuffer, suffix};
use crate::product::{Matrix, MatrixMut};
use crate::{Device, Error, Result, pool};

/// A contiguous matrix of numbers, row after row, on one device.
#[derive(Debug)]
pub struct Tensor {
    rows: usize,
    cols: usize,
    storage: Storage,
}

/// Where the numbers are.
#[derive(Debug)]
enum Storage {
    Cpu {
        values: CpuStorage,
        /// The memory came from the pool and goes back there.
        pooled: bool,
    },
    Cuda {
        buffer: Buffer,
        dtype: DType,
    },
    /// In the host's page-locked memory until they are wanted on the card again.
    Offloaded {
        buffer: PinnedBuffer,
        dtype: DType,
    },
}

impl Drop for Tensor {
    fn drop(&mut self) {
        if let Storage::Cpu { values: CpuStorage::F32(values), pooled: true } = &mut self.storage {
            pool::give_back(std::mem::take(values));
        }
    }
}

/// A number type that a tensor can hold.
pub trait Element: Copy + Send + Sync + Default + std::fmt::Debug + 'static {
    /// Its name at run time.
    const DTYPE: DType;
    /// The numbers, when the storage holds this type.
    fn slice(storage: &CpuStorage) -> Option<&[Self]>;
    /// The same, to write to.
    fn slice_mut(storage: &mut CpuStorage) -> Option<&mut [Self]>;
    /// Takes the numbers over.
    fn storage(values: Vec<Self>) -> CpuStorage;
}

macro_rules! element {
    ($type:ty, $variant:ident) => {
        impl Element for $type {
            const DTYPE: DType = DType::$variant;
            fn slice(storage: &CpuStorage) -> Option<&[Self]> {
                match storage {
                    CpuStorage::$variant(values) => Some(values),
                    _ => None,
                }
            }
            fn slice_mut(storage: &mut CpuStorage) -> Option<&mut [Self]> {
                match storage {
                    CpuStorage::$variant(values) => Some(values),
                    _ => None,
                }
            }
            fn storage(values: Vec<Self>) -> CpuStorage {
                CpuStorage::$variant(values)
            }
        }
    };
}
element!(u8, U8);
element!(u32, U32);
element!(bf16, BF16);
element!(f16, F16);
element!(f32, F32);
element!(f64, F64);

/// What layers compute with on the CPU: f32, and f64 where gradients are checked.
pub trait Real: Element + Float + NumAssign + std::iter::Sum {
    /// The nearest number of this type.
    fn of(value: f64) -> Self;
    /// The same number in f64.
    fn wide(self) -> f64;
}

impl Real for f32 {
    #[inline(always)]
    fn of(value: f64) -> f32 {
        value as f32
    }
    #[inline(always)]
    fn wide(self) -> f64 {
        f64::from(self)
    }
}

impl Real for f64 {
    #[inline(always)]
    fn of(value: f64) -> f64 {
        value
    }
    #[inline(always)]
    fn wide(self) -> f64 {
        self
    }
}

/// Runs the body with `$real` being f32 or f64, as the data type says; another is an error.
#[macro_export]
macro_rules! for_real {
    ($what:expr, $dtype:expr, $real:ident => $body:expr) => {
        match $dtype {
            $crate::DType::F32 => {
                type $real = f32;
                $body
            }
            $crate::DType::F64 => {
                type $real = f64;
                $body
            }
            got => Err($crate::Error::DType { what: $what.to_string(), expected: "f32 or f64", got }),
        }
    };
}

impl Tensor {
    /// All zeros.
    ///
    /// # Errors
    /// When the device has no room or the type can't be held.
    pub fn zeros(rows: usize, cols: usize, dtype: DType, device: &Device) -> Result<Tensor> {
        let n = rows * cols;
        let values = match (device, dtype) {
            (Device::Cuda(_), _) => {
                let mut tensor = Tensor::empty(rows, cols, dtype, device)?;
                tensor.set_zero()?;
                return Ok(tensor);
            }
            (Device::Cpu, DType::U8) => CpuStorage::U8(vec![0; n]),
            (Device::Cpu, DType::U32) => CpuStorage::U32(vec![0; n]),
            (Device::Cpu, DType::BF16) => CpuStorage::BF16(vec![bf16::ZERO; n]),
            (Device::Cpu, DType::F16) => CpuStorage::F16(vec![f16::ZERO; n]),
            (Device::Cpu, DType::F32) => CpuStorage::F32(vec![0.0; n]),
            (Device::Cpu, DType::F64) => CpuStorage::F64(vec![0.0; n]),
            (Device::Cpu, got) => {
                return Err(Error::DType {
                    what: "zeros".into(),
                    expected: "u8, u32, bf16, f16, f32 or f64",
                    got,
                });
            }
        };
        Ok(Tensor { rows, cols, storage: Storage::Cpu { values, pooled: false } })
    }

    /// To be written whole before it is read: what it holds is unspecified.
    ///
    /// # Errors
    /// When the device has no room or the type can't be held.
    pub fn empty(rows: usize, cols: usize, dtype: DType, device: &Device) -> Result<Tensor> {
        match (device, dtype) {
            (Device::Cuda(gpu), _) => {
                let buffer = Buffer::new(gpu, rows * cols * dtype.size_in_bytes())?;
                Ok(Tensor { rows, cols, storage: Storage::Cuda { buffer, dtype } })
            }
            (Device::Cpu, DType::F32) => {
                let values = CpuStorage::F32(pool::take(rows * cols));
                Ok(Tensor { rows, cols, storage: Storage::Cpu { values, pooled: true } })
            }
            (Device::Cpu, _) => Tensor::zeros(rows, cols, dtype, device),
        }
    }

    /// A tensor like this one in type and device, of another shape, all zeros.
    ///
    /// # Errors
    /// When the device has no room.
    pub fn zeros_like(&self, rows: usize, cols: usize) -> Result<Tensor> {
        Tensor::zeros(rows, cols, self.dtype(), &self.device())
    }

    /// A tensor like this one in type and device, of another shape, to be written whole before it is
    /// read: what it holds is unspecified.
    ///
    /// # Errors
    /// When the device has no room.
    pub fn empty_like(&self, rows: usize, cols: usize) -> Result<Tensor> {
        Tensor::empty(rows, cols, self.dtype(), &self.device())
    }

    /// The same numbers once more.
    ///
    /// # Errors
    /// When the device has no room.
    pub fn try_clone(&self) -> Result<Tensor> {
        let mut copy = self.empty_like(self.rows, self.cols)?;
        copy.copy_from(self)?;
        Ok(copy)
    }

    /// self = other, which is of the same shape, type and device.
    ///
    /// # Errors
    /// When it isn't.
    pub fn copy_from(&mut self, other: &Tensor) -> Result<()> {
        Error::check_shape("copy_from", self.shape(), other.shape())?;
        let (to, from) = (self.dtype(), other.dtype());
        match (&mut self.storage, &other.storage) {
            (Storage::Cuda { buffer, .. }, Storage::Cuda { buffer: other, .. }) if to == from => {
                buffer.copy_from(other)
            }
            (Storage::Cpu { values: to, .. }, Storage::Cpu { values: from, .. }) => {
                if let (CpuStorage::F32(to), CpuStorage::F32(from)) = (&mut *to, from) {
                    let chunks = to.par_chunks_mut(CHUNK).zip(from.par_chunks(CHUNK));
                    chunks.for_each(|(to, from)| to.copy_from_slice(from));
                } else {
                    *to = from.clone();
                }
                Ok(())
            }
            _ => Err(Error::msg("copy_from: tensors of different types or devices")),
        }
    }

    /// Writes some rows and columns of another tensor over as many of this one, from (row, column) `at` on.
    ///
    /// # Errors
    /// When shapes, types or devices don't fit.
    pub fn write_block(
        &mut self,
        at: (usize, usize),
        from: &Tensor,
        (rows, columns): (Range<usize>, Range<usize>),
    ) -> Result<()> {
        let needed = (at.0 + rows.len(), at.1 + columns.len());
        if needed.0 > self.rows || needed.1 > self.cols {
            return Error::check_shape("room for a block", needed, self.shape());
        }
        if rows.end > from.rows || columns.end > from.cols {
            return Error::check_shape("a block of a tensor", (rows.end, columns.end), from.shape());
        }
        let (to_start, from_start) = (at.0 * self.cols + at.1, rows.start * from.cols + columns.start);
        let (rows, width) = (rows.len(), columns.len());
        if let Some(gpu) = self.gpu() {
            self.check_like(from)?;
            let launch =
                gpu.kernel("elementwise", "copy_columns", self.dtype())?.grid(over(rows * width), THREADS);
            let launch = launch.tensor_at(self, to_start).tensor_at(from, from_start);
            // SAFETY: copy_columns(out, in, rows, cols, out_stride, in_stride), checked above.
            return unsafe { launch.int(rows).int(width).int(self.cols).int(from.cols).run() };
        }
        let (to_stride, from_stride) = (self.cols, from.cols);
        for_real!("write_block", self.dtype(), T => {
            let (to, from) = (self.values_mut::<T>()?, from.values::<T>()?);
            for row in 0..rows {
                let from = &from[from_start + row * from_stride..][..width];
                to[to_start + row * to_stride..][..width].copy_from_slice(from);
            }
            Ok(())
        })
    }

    /// Some rows as a tensor of their own in the same memory, on a GPU: whose work runs in order, so that what is
    /// written to one is read from the other.
    ///
    /// # Errors
    /// When there are no such rows, or the numbers are not on a GPU.
    pub fn shared_rows(&self, rows: Range<usize>) -> Result<Tensor> {
        if rows.start > rows.end || rows.end > self.rows {
            return Err(Error::msg(format!("rows {rows:?} of a tensor of {} rows", self.rows)));
        }
        let Storage::Cuda { buffer, dtype } = &self.storage else {
            return Err(Error::msg("rows are only shared on a GPU"));
        };
        let row = self.cols * dtype.size_in_bytes();
        let storage =
            Storage::Cuda { buffer: buffer.part(rows.start * row, rows.len() * row), dtype: *dtype };
        Ok(Tensor { rows: rows.len(), cols: self.cols, storage })
    }

    /// Takes over `rows · cols` numbers, row after row, on the CPU.
    ///
    /// # Errors
    /// When the count isn't `rows · cols`.
    pub fn from_vec<T: Element>(rows: usize, cols: usize, values: Vec<T>) -> Result<Tensor> {
        if values.len() != rows * cols {
            let message = format!("{} numbers for a tensor of {rows} rows and {cols} columns", values.len());
            return Err(Error::msg(message));
        }
        Ok(Tensor { rows, cols, storage: Storage::Cpu { values: T::storage(values), pooled: false } })
    }

    /// The numbers on a device; a tensor that is there already is handed back.
    ///
    /// # Errors
    /// When the device has no room.
    pub fn to_device(self, device: &Device) -> Result<Tensor> {
        match (&self.storage, device) {
            (Storage::Cpu { .. }, Device::Cpu) => Ok(self),
            (Storage::Cpu { values, .. }, Device::Cuda(gpu)) => {
                let bytes = bytes_of(values);
                let mut buffer = Buffer::new(gpu, bytes.len())?;
                buffer.upload(bytes)?;
                let storage = Storage::Cuda { buffer, dtype: self.dtype() };
                Ok(Tensor { rows: self.rows, cols: self.cols, storage })
            }
            (Storage::Cuda { buffer, .. }, Device::Cuda(gpu)) if Arc::ptr_eq(buffer.gpu(), gpu) => Ok(self),
            (_, Device::Cpu) => self.to_cpu(),
            (_, Device::Cuda(_)) => self.to_cpu()?.to_device(device),
        }
    }

    /// The numbers on a device in another floating-point type. A GPU that has no bf16 gets none.
    ///
    /// # Errors
    /// As [`Tensor::to_device`] and [`Tensor::cast`].
    pub fn to_device_as(self, device: &Device, dtype: DType) -> Result<Tensor> {
        match device.gpu() {
            Some(gpu) if gpu.has_bf16() || self.dtype() != DType::BF16 => self.to_device(device)?.cast(dtype),
            _ => self.cast(dtype)?.to_device(device),
        }
    }

    /// A copy of the numbers on the CPU.
    ///
    /// # Errors
    /// When the device can't be read.
    pub fn to_cpu(&self) -> Result<Tensor> {
        let Storage::Cuda { buffer, dtype } = &self.storage else { return self.try_clone() };
        let mut copy = Tensor::zeros(self.rows, self.cols, *dtype, &Device::Cpu)?;
        if let Storage::Cpu { values, .. } = &mut copy.storage {
            buffer.download(bytes_of_mut(values))?;
        }
        Ok(copy)
    }

    /// Moves the numbers from the card into page-locked memory of the host, beside what the card computes
    /// meanwhile; nothing happens on the CPU.
    ///
    /// # Errors
    /// When the host has no room.
    pub fn offload(&mut self) -> Result<()> {
        if let Storage::Cuda { buffer, dtype } = &mut self.storage {
            let (none, dtype) = (Buffer::new(buffer.gpu(), 0)?, *dtype);
            let buffer = PinnedBuffer::take(std::mem::replace(buffer, none))?;
            self.storage = Storage::Offloaded { buffer, dtype };
        }
        Ok(())
    }

    /// Begins what [`Tensor::restore`] ends, beside what the card computes meanwhile.
    ///
    /// # Errors
    /// When the card has no room.
    pub fn fetch(&mut self) -> Result<()> {
        if let Storage::Offloaded { buffer, .. } = &mut self.storage { buffer.fetch() } else { Ok(()) }
    }

    /// Undoes [`Tensor::offload`].
    ///
    /// # Errors
    /// When the card has no room.
    pub fn restore(&mut self) -> Result<()> {
        if let Storage::Offloaded { buffer, dtype } = &mut self.storage {
            self.storage = Storage::Cuda { buffer: buffer.give()?, dtype: *dtype };
        }
        Ok(())
    }

    /// Rows.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Columns.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// Rows and columns.
    pub fn shape(&self) -> (usize, usize) {
        (self.rows, self.cols)
    }

    /// The number type.
    pub fn dtype(&self) -> DType {
        match &self.storage {
            Storage::Cuda { dtype, .. } | Storage::Offloaded { dtype, .. } => *dtype,
            Storage::Cpu { values, .. } => match values {
                CpuStorage::U8(_) => DType::U8,
                CpuStorage::U32(_) => DType::U32,
                CpuStorage::BF16(_) => DType::BF16,
                CpuStorage::F16(_) => DType::F16,
                CpuStorage::F64(_) => DType::F64,
                _ => DType::F32,
            },
        }
    }

    /// Where the numbers are.
    pub fn device(&self) -> Device {
        self.gpu().map_or(Device::Cpu, |gpu| Device::Cuda(gpu.clone()))
    }

    /// The card that the numbers are on.
    pub fn gpu(&self) -> Option<&Arc<Gpu>> {
        match &self.storage {
            Storage::Cuda { buffer, .. } => Some(buffer.gpu()),
            _ => None,
        }
    }

    /// The address in the card's memory, for tables that kernels read; 0 elsewhere.
    pub fn device_pointer(&self) -> u64 {
        match &self.storage {
            Storage::Cuda { buffer, .. } => buffer.pointer(),
            _ => 0,
        }
    }

    /// Numbers held.
    pub fn len(&self) -> usize {
        self.rows * self.cols
    }

    /// No numbers are held.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Bytes held.
    pub fn bytes(&self) -> usize {
        self.len() * self.dtype().size_in_bytes()
    }

    /// All numbers, row after row.
    ///
    /// # Errors
    /// When they are of another type or not on the CPU.
    pub fn values<T: Element>(&self) -> Result<&[T]> {
        match &self.storage {
            Storage::Cpu { values, .. } => T::slice(values).ok_or_else(|| self.wrong_type::<T>()),
            _ => Err(self.not_on_the_cpu()),
        }
    }

    /// All numbers, row after row, to write to.
    ///
    /// # Errors
    /// When they are of another type or not on the CPU.
    pub fn values_mut<T: Element>(&mut self) -> Result<&mut [T]> {
        let (wrong, elsewhere) = (self.wrong_type::<T>(), self.not_on_the_cpu());
        match &mut self.storage {
            Storage::Cpu { values, .. } => T::slice_mut(values).ok_or(wrong),
            _ => Err(elsewhere),
        }
    }

    fn not_on_the_cpu(&self) -> Error {
        let (rows, cols, device) = (self.rows, self.cols, self.device().name());
        Error::Device(format!(
            "tensor of {rows} rows and {cols} columns: its numbers are on {device}, not on the CPU"
        ))
    }

    fn wrong_type<T: Element>(&self) -> Error {
        let what = format!("tensor of {} rows and {} columns", self.rows, self.cols);
        Error::DType { what, expected: T::DTYPE.as_str(), got: self.dtype() }
    }

    /// As an operand of a product.
    ///
    /// # Errors
    /// As [`Tensor::values`].
    pub fn matrix<T: Element>(&self) -> Result<Matrix<'_, T>> {
        Ok(Matrix::new(self.values()?, self.rows, self.cols))
    }

    /// As the result of a product.
    ///
    /// # Errors
    /// As [`Tensor::values`].
    pub fn matrix_mut<T: Element>(&mut self) -> Result<MatrixMut<'_, T>> {
        let (rows, cols) = self.shape();
        Ok(MatrixMut::new(self.values_mut()?, rows, cols))
    }

    /// The numbers as f32, whatever their type and place.
    ///
    /// # Errors
    /// When they are not floating-point numbers, or can't be read back.
    pub fn to_f32(&self) -> Result<Vec<f32>> {
        let Storage::Cpu { values, .. } = &self.storage else { return self.to_cpu()?.to_f32() };
        match values {
            CpuStorage::F32(values) => Ok(values.clone()),
            CpuStorage::F64(values) => Ok(values.iter().map(|it| *it as f32).collect()),
            CpuStorage::BF16(values) => Ok(values.par_iter().map(|it| it.to_f32()).collect()),
            CpuStorage::F16(values) => Ok(values.par_iter().map(|it| it.to_f32()).collect()),
            _ => Err(Error::DType { what: "to_f32".into(), expected: "a float type", got: self.dtype() }),
        }
    }

    /// The same numbers in another floating-point type, rounded to nearest even.
    ///
    /// # Errors
    /// When either type is not a floating-point one.
    pub fn cast(self, dtype: DType) -> Result<Tensor> {
        if self.dtype() == dtype {
            return Ok(self);
        }
        let (rows, cols) = self.shape();
        if self.gpu().is_some() {
            let mut out = Tensor::empty(rows, cols, dtype, &self.device())?;
            self.cast_into(&mut out)?;
            return Ok(out);
        }
        if let (Storage::Cpu { values: CpuStorage::F64(values), .. }, DType::F32) = (&self.storage, dtype) {
            return Tensor::from_vec(rows, cols, values.iter().map(|it| *it as f32).collect());
        }
        let values = self.to_f32()?;
        match dtype {
            DType::F32 => Tensor::from_vec(rows, cols, values),
            DType::F64 => Tensor::from_vec(rows, cols, values.iter().map(|it| f64::from(*it)).collect()),
            DType::BF16 => {
                Tensor::from_vec(rows, cols, values.par_iter().map(|it| bf16::from_f32(*it)).collect())
            }
            DType::F16 => {
                Tensor::from_vec(rows, cols, values.par_iter().map(|it| f16::from_f32(*it)).collect())
            }
            got => Err(Error::DType { what: "cast".into(), expected: "a float type", got }),
        }
    }

    /// out = self, in out's type; both on one card.
    ///
    /// # Errors
    /// When shapes differ, or the numbers are not there.
    pub fn cast_into(&self, out: &mut Tensor) -> Result<()> {
        Error::check_shape("cast_into", self.shape(), out.shape())?;
        if self.dtype() == out.dtype() {
            return out.copy_from(self);
        }
        let Some(gpu) = self.gpu() else { return Err(Error::msg("cast_into: the numbers are not on a GPU")) };
        let kernel = format!("cast_{}", suffix(self.dtype())?);
        let launch = gpu.kernel("elementwise", &kernel, out.dtype())?.grid(over(self.len()), THREADS);
        // SAFETY: cast(out, in, n); both have n numbers.
        unsafe { launch.tensor(out).tensor(self).long(self.len()).run() }
    }

    /// self = 0
    ///
    /// # Errors
    /// When the type is not a real one.
    pub fn set_zero(&mut self) -> Result<()> {
        if let Storage::Cuda { buffer, .. } = &mut self.storage {
            return buffer.set_zero();
        }
        for_real!("set_zero", self.dtype(), T => {
            self.values_mut::<T>()?.par_chunks_mut(CHUNK).for_each(|chunk| chunk.fill(0.0));
            Ok(())
        })
    }

    /// self += scale · other
    ///
    /// # Errors
    /// When shapes or types differ.
    pub fn add_scaled(&mut self, scale: f64, other: &Tensor) -> Result<()> {
        Error::check_shape("add_scaled", self.shape(), other.shape())?;
        if let Some(gpu) = self.gpu() {
            self.check_like(other)?;
            let launch =
                gpu.kernel("elementwise", "add_scaled", self.dtype())?.grid(over(self.len()), THREADS);
            // SAFETY: add_scaled(a, b, scale, n); both have n numbers of this type.
            return unsafe { launch.tensor(self).tensor(other).float(scale).long(self.len()).run() };
        }
        for_real!("add_scaled", self.dtype(), T => {
            let (scale, other) = (scale as T, other.values::<T>()?);
            let pairs = self.values_mut::<T>()?.par_chunks_mut(CHUNK).zip(other.par_chunks(CHUNK));
            pairs.for_each(|(a, b)| a.iter_mut().zip(b).for_each(|(a, b)| *a += scale * *b));
            Ok(())
        })
    }

    /// self ·= scale
    ///
    /// # Errors
    /// When the type is not a real one.
    pub fn scale(&mut self, scale: f64) -> Result<()> {
        if let Some(gpu) = self.gpu() {
            let launch = gpu.kernel("elementwise", "scale", self.dtype())?.grid(over(self.len()), THREADS);
            // SAFETY: scale(a, scale, n); it has n numbers.
            return unsafe { launch.tensor(self).float(scale).long(self.len()).run() };
        }
        for_real!("scale", self.dtype(), T => {
            let scale = scale as T;
            let chunks = self.values_mut::<T>()?.par_chunks_mut(CHUNK);
            chunks.for_each(|chunk| chunk.iter_mut().for_each(|it| *it *= scale));
            Ok(())
        })
    }

    /// Σ self², added up in f64 in a fixed order, on the CPU.
    ///
    /// # Errors
    /// When the type is not a real one, or the numbers are elsewhere.
    pub fn square_sum(&self) -> Result<f64> {
        for_real!("square_sum", self.dtype(), T => {
            let chunks = self.values::<T>()?.par_chunks(CHUNK);
            let sums: Vec<f64> = chunks.map(|chunk| chunk.iter().map(|it| it.wide() * it.wide()).sum()).collect();
            Ok(sums.iter().sum())
        })
    }

    /// An error unless `other` is of the same type and on the same card.
    fn check_like(&self, other: &Tensor) -> Result<()> {
        let same = matches!((self.gpu(), other.gpu()), (Some(a), Some(b)) if Arc::ptr_eq(a, b));
        if same && self.dtype() == other.dtype() {
            return Ok(());
        }
        Err(Error::msg(format!(
            "operands of one operation are {:?} on {} and {:?} on {}",
            self.dtype(),
            self.device().name(),
            other.dtype(),
            other.device().name()
        )))
    }
}

/// Elements that one task takes: enough to be worth a task, few enough to share out.
const CHUNK: usize = 16 * 1024;
/// Threads of a block of an element-wise kernel.
const THREADS: u32 = 256;

/// Blocks of an element-wise kernel over n elements: enough for any card, which then strides.
fn over(n: usize) -> usize {
    n.div_ceil(4 * THREADS as usize).min(4096)
}

fn bytes_of(values: &CpuStorage) -> &[u8] {
    fn raw<T>(values: &[T]) -> &[u8] {
        // SAFETY: plain numbers without padding, read as bytes.
        unsafe { std::slice::from_raw_parts(values.as_ptr().cast(), size_of_val(values)) }
    }
    match values {
        CpuStorage::U8(values) => values,
        CpuStorage::U32(values) => raw(values),
        CpuStorage::BF16(values) => raw(values),
        CpuStorage::F16(values) => raw(values),
        CpuStorage::F32(values) => raw(values),
        CpuStorage::F64(values) => raw(values),
        _ => &[],
    }
}

fn bytes_of_mut(values: &mut CpuStorage) -> &mut [u8] {
    let bytes = bytes_of(values);
    let (pointer, len) = (bytes.as_ptr().cast_mut(), bytes.len());
    // SAFETY: the exclusive borrow is handed on, and any bytes make up numbers.
    unsafe { std::slice::from_raw_parts_mut(pointer, len) }
}
