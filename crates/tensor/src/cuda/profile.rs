//! Time on the card by kernel, measured with events around each launch.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::Instant;

use cudarc::driver::{DriverError, result, sys};

use super::Gpu;
use crate::{DType, Device, Operand, Result, Tensor, multiply_on_gpu};

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
    /// What all launches did.
    pub work: Work,
}

/// What a launch has to do.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Work {
    /// Bytes of the tensors that it is given, each moved once.
    pub bytes: f64,
    /// Multiplications and additions, where it is a product.
    pub flops: f64,
}

/// What a card does when nothing holds it up, as it was measured.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct CardRates {
    /// Bytes a second, read and written, of a long copy.
    pub bytes: f64,
    /// Multiplications and additions a second of a large product, by what multiplies matrices here.
    pub flops: f64,
}

/// A launch that was measured, with the events before and after it.
struct Measured {
    name: String,
    work: Work,
    start: sys::CUevent,
    end: sys::CUevent,
}

/// Launches that were measured.
pub(super) struct Profile(Option<Mutex<Vec<Measured>>>);

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
        name: impl FnOnce() -> (String, Work),
        launch: impl FnOnce() -> Result<(), E>,
    ) -> Result<(), E> {
        let Some(launches) = &self.0 else { return launch() };
        let start = mark(stream);
        launch()?;
        if let (Ok(start), Ok(end)) = (start, mark(stream)) {
            let mut launches = launches.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
            let (name, work) = name();
            launches.push(Measured { name, work, start, end });
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
        let mut by_name = BTreeMap::<String, (usize, f64, Work)>::new();
        for Measured { name, work, start, end } in launches {
            // SAFETY: the events were recorded, their stream has been waited for, and each is destroyed once.
            let milliseconds = unsafe {
                let elapsed = result::event::elapsed(start, end);
                let _ = (result::event::destroy(start), result::event::destroy(end));
                elapsed.unwrap_or(0.0)
            };
            let entry = by_name.entry(name).or_default();
            entry.0 += 1;
            entry.1 += f64::from(milliseconds) / 1e3;
            entry.2 = Work { bytes: entry.2.bytes + work.bytes, flops: entry.2.flops + work.flops };
        }
        let times = by_name.into_iter().map(|(name, (count, seconds, work))| KernelTime {
            name,
            count,
            seconds,
            work,
        });
        let mut times: Vec<KernelTime> = times.collect();
        times.sort_by(|a, b| b.seconds.total_cmp(&a.seconds));
        Ok(times)
    }

    /// Measures what the card does at best, in about a second: what kernels are compared with. Bytes are those of
    /// `bytes` copied; the product is of two square matrices of `dtype` as large.
    ///
    /// # Errors
    /// When there is no room, or something that was launched has failed.
    pub fn rates(self: &Arc<Gpu>, bytes: usize, dtype: DType) -> Result<CardRates> {
        const REPEATS: u32 = 20;
        let device = Device::Cuda(self.clone());
        let seconds = |work: &mut dyn FnMut() -> Result<()>| -> Result<f64> {
            work()?;
            self.synchronize()?;
            let start = Instant::now();
            for _ in 0..REPEATS {
                work()?;
            }
            self.synchronize()?;
            Ok(start.elapsed().as_secs_f64() / f64::from(REPEATS))
        };
        let side = (bytes / dtype.size_in_bytes()).isqrt() / 256 * 256;
        // Zeros would take less power, and so be faster than anything.
        let values = (0..side * side).map(|it| ((it * 7919) % 251) as f32 / 251.0 - 0.5).collect();
        let a = Tensor::from_vec(side, side, values)?.to_device_as(&device, dtype)?;
        let mut c = Tensor::zeros(side, side, dtype, &device)?;
        let copied = seconds(&mut || c.copy_from(&a))?;
        let matrix = (side * side * dtype.size_in_bytes()) as f64;
        let multiplied = seconds(&mut || {
            multiply_on_gpu(1.0, Operand::new(&a), Operand::new(&a).transposed(), 0.0, &c, 0..side)
        })?;
        Ok(CardRates { bytes: 2.0 * matrix / copied, flops: 2.0 * (side as f64).powi(3) / multiplied })
    }
}
