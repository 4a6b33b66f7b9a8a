//! A model as its file will hold it: each number rounded to the type that it is written in.

use std::collections::HashMap;
use std::ops::Range;
use std::path::Path;

use ferrotune_model::source::{ModelFiles, Stored, WeightSource};
use ferrotune_tensor::{DType, Result, bf16, f16};

use crate::FolderOptions;
use crate::model::written_dtype;

/// The model that [`crate::write_folder`] writes with these options, before it is written.
///
/// # Errors
/// When a tensor is missing.
pub fn rounded(files: ModelFiles, options: FolderOptions) -> Result<ModelFiles> {
    let mut types = HashMap::new();
    for tensor in files.spec.checkpoint_tensors() {
        let dtype = written_dtype(&files, options, &tensor)?;
        types.extend(tensor.parts.into_iter().map(|part| (part, Written { dtype, less: tensor.less })));
    }
    let source = Box::new(Rounded { base: files.source, types });
    Ok(ModelFiles { source, four_bit: None, ..files })
}

/// How a tensor is written: in a type, less a number.
#[derive(Clone, Copy)]
struct Written {
    dtype: DType,
    less: f32,
}

impl Written {
    fn round(self, values: &mut [f32]) {
        let round = |it: f32| match self.dtype {
            DType::BF16 => bf16::from_f32(it).to_f32(),
            DType::F16 => f16::from_f32(it).to_f32(),
            _ => it,
        };
        values.iter_mut().for_each(|it| *it = round(*it - self.less) + self.less);
    }
}

struct Rounded {
    base: Box<dyn WeightSource>,
    /// By canonical name.
    types: HashMap<String, Written>,
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
        match self.types.get(name) {
            Some(it) if it.less == 0.0 => Ok(it.dtype),
            Some(_) => Ok(DType::F32),
            None => self.base.dtype(name),
        }
    }

    fn stored_dtype(&self, name: &str) -> Result<Option<DType>> {
        self.types.get(name).map_or_else(|| self.base.stored_dtype(name), |it| Ok(Some(it.dtype)))
    }

    fn get(&self, name: &str) -> Result<Stored> {
        Ok(Stored::Dense(self.get_f32(name)?.cast(self.dtype(name)?)?))
    }

    fn read_rows(&self, name: &str, rows: Range<usize>, out: &mut [f32]) -> Result<()> {
        self.base.read_rows(name, rows, out)?;
        if let Some(written) = self.types.get(name) {
            written.round(out);
        }
        Ok(())
    }

    fn forget(&self, name: &str) {
        self.base.forget(name);
    }

    fn fingerprint(&self) -> String {
        self.base.fingerprint()
    }
}
