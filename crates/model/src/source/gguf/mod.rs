//! Weights, config and vocabulary out of one GGUF file.

mod architecture;
mod blocks;
mod config;
mod header;
#[cfg(test)]
mod tests;
mod vocabulary;

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::Path;

use ferrotune_tensor::{DType, Error, Result, Tensor};
use rayon::prelude::*;
use serde_json::Value as Json;
use sha2::{Digest, Sha256};

use super::mapped::{Mapped, bf16s, f16s};
use super::{Stored, WeightSource, check_rows};
use architecture::ARCHITECTURES;
pub use architecture::{GgufArchitecture, file_row};
pub use blocks::GgufType;
use header::{Header, Value};
pub use vocabulary::{GgufVocabulary, RawValue, raw_vocabulary};

/// Reads all of a file of these bytes, for fuzzers: its config and spec, its vocabulary, and a row of each tensor. Returns
/// how many tensors that were.
pub fn read_gguf_through(bytes: &[u8]) -> usize {
    let Ok(source) = GgufSource::of(Mapped::held("f.gguf", bytes)) else { return 0 };
    let _ = source.vocabulary();
    let _ = source.config().and_then(|config| crate::families::spec(&config, source.path()));
    let read = |name: &&str| {
        let (rows, cols) = source.shape(name)?;
        let mut out = vec![0.0; cols];
        source.read_rows(name, rows - 1..rows, &mut out)
    };
    source.names().iter().filter(|name| read(name).is_ok()).count()
}

/// What frequencies are divided by: in all contexts, in short and in long ones.
const FACTORS: [&str; 3] = ["rope_freqs.weight", "rope_factors_short.weight", "rope_factors_long.weight"];

/// More than any model has, all experts together; what is beyond is damage.
const MOST_MATRICES: usize = 1 << 20;

/// What a row of numbers is divided into where one has to be in memory for a moment.
const CHUNK: usize = 64 * 1024;

/// A GGUF file, mapped into memory.
pub struct GgufSource {
    file: Mapped,
    header: Header,
    architecture: &'static GgufArchitecture,
    entries: BTreeMap<String, Entry>,
}

/// A tensor by its canonical name.
struct Entry {
    kind: GgufType,
    shape: Vec<usize>,
    bytes: Range<usize>,
    /// Heads whose rows are brought into our order.
    reordered: Option<usize>,
}

impl GgufSource {
    /// Opens a file and reads its header.
    ///
    /// # Errors
    /// When the file is truncated or contradicts itself, holds a type of numbers that can't be
    /// read, or is of an architecture that isn't there yet.
    pub fn open(path: &Path) -> Result<GgufSource> {
        GgufSource::of(Mapped::open(path)?)
    }

    fn of(file: Mapped) -> Result<GgufSource> {
        let path = file.path.clone();
        let header = header::parse(file.bytes()).map_err(|message| Error::file(&path, message))?;
        let wrong = |message: String| Err(Error::file(&path, message));
        if let Some(Value::Whole(count)) = header.values.get("split.count")
            && *count > 1
        {
            return wrong(format!(
                "is one of {count} parts: join them with `llama-gguf-split --merge` first"
            ));
        }
        if let Some(Value::Text(kind)) = header.values.get("general.type")
            && kind != "model"
        {
            return wrong(format!("is of the type `{kind}`, not a model"));
        }
        let name = match header.values.get("general.architecture") {
            Some(Value::Text(name)) => name,
            _ => return wrong("`general.architecture` is missing: it names the model's family".into()),
        };
        let Some(architecture) = GgufArchitecture::named(name) else {
            let there: Vec<&str> = ARCHITECTURES.iter().map(|it| it.name).collect();
            return wrong(format!(
                "GGUF files of the family `{name}` are not there yet, only: {}",
                there.join(", ")
            ));
        };
        let mut source = GgufSource { file, header, architecture, entries: BTreeMap::new() };
        source.name_tensors();
        Ok(source)
    }

