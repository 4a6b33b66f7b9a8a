//! The header of a GGUF file: what it says about itself, and where its tensors lie.
//!
//! candle reads headers too, into an owned value for every token of the vocabulary. Here lists stay
//! where they are until they are asked for, and nothing is trusted: every count and offset is
//! checked against the length of the file before it is used.

use std::collections::BTreeMap;
use std::ops::Range;

use super::blocks::GgufType;

/// The longest string that is taken for a name.
const LONGEST_NAME: usize = 1024;

pub(super) struct Header {
    pub(super) values: BTreeMap<String, Value>,
    /// Of each value, in the order of the file: its key, its type, its bytes.
    pub(super) places: Vec<(String, u32, Range<usize>)>,
    pub(super) tensors: BTreeMap<String, Tensor>,
    /// Where the numbers begin.
    pub(super) data: usize,
}

/// A tensor's place.
pub(super) struct Tensor {
    pub(super) kind: GgufType,
    /// Outermost first, as elsewhere; the file has them the other way round.
    pub(super) shape: Vec<usize>,
    /// Within the file.
    pub(super) bytes: Range<usize>,
}

/// A value of the header. Whole numbers of any width are one kind.
#[derive(Clone, Debug)]
pub(super) enum Value {
    Whole(i128),
    /// f32 numbers are kept as the shortest decimal that gives them: 1e-5 stays 1e-5.
    Float(f64),
    Bool(bool),
    Text(String),
    List(List),
}

/// A list, still in the file.
#[derive(Clone, Debug)]
pub(super) struct List {
    item: u32,
    count: usize,
    bytes: Range<usize>,
}

type Parsed<T> = Result<T, String>;

/// Reads forward, never beyond the end.
struct Reader<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Reader<'a> {
    fn take(&mut self, count: usize, what: &str) -> Parsed<&'a [u8]> {
        let end = self.at.checked_add(count).filter(|end| *end <= self.bytes.len());
        let Some(end) = end else {
            return Err(format!(
                "{what} at byte {} needs {count} bytes, but the file has {}: it is damaged or was not \
                 downloaded whole, download it again",
                self.at,
                self.bytes.len()
            ));
        };
        let taken = &self.bytes[self.at..end];
        self.at = end;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self, what: &str) -> Parsed<[u8; N]> {
        let mut array = [0; N];
        array.copy_from_slice(self.take(N, what)?);
        Ok(array)
    }

    fn u32(&mut self, what: &str) -> Parsed<u32> {
        Ok(u32::from_le_bytes(self.array(what)?))
    }

    fn u64(&mut self, what: &str) -> Parsed<u64> {
        Ok(u64::from_le_bytes(self.array(what)?))
    }

    /// A count that must fit into what is left when each thing takes at least `least` bytes.
    fn count(&mut self, least: usize, what: &str) -> Parsed<usize> {
        let count = self.u64(what)?;
        let left = (self.bytes.len() - self.at) as u64;
        if count.checked_mul(least as u64).is_none_or(|bytes| bytes > left) {
            return Err(format!(
                "{what} is {count}, but only {left} bytes follow: the file is damaged, download it again"
            ));
        }
        Ok(count as usize)
    }

    fn string(&mut self, what: &str) -> Parsed<&'a [u8]> {
        let length = self.count(1, what)?;
        self.take(length, what)
    }

    fn name(&mut self, what: &str) -> Parsed<String> {
        let bytes = self.string(what)?;
        match std::str::from_utf8(bytes) {
            Ok(name) if name.len() <= LONGEST_NAME => Ok(name.to_string()),
            _ => Err(format!("{what} before byte {} is no readable name: the file is damaged", self.at)),
        }
    }

    fn value(&mut self, kind: u32, key: &str) -> Parsed<Value> {
        let what = &format!("the value of `{key}`");
        Ok(match kind {
            0 => Value::Whole(u8::from_le_bytes(self.array(what)?).into()),
            1 => Value::Whole(i8::from_le_bytes(self.array(what)?).into()),
            2 => Value::Whole(u16::from_le_bytes(self.array(what)?).into()),
            3 => Value::Whole(i16::from_le_bytes(self.array(what)?).into()),
            4 => Value::Whole(u32::from_le_bytes(self.array(what)?).into()),
            5 => Value::Whole(i32::from_le_bytes(self.array(what)?).into()),
            6 => Value::Float(shortest(f32::from_le_bytes(self.array(what)?))),
            7 => Value::Bool(self.array::<1>(what)?[0] != 0),
            8 => Value::Text(text(self.string(what)?)),
            9 => {
                let item = self.u32(what)?;
                let least = match item {
                    8 => 8,
                    _ => width(item)
                        .ok_or_else(|| format!("{what} is a list of type {item}, which isn't known"))?,
                };
                let count = self.count(least, &format!("the length of `{key}`"))?;
                let start = self.at;
                if item == 8 {
                    for _ in 0..count {
                        self.string(what)?;
                    }
                } else {
                    self.take(count * least, what)?;
                }
                Value::List(List { item, count, bytes: start..self.at })
            }
            10 => Value::Whole(self.u64(what)?.into()),
            11 => Value::Whole(i64::from_le_bytes(self.array(what)?).into()),
            12 => Value::Float(f64::from_le_bytes(self.array(what)?)),
            _ => return Err(format!("{what} has the type {kind}, which isn't known")),
        })
    }
}

/// Bytes of a number of the given type.
fn width(kind: u32) -> Option<usize> {
    match kind {
        0 | 1 | 7 => Some(1),
        2 | 3 => Some(2),
        4..=6 => Some(4),
        10..=12 => Some(8),
        _ => None,
    }
}

