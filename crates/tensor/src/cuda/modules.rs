//! The kernels' PTX, which is part of the program, by name and architecture.

use std::collections::HashMap;
use std::ffi::{CString, c_uint, c_void};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::thread::{self, JoinHandle};

use cudarc::driver::sys;

use super::{Gpu, LaunchFacts, describe, suffix};
use crate::{DType, Error, Result};

include!("../../../../kernels/ptx/modules.rs");

/// The oldest compute capability that kernels are compiled for, × 10.
pub(super) const OLDEST: u32 = 75;

/// What a machine's driver must be.
///
/// Memory pools came with CUDA 11.2; the kernels themselves ask for less (`DRIVERS`).
pub const MINIMUM_DRIVER: &str = "NVIDIA driver 460 (CUDA 11.2)";

/// The CUDA version that such a driver takes, as (major, minor).
pub const MINIMUM_CUDA: (i32, i32) = (11, 2);

/// A capability that kernels are to be chosen for instead of the card's, so that those for older cards
/// can be tried on a newer one.
const FORCED_ARCHITECTURE: &str = "FERROTUNE_CUDA_ARCH";

/// What [`FORCED_ARCHITECTURE`] says.
pub(super) fn forced_architecture() -> Result<Option<u32>> {
    let Ok(text) = std::env::var(FORCED_ARCHITECTURE) else { return Ok(None) };
    match text.parse() {
        Ok(architecture) if architecture >= OLDEST => Ok(Some(architecture)),
        _ => {
            Err(Error::Device(format!("{FORCED_ARCHITECTURE}={text}: expected {OLDEST} or more, such as 80")))
        }
    }
}

/// Whether an architecture runs a module: PTX is for what it names and what is newer, but with 9.0's own
/// instructions (901 for `90a`) for that alone.
fn runs(module: u32, architecture: u32) -> bool {
    if module > 900 { module / 10 == architecture } else { module <= architecture }
}

/// The first architecture whose kernels may begin before those ahead of them have ended, and the CUDA that a driver
/// must know to record that.
const OVERLAPPING: u32 = 90;
const OVERLAPPING_CUDA: (i32, i32) = (12, 4);

/// Kernels of one number type of a module as the driver has them, and those that were asked for.
pub(super) struct Module {
    pub(super) handle: sys::CUmodule,
    /// They can wait for those ahead of them, see [`super::Launch::early`].
    pub(super) can_wait: bool,
    pub(super) functions: HashMap<String, sys::CUfunction>,
    pub(super) facts: HashMap<String, LaunchFacts>,
}

// SAFETY: the driver takes its handles from any thread.
unsafe impl Send for Module {}

/// A module that is there, or why it isn't; whoever asks while it is being compiled waits.
type Cell = OnceLock<Result<Mutex<Module>, String>>;

