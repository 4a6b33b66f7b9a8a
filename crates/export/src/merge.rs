//! A base model with an adapter in its weights.

use std::collections::{BTreeMap, HashMap};
use std::ops::Range;

use ferrotune_lora::Change;
use ferrotune_model::source::{ChangedRows, ModelFiles, Replacement, RowChange, WeightSource};
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
    let source = Box::new(ChangedRows { base: files.source, change: Merged(changes) });
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

/// The changes of weights, by their names.
struct Merged(HashMap<String, Change>);

impl RowChange for Merged {
    /// What is in few bits is so no longer.
    fn types(&self, base: &dyn WeightSource, name: &str) -> Result<Option<(DType, Option<DType>)>> {
        let stored = base.stored_dtype(name)?;
        let other = stored.is_none() || self.0.contains_key(name);
        other.then(|| Ok((base.dtype(name)?, stored))).transpose()
    }

    fn change(&self, name: &str, rows: Range<usize>, out: &mut [f32]) -> Result<()> {
        self.0.get(name).map_or(Ok(()), |change| change.merge_rows(rows, out))
    }

    /// Another than the base's for each adapter.
    fn fingerprint(&self, base: String) -> String {
        let mut hash = 0xcbf2_9ce4_8422_2325_u64;
        let mut sorted: Vec<_> = self.0.iter().collect();
        sorted.sort_unstable_by_key(|(name, _)| *name);
        for tensor in sorted.into_iter().flat_map(|(_, it)| it.tensors()) {
            for value in tensor.values::<f32>().unwrap_or_default() {
                hash = (hash ^ u64::from(value.to_bits())).wrapping_mul(0x0100_0000_01b3);
            }
        }
        format!("{base}+{hash:016x}")
    }
}
