//! model.safetensors, or shards with their index, written piece by piece: nothing has to be whole in memory.

use std::collections::{BTreeMap, HashMap};
use std::fs::{self, File};
use std::io::{Seek as _, SeekFrom, Write as _};
use std::path::{Path, PathBuf};

use ferrotune_tensor::{DType, Error, Result, Tensor, bf16, f16};
use safetensors::tensor::{Dtype, Metadata, TensorInfo};
use serde_json::json;

use crate::write_whole;

const SINGLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";

/// A tensor that is about to be written.
#[derive(Clone, Debug)]
pub(crate) struct Entry {
    pub(crate) name: String,
    pub(crate) dtype: Dtype,
    pub(crate) shape: Vec<usize>,
}

impl Entry {
    fn bytes(&self) -> u64 {
        self.shape.iter().map(|it| *it as u64).product::<u64>() * self.dtype.bitsize() as u64 / 8
    }
}

/// The files of a checkpoint, beside their names until all of them are whole. Dropped before
/// [`CheckpointWriter::finish`], nothing is left of them.
pub(crate) struct CheckpointWriter {
    folder: PathBuf,
    shards: Vec<Shard>,
    /// Where each tensor goes.
    places: BTreeMap<String, Place>,
    total: u64,
    parameters: u64,
}

struct Shard {
    name: String,
    beside: PathBuf,
    file: File,
}

/// What is left to write of a tensor: from a place in a shard, so many bytes.
struct Place {
    shard: usize,
    at: u64,
    left: u64,
}

impl CheckpointWriter {
    /// Lays the files out: tensors of a group share a shard, and a shard has up to `shard_bytes`, unless
    /// one group has more. `parameters` is what the index counts.
    ///
    /// # Errors
    /// When the folder can't be written to.
    pub(crate) fn create(
        folder: &Path,
        groups: &[Vec<Entry>],
        shard_bytes: u64,
        parameters: u64,
    ) -> Result<CheckpointWriter> {
        fs::create_dir_all(folder).map_err(|source| Error::io(folder, source))?;
        let shards = divide(groups, shard_bytes);
        let (count, mut writer) = (shards.len(), CheckpointWriter::empty(folder, parameters));
        for (index, entries) in shards.into_iter().enumerate() {
            let name = match count {
                1 => SINGLE.to_string(),
                _ => format!("model-{:05}-of-{count:05}.safetensors", index + 1),
            };
            writer.open(name, entries)?;
        }
        Ok(writer)
    }

    fn empty(folder: &Path, parameters: u64) -> CheckpointWriter {
        let (shards, places) = (Vec::new(), BTreeMap::new());
        CheckpointWriter { folder: folder.into(), shards, places, total: 0, parameters }
    }

    /// Starts a shard: its header is written, and it has its full length.
    fn open(&mut self, name: String, mut entries: Vec<Entry>) -> Result<()> {
        // Wide types first: each number is aligned then.
        entries.sort_by_key(|it| std::cmp::Reverse(it.dtype.bitsize()));
        let shard = self.shards.len();
        let (mut infos, mut end) = (Vec::new(), 0u64);
        for entry in &entries {
            let start = end;
            end += entry.bytes();
            let offsets = (start as usize, end as usize);
            let info = TensorInfo { dtype: entry.dtype, shape: entry.shape.clone(), data_offsets: offsets };
            infos.push((entry.name.clone(), info));
        }
        let path = self.folder.join(&name);
        let wrong = |what: String| Error::file(&path, format!("can't be put together: {what}"));
        let about = HashMap::from([("format".to_string(), "pt".to_string())]);
        let metadata = Metadata::new(Some(about), infos).map_err(|error| wrong(error.to_string()))?;
        let mut header = serde_json::to_vec(&metadata).map_err(|error| wrong(error.to_string()))?;
        header.resize(header.len().next_multiple_of(8), b' ');

        let beside = self.folder.join(format!(".{name}.{}.part", std::process::id()));
        let start = 8 + header.len() as u64;
        let made = File::create(&beside).and_then(|mut file| {
            file.write_all(&(header.len() as u64).to_le_bytes())?;
            file.write_all(&header)?;
            file.set_len(start + end)?;
            Ok(file)
        });
        let file = made.map_err(|source| Error::io(&path, source))?;
        self.shards.push(Shard { name, beside, file });
        let mut at = start;
        for entry in entries {
            let left = entry.bytes();
            if self.places.insert(entry.name.clone(), Place { shard, at, left }).is_some() {
                return Err(wrong(format!("tensor `{}` is there twice", entry.name)));
            }
            at += left;
        }
        self.total += end;
        Ok(())
    }

