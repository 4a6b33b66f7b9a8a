//! Memory of a card.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use cudarc::driver::{result, sys};

use super::arena::{self, Arena};
use super::staging::{self, Staging};
use super::{Gpu, describe};
use crate::{Error, Result};

/// Memory of a card, or a part of it; freed in the stream's order when no part is left.
#[derive(Debug)]
pub(crate) struct Buffer {
    memory: Arc<Memory>,
    /// Where the part begins in the memory.
    start: usize,
    bytes: usize,
}

#[derive(Debug)]
struct Memory {
    pointer: sys::CUdeviceptr,
    bytes: usize,
    gpu: Arc<Gpu>,
    /// What it belongs to, where it was made in a pass that is recorded.
    arena: Option<Arc<Arena>>,
}

impl Drop for Memory {
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
        Ok(Buffer { memory: Arc::new(Memory { pointer, bytes, gpu: gpu.clone(), arena }), start: 0, bytes })
    }

    /// A part of the same memory.
    pub(crate) fn part(&self, start: usize, bytes: usize) -> Buffer {
        assert!(start + bytes <= self.bytes, "{bytes} bytes from {start} on of a buffer of {}", self.bytes);
        Buffer { memory: self.memory.clone(), start: self.start + start, bytes }
    }

    pub(crate) fn gpu(&self) -> &Arc<Gpu> {
        &self.memory.gpu
    }

    pub(crate) fn pointer(&self) -> u64 {
        self.memory.pointer + self.start as u64
    }

    pub(crate) fn bytes(&self) -> usize {
        self.bytes
    }

    /// Freed in the order of another stream, unless another part is left: then it is given back.
    pub(super) fn free_on(self, stream: sys::CUstream) -> Option<Buffer> {
        let Buffer { memory, start, bytes } = self;
        let mut memory = match Arc::try_unwrap(memory) {
            Ok(memory) if memory.arena.is_none() => memory,
            Ok(memory) => return Some(Buffer { memory: Arc::new(memory), start, bytes }),
            Err(memory) => return Some(Buffer { memory, start, bytes }),
        };
        if memory.bytes > 0 && memory.gpu.bind().is_ok() {
            memory.bytes = 0;
            // SAFETY: the memory is this value's, which no longer frees it.
            let _ = unsafe { result::free_async(memory.pointer, stream) };
        }
        None
    }

    /// All bytes 0, which is 0 in every number type.
    pub(crate) fn set_zero(&mut self) -> Result<()> {
        if self.bytes == 0 {
            return Ok(());
        }
        self.gpu().bind()?;
        arena::was_kernel(false);
        // SAFETY: the buffer has this many bytes.
        let done = unsafe { result::memset_d8_async(self.pointer(), 0, self.bytes, self.gpu().raw_stream()) };
        self.gpu().check(done)
    }

    /// From the host's memory; the bytes may change as soon as this returns.
    pub(crate) fn upload(&mut self, bytes: &[u8]) -> Result<()> {
        assert!(bytes.len() <= self.bytes, "{} bytes into a buffer of {}", bytes.len(), self.bytes);
        if bytes.is_empty() {
            return Ok(());
        }
        self.gpu().bind()?;
        if bytes.len() >= staging::SMALLEST && self.upload_staged(bytes)? {
            return Ok(());
        }
        // SAFETY: pageable memory is staged before the call returns.
        let done = unsafe { result::memcpy_htod_async(self.pointer(), bytes, self.gpu().raw_stream()) };
        self.gpu().check(done)
    }

    /// False when another upload is going that way: it may be one that this thread has interrupted.
    fn upload_staged(&mut self, bytes: &[u8]) -> Result<bool> {
        let gpu = self.gpu();
        let Ok(mut staging) = gpu.staging.try_lock() else { return Ok(false) };
        let staging = match &mut *staging {
            Some(staging) => staging,
            none => {
                gpu.pinned.fetch_add(Staging::BYTES as u64, Ordering::Relaxed);
                none.insert(gpu.check(Staging::new(&gpu.context))?)
            }
        };
        // SAFETY: the buffer has this many bytes.
        gpu.check(unsafe { staging.upload(self.pointer(), bytes, gpu.raw_stream()) })?;
        Ok(true)
    }

    /// To the host's memory; waits for everything before.
    pub(crate) fn download(&self, bytes: &mut [u8]) -> Result<()> {
        assert!(bytes.len() <= self.bytes, "{} bytes out of a buffer of {}", bytes.len(), self.bytes);
        if bytes.is_empty() {
            return Ok(());
        }
        self.gpu().bind()?;
        let (pointer, stream) = (self.pointer(), self.gpu().raw_stream());
        // SAFETY: the slice lives until the stream has been waited for.
        self.gpu().check(unsafe { result::memcpy_dtoh_async(bytes, pointer, stream) })?;
        self.gpu().synchronize()
    }

    /// From another buffer of the same card.
    pub(crate) fn copy_from(&mut self, other: &Buffer) -> Result<()> {
        assert!(other.bytes <= self.bytes, "{} bytes into a buffer of {}", other.bytes, self.bytes);
        if other.bytes == 0 {
            return Ok(());
        }
        self.gpu().bind()?;
        arena::was_kernel(false);
        let stream = self.gpu().raw_stream();
        // SAFETY: both buffers are large enough and of one context.
        let done = unsafe { result::memcpy_dtod_async(self.pointer(), other.pointer(), other.bytes, stream) };
        self.gpu().check(done)
    }
}
