use std::ffi::c_void;

use cudarc::driver::{DriverError, result, sys};

use super::{Gpu, Work, arena};
use crate::{Error, Result, Tensor};

/// The most arguments a kernel of ours takes.
const MOST_ARGUMENTS: usize = 56;
/// Dynamic shared memory above this must be asked for: with a kernel's own, 48 KiB are free.
const SHARED_FREE: usize = 12 * 1024;

/// A kernel with its arguments, about to run.
pub struct Launch<'a> {
    gpu: &'a Gpu,
    function: sys::CUfunction,
    name: String,
    grid: (usize, usize),
    block: u32,
    shared: usize,
    /// The kernel has instructions to wait for those before it.
    can_wait: bool,
    early: bool,
    /// Each argument in the low bytes of a word.
    arguments: [u64; MOST_ARGUMENTS],
    count: usize,
    too_large: Option<usize>,
    work: Work,
}

impl<'a> Launch<'a> {
    pub(super) fn new(gpu: &'a Gpu, function: sys::CUfunction, name: &str, can_wait: bool) -> Launch<'a> {
        Launch {
            gpu,
            function,
            name: name.to_string(),
            grid: (1, 1),
            block: 1,
            shared: 0,
            can_wait,
            early: false,
            arguments: [0; MOST_ARGUMENTS],
            count: 0,
            too_large: None,
            work: Work::default(),
        }
    }

    /// Blocks along x, and threads of each.
    pub fn grid(self, blocks: usize, threads: u32) -> Launch<'a> {
        Launch { grid: (blocks, 1), block: threads, ..self }
    }

