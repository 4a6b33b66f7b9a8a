//! Page-locked memory of the host, where tensors of a card wait.
//!
//! They travel on a stream of their own, beside what is computed. Pieces of memory are kept and used again: page-locking
//! takes longer than copying. There are never more pieces than were in use at once.

use std::collections::BTreeMap;
use std::ffi::c_void;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};

use cudarc::driver::{result, sys};

use super::{Buffer, Gpu};
use crate::Result;

/// The stream for copies, and memory that waits for some.
#[derive(Debug)]
pub(super) struct Copies {
    stream: sys::CUstream,
    /// Recorded on one stream and waited for on the other, at once.
    moment: sys::CUevent,
    /// By size.
    free: Mutex<BTreeMap<usize, Vec<Pinned>>>,
}

// SAFETY: the driver's handles may be used from any thread.
unsafe impl Send for Copies {}
// SAFETY: as above.
unsafe impl Sync for Copies {}

#[derive(Clone, Copy, Debug)]
struct Pinned(*mut c_void);

// SAFETY: it is an address of memory that one value at a time holds.
unsafe impl Send for Pinned {}

impl Copies {
    /// The card's context must be bound.
    pub(super) fn new() -> std::result::Result<Copies, result::DriverError> {
        use cudarc::driver::sys::CUevent_flags;
        Ok(Copies {
            stream: result::stream::create(result::stream::StreamKind::NonBlocking)?,
            moment: result::event::create(CUevent_flags::CU_EVENT_DISABLE_TIMING)?,
            free: Mutex::default(),
        })
    }

    /// A piece of at least so many bytes, and its size. A new one takes the place of the largest that waits: batches have
    /// many sizes.
    fn piece(&self, gpu: &Gpu, bytes: usize) -> Result<(Pinned, usize)> {
        let mut free = self.free.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        let fitting = free.range(bytes..).find(|(_, pieces)| !pieces.is_empty()).map(|(room, _)| *room);
        if let Some((room, piece)) = fitting.and_then(|room| Some((room, free.get_mut(&room)?.pop()?))) {
            return Ok((piece, room));
        }
        let largest = free.iter_mut().rev().find_map(|(room, pieces)| Some((*room, pieces.pop()?)));
        if let Some((room, piece)) = largest {
            // SAFETY: nothing uses the piece any more once the stream has been waited for.
            let freed =
                unsafe { result::stream::synchronize(self.stream).and_then(|()| result::free_host(piece.0)) };
            gpu.check(freed)?;
            gpu.pinned.fetch_sub(room as u64, Ordering::Relaxed);
        }
        // SAFETY: the memory is written before it is read.
        let memory = gpu.check(unsafe { result::malloc_host(bytes.max(1), 0) })?;
        gpu.pinned.fetch_add(bytes as u64, Ordering::Relaxed);
        Ok((Pinned(memory), bytes))
    }

    /// What is put into `later` from here on waits for what is in `earlier` now.
    fn order(&self, gpu: &Gpu, earlier: sys::CUstream, later: sys::CUstream) -> Result<()> {
        let flags = sys::CUevent_wait_flags::CU_EVENT_WAIT_DEFAULT;
        // SAFETY: both streams and the event are alive; a wait takes the event as it is now.
        let ordered = unsafe {
            result::event::record(self.moment, earlier)
                .and_then(|()| result::stream::wait_event(later, self.moment, flags))
        };
        gpu.check(ordered)
    }
}

impl Drop for Copies {
    fn drop(&mut self) {
        // SAFETY: the card's context is alive, and nothing uses them any more once the stream has been waited for.
        unsafe {
            let _ = result::stream::synchronize(self.stream);
            let free = self.free.get_mut().unwrap_or_else(|poisoned| poisoned.into_inner());
            for pinned in std::mem::take(free).into_values().flatten() {
                let _ = result::free_host(pinned.0);
            }
            let _ = result::event::destroy(self.moment);
            let _ = result::stream::destroy(self.stream);
        }
    }
}

/// The numbers of a [`Buffer`], in the host's memory.
#[derive(Debug)]
pub(crate) struct PinnedBuffer {
    memory: Pinned,
    /// Bytes of the piece, of which the first are taken.
    room: usize,
    bytes: usize,
    gpu: Arc<Gpu>,
    /// Where they are going to be on the card again.
    fetched: Option<Buffer>,
}

// SAFETY: a shared reference doesn't touch the memory.
unsafe impl Sync for PinnedBuffer {}

impl Drop for PinnedBuffer {
    fn drop(&mut self) {
        if let Ok(copies) = self.gpu.copies() {
            if self.fetched.is_some() {
                // The buffer is freed in the order of the other stream.
                let _ = copies.order(&self.gpu, copies.stream, self.gpu.raw_stream());
            }
            // Whoever takes the memory next copies on the same stream, after this one.
            let mut free = copies.free.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
            free.entry(self.room).or_default().push(self.memory);
        }
    }
}

impl PinnedBuffer {
    /// Begins to move the contents; the card's memory is free once they have left it.
    pub(crate) fn take(buffer: Buffer) -> Result<PinnedBuffer> {
        let (gpu, bytes) = (buffer.gpu().clone(), buffer.bytes());
        let copies = gpu.copies()?;
        let (memory, room) = copies.piece(&gpu, bytes)?;
        copies.order(&gpu, gpu.raw_stream(), copies.stream)?;
        // SAFETY: page-locked memory of this length that nobody else holds.
        let slice = unsafe { std::slice::from_raw_parts_mut(memory.0.cast::<u8>(), bytes) };
        // SAFETY: the buffer has as many bytes, and is freed on the same stream.
        gpu.check(unsafe { result::memcpy_dtoh_async(slice, buffer.pointer(), copies.stream) })?;
        if let Some(shared) = buffer.free_on(copies.stream) {
            copies.order(&gpu, copies.stream, gpu.raw_stream())?;
            drop(shared);
        }
        Ok(PinnedBuffer { memory, room, bytes, gpu: gpu.clone(), fetched: None })
    }

    /// Begins to move the contents back.
    pub(crate) fn fetch(&mut self) -> Result<()> {
        if self.fetched.is_some() {
            return Ok(());
        }
        let buffer = Buffer::new(&self.gpu, self.bytes)?;
        let copies = self.gpu.copies()?;
        // The memory may have been another's until now.
        copies.order(&self.gpu, self.gpu.raw_stream(), copies.stream)?;
        // SAFETY: page-locked memory of this length, which nobody writes before the copy is done.
        let slice = unsafe { std::slice::from_raw_parts(self.memory.0.cast::<u8>(), self.bytes) };
        // SAFETY: the buffer has as many bytes.
        self.gpu.check(unsafe { result::memcpy_htod_async(buffer.pointer(), slice, copies.stream) })?;
        self.fetched = Some(buffer);
        Ok(())
    }

    /// The contents on the card, for what is put into the stream from here on.
    pub(crate) fn give(&mut self) -> Result<Buffer> {
        self.fetch()?;
        let copies = self.gpu.copies()?;
        copies.order(&self.gpu, copies.stream, self.gpu.raw_stream())?;
        self.fetched.take().ok_or_else(|| crate::Error::msg("a tensor that was fetched and isn't there"))
    }
}