    fn name_tensors(&mut self) {
        let heads = |key: &str| match self.header.values.get(&format!("{}.{key}", self.architecture.name)) {
            Some(Value::Whole(it)) => usize::try_from(*it).unwrap_or(0),
            _ => 0,
        };
        let q_heads = heads("attention.head_count");
        let kv_heads =
            if heads("attention.head_count_kv") == 0 { q_heads } else { heads("attention.head_count_kv") };
        for (name, tensor) in &self.header.tensors {
            if FACTORS.contains(&name.as_str()) {
                continue; // in the config
            }
            let (ours, module) = self.architecture.canonical(name).unwrap_or_else(|| (name.clone(), ""));
            let reordered = match module {
                "attn_q" => Some(q_heads),
                "attn_k" => Some(kv_heads),
                _ => None,
            };
            let reordered = reordered.filter(|_| self.architecture.pairs_are_neighbours);
            let (kind, shape, bytes) = (tensor.kind, tensor.shape.clone(), tensor.bytes.clone());
            let stack = match shape[..] {
                [experts, rows, cols] if experts > 0 => Some((experts, rows, cols)),
                [rows, cols] => Some((1, rows, cols)),
                _ => None,
            };
            if let Some((experts, rows, cols)) = stack
                && GgufArchitecture::of_expert(&ours, module, 0).is_some()
                && experts <= MOST_MATRICES - self.entries.len().min(MOST_MATRICES)
            {
                let length = bytes.len() / experts;
                for expert in 0..experts {
                    let Some(name) = GgufArchitecture::of_expert(&ours, module, expert) else { continue };
                    let start = bytes.start + expert * length;
                    let (shape, bytes) = (vec![rows, cols], start..start + length);
                    self.entries.insert(name, Entry { kind, shape, bytes, reordered: None });
                }
                continue;
            }
            self.entries.insert(ours, Entry { kind, shape, bytes, reordered });
        }
    }

    /// What the file says about its model, in the words of config.json.
    ///
    /// # Errors
    /// When something that a model needs isn't said, or something is said that isn't known.
    pub fn config(&self) -> Result<Json> {
        let list = |name: &str| match self.header.tensors.get(name) {
            None => Ok(None),
            Some(tensor) if tensor.shape.len() == 1 && tensor.kind == GgufType::F32 => {
                let mut factors = vec![0.0; tensor.shape[0]];
                tensor.kind.read(&self.file.bytes()[tensor.bytes.clone()], &mut factors);
                Ok(Some(factors))
            }
            Some(_) => Err(self.wrong(format!("tensor `{name}` is no list of F32 numbers"))),
        };
        let [all, short, long] = FACTORS;
        let factors = config::Factors { all: list(all)?, short: list(short)?, long: list(long)? };
        config::read(&self.header, self.file.bytes(), self.architecture, factors)
            .map_err(|message| self.wrong(message))
    }

    /// The tokenizer and the chat template.
    ///
    /// # Errors
    /// When the lists don't fit each other.
    pub fn vocabulary(&self) -> Result<GgufVocabulary> {
        vocabulary::read(&self.header, self.file.bytes()).map_err(|message| self.wrong(message))
    }

    fn wrong(&self, message: impl Into<String>) -> Error {
        Error::file(&self.file.path, message)
    }

    fn entry(&self, name: &str) -> Result<&Entry> {
        let missing = || Error::MissingTensor { file: self.file.path.clone(), name: name.into() };
        self.entries.get(name).ok_or_else(missing)
    }

    fn bytes(&self, entry: &Entry) -> &[u8] {
        &self.file.bytes()[entry.bytes.clone()]
    }
}

impl Entry {
    /// Where our row is in the file.
    fn file_row(&self, row: usize, rows: usize) -> usize {
        match self.reordered.filter(|it| *it > 0 && rows.is_multiple_of(2 * it)) {
            Some(heads) => file_row(row, rows / heads),
            None => row,
        }
    }