    /// Blocks along x and y, and threads of each.
    pub fn grid_of(self, blocks: (usize, usize), threads: u32) -> Launch<'a> {
        Launch { grid: blocks, block: threads, ..self }
    }

    /// Bytes of dynamic shared memory of each block.
    pub fn shared(self, bytes: usize) -> Launch<'a> {
        Launch { shared: bytes, ..self }
    }

    /// In a recorded pass it may begin before the kernel ahead of it has ended, where the card can do that. Such a
    /// kernel waits by itself (`wait_for_kernels_before` of `kernels/ptx.cuh`), in all of its blocks that do
    /// anything, before it reads what kernels of the pass have written and before it writes.
    pub fn early(self) -> Launch<'a> {
        Launch { early: true, ..self }
    }

    /// The address of a tensor.
    pub fn tensor(self, tensor: &Tensor) -> Launch<'a> {
        self.tensor_at(tensor, 0)
    }

    /// The address of an element of a tensor, such as the first of some columns.
    pub fn tensor_at(mut self, tensor: &Tensor, element: usize) -> Launch<'a> {
        self.work.bytes += ((tensor.len() - element) * tensor.dtype().size_in_bytes()) as f64;
        let address = tensor.device_pointer() + (element * tensor.dtype().size_in_bytes()) as u64;
        self.word(address)
    }

    /// The address of a tensor, or none.
    pub fn optional(self, tensor: Option<&Tensor>) -> Launch<'a> {
        match tensor {
            Some(tensor) => self.tensor(tensor),
            None => self.word(0),
        }
    }

    /// An `int`.
    pub fn int(mut self, value: usize) -> Launch<'a> {
        match i32::try_from(value) {
            Ok(value) => self.word(u64::from(value as u32)),
            Err(_) => {
                self.too_large = Some(value);
                self.word(0)
            }
        }
    }

    /// An `int` that says yes or no.
    pub fn flag(self, value: bool) -> Launch<'a> {
        self.word(u64::from(value))
    }

    /// A `long long`.
    pub fn long(self, value: usize) -> Launch<'a> {
        self.word(value as u64)
    }

    /// An `unsigned long long`.
    pub fn word(mut self, value: u64) -> Launch<'a> {
        self.arguments[self.count] = value;
        self.count += 1;
        self
    }

    /// A `float`.
    pub fn float(self, value: f64) -> Launch<'a> {
        self.word(u64::from((value as f32).to_bits()))
    }

    /// Puts it into the stream; nothing is launched for an empty grid.
    ///
    /// # Errors
    /// When a size is beyond what kernels count, or the driver refuses.
    ///
    /// # Safety
    /// The arguments are those of the kernel, in its order, and every address that it computes from
    /// them lies inside the tensors.
    pub unsafe fn run(mut self) -> Result<()> {
        if let Some(value) = self.too_large {
            return Err(Error::msg(format!(
                "a size of {value} is beyond what one launch takes; use smaller batches"
            )));
        }
        let (x, y) = self.grid;
        if x == 0 || y == 0 {
            return Ok(());
        }
        let (Ok(x), Ok(y @ ..=65535)) = (i32::try_from(x), u32::try_from(y)) else {
            return Err(Error::msg(format!(
                "a grid of {x} × {y} blocks is beyond what one launch takes; use smaller batches"
            )));
        };
        self.gpu.bind()?;
        if self.shared > SHARED_FREE {
            let most = sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            // SAFETY: the function is alive.
            let set =
                unsafe { result::function::set_function_attribute(self.function, most, self.shared as i32) };
            self.gpu.check(set)?;
        }
        let mut addresses = [std::ptr::null_mut::<c_void>(); MOST_ARGUMENTS];
        for (address, argument) in addresses.iter_mut().zip(&mut self.arguments) {
            *address = std::ptr::from_mut(argument).cast();
        }
        let (stream, count) = (self.gpu.raw_stream(), self.count);
        let (function, block, shared) = (self.function, self.block, self.shared as u32);
        if self.early && self.can_wait && arena::follows_kernel() {
            let grid = (x as u32, y);
            // SAFETY: the caller's promise; the arguments are copied before the call returns.
            return self.gpu.check(unsafe {
                launch_early(function, grid, block, shared, stream, &mut addresses[..count])
            });
        }
        arena::was_kernel(true);
        // SAFETY: the caller's promise; the arguments are copied before the call returns.
        let launch = || unsafe {
            result::launch_kernel(
                function,
                (x as u32, y, 1),
                (block, 1, 1),
                shared,
                stream,
                &mut addresses[..count],
            )
        };
        let launched = self.gpu.profile.around(stream, || (self.name.clone(), self.work), launch);
        self.gpu.check(launched)
    }
}

/// Launches a kernel that waits for those before it by itself.
///
/// # Safety
/// As with [`result::launch_kernel`].
unsafe fn launch_early(
    function: sys::CUfunction,
    grid: (u32, u32),
    block: u32,
    shared: u32,
    stream: sys::CUstream,
    arguments: &mut [*mut c_void],
) -> Result<(), DriverError> {
    // Kernels that run beside each other have to agree on how much of the L1 is shared memory: all of it.
    let carveout = sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT;
    // SAFETY: the function is alive; the attribute is a share in percent.
    unsafe { result::function::set_function_attribute(function, carveout, 100) }?;
    let value = sys::CUlaunchAttributeValue { programmaticStreamSerializationAllowed: 1 };
    let id = sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION;
    let mut attribute = sys::CUlaunchAttribute { id, pad: [0; 4], value };
    let config = sys::CUlaunchConfig {
        gridDimX: grid.0,
        gridDimY: grid.1,
        gridDimZ: 1,
        blockDimX: block,
        blockDimY: 1,
        blockDimZ: 1,
        sharedMemBytes: shared,
        hStream: stream,
        attrs: &raw mut attribute,
        numAttrs: 1,
    };
    let arguments = arguments.as_mut_ptr();
    // SAFETY: the caller's; the configuration is read before the call returns.
    unsafe { sys::cuLaunchKernelEx(&raw const config, function, arguments, std::ptr::null_mut()) }.result()
}
