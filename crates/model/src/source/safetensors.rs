//! Weights in safetensors files: one, or shards with an index.

use std::collections::BTreeMap;
use std::fs;
use std::ops::Range;
use std::path::{Path, PathBuf};

use ferrotune_tensor::{DType, Error, Result, Tensor};
use safetensors::tensor::{Metadata, SafeTensorError};
use safetensors::{Dtype, SafeTensors};
use serde_json::Value;
use sha2::{Digest, Sha256};

use super::bnb::BnbSource;
use super::mapped::{Mapped, Plain, bf16s, f16s};
use super::{Stored, WeightSource, check_rows};

/// Reads all of a file of these bytes, for fuzzers, whether its weights are in 4 bits or not. Returns how many tensors could be
/// read.
pub fn read_safetensors_through(bytes: &[u8]) -> usize {
    let Ok(source) = SafetensorsSource::of(Mapped::held("model.safetensors", bytes)) else { return 0 };
    let source: Box<dyn WeightSource> = match BnbSource::is_one(&source) {
        true => match BnbSource::new(source) {
            Ok(source) => Box::new(source),
            Err(_) => return 0,
        },
        false => Box::new(source),
    };
    let read = |name: &&str| source.get(name)?.into_dense().and_then(|_| source.get_f32(name));
    source.names().iter().filter(|name| read(name).is_ok()).count()
}

/// A folder's safetensors files, mapped into memory.
#[derive(Debug)]
pub struct SafetensorsSource {
    folder: PathBuf,
    files: Vec<Mapped>,
    entries: BTreeMap<String, Entry>,
}

/// Where a tensor lies.
#[derive(Debug)]
struct Entry {
    file: usize,
    dtype: Dtype,
    shape: Vec<usize>,
    /// Within the file.
    bytes: Range<usize>,
}

/// A tensor as it lies in its file.
pub(super) struct Raw<'a> {
    pub(super) dtype: Dtype,
    pub(super) bytes: &'a [u8],
}

impl SafetensorsSource {
    /// Opens `model.safetensors`, or the shards that `model.safetensors.index.json` names.
    ///
    /// # Errors
    /// When there are no such files (the message says what is there instead and what to do), or one
    /// is truncated or contradicts itself.
    pub fn open(folder: &Path) -> Result<SafetensorsSource> {
        let mut source =
            SafetensorsSource { folder: folder.into(), files: Vec::new(), entries: BTreeMap::new() };
        let index = folder.join("model.safetensors.index.json");
        let single = folder.join("model.safetensors");
        if single.exists() {
            let file = Mapped::open(&single)?;
            source.entries = read_header(&file, 0)?;
            source.files.push(file);
        } else if index.exists() {
            source.open_shards(&index)?;
        } else {
            return Err(nothing_to_open(folder));
        }
        Ok(source)
    }

    /// Opens one file of any name, such as an adapter's.
    ///
    /// # Errors
    /// When it isn't there, is truncated or contradicts itself.
    pub fn open_file(path: &Path) -> Result<SafetensorsSource> {
        SafetensorsSource::of(Mapped::open(path)?)
    }

    fn of(file: Mapped) -> Result<SafetensorsSource> {
        let entries = read_header(&file, 0)?;
        Ok(SafetensorsSource { folder: file.path.clone(), files: vec![file], entries })
    }

    fn open_shards(&mut self, index: &Path) -> Result<()> {
        let text = fs::read_to_string(index).map_err(|source| Error::io(index, source))?;
        let json: Value =
            serde_json::from_str(&text).map_err(|error| Error::file(index, format!("not JSON: {error}")))?;
        let Some(map) = json.get("weight_map").and_then(Value::as_object) else {
            return Err(Error::file(index, "`weight_map` is missing: it names the file of each tensor"));
        };
        let mut shards: BTreeMap<&str, Vec<&String>> = BTreeMap::new();
        for (name, shard) in map {
            let Some(shard) = shard.as_str().filter(|it| is_plain_file_name(it)) else {
                let message = format!(
                    "tensor `{name}` is said to be in {shard}, expected the name of a file beside this one"
                );
                return Err(Error::file(index, message));
            };
            shards.entry(shard).or_default().push(name);
        }
        for (shard, names) in shards {
            let path = self.folder.join(shard);
            if !path.exists() {
                let message = format!(
                    "{} names it for {} tensors, but it isn't there: download it",
                    index.display(),
                    names.len()
                );
                return Err(Error::file(path, message));
            }
            let file = Mapped::open(&path)?;
            let mut entries = read_header(&file, self.files.len())?;
            for name in names {
                let Some(entry) = entries.remove(name) else {
                    let message =
                        format!("tensor `{name}` is missing, which {} says is here", index.display());
                    return Err(Error::file(path, message));
                };
                self.entries.insert(name.clone(), entry);
            }
            self.files.push(file);
        }
        Ok(())
    }

