//! One NVIDIA GPU: its memory, its kernels, its products.
//!
//! Everything is loaded at run time and everything runs in order on one stream, so that nothing here
//! waits but what reads back. Memory comes from the driver's stream-ordered pool, which keeps what is
//! freed.

mod arena;
mod blas;
mod buffer;
mod graph;
mod launch;
mod library;
mod modules;
mod own_product;
mod pinned;
mod profile;
mod staging;

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock};

use cudarc::driver::{CudaContext, CudaStream, DriverError, result, sys};

use crate::product::Product;
use crate::{DType, Error, Result};

pub use graph::{Graph, Rehearsal};
pub use launch::Launch;
pub use library::{CudaCard, CudaLibrary, CudaStatus, cuda_status};
pub use modules::{Loading, MINIMUM_CUDA, MINIMUM_DRIVER};
pub use profile::{CardRates, KernelTime, Work};

use blas::Blas;
pub(crate) use buffer::Buffer;
use modules::Modules;
use pinned::Copies;
pub(crate) use pinned::PinnedBuffer;
use profile::Profile;
use staging::Staging;

/// A GPU in use.
pub struct Gpu {
    /// The driver's number of the card.
    pub ordinal: usize,
    /// The card's name.
    pub name: String,
    /// Compute capability × 10: 75 for a T4, 90 for an H100.
    pub capability: u32,
    /// The capability that kernels are chosen for; below the card's own only for tests.
    pub architecture: u32,
    /// Streaming multiprocessors.
    pub multiprocessors: usize,
    /// Bytes of shared memory that a block can have, with those that its kernel declares.
    pub shared_of_block: usize,
    /// The newest CUDA version that the driver takes, as (major, minor).
    driver_version: Option<(i32, i32)>,
    context: Arc<CudaContext>,
    stream: Arc<CudaStream>,
    pool: sys::CUmemoryPool,
    modules: Modules,
    blas: OnceLock<Option<Blas>>,
    profile: Profile,
    /// Bytes of page-locked memory, which is kept.
    pinned: AtomicU64,
    copies: OnceLock<Copies>,
    staging: Mutex<Option<Staging>>,
}

// SAFETY: the driver's handles may be used from any thread; the context is bound before each use.
unsafe impl Send for Gpu {}
// SAFETY: as above; what is changed behind a shared reference is behind a lock.
unsafe impl Sync for Gpu {}

impl std::fmt::Debug for Gpu {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "cuda:{} {}", self.ordinal, self.name)
    }
}

/// What a kernel's source says of its launch: `const int {kernel}_launch[3]` there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LaunchFacts {
    /// Rows that a block takes.
    pub rows: usize,
    /// Threads of a block.
    pub threads: u32,
    /// Bytes of dynamic shared memory of a block.
    pub shared: usize,
}

/// Memory of a card, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DeviceMemory {
    /// What tensors and workspaces hold now.
    pub allocated: u64,
    /// The most they have held at once.
    pub peak_allocated: u64,
    /// What the pool has taken from the driver.
    pub reserved: u64,
    /// The most it has taken.
    pub peak_reserved: u64,
    /// What all processes use of the card now, contexts and kernels included.
    pub in_use: u64,
    /// What the card has.
    pub total: u64,
    /// Page-locked memory of the host, for what waits there and for uploads.
    pub peak_pinned: u64,
}

