//! A GGUF file, version 3: header, metadata, where the tensors lie, and their numbers, each begun at a multiple of 32.
//! The form is ggml's `docs/gguf.md`.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::ops::Range;
use std::path::Path;

use ferrotune_model::source::{GgufType, RawValue};
use ferrotune_tensor::{Error, Result};

use super::blocks;
use crate::files::write_with;

const ALIGNMENT: usize = 32;
/// Numbers that are in memory at once.
const CHUNK: usize = 4 << 20;

/// A value of the metadata.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Value {
    U32(u32),
    F32(f32),
    Bool(bool),
    Text(String),
    Bools(Vec<bool>),
    I32s(Vec<i32>),
    F32s(Vec<f32>),
    Texts(Vec<String>),
    /// As another file has it.
    Raw(RawValue),
}

/// Metadata in the order of the file.
#[derive(Debug, Default)]
pub(super) struct Metadata(pub(super) Vec<(String, Value)>);

/// What writes some rows of a tensor.
pub(super) type Fill<'a> = Box<dyn Fn(Range<usize>, &mut [f32]) -> Result<()> + 'a>;

/// A tensor that is made when it is written.
pub(super) struct Planned<'a> {
    pub(super) name: String,
    pub(super) kind: GgufType,
    /// None for a vector.
    pub(super) rows: Option<usize>,
    /// Matrices that the rows belong to, one after the other: more than one makes a third dimension.
    pub(super) matrices: usize,
    pub(super) cols: usize,
    /// Rows are asked for in multiples of this.
    pub(super) together: usize,
    /// The canonical tensors that it is made of.
    pub(super) parts: Vec<String>,
    pub(super) fill: Fill<'a>,
}

impl Planned<'_> {
    fn row_count(&self) -> usize {
        self.rows.unwrap_or(1)
    }

    fn bytes(&self) -> usize {
        self.row_count() * blocks::length(self.kind, self.cols)
    }
}

impl Metadata {
    pub(super) fn set(&mut self, key: impl Into<String>, value: Value) {
        self.0.push((key.into(), value));
    }

    pub(super) fn text(&mut self, key: impl Into<String>, value: impl Into<String>) {
        self.set(key, Value::Text(value.into()));
    }
}

/// Writes the file; not more than a few pieces of tensors are in memory. Returns its length.
///
/// # Errors
/// When a tensor can't be read or holds what its type can't, or the disk is full. Nothing is left of the file.
pub(super) fn write(path: &Path, metadata: &Metadata, tensors: &[Planned]) -> Result<u64> {
    let mut length = 0;
    write_with(path, |file| {
        let io = |source| Error::io(path, source);
        let mut out = Counted { inner: BufWriter::with_capacity(1 << 20, file), length: 0 };
        header(&mut out, metadata, tensors).map_err(io)?;
        for tensor in tensors {
            out.pad().map_err(io)?;
            numbers(&mut out, path, tensor)?;
        }
        out.pad().map_err(io)?;
        length = out.length;
        out.inner.flush().map_err(io)
    })?;
    Ok(length)
}

struct Counted<'a> {
    inner: BufWriter<&'a mut File>,
    length: u64,
}

impl Counted<'_> {
    fn put(&mut self, bytes: &[u8]) -> std::io::Result<()> {
        self.length += bytes.len() as u64;
        self.inner.write_all(bytes)
    }

    fn string(&mut self, text: &str) -> std::io::Result<()> {
        self.put(&(text.len() as u64).to_le_bytes())?;
        self.put(text.as_bytes())
    }

    fn pad(&mut self) -> std::io::Result<()> {
        let over = self.length as usize % ALIGNMENT;
        if over > 0 { self.put(&[0; ALIGNMENT][over..]) } else { Ok(()) }
    }

    /// The type of a list's items, how many they are, and each.
    fn list<T>(
        &mut self,
        kind: u32,
        items: &[T],
        each: impl Fn(&mut Self, &T) -> std::io::Result<()>,
    ) -> std::io::Result<()> {
        self.put(&9u32.to_le_bytes())?;
        self.put(&kind.to_le_bytes())?;
        self.put(&(items.len() as u64).to_le_bytes())?;
        items.iter().try_for_each(|item| each(self, item))
    }

    fn value(&mut self, value: &Value) -> std::io::Result<()> {
        let mut one = |kind: u32, bytes: &[u8]| {
            self.put(&kind.to_le_bytes())?;
            self.put(bytes)
        };
        match value {
            Value::U32(it) => one(4, &it.to_le_bytes()),
            Value::F32(it) => one(6, &it.to_le_bytes()),
            Value::Bool(it) => one(7, &[u8::from(*it)]),
            Value::Raw(it) => one(it.kind, &it.bytes),
            Value::Text(it) => {
                one(8, &[])?;
                self.string(it)
            }
            Value::Bools(it) => self.list(7, it, |out, it| out.put(&[u8::from(*it)])),
            Value::I32s(it) => self.list(5, it, |out, it| out.put(&it.to_le_bytes())),
            Value::F32s(it) => self.list(6, it, |out, it| out.put(&it.to_le_bytes())),
            Value::Texts(it) => self.list(8, it, |out, it| out.string(it)),
        }
    }
}

fn header(out: &mut Counted, metadata: &Metadata, tensors: &[Planned]) -> std::io::Result<()> {
    out.put(b"GGUF")?;
    out.put(&3u32.to_le_bytes())?;
    out.put(&(tensors.len() as u64).to_le_bytes())?;
    out.put(&(metadata.0.len() as u64).to_le_bytes())?;
    for (key, value) in &metadata.0 {
        out.string(key)?;
        out.value(value)?;
    }
    let mut offset = 0;
    for tensor in tensors {
        out.string(&tensor.name)?;
        // The innermost dimension first.
        let rows = tensor.rows.map(|it| it / tensor.matrices);
        let matrices = Some(tensor.matrices).filter(|it| *it > 1);
        let shape = [tensor.cols].into_iter().chain(rows).chain(matrices);
        let shape: Vec<u64> = shape.map(|it| it as u64).collect();
        out.put(&(shape.len() as u32).to_le_bytes())?;
        shape.iter().try_for_each(|size| out.put(&size.to_le_bytes()))?;
        out.put(&tensor.kind.id().to_le_bytes())?;
        out.put(&(offset as u64).to_le_bytes())?;
        offset += tensor.bytes().next_multiple_of(ALIGNMENT);
    }
    Ok(())
}

fn numbers(out: &mut Counted, path: &Path, tensor: &Planned) -> Result<()> {
    let (rows, cols) = (tensor.row_count(), tensor.cols);
    let each = (CHUNK / cols.max(1)).max(1).next_multiple_of(tensor.together);
    let (mut values, mut bytes) = (Vec::new(), Vec::new());
    for start in (0..rows).step_by(each) {
        let rows = start..rows.min(start + each);
        values.resize(rows.len() * cols, 0.0);
        bytes.resize(rows.len() * blocks::length(tensor.kind, cols), 0);
        (tensor.fill)(rows, &mut values)?;
        blocks::write(tensor.kind, &values, &mut bytes)
            .map_err(|message| Error::file(path, format!("tensor `{}` {message}", tensor.name)))?;
        out.put(&bytes).map_err(|source| Error::io(path, source))?;
    }
    Ok(())
}
