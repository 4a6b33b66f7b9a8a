//! A model's weights with others in some places: a head of its own, rows for new tokens, what an adapter has saved.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::Path;

use ferrotune_tensor::{Counter, DType, Result, Tensor, stream_of};

use super::{Stored, WeightSource, check_rows};

/// What stands in the place of a tensor.
#[derive(Debug)]
pub enum Replacement {
    /// Another tensor of the source.
    Other(String),
    /// One of its own.
    Tensor(Tensor),
    /// A tensor of the source with new rows.
    Rows(NewRows),
}

/// Rows of token vectors that are new: the mean of the others with normal noise of deviation 1/√C
/// (LLaMA-Factory's noisy mean initialisation).
#[derive(Clone, Debug)]
pub struct NewRows {
    /// The tensor of the source.
    pub of: String,
    /// Rows of the result; those that the source hasn't are new.
    pub rows: usize,
    /// Rows of the source that are new as well.
    pub also: Vec<usize>,
    /// Of the noise.
    pub seed: u64,
}

/// A source with other tensors in some places.
pub struct Changed {
    /// Where all others come from.
    pub base: Box<dyn WeightSource>,
    /// By canonical names.
    pub replacements: BTreeMap<String, Replacement>,
}

impl NewRows {
    fn is_new(&self, row: usize, stored: usize) -> bool {
        row >= stored || self.also.contains(&row)
    }

    fn make(&self, base: &dyn WeightSource, rows: Range<usize>, out: &mut [f32]) -> Result<()> {
        let (stored, cols) = base.shape(&self.of)?;
        let kept = rows.start.min(stored)..rows.end.min(stored);
        let (old, _) = out.split_at_mut(kept.len() * cols);
        base.read_rows(&self.of, kept, old)?;
        if !rows.clone().any(|row| self.is_new(row, stored)) {
            return Ok(());
        }
        let mean = self.mean(base)?;
        let noise = Counter::new(&[self.seed, stream_of(&self.of)]);
        for (row, out) in rows.zip(out.chunks_mut(cols)).filter(|(row, _)| self.is_new(*row, stored)) {
            for (col, (out, mean)) in out.iter_mut().zip(&mean).enumerate() {
                let normal = noise.normal((row * cols + col) as u64);
                *out = (mean + normal / (cols as f64).sqrt()) as f32;
            }
        }
        Ok(())
    }

    fn mean(&self, base: &dyn WeightSource) -> Result<Vec<f64>> {
        let (stored, cols) = base.shape(&self.of)?;
        let (mut sum, mut row) = (vec![0.0; cols], vec![0.0; cols]);
        let old: Vec<usize> = (0..stored).filter(|it| !self.also.contains(it)).collect();
        for it in &old {
            base.read_rows(&self.of, *it..*it + 1, &mut row)?;
            sum.iter_mut().zip(&row).for_each(|(sum, it)| *sum += f64::from(*it));
        }
        Ok(sum.into_iter().map(|it| it / old.len().max(1) as f64).collect())
    }
}

impl WeightSource for Changed {
    fn path(&self) -> &Path {
        self.base.path()
    }

    fn names(&self) -> Vec<&str> {
        let mut names = self.base.names();
        names.extend(self.replacements.keys().map(String::as_str));
        names.sort_unstable();
        names.dedup();
        names
    }

    fn shape(&self, name: &str) -> Result<(usize, usize)> {
        match self.replacements.get(name) {
            None => self.base.shape(name),
            Some(Replacement::Other(other)) => self.base.shape(other),
            Some(Replacement::Tensor(tensor)) => Ok(tensor.shape()),
            Some(Replacement::Rows(new)) => Ok((new.rows, self.base.shape(&new.of)?.1)),
        }
    }

