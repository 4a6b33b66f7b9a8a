//! A base model with an adapter in its weights.

use std::collections::{BTreeMap, HashMap};
use std::ops::Range;
use std::path::Path;

use ferrotune_lora::Change;
use ferrotune_model::source::{ModelFiles, Replacement, Stored, WeightSource};
use ferrotune_model::spec::names;
use ferrotune_tensor::{DType, Result, Tensor};

use crate::{LoraTensors, PeftAdapter};

/// The model that base and adapter are together, under canonical names: what every format of a whole
/// model is written from. Nothing is read before it is asked for; a row is merged in f32 when it is read.
///
/// # Errors
/// When the adapter is another model's.
pub fn merge(files: ModelFiles, mut adapter: PeftAdapter) -> Result<ModelFiles> {
    adapter.check_fits(&files.spec)?;
    let scaling = adapter.scaling();
    let mut saved = std::mem::take(&mut adapter.saved);
    for (name, tensor) in &mut saved {
        let stored = if files.source.contains(name) { name.as_str() } else { names::EMBEDDING };
        if let Some(dtype) = files.source.stored_dtype(stored)? {
            *tensor = tensor.try_clone()?.cast(dtype)?;
        }
    }
    let files = with_saved(files, saved)?;
    let mut changes = HashMap::new();
    for LoraTensors { module, a, b, magnitude } in adapter.tensors {
        changes.insert(format!("{module}.weight"), Change::new(a, b, scaling, magnitude)?);
    }
    let source = Box::new(Merged { base: files.source, changes });
    Ok(ModelFiles { source, four_bit: None, ..files })
}

/// The model with the whole weights that were saved beside an adapter. One of an embedding and a head that
/// were one stays as it was where the other is saved, as in PEFT.
///
/// # Errors
/// When they don't fit each other.
pub fn with_saved(files: ModelFiles, saved: BTreeMap<String, Tensor>) -> Result<ModelFiles> {
    if saved.is_empty() {
        return Ok(files);
    }
    let saved = saved.into_iter().map(|(name, tensor)| (name, Replacement::Tensor(tensor)));
    let mut changes: BTreeMap<String, Replacement> = saved.collect();
    if files.spec.tie_word_embeddings {
        let tied = || Replacement::Other(names::EMBEDDING.to_string());
        changes.entry(names::HEAD.to_string()).or_insert_with(tied);
    }
    files.change(changes)
}

/// A source with an adapter in it.
struct Merged {
    base: Box<dyn WeightSource>,
    /// By the weight's name.
    changes: HashMap<String, Change>,
}

impl WeightSource for Merged {
    fn path(&self) -> &Path {
        self.base.path()
    }

    fn names(&self) -> Vec<&str> {
        self.base.names()
    }

    fn shape(&self, name: &str) -> Result<(usize, usize)> {
        self.base.shape(name)
    }

    fn dtype(&self, name: &str) -> Result<DType> {
        self.base.dtype(name)
    }

    fn stored_dtype(&self, name: &str) -> Result<Option<DType>> {
        self.base.stored_dtype(name)
    }

    fn get(&self, name: &str) -> Result<Stored> {
        match self.changes.contains_key(name) {
            true => Ok(Stored::Dense(self.get_f32(name)?.cast(self.dtype(name)?)?)),
            false => Ok(Stored::Dense(self.base.get(name)?.into_dense()?)),
        }
    }

    fn read_rows(&self, name: &str, rows: Range<usize>, out: &mut [f32]) -> Result<()> {
        self.base.read_rows(name, rows.clone(), out)?;
        match self.changes.get(name) {
            Some(change) => change.merge_rows(rows, out),
            None => Ok(()),
        }
    }

    fn forget(&self, name: &str) {
        self.base.forget(name);
    }

    /// Another than the base's for each adapter.
    fn fingerprint(&self) -> String {
        let mut hash = 0xcbf2_9ce4_8422_2325_u64;
        let mut sorted: Vec<_> = self.changes.iter().collect();
        sorted.sort_unstable_by_key(|(name, _)| *name);
        for tensor in sorted.into_iter().flat_map(|(_, it)| it.tensors()) {
            for value in tensor.values::<f32>().unwrap_or_default() {
                hash = (hash ^ u64::from(value.to_bits())).wrapping_mul(0x0100_0000_01b3);
            }
        }
        format!("{}+{hash:016x}", self.base.fingerprint())
    }
}
