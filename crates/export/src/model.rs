//! A whole model as Hugging Face lays it out: config.json and safetensors files, under the names that the
//! family's checkpoints have.

use std::collections::BTreeMap;
use std::fs;
use std::ops::Range;
use std::path::Path;

use ferrotune_model::families;
use ferrotune_model::source::{FileKind, ModelFiles};
use ferrotune_model::spec::{CheckpointTensor, names};
use ferrotune_tensor::{DType, Error, Result, Tensor};
use serde_json::{Value, json};

use crate::checkpoint::{CheckpointWriter, Entry, bytes_as, stored_as};
use crate::files::write_whole;

/// The type that trained weights are written in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SavedAs {
    /// f32, as they were trained: nothing is lost.
    Trained,
    /// That of the base model's file.
    Stored,
}

/// How a whole model is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FolderOptions {
    /// The type of all numbers; where it is none, each tensor has its own in the base model's files. What
    /// GGUF files hold in few bits becomes bf16.
    pub dtype: Option<DType>,
    /// The longest file; one tensor may be longer.
    pub shard_bytes: u64,
}

const CONFIG: &str = "config.json";
const GENERATION: &str = "generation_config.json";
/// Numbers that are in memory at once.
const PIECE: usize = 1 << 22;

/// Writes a base model with trained weights in the place of those that they began as.
///
/// # Errors
/// When a file can't be read or written.
pub fn write_model(
    folder: &Path,
    base: &ModelFiles,
    trained: &BTreeMap<String, Tensor>,
    saved_as: SavedAs,
) -> Result<()> {
    let read: &ReadRows = &|name, rows, out| match trained.get(name) {
        None => base.source.read_rows(name, rows, out),
        Some(tensor) => {
            out.copy_from_slice(&tensor.values::<f32>()?[rows.start * tensor.cols()..][..out.len()]);
            Ok(())
        }
    };
    let dtype = |it: &CheckpointTensor| match saved_as {
        SavedAs::Trained if it.parts.iter().any(|part| trained.contains_key(part)) => Ok(DType::F32),
        _ => base.source.dtype(&it.parts[0]),
    };
    write_weights(folder, base, &dtype, read, u64::MAX, &mut |_, _| {})?;
    write_configs(folder, base, &config(base, None)?)
}