impl Gpu {
    /// Opens the card with this number.
    ///
    /// # Errors
    /// When the driver is missing, there is no such card, or the card is too old; the message says
    /// what was looked for and what to do.
    pub fn open(ordinal: usize) -> Result<Gpu> {
        let at = |message: String| Error::Device(format!("device `cuda:{ordinal}`: {message}"));
        let status = cuda_status();
        let driver = status.driver();
        if driver.found.is_none() {
            return Err(at(format!(
                "the NVIDIA driver's library was not found (looked for {}); install the driver, or set `device: cpu`",
                driver.looked_for.join(", ")
            )));
        }
        if let Some(error) = &status.error {
            return Err(at(format!("{error}; set `device: cpu` to train without a GPU")));
        }
        if ordinal >= status.cards.len() {
            let count = status.cards.len();
            return Err(at(format!("the driver sees {count} card(s); count from 0, or set `device: cpu`")));
        }
        let plain = |error: DriverError| at(describe(error));
        let context = CudaContext::new(ordinal).map_err(plain)?;
        let (major, minor) = context.compute_capability().map_err(plain)?;
        let (name, capability) = (context.name().map_err(plain)?, (10 * major + minor) as u32);
        if capability < modules::OLDEST {
            return Err(at(format!(
                "{name} has compute capability {major}.{minor}; 7.5 (T4, RTX 20) or newer is needed, set `device: cpu`"
            )));
        }
        if !context.has_async_alloc() {
            return Err(at(format!("the driver has no memory pools for {name}; {MINIMUM_DRIVER} is needed")));
        }
        // SAFETY: everything runs on one stream, so that events for each allocation order nothing.
        unsafe { context.disable_event_tracking() };
        let stream = context.new_stream().map_err(plain)?;
        // SAFETY: the device was opened above.
        let pool = unsafe { result::device::get_default_mem_pool(context.cu_device()) }.map_err(plain)?;
        // Without this every synchronisation may give memory back to the driver.
        let keep_all = u64::MAX;
        let threshold = sys::CUmemPool_attribute::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD;
        // SAFETY: the attribute is a 64-bit number.
        unsafe { result::mem_pool::set_attribute(pool, threshold, (&raw const keep_all).cast_mut().cast()) }
            .map_err(plain)?;
        let count = sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT;
        let multiprocessors = context.attribute(count).map_err(plain)? as usize;
        let shared = sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN;
        let shared_of_block = context.attribute(shared).map_err(plain)?.max(0) as usize;
        let architecture = modules::forced_architecture()?.unwrap_or(capability).min(capability);
        Ok(Gpu {
            ordinal,
            name,
            capability,
            architecture,
            multiprocessors,
            shared_of_block,
            driver_version: status.driver_version,
            context,
            stream,
            pool,
            modules: Modules::default(),
            blas: OnceLock::new(),
            profile: Profile::from_env(),
            pinned: AtomicU64::new(0),
            copies: OnceLock::new(),
            staging: Mutex::default(),
        })
    }

    /// The card and the kernels compiled for it have bf16.
    pub fn has_bf16(&self) -> bool {
        self.architecture >= 80
    }

    /// What multiplies matrices here, for people.
    pub fn products(&self) -> String {
        match self.blas() {
            Some(blas) => blas.name(),
            None => "Ferrotune's own kernels (cuBLASLt was not found; install the CUDA toolkit or pip's nvidia-cublas for full speed)"
                .to_string(),
        }
    }

    pub(crate) fn multiply(&self, product: &Product) -> Result<()> {
        let Product { a, b, c, .. } = product;
        if a.dtype != b.dtype || (c.dtype != a.dtype && c.dtype != DType::F32) {
            let (a, b, c) = (a.dtype, b.dtype, c.dtype);
            return Err(Error::msg(format!("a product of {a:?} and {b:?} into {c:?} is not built for GPUs")));
        }
        if c.rows == 0 || c.cols == 0 {
            return Ok(());
        }
        match self.blas() {
            Some(blas) if product.inner() > 0 => blas.multiply(self, product),
            _ => own_product::multiply(self, product),
        }
    }

    /// cuBLASLt, where it is there.
    fn blas(&self) -> Option<&Blas> {
        self.blas.get_or_init(|| Blas::open(self)).as_ref()
    }

    /// The stream for copies beside what is computed.
    fn copies(&self) -> Result<&Copies> {
        if let Some(copies) = self.copies.get() {
            return Ok(copies);
        }
        self.bind()?;
        let new = self.check(Copies::new())?;
        Ok(self.copies.get_or_init(|| new))
    }

    /// Waits until everything that was asked for is done.
    ///
    /// # Errors
    /// When something that was asked for has failed.
    pub fn synchronize(&self) -> Result<()> {
        self.bind()?;
        self.check(self.stream.synchronize())
    }

    /// How memory stands.
    pub fn memory(&self) -> DeviceMemory {
        use sys::CUmemPool_attribute as Attribute;
        let attribute = |attribute: Attribute| {
            let mut value = 0u64;
            // SAFETY: these attributes are 64-bit numbers, and the pool lives as long as the device.
            let read =
                unsafe { result::mem_pool::get_attribute(self.pool, attribute, (&raw mut value).cast()) };
            read.map_or(0, |()| value)
        };
        let (free, total) = self.bind().ok().and_then(|()| result::mem_get_info().ok()).unwrap_or((0, 0));
        DeviceMemory {
            allocated: attribute(Attribute::CU_MEMPOOL_ATTR_USED_MEM_CURRENT),
            peak_allocated: attribute(Attribute::CU_MEMPOOL_ATTR_USED_MEM_HIGH),
            reserved: attribute(Attribute::CU_MEMPOOL_ATTR_RESERVED_MEM_CURRENT),
            peak_reserved: attribute(Attribute::CU_MEMPOOL_ATTR_RESERVED_MEM_HIGH),
            in_use: (total - free) as u64,
            total: total as u64,
            peak_pinned: self.pinned.load(Ordering::Relaxed),
        }
    }