    /// A tensor's bytes, whatever they mean.
    pub(super) fn raw(&self, name: &str) -> Result<Raw<'_>> {
        let entry = self.entry(name)?;
        Ok(Raw { dtype: entry.dtype, bytes: &self.files[entry.file].bytes()[entry.bytes.clone()] })
    }

    fn entry(&self, name: &str) -> Result<&Entry> {
        let missing = || Error::MissingTensor { file: self.folder.clone(), name: name.into() };
        self.entries.get(name).ok_or_else(missing)
    }

    fn plain(&self, name: &str, entry: &Entry) -> Result<Plain> {
        match entry.dtype {
            Dtype::F32 => Ok(Plain::F32),
            Dtype::F16 => Ok(Plain::F16),
            Dtype::BF16 => Ok(Plain::Bf16),
            other => {
                let message = format!(
                    "tensor `{name}` holds numbers of type {other:?}, which isn't there yet: \
                     take the model in bf16, f16 or f32"
                );
                Err(Error::file(&self.files[entry.file].path, message))
            }
        }
    }
}

impl WeightSource for SafetensorsSource {
    fn path(&self) -> &Path {
        &self.folder
    }

    fn names(&self) -> Vec<&str> {
        self.entries.keys().map(String::as_str).collect()
    }

    fn contains(&self, name: &str) -> bool {
        self.entries.contains_key(name)
    }

    fn shape(&self, name: &str) -> Result<(usize, usize)> {
        let entry = self.entry(name)?;
        match entry.shape[..] {
            [] => Ok((1, 1)),
            [n] => Ok((1, n)),
            [rows, cols] => Ok((rows, cols)),
            _ => {
                let message = format!(
                    "tensor `{name}` has the shape {:?}, expected one or two dimensions",
                    entry.shape
                );
                Err(Error::file(&self.files[entry.file].path, message))
            }
        }
    }

    fn dtype(&self, name: &str) -> Result<DType> {
        match self.plain(name, self.entry(name)?)? {
            Plain::F32 => Ok(DType::F32),
            Plain::F16 => Ok(DType::F16),
            Plain::Bf16 => Ok(DType::BF16),
        }
    }

    fn get(&self, name: &str) -> Result<Stored> {
        let entry = self.entry(name)?;
        let (rows, cols) = self.shape(name)?;
        let bytes = &self.files[entry.file].bytes()[entry.bytes.clone()];
        let tensor = match self.plain(name, entry)? {
            Plain::F32 => self.get_f32(name)?,
            Plain::F16 => Tensor::from_vec(rows, cols, f16s(bytes))?,
            Plain::Bf16 => Tensor::from_vec(rows, cols, bf16s(bytes))?,
        };
        Ok(Stored::Dense(tensor))
    }

    fn read_rows(&self, name: &str, rows: Range<usize>, out: &mut [f32]) -> Result<()> {
        let entry = self.entry(name)?;
        let plain = self.plain(name, entry)?;
        let shape = self.shape(name)?;
        check_rows(name, shape, &rows, out.len())?;
        let bytes = &self.files[entry.file].bytes()[entry.bytes.clone()];
        let row = shape.1 * plain.bytes();
        plain.read(&bytes[rows.start * row..rows.end * row], out);
        Ok(())
    }

    fn forget(&self, name: &str) {
        if let Some(entry) = self.entries.get(name) {
            self.files[entry.file].forget(&entry.bytes);
        }
    }

