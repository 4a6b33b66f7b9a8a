//! Projections in 4 bits that were made of a checkpoint before, in a file of Ferrotune's own: then a start reads a quarter
//! of what the checkpoint has.
//!
//! The parts of each weight one after the other; an index in JSON; its length and SHA-256, and the file's kind, at the
//! end, so that weights are written as they come. Nothing of it is believed: the index has its checksum, each weight its
//! own, and a weight that isn't there or is damaged is read from the checkpoint again.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, BufWriter, Write};
use std::ops::Range;
use std::path::{Path, PathBuf};

use ferrotune_tensor::{DType, Result};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::four_bit::{FourBit, FourBitScales};
use super::mapped::Mapped;
use super::{Stored, WeightSource, hex};

/// What the file ends with; the digit is the form's.
const KIND: &[u8; 16] = b"ferrotune-kept-1";
/// Bytes of the end: the index's length, its checksum, the kind.
const END: usize = 8 + 32 + KIND.len();
/// Bytes that are hashed by one task.
const PIECE: usize = 1 << 20;

#[derive(Debug, Serialize, Deserialize)]
struct Index {
    /// What all was made of, and how.
    key: String,
    weights: BTreeMap<String, Entry>,
}

#[derive(Debug, Serialize, Deserialize)]
struct Entry {
    rows: usize,
    cols: usize,
    /// `F32`, `F16` or `BF16`.
    dtype: String,
    block: usize,
    /// Bytes from the file's start: first those of the codes, then those of `lengths`, without gaps.
    start: usize,
    /// Of codes; of the table; of scales; then, where these are codes too: of their map, of the scales of groups.
    lengths: Vec<usize>,
    /// Blocks of a group, and the bits of the offset.
    nested: Option<(usize, u32)>,
    checksum: String,
}

/// A file of weights in 4 bits.
#[derive(Debug)]
pub struct KeptWeights {
    file: Mapped,
    weights: BTreeMap<String, Entry>,
}

impl KeptWeights {
    /// None where there is no such file, or it is of another key or damaged.
    pub fn open(path: &Path, key: &str) -> Option<KeptWeights> {
        let file = Mapped::open(path).ok()?;
        let bytes = file.bytes();
        let (rest, end) = bytes.split_at(bytes.len().checked_sub(END)?);
        let (length, end) = end.split_at(8);
        let (checksum, kind) = end.split_at(32);
        let length = usize::try_from(u64::from_le_bytes(length.try_into().ok()?)).ok()?;
        let index = &rest[rest.len().checked_sub(length)?..];
        if kind != KIND || Sha256::digest(index)[..] != *checksum {
            return None;
        }
        let index: Index = serde_json::from_slice(index).ok()?;
        (index.key == key).then_some(KeptWeights { file, weights: index.weights })
    }

    /// None where there is no such weight, or it is damaged.
    pub fn get(&self, name: &str) -> Option<FourBit<'static>> {
        let entry = self.weights.get(name)?;
        let bytes = self.file.bytes();
        let mut at = entry.start;
        let mut parts = Vec::with_capacity(entry.lengths.len());
        for length in &entry.lengths {
            let end = at.checked_add(*length)?;
            parts.push(bytes.get(at..end)?);
            at = end;
        }
        if checksum(&parts) != entry.checksum {
            return None;
        }
        let scales = match (parts[..].get(2..)?, entry.nested) {
            ([scales], None) => FourBitScales::Plain(floats(scales)),
            ([codes, map, nested_absmax], Some((group, offset))) => FourBitScales::Nested {
                codes: codes.to_vec(),
                map: floats(map),
                group,
                nested_absmax: floats(nested_absmax),
                offset: f32::from_bits(offset),
            },
            _ => return None,
        };
        let dtype =
            [DType::F32, DType::F16, DType::BF16].into_iter().find(|it| name_of(*it) == entry.dtype)?;
        let (rows, cols, block) = (entry.rows, entry.cols, entry.block);
        let table = floats(parts[1]).try_into().ok()?;
        Some(FourBit { rows, cols, codes: parts[0].to_vec().into(), table, block, scales, dtype })
    }

    /// Lets the system take back what a weight's bytes are mapped to.
    fn forget(&self, name: &str) {
        if let Some(entry) = self.weights.get(name) {
            self.file.forget(&(entry.start..entry.start + entry.lengths.iter().sum::<usize>()));
        }
    }
}

