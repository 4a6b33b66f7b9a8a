//! `checkpoint-N` folders: the adapter as PEFT reads it, and what an exact continuation needs.
//!
//! A folder is written beside, synced and renamed: under its final name it is always whole. What disks do
//! to it afterwards is found by checksums, in the form that `sha256sum --check` reads.

use std::fmt::Write as _;
use std::fs::{self, File};
use std::io::Read as _;
use std::path::{Path, PathBuf};

use candle_core::safetensors;
use ferrotune_tensor::{DType, Error, Result, Tensor};
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use crate::optimizer::State;
use crate::{Best, LossScale, Plateau, ScheduleKind, Settings, Window, history};

const STATE_FILE: &str = "ferrotune_state.json";
const OPTIMIZER_FILE: &str = "optimizer.safetensors";
const CHECKSUMS_FILE: &str = "SHA256SUMS";

/// Where a run stands, besides its parameters.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RunState {
    /// Optimizer steps taken.
    pub step: usize,
    /// Epoch of the next batch.
    pub epoch: u64,
    /// Batch within the epoch.
    pub position: u64,
    /// Tokens that went through the model so far.
    pub total_tokens: u64,
    /// Seconds trained so far.
    pub elapsed_seconds: f64,
    /// Of f16 training.
    pub loss_scale: Option<LossScale>,
    /// Steps left out, one after the other, because loss or gradients weren't finite.
    pub not_finite_in_a_row: u32,
    /// What has been added up for the next line of the log.
    pub window: Window,
    /// The best evaluation.
    pub best: Option<Best>,
    /// Evaluations since then.
    pub without_progress: usize,
    /// Of `reduce_lr_on_plateau`, with the rate that it has come to.
    pub plateau: Option<(Plateau, f64)>,
    /// The log as trainer_state.json has it, where it is kept.
    #[serde(skip)]
    pub history: Vec<serde_json::Value>,
    /// What must be the same for the run to go on, as (what, value).
    pub identity: Vec<(String, String)>,
}

impl RunState {
    /// Before the first step.
    pub(crate) fn new(settings: &Settings) -> RunState {
        RunState {
            step: 0,
            epoch: 0,
            position: 0,
            total_tokens: 0,
            elapsed_seconds: 0.0,
            loss_scale: Some(settings.loss_scale),
            not_finite_in_a_row: 0,
            window: Window::default(),
            best: None,
            without_progress: 0,
            plateau: match &settings.schedule.kind {
                ScheduleKind::ReduceLrOnPlateau(plateau) => {
                    Some((plateau.clone(), settings.schedule.learning_rate))
                }
                _ => None,
            },
            history: Vec::new(),
            identity: settings.identity.clone(),
        }
    }

    /// Checks that a run with this identity may go on from here.
    ///
    /// # Errors
    /// Naming what has changed.
    pub fn check_identity(&self, identity: &[(String, String)]) -> Result<()> {
        let mut changed = Vec::new();
        for (what, now) in identity {
            let then = self.identity.iter().find(|(name, _)| name == what).map(|(_, value)| value);
            if let Some(then) = then.filter(|then| *then != now) {
                changed.push(format!("{what} was {then} when the checkpoint was written and is {now} now"));
            }
        }
        match changed.is_empty() {
            true => Ok(()),
            false => Err(Error::msg(format!(
                "{}; a resumed run must go on with the same, or start a new one in another output_dir",
                changed.join(", ")
            ))),
        }
    }
}

/// The checkpoints of a run by their steps, oldest first, whole or not.
pub fn checkpoints(output_dir: &Path) -> Vec<(usize, PathBuf)> {
    let steps = |path: &Path| path.file_name()?.to_str()?.strip_prefix("checkpoint-")?.parse::<usize>().ok();
    let entries = fs::read_dir(output_dir).into_iter().flatten().flatten().map(|entry| entry.path());
    let mut all: Vec<_> = entries.filter_map(|path| Some((steps(&path)?, path))).collect();
    all.sort();
    all
}

/// The newest whole checkpoint of a run.
#[derive(Debug, Default)]
pub struct Newest {
    /// None where no checkpoint is whole.
    pub whole: Option<PathBuf>,
    /// Why newer ones were passed over.
    pub damaged: Vec<Error>,
}

