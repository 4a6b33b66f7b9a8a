//! PTX as text: its versions, what is left of nvcc's output, what ptxas reports of it.

/// A version of PTX and what it asks of a driver.
#[derive(Debug, PartialEq, Eq)]
pub struct Version {
    /// As after `.version`.
    pub ptx: &'static str,
    /// The release of CUDA that brought it, as `cuDriverGetVersion` counts: 11020 is 11.2.
    pub cuda: u32,
    /// The first Linux driver of that release. CUDA's compatibility between minor versions leaves out PTX: a driver
    /// reads what was known when it was made.
    pub driver: &'static str,
}

/// Versions that may be tried, ascending, from the first that knows sm_75.
///
/// PTX to CUDA: "PTX ISA", release notes, table of releases. CUDA to driver: "CUDA Toolkit Release Notes", table
/// of toolkits and corresponding driver versions, the first of each; 12.7 has no toolkit, only the r565 drivers.
pub const VERSIONS: &[Version] = &[
    Version { ptx: "6.3", cuda: 10000, driver: "410.48" },
    Version { ptx: "6.4", cuda: 10010, driver: "418.39" },
    Version { ptx: "6.5", cuda: 10020, driver: "440.33" },
    Version { ptx: "7.0", cuda: 11000, driver: "450.51.05" },
    Version { ptx: "7.1", cuda: 11010, driver: "455.23" },
    Version { ptx: "7.2", cuda: 11020, driver: "460.27.03" },
    Version { ptx: "7.3", cuda: 11030, driver: "465.19.01" },
    Version { ptx: "7.4", cuda: 11040, driver: "470.42.01" },
    Version { ptx: "7.5", cuda: 11050, driver: "495.29.05" },
    Version { ptx: "7.6", cuda: 11060, driver: "510.39.01" },
    Version { ptx: "7.7", cuda: 11070, driver: "515.43.04" },
    Version { ptx: "7.8", cuda: 11080, driver: "520.61.05" },
    Version { ptx: "8.0", cuda: 12000, driver: "525.60.13" },
    Version { ptx: "8.1", cuda: 12010, driver: "530.30.02" },
    Version { ptx: "8.2", cuda: 12020, driver: "535.54.03" },
    Version { ptx: "8.3", cuda: 12030, driver: "545.23.06" },
    Version { ptx: "8.4", cuda: 12040, driver: "550.54.14" },
    Version { ptx: "8.5", cuda: 12050, driver: "555.42.02" },
    Version { ptx: "8.6", cuda: 12070, driver: "565" },
    Version { ptx: "8.7", cuda: 12080, driver: "570.26" },
    Version { ptx: "8.8", cuda: 12090, driver: "575.51.03" },
    Version { ptx: "9.0", cuda: 13000, driver: "580.65.06" },
];

/// The version that a text says it has.
pub fn version(text: &str) -> Option<&'static Version> {
    let found = text.lines().find_map(|line| line.strip_prefix(".version "))?;
    VERSIONS.iter().find(|it| it.ptx == found.trim())
}

/// nvcc's output without what says nothing: comments, blank lines, indents, and digits in names that depend on the
/// folder it was made in. Its version is taken off too; the lowest one is put before it later.
pub fn tidy(text: &str) -> String {
    let mut tidy = String::with_capacity(text.len());
    for line in text.lines() {
        let line = without_comment(line).trim().replace(" \t", " ");
        // A hint of which bytes of a load are used would ask for PTX 8.3, and so for new drivers.
        let hint = line.starts_with(".pragma \"used_bytes_mask");
        if !line.is_empty() && !line.starts_with(".version ") && !hint {
            tidy.push_str(&line);
            tidy.push('\n');
        }
    }
    // What a file keeps to itself has eight digits in its name, made from the path of the file.
    for mark in ["_INTERNAL_", "_GLOBAL__N__"] {
        let mut pieces = tidy.split(mark);
        let mut renamed = pieces.next().unwrap_or_default().to_string();
        for piece in pieces {
            let digits = piece.bytes().take(8).take_while(u8::is_ascii_hexdigit).count();
            renamed.push_str(mark);
            renamed.push_str(&"0".repeat(digits));
            renamed.push_str(&piece[digits..]);
        }
        tidy = renamed;
    }
    tidy
}

