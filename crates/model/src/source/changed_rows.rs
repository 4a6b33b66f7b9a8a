use std::ops::Range;
use std::path::Path;

use ferrotune_tensor::{DType, Result};

use super::{Stored, WeightSource};

/// What becomes of a tensor's rows as they are read: an adapter's part in them, the rounding of a format.
pub trait RowChange: Send + Sync {
    /// The type that a tensor is read as and the one that a file has it in, as [`WeightSource::stored_dtype`] says it; none
    /// where the tensor is as in the base.
    ///
    /// # Errors
    /// When there is no such tensor.
    fn types(&self, base: &dyn WeightSource, name: &str) -> Result<Option<(DType, Option<DType>)>>;

    /// Changes some rows, in place.
    ///
    /// # Errors
    /// When a number can't be what it is to become.
    fn change(&self, name: &str, rows: Range<usize>, out: &mut [f32]) -> Result<()>;

    /// The source's fingerprint, of the base's.
    fn fingerprint(&self, base: String) -> String {
        base
    }
}

/// A source whose rows are changed as they are read.
pub struct ChangedRows<C> {
    /// What is read.
    pub base: Box<dyn WeightSource>,
    /// What becomes of it.
    pub change: C,
}

impl<C: RowChange> WeightSource for ChangedRows<C> {
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
        let types = self.change.types(self.base.as_ref(), name)?;
        types.map_or_else(|| self.base.dtype(name), |(read, _)| Ok(read))
    }

    fn stored_dtype(&self, name: &str) -> Result<Option<DType>> {
        let types = self.change.types(self.base.as_ref(), name)?;
        types.map_or_else(|| self.base.stored_dtype(name), |(_, stored)| Ok(stored))
    }

    fn get(&self, name: &str) -> Result<Stored> {
        match self.change.types(self.base.as_ref(), name)? {
            Some((read, _)) => Ok(Stored::Dense(self.get_f32(name)?.cast(read)?)),
            None => self.base.get(name),
        }
    }

    fn read_rows(&self, name: &str, rows: Range<usize>, out: &mut [f32]) -> Result<()> {
        self.base.read_rows(name, rows.clone(), out)?;
        match self.change.types(self.base.as_ref(), name)? {
            Some(_) => self.change.change(name, rows, out),
            None => Ok(()),
        }
    }

    fn forget(&self, name: &str) {
        self.base.forget(name);
    }

    fn fingerprint(&self) -> String {
        self.change.fingerprint(self.base.fingerprint())
    }
}