/// Writes such a file, under its name only once it is whole.
pub struct KeptWriter {
    out: BufWriter<File>,
    part: PathBuf,
    path: PathBuf,
    index: Index,
    at: usize,
    whole: bool,
}

impl Drop for KeptWriter {
    fn drop(&mut self) {
        if !self.whole {
            let _ = fs::remove_file(&self.part);
        }
    }
}

impl KeptWriter {
    /// Begins a file.
    ///
    /// # Errors
    /// When it can't be written.
    pub fn create(path: &Path, key: &str) -> io::Result<KeptWriter> {
        let part = path.with_extension(format!("{}.part", std::process::id()));
        let out = BufWriter::with_capacity(1 << 20, File::create(&part)?);
        let index = Index { key: key.to_string(), weights: BTreeMap::new() };
        Ok(KeptWriter { out, part, path: path.to_path_buf(), index, at: 0, whole: false })
    }

    /// Adds a weight.
    ///
    /// # Errors
    /// When it can't be written.
    pub fn add(&mut self, name: &str, weight: &FourBit<'_>) -> io::Result<()> {
        let of = |values: &[f32]| values.iter().flat_map(|it| it.to_le_bytes()).collect::<Vec<u8>>();
        let table = of(&weight.table);
        let (scales, nested) = match &weight.scales {
            FourBitScales::Plain(values) => (vec![of(values)], None),
            FourBitScales::Nested { codes, map, group, nested_absmax, offset } => {
                (vec![codes.clone(), of(map), of(nested_absmax)], Some((*group, offset.to_bits())))
            }
        };
        let parts: Vec<&[u8]> =
            [&*weight.codes, &*table].into_iter().chain(scales.iter().map(Vec::as_slice)).collect();
        for part in &parts {
            self.out.write_all(part)?;
        }
        let entry = Entry {
            rows: weight.rows,
            cols: weight.cols,
            dtype: name_of(weight.dtype),
            block: weight.block,
            start: self.at,
            lengths: parts.iter().map(|it| it.len()).collect(),
            nested,
            checksum: checksum(&parts),
        };
        self.at += entry.lengths.iter().sum::<usize>();
        self.index.weights.insert(name.to_string(), entry);
        Ok(())
    }

    /// Puts the file under its name.
    ///
    /// # Errors
    /// When it can't be written.
    pub fn finish(mut self) -> io::Result<()> {
        let index = serde_json::to_vec(&self.index)?;
        self.out.write_all(&index)?;
        self.out.write_all(&(index.len() as u64).to_le_bytes())?;
        self.out.write_all(&Sha256::digest(&index))?;
        self.out.write_all(KIND)?;
        self.out.flush()?;
        fs::rename(&self.part, &self.path)?;
        self.whole = true;
        Ok(())
    }
}

/// A key of everything that decides what is kept.
pub fn kept_key(parts: &[String]) -> String {
    let mut hash = Sha256::new();
    for part in parts {
        hash.update((part.len() as u64).to_le_bytes());
        hash.update(part);
    }
    hex(&hash.finalize())
}

/// A checkpoint with weights of a [`KeptWeights`] in the places of some of its own.
pub struct WithKept<'a> {
    /// The checkpoint.
    pub base: &'a dyn WeightSource,
    /// What was made of it.
    pub kept: KeptWeights,
}

impl WeightSource for WithKept<'_> {
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
        let kept = if self.base.is_as_stored(name) { self.kept.get(name) } else { None };
        match kept.filter(|it| self.base.shape(name).is_ok_and(|shape| shape == (it.rows, it.cols))) {
            Some(weight) => Ok(Stored::FourBit(weight)),
            None => self.base.get(name),
        }
    }

    fn read_rows(&self, name: &str, rows: Range<usize>, out: &mut [f32]) -> Result<()> {
        self.base.read_rows(name, rows, out)
    }

    fn forget(&self, name: &str) {
        self.base.forget(name);
        self.kept.forget(name);
    }

    fn fingerprint(&self) -> String {
        self.base.fingerprint()
    }

    fn is_as_stored(&self, name: &str) -> bool {
        self.base.is_as_stored(name)
    }
}

