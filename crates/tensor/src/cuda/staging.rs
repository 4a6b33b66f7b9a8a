//! The way of large uploads: through page-locked memory, which the card reads at the full rate of the bus
//! while all cores fill the next piece.

use std::ffi::c_void;
use std::sync::Arc;

use cudarc::driver::{CudaContext, DriverError, result, sys};
use rayon::prelude::*;

/// Bytes of a piece, and how many there are.
const PIECE: usize = 8 << 20;
const PIECES: usize = 3;
/// What one task copies.
const TASK: usize = 256 << 10;
/// Smaller uploads are left to the driver.
pub(super) const SMALLEST: usize = 1 << 20;

/// Pieces of page-locked memory, each with an event that tells when the card has read it.
pub(super) struct Staging {
    pieces: Vec<(*mut c_void, sys::CUevent)>,
    context: Arc<CudaContext>,
}

// SAFETY: the memory and the events belong to this value alone; the driver takes them from any thread.
unsafe impl Send for Staging {}

impl Drop for Staging {
    fn drop(&mut self) {
        if self.context.bind_to_thread().is_err() {
            return;
        }
        for (memory, event) in &self.pieces {
            // SAFETY: allocated in `new`, freed once, and no longer read once the event has come.
            unsafe {
                let _ = result::event::synchronize(*event);
                let _ = result::event::destroy(*event);
                let _ = result::free_host(*memory);
            }
        }
    }
}

impl Staging {
    /// Bytes of page-locked memory.
    pub(super) const BYTES: usize = PIECE * PIECES;

    /// In the context, which is current.
    pub(super) fn new(context: &Arc<CudaContext>) -> Result<Staging, DriverError> {
        let mut staging = Staging { pieces: Vec::new(), context: context.clone() };
        for _ in 0..PIECES {
            let event = result::event::create(sys::CUevent_flags::CU_EVENT_DISABLE_TIMING)?;
            // SAFETY: written before it is read.
            match unsafe { result::malloc_host(PIECE, 0) } {
                Ok(memory) => staging.pieces.push((memory, event)),
                Err(error) => {
                    // SAFETY: made above.
                    let _ = unsafe { result::event::destroy(event) };
                    return Err(error);
                }
            }
        }
        Ok(staging)
    }

    /// Copies bytes to the card, in the stream's order; they may change as soon as this returns.
    ///
    /// # Safety
    /// There is memory of the card for all of them at `destination`.
    pub(super) unsafe fn upload(
        &mut self,
        destination: sys::CUdeviceptr,
        bytes: &[u8],
        stream: sys::CUstream,
    ) -> Result<(), DriverError> {
        for (index, bytes) in bytes.chunks(PIECE).enumerate() {
            let (memory, event) = self.pieces[index % PIECES];
            // SAFETY: the piece is as long as it must be, and once its event has come the card reads it no more.
            let piece = unsafe {
                result::event::synchronize(event)?;
                std::slice::from_raw_parts_mut(memory.cast::<u8>(), bytes.len())
            };
            piece
                .par_chunks_mut(TASK)
                .zip(bytes.par_chunks(TASK))
                .for_each(|(to, from)| to.copy_from_slice(from));
            let at = destination + (index * PIECE) as u64;
            // SAFETY: the caller's; the piece isn't written before its event has come.
            unsafe {
                result::memcpy_htod_async(at, piece, stream)?;
                result::event::record(event, stream)?;
            }
        }
        // The next upload begins with the first piece again.
        self.pieces.rotate_left(bytes.len().div_ceil(PIECE) % PIECES);
        Ok(())
    }
}