    /// Rows and columns, a vector being one row.
    fn matrix(&self) -> Option<(usize, usize)> {
        match self.shape[..] {
            [n] => Some((1, n)),
            [rows, cols] => Some((rows, cols)),
            _ => None,
        }
    }
}

impl WeightSource for GgufSource {
    fn path(&self) -> &Path {
        &self.file.path
    }

    fn names(&self) -> Vec<&str> {
        self.entries.keys().map(String::as_str).collect()
    }

    fn contains(&self, name: &str) -> bool {
        self.entries.contains_key(name)
    }

    fn shape(&self, name: &str) -> Result<(usize, usize)> {
        let entry = self.entry(name)?;
        let wrong = || {
            self.wrong(format!(
                "tensor `{name}` has the shape {:?}, expected one or two dimensions",
                entry.shape
            ))
        };
        entry.matrix().ok_or_else(wrong)
    }

    fn dtype(&self, name: &str) -> Result<DType> {
        let entry = self.entry(name)?;
        Ok(match entry.kind {
            // Bringing rows into order goes through f32.
            _ if entry.reordered.is_some() => DType::F32,
            GgufType::F16 => DType::F16,
            GgufType::Bf16 => DType::BF16,
            _ => DType::F32,
        })
    }

    fn stored_dtype(&self, name: &str) -> Result<Option<DType>> {
        Ok(match self.entry(name)?.kind {
            GgufType::F32 => Some(DType::F32),
            GgufType::F16 => Some(DType::F16),
            GgufType::Bf16 => Some(DType::BF16),
            _ => None,
        })
    }

    fn get(&self, name: &str) -> Result<Stored> {
        let (rows, cols) = self.shape(name)?;
        let bytes = self.bytes(self.entry(name)?);
        let tensor = match self.dtype(name)? {
            DType::F16 => Tensor::from_vec(rows, cols, f16s(bytes))?,
            DType::BF16 => Tensor::from_vec(rows, cols, bf16s(bytes))?,
            _ => self.get_f32(name)?,
        };
        Ok(Stored::Dense(tensor))
    }

    fn read_rows(&self, name: &str, rows: Range<usize>, out: &mut [f32]) -> Result<()> {
        let entry = self.entry(name)?;
        let shape = self.shape(name)?;
        check_rows(name, shape, &rows, out.len())?;
        let bytes = self.bytes(entry);
        if entry.shape.len() == 1 {
            let mut values = vec![0.0; shape.1];
            entry.kind.read(bytes, &mut values);
            let from = |i| values[entry.file_row(i, values.len())];
            out.iter_mut().enumerate().for_each(|(i, out)| *out = from(i));
            return Ok(());
        }
        let row_bytes = shape.1 / entry.kind.block() * entry.kind.block_bytes();
        let rows_each = (CHUNK / shape.1).max(1);
        let parts = out.par_chunks_mut(rows_each * shape.1).enumerate();
        parts.for_each(|(part, out)| {
            let first = rows.start + part * rows_each;
            if entry.reordered.is_none() {
                let start = first * row_bytes;
                entry.kind.read(&bytes[start..start + out.len() / shape.1 * row_bytes], out);
                return;
            }
            for (i, out) in out.chunks_mut(shape.1).enumerate() {
                let start = entry.file_row(first + i, shape.0) * row_bytes;
                entry.kind.read(&bytes[start..start + row_bytes], out);
            }
        });
        Ok(())
    }

    fn forget(&self, name: &str) {
        if let Some(entry) = self.entries.get(name) {
            self.file.forget(&entry.bytes);
        }
    }

    fn is_as_stored(&self, _name: &str) -> bool {
        true
    }

    fn fingerprint(&self) -> String {
        let mut hash = Sha256::new();
        let bytes = self.file.bytes();
        hash.update((bytes.len() as u64).to_le_bytes());
        hash.update(&bytes[..self.header.data.min(bytes.len())]);
        super::hex(&hash.finalize())
    }
}
