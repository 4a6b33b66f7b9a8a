//! Which of CUDA's libraries are there, and where they were looked for.

use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use cudarc::driver::{CudaContext, sys};

use super::describe;

/// A library that the GPU path loads at run time.
#[derive(Clone, Debug)]
pub struct CudaLibrary {
    /// `cuda` (the driver) or `cublasLt`.
    pub name: &'static str,
    /// What was tried, in order: names for the loader, then folders.
    pub looked_for: Vec<String>,
    /// The one that loads.
    pub found: Option<PathBuf>,
}

/// What of CUDA this machine has.
#[derive(Clone, Debug)]
pub struct CudaStatus {
    /// The libraries, the driver first.
    pub libraries: Vec<CudaLibrary>,
    /// The newest CUDA version that the driver takes, as (major, minor).
    pub driver_version: Option<(i32, i32)>,
    /// Why the driver can't be used, where it is there and can't.
    pub error: Option<String>,
    /// The cards, by the driver's numbers.
    pub cards: Vec<CudaCard>,
}

/// A card as the driver tells of it.
#[derive(Clone, Debug)]
pub struct CudaCard {
    /// Its name.
    pub name: String,
    /// Compute capability.
    pub capability: (i32, i32),
    /// Bytes of its memory.
    pub memory: u64,
    /// Streaming multiprocessors.
    pub multiprocessors: i32,
}

impl CudaStatus {
    /// The driver's library.
    pub fn driver(&self) -> &CudaLibrary {
        &self.libraries[0]
    }
}

/// Looks for the driver and the libraries without needing either.
pub fn cuda_status() -> CudaStatus {
    let driver = driver();
    let mut status = CudaStatus {
        libraries: vec![driver.clone(), cublas_lt().clone()],
        driver_version: None,
        error: None,
        cards: Vec::new(),
    };
    if driver.found.is_none() {
        return status;
    }
    let mut version = 0;
    // SAFETY: the driver is present; this call needs no context.
    if unsafe { sys::cuDriverGetVersion(&mut version) }.result().is_ok() {
        status.driver_version = Some((version / 1000, version % 1000 / 10));
    }
    match CudaContext::device_count() {
        Ok(count) => status.cards = (0..count.max(0)).filter_map(card).collect(),
        Err(error) => status.error = Some(format!("the NVIDIA driver doesn't start: {}", describe(error))),
    }
    status
}

/// Asked without a context, which would take memory and a second.
fn card(ordinal: i32) -> Option<CudaCard> {
    use cudarc::driver::result::device;
    use sys::CUdevice_attribute as Attribute;
    let handle = device::get(ordinal).ok()?;
    // SAFETY: the device was just handed out by the driver.
    let attribute = |attribute: Attribute| unsafe { device::get_attribute(handle, attribute) }.unwrap_or(0);
    Some(CudaCard {
        name: device::get_name(handle).ok()?,
        capability: (
            attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR),
            attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR),
        ),
        // SAFETY: as above.
        memory: unsafe { device::total_mem(handle) }.unwrap_or(0) as u64,
        multiprocessors: attribute(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT),
    })
}

fn driver() -> &'static CudaLibrary {
    static FOUND: OnceLock<CudaLibrary> = OnceLock::new();
    FOUND.get_or_init(|| {
        let looked_for = names("cuda", &["1"]);
        // cudarc panics where a library is missing, so it is asked before its first call.
        // SAFETY: loading the driver runs its initialisers only.
        let present = unsafe { sys::is_culib_present() };
        let found = present.then(|| loaded("libcuda.so").unwrap_or_else(|| PathBuf::from(&looked_for[0])));
        CudaLibrary { name: "cuda", looked_for, found }
    })
}