/// Of the pieces' checksums, which are made on all cores.
fn checksum(parts: &[&[u8]]) -> String {
    let pieces: Vec<_> = parts
        .iter()
        .flat_map(|part| part.par_chunks(PIECE).map(Sha256::digest).collect::<Vec<_>>())
        .collect();
    let mut hash = Sha256::new();
    parts.iter().for_each(|part| hash.update((part.len() as u64).to_le_bytes()));
    pieces.iter().for_each(|piece| hash.update(piece));
    hex(&hash.finalize())
}

fn name_of(dtype: DType) -> String {
    format!("{dtype:?}")
}

fn floats(bytes: &[u8]) -> Vec<f32> {
    bytes.chunks_exact(4).map(|it| f32::from_le_bytes([it[0], it[1], it[2], it[3]])).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn weight(nested: bool) -> FourBit<'static> {
        let (rows, cols, block) = (6, 64, 64);
        let scales = match nested {
            false => FourBitScales::Plain((0..6).map(|it| it as f32 + 0.5).collect()),
            true => FourBitScales::Nested {
                codes: (0..6).collect(),
                map: (0..256).map(|it| it as f32 / 255.0).collect(),
                group: 256,
                nested_absmax: vec![0.25],
                offset: 0.1,
            },
        };
        FourBit {
            rows,
            cols,
            codes: (0..rows * cols / 2).map(|it| (it * 37 % 256) as u8).collect::<Vec<_>>().into(),
            table: std::array::from_fn(|it| it as f32 / 3.0 - 2.0),
            block,
            scales,
            dtype: DType::BF16,
        }
    }

    fn folder(name: &str) -> PathBuf {
        let folder = std::env::temp_dir().join(format!("ferrotune-kept-{}-{name}", std::process::id()));
        let _ = fs::remove_dir_all(&folder);
        fs::create_dir_all(&folder).unwrap();
        folder
    }

    fn written(path: &Path) {
        let mut writer = KeptWriter::create(path, "made of this").unwrap();
        writer.add("plain", &weight(false)).unwrap();
        writer.add("nested", &weight(true)).unwrap();
        writer.finish().unwrap();
    }

    #[test]
    fn what_is_kept_comes_back_bit_for_bit() {
        let folder = folder("back");
        let path = folder.join("some.kept");
        written(&path);
        let kept = KeptWeights::open(&path, "made of this").unwrap();
        assert_eq!(kept.get("plain"), Some(weight(false)));
        assert_eq!(kept.get("nested"), Some(weight(true)));
        assert_eq!(kept.get("other"), None);
        assert!(KeptWeights::open(&path, "made of that").is_none());
        assert!(KeptWeights::open(&folder.join("none.kept"), "made of this").is_none());
        assert_eq!(fs::read_dir(&folder).unwrap().count(), 1, "parts are left behind");
        fs::remove_dir_all(folder).unwrap();
    }

    #[test]
    fn a_file_that_is_not_finished_has_no_name() {
        let folder = folder("unfinished");
        let mut writer = KeptWriter::create(&folder.join("some.kept"), "key").unwrap();
        writer.add("plain", &weight(false)).unwrap();
        drop(writer);
        assert_eq!(fs::read_dir(&folder).unwrap().count(), 0);
        fs::remove_dir_all(folder).unwrap();
    }

    #[test]
    fn no_damage_is_taken_for_a_weight() {
        let folder = folder("damage");
        let path = folder.join("some.kept");
        written(&path);
        let whole = fs::read(&path).unwrap();
        let same = |kept: &KeptWeights| {
            let is = |name: &str, nested: bool| kept.get(name).is_none_or(|it| it == weight(nested));
            is("plain", false) && is("nested", true)
        };
        for at in 0..whole.len() {
            let mut bytes = whole.clone();
            bytes[at] ^= 0x10;
            fs::write(&path, bytes).unwrap();
            let kept = KeptWeights::open(&path, "made of this");
            assert!(
                kept.is_none_or(|it| same(&it) && (it.get("plain").is_none() || it.get("nested").is_none()))
            );
        }
        for length in 0..whole.len() {
            fs::write(&path, &whole[..length]).unwrap();
            assert!(KeptWeights::open(&path, "made of this").is_none(), "{length} bytes");
        }
        fs::remove_dir_all(folder).unwrap();
    }
}
