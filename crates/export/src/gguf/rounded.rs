//! A model whose weights are what a GGUF file would hold: what was written is compared with it.

use std::collections::HashMap;
use std::ops::Range;
use std::path::PathBuf;

use ferrotune_model::source::{ChangedRows, GgufType, ModelFiles, RowChange, WeightSource};
use ferrotune_tensor::{DType, Error, Result};

use super::{GgufMix, architecture, blocks, kinds, tensors};

/// The files with each weight rounded to its type in the file; all are read as f32.
///
/// # Errors
/// When llama.cpp doesn't have the family.
pub fn rounded_as_gguf(files: ModelFiles, mix: GgufMix) -> Result<ModelFiles> {
    let architecture = architecture(&files.path, &files.spec)?;
    let planned = tensors(&files.path, &files.spec, files.source.as_ref(), architecture)?;
    let kinds = kinds(mix, &files.spec, architecture, &planned);
    let parts = planned.iter().zip(kinds);
    let types = parts.flat_map(|(it, kind)| it.parts.iter().map(move |part| (part.clone(), kind))).collect();
    drop(planned);
    let change = Rounded { path: files.path.clone(), types };
    let source = Box::new(ChangedRows { base: files.source, change });
    Ok(ModelFiles { source, ..files })
}

struct Rounded {
    /// For messages.
    path: PathBuf,
    /// By canonical names.
    types: HashMap<String, GgufType>,
}

impl RowChange for Rounded {
    fn types(&self, base: &dyn WeightSource, name: &str) -> Result<Option<(DType, Option<DType>)>> {
        base.shape(name).map(|_| Some((DType::F32, Some(DType::F32))))
    }

    fn change(&self, name: &str, _: Range<usize>, out: &mut [f32]) -> Result<()> {
        let Some(kind) = self.types.get(name).filter(|it| **it != GgufType::F32) else { return Ok(()) };
        let mut bytes = vec![0; blocks::length(*kind, out.len())];
        blocks::write(*kind, out, &mut bytes)
            .map_err(|message| Error::file(&self.path, format!("tensor `{name}` {message}")))?;
        kind.read(&bytes, out);
        Ok(())
    }
}
