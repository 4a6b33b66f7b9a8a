//! Launches that are recorded once and repeated as a whole, where launching them one by one would take
//! longer than the card does.

use std::sync::Arc;

use cudarc::driver::{result, sys};

use super::Gpu;
use super::arena::{self, Arena, Step};
use crate::{Error, Result};

/// The driver that can record the taking and freeing of memory, as (major, minor).
const OLDEST_DRIVER: (i32, i32) = (11, 4);

/// Recorded launches. What they read and write by address must outlive it; the memory of what was made while
/// recording is its own.
pub struct Graph {
    executable: sys::CUgraphExec,
    gpu: Arc<Gpu>,
    _rehearsal: Rehearsal,
}

/// A pass that has run once: its kernels are loaded, and it has the memory that it takes.
pub struct Rehearsal(Arc<Arena>);

// SAFETY: the driver takes the handle from any thread, one at a time.
unsafe impl Send for Graph {}

impl Drop for Graph {
    fn drop(&mut self) {
        if self.gpu.synchronize().is_ok() {
            // SAFETY: instantiated once, destroyed once, and no longer running.
            let _ = unsafe { result::graph::exec_destroy(self.executable) };
        }
    }
}

impl Graph {
    /// Puts all of it into the stream.
    ///
    /// # Errors
    /// When the driver refuses.
    ///
    /// # Safety
    /// All tensors that were there before recording and were used in it are still alive.
    pub unsafe fn launch(&self) -> Result<()> {
        self.gpu.bind()?;
        // SAFETY: the caller's.
        self.gpu.check(unsafe { result::graph::launch(self.executable, self.gpu.raw_stream()) })
    }
}

impl Gpu {
    /// Whether [`Gpu::rehearse`] and [`Gpu::record`] work here. It doesn't while launches are measured one by one.
    pub fn can_record(&self) -> bool {
        !self.profile.measures() && self.driver_version.is_some_and(|it| it >= OLDEST_DRIVER)
    }

    /// Runs `work` for the first time. It is recorded later.
    ///
    /// # Errors
    /// Those of `work`.
    pub fn rehearse(self: &Arc<Gpu>, work: impl FnOnce() -> Result<()>) -> Result<Rehearsal> {
        let arena = Arena::new(self);
        arena::within(&arena, Step::Rehearsed, work)?;
        Ok(Rehearsal(arena))
    }

    /// Records what `work` launches instead of running it: the same as in its rehearsal. It must not read back, nor
    /// upload.
    ///
    /// # Errors
    /// When `work` fails, or does what can't be recorded.
    pub fn record(self: &Arc<Gpu>, rehearsal: Rehearsal, work: impl FnOnce() -> Result<()>) -> Result<Graph> {
        self.bind()?;
        let stream = self.raw_stream();
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        // SAFETY: the stream is alive, and its recording is ended below.
        self.check(unsafe { result::stream::begin_capture(stream, mode) })?;
        let worked = arena::within(&rehearsal.0, Step::Recorded, work);
        // SAFETY: begun above.
        let graph = unsafe { result::stream::end_capture(stream) };
        worked?;
        let graph = self.check(graph)?;
        if graph.is_null() {
            return Err(Error::Device("the recording of a pass was interrupted".to_string()));
        }
        let flags = sys::CUgraphInstantiate_flags(0);
        // SAFETY: the graph is alive, and no longer needed once it is instantiated.
        let executable = unsafe {
            let executable = result::graph::instantiate(graph, flags);
            let _ = result::graph::destroy(graph);
            self.check(executable)?
        };
        Ok(Graph { executable, gpu: self.clone(), _rehearsal: rehearsal })
    }
}