/// Writes a model, such as a merged one; the config comes last, so that a folder with a config is a whole
/// model. `progress` gets the numbers written and all of them.
///
/// # Errors
/// When a file can't be read or written.
pub fn write_folder(
    folder: &Path,
    files: &ModelFiles,
    options: FolderOptions,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<()> {
    let dtype = |it: &CheckpointTensor| written_dtype(files, options, it);
    let read: &ReadRows = &|name, rows, out| files.source.read_rows(name, rows, out);
    write_weights(folder, files, &dtype, read, options.shard_bytes, progress)?;
    let uniform = options.dtype.is_some() || files.kind == FileKind::Gguf;
    let first = &files.spec.checkpoint_tensors()[0];
    let named = uniform.then(|| written_dtype(files, options, first)).transpose()?;
    write_configs(folder, files, &config(files, named)?)
}

/// The type that a tensor is written in. In a GGUF file small tensors are f32 beside large ones of another type:
/// there all get that of the projections.
pub(crate) fn written_dtype(
    files: &ModelFiles,
    options: FolderOptions,
    tensor: &CheckpointTensor,
) -> Result<DType> {
    if let Some(dtype) = options.dtype {
        return Ok(dtype);
    }
    let (source, part) = (&files.source, &tensor.parts[0]);
    Ok(match files.kind {
        FileKind::Folder => source.stored_dtype(part)?.map_or_else(|| source.dtype(part), Ok)?,
        FileKind::Gguf => source.stored_dtype(&names::weight(0, names::O))?.unwrap_or(DType::BF16),
    })
}

/// Some rows of a canonical tensor.
pub(crate) type ReadRows<'a> = dyn Fn(&str, Range<usize>, &mut [f32]) -> Result<()> + 'a;

fn write_weights(
    folder: &Path,
    files: &ModelFiles,
    dtype: &dyn Fn(&CheckpointTensor) -> Result<DType>,
    read: &ReadRows,
    shard_bytes: u64,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<()> {
    let tensors = files.spec.checkpoint_tensors();
    let dtypes = tensors.iter().map(dtype).collect::<Result<Vec<DType>>>()?;
    let groups: Vec<Vec<Entry>> =
        tensors.iter().zip(&dtypes).map(|(it, dtype)| vec![entry_of(it, *dtype)]).collect();
    let total = files.spec.parameter_count();
    let mut writer = CheckpointWriter::create(folder, &groups, shard_bytes, total)?;
    let mut done = 0;
    for (tensor, dtype) in tensors.iter().zip(dtypes) {
        write_tensor(&mut writer, files, tensor, dtype, read)?;
        done += (tensor.rows * tensor.cols) as u64;
        progress(done, total);
    }
    writer.finish()
}

pub(crate) fn entry_of(tensor: &CheckpointTensor, dtype: DType) -> Entry {
    Entry { name: tensor.name.clone(), dtype: stored_as(dtype), shape: tensor.shape() }
}

/// Writes a tensor in plain numbers, some rows at a time.
pub(crate) fn write_tensor(
    writer: &mut CheckpointWriter,
    files: &ModelFiles,
    tensor: &CheckpointTensor,
    dtype: DType,
    read: &ReadRows,
) -> Result<()> {
    for part in &tensor.parts {
        let (rows, cols) = files.source.shape(part)?;
        let step = (PIECE / cols).max(1);
        for first in (0..rows).step_by(step) {
            let rows = first..(first + step).min(rows);
            let mut values = vec![0.0; rows.len() * cols];
            read(part, rows, &mut values)?;
            if tensor.less != 0.0 {
                values.iter_mut().for_each(|it| *it -= tensor.less);
            }
            writer.write(&tensor.name, &bytes_as(values, dtype)?)?;
        }
        files.source.forget(part);
    }
    Ok(())
}

/// config.json and generation_config.json, the former last.
pub(crate) fn write_configs(folder: &Path, files: &ModelFiles, config: &Value) -> Result<()> {
    let generation = match files.kind {
        FileKind::Folder => fs::read(files.path.join(GENERATION)).ok(),
        FileKind::Gguf => {
            let mut generation = json!({ "_from_model_config": true });
            for key in ["bos_token_id", "eos_token_id", "pad_token_id"] {
                generation[key] = config[key].clone();
            }
            Some(pretty(&generation)?)
        }
    };
    if let Some(bytes) = generation {
        write_whole(&folder.join(GENERATION), &bytes)?;
    }
    write_whole(&folder.join(CONFIG), &pretty(config)?)
}

/// The base's config with what has changed since.
pub(crate) fn config(files: &ModelFiles, dtype: Option<DType>) -> Result<Value> {
    let (mut config, spec) = (files.config.clone(), &files.spec);
    let Some(map) = config.as_object_mut() else { return Err(Error::msg("the config is no JSON object")) };
    map.insert("vocab_size".into(), spec.vocab_size.into());
    // Families differ in what is meant where nothing is said.
    if map.contains_key("tie_word_embeddings") || !spec.tie_word_embeddings {
        map.insert("tie_word_embeddings".into(), spec.tie_word_embeddings.into());
    }
    map.remove("quantization_config");
    if let Some(dtype) = dtype {
        let key = if map.contains_key("dtype") { "dtype" } else { "torch_dtype" };
        map.insert(key.into(), dtype_name(dtype).into());
    }
    let model_type = map.get("model_type").and_then(Value::as_str).unwrap_or_default();
    if !map.contains_key("architectures")
        && let Some(class) = families::architecture(model_type)
    {
        map.insert("architectures".into(), json!([class]));
    }
    if files.kind == FileKind::Gguf {
        let scaling = map.get("rope_scaling").and_then(|it| it.get("rope_type")).and_then(Value::as_str);
        if scaling == Some("frequency_factors") {
            let message = "its rope has divisors of its own, which config.json can't say: export from the \
                           Hugging Face folder of the same model";
            return Err(Error::file(&files.path, message));
        }
        let ends = match map.get("eos_token_id").and_then(Value::as_array).map(Vec::as_slice) {
            Some([]) => Value::Null,
            Some([one]) => one.clone(),
            _ => map.get("eos_token_id").cloned().unwrap_or_default(),
        };
        map.insert("eos_token_id".into(), ends);
    }
    Ok(config)
}

/// As PyTorch names a type.
pub(crate) fn dtype_name(dtype: DType) -> &'static str {
    match dtype {
        DType::BF16 => "bfloat16",
        DType::F16 => "float16",
        _ => "float32",
    }
}

fn pretty(value: &Value) -> Result<Vec<u8>> {
    let text = serde_json::to_string_pretty(value).map_err(|error| Error::msg(error.to_string()))?;
    Ok(format!("{text}\n").into_bytes())
}