fn without_comment(line: &str) -> &str {
    let mut quoted = false;
    for (at, byte) in line.bytes().enumerate() {
        quoted ^= byte == b'"';
        if !quoted && line[at..].starts_with("//") {
            return &line[..at];
        }
    }
    line
}

/// What a kernel, or a function that wasn't inlined, takes of the machine.
#[derive(Debug, PartialEq, Eq)]
pub struct Usage {
    pub name: String,
    /// Of a thread; none are told of a function.
    pub registers: u32,
    /// Bytes of a thread in local memory: arrays, and what is spilled.
    pub stack: u32,
    /// Bytes that a thread stores and loads because registers ran out.
    pub spilled: u32,
    /// Bytes of a block, those of a launch not counted.
    pub shared: u32,
}

/// Reads the report of `ptxas --verbose`.
pub fn usages(report: &str) -> Vec<Usage> {
    let mut usages: Vec<Usage> = Vec::new();
    for line in report.lines() {
        if let Some((_, name)) = line.split_once("Function properties for ") {
            usages.push(Usage { name: name.into(), registers: 0, stack: 0, spilled: 0, shared: 0 });
        } else if let Some(usage) = usages.last_mut() {
            let count = |what: &str| -> Option<u32> {
                let before = line.split_once(what)?.0;
                before.rsplit(|it: char| !it.is_ascii_digit()).next()?.parse().ok()
            };
            usage.registers = count(" registers").unwrap_or(usage.registers);
            usage.shared = count(" bytes smem").unwrap_or(usage.shared);
            usage.stack = count(" bytes stack frame").unwrap_or(usage.stack);
            usage.spilled +=
                count(" bytes spill stores").unwrap_or(0) + count(" bytes spill loads").unwrap_or(0);
        }
    }
    usages.sort_by(|a, b| a.name.cmp(&b.name));
    usages
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_but_instructions_is_left() {
        let text = "//\n// Compiler Build ID: CL-1\n//\n\n.version 9.0\n.target sm_75\n\n\t// begin inline asm\n\tret; // done\n\
            \t.pragma \"//\";// x\n\tmov.u64 \t%rd1, _ZN31_INTERNAL_0188d53a_4_t_cu_k33_GLOBAL__N__0188d53a_4_t_cu_k6hiddenE;\n";
        let expected = ".target sm_75\nret;\n.pragma \"//\";\n\
            mov.u64 %rd1, _ZN31_INTERNAL_00000000_4_t_cu_k33_GLOBAL__N__00000000_4_t_cu_k6hiddenE;\n";
        assert_eq!(tidy(text), expected);
    }

    #[test]
    fn versions_are_known() {
        assert_eq!(version("// made\n.version 7.0\n.target sm_80\n").map(|it| it.cuda), Some(11000));
        assert_eq!(version(".version 5.0\n"), None);
        assert!(VERSIONS.is_sorted_by_key(|it| it.cuda));
    }

    #[test]
    fn reports_are_read() {
        let report = "ptxas info    : 52 bytes gmem, 16 bytes cmem[3]\n\
            ptxas info    : Compiling entry function 'scale_f16' for 'sm_75'\n\
            ptxas info    : Function properties for scale_f16\n    \
            16 bytes stack frame, 12 bytes spill stores, 24 bytes spill loads\n\
            ptxas info    : Used 21 registers, used 1 barriers, 256 bytes smem, 372 bytes cmem[0]\n\
            ptxas info    : Compile time = 8.357 ms\n\
            ptxas info    : Function properties for _Z1fI6__halfEfT_\n    \
            0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads\n";
        let usage = |name: &str, registers, stack, spilled, shared| Usage {
            name: name.into(),
            registers,
            stack,
            spilled,
            shared,
        };
        assert_eq!(
            usages(report),
            [usage("_Z1fI6__halfEfT_", 0, 0, 0, 0), usage("scale_f16", 21, 16, 36, 256)]
        );
    }
}
