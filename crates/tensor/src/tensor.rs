use candle_core::{CpuStorage, DType};
use half::{bf16, f16};
use num_traits::{Float, NumAssign};
use rayon::prelude::*;

use crate::product::{Matrix, MatrixMut};
use crate::{Device, Error, Result, pool};

/// A contiguous matrix of numbers, row after row, on one device.
#[derive(Debug)]
pub struct Tensor {
    rows: usize,
    cols: usize,
    storage: CpuStorage,
    /// The memory came from the pool and goes back there.
    pooled: bool,
}

impl Clone for Tensor {
    fn clone(&self) -> Tensor {
        let (storage, pooled) = match &self.storage {
            CpuStorage::F32(values) => {
                let mut copy = pool::take(values.len());
                let chunks = copy.par_chunks_mut(CHUNK).zip(values.par_chunks(CHUNK));
                chunks.for_each(|(copy, values)| copy.copy_from_slice(values));
                (CpuStorage::F32(copy), true)
            }
            other => (other.clone(), false),
        };
        Tensor { rows: self.rows, cols: self.cols, storage, pooled }
    }
}

impl Drop for Tensor {
    fn drop(&mut self) {
        if let (CpuStorage::F32(values), true) = (&mut self.storage, self.pooled) {
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
        if let Device::Cuda(_) = device {
            return Err(Error::Device(format!("{}: tensors on a GPU are not built yet", device.name())));
        }
        let n = rows * cols;
        let storage = match dtype {
            DType::U8 => CpuStorage::U8(vec![0; n]),
            DType::U32 => CpuStorage::U32(vec![0; n]),
            DType::BF16 => CpuStorage::BF16(vec![bf16::ZERO; n]),
            DType::F16 => CpuStorage::F16(vec![f16::ZERO; n]),
            DType::F32 => CpuStorage::F32(vec![0.0; n]),
            DType::F64 => CpuStorage::F64(vec![0.0; n]),
            got => {
                return Err(Error::DType {
                    what: "zeros".into(),
                    expected: "u8, u32, bf16, f16, f32 or f64",
                    got,
                });
            }
        };
        Ok(Tensor { rows, cols, storage, pooled: false })
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
        match (&self.storage, self.device()) {
            (CpuStorage::F32(_), Device::Cpu) => {
                let storage = CpuStorage::F32(pool::take(rows * cols));
                Ok(Tensor { rows, cols, storage, pooled: true })
            }
            _ => self.zeros_like(rows, cols),
        }
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
        Ok(Tensor { rows, cols, storage: T::storage(values), pooled: false })
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
            CpuStorage::U8(_) => DType::U8,
            CpuStorage::U32(_) => DType::U32,
            CpuStorage::BF16(_) => DType::BF16,
            CpuStorage::F16(_) => DType::F16,
            CpuStorage::F64(_) => DType::F64,
            _ => DType::F32,
        }
    }

    /// Where the numbers are.
    pub fn device(&self) -> Device {
        Device::Cpu
    }

    /// Bytes held.
    pub fn bytes(&self) -> usize {
        self.rows * self.cols * self.dtype().size_in_bytes()
    }

    /// All numbers, row after row.
    ///
    /// # Errors
    /// When they are of another type or not on the CPU.
    pub fn values<T: Element>(&self) -> Result<&[T]> {
        T::slice(&self.storage).ok_or_else(|| self.wrong_type::<T>())
    }

    /// All numbers, row after row, to write to.
    ///
    /// # Errors
    /// When they are of another type or not on the CPU.
    pub fn values_mut<T: Element>(&mut self) -> Result<&mut [T]> {
        let error = self.wrong_type::<T>();
        T::slice_mut(&mut self.storage).ok_or(error)
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

    /// The numbers as f32, whatever their type.
    ///
    /// # Errors
    /// When they are not floating-point numbers.
    pub fn to_f32(&self) -> Result<Vec<f32>> {
        match &self.storage {
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
        if let (CpuStorage::F64(values), DType::F32) = (&self.storage, dtype) {
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

    /// self = 0
    ///
    /// # Errors
    /// When the type is not a real one.
    pub fn set_zero(&mut self) -> Result<()> {
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
        for_real!("scale", self.dtype(), T => {
            let scale = scale as T;
            let chunks = self.values_mut::<T>()?.par_chunks_mut(CHUNK);
            chunks.for_each(|chunk| chunk.iter_mut().for_each(|it| *it *= scale));
            Ok(())
        })
    }

    /// Σ self², added up in f64 in a fixed order.
    ///
    /// # Errors
    /// When the type is not a real one.
    pub fn square_sum(&self) -> Result<f64> {
        for_real!("square_sum", self.dtype(), T => {
            let chunks = self.values::<T>()?.par_chunks(CHUNK);
            let sums: Vec<f64> = chunks.map(|chunk| chunk.iter().map(|it| it.wide() * it.wide()).sum()).collect();
            Ok(sums.iter().sum())
        })
    }
}

/// Elements that one task takes: enough to be worth a task, few enough to share out.
const CHUNK: usize = 16 * 1024;
