//! A model as its file will hold it: each number rounded to the type that it is written in.

use std::collections::HashMap;
use std::ops::Range;

use ferrotune_model::source::{ChangedRows, ModelFiles, RowChange, WeightSource};
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
    let source = Box::new(ChangedRows { base: files.source, change: Rounded(types) });
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

/// How each tensor is written, by its canonical name.
struct Rounded(HashMap<String, Written>);

impl RowChange for Rounded {
    fn types(&self, _: &dyn WeightSource, name: &str) -> Result<Option<(DType, Option<DType>)>> {
        let read = |it: &Written| if it.less == 0.0 { it.dtype } else { DType::F32 };
        Ok(self.0.get(name).map(|it| (read(it), Some(it.dtype))))
    }

    fn change(&self, name: &str, _: Range<usize>, out: &mut [f32]) -> Result<()> {
        if let Some(written) = self.0.get(name) {
            written.round(out);
        }
        Ok(())
    }
}
