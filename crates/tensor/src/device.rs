use std::sync::Arc;

use crate::cuda::{Gpu, cuda_status};
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
    /// Opens the device that `device:` of a config names: `auto` (the first GPU, where there is one),
    /// `cpu`, `cuda` or `cuda:N`.
    ///
    /// # Errors
    /// When the name is none of these or the GPU can't be used; the message says what to install.
    pub fn open(name: &str) -> Result<Device> {
        match name {
            "cpu" => Ok(Device::Cpu),
            "auto" if cuda_status().cards.is_empty() => Ok(Device::Cpu),
            "auto" => Ok(Device::Cuda(Arc::new(Gpu::open(0)?))),
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

    /// The CPU, and the first GPU when one answers: for tests, whose bodies hold on each.
    pub fn each() -> Vec<Device> {
        let gpu = Device::open("auto").ok().filter(|it| it.gpu().is_some());
        [Device::Cpu].into_iter().chain(gpu).collect()
    }

    /// The card, where it is one.
    pub fn gpu(&self) -> Option<&Arc<Gpu>> {
        match self {
            Device::Cpu => None,
            Device::Cuda(gpu) => Some(gpu),
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
