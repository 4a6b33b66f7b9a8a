//! What the machine says about itself. What can't be found out is `None`, never an error.

use std::fs;
use std::io;
use std::path::Path;
use std::sync::Arc;

use ferrotune_tensor::{CardRates, DType, Gpu};

/// Name and version of the system.
pub fn system() -> String {
    let field = |text: &str, name: &str| {
        let value = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix('='))?;
        Some(value.trim_matches('"').to_string())
    };
    let release = fs::read_to_string("/etc/os-release").ok();
    let name = release.and_then(|text| field(&text, "PRETTY_NAME"));
    let name = name.unwrap_or_else(|| std::env::consts::OS.to_string());
    match fs::read_to_string("/proc/sys/kernel/osrelease") {
        Ok(kernel) => format!("{name}, kernel {}", kernel.trim()),
        Err(_) => name,
    }
}

/// The processor's name.
pub fn cpu_model() -> String {
    let info = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model =
        info.lines().find_map(|line| line.strip_prefix("model name")?.split_once(':').map(|it| it.1.trim()));
    model.unwrap_or("name unknown").to_string()
}

/// The instructions that products can use, and whether this processor and system have them.
#[cfg(target_arch = "x86_64")]
pub fn cpu_features() -> Vec<(&'static str, bool)> {
    vec![
        ("avx2", std::is_x86_feature_detected!("avx2")),
        ("fma", std::is_x86_feature_detected!("fma")),
        ("avx512f", std::is_x86_feature_detected!("avx512f")),
        ("avx512_bf16", std::is_x86_feature_detected!("avx512bf16")),
        ("avx512_fp16", std::is_x86_feature_detected!("avx512fp16")),
        // The standard library's names for AMX aren't stable; the kernel lists them.
        ("amx_bf16", has_flag("amx_bf16")),
        ("amx_int8", has_flag("amx_int8")),
    ]
}

/// The instructions that products can use, and whether this processor and system have them.
#[cfg(target_arch = "aarch64")]
pub fn cpu_features() -> Vec<(&'static str, bool)> {
    vec![
        ("neon", std::arch::is_aarch64_feature_detected!("neon")),
        ("fp16", std::arch::is_aarch64_feature_detected!("fp16")),
        ("bf16", std::arch::is_aarch64_feature_detected!("bf16")),
    ]
}

/// The instructions that products can use, and whether this processor and system have them.
#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
pub fn cpu_features() -> Vec<(&'static str, bool)> {
    Vec::new()
}

#[cfg(target_arch = "x86_64")]
fn has_flag(name: &str) -> bool {
    let info = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let flags = info.lines().find(|line| line.starts_with("flags"));
    flags.is_some_and(|flags| flags.split_whitespace().any(|flag| flag == name))
}

/// Cores that the container may use, where it is limited.
pub fn cgroup_cores() -> Option<f64> {
    if let Ok(text) = fs::read_to_string("/sys/fs/cgroup/cpu.max") {
        let (quota, period) = text.trim().split_once(' ')?;
        return Some(quota.parse::<f64>().ok()? / period.parse::<f64>().ok()?);
    }
    let number = |name: &str| -> Option<f64> {
        fs::read_to_string(format!("/sys/fs/cgroup/cpu/{name}")).ok()?.trim().parse().ok()
    };
    let quota = number("cpu.cfs_quota_us").filter(|quota| *quota > 0.0)?;
    Some(quota / number("cpu.cfs_period_us")?)
}

/// Memory of the machine and how much of it is available, in bytes.
pub fn memory() -> Option<(u64, u64)> {
    let info = fs::read_to_string("/proc/meminfo").ok()?;
    let field = |name: &str| -> Option<u64> {
        let line = info.lines().find_map(|line| line.strip_prefix(name))?;
        line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok().map(|kib| kib * 1024)
    };
    Some((field("MemTotal:")?, field("MemAvailable:")?))
}

/// Bytes of memory that the container may use, where it is limited.
pub fn cgroup_memory() -> Option<u64> {
    let read = |path: &str| fs::read_to_string(path).ok()?.trim().parse::<u64>().ok();
    read("/sys/fs/cgroup/memory.max").or_else(|| read("/sys/fs/cgroup/memory/memory.limit_in_bytes"))
}

/// Bytes of memory this process can still take: what is available, within the container's limit.
pub fn available_memory() -> Option<u64> {
    let (_, available) = memory()?;
    Some(cgroup_memory().map_or(available, |limit| limit.min(available)))
}

/// Free bytes on the disk of this folder, or of the nearest one above it that exists.
#[cfg(unix)]
pub fn free_space(folder: &Path) -> Option<u64> {
    let there = folder.ancestors().find(|it| it.exists() && !it.as_os_str().is_empty());
    let there = there.unwrap_or(Path::new("."));
    let disk = rustix::fs::statvfs(there).ok()?;
    Some(disk.f_bavail * disk.f_frsize)
}

/// Free bytes on the disk of this folder, or of the nearest one above it that exists.
#[cfg(not(unix))]
pub fn free_space(_folder: &Path) -> Option<u64> {
    None
}

/// With `FERROTUNE_PROFILE` set: the time of each kernel since the last call, the longest first, beside what the card can
/// do, which is given back.
///
/// # Errors
/// When something that was launched has failed, or nothing can be written.
pub fn write_kernel_times(
    gpu: &Arc<Gpu>,
    dtype: DType,
    out: &mut impl io::Write,
) -> anyhow::Result<Option<CardRates>> {
    let times = gpu.kernel_times()?;
    if times.is_empty() {
        return Ok(None);
    }
    let rates = gpu.rates(1 << 27, dtype)?;
    // Measuring was measured too.
    gpu.kernel_times()?;
    let all: f64 = times.iter().map(|it| it.seconds).sum();
    writeln!(
        out,
        "the card: {:.2} TB/s in a copy, {:.0} TFLOP/s in a product; bytes are those of what a kernel is given, each moved once",
        rates.bytes / 1e12,
        rates.flops / 1e12
    )?;
    for it in times {
        let each = 1e6 * it.seconds / it.count as f64;
        let (rate, best, unit) = match it.work.flops > 0.0 {
            true => (it.work.flops / it.seconds / 1e12, rates.flops / 1e12, "TFLOP/s"),
            false => (it.work.bytes / it.seconds / 1e9, rates.bytes / 1e9, "GB/s"),
        };
        let share = |part: f64, whole: f64| format!("{:.1} %", 100.0 * part / whole);
        writeln!(
            out,
            "{:>10.1} ms {:>7} {:>8} × {each:>9.1} us {rate:>9.0} {unit:<7} {:>8} of the best  {}",
            1e3 * it.seconds,
            share(it.seconds, all),
            it.count,
            share(rate, best),
            it.name
        )?;
    }
    Ok(Some(rates))
}