/// Looks for the newest checkpoint whose files are all what was written.
pub fn newest_checkpoint(output_dir: &Path) -> Newest {
    let mut newest = Newest::default();
    for (_, path) in checkpoints(output_dir).into_iter().rev() {
        match verify_checkpoint(&path) {
            Ok(()) => {
                newest.whole = Some(path);
                break;
            }
            Err(error) => newest.damaged.push(error),
        }
    }
    newest
}

/// Compares the files of a checkpoint with their checksums.
///
/// # Errors
/// Naming the file that is missing or isn't what was written.
pub fn verify_checkpoint(checkpoint: &Path) -> Result<()> {
    let path = checkpoint.join(CHECKSUMS_FILE);
    let text = fs::read_to_string(&path).map_err(|source| Error::io(&path, source))?;
    let mut seen_state = false;
    for line in text.lines() {
        let (expected, name) = line
            .split_once("  ")
            .filter(|(_, name)| !name.contains(['/', '\\']))
            .ok_or_else(|| Error::file(&path, format!("`{line}` is no checksum and name: it is damaged")))?;
        let file = checkpoint.join(name);
        let got = checksum(&file)?;
        if got != expected {
            return Err(Error::file(&file, "isn't what was written: the checkpoint is damaged"));
        }
        seen_state |= name == STATE_FILE;
    }
    match seen_state {
        true => Ok(()),
        false => Err(Error::file(&path, "lists no state: the checkpoint is damaged")),
    }
}

/// SHA-256 of a file, as `sha256sum` prints it.
fn checksum(path: &Path) -> Result<String> {
    let mut hash = Sha256::new();
    let copied = File::open(path).and_then(|mut file| {
        let mut buffer = vec![0; 1 << 20];
        loop {
            match file.read(&mut buffer)? {
                0 => return Ok(()),
                count => hash.update(&buffer[..count]),
            }
        }
    });
    copied.map_err(|source| Error::io(path, source))?;
    Ok(hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect())
}

/// Writes `checkpoint-N` through `fill`, which puts the model's own files into the folder it is given.
pub(crate) fn write(
    settings: &Settings,
    state: &RunState,
    optimizer: &State,
    fill: impl FnOnce(&Path) -> Result<()>,
) -> Result<PathBuf> {
    let (output_dir, name) = (&settings.output_dir, format!("checkpoint-{}", state.step));
    let (partial, whole) = (output_dir.join(format!(".{name}.partial")), output_dir.join(&name));
    let written = write_files(&partial, settings, state, optimizer, fill).and_then(|()| {
        discard(&whole)?;
        fs::rename(&partial, &whole).map_err(|source| Error::io(&whole, source))?;
        sync_path(output_dir)
    });
    if written.is_err() {
        // What the disk had no room for makes room again.
        let _ = fs::remove_dir_all(&partial);
    }
    written.map(|()| whole)
}

fn write_files(
    folder: &Path,
    settings: &Settings,
    state: &RunState,
    optimizer: &State,
    fill: impl FnOnce(&Path) -> Result<()>,
) -> Result<()> {
    remove_folder(folder)?;
    fs::create_dir_all(folder).map_err(|source| Error::io(folder, source))?;
    fill(folder)?;
    write_tensors(&folder.join(OPTIMIZER_FILE), optimizer)?;
    let path = folder.join(STATE_FILE);
    let json = serde_json::to_string_pretty(state).map_err(|error| Error::file(&path, error.to_string()))?;
    fs::write(&path, json).map_err(|source| Error::io(&path, source))?;
    history::write(folder, settings, state)?;
    let mut names: Vec<_> = fs::read_dir(folder)
        .map_err(|source| Error::io(folder, source))?
        .flatten()
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .collect();
    names.sort();
    let mut sums = String::new();
    for name in names {
        let _ = writeln!(sums, "{}  {name}", checksum(&folder.join(&name))?);
    }
    let path = folder.join(CHECKSUMS_FILE);
    fs::write(&path, sums).map_err(|source| Error::io(&path, source))?;
    sync(folder)
}

/// Removes the oldest checkpoints beyond a number, but never the newest or the best.
pub(crate) fn rotate(output_dir: &Path, keep: usize, best: Option<usize>) -> Result<()> {
    let all = checkpoints(output_dir);
    let newest = all.last().map(|(step, _)| *step);
    let old = all.iter().filter(|(step, _)| Some(*step) != best && Some(*step) != newest);
    old.take(all.len().saturating_sub(keep)).try_for_each(|(_, path)| discard(path))
}

