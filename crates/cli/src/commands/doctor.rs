//! `ferrotune doctor`: what this machine has, and what will run on it.

use std::io::Write as _;
use std::path::Path;

use ferrotune_tensor::product::cpu_products;
use ferrotune_tensor::{Device, MINIMUM_CUDA, MINIMUM_DRIVER, cuda_status};

use crate::Outcome;
use crate::console::{Color, Console, bytes};
use crate::machine;

/// Prints aligned lines.
pub fn run(console: &Console) -> anyhow::Result<Outcome> {
    let mut out = console.out();
    let mut line = |name: &str, value: String| {
        let name = Color::Bold.paint(console.color_out, &format!("{name:<12}"));
        writeln!(out, "{name} {value}")
    };

    line(
        "ferrotune",
        format!("{} ({}, {})", env!("CARGO_PKG_VERSION"), std::env::consts::ARCH, std::env::consts::OS),
    )?;
    line("system", machine::system())?;

    let features = machine::cpu_features();
    let (yes, no): (Vec<_>, Vec<_>) = features.iter().partition(|(_, present)| *present);
    let names = |list: &[&(&str, bool)]| list.iter().map(|(name, _)| *name).collect::<Vec<_>>().join(" ");
    line("cpu", machine::cpu_model())?;
    line("", format!("has: {}; has not: {}", or_none(&names(&yes)), or_none(&names(&no))))?;
    line("cores", cores())?;
    line("memory", memory())?;

    let cuda = cuda_status();
    if cuda.cards.is_empty() {
        line("gpu", "none found".to_string())?;
    }
    for (ordinal, card) in cuda.cards.iter().enumerate() {
        let (major, minor) = card.capability;
        let memory = bytes(card.memory);
        line("gpu", format!("cuda:{ordinal} {}, {memory}, compute capability {major}.{minor}", card.name))?;
    }
    let driver = match (cuda.driver_version, &cuda.error) {
        (_, Some(error)) => error.clone(),
        (Some(version), None) => {
            let (major, minor) = version;
            let verdict = if version < MINIMUM_CUDA { "too old" } else { "new enough" };
            format!("takes CUDA up to {major}.{minor}: {verdict}, {MINIMUM_DRIVER} or newer is needed")
        }
        (None, None) => format!("not found; {MINIMUM_DRIVER} or newer is needed for a GPU"),
    };
    line("driver", driver)?;
    for library in &cuda.libraries {
        let found = match &library.found {
            Some(path) => format!("found: {}", path.display()),
            None => format!("not found; looked for {} on the loader's path", library.looked_for.join(", ")),
        };
        line(&format!("lib{}", library.name), found)?;
    }

    let cache = match ferrotune_hub::cache_dir() {
        Ok(folder) => {
            let models = folder.join("models");
            format!("{}, {}", models.display(), cache_state(&models))
        }
        Err(error) => error.to_string(),
    };
    line("model cache", cache)?;
    let training = match Device::open("auto") {
        Ok(Device::Cpu) => format!("will use the cpu; products in {}", cpu_products()),
        Ok(Device::Cuda(gpu)) => {
            let dtype = if gpu.has_bf16() { "bf16" } else { "f16" };
            format!("will use {gpu:?} in {dtype}; products by {}", gpu.products())
        }
        Err(error) => error.to_string(),
    };
    line("training", training)?;
    out.flush()?;
    Ok(Outcome::Done)
}

fn or_none(text: &str) -> &str {
    if text.is_empty() { "none of these" } else { text }
}

fn cores() -> String {
    let usable = std::thread::available_parallelism().map_or(1, usize::from);
    match machine::cgroup_cores() {
        Some(limit) => format!("{usable} usable; the container allows {limit:.1}"),
        None => format!("{usable} usable"),
    }
}

fn memory() -> String {
    let Some((total, available)) = machine::memory() else { return "unknown on this system".to_string() };
    let limit = machine::cgroup_memory().filter(|limit| *limit < total);
    let limit = limit.map_or(String::new(), |limit| format!("; the container allows {}", bytes(limit)));
    format!("{}, {} available{limit}", bytes(total), bytes(available))
}

fn cache_state(cache: &Path) -> String {
    let models = std::fs::read_dir(cache).map_or(0, |entries| entries.flatten().count());
    let state = match models {
        0 => "empty".to_string(),
        1 => "1 model".to_string(),
        models => format!("{models} models"),
    };
    match machine::free_space(cache) {
        Some(free) => format!("{state}, {} free on its disk", bytes(free)),
        None => state,
    }
}