    /// Writes more of a tensor, behind what has been written of it.
    ///
    /// # Errors
    /// When there is no such tensor, it has fewer bytes, or the disk is full.
    pub(crate) fn write(&mut self, name: &str, bytes: &[u8]) -> Result<()> {
        let folder = &self.folder;
        let Some(place) = self.places.get_mut(name) else {
            return Err(Error::file(folder, format!("tensor `{name}` has no place")));
        };
        let shard = &mut self.shards[place.shard];
        let Some(left) = place.left.checked_sub(bytes.len() as u64) else {
            return Err(Error::file(folder, format!("tensor `{name}` is longer than its place")));
        };
        let written = shard.file.seek(SeekFrom::Start(place.at)).and_then(|_| shard.file.write_all(bytes));
        written.map_err(|source| Error::io(folder.join(&shard.name), source))?;
        (place.at, place.left) = (place.at + bytes.len() as u64, left);
        Ok(())
    }

    /// Puts the files on the disk and gives them their names; files of an older checkpoint are removed.
    ///
    /// # Errors
    /// When a tensor isn't whole, or the disk is full.
    pub(crate) fn finish(mut self) -> Result<()> {
        if let Some((name, _)) = self.places.iter().find(|(_, place)| place.left > 0) {
            return Err(Error::file(&self.folder, format!("tensor `{name}` isn't whole")));
        }
        for shard in &self.shards {
            shard.file.sync_all().map_err(|source| Error::io(self.folder.join(&shard.name), source))?;
        }
        let shards = std::mem::take(&mut self.shards);
        for (index, shard) in shards.iter().enumerate() {
            let path = self.folder.join(&shard.name);
            if let Err(source) = fs::rename(&shard.beside, &path) {
                shards[index..].iter().for_each(|it| drop(fs::remove_file(&it.beside)));
                return Err(Error::io(path, source));
            }
        }
        let single = shards.len() == 1;
        self.remove_older(&shards);
        if single {
            return Ok(());
        }
        let map = self.places.iter().map(|(name, place)| (name.clone(), json!(shards[place.shard].name)));
        let index = json!({
            "metadata": { "total_parameters": self.parameters, "total_size": self.total },
            "weight_map": map.collect::<serde_json::Map<_, _>>(),
        });
        let text = serde_json::to_string_pretty(&index).map_err(|error| Error::msg(error.to_string()))?;
        write_whole(&self.folder.join(INDEX), format!("{text}\n").as_bytes())
    }

    /// What an older checkpoint in the folder had and this one hasn't would be read in its place.
    fn remove_older(&self, shards: &[Shard]) {
        let Ok(entries) = fs::read_dir(&self.folder) else { return };
        for name in entries.flatten().map(|it| it.file_name().to_string_lossy().into_owned()) {
            let is_shard = name.strip_prefix("model-").and_then(|it| it.strip_suffix(".safetensors"));
            let is_shard = is_shard.is_some_and(|it| it.split("-of-").all(|it| it.parse::<u32>().is_ok()));
            let ours = shards.iter().any(|it| it.name == name);
            if !ours && (is_shard || name == SINGLE || name == INDEX) {
                let _ = fs::remove_file(self.folder.join(name));
            }
        }
    }
}

impl Drop for CheckpointWriter {
    fn drop(&mut self) {
        self.shards.iter().for_each(|it| drop(fs::remove_file(&it.beside)));
    }
}

/// Groups into shards, in their order.
fn divide(groups: &[Vec<Entry>], shard_bytes: u64) -> Vec<Vec<Entry>> {
    let mut shards: Vec<Vec<Entry>> = vec![Vec::new()];
    let mut bytes = 0;
    for group in groups {
        let more: u64 = group.iter().map(Entry::bytes).sum();
        if bytes > 0 && bytes + more > shard_bytes {
            shards.push(Vec::new());
            bytes = 0;
        }
        bytes += more;
        if let Some(shard) = shards.last_mut() {
            shard.extend_from_slice(group);
        }
    }
    shards
}

/// How safetensors names a type.
pub(crate) fn stored_as(dtype: DType) -> Dtype {
    match dtype {
        DType::BF16 => Dtype::BF16,
        DType::F16 => Dtype::F16,
        _ => Dtype::F32,
    }
}

/// Numbers in a type (f32, f16 or bf16, rounded to the nearest), little-endian.
///
/// # Errors
/// When it is none of these types.
pub(crate) fn bytes_as(values: Vec<f32>, dtype: DType) -> Result<Vec<u8>> {
    let tensor = Tensor::from_vec(1, values.len(), values)?.cast(dtype)?;
    let mut bytes = vec![0; tensor.bytes()];
    match dtype {
        DType::BF16 => fill(&mut bytes, tensor.values()?, bf16::to_le_bytes),
        DType::F16 => fill(&mut bytes, tensor.values()?, f16::to_le_bytes),
        _ => fill(&mut bytes, tensor.values()?, f32::to_le_bytes),
    }
    Ok(bytes)
}

fn fill<T: Copy, const N: usize>(bytes: &mut [u8], values: &[T], to_bytes: impl Fn(T) -> [u8; N]) {
    bytes.chunks_exact_mut(N).zip(values).for_each(|(out, it)| out.copy_from_slice(&to_bytes(*it)));
}