/// Removes a checkpoint; under its name it is there or gone, never half of it.
pub fn discard(checkpoint: &Path) -> Result<()> {
    if !checkpoint.exists() {
        return Ok(());
    }
    let name = checkpoint.file_name().unwrap_or_default().to_string_lossy();
    let aside = checkpoint.with_file_name(format!(".{name}.old"));
    remove_folder(&aside)?;
    fs::rename(checkpoint, &aside).map_err(|source| Error::io(checkpoint, source))?;
    remove_folder(&aside)
}

/// Removes what a run that was killed left half written or half removed.
///
/// # Errors
/// When a folder can't be removed.
pub fn clear_leftovers(output_dir: &Path) -> Result<()> {
    for entry in fs::read_dir(output_dir).into_iter().flatten().flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        if name.starts_with(".checkpoint-") && (name.ends_with(".partial") || name.ends_with(".old")) {
            remove_folder(&entry.path())?;
        }
    }
    Ok(())
}

fn remove_folder(path: &Path) -> Result<()> {
    match fs::remove_dir_all(path) {
        Err(source) if source.kind() != std::io::ErrorKind::NotFound => Err(Error::io(path, source)),
        _ => Ok(()),
    }
}

/// Where the run of this checkpoint stood, and its optimizer's state.
///
/// # Errors
/// When a file is missing or damaged.
pub fn read_state(checkpoint: &Path) -> Result<(RunState, State)> {
    let path = checkpoint.join(STATE_FILE);
    let json = fs::read_to_string(&path).map_err(|source| Error::io(&path, source))?;
    let state: RunState = serde_json::from_str(&json).map_err(|error| {
        Error::file(&path, format!("{error}; the checkpoint is damaged, go on from an older one"))
    })?;
    let state = RunState { history: history::read(checkpoint)?, ..state };
    Ok((state, read_tensors(&checkpoint.join(OPTIMIZER_FILE))?))
}

pub(crate) fn write_tensors(path: &Path, tensors: &State) -> Result<()> {
    let as_candle = |tensor: &Tensor| -> Result<candle_core::Tensor> {
        let (shape, cpu) = (tensor.shape(), &candle_core::Device::Cpu);
        Ok(match tensor.dtype() {
            DType::U8 => candle_core::Tensor::from_slice(tensor.values::<u8>()?, shape, cpu)?,
            DType::U32 => candle_core::Tensor::from_slice(tensor.values::<u32>()?, shape, cpu)?,
            _ => candle_core::Tensor::from_slice(tensor.values::<f32>()?, shape, cpu)?,
        })
    };
    let tensors = tensors.iter().map(|(name, it)| Ok((name.clone(), as_candle(it)?)));
    let tensors = tensors.collect::<Result<std::collections::HashMap<_, _>>>()?;
    safetensors::save(&tensors, path).map_err(|error| Error::file(path, error.to_string()))
}

pub(crate) fn read_tensors(path: &Path) -> Result<State> {
    let loaded = safetensors::load(path, &candle_core::Device::Cpu);
    let damaged = |error: candle_core::Error| {
        Error::file(path, format!("{error}; the checkpoint is damaged, go on from an older one"))
    };
    let mut state = State::new();
    for (name, tensor) in loaded.map_err(damaged)? {
        let (rows, cols) = tensor.dims2().map_err(damaged)?;
        let flat = tensor.flatten_all().map_err(damaged)?;
        let tensor = match tensor.dtype() {
            DType::U8 => Tensor::from_vec(rows, cols, flat.to_vec1::<u8>().map_err(damaged)?)?,
            DType::U32 => Tensor::from_vec(rows, cols, flat.to_vec1::<u32>().map_err(damaged)?)?,
            _ => Tensor::from_vec(rows, cols, flat.to_vec1::<f32>().map_err(damaged)?)?,
        };
        state.insert(name, tensor);
    }
    Ok(state)
}

/// Puts a folder's files and the folder itself on the disk.
fn sync(folder: &Path) -> Result<()> {
    for entry in fs::read_dir(folder).map_err(|source| Error::io(folder, source))?.flatten() {
        sync_path(&entry.path())?;
    }
    sync_path(folder)
}

fn sync_path(path: &Path) -> Result<()> {
    let synced = File::open(path).and_then(|file| file.sync_all());
    synced.map_err(|source| Error::io(path, source))
}
