//! Rows × columns of numbers on a device: storage, products, memory.
//!
//! A [`Tensor`] is contiguous and two-dimensional; activations are `(N, C)`, every token of every
//! packed sequence being one row. On the CPU the numbers live in candle's [`CpuStorage`]
//! (`candle_core::CpuStorage`), so that candle's readers fill them and its autograd can check them;
//! on CUDA they are an allocation of cudarc's. This crate knows no network.

mod cuda;
mod device;
mod dynamic_map;
mod error;
mod memory;
mod pool;
pub mod product;
mod random;
mod tensor;

pub use candle_core::DType;
pub use cuda::{
    CardRates, CudaCard, CudaLibrary, CudaStatus, DeviceMemory, Gpu, Graph, KernelTime, Launch, LaunchFacts,
    Loading, MINIMUM_CUDA, MINIMUM_DRIVER, Rehearsal, Work, cuda_status,
};
pub use device::Device;
pub use dynamic_map::{dynamic_map, unsigned_dynamic_map};
pub use error::{Error, Result};
pub use half::{bf16, f16};
pub use memory::{peak_resident_bytes, resident_bytes};
pub use product::{Matrix, MatrixMut, Operand, Precision, Tiles, multiply, multiply_on_gpu};
pub use random::{Counter, stream_of, uniform};
pub use tensor::{Element, Real, Tensor};
