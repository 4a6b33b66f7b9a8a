//! `kernels/*.cu` → the PTX in `kernels/ptx`, which is checked in: building Ferrotune needs no nvcc.
//!
//! A source is compiled once for each architecture, and once for each value of a macro if it asks for that.
//! It says so in the comment that it begins with:
//!
//! ```text
//! // compile: HEAD_DIM = 64, 128
//! // archs: 75, 80
//! // compile: HEAD_DIM = 128 for 90a
//! ```
//!
//! where `for` names further architectures, which get these values alone.
//!
//! The files are `<source>[.<value>].sm_<arch>.ptx`: `norm.sm_75.ptx`, `attention.64.sm_80.ptx`. The first line
//! of each has the hash of everything it was made of, so that a stale one is found without a compiler.
//! `modules.rs` lists them for the crate that embeds them.
//!
//! A block of T4 has 64 KiB of shared memory. What a kernel declares with a size stays below: ptxas refuses more
//! than 48 KiB on any architecture. What a launch adds is in no report; the launch has to know.

mod ptx;
mod sources;
mod toolkit;

use std::collections::BTreeMap;
use std::fmt::Write;
use std::fs;
use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use self::ptx::{Usage, Version};
use self::sources::{Unit, units};
use self::toolkit::{Fetch, Toolkit};
use crate::{Result, root};

/// Files compiled at the same time.
const WORKERS: usize = 2;

/// Bytes that a thread may spill without a warning.
const SPILLED: u32 = 64;

/// The list of the files, beside them.
const INDEX: &str = "modules.rs";

/// `cargo xtask kernels`
pub fn run(words: &[&str]) -> Result<()> {
    let (mut fetch, mut show) = (Fetch::No, ShowUsage::No);
    let folder = root().join("kernels");
    for word in words {
        match *word {
            "--check" => return check(&folder),
            "--fetch-nvcc" => fetch = Fetch::Allowed,
            "--verbose" => show = ShowUsage::Yes,
            other => return Err(format!("kernels knows --check, --fetch-nvcc and --verbose, not `{other}`")),
        }
    }
    build(&folder, &root().join("target").join("kernels"), &Toolkit::find(fetch)?, show)
}

/// Whether what each kernel takes of the machine is printed. Then files that are current go through ptxas too.
#[derive(Clone, Copy, PartialEq, Eq)]
enum ShowUsage {
    Yes,
    No,
}

/// Makes what is missing or stale, removes what has no source, and lists all.
fn build(folder: &Path, scratch: &Path, toolkit: &Toolkit, show: ShowUsage) -> Result<()> {
    let outputs = folder.join("ptx");
    for folder in [&outputs, scratch] {
        fs::create_dir_all(folder).map_err(|error| format!("can't create {}: {error}", folder.display()))?;
    }
    let units = units(folder)?;
    for file in surplus(&units, &outputs)?.iter().filter(|file| file.ends_with(".ptx")) {
        fs::remove_file(outputs.join(file)).map_err(|error| format!("can't remove {file}: {error}"))?;
        println!("{file}: removed, it has no source");
    }

    let next = AtomicUsize::new(0);
    let reports = Mutex::new(BTreeMap::new());
    let worker = || {
        while let Some(unit) = units.get(next.fetch_add(1, Ordering::Relaxed)) {
            let current = unit.current(&outputs);
            if current.is_none() || show == ShowUsage::Yes {
                let report = make(unit, current, folder, scratch, toolkit);
                reports.lock().expect("no worker panics").insert(unit.file(), report);
            }
        }
    };
    thread::scope(|scope| {
        for _ in 0..WORKERS {
            scope.spawn(worker);
        }
    });

    let mut failures = Vec::new();
    for (file, report) in reports.into_inner().expect("no worker panics") {
        match report {
            Ok(usages) => print_usages(&file, &usages, show),
            Err(error) => failures.push(error),
        }
    }
    let (path, index) = (outputs.join(INDEX), index(&units, &outputs)?);
    if !read(&path).is_ok_and(|found| found == index) {
        write(&path, &index)?;
    }
    for Sum { arch, files, bytes, version: Version { ptx, cuda, driver } } in sums(&units, &outputs)?.values()
    {
        let (kib, cuda) = (bytes / 1024, format!("{}.{}", cuda / 1000, cuda % 1000 / 10));
        println!("sm_{arch}: {files} files, {kib} KiB, PTX {ptx}: CUDA {cuda}, driver {driver} or newer");
    }
    if failures.is_empty() { Ok(()) } else { Err(failures.join("\n")) }
}

