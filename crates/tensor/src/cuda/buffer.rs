//! Memory of a card, and of the host for what a card puts there.

use std::ffi::c_void;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use cudarc::driver::{result, sys};

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
}

impl Drop for Memory {
    fn drop(&mut self) {
        if self.bytes > 0 && self.gpu.bind().is_ok() {
            // SAFETY: the memory was allocated on this stream, and later work on it comes later.
            let _ = unsafe { result::free_async(self.pointer, self.gpu.raw_stream()) };
        }
    }
}

impl Buffer {
    /// Memory that holds nothing in particular.
    pub(crate) fn new(gpu: &Arc<Gpu>, bytes: usize) -> Result<Buffer> {
        gpu.bind()?;
        let mut pointer = 0;
        if bytes > 0 {
            // SAFETY: what is written before it is read is the caller's to see to.
            pointer = unsafe { result::malloc_async(gpu.raw_stream(), bytes) }.map_err(|error| {
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
            })?;
        }
        Ok(Buffer { memory: Arc::new(Memory { pointer, bytes, gpu: gpu.clone() }), start: 0, bytes })
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

    /// All bytes 0, which is 0 in every number type.
    pub(crate) fn set_zero(&mut self) -> Result<()> {
        if self.bytes == 0 {
            return Ok(());
        }
        self.gpu().bind()?;
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
                gpu.pinned.add(Staging::BYTES);
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
        let stream = self.gpu().raw_stream();
        // SAFETY: both buffers are large enough and of one context.
        let done = unsafe { result::memcpy_dtod_async(self.pointer(), other.pointer(), other.bytes, stream) };
        self.gpu().check(done)
    }
}

/// Page-locked memory of the host, which the card reads and writes by itself.
#[derive(Debug)]
pub(crate) struct PinnedBuffer {
    pointer: *mut c_void,
    bytes: usize,
    gpu: Arc<Gpu>,
}

// SAFETY: the memory belongs to this value alone.
unsafe impl Send for PinnedBuffer {}
// SAFETY: a shared reference only reads.
unsafe impl Sync for PinnedBuffer {}

impl Drop for PinnedBuffer {
    fn drop(&mut self) {
        // The card may still be reading.
        let _ = self.gpu.synchronize();
        // SAFETY: the memory was allocated by `malloc_host` and is freed once.
        let _ = unsafe { result::free_host(self.pointer) };
        self.gpu.pinned.remove(self.bytes);
    }
}

impl PinnedBuffer {
    pub(crate) fn new(gpu: &Arc<Gpu>, bytes: usize) -> Result<PinnedBuffer> {
        gpu.bind()?;
        // SAFETY: the memory is written before it is read: see `Buffer::stash`.
        let pointer = gpu.check(unsafe { result::malloc_host(bytes.max(1), 0) })?;
        gpu.pinned.add(bytes);
        Ok(PinnedBuffer { pointer, bytes, gpu: gpu.clone() })
    }

    pub(crate) fn bytes(&self) -> usize {
        self.bytes
    }

    pub(crate) fn gpu(&self) -> &Arc<Gpu> {
        &self.gpu
    }

    /// The contents of a buffer of the card, in the stream's order.
    pub(crate) fn take(&mut self, from: &Buffer) -> Result<()> {
        assert!(from.bytes <= self.bytes, "{} bytes into {} pinned ones", from.bytes, self.bytes);
        self.gpu.bind()?;
        // SAFETY: page-locked memory of this length, freed only after the stream has been waited for.
        let slice = unsafe { std::slice::from_raw_parts_mut(self.pointer.cast::<u8>(), from.bytes) };
        // SAFETY: as above.
        self.gpu.check(unsafe { result::memcpy_dtoh_async(slice, from.pointer(), self.gpu.raw_stream()) })
    }

    /// The contents into a buffer of the card, in the stream's order.
    pub(crate) fn give(&self, to: &mut Buffer) -> Result<()> {
        assert!(to.bytes <= self.bytes, "{} bytes out of {} pinned ones", to.bytes, self.bytes);
        self.gpu.bind()?;
        // SAFETY: page-locked memory of this length, freed only after the stream has been waited for.
        let slice = unsafe { std::slice::from_raw_parts(self.pointer.cast::<u8>(), to.bytes) };
        // SAFETY: as above.
        self.gpu.check(unsafe { result::memcpy_htod_async(to.pointer(), slice, self.gpu.raw_stream()) })
    }
}

/// Bytes of page-locked memory: now, and the most at once.
#[derive(Default)]
pub(super) struct PinnedBytes {
    now: AtomicU64,
    peak: AtomicU64,
}

impl PinnedBytes {
    pub(super) fn peak(&self) -> u64 {
        self.peak.load(Ordering::Relaxed)
    }

    fn add(&self, bytes: usize) {
        let now = self.now.fetch_add(bytes as u64, Ordering::Relaxed) + bytes as u64;
        self.peak.fetch_max(now, Ordering::Relaxed);
    }

    fn remove(&self, bytes: usize) {
        self.now.fetch_sub(bytes as u64, Ordering::Relaxed);
    }
}
