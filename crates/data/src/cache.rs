//! Samples on disk, so that a second start does no tokenising.
//!
//! A file holds one data set as it was encoded. Its name is the SHA-256 of everything that its samples depend on:
//! the bytes of the files, columns and options, the tokenizer, the chat template, how turns are marked, and the
//! program itself. It is written beside and renamed, and ends with a SHA-256 of what comes before.
//!
//! Layout, little endian: `FERROTOK` · length of the header (u64) · header (JSON: counts, what was left out) · number of
//! samples (u64) · of each: tokens (u32), tokens cut off (u32), the ids (u32 each), the marks (8 in a byte) · SHA-256.

use std::fs::{self, File};
use std::io::{self, BufReader, BufWriter, Read, Write};
use std::path::{Path, PathBuf};

use sha2::{Digest as _, Sha256};

use crate::error::{Error, Result};
use crate::marked::Sample;
use crate::prepare::PreparedSet;

const MAGIC: &[u8; 8] = b"FERROTOK";

/// What the samples of a data set depend on.
#[derive(Clone, Debug)]
pub struct CacheKey(Sha256);

impl CacheKey {
    /// Of a set that is made of these files.
    ///
    /// # Errors
    /// When a file can't be read.
    pub fn new(files: &[PathBuf]) -> Result<CacheKey> {
        let mut key = CacheKey(Sha256::new());
        let mut buffer = vec![0; 1 << 20];
        for path in files {
            let failed = |source| Error::File { action: "read", path: path.clone(), source };
            // The path too: what is said of rows names it.
            key.add(path.as_os_str().as_encoded_bytes());
            let mut file = File::open(path).map_err(failed)?;
            let mut length = 0u64;
            loop {
                let count = file.read(&mut buffer).map_err(failed)?;
                if count == 0 {
                    break;
                }
                key.0.update(&buffer[..count]);
                length += count as u64;
            }
            key.0.update(length.to_le_bytes());
        }
        Ok(key)
    }

    /// Something else that the samples depend on.
    pub fn add(&mut self, bytes: impl AsRef<[u8]>) {
        let bytes = bytes.as_ref();
        self.0.update((bytes.len() as u64).to_le_bytes());
        self.0.update(bytes);
    }

    /// The file that holds the samples, in this folder.
    pub fn path(&self, folder: &Path) -> PathBuf {
        let name: String = self.0.clone().finalize()[..16].iter().map(|it| format!("{it:02x}")).collect();
        folder.join(format!("{name}.tokens"))
    }
}

/// What a cache has.
#[derive(Debug)]
pub enum Cached {
    /// The set.
    Whole(Box<PreparedSet>),
    /// Nothing.
    Nothing,
    /// A file that can't be used, and why.
    Broken(String),
}

/// Reads the samples at `path`.
pub fn read(path: &Path) -> Cached {
    let file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Cached::Nothing,
        Err(error) => return Cached::Broken(error.to_string()),
    };
    let length = file.metadata().map_or(0, |it| it.len());
    let mut reader =
        Hashed { inner: BufReader::with_capacity(1 << 20, file), hash: Sha256::new(), left: length };
    match read_set(&mut reader) {
        Ok(set) => Cached::Whole(Box::new(set)),
        Err(error) => Cached::Broken(match error.kind() {
            io::ErrorKind::UnexpectedEof => "it is cut off".to_string(),
            _ => error.to_string(),
        }),
    }
}

fn read_set(reader: &mut Hashed<BufReader<File>>) -> io::Result<PreparedSet> {
    let wrong = |message: &str| io::Error::other(message.to_string());
    if &reader.array::<8>()? != MAGIC {
        return Err(wrong("it is no file of tokens"));
    }
    let header = reader.u64()?;
    let header = reader.bytes(header)?;
    let samples = reader.u64()?;
    // A sample takes 8 bytes or more; a number that is damaged asks for no more memory than the file has.
    if samples > reader.left / 8 {
        return Err(wrong("it is damaged"));
    }
    let mut all = Vec::with_capacity(samples as usize);
    for _ in 0..samples {
        let length = u64::from(u32::from_le_bytes(reader.array()?));
        let cut = u32::from_le_bytes(reader.array()?) as usize;
        let ids = reader.bytes(4 * length)?;
        let marks = reader.bytes(length.div_ceil(8))?;
        let tokens = ids.as_chunks::<4>().0.iter().map(|it| u32::from_le_bytes(*it)).collect();
        let trained = (0..length as usize).map(|at| marks[at / 8] >> (at % 8) & 1 == 1).collect();
        all.push(Sample { tokens, trained, cut });
    }
    let expected = reader.hash.clone().finalize();
    if reader.array::<32>()? != expected[..] || reader.left > 0 {
        return Err(wrong("its checksum is wrong"));
    }
    // Only now, when all of it is known to be as it was written.
    let mut set = serde_json::from_slice::<PreparedSet>(&header).map_err(io::Error::other)?;
    set.samples = all;
    Ok(set)
}

/// Writes the samples to `path`: beside, synced, renamed.
///
/// # Errors
/// When it can't be written.
pub fn write(path: &Path, set: &PreparedSet) -> Result<()> {
    let failed = |source| Error::File { action: "write", path: path.to_path_buf(), source };
    if let Some(folder) = path.parent() {
        fs::create_dir_all(folder).map_err(failed)?;
    }
    let part = path.with_extension(format!("{}.part", std::process::id()));
    let written = write_set(&part, set).and_then(|()| fs::rename(&part, path));
    if written.is_err() {
        let _ = fs::remove_file(&part);
    }
    written.map_err(failed)
}

