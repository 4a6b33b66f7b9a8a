//! `ferrotune doctor`: what this machine has, and what will run on it.

use std::io::Write as _;
use std::path::Path;

use ferrotune_tensor::cuda_status;
use ferrotune_tensor::product::cpu_products;

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
    for (ordinal, (name, memory)) in cuda.cards.iter().enumerate() {
        line("gpu", format!("cuda:{ordinal} {name}, {}", bytes(*memory as u64)))?;
    }
    let driver = cuda
        .driver_version
        .map_or("not found".to_string(), |(major, minor)| format!("takes CUDA up to {major}.{minor}"));
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
    line("training", format!("will use the cpu; products in {}", cpu_products()))?;
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