/// cuBLASLt, loaded if it is anywhere. cudarc asks the loader by name; a library that was loaded by its
/// path before is what the loader then finds.
pub(super) fn cublas_lt() -> &'static CudaLibrary {
    static FOUND: OnceLock<CudaLibrary> = OnceLock::new();
    FOUND.get_or_init(|| {
        let mut library =
            CudaLibrary { name: "cublasLt", looked_for: names("cublasLt", &["13", "12", "11"]), found: None };
        if env::var("FERROTUNE_CUBLASLT").is_ok_and(|it| it == "off") {
            library.looked_for = vec!["nowhere, because FERROTUNE_CUBLASLT=off".to_string()];
            return library;
        }
        // SAFETY: loading the vendor's library runs its initialisers only.
        if !unsafe { cudarc::cublaslt::sys::is_culib_present() } {
            for folder in folders() {
                let files = library.looked_for.iter().map(|name| folder.join(name)).find(|it| it.is_file());
                // SAFETY: as above.
                if let Some(Ok(opened)) = files.map(|file| unsafe { libloading::Library::new(file) }) {
                    std::mem::forget(opened); // stays loaded for cudarc
                    break;
                }
            }
            library.looked_for.extend(folders().iter().map(|it| it.display().to_string()));
        }
        // SAFETY: as above.
        if unsafe { cudarc::cublaslt::sys::is_culib_present() } {
            library.found =
                Some(loaded("libcublasLt.so").unwrap_or_else(|| PathBuf::from(&library.looked_for[0])));
        }
        library
    })
}

/// File names that the loader is asked for.
fn names(library: &str, majors: &[&str]) -> Vec<String> {
    if cfg!(windows) {
        return match library {
            "cuda" => vec!["nvcuda.dll".to_string()],
            _ => majors.iter().map(|major| format!("{library}64_{major}.dll")).collect(),
        };
    }
    let plain = format!("lib{library}.so");
    majors.iter().map(|major| format!("{plain}.{major}")).chain([plain.clone()]).collect()
}

/// Folders that hold CUDA's libraries beside the loader's own: toolkits, and Python's packages.
fn folders() -> Vec<PathBuf> {
    let mut folders = Vec::new();
    for variable in ["CUDA_HOME", "CUDA_PATH"] {
        if let Some(home) = env::var_os(variable).filter(|it| !it.is_empty()).map(PathBuf::from) {
            folders.extend([home.join("lib64"), home.join("lib")]);
        }
    }
    folders.push(PathBuf::from("/usr/local/cuda/lib64"));
    let mut roots: Vec<PathBuf> =
        ["VIRTUAL_ENV", "CONDA_PREFIX"].iter().filter_map(env::var_os).map(PathBuf::from).collect();
    roots.extend(env::var_os("HOME").map(|home| PathBuf::from(home).join(".local")));
    roots.extend([PathBuf::from("/usr/local"), PathBuf::from("/usr")]);
    for root in roots {
        for packages in python_packages(&root.join("lib")) {
            let nvidia = packages.join("nvidia");
            folders.extend(["cu13", "cublas"].map(|part| nvidia.join(part).join("lib")));
        }
    }
    folders.retain(|it| it.is_dir());
    folders
}

/// `lib/python3*/site-packages` and `dist-packages`.
fn python_packages(lib: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(lib).into_iter().flatten().flatten();
    let pythons = entries
        .map(|it| it.path())
        .filter(|it| it.file_name().is_some_and(|name| name.to_string_lossy().starts_with("python3")));
    pythons.flat_map(|it| ["site-packages", "dist-packages"].map(|part| it.join(part))).collect()
}

/// The path of a library that this process has loaded, where the system tells.
fn loaded(name: &str) -> Option<PathBuf> {
    let maps = fs::read_to_string("/proc/self/maps").ok()?;
    let paths = maps.lines().filter_map(|line| line.split_whitespace().nth(5));
    paths
        .map(Path::new)
        .find(|it| it.file_name().is_some_and(|it| it.to_string_lossy().starts_with(name)))
        .map(Path::to_path_buf)
}