fn shortest(value: f32) -> f64 {
    value.to_string().parse().unwrap_or(f64::from(value))
}

/// Strings of GGUF are UTF-8, but pieces of a vocabulary may be cut anywhere.
fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

impl List {
    pub(super) fn strings(&self, file: &[u8]) -> Option<Vec<String>> {
        if self.item != 8 {
            return None;
        }
        let mut reader = Reader { bytes: &file[..self.bytes.end], at: self.bytes.start };
        (0..self.count).map(|_| reader.string("a list").ok().map(text)).collect()
    }

    /// Numbers of any type.
    pub(super) fn numbers(&self, file: &[u8]) -> Option<Vec<f64>> {
        if self.item == 8 {
            return None;
        }
        let mut reader = Reader { bytes: &file[..self.bytes.end], at: self.bytes.start };
        let number = |_| match reader.value(self.item, "a list").ok()? {
            Value::Whole(value) => Some(value as f64),
            Value::Float(value) => Some(value),
            Value::Bool(value) => Some(f64::from(u8::from(value))),
            Value::Text(_) | Value::List(_) => None,
        };
        (0..self.count).map(number).collect()
    }

    pub(super) fn len(&self) -> usize {
        self.count
    }
}

/// Reads a header from the bytes of a whole file.
pub(super) fn parse(bytes: &[u8]) -> Parsed<Header> {
    let mut reader = Reader { bytes, at: 0 };
    if reader.take(4, "the magic number")? != b"GGUF" {
        return Err("not a GGUF file: it doesn't begin with `GGUF`".into());
    }
    let version = reader.u32("the version")?;
    if !(2..=3).contains(&version) {
        return Err(format!("GGUF of version {version} can't be read, expected 2 or 3 (little-endian)"));
    }
    // The shortest entries: a name's length, dimensions, type, offset; a name's length, type, one byte.
    let tensor_count = reader.count(24, "the number of tensors")?;
    let value_count = reader.count(13, "the number of metadata entries")?;
    let (mut values, mut value_places) = (BTreeMap::new(), Vec::new());
    for _ in 0..value_count {
        let key = reader.name("the name of a metadata entry")?;
        let kind = reader.u32("the type of a metadata entry")?;
        let start = reader.at;
        let value = reader.value(kind, &key)?;
        value_places.push((key.clone(), kind, start..reader.at));
        if values.insert(key.clone(), value).is_some() {
            return Err(format!("metadata `{key}` is there twice: the file is damaged"));
        }
    }
    let mut tensors = BTreeMap::new();
    let mut places = Vec::new();
    for _ in 0..tensor_count {
        places.push(tensor(&mut reader)?);
    }
    let alignment = match values.get("general.alignment") {
        None => 32,
        Some(Value::Whole(it)) if *it >= 8 && *it <= 1 << 20 && *it % 8 == 0 => *it as usize,
        Some(_) => return Err("`general.alignment` is no multiple of 8 below 1048576".into()),
    };
    let data = reader.at.next_multiple_of(alignment);
    for (name, kind, shape, offset) in places {
        let length = byte_length(kind, &shape).ok_or_else(|| {
            format!(
                "tensor `{name}` of shape {shape:?} can't be stored as {}: the file is damaged",
                kind.name()
            )
        })?;
        let start = usize::try_from(offset).ok().and_then(|offset| data.checked_add(offset));
        let range = start.and_then(|start| Some(start..start.checked_add(length)?));
        let Some(range) = range.filter(|it| it.end <= bytes.len()) else {
            return Err(format!(
                "tensor `{name}` needs {length} bytes from byte {data} + {offset} on, but the file has {}: \
                 it is damaged or was not downloaded whole, download it again",
                bytes.len()
            ));
        };
        if range.start % 8 != 0 {
            return Err(format!("tensor `{name}` begins at byte {}, which isn't aligned", range.start));
        }
        if tensors.insert(name.clone(), Tensor { kind, shape, bytes: range }).is_some() {
            return Err(format!("tensor `{name}` is there twice: the file is damaged"));
        }
    }
    Ok(Header { values, places: value_places, tensors, data })
}

fn tensor(reader: &mut Reader) -> Parsed<(String, GgufType, Vec<usize>, u64)> {
    let name = reader.name("the name of a tensor")?;
    let dimensions = reader.u32("the dimensions of a tensor")?;
    if dimensions > 4 {
        return Err(format!(
            "tensor `{name}` has {dimensions} dimensions, at most 4 can be: the file is damaged"
        ));
    }
    let mut shape = Vec::new();
    for _ in 0..dimensions {
        let size = usize::try_from(reader.u64("the shape of a tensor")?).unwrap_or(usize::MAX);
        shape.insert(0, size);
    }
    let kind = GgufType::from_id(reader.u32("the type of a tensor")?);
    let kind = kind.map_err(|kind| {
        let instead = "take a Q4_K_M, Q8_0, F16 or BF16 file";
        format!("tensor `{name}` is stored as {kind}, which can't be read yet: {instead}")
    })?;
    let offset = reader.u64("the offset of a tensor")?;
    Ok((name, kind, shape, offset))
}

/// Bytes of a tensor; none when its rows are no whole blocks or it can't be counted.
fn byte_length(kind: GgufType, shape: &[usize]) -> Option<usize> {
    let elements = shape.iter().try_fold(1usize, |product, size| product.checked_mul(*size))?;
    let row = shape.last().copied().unwrap_or(1);
    if elements == 0 || row % kind.block() != 0 {
        return None;
    }
    (elements / kind.block()).checked_mul(kind.block_bytes())
}