/// Compiles a unit, finds the lowest version that it can have, and writes it. Of one that is current, with its
/// body given, only the usage is found.
fn make(
    unit: &Unit,
    current: Option<String>,
    folder: &Path,
    scratch: &Path,
    toolkit: &Toolkit,
) -> Result<Vec<Usage>> {
    let file = unit.file();
    let named = |error: String| format!("{} for sm_{}: {error}", unit.source, unit.arch);
    let scratch = scratch.join(&file);
    let stale = current.is_none();
    let body = match current {
        Some(body) => body,
        None => ptx::tidy(&toolkit.compile(folder, unit, &scratch).map_err(named)?),
    };
    if !body.contains(".entry ") {
        return Err(named("there is no kernel in it; `// archs: 80` leaves architectures out".into()));
    }
    let (version, report) = toolkit.assemble(&body, &unit.arch, &scratch).map_err(named)?;
    if stale {
        write(&folder.join("ptx").join(&file), &format!("{}\n.version {}\n{body}", unit.head, version.ptx))?;
        println!("{file}: made");
    }
    Ok(ptx::usages(&report))
}

fn print_usages(file: &str, usages: &[Usage], show: ShowUsage) {
    if show == ShowUsage::Yes {
        println!("{file:<48} registers  stack  spilled  shared");
        for Usage { name, registers, stack, spilled, shared } in usages {
            println!("  {name:<46} {registers:>9} {stack:>6} {spilled:>8} {shared:>7}");
        }
    }
    for usage in usages.iter().filter(|usage| usage.spilled > SPILLED) {
        println!("warning: {file}: {} spills {} bytes a thread", usage.name, usage.spilled);
    }
}

/// What the files of an architecture are together.
struct Sum<'a> {
    arch: &'a str,
    files: usize,
    bytes: usize,
    /// The highest version among them.
    version: &'static Version,
}

fn sums<'a>(units: &'a [Unit], outputs: &Path) -> Result<BTreeMap<u32, Sum<'a>>> {
    let mut sums = BTreeMap::new();
    for unit in units.iter().filter(|unit| outputs.join(unit.file()).exists()) {
        let (file, text) = (unit.file(), read(&outputs.join(unit.file()))?);
        let version = ptx::version(&text).ok_or_else(|| format!("{file}: no known .version"))?;
        let empty = Sum { arch: &unit.arch, files: 0, bytes: 0, version };
        let sum = sums.entry(unit.number()).or_insert(empty);
        sum.files += 1;
        sum.bytes += text.len();
        if version.cuda > sum.version.cuda {
            sum.version = version;
        }
    }
    Ok(sums)
}

/// Compares the files with the sources. The error names those that differ.
fn check(folder: &Path) -> Result<()> {
    let outputs = folder.join("ptx");
    let units = units(folder)?;
    let mut wrong = Vec::new();
    for unit in &units {
        let file = unit.file();
        if !outputs.join(&file).exists() {
            wrong.push(format!("kernels/ptx/{file} is missing"));
        } else if unit.current(&outputs).is_none() {
            wrong.push(format!("kernels/ptx/{file} is stale: its sources changed"));
        }
    }
    for file in surplus(&units, &outputs)? {
        wrong.push(format!("kernels/ptx/{file} has no source"));
    }
    if wrong.is_empty() && read(&outputs.join(INDEX)).ok() != Some(index(&units, &outputs)?) {
        wrong.push(format!("kernels/ptx/{INDEX} doesn't list the files beside it"));
    }
    if wrong.is_empty() { Ok(()) } else { Err(format!("{}\nrun `cargo xtask kernels`", wrong.join("\n"))) }
}