    fn is_as_stored(&self, _name: &str) -> bool {
        true
    }

    fn fingerprint(&self) -> String {
        let mut hash = Sha256::new();
        for file in &self.files {
            let bytes = file.bytes();
            let header = bytes.first_chunk().map_or(0, |it| u64::from_le_bytes(*it)) as usize;
            hash.update((bytes.len() as u64).to_le_bytes());
            hash.update(&bytes[..header.saturating_add(8).min(bytes.len())]);
        }
        super::hex(&hash.finalize())
    }
}

fn is_plain_file_name(name: &str) -> bool {
    let mut parts = Path::new(name).components();
    matches!((parts.next(), parts.next()), (Some(std::path::Component::Normal(it)), None) if it == name)
        && !name.contains('\\')
}

/// Reads the header of the `file`-th file: an 8-byte length, that many bytes of JSON, then the numbers.
fn read_header(mapped: &Mapped, file: usize) -> Result<BTreeMap<String, Entry>> {
    let bytes = mapped.bytes();
    let (header, metadata) = SafeTensors::read_metadata(bytes)
        .map_err(|error| Error::file(&mapped.path, explain(error, bytes)))?;
    let start = 8 + header;
    let mut entries = BTreeMap::new();
    for (name, info) in metadata.tensors() {
        let (from, to) = info.data_offsets;
        let bytes = start + from..start + to;
        entries.insert(name, Entry { file, dtype: info.dtype, shape: info.shape.clone(), bytes });
    }
    Ok(entries)
}

/// What is wrong with a safetensors file, in numbers.
fn explain(error: SafeTensorError, bytes: &[u8]) -> String {
    let length = bytes.len();
    let again = "the file is damaged or was not downloaded whole: download it again";
    let header = bytes.first_chunk().map(|it| u64::from_le_bytes(*it));
    match error {
        SafeTensorError::HeaderTooSmall => {
            format!("the file has {length} bytes, a safetensors file has at least 8: {again}")
        }
        SafeTensorError::HeaderTooLarge | SafeTensorError::InvalidHeaderLength => format!(
            "the header says it has {} bytes, but the file has {length}: either it isn't safetensors, or \
             {again}",
            header.unwrap_or(0)
        ),
        SafeTensorError::MetadataIncompleteBuffer => {
            let stop = 8 + header.unwrap_or(0) as usize;
            let text = bytes.get(8..stop).unwrap_or(&[]);
            let data = serde_json::from_slice::<Metadata>(text).map(|it| it.data_len()).unwrap_or(0);
            format!(
                "the header promises {} bytes, but the file has {length}: {again}",
                stop.saturating_add(data)
            )
        }
        SafeTensorError::InvalidOffset(name) => {
            format!(
                "the header puts tensor `{name}` where another one is or leaves a hole before it: {again}"
            )
        }
        SafeTensorError::TensorInvalidInfo => {
            format!("the header gives a tensor more or fewer bytes than its shape needs: {again}")
        }
        other => format!("the header can't be read ({other}): {again}"),
    }
}

/// Says what a folder without safetensors holds instead, and what to do.
fn nothing_to_open(folder: &Path) -> Error {
    let names: Vec<String> = fs::read_dir(folder)
        .map(|entries| entries.flatten().map(|it| it.file_name().to_string_lossy().into_owned()).collect())
        .unwrap_or_default();
    let has = |test: &dyn Fn(&str) -> bool| names.iter().find(|it| test(it));
    let message = if let Some(pickle) =
        has(&|it| it.starts_with("pytorch_model") || it.ends_with(".bin") || it.ends_with(".pth"))
    {
        format!(
            "holds `{pickle}` but no safetensors: a pickle runs code when it is opened, so it is refused; \
             take a revision with model.safetensors, or convert it with transformers' \
             `save_pretrained(…, safe_serialization=True)`"
        )
    } else if has(&|it| it == "adapter_config.json").is_some() {
        "holds an adapter, not a model: name its base as the model and this folder as the adapter".into()
    } else {
        "holds neither model.safetensors nor model.safetensors.index.json: download the model again".into()
    };
    Error::file(folder, message)
}
