//! A model whose weights are what a GGUF file would hold: what was written is compared with it.

use std::collections::HashMap;
use std::ops::Range;
use std::path::Path;

use ferrotune_model::source::{GgufType, ModelFiles, Stored, WeightSource};
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
    let source = Box::new(Rounded { base: files.source, types });
    Ok(ModelFiles { source, ..files })
}

struct Rounded {
    base: Box<dyn WeightSource>,
    /// By canonical names.
    types: HashMap<String, GgufType>,
}

impl WeightSource for Rounded {
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
        self.base.shape(name).map(|_| DType::F32)
    }

    fn get(&self, name: &str) -> Result<Stored> {
        self.get_f32(name).map(Stored::Dense)
    }

    fn read_rows(&self, name: &str, rows: Range<usize>, out: &mut [f32]) -> Result<()> {
        self.base.read_rows(name, rows, out)?;
        let Some(kind) = self.types.get(name).filter(|it| **it != GgufType::F32) else { return Ok(()) };
        let mut bytes = vec![0; blocks::length(*kind, out.len())];
        blocks::write(*kind, out, &mut bytes)
            .map_err(|message| Error::file(self.path(), format!("tensor `{name}` {message}")))?;
        kind.read(&bytes, out);
        Ok(())
    }

    fn fingerprint(&self) -> String {
        format!("{} rounded", self.base.fingerprint())
    }
}