/// Modules by name and number type: a run uses one or two types, and the others needn't be compiled.
#[derive(Default)]
pub(super) struct Modules(Mutex<HashMap<(String, &'static str), Arc<Cell>>>);

impl Modules {
    /// Calls `body` with the kernels of a module that this one is among; loads them first, if need be.
    pub(super) fn with<T>(
        &self,
        gpu: &Gpu,
        module: &str,
        kernel: &str,
        body: impl FnOnce(&mut Module) -> Result<T>,
    ) -> Result<T> {
        gpu.bind()?;
        let numbers = numbers_of(kernel);
        let cell = {
            let mut all = self.0.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
            all.entry((module.to_string(), numbers)).or_default().clone()
        };
        let loaded = cell.get_or_init(|| {
            load(module, numbers, gpu.architecture, gpu.driver_version).map_err(|error| error.to_string())
        });
        match loaded {
            Ok(loaded) => body(&mut loaded.lock().unwrap_or_else(|poisoned| poisoned.into_inner())),
            Err(message) => Err(Error::Device(message.clone())),
        }
    }
}

/// Modules that are loaded in the background; dropping it waits for all of them.
pub struct Loading(Vec<JoinHandle<()>>);

impl Drop for Loading {
    fn drop(&mut self) {
        for worker in self.0.drain(..) {
            // What failed in it fails again, and is told, where the kernel is asked for.
            let _ = worker.join();
        }
    }
}

impl Gpu {
    /// Has the driver compile kernels while other things go on: those of a number type, or those without one, of each
    /// module. They would else be compiled when the first of them is asked for, one module after the other. What isn't
    /// there is passed over. What multiplies matrices is opened too.
    pub fn load_in_background(self: &Arc<Gpu>, wanted: &[(String, Option<DType>)]) -> Loading {
        let mut all = Vec::new();
        for (module, dtype) in wanted {
            let numbers = dtype.map_or(Ok(""), suffix);
            let found = newest(module, self.architecture, self.driver_version);
            if let (Ok(numbers), Some((.., ptx))) = (numbers, found) {
                let text = kernels_of(ptx, numbers);
                if text.contains(ENTRY) {
                    all.push((text.len(), module.clone(), numbers));
                }
            }
        }
        // The longest first, so that none is left alone at the end.
        all.sort_by(|a, b| b.cmp(a));
        let count = thread::available_parallelism().map_or(1, |it| it.get()).min(all.len());
        let (all, next) = (Arc::new(all), Arc::new(AtomicUsize::new(0)));
        let mut workers: Vec<_> = (0..count)
            .map(|_| {
                let (gpu, all, next) = (self.clone(), all.clone(), next.clone());
                thread::spawn(move || {
                    while let Some((_, module, numbers)) = all.get(next.fetch_add(1, Ordering::Relaxed)) {
                        let _ = gpu.modules.with(&gpu, module, numbers, |_| Ok(()));
                    }
                })
            })
            .collect();
        let gpu = self.clone();
        workers.push(thread::spawn(move || _ = gpu.blas()));
        Loading(workers)
    }
}

/// Number types in the names of kernels.
const NUMBERS: [&str; 3] = ["f32", "f16", "bf16"];
/// What a kernel begins with.
const ENTRY: &str = ".entry ";

/// The number type that a kernel's name says first; none of those that have no variants.
fn numbers_of(kernel: &str) -> &'static str {
    kernel.split('_').find_map(|word| NUMBERS.into_iter().find(|it| *it == word)).unwrap_or("")
}

/// A PTX text without the kernels of other number types. Lines begin without indents, see `xtask/src/kernels/ptx.rs`.
fn kernels_of(ptx: &str, numbers: &str) -> String {
    let mut kept = String::with_capacity(ptx.len() / 2);
    // Inside of a kernel: whether it is left out, and how deep in braces.
    let mut inside: Option<(bool, usize)> = None;
    for line in ptx.lines() {
        if inside.is_none()
            && let Some((_, name)) = line.split_once(ENTRY)
        {
            inside = Some((numbers_of(name.trim_end_matches(['(', ' '])) != numbers, 0));
        }
        if !inside.is_some_and(|(left_out, _)| left_out) {
            kept.push_str(line);
            kept.push('\n');
        }
        if let Some((_, depth)) = &mut inside {
            let count = |brace: char| line.matches(brace).count();
            *depth = (*depth + count('{')).saturating_sub(count('}'));
            if *depth == 0 && line.ends_with('}') {
                inside = None;
            }
        }
    }
    kept
}

/// Whether a driver that takes this CUDA loads the PTX for an architecture.
fn takes(driver: (i32, i32), architecture: u32) -> bool {
    let known = u32::try_from(driver.0 * 1000 + driver.1 * 10).unwrap_or(0);
    let newest = DRIVERS.iter().find(|it| it.0 == architecture).is_none_or(|it| it.1 <= known);
    newest && (architecture < OVERLAPPING || driver >= OVERLAPPING_CUDA)
}

/// The newest PTX of a module that the architecture runs and the driver takes.
fn newest(
    name: &str,
    architecture: u32,
    driver: Option<(i32, i32)>,
) -> Option<&'static (&'static str, u32, &'static str)> {
    // What the oldest PTX asks of a driver is said where it doesn't load.
    let known = driver.unwrap_or(MINIMUM_CUDA);
    let fitting = MODULES
        .iter()
        .filter(|it| it.0 == name && runs(it.1, architecture) && (it.1 <= 80 || takes(known, it.1)));
    fitting.max_by_key(|it| it.1)
}