    /// Bytes that can still be had: free on the card, or kept by the pool.
    pub fn available_memory(&self) -> u64 {
        let memory = self.memory();
        memory.total - memory.in_use + memory.reserved - memory.allocated
    }

    /// Starts a launch of a kernel of a module, `{kernel}_{dtype}`.
    ///
    /// # Errors
    /// When there is no such kernel for this card.
    pub fn kernel(&self, module: &str, kernel: &str, dtype: DType) -> Result<Launch<'_>> {
        self.plain_kernel(module, &format!("{kernel}_{}", suffix(dtype)?))
    }

    /// Starts a launch of a kernel by its whole name.
    ///
    /// # Errors
    /// When there is no such kernel for this card.
    pub fn plain_kernel(&self, module: &str, kernel: &str) -> Result<Launch<'_>> {
        let (function, can_wait) = self.modules.with(self, module, kernel, |loaded| {
            if let Some(function) = loaded.functions.get(kernel) {
                return Ok((*function, loaded.can_wait));
            }
            // SAFETY: modules are never unloaded.
            let function = unsafe { result::module::get_function(loaded.handle, c_name(kernel)) };
            let function = function.map_err(|error| self.not_in_module(kernel, module, error))?;
            loaded.functions.insert(kernel.to_string(), function);
            Ok((function, loaded.can_wait))
        })?;
        Ok(Launch::new(self, function, kernel, can_wait))
    }

    /// How a kernel wants to be launched, where its source says so.
    ///
    /// # Errors
    /// When there is no such kernel for this card.
    pub fn launch_facts(&self, module: &str, kernel: &str, dtype: DType) -> Result<LaunchFacts> {
        let name = format!("{kernel}_{}_launch", suffix(dtype)?);
        self.modules.with(self, module, &name, |loaded| {
            if let Some(facts) = loaded.facts.get(&name) {
                return Ok(*facts);
            }
            let mut values = [0i32; 3];
            // SAFETY: modules are never unloaded; the constant is read in its whole length, or not at all.
            let read = unsafe {
                result::module::get_global(loaded.handle, c_name(&name)).and_then(|(address, bytes)| {
                    match bytes == size_of_val(&values) {
                        true => result::memcpy_dtoh_sync(&mut values, address),
                        false => Err(DriverError(sys::CUresult::CUDA_ERROR_INVALID_VALUE)),
                    }
                })
            };
            read.map_err(|error| self.not_in_module(&name, module, error))?;
            let [rows, threads, shared] = values.map(|it| it.max(0) as usize);
            let facts = LaunchFacts { rows, threads: threads as u32, shared };
            loaded.facts.insert(name.clone(), facts);
            Ok(facts)
        })
    }

    fn not_in_module(&self, name: &str, module: &str, error: DriverError) -> Error {
        let (sm, why) = (self.architecture, describe(error));
        Error::Device(format!("`{name}` is not in kernel module `{module}` for sm_{sm}: {why}"))
    }

    fn bind(&self) -> Result<()> {
        self.check(self.context.bind_to_thread())
    }

    /// A driver's answer as ours.
    fn check<T>(&self, result: Result<T, DriverError>) -> Result<T> {
        result.map_err(|error| Error::Device(format!("cuda:{}: {}", self.ordinal, describe(error))))
    }

    fn raw_stream(&self) -> sys::CUstream {
        self.stream.cu_stream()
    }
}

/// The ending of a kernel's name.
pub(crate) fn suffix(dtype: DType) -> Result<&'static str> {
    match dtype {
        DType::F32 => Ok("f32"),
        DType::F16 => Ok("f16"),
        DType::BF16 => Ok("bf16"),
        got => Err(Error::DType { what: "a CUDA kernel".into(), expected: "f32, f16 or bf16", got }),
    }
}

fn c_name(name: &str) -> std::ffi::CString {
    std::ffi::CString::new(name).expect("names have no zero")
}

/// The driver's own words for an error.
fn describe(error: DriverError) -> String {
    let name = error.error_name().map(|it| it.to_string_lossy().into_owned());
    let text = error.error_string().map(|it| it.to_string_lossy().into_owned());
    match (name, text) {
        (Ok(name), Ok(text)) => format!("{text} ({name})"),
        _ => format!("CUDA error {:?}", error.0),
    }
}
