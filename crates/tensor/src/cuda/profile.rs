//! Time on the card by kernel, measured with events around each launch.

use std::collections::BTreeMap;
use std::sync::Mutex;

use cudarc::driver::{DriverError, result, sys};

use super::Gpu;
use crate::Result;

/// Set, it makes a GPU measure every launch: FERROTUNE_PROFILE=1. It costs some speed.
const SWITCH: &str = "FERROTUNE_PROFILE";

/// What one kernel took.
#[derive(Clone, Debug, PartialEq)]
pub struct KernelTime {
    /// Its name; for products also layout and sizes.
    pub name: String,
    /// Launches.
    pub count: usize,
    /// Seconds of all launches.
    pub seconds: f64,
}

/// Launches that were measured, with the events before and after each.
pub(super) struct Profile(Option<Mutex<Vec<(String, sys::CUevent, sys::CUevent)>>>);

impl Profile {
    pub(super) fn from_env() -> Profile {
        Profile(std::env::var_os(SWITCH).map(|_| Mutex::default()))
    }

    pub(super) fn measures(&self) -> bool {
        self.0.is_some()
    }

    /// Runs a launch, measured if it is wanted.
    pub(super) fn around<E>(
        &self,
        stream: sys::CUstream,
        name: impl FnOnce() -> String,
        launch: impl FnOnce() -> Result<(), E>,
    ) -> Result<(), E> {
        let Some(launches) = &self.0 else { return launch() };
        let start = mark(stream);
        launch()?;
        if let (Ok(start), Ok(end)) = (start, mark(stream)) {
            let mut launches = launches.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
            launches.push((name(), start, end));
        }
        Ok(())
    }
}

fn mark(stream: sys::CUstream) -> Result<sys::CUevent, DriverError> {
    let event = result::event::create(sys::CUevent_flags::CU_EVENT_DEFAULT)?;
    // SAFETY: both are alive.
    unsafe { result::event::record(event, stream) }?;
    Ok(event)
}

impl Gpu {
    /// Kernels by the time they took since the last call, the longest first; none unless
    /// `FERROTUNE_PROFILE` is set.
    ///
    /// # Errors
    /// When something that was launched has failed.
    pub fn kernel_times(&self) -> Result<Vec<KernelTime>> {
        let Some(launches) = &self.profile.0 else { return Ok(Vec::new()) };
        self.synchronize()?;
        let launches = std::mem::take(&mut *launches.lock().unwrap_or_else(|poisoned| poisoned.into_inner()));
        let mut by_name = BTreeMap::<String, (usize, f64)>::new();
        for (name, start, end) in launches {
            // SAFETY: the events were recorded, their stream has been waited for, and each is destroyed once.
            let milliseconds = unsafe {
                let elapsed = result::event::elapsed(start, end);
                let _ = (result::event::destroy(start), result::event::destroy(end));
                elapsed.unwrap_or(0.0)
            };
            let entry = by_name.entry(name).or_default();
            *entry = (entry.0 + 1, entry.1 + f64::from(milliseconds) / 1e3);
        }
        let times = by_name.into_iter().map(|(name, (count, seconds))| KernelTime { name, count, seconds });
        let mut times: Vec<KernelTime> = times.collect();
        times.sort_by(|a, b| b.seconds.total_cmp(&a.seconds));
        Ok(times)
    }
}