/// What is in the folder of outputs and made by no source.
fn surplus(units: &[Unit], outputs: &Path) -> Result<Vec<String>> {
    let mut names = names(outputs)?;
    names.retain(|name| name != INDEX && !units.iter().any(|unit| unit.file() == *name));
    Ok(names)
}

/// `modules.rs`, which the crate that embeds the files includes. A file that isn't there yet is left out, so that
/// the others can be used while one source doesn't compile.
fn index(units: &[Unit], outputs: &Path) -> Result<String> {
    let mut index = String::from(
        "// Made by `cargo xtask kernels`, to be taken in by `include!`.\n\n\
         // Name, architecture, PTX. 75 is for compute capability 7.5 and what is newer; 901 is 90a, for 9.0 alone.\n\
         static MODULES: &[(&str, u32, &str)] = &[\n",
    );
    for unit in units.iter().filter(|unit| outputs.join(unit.file()).exists()) {
        let _ = writeln!(
            index,
            "    (\"{}\", {}, include_str!(\"{}\")),",
            unit.module,
            unit.number(),
            unit.file()
        );
    }
    index.push_str(
        "];\n\n\
         // Architecture, the CUDA that a driver must know to load its files, as cuDriverGetVersion counts, and\n\
         // the first Linux driver that does.\n\
         #[allow(dead_code)]\n\
         static DRIVERS: &[(u32, u32, &str)] = &[\n",
    );
    for (number, Sum { version: Version { cuda, driver, .. }, .. }) in sums(units, outputs)? {
        let _ = writeln!(index, "    ({number}, {cuda}, \"{driver}\"),");
    }
    index.push_str("];\n");
    Ok(index)
}

/// What is in a folder, in order; nothing if there is no such folder.
fn names(folder: &Path) -> Result<Vec<String>> {
    if !folder.exists() {
        return Ok(Vec::new());
    }
    let entries = fs::read_dir(folder).map_err(|error| format!("{}: {error}", folder.display()))?;
    let mut names: Vec<_> =
        entries.flatten().map(|it| it.file_name().to_string_lossy().into_owned()).collect();
    names.sort();
    Ok(names)
}

/// A text, its lines ended as on Linux whatever git made of them.
fn read(path: &Path) -> Result<String> {
    let text = fs::read_to_string(path).map_err(|error| format!("{}: {error}", path.display()))?;
    Ok(text.replace("\r\n", "\n"))
}