    fn dtype(&self, name: &str) -> Result<DType> {
        match self.replacements.get(name) {
            None => self.base.dtype(name),
            Some(Replacement::Other(other)) => self.base.dtype(other),
            Some(Replacement::Tensor(tensor)) => Ok(tensor.dtype()),
            Some(Replacement::Rows(new)) => self.base.dtype(&new.of),
        }
    }

    fn stored_dtype(&self, name: &str) -> Result<Option<DType>> {
        match self.replacements.get(name) {
            None => self.base.stored_dtype(name),
            Some(Replacement::Other(other)) => self.base.stored_dtype(other),
            Some(Replacement::Tensor(tensor)) => Ok(Some(tensor.dtype())),
            Some(Replacement::Rows(new)) => self.base.stored_dtype(&new.of),
        }
    }

    fn get(&self, name: &str) -> Result<Stored> {
        match self.replacements.get(name) {
            None => self.base.get(name),
            Some(Replacement::Other(other)) => self.base.get(other),
            Some(Replacement::Tensor(tensor)) => Ok(Stored::Dense(tensor.try_clone()?)),
            Some(Replacement::Rows(_)) => Ok(Stored::Dense(self.get_f32(name)?.cast(self.dtype(name)?)?)),
        }
    }

    fn read_rows(&self, name: &str, rows: Range<usize>, out: &mut [f32]) -> Result<()> {
        match self.replacements.get(name) {
            None => self.base.read_rows(name, rows, out),
            Some(Replacement::Other(other)) => self.base.read_rows(other, rows, out),
            Some(Replacement::Rows(new)) => {
                check_rows(name, self.shape(name)?, &rows, out.len())?;
                new.make(self.base.as_ref(), rows, out)
            }
            Some(Replacement::Tensor(tensor)) => {
                check_rows(name, tensor.shape(), &rows, out.len())?;
                out.copy_from_slice(&tensor.to_f32()?[rows.start * tensor.cols()..][..out.len()]);
                Ok(())
            }
        }
    }

    fn forget(&self, name: &str) {
        self.base.forget(name);
    }

    /// The base's own: what stands in its places isn't another model.
    fn is_as_stored(&self, name: &str) -> bool {
        !self.replacements.contains_key(name) && self.base.is_as_stored(name)
    }

    fn fingerprint(&self) -> String {
        self.base.fingerprint()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::source::ModelFiles;
    use crate::spec::names;

    #[test]
    fn new_rows_are_the_mean_with_noise_and_others_stay() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures/llama_tiny");
        let name = names::EMBEDDING;
        let base = ModelFiles::open(folder).unwrap().source;
        let (old, mean) = {
            let rows = NewRows { of: name.into(), rows: 0, also: vec![299], seed: 0 };
            (base.get_f32(name).unwrap().to_f32().unwrap(), rows.mean(base.as_ref()).unwrap())
        };
        let new = NewRows { of: name.into(), rows: 1344, also: vec![299], seed: 7 };
        let replacements = BTreeMap::from([(name.to_string(), Replacement::Rows(new))]);
        let changed = Changed { base, replacements };
        let (rows, cols) = changed.shape(name).unwrap();
        let got = changed.get_f32(name).unwrap().to_f32().unwrap();
        assert_eq!((rows, &got[..299 * cols]), (1344, &old[..299 * cols]));
        let noise = got[299 * cols..].iter().enumerate().map(|(i, it)| f64::from(*it) - mean[i % cols]);
        let noise: Vec<f64> = noise.collect();
        let n = noise.len() as f64;
        let (middle, square) =
            (noise.iter().sum::<f64>() / n, noise.iter().map(|it| it * it).sum::<f64>() / n);
        assert!(middle.abs() < 3e-3 && (square * cols as f64 - 1.0).abs() < 0.03, "{middle} {square}");
        let mut row = vec![0.0; cols];
        changed.read_rows(name, 700..701, &mut row).unwrap();
        assert_eq!(row, got[700 * cols..701 * cols], "by row or as a whole");
    }
}
