//! The process's memory as the system counts it.

/// Bytes of memory now resident, where the system tells.
pub fn resident_bytes() -> Option<u64> {
    status_field("VmRSS:")
}

/// The most bytes that have been resident at once, where the system tells.
pub fn peak_resident_bytes() -> Option<u64> {
    status_field("VmHWM:")
}

/// A field of /proc/self/status, which Linux gives in KiB.
fn status_field(name: &str) -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix(name))?;
    line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok().map(|kib| kib * 1024)
}
