//! `checkpoint-N` folders: the adapter as PEFT reads it, and what an exact continuation needs.
//!
//! A folder is written beside, synced and renamed: under its final name it is always whole.

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};

use candle_core::safetensors;
use ferrotune_tensor::{DType, Error, Result, Tensor};
use serde::{Deserialize, Serialize};

use crate::LossScale;
use crate::optimizer::State;

const STATE_FILE: &str = "ferrotune_state.json";
const OPTIMIZER_FILE: &str = "optimizer.safetensors";

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
    #[serde(default)]
    pub loss_scale: Option<LossScale>,
    /// What must be the same for the run to go on, as (what, value).
    pub identity: Vec<(String, String)>,
}

impl RunState {
    /// Checks that a run with this identity may go on from here.
    ///
    /// # Errors
    /// Naming what has changed.
    pub fn check_identity(&self, identity: &[(String, String)]) -> Result<()> {
        for (what, now) in identity {
            let then = self.identity.iter().find(|(name, _)| name == what).map(|(_, value)| value);
            if then.is_some_and(|then| then != now) {
                let then = then.map_or("", String::as_str);
                return Err(Error::msg(format!(
                    "{what} was {then} when the checkpoint was written and is {now} now; a resumed run must go on with the same, or start a new one in another output_dir"
                )));
            }
        }
        Ok(())
    }
}

/// The newest whole checkpoint of a run.
pub fn latest_checkpoint(output_dir: &Path) -> Option<PathBuf> {
    let steps = |path: &Path| path.file_name()?.to_str()?.strip_prefix("checkpoint-")?.parse::<usize>().ok();
    let entries = fs::read_dir(output_dir).ok()?.flatten().map(|entry| entry.path());
    let whole = entries.filter(|path| path.join(STATE_FILE).exists());
    whole.filter_map(|path| Some((steps(&path)?, path))).max().map(|(_, path)| path)
}

/// Writes `checkpoint-N` through `fill`, which puts the model's own files into the folder it is given.
pub(crate) fn write(
    output_dir: &Path,
    state: &RunState,
    optimizer: &State,
    fill: impl FnOnce(&Path) -> Result<()>,
) -> Result<PathBuf> {
    let name = format!("checkpoint-{}", state.step);
    let (partial, whole) = (output_dir.join(format!(".{name}.partial")), output_dir.join(&name));
    if partial.exists() {
        fs::remove_dir_all(&partial).map_err(|source| Error::io(&partial, source))?;
    }
    fs::create_dir_all(&partial).map_err(|source| Error::io(&partial, source))?;
    fill(&partial)?;
    write_tensors(&partial.join(OPTIMIZER_FILE), optimizer)?;
    let path = partial.join(STATE_FILE);
    let json = serde_json::to_string_pretty(state).map_err(|error| Error::file(&path, error.to_string()))?;
    fs::write(&path, json).map_err(|source| Error::io(&path, source))?;
    sync(&partial)?;
    if whole.exists() {
        fs::remove_dir_all(&whole).map_err(|source| Error::io(&whole, source))?;
    }
    fs::rename(&partial, &whole).map_err(|source| Error::io(&whole, source))?;
    sync_path(output_dir)?;
    Ok(whole)
}

/// Removes the oldest checkpoints beyond a number.
pub(crate) fn rotate(output_dir: &Path, keep: usize) -> Result<()> {
    let steps = |path: &Path| path.file_name()?.to_str()?.strip_prefix("checkpoint-")?.parse::<usize>().ok();
    let entries = fs::read_dir(output_dir).map_err(|source| Error::io(output_dir, source))?;
    let mut all: Vec<_> =
        entries.flatten().filter_map(|entry| Some((steps(&entry.path())?, entry.path()))).collect();
    all.sort();
    for (_, path) in &all[..all.len().saturating_sub(keep)] {
        fs::remove_dir_all(path).map_err(|source| Error::io(path, source))?;
    }
    Ok(())
}

/// Where the run of this checkpoint stood, and its optimizer's state.
///
/// # Errors
/// When a file is missing or damaged.
pub fn read_state(checkpoint: &Path) -> Result<(RunState, State)> {
    let path = checkpoint.join(STATE_FILE);
    let json = fs::read_to_string(&path).map_err(|source| Error::io(&path, source))?;
    let state = serde_json::from_str(&json).map_err(|error| {
        Error::file(&path, format!("{error}; the checkpoint is damaged, go on from an older one"))
    })?;
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
    let synced = File::open(path).and_then(|mut file| file.flush().and_then(|()| file.sync_all()));
    synced.map_err(|source| Error::io(path, source))
}
