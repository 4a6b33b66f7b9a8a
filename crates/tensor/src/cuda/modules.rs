//! The kernels' PTX, which is part of the program, by name and architecture.

use std::ffi::{CString, c_uint, c_void};

use cudarc::driver::sys;

use super::describe;
use crate::{Error, Result};

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

/// A module as the driver has it.
pub(super) struct Loaded {
    pub(super) handle: sys::CUmodule,
    /// Its kernels can wait for those ahead of them, see [`super::Launch::early`].
    pub(super) can_wait: bool,
}

/// Whether a driver that takes this CUDA loads the PTX for an architecture.
fn takes(driver: (i32, i32), architecture: u32) -> bool {
    let known = u32::try_from(driver.0 * 1000 + driver.1 * 10).unwrap_or(0);
    let newest = DRIVERS.iter().find(|it| it.0 == architecture).is_none_or(|it| it.1 <= known);
    newest && (architecture < OVERLAPPING || driver >= OVERLAPPING_CUDA)
}

/// Hands the newest PTX of a module that the architecture runs to the driver, which compiles it (and
/// keeps what it compiled in a cache of its own on the disk).
pub(super) fn load(name: &str, architecture: u32, driver: Option<(i32, i32)>) -> Result<Loaded> {
    // What the oldest take is said by the error below, if it is too new.
    let known = driver.unwrap_or(MINIMUM_CUDA);
    let fitting = MODULES
        .iter()
        .filter(|it| it.0 == name && runs(it.1, architecture) && (it.1 <= 80 || takes(known, it.1)));
    let Some((_, found, ptx)) = fitting.max_by_key(|it| it.1) else {
        return Err(Error::Device(format!("there is no kernel module `{name}` for sm_{architecture}")));
    };
    let text = CString::new(*ptx).expect("PTX has no zero");
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
    Ok(Loaded { handle: module, can_wait: (OVERLAPPING..100).contains(found) })
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
