//! nvcc and ptxas: found, or fetched; and run.

use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::ptx::{VERSIONS, Version};
use super::sources::Unit;
use super::{read, write};
use crate::{Result, python, root, run};

/// The packages of a CUDA toolkit that only compiles, each with its version and hash. It needs the system's g++.
const PINS: &str = include_str!("../../cuda-requirements.txt");

/// What becomes of a machine without nvcc.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Fetch {
    Allowed,
    No,
}

/// CUDA's compiler and assembler.
pub struct Toolkit {
    nvcc: PathBuf,
    ptxas: PathBuf,
}

impl Toolkit {
    /// In `CUDA_HOME`, `CUDA_PATH`, `PATH` or target/cuda. Only the pinned version will do: others make other PTX of
    /// the same sources, and who compiles next would find changes that nobody made.
    pub fn find(fetch: Fetch) -> Result<Self> {
        let wanted = nvcc_version();
        let here = root().join("target").join("cuda");
        let homes = ["CUDA_HOME", "CUDA_PATH"].into_iter().filter_map(env::var_os);
        let mut folders: Vec<PathBuf> = homes.map(|home| Path::new(&home).join("bin")).collect();
        folders.extend(env::var_os("PATH").iter().flat_map(env::split_paths));
        folders.push(here.join("bin"));
        let mut others = Vec::new();
        for folder in folders {
            match Self::inside(&folder) {
                Some((toolkit, version)) if version == wanted => return Ok(toolkit),
                Some((_, version)) => others.push(format!("{version} is in {}", folder.display())),
                None => {}
            }
        }
        if fetch == Fetch::Allowed {
            install(&here)?;
            return match Self::inside(&here.join("bin")) {
                Some((toolkit, version)) if version == wanted => Ok(toolkit),
                _ => Err(format!("{}: expected nvcc {wanted} after pip, but it doesn't run", here.display())),
            };
        }
        let others = if others.is_empty() { String::new() } else { format!(" ({})", others.join(", ")) };
        Err(format!(
            "no nvcc {wanted} in CUDA_HOME, CUDA_PATH, PATH or target/cuda{others}; \
             `cargo xtask kernels --fetch-nvcc` brings it (100 MB, with pip)"
        ))
    }

    /// The toolkit whose programs are in this folder, and its version.
    fn inside(folder: &Path) -> Option<(Self, String)> {
        let program = |name: &str| folder.join(format!("{name}{}", env::consts::EXE_SUFFIX));
        // ptxas is beside the true nvcc, which may not be beside a link to it.
        let nvcc = fs::canonicalize(program("nvcc")).ok()?;
        let ptxas = nvcc.with_file_name(program("ptxas").file_name()?);
        let output = Command::new(&nvcc).arg("--version").output().ok()?;
        let text = String::from_utf8_lossy(&output.stdout);
        // Cuda compilation tools, release 13.0, V13.0.88
        let version = text.lines().find_map(|line| line.rsplit_once(", V"))?.1.trim().to_string();
        ptxas.is_file().then_some((Self { nvcc, ptxas }, version))
    }

    /// The PTX of a unit as nvcc writes it. nvcc runs in the folder of the source: no other path gets into the text.
    pub fn compile(&self, folder: &Path, unit: &Unit, scratch: &Path) -> Result<String> {
        let mut nvcc = Command::new(&self.nvcc);
        nvcc.current_dir(folder).args(&unit.flags).arg(&unit.source).arg("--output-file").arg(scratch);
        nvcc.env_remove("NVCC_PREPEND_FLAGS").env_remove("NVCC_APPEND_FLAGS");
        captured(&mut nvcc)?;
        read(scratch)
    }

    /// The lowest version that ptxas takes these instructions in, and its report.
    pub fn assemble(&self, body: &str, arch: &str, scratch: &Path) -> Result<(&'static Version, String)> {
        let mut complaint = String::new();
        for version in VERSIONS {
            write(scratch, &format!(".version {}\n{body}", version.ptx))?;
            let mut ptxas = Command::new(&self.ptxas);
            ptxas.arg("--verbose").arg("--gpu-name").arg(format!("sm_{arch}")).arg(scratch);
            match captured(ptxas.arg("--output-file").arg(scratch.with_extension("cubin"))) {
                Ok(report) => return Ok((version, report)),
                // "requires PTX ISA .version 7.0 or later", "PTX .version 6.3 does not support .target sm_80"
                Err(error) if error.contains(" .version ") => complaint = error,
                Err(error) => return Err(error),
            }
        }
        Err(format!("no version in the table of xtask/src/kernels/ptx.rs is high enough\n{complaint}"))
    }
}

/// The packages with their versions, without their hashes.
pub fn packages() -> String {
    PINS.split_whitespace().filter(|word| word.contains("==")).collect::<Vec<_>>().join(" ")
}

fn nvcc_version() -> &'static str {
    let pin = PINS.split_whitespace().find_map(|word| word.strip_prefix("nvidia-cuda-nvcc=="));
    pin.expect("xtask/cuda-requirements.txt has nvcc")
}

fn install(home: &Path) -> Result<()> {
    if !cfg!(all(target_os = "linux", target_arch = "x86_64")) {
        return Err(format!(
            "nvcc is fetched for Linux on x86_64 only; install CUDA with nvcc {} and set CUDA_HOME",
            nvcc_version()
        ));
    }
    let python = python::with_pip("nvcc")?;
    eprintln!("fetching nvcc {} (about 100 MB) with pip", nvcc_version());
    let failed = |what: &Path, error| format!("{}: {error}", what.display());
    // Unpacked beside, then renamed, so that the name means the whole toolkit.
    let part = home.with_extension("part");
    let _ = fs::remove_dir_all(&part);
    let mut pip = Command::new(python);
    pip.args(["-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps", "--no-compile"]);
    pip.args(["--only-binary", ":all:", "--require-hashes", "--requirement", "xtask/cuda-requirements.txt"]);
    run(pip.arg("--target").arg(&part).env("PIP_ROOT_USER_ACTION", "ignore").current_dir(root()))?;
    let _ = fs::remove_dir_all(home);
    fs::rename(part.join("nvidia").join("cu13"), home).map_err(|error| failed(home, error))?;
    fs::remove_dir_all(&part).map_err(|error| failed(&part, error))
}

/// What a command printed; where it failed, that is the error.
fn captured(command: &mut Command) -> Result<String> {
    let program = Path::new(command.get_program()).display().to_string();
    let output = command.output().map_err(|error| format!("can't run {program}: {error}"))?;
    let printed =
        format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    if output.status.success() {
        Ok(printed)
    } else {
        Err(format!("{program}: {}\n{printed}", output.status))
    }
}