/// Hands the kernels of a number type to the driver, which compiles them (and keeps what it compiled in a cache of
/// its own on the disk).
fn load(name: &str, numbers: &str, architecture: u32, driver: Option<(i32, i32)>) -> Result<Mutex<Module>> {
    let Some((_, found, ptx)) = newest(name, architecture, driver) else {
        return Err(Error::Device(format!("there is no kernel module `{name}` for sm_{architecture}")));
    };
    let text = CString::new(kernels_of(ptx, numbers)).expect("PTX has no zero");
    let mut log = [0u8; 4096];
    let mut options =
        [sys::CUjit_option::CU_JIT_ERROR_LOG_BUFFER, sys::CUjit_option::CU_JIT_ERROR_LOG_BUFFER_SIZE_BYTES];
    let mut values = [log.as_mut_ptr().cast::<c_void>(), log.len() as *mut c_void];
    let mut module = std::ptr::null_mut();
    // SAFETY: text and log outlive the call; the number of options is that of the arrays.
    let loaded = unsafe {
        let count = options.len() as c_uint;
        sys::cuModuleLoadDataEx(
            &mut module,
            text.as_ptr().cast(),
            count,
            options.as_mut_ptr(),
            values.as_mut_ptr(),
        )
    };
    loaded.result().map_err(|error| {
        let log = String::from_utf8_lossy(&log);
        let (log, why) = (log.trim_matches(['\0', '\n', ' ']), describe(error));
        Error::Device(format!(
            "the driver can't load the kernels of `{name}` for sm_{architecture}: {why}; {MINIMUM_DRIVER} or newer is needed. {log}"
        ))
    })?;
    let can_wait = (OVERLAPPING..100).contains(found);
    Ok(Mutex::new(Module { handle: module, can_wait, functions: HashMap::new(), facts: HashMap::new() }))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// PTX 7.2 is CUDA 11.2's, which [`MINIMUM_DRIVER`] names.
    const NEWEST_PTX: (u32, u32) = (7, 2);

    #[test]
    fn the_oldest_driver_loads_every_module() {
        assert!(MODULES.len() >= 40, "{} modules", MODULES.len());
        for (name, architecture, ptx) in MODULES.iter().filter(|it| it.1 < OVERLAPPING) {
            let field = |start: &str| {
                let line = ptx.lines().find_map(|line| line.strip_prefix(start));
                line.unwrap_or_else(|| panic!("{name}: no `{start}`")).trim().to_string()
            };
            let (major, minor) =
                field(".version").split_once('.').map(|(a, b)| (a.to_string(), b.to_string())).unwrap();
            let version: (u32, u32) = (major.parse().unwrap(), minor.parse().unwrap());
            assert!(version <= NEWEST_PTX, "{name}.sm_{architecture} needs PTX {version:?}");
            assert_eq!(field(".target"), format!("sm_{architecture}"), "{name}");
        }
    }

    #[test]
    fn instructions_of_one_architecture_stay_on_it() {
        assert!(runs(80, 80) && runs(75, 90) && runs(901, 90));
        assert!(!runs(80, 75) && !runs(901, 80) && !runs(901, 100) && !runs(901, 120));
        assert!(MODULES.iter().any(|it| it.1 == 901), "no module is for 9.0 alone");
    }

    #[test]
    fn kernels_that_may_overlap_wait() {
        let newer: Vec<_> = MODULES.iter().filter(|it| it.1 == OVERLAPPING).collect();
        assert!(newer.iter().any(|it| it.0 == "row"), "no kernels for sm_{OVERLAPPING}");
        for (name, _, ptx) in newer {
            for kernel in ptx.split(".entry ").skip(1) {
                let line = kernel.lines().next().unwrap();
                assert!(kernel.contains("griddepcontrol.wait"), "{name}: {line} does not wait");
            }
        }
    }

    #[test]
    fn kernels_are_loaded_by_number_type() {
        for (kernel, expected) in [
            ("norm_forward_bf16", "bf16"),
            ("attention_backward_dq_f16_launch", "f16"),
            ("matmul_nt_bf16_f32_thin", "bf16"),
            ("adamw_8bit", ""),
            ("rope_table", ""),
        ] {
            assert_eq!(numbers_of(kernel), expected, "{kernel}");
        }
        for (name, architecture, ptx) in MODULES {
            let names = |text: &str| -> Vec<String> {
                let entries = text.split(ENTRY).skip(1);
                entries.map(|it| it.split('(').next().unwrap().trim().to_string()).collect()
            };
            let mut found = Vec::new();
            for numbers in NUMBERS.into_iter().chain([""]) {
                let part = kernels_of(ptx, numbers);
                let (mine, count) = (names(&part), |what: char| part.matches(what).count());
                assert!(mine.iter().all(|it| numbers_of(it) == numbers), "{name}: {mine:?} for `{numbers}`");
                assert_eq!(count('{'), count('}'), "{name}.sm_{architecture} for `{numbers}`");
                assert!(part.contains(".address_size 64"), "{name}: no head");
                found.extend(mine);
            }
            let mut all = names(ptx);
            all.sort();
            found.sort();
            assert_eq!(found, all, "{name}.sm_{architecture}");
        }
    }

    #[test]
    fn drivers_get_what_they_take() {
        assert!(takes((12, 4), OVERLAPPING) && takes((13, 0), OVERLAPPING));
        assert!(!takes((12, 3), OVERLAPPING) && !takes((11, 2), OVERLAPPING));
        assert!(takes((11, 2), 80) && takes((11, 2), OLDEST));
    }

    #[test]
    fn kernels_for_old_cards_keep_to_their_limits() {
        let (mut seen, old) = (0, MODULES.iter().filter(|it| it.1 == OLDEST));
        for (name, _, ptx) in old {
            assert!(!ptx.contains(".bf16"), "{name}: sm_{OLDEST} has no bf16");
            // `{kernel}_launch[3]` in bytes: rows, threads, dynamic shared memory; zeros at the end are left out.
            for line in ptx.lines().filter(|line| line.contains("_launch[12]")) {
                let bytes = line.split(['{', '}']).nth(1).unwrap_or_else(|| panic!("{name}: {line}"));
                let bytes = bytes.split(',').map(|it| it.trim().parse::<usize>().unwrap());
                let shared: usize =
                    bytes.skip(8).zip([1, 1 << 8, 1 << 16, 1 << 24]).map(|(byte, unit)| byte * unit).sum();
                assert!(shared <= 64 << 10, "{name}: {shared} bytes of shared memory in {line}");
                seen += 1;
            }
        }
        assert!(seen >= 20, "only {seen} kernels say how they are launched");
    }
}
