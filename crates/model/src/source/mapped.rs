use std::fs::File;
use std::ops::Range;
use std::path::{Path, PathBuf};

use ferrotune_tensor::{Error, Result, bf16, f16};
use half::slice::HalfFloatSliceExt;
use memmap2::Mmap;
use rayon::prelude::*;

/// A file in memory as the system pages it in.
#[derive(Debug)]
pub(super) struct Mapped {
    pub(super) path: PathBuf,
    map: Option<Mmap>,
    /// What there is without a file.
    held: Vec<u8>,
}

impl Mapped {
    /// Bytes that are in memory already.
    pub(super) fn held(name: &str, bytes: &[u8]) -> Mapped {
        Mapped { path: name.into(), map: None, held: bytes.to_vec() }
    }

    pub(super) fn open(path: &Path) -> Result<Mapped> {
        let file = File::open(path).map_err(|source| Error::io(path, source))?;
        let metadata = file.metadata().map_err(|source| Error::io(path, source))?;
        if !metadata.is_file() {
            return Err(Error::file(path, "expected a file, this is a folder or a device"));
        }
        // An empty file can't be mapped; readers say that it is too short.
        let map = match metadata.len() {
            0 => None,
            // SAFETY: the map is only read. Whoever shortens a model's file while it is in use ends
            // the process with a signal; that is so for every program that maps its weights.
            _ => Some(unsafe { Mmap::map(&file) }.map_err(|source| Error::io(path, source))?),
        };
        Ok(Mapped { path: path.to_path_buf(), map, held: Vec::new() })
    }

    /// Lets the system take the pages of some bytes back; they come again from the file when they are asked for.
    pub(super) fn forget(&self, bytes: &Range<usize>) {
        #[cfg(not(unix))]
        let _ = bytes;
        #[cfg(unix)]
        if let Some(map) = &self.map {
            // SAFETY: the map is private and never written, so that pages read again hold the same.
            let _ = unsafe {
                map.unchecked_advise_range(memmap2::UncheckedAdvice::DontNeed, bytes.start, bytes.len())
            };
        }
    }

    pub(super) fn bytes(&self) -> &[u8] {
        self.map.as_deref().unwrap_or(&self.held)
    }
}

/// Elements that one task converts.
const CHUNK: usize = 64 * 1024;

/// Plain number types of files, little-endian.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Plain {
    F32,
    F16,
    Bf16,
}

impl Plain {
    pub(super) fn bytes(self) -> usize {
        match self {
            Plain::F32 => 4,
            Plain::F16 | Plain::Bf16 => 2,
        }
    }

    /// Converts to f32 on all cores.
    pub(super) fn read(self, bytes: &[u8], out: &mut [f32]) {
        let parts = bytes.par_chunks(CHUNK * self.bytes());
        out.par_chunks_mut(CHUNK).zip(parts).for_each(|(out, bytes)| self.read_serial(bytes, out));
    }

    /// Converts to f32 on the calling thread.
    pub(super) fn read_serial(self, bytes: &[u8], out: &mut [f32]) {
        match self {
            Plain::F32 => {
                let values = bytes.chunks_exact(4).map(|it| f32::from_le_bytes([it[0], it[1], it[2], it[3]]));
                out.iter_mut().zip(values).for_each(|(out, value)| *out = value);
            }
            Plain::Bf16 => {
                let values =
                    bytes.chunks_exact(2).map(|it| u32::from(u16::from_le_bytes([it[0], it[1]])) << 16);
                out.iter_mut().zip(values).for_each(|(out, bits)| *out = f32::from_bits(bits));
            }
            Plain::F16 => {
                let mut some = [f16::ZERO; 512];
                for (out, bytes) in out.chunks_mut(512).zip(bytes.chunks(1024)) {
                    let some = &mut some[..out.len()];
                    let values = bytes.chunks_exact(2).map(|it| f16::from_le_bytes([it[0], it[1]]));
                    some.iter_mut().zip(values).for_each(|(some, value)| *some = value);
                    some.convert_to_f32_slice(out);
                }
            }
        }
    }
}

/// bf16 numbers as they are.
pub(super) fn bf16s(bytes: &[u8]) -> Vec<bf16> {
    let values = bytes.par_chunks_exact(2).with_min_len(CHUNK);
    values.map(|it| bf16::from_le_bytes([it[0], it[1]])).collect()
}

/// f16 numbers as they are.
pub(super) fn f16s(bytes: &[u8]) -> Vec<f16> {
    let values = bytes.par_chunks_exact(2).with_min_len(CHUNK);
    values.map(|it| f16::from_le_bytes([it[0], it[1]])).collect()
}
