//! Tests on a GPU, built here and carried to a machine that has one: it needs no Rust, and reaches nothing.
//!
//! `target/gpu-test` becomes, beside a checkout, all that `tests/gpu/run.py` asks for:
//!
//! - `programs.tar.xz`: the program, and in `deps` the test binaries, stripped; in `root`, where these look for fixtures
//! - `python.tar.xz`: [`PYTHON`], what is compared with and isn't there
//! - `model/…NofM`: SmolLM2, in parts; run.py keeps those that it sees and joins them

use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::{Result, cargo, program, python, root, run, shown, test_model};

/// Crates with tests that mean something on a GPU.
const CRATES: [&str; 6] = ["tensor", "nn", "quant", "lora", "trainer", "tests"];
/// Wheels that a machine with PyTorch, transformers and PEFT may not have.
const PYTHON: [&str; 1] = ["bitsandbytes==0.50.2"];
/// The libraries of bitsandbytes that are kept: that of the CUDA of the machine's PyTorch, and the CPU's.
const PYTHON_LIBRARIES: [&str; 2] = ["libbitsandbytes_cuda130.so", "libbitsandbytes_cpu.so"];
/// What one transfer takes beside the checkout.
const TRANSFER: u64 = 46 << 20;
/// A part of the model: two fit a transfer.
const PART: usize = 20 << 20;

/// `cargo xtask gpu-test`
pub fn prepare() -> Result<()> {
    let folder = root().join("target").join("gpu-test");
    let mut pieces = vec![programs(&folder)?, wheels(&folder)?];
    pieces.extend(model(&folder.join("model"))?);
    println!("to carry beside the checkout, in as many transfers as there are lines:");
    for transfer in transfers(&pieces)? {
        println!("  {}", transfer.join(" "));
    }
    println!("to run there, after each of them or after the last: python3 tests/gpu/run.py --help");
    Ok(())
}

/// The program and the test binaries.
fn programs(folder: &Path) -> Result<PathBuf> {
    // The whole workspace, as `cargo xtask check` builds it: other packages would be other features, and all built anew.
    run(&mut cargo(&["build", "--release", "--locked", "--workspace", "--bins"]))?;
    let mut build = cargo(&["test", "--release", "--locked", "--workspace", "--no-run", "--lib"]);
    build.args(["--test", "devices", "--test", "parity", "--test", "families", "--test", "program"]);
    build.arg("--message-format=json-render-diagnostics").stderr(Stdio::inherit());
    let output = build.output().map_err(|error| format!("can't run `{}`: {error}", shown(&build)))?;
    if !output.status.success() {
        return Err(format!("`{}` failed ({})", shown(&build), output.status));
    }

    let scratch = folder.join("programs");
    let _ = fs::remove_dir_all(&scratch);
    create(&scratch.join("deps"))?;
    let strip = |from: &Path, to: PathBuf| run(Command::new("strip").arg("-o").arg(&to).arg(from));
    strip(&program(), scratch.join("ferrotune"))?;
    for (name, path) in String::from_utf8_lossy(&output.stdout).lines().filter_map(test_binary) {
        strip(&path, scratch.join("deps").join(name))?;
    }
    let written = fs::write(scratch.join("root"), root().display().to_string());
    written.map_err(|error| format!("can't write into {}: {error}", scratch.display()))?;
    pack(&scratch, folder.join("programs.tar.xz"))
}

/// The name that a test binary of one of the crates gets, and where cargo's message says that it is.
fn test_binary(message: &str) -> Option<(String, PathBuf)> {
    let field = |name: &str| Some(message.split_once(&format!("\"{name}\":\""))?.1.split_once('"')?.0);
    let path = field("executable")?;
    // Of the crate's folder, so that two crates can have a test of one name.
    let folder = Path::new(field("manifest_path")?).parent()?.file_name()?.to_str()?;
    let kind = if message.contains("\"kind\":[\"test\"]") { field("name")? } else { "units" };
    CRATES.contains(&folder).then(|| (format!("{folder}-{kind}"), PathBuf::from(path)))
}

