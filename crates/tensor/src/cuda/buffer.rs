//! Memory of a card.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use cudarc::driver::{result, sys};

use super::arena::{self, Arena};
use super::staging::{self, Staging};
use super::{Gpu, describe};
use crate::{Error, Result};

/// Memory of a card; freed in the stream's order.
#[derive(Debug)]
pub(crate) struct Buffer {
    pointer: sys::CUdeviceptr,
    bytes: usize,
    gpu: Arc<Gpu>,
    /// What it belongs to, where it was made in a pass that is recorded.
    arena: Option<Arc<Arena>>,
}

impl Drop for Buffer {
    fn drop(&mut self) {
        match &self.arena {
            Some(arena) => arena.give_back(self.bytes, self.pointer),
            None if self.bytes > 0 => free(&self.gpu, self.pointer),
            None => {}
        }
    }
}

/// Memory of the card, in the stream's order.
pub(super) fn allocate(gpu: &Gpu, bytes: usize) -> Result<sys::CUdeviceptr> {
    gpu.bind()?;
    // SAFETY: what is written before it is read is the caller's to see to.
    unsafe { result::malloc_async(gpu.raw_stream(), bytes) }.map_err(|error| {
        if error.0 != sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY {
            return Error::Device(format!("cuda:{}: {}", gpu.ordinal, describe(error)));
        }
        let memory = gpu.memory();
        Error::OutOfMemory {
            device: format!("cuda:{} ({})", gpu.ordinal, gpu.name),
            wanted: bytes as u64,
            allocated: memory.allocated,
            total: memory.total,
        }
    })
}

/// Gives back what [`allocate`] gave, once.
pub(super) fn free(gpu: &Gpu, pointer: sys::CUdeviceptr) {
    if gpu.bind().is_ok() {
        // SAFETY: the memory was allocated on this stream, and later work on it comes later.
        let _ = unsafe { result::free_async(pointer, gpu.raw_stream()) };
    }
}

impl Buffer {
    /// Memory that holds nothing in particular.
    pub(crate) fn new(gpu: &Arc<Gpu>, bytes: usize) -> Result<Buffer> {
        let (pointer, arena) = match bytes {
            0 => (0, None),
            _ => match arena::take(gpu, bytes)? {
                Some((pointer, arena)) => (pointer, Some(arena)),
                None => (allocate(gpu, bytes)?, None),
            },
        };
        Ok(Buffer { pointer, bytes, gpu: gpu.clone(), arena })
    }

    pub(crate) fn gpu(&self) -> &Arc<Gpu> {
        &self.gpu
    }

    pub(crate) fn pointer(&self) -> u64 {
        self.pointer
    }

    pub(crate) fn bytes(&self) -> usize {
        self.bytes
    }

    /// Freed in the order of another stream.
    pub(super) fn free_on(mut self, stream: sys::CUstream) {
        if self.arena.is_none() && self.bytes > 0 && self.gpu.bind().is_ok() {
            self.bytes = 0;
            // SAFETY: the memory is this value's, which no longer frees it.
            let _ = unsafe { result::free_async(self.pointer, stream) };
        }
    }

    /// All bytes 0, which is 0 in every number type.
    pub(crate) fn set_zero(&mut self) -> Result<()> {
        if self.bytes == 0 {
            return Ok(());
        }
        self.gpu.bind()?;
        arena::was_kernel(false);
        // SAFETY: the buffer has this many bytes.
        let done = unsafe { result::memset_d8_async(self.pointer, 0, self.bytes, self.gpu.raw_stream()) };
        self.gpu.check(done)
    }

    /// From the host's memory; the bytes may change as soon as this returns.
    pub(crate) fn upload(&mut self, bytes: &[u8]) -> Result<()> {
        assert!(bytes.len() <= self.bytes, "{} bytes into a buffer of {}", bytes.len(), self.bytes);
        if bytes.is_empty() {
            return Ok(());
        }
        self.gpu.bind()?;
        if bytes.len() >= staging::SMALLEST && self.upload_staged(bytes)? {
            return Ok(());
        }
        // SAFETY: pageable memory is staged before the call returns.
        let done = unsafe { result::memcpy_htod_async(self.pointer, bytes, self.gpu.raw_stream()) };
        self.gpu.check(done)
    }

    /// False when another upload is going that way: it may be one that this thread has interrupted.
    fn upload_staged(&mut self, bytes: &[u8]) -> Result<bool> {
        let gpu = &self.gpu;
        let Ok(mut staging) = gpu.staging.try_lock() else { return Ok(false) };
        let staging = match &mut *staging {
            Some(staging) => staging,
            none => {
                gpu.pinned.fetch_add(Staging::BYTES as u64, Ordering::Relaxed);
                none.insert(gpu.check(Staging::new(&gpu.context))?)
            }
        };
        // SAFETY: the buffer has this many bytes.
        gpu.check(unsafe { staging.upload(self.pointer, bytes, gpu.raw_stream()) })?;
        Ok(true)
    }

    /// To the host's memory; waits for everything before.
    pub(crate) fn download(&self, bytes: &mut [u8]) -> Result<()> {
        assert!(bytes.len() <= self.bytes, "{} bytes out of a buffer of {}", bytes.len(), self.bytes);
        if bytes.is_empty() {
            return Ok(());
        }
        self.gpu.bind()?;
        // SAFETY: the slice lives until the stream has been waited for.
        self.gpu.check(unsafe { result::memcpy_dtoh_async(bytes, self.pointer, self.gpu.raw_stream()) })?;
        self.gpu.synchronize()
    }

    /// From another buffer of the same card.
    pub(crate) fn copy_from(&mut self, other: &Buffer) -> Result<()> {
        assert!(other.bytes <= self.bytes, "{} bytes into a buffer of {}", other.bytes, self.bytes);
        if other.bytes == 0 {
            return Ok(());
        }
        self.gpu.bind()?;
        arena::was_kernel(false);
        let stream = self.gpu.raw_stream();
        // SAFETY: both buffers are large enough and of one context.
        let done = unsafe { result::memcpy_dtod_async(self.pointer, other.pointer, other.bytes, stream) };
        self.gpu.check(done)
    }
}
