//! A whole model as Hugging Face lays it out: config.json and one safetensors file, trained weights in the
//! place of those that they began as.

use std::borrow::Cow;
use std::cell::RefCell;
use std::collections::{BTreeMap, HashMap};
use std::fs::{self, File};
use std::path::Path;

use ferrotune_model::source::{ModelFiles, Stored};
use ferrotune_model::spec::names;
use ferrotune_tensor::{DType, Error, Result, Tensor, bf16, f16};
use safetensors::{Dtype, View};

use crate::files::write_whole;

/// The type that trained weights are written in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SavedAs {
    /// f32, as they were trained: nothing is lost.
    Trained,
    /// That of the base model's file.
    Stored,
}

const TENSORS: &str = "model.safetensors";
const CONFIG: &str = "config.json";

/// Writes the folder; the config comes last, so that a folder with a config is a whole model.
///
/// # Errors
/// When the base isn't a Hugging Face folder, or a file can't be read or written.
pub fn write_model(
    folder: &Path,
    base: &ModelFiles,
    trained: &BTreeMap<String, Tensor>,
    saved_as: SavedAs,
) -> Result<()> {
    let config = base.path.join(CONFIG);
    let mut config = fs::read(&config).map_err(|source| Error::io(&config, source))?;
    if base.config.get("vocab_size").and_then(serde_json::Value::as_u64) != Some(base.spec.vocab_size as u64)
    {
        let mut grown = base.config.clone();
        grown["vocab_size"] = base.spec.vocab_size.into();
        config = serde_json::to_vec_pretty(&grown).map_err(|error| Error::msg(error.to_string()))?;
    }
    fs::create_dir_all(folder).map_err(|source| Error::io(folder, source))?;
    let failed = RefCell::new(None);
    let tied = base.spec.tie_word_embeddings;
    let names = base.source.names().into_iter().filter(|name| !(tied && *name == names::HEAD));
    let tensors = names.map(|name| {
        let dtype = match (saved_as, trained.contains_key(name)) {
            (SavedAs::Trained, true) => DType::F32,
            _ => base.source.dtype(name)?,
        };
        let (rows, cols) = base.source.shape(name)?;
        let shape = if rows == 1 { vec![cols] } else { vec![rows, cols] };
        let tensor = trained.get(name);
        Ok((name, Lazy { name, base, tensor, dtype, shape, failed: &failed }))
    });
    let tensors = tensors.collect::<Result<Vec<_>>>()?;
    let path = folder.join(TENSORS);
    let beside = folder.join(format!(".{TENSORS}.{}.part", std::process::id()));
    let metadata = HashMap::from([("format".to_string(), "pt".to_string())]);
    let written = safetensors::serialize_to_file(tensors, Some(metadata), &beside)
        .map_err(|error| Error::file(&path, format!("can't be written: {error}")));
    let written = written.and_then(|()| failed.take().map_or(Ok(()), Err)).and_then(|()| {
        let synced = File::open(&beside).and_then(|file| file.sync_all());
        synced.and_then(|()| fs::rename(&beside, &path)).map_err(|source| Error::io(&path, source))
    });
    if written.is_err() {
        let _ = fs::remove_file(&beside);
        return written;
    }
    let generation = base.path.join("generation_config.json");
    if let Ok(bytes) = fs::read(&generation) {
        write_whole(&folder.join("generation_config.json"), &bytes)?;
    }
    write_whole(&folder.join(CONFIG), &config)
}

/// A tensor that is read when it is written.
struct Lazy<'a> {
    name: &'a str,
    base: &'a ModelFiles,
    tensor: Option<&'a Tensor>,
    dtype: DType,
    shape: Vec<usize>,
    failed: &'a RefCell<Option<Error>>,
}

impl Lazy<'_> {
    fn bytes(&self) -> Result<Vec<u8>> {
        let tensor = match self.tensor {
            Some(tensor) => tensor.try_clone()?.cast(self.dtype)?,
            None => {
                let Stored::Dense(tensor) = self.base.source.get(self.name)? else {
                    return Err(Error::msg(format!("tensor `{}` is in few bits", self.name)));
                };
                tensor.cast(self.dtype)?
            }
        };
        Ok(match self.dtype {
            DType::BF16 => tensor.values::<bf16>()?.iter().flat_map(|it| it.to_le_bytes()).collect(),
            DType::F16 => tensor.values::<f16>()?.iter().flat_map(|it| it.to_le_bytes()).collect(),
            _ => tensor.values::<f32>()?.iter().flat_map(|it| it.to_le_bytes()).collect(),
        })
    }
}

impl View for Lazy<'_> {
    fn dtype(&self) -> Dtype {
        match self.dtype {
            DType::BF16 => Dtype::BF16,
            DType::F16 => Dtype::F16,
            _ => Dtype::F32,
        }
    }

    fn shape(&self) -> &[usize] {
        &self.shape
    }

    fn data(&self) -> Cow<'_, [u8]> {
        // The file is thrown away when this fails.
        Cow::Owned(self.bytes().unwrap_or_else(|error| {
            *self.failed.borrow_mut() = Some(error);
            vec![0; self.data_len()]
        }))
    }

    fn data_len(&self) -> usize {
        self.shape.iter().product::<usize>() * self.dtype.size_in_bytes()
    }
}
