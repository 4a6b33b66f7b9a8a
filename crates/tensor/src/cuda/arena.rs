//! Memory of a pass that is recorded: a recording with memory nodes could not have launches that overlap, and would
//! take and free as often as it is repeated.

use std::cell::RefCell;
use std::collections::HashMap;
use std::sync::{Arc, Mutex};

use cudarc::driver::sys;

use super::Gpu;
use super::buffer::{allocate, free};
use crate::{Error, Result};

/// Memory that buffers made in a pass come from and go back to. A rehearsal fills it; a recording of the same pass
/// then finds all that it needs.
#[derive(Debug)]
pub(super) struct Arena {
    gpu: Arc<Gpu>,
    free: Mutex<HashMap<usize, Vec<sys::CUdeviceptr>>>,
    all: Mutex<Vec<sys::CUdeviceptr>>,
}

impl Drop for Arena {
    fn drop(&mut self) {
        for pointer in self.all.get_mut().unwrap_or_else(|poisoned| poisoned.into_inner()).drain(..) {
            free(&self.gpu, pointer);
        }
    }
}

impl Arena {
    pub(super) fn new(gpu: &Arc<Gpu>) -> Arc<Arena> {
        Arc::new(Arena { gpu: gpu.clone(), free: Mutex::default(), all: Mutex::default() })
    }

    fn take(&self, bytes: usize, step: Step) -> Result<sys::CUdeviceptr> {
        let mut free = self.free.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        if let Some(pointer) = free.get_mut(&bytes).and_then(Vec::pop) {
            return Ok(pointer);
        }
        if step == Step::Recorded {
            return Err(Error::msg(format!(
                "a recorded pass wants {bytes} bytes that its rehearsal did not"
            )));
        }
        let pointer = allocate(&self.gpu, bytes)?;
        self.all.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).push(pointer);
        Ok(pointer)
    }

    /// What comes later is in the stream's order, as with memory that is freed.
    pub(super) fn give_back(&self, bytes: usize, pointer: sys::CUdeviceptr) {
        let mut free = self.free.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        free.entry(bytes).or_default().push(pointer);
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Step {
    Rehearsed,
    Recorded,
}

/// The pass that this thread is in.
struct Pass {
    arena: Arc<Arena>,
    step: Step,
    /// The last that was asked for was a kernel: the next one may begin before it has ended.
    after_kernel: bool,
}

thread_local! {
    static PASS: RefCell<Option<Pass>> = const { RefCell::new(None) };
}

/// Runs `work` as a pass of this thread, whose memory on the arena's card is the arena's.
pub(super) fn within<T>(arena: &Arc<Arena>, step: Step, work: impl FnOnce() -> T) -> T {
    /// The pass ends also where `work` panics.
    struct End;
    impl Drop for End {
        fn drop(&mut self) {
            PASS.with_borrow_mut(|pass| *pass = None);
        }
    }
    PASS.with_borrow_mut(|pass| *pass = Some(Pass { arena: arena.clone(), step, after_kernel: false }));
    let _end = End;
    work()
}

/// Memory of the pass, with the arena that it belongs to; none outside of passes on this card.
pub(super) fn take(gpu: &Arc<Gpu>, bytes: usize) -> Result<Option<(sys::CUdeviceptr, Arc<Arena>)>> {
    PASS.with_borrow(|pass| {
        let Some(pass) = pass.as_ref().filter(|it| Arc::ptr_eq(&it.arena.gpu, gpu)) else { return Ok(None) };
        Ok(Some((pass.arena.take(bytes, pass.step)?, pass.arena.clone())))
    })
}

/// Whether a launch is recorded right after another one.
pub(super) fn follows_kernel() -> bool {
    PASS.with_borrow(|pass| pass.as_ref().is_some_and(|it| it.step == Step::Recorded && it.after_kernel))
}

/// Says what was asked for last.
pub(super) fn was_kernel(kernel: bool) {
    PASS.with_borrow_mut(|pass| {
        if let Some(pass) = pass {
            pass.after_kernel = kernel;
        }
    });
}
