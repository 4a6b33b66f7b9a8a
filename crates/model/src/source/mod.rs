//! The files that weights come from: Hugging Face folders and GGUF.
//!
//! A source is mapped into memory, not read: a tensor costs memory when it is asked for, and only
//! then. Several threads may ask at once, so that layers are quantised side by side.

mod bnb;
mod canonical;
mod changed;
mod changed_rows;
mod files;
mod four_bit;
mod gguf;
mod kept;
mod mapped;
mod safetensors;
#[cfg(test)]
mod tests;

use std::ops::Range;
use std::path::Path;

use ferrotune_tensor::{DType, Error, Result, Tensor};

pub use bnb::FourBitKind;
pub use changed::{Changed, NewRows, Replacement};
pub use changed_rows::{ChangedRows, RowChange};
pub use files::{FileKind, ModelFiles};
pub use four_bit::{FourBit, FourBitScales};
pub use gguf::{
    GgufArchitecture, GgufSource, GgufType, GgufVocabulary, RawValue, file_row, raw_vocabulary,
    read_gguf_through,
};
pub use kept::{KeptWeights, KeptWriter, WithKept, kept_key};
pub use safetensors::{SafetensorsSource, read_safetensors_through};

/// A tensor as its file holds it.
#[derive(Debug)]
#[non_exhaustive]
pub enum Stored {
    /// Numbers, in the file's type where that is f32, f16 or bf16, else in f32.
    Dense(Tensor),
    /// Codes of 4 bits, as bitsandbytes keeps them.
    FourBit(FourBit<'static>),
}

impl Stored {
    /// In plain numbers, of the original's type where it is in few bits.
    ///
    /// # Errors
    /// When the original's type isn't f32, f16 or bf16.
    pub fn into_dense(self) -> Result<Tensor> {
        match self {
            Stored::Dense(tensor) => Ok(tensor),
            Stored::FourBit(matrix) => matrix.to_dense(),
        }
    }
}

/// Where weights come from, by their canonical names ([`crate::spec::names`]).
pub trait WeightSource: Send + Sync {
    /// The file or folder, for messages.
    fn path(&self) -> &Path;
    /// All tensors, sorted.
    fn names(&self) -> Vec<&str>;
    /// Rows and columns of a tensor, without reading it; a vector is one row.
    ///
    /// # Errors
    /// When there is no such tensor or it has more than two dimensions.
    fn shape(&self, name: &str) -> Result<(usize, usize)>;
    /// The type that [`WeightSource::get`] gives.
    ///
    /// # Errors
    /// When there is no such tensor.
    fn dtype(&self, name: &str) -> Result<DType>;
    /// The type of its numbers in the file; none where the file holds them in few bits.
    ///
    /// # Errors
    /// When there is no such tensor.
    fn stored_dtype(&self, name: &str) -> Result<Option<DType>> {
        self.dtype(name).map(Some)
    }
    /// The tensor as it is stored.
    ///
    /// # Errors
    /// When there is no such tensor.
    fn get(&self, name: &str) -> Result<Stored>;
    /// Writes some rows as f32, row after row: what quantising piece by piece needs.
    ///
    /// # Errors
    /// When there is no such tensor, or `out` isn't as long as the rows.
    fn read_rows(&self, name: &str, rows: Range<usize>, out: &mut [f32]) -> Result<()>;
    /// Says that a tensor won't be read again soon: the memory that its file is mapped to may be taken back.
    fn forget(&self, _name: &str) {}
    /// A short text that is another when the weights are: sizes of the files and a hash of their headers.
    fn fingerprint(&self) -> String;

    /// Whether a tensor is what the files hold: then it is another only where [`WeightSource::fingerprint`] or the files'
    /// times are.
    fn is_as_stored(&self, _name: &str) -> bool {
        false
    }

    /// Is there such a tensor?
    fn contains(&self, name: &str) -> bool {
        self.shape(name).is_ok()
    }

    /// The tensor in f32.
    ///
    /// # Errors
    /// When there is no such tensor.
    fn get_f32(&self, name: &str) -> Result<Tensor> {
        let (rows, cols) = self.shape(name)?;
        let mut values = vec![0.0; rows * cols];
        self.read_rows(name, 0..rows, &mut values)?;
        Tensor::from_vec(rows, cols, values)
    }
}

/// Checks a request for rows against a tensor's shape.
fn check_rows(name: &str, shape: (usize, usize), rows: &Range<usize>, out: usize) -> Result<()> {
    if rows.start > rows.end || rows.end > shape.0 || rows.len() * shape.1 != out {
        let message = format!("tensor `{name}` of {shape:?}: rows {rows:?} don't fit it or {out} numbers");
        return Err(Error::msg(message));
    }
    Ok(())
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|it| format!("{it:02x}")).collect()
}
