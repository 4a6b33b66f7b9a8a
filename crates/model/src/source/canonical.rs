//! A checkpoint of another form ([`CheckpointForm`]) under canonical names.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::Path;

use ferrotune_tensor::{DType, Error, Result, Tensor};

use super::{Stored, WeightSource, check_rows};
use crate::spec::{CheckpointForm, FUSED, ModelSpec, from_language_model, from_mixtral, names};

/// Where a tensor is.
struct Place {
    stored_name: String,
    rows: Range<usize>,
    cols: usize,
    less_one: bool,
}

pub(super) struct CanonicalSource {
    inner: Box<dyn WeightSource>,
    places: BTreeMap<String, Place>,
}

impl CanonicalSource {
    pub(super) fn new(spec: &ModelSpec, inner: Box<dyn WeightSource>) -> Result<CanonicalSource> {
        CanonicalSource::named(spec, inner, |name| Some(name.to_string()))
    }

    /// The part for text, where a checkpoint has others beside it.
    pub(super) fn of_language_model(
        spec: &ModelSpec,
        inner: Box<dyn WeightSource>,
    ) -> Result<CanonicalSource> {
        CanonicalSource::named(spec, inner, from_language_model)
    }

    fn named(
        spec: &ModelSpec,
        inner: Box<dyn WeightSource>,
        own: impl Fn(&str) -> Option<String>,
    ) -> Result<CanonicalSource> {
        let mut places = BTreeMap::new();
        for name in inner.names() {
            let Some(canonical) = own(name) else { continue };
            let (rows, cols) = inner.shape(name)?;
            let less_one =
                spec.checkpoint == CheckpointForm::NormsLessOne && canonical.ends_with("norm.weight");
            let canonical = match spec.checkpoint {
                CheckpointForm::Mixtral => from_mixtral(&canonical),
                _ => canonical,
            };
            places.insert(canonical, Place { stored_name: name.into(), rows: 0..rows, cols, less_one });
        }
        if spec.checkpoint == CheckpointForm::Fused {
            cut(spec, inner.as_ref(), &mut places)?;
        }
        Ok(CanonicalSource { inner, places })
    }

    fn place(&self, name: &str) -> Result<&Place> {
        let missing = || Error::file(self.inner.path(), format!("tensor `{name}` is missing"));
        self.places.get(name).ok_or_else(missing)
    }
}

/// Puts the parts of fused projections in their place.
fn cut(spec: &ModelSpec, inner: &dyn WeightSource, places: &mut BTreeMap<String, Place>) -> Result<()> {
    for (index, layer) in spec.layers.iter().enumerate() {
        let linears = layer.linears(spec.hidden_size);
        for (fused, parts) in FUSED {
            let stored_name = names::weight(index, fused);
            let Some(whole) = places.remove(&stored_name) else { continue };
            let mut first = 0;
            for it in linears.iter().filter(|it| parts.contains(&it.part.as_str())) {
                let rows = first..first + it.out_features;
                first = rows.end;
                let place =
                    Place { stored_name: stored_name.clone(), rows, cols: whole.cols, less_one: false };
                if places.insert(names::weight(index, &it.part), place).is_some() {
                    let message = format!("tensor `{stored_name}`: `{}` is there too, by itself", it.part);
                    return Err(Error::file(inner.path(), message));
                }
            }
            let what = format!("{}: tensor `{stored_name}`", inner.path().display());
            Error::check_shape(&what, (first, spec.hidden_size), (whole.rows.end, whole.cols))?;
        }
    }
    Ok(())
}

impl WeightSource for CanonicalSource {
    fn path(&self) -> &Path {
        self.inner.path()
    }

    fn names(&self) -> Vec<&str> {
        self.places.keys().map(String::as_str).collect()
    }

    fn shape(&self, name: &str) -> Result<(usize, usize)> {
        self.place(name).map(|it| (it.rows.len(), it.cols))
    }

    fn dtype(&self, name: &str) -> Result<DType> {
        let place = self.place(name)?;
        let stored = self.inner.dtype(&place.stored_name)?;
        Ok(if place.less_one { DType::F32 } else { stored })
    }

    fn stored_dtype(&self, name: &str) -> Result<Option<DType>> {
        self.inner.stored_dtype(&self.place(name)?.stored_name)
    }

    fn get(&self, name: &str) -> Result<Stored> {
        let place = self.place(name)?;
        if !place.less_one && place.rows.len() == self.inner.shape(&place.stored_name)?.0 {
            return self.inner.get(&place.stored_name);
        }
        if self.stored_dtype(name)?.is_none()
            && let Stored::FourBit(whole) = self.inner.get(&place.stored_name)?
            && let Some(rows) = whole.rows(place.rows.clone())
        {
            return Ok(Stored::FourBit(rows));
        }
        let tensor: Tensor = self.get_f32(name)?.cast(self.dtype(name)?)?;
        Ok(Stored::Dense(tensor))
    }

    fn read_rows(&self, name: &str, rows: Range<usize>, out: &mut [f32]) -> Result<()> {
        let place = self.place(name)?;
        check_rows(name, (place.rows.len(), place.cols), &rows, out.len())?;
        let first = place.rows.start;
        self.inner.read_rows(&place.stored_name, first + rows.start..first + rows.end, out)?;
        if place.less_one {
            out.iter_mut().for_each(|it| *it += 1.0);
        }
        Ok(())
    }

    fn forget(&self, name: &str) {
        if let Some(place) = self.places.get(name) {
            self.inner.forget(&place.stored_name);
        }
    }

    fn is_as_stored(&self, name: &str) -> bool {
        self.place(name).is_ok_and(|it| self.inner.is_as_stored(&it.stored_name))
    }

    fn fingerprint(&self) -> String {
        self.inner.fingerprint()
    }
}
