use std::path::PathBuf;
use std::sync::Arc;

use crate::{Error, Result};

/// Where a tensor's numbers are, and who computes with them.
#[derive(Clone, Debug)]
pub enum Device {
    /// The machine's own cores.
    Cpu,
    /// One NVIDIA GPU.
    Cuda(Arc<Gpu>),
}

impl Device {
    /// Opens the device that `device:` of a config names: `auto`, `cpu`, `cuda` or `cuda:N`.
    ///
    /// # Errors
    /// When the name is none of these or the GPU can't be used; the message says what to install.
    pub fn open(name: &str) -> Result<Device> {
        match name {
            "auto" | "cpu" => Ok(Device::Cpu),
            _ if name == "cuda" || name.starts_with("cuda:") => {
                let ordinal = match name.strip_prefix("cuda:") {
                    Some(number) => number.parse().map_err(|_| {
                        Error::msg(format!("device `{name}`: expected a number after `cuda:`"))
                    })?,
                    None => 0,
                };
                Ok(Device::Cuda(Arc::new(Gpu::open(ordinal)?)))
            }
            _ => Err(Error::msg(format!("device `{name}`: expected auto, cpu, cuda or cuda:N"))),
        }
    }

    /// `cpu` or `cuda:N`.
    pub fn name(&self) -> String {
        match self {
            Device::Cpu => "cpu".to_string(),
            Device::Cuda(gpu) => format!("cuda:{}", gpu.ordinal),
        }
    }
}

/// A GPU in use.
#[derive(Debug)]
pub struct Gpu {
    /// The driver's number of the card.
    pub ordinal: usize,
}

impl Gpu {
    /// Opens the card with this number.
    ///
    /// # Errors
    /// Always, so far: the CUDA arms are not built yet. The message also says when the driver is missing.
    pub fn open(ordinal: usize) -> Result<Gpu> {
        let status = cuda_status();
        if let Some(missing) = status.libraries.iter().find(|it| it.name == "cuda" && it.found.is_none()) {
            return Err(Error::Device(format!(
                "device `cuda:{ordinal}`: the NVIDIA driver's library {} was not found; install the driver, or set `device: cpu`",
                missing.looked_for.join(" or ")
            )));
        }
        Err(Error::Device(format!(
            "device `cuda:{ordinal}`: training on a GPU is not built yet; set `device: cpu`"
        )))
    }
}

/// A library that the GPU path loads at run time.
#[derive(Debug)]
pub struct CudaLibrary {
    /// `cuda` (the driver) or `cublasLt`.
    pub name: &'static str,
    /// File names that were tried, in order.
    pub looked_for: Vec<String>,
    /// The one that loads.
    pub found: Option<PathBuf>,
}

/// What of CUDA this machine has.
#[derive(Debug)]
pub struct CudaStatus {
    /// The libraries, the driver first.
    pub libraries: Vec<CudaLibrary>,
    /// The newest CUDA version that the driver takes, as (major, minor).
    pub driver_version: Option<(i32, i32)>,
    /// Name and memory in bytes of each card.
    pub cards: Vec<(String, usize)>,
}

/// Looks for the driver and the libraries without needing either.
pub fn cuda_status() -> CudaStatus {
    // cudarc panics where a library is missing, so each is asked for before its first call.
    // SAFETY: loading the vendor's libraries runs their initialisers only.
    let (driver, cublas_lt) =
        unsafe { (cudarc::driver::sys::is_culib_present(), cudarc::cublaslt::sys::is_culib_present()) };
    let library = |name: &'static str, present: bool| {
        let looked_for: Vec<String> =
            [".so", ".so.1", ".so.13", ".so.12"].iter().map(|end| format!("lib{name}{end}")).collect();
        let found = present.then(|| PathBuf::from(&looked_for[0]));
        CudaLibrary { name, looked_for, found }
    };
    let mut status = CudaStatus {
        libraries: vec![library("cuda", driver), library("cublasLt", cublas_lt)],
        driver_version: None,
        cards: Vec::new(),
    };
    if driver {
        let mut version = 0;
        // SAFETY: the driver is present; this call needs no context.
        if unsafe { cudarc::driver::sys::cuDriverGetVersion(&mut version) }.result().is_ok() {
            status.driver_version = Some((version / 1000, version % 1000 / 10));
        }
        let count = cudarc::driver::CudaContext::device_count().unwrap_or(0);
        for ordinal in 0..count.max(0) as usize {
            if let Ok(context) = cudarc::driver::CudaContext::new(ordinal) {
                let memory = context.total_mem().unwrap_or(0);
                status.cards.push((context.name().unwrap_or_default(), memory));
            }
        }
    }
    status
}