/// What Python lacks there; kept once it has been fetched.
fn wheels(folder: &Path) -> Result<PathBuf> {
    let packed = folder.join("python.tar.xz");
    if packed.is_file() {
        return Ok(packed);
    }
    let scratch = folder.join("python");
    let _ = fs::remove_dir_all(&scratch);
    create(&scratch)?;
    let python = python::with_pip("bitsandbytes")?;
    let mut pip = Command::new(&python);
    pip.args(["-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps", "--dest"]);
    run(pip.arg(&scratch).args(PYTHON))?;
    for wheel in files(&scratch)?.iter().filter(|it| it.extension() == Some(OsStr::new("whl"))) {
        run(Command::new(&python).args(["-m", "zipfile", "-e"]).arg(wheel).arg(&scratch))?;
        remove(wheel)?;
    }
    let library = |path: &PathBuf| path.extension() == Some(OsStr::new("so"));
    for path in files(&scratch.join("bitsandbytes"))?.iter().filter(|it| library(it)) {
        if !PYTHON_LIBRARIES.iter().any(|it| path.ends_with(it)) {
            remove(path)?;
        }
    }
    pack(&scratch, packed)
}

/// The model's parts.
fn model(folder: &Path) -> Result<Vec<PathBuf>> {
    let file = test_model::fetch()?;
    let bytes = fs::read(&file).map_err(|error| format!("{}: {error}", file.display()))?;
    let name = file.file_name().unwrap_or_default().to_string_lossy();
    create(folder)?;
    let count = bytes.len().div_ceil(PART);
    let part = |(n, part): (usize, &[u8])| {
        let path = folder.join(format!("{name}.{}of{count}", n + 1));
        let written = fs::write(&path, part);
        written.map(|()| path.clone()).map_err(|error| format!("can't write {}: {error}", path.display()))
    };
    bytes.chunks(PART).enumerate().map(part).collect()
}

/// Packs a folder's contents. What the binaries have in common, the kernels above all, is packed once.
fn pack(folder: &Path, packed: PathBuf) -> Result<PathBuf> {
    let mut tar = Command::new("tar");
    tar.env("XZ_OPT", "--lzma2=preset=1,dict=192MiB").arg("-cJf").arg(&packed).arg("-C").arg(folder).arg(".");
    run(&mut tar)?;
    fs::remove_dir_all(folder).map_err(|error| format!("can't remove {}: {error}", folder.display()))?;
    Ok(packed)
}

/// The pieces with their sizes, in order, as many as fit each transfer.
fn transfers(pieces: &[PathBuf]) -> Result<Vec<Vec<String>>> {
    let (mut all, mut full): (Vec<Vec<String>>, u64) = (Vec::new(), u64::MAX);
    for piece in pieces {
        let size = fs::metadata(piece).map_err(|error| format!("{}: {error}", piece.display()))?.len();
        if full.saturating_add(size) > TRANSFER {
            all.push(Vec::new());
            full = 0;
        }
        full += size;
        let name = piece.strip_prefix(root()).unwrap_or(piece).display();
        let shown = format!("{name} ({:.1} MiB)", size as f64 / (1 << 20) as f64);
        all.last_mut().expect("a transfer").push(shown);
    }
    Ok(all)
}

fn files(folder: &Path) -> Result<Vec<PathBuf>> {
    let entries = fs::read_dir(folder).map_err(|error| format!("{}: {error}", folder.display()))?;
    Ok(entries.flatten().map(|it| it.path()).collect())
}

fn create(folder: &Path) -> Result<()> {
    fs::create_dir_all(folder).map_err(|error| format!("can't create {}: {error}", folder.display()))
}

fn remove(file: &Path) -> Result<()> {
    fs::remove_file(file).map_err(|error| format!("can't remove {}: {error}", file.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn test_binaries_have_names_of_their_own() {
        let message = |folder: &str, kind: &str, name: &str| {
            format!(
                "{{\"reason\":\"compiler-artifact\",\"manifest_path\":\"/r/crates/{folder}/Cargo.toml\",\"target\":{{\"kind\":[\"{kind}\"],\
                 \"crate_types\":[\"bin\"],\"name\":\"{name}\"}},\"executable\":\"/t/{name}-0a\"}}"
            )
        };
        let name =
            |folder: &str, kind: &str, name: &str| test_binary(&message(folder, kind, name)).map(|it| it.0);
        assert_eq!(name("nn", "test", "devices").as_deref(), Some("nn-devices"));
        assert_eq!(name("nn", "lib", "ferrotune_nn").as_deref(), Some("nn-units"));
        assert_eq!(name("hub", "lib", "ferrotune_hub"), None);
        assert_eq!(test_binary("{\"reason\":\"compiler-artifact\",\"executable\":null}"), None);
    }
}