fn write(path: &Path, text: &str) -> Result<()> {
    fs::write(path, text).map_err(|error| format!("can't write {}: {error}", path.display()))
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use super::*;

    /// A folder with a header and a source. It has a kernel for compute_80 alone, and an anonymous namespace, which
    /// nvcc names after the folder.
    fn sources(name: &str) -> PathBuf {
        let folder = std::env::temp_dir().join(format!("ferrotune-xtask-{}-{name}", std::process::id()));
        let _ = fs::remove_dir_all(&folder);
        fs::create_dir_all(&folder).unwrap();
        fs::write(
            folder.join("add.cuh"),
            "__device__ inline float add(float a, float b) { return a + b; }\n",
        )
        .unwrap();
        let source = "// compile: WIDTH = 2, 4\n#include <cuda_bf16.h>\n#include \"add.cuh\"\n\
            namespace { __device__ float kept[WIDTH]; }\n\
            extern \"C\" __global__ void add_f32(float* x) { kept[threadIdx.x] = x[0] = add(x[0], kept[0]); }\n\
            #if __CUDA_ARCH__ >= 800\n\
            extern \"C\" __global__ void add_bf16(__nv_bfloat16* x) { x[0] = __hadd(x[0], x[1]); }\n\
            #endif\n";
        fs::write(folder.join("add.cu"), source).unwrap();
        folder
    }

    /// Files such as the compiler would make.
    fn pretend(folder: &Path) {
        let outputs = folder.join("ptx");
        fs::create_dir_all(&outputs).unwrap();
        let units = units(folder).unwrap();
        for unit in &units {
            fs::write(outputs.join(unit.file()), format!("{}\n.version 7.0\n.entry x\n", unit.head)).unwrap();
        }
        fs::write(outputs.join(INDEX), index(&units, &outputs).unwrap()).unwrap();
    }

    #[test]
    fn the_ptx_in_the_tree_is_made_of_the_sources_in_the_tree() {
        check(&root().join("kernels")).unwrap_or_else(|error| panic!("{error}"));
    }

    #[test]
    fn files_that_are_stale_or_missing_or_too_many_are_named() {
        let folder = sources("stale");
        let outputs = folder.join("ptx");
        let says = |expected: &[&str]| {
            let error = check(&folder).unwrap_err();
            assert_eq!(error.lines().count(), expected.len() + 1, "{error}");
            assert!(
                expected.iter().all(|it| error.contains(it)) && error.contains("cargo xtask kernels"),
                "{error}"
            );
        };
        says(&["add.2.sm_75.ptx is missing", "add.4.sm_75", "add.2.sm_80", "add.4.sm_80"]);
        pretend(&folder);
        check(&folder).unwrap();
        fs::write(outputs.join("old.sm_75.ptx"), "").unwrap();
        fs::remove_file(outputs.join("add.2.sm_80.ptx")).unwrap();
        says(&["add.2.sm_80.ptx is missing", "old.sm_75.ptx has no source"]);
        fs::remove_file(outputs.join("old.sm_75.ptx")).unwrap();
        pretend(&folder);
        fs::write(outputs.join(INDEX), "[]").unwrap();
        says(&["modules.rs"]);
        fs::write(folder.join("add.cuh"), "\n").unwrap();
        says(&["add.2.sm_75.ptx is stale", "add.4.sm_75", "add.2.sm_80", "add.4.sm_80"]);
        fs::remove_dir_all(folder).unwrap();
    }

    #[test]
    fn line_ends_of_another_system_change_nothing() {
        let folder = sources("line-ends");
        pretend(&folder);
        for file in ["add.cu", "add.cuh", "ptx/add.2.sm_75.ptx", "ptx/modules.rs"] {
            let text = fs::read_to_string(folder.join(file)).unwrap();
            fs::write(folder.join(file), text.replace('\n', "\r\n")).unwrap();
        }
        check(&folder).unwrap();
        fs::remove_dir_all(folder).unwrap();
    }

    #[test]
    fn the_same_sources_make_the_same_ptx_anywhere() {
        let toolkit = match Toolkit::find(Fetch::No) {
            Ok(toolkit) => toolkit,
            Err(error) => return eprintln!("skipped: {error}"),
        };
        let [here, there] = ["here", "there"].map(|name| {
            let folder = sources(name);
            let outputs = folder.join("ptx");
            build(&folder, &folder.join("scratch"), &toolkit, ShowUsage::No)
                .unwrap_or_else(|error| panic!("{error}"));
            check(&folder).unwrap();
            let files = names(&outputs).unwrap();
            let texts = files.iter().map(|file| read(&outputs.join(file)).unwrap()).collect::<Vec<_>>();
            fs::remove_dir_all(folder).unwrap();
            (files, texts)
        });
        assert!(here == there);
        assert_eq!(
            here.0,
            ["add.2.sm_75.ptx", "add.2.sm_80.ptx", "add.4.sm_75.ptx", "add.4.sm_80.ptx", INDEX]
        );
        // Nothing in it is newer than its architecture.
        assert_eq!(ptx::version(&here.1[0]).unwrap().ptx, "6.3");
        assert_eq!(ptx::version(&here.1[1]).unwrap().ptx, "7.0");
        assert!(!here.1[0].contains("add_bf16") && here.1[1].contains("add_bf16"));
    }
}