fn write_set(path: &Path, set: &PreparedSet) -> io::Result<()> {
    let mut writer = Hashed {
        inner: BufWriter::with_capacity(1 << 20, File::create(path)?),
        hash: Sha256::new(),
        left: 0,
    };
    let header = serde_json::to_vec(set)?;
    writer.put(MAGIC)?;
    writer.put(&(header.len() as u64).to_le_bytes())?;
    writer.put(&header)?;
    writer.put(&(set.samples.len() as u64).to_le_bytes())?;
    let mut bytes = Vec::new();
    for sample in &set.samples {
        bytes.clear();
        bytes.extend((sample.tokens.len() as u32).to_le_bytes());
        bytes.extend((sample.cut.min(u32::MAX as usize) as u32).to_le_bytes());
        bytes.extend(sample.tokens.iter().flat_map(|it| it.to_le_bytes()));
        let marks = sample.trained.chunks(8);
        bytes.extend(
            marks.map(|it| it.iter().enumerate().fold(0, |byte, (at, it)| byte | u8::from(*it) << at)),
        );
        writer.put(&bytes)?;
    }
    let hash = writer.hash.clone().finalize();
    writer.put(&hash)?;
    writer.inner.into_inner().map_err(io::IntoInnerError::into_error)?.sync_all()
}

/// Reads or writes, and takes the checksum on the way.
struct Hashed<T> {
    inner: T,
    hash: Sha256,
    /// Bytes of the file that are still to come.
    left: u64,
}

impl<T: Read> Hashed<T> {
    fn bytes(&mut self, count: u64) -> io::Result<Vec<u8>> {
        if count > self.left {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let mut bytes = vec![0; count as usize];
        self.inner.read_exact(&mut bytes)?;
        self.hash.update(&bytes);
        self.left -= count;
        Ok(bytes)
    }

    fn array<const N: usize>(&mut self) -> io::Result<[u8; N]> {
        let bytes = self.bytes(N as u64)?;
        bytes.try_into().map_err(|_| io::ErrorKind::UnexpectedEof.into())
    }

    fn u64(&mut self) -> io::Result<u64> {
        Ok(u64::from_le_bytes(self.array()?))
    }
}

impl<T: Write> Hashed<T> {
    fn put(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.hash.update(bytes);
        self.inner.write_all(bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::counts::SetCounts;
    use crate::error::Place;
    use crate::source::Dropped;
    use crate::test_support::Scratch;

    fn set() -> PreparedSet {
        let mut counts =
            SetCounts { name: "a".to_string(), format: "text".to_string(), ..SetCounts::default() };
        counts.skip(&Place::new("f", 3), "not UTF-8 text");
        let samples = (0..20usize).map(|length| Sample {
            tokens: (0..length as u32).map(|it| it * 1_000_003).collect(),
            trained: (0..length).map(|it| it % 3 == 1).collect(),
            cut: length / 7,
        });
        let dropped = vec![Dropped { place: Place::new("f", 9), reason: "nothing".to_string() }];
        PreparedSet { counts, samples: samples.collect(), dropped }
    }

    #[test]
    fn what_was_written_is_read() {
        let folder = Scratch::new();
        let path = folder.path().join("deep/x.tokens");
        assert!(matches!(read(&path), Cached::Nothing));
        write(&path, &set()).unwrap();
        let Cached::Whole(read) = read(&path) else { panic!("not whole") };
        assert_eq!(*read, set());
        assert_eq!(fs::read_dir(path.parent().unwrap()).unwrap().count(), 1);
    }

    #[test]
    fn a_damaged_file_is_never_taken() {
        let folder = Scratch::new();
        let path = folder.path().join("x.tokens");
        write(&path, &set()).unwrap();
        let whole = fs::read(&path).unwrap();
        for at in 0..whole.len() {
            let mut bytes = whole.clone();
            bytes[at] ^= 0x55;
            fs::write(&path, bytes).unwrap();
            assert!(matches!(read(&path), Cached::Broken(_)), "{at}");
        }
        for length in 0..whole.len() {
            fs::write(&path, &whole[..length]).unwrap();
            assert!(matches!(read(&path), Cached::Broken(_)), "{length}");
        }
    }

    #[test]
    fn a_key_is_of_everything() {
        let folder = Scratch::new();
        let [a, b] = ["a", "b"].map(|name| folder.path().join(name));
        fs::write(&a, "xy").unwrap();
        fs::write(&b, "xy").unwrap();
        let key = |files: &[&PathBuf], words: &[&str]| {
            let files: Vec<PathBuf> = files.iter().map(|it| it.to_path_buf()).collect();
            let mut key = CacheKey::new(&files).unwrap();
            words.iter().for_each(|word| key.add(word));
            key.path(folder.path())
        };
        let first = key(&[&a], &["ab", "c"]);
        assert_eq!(first, key(&[&a], &["ab", "c"]));
        assert_ne!(first, key(&[&b], &["ab", "c"]));
        assert_ne!(first, key(&[&a], &["a", "bc"]));
        fs::write(&a, "xz").unwrap();
        assert_ne!(first, key(&[&a], &["ab", "c"]));
    }
}
