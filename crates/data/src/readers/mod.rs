//! Files to rows, one file for each kind of file. All read a piece at a time, however long the file is.
//!
//! A row that can't be read is an [`Error::Row`], after which reading goes on; any other error ends the file.
//! To add a kind: a reader here, its variant in [`Kind`] and its ending in `kind_of_ending`.

mod arrow;
mod csv;
mod json;
mod parquet;
mod text;

use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::path::Path;

use serde_json::Value;

use crate::error::{Error, Place, Result};
use crate::formats::Row;

/// The longest row that is read, in bytes of the file.
pub const LONGEST_ROW: usize = 64 << 20;

/// Rows of a file, one after another.
pub type Rows = Box<dyn Iterator<Item = Result<Row>> + Send>;

/// Kinds of files.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Kind {
    /// A list of objects, objects one after another, or JSON lines.
    Json,
    /// An object on each line.
    JsonLines,
    /// Values between commas; the first line names the columns.
    Csv,
    /// The same between tabs.
    Tsv,
    /// A text on each line.
    Text,
    /// Apache Parquet.
    Parquet,
    /// Apache Arrow, as a file or as a stream.
    Arrow,
}

/// How a file is compressed as a whole.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Compression {
    None,
    Gzip,
    Zstd,
}

/// Endings of files that are read, for messages.
pub(crate) const ENDINGS: &str =
    ".json, .jsonl, .csv, .tsv, .txt, .parquet or .arrow (the text ones also as .gz or .zst)";

fn kind_of_ending(name: &str) -> Option<(Kind, Compression)> {
    let lower = name.to_lowercase();
    let inner = |ending: &str| lower.strip_suffix(ending).map(str::to_string);
    let (name, compression) = match (inner(".gz"), inner(".zst").or_else(|| inner(".zstd"))) {
        (Some(inner), _) => (inner, Compression::Gzip),
        (_, Some(inner)) => (inner, Compression::Zstd),
        _ => (lower.clone(), Compression::None),
    };
    let kind = match name.rsplit_once('.')?.1 {
        "json" => Kind::Json,
        "jsonl" | "ndjson" | "jsonlines" => Kind::JsonLines,
        "csv" => Kind::Csv,
        "tsv" => Kind::Tsv,
        "txt" => Kind::Text,
        "parquet" => Kind::Parquet,
        "arrow" | "feather" | "ipc" => Kind::Arrow,
        _ => return None,
    };
    Some((kind, compression))
}

/// Whether a file of this name holds rows.
pub fn is_data_file(path: &Path) -> bool {
    path.file_name().and_then(|name| kind_of_ending(name.to_str()?)).is_some()
}

/// The rows of a file. What kind it is says its name, or where that doesn't, its first bytes.
///
/// # Errors
/// When it can't be opened, or is of no kind that can be read.
pub fn open(path: &Path) -> Result<Rows> {
    let failed = |source| Error::File { action: "read", path: path.to_path_buf(), source };
    let file = File::open(path).map_err(failed)?;
    if file.metadata().map_err(failed)?.is_dir() {
        return Err(Error::Dataset(format!("`{}` is a folder, expected a file", path.display())));
    }
    let mut start = BufReader::with_capacity(1 << 16, file);
    let head = start.fill_buf().map_err(failed)?.to_vec();
    let name = path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
    let Some((kind, compression)) = kind_of_ending(&name).or_else(|| kind_of_content(&head)) else {
        return Err(Error::Dataset(format!(
            "`{}`: cannot tell the kind of file from its name; expected {ENDINGS}",
            path.display()
        )));
    };
    if matches!(kind, Kind::Parquet | Kind::Arrow) && compression != Compression::None {
        return Err(Error::Dataset(format!(
            "`{}`: Parquet and Arrow files compress their parts themselves; unpack this one first",
            path.display()
        )));
    }
    let place = Place::new(path, 0);
    match kind {
        Kind::Parquet => {
            use std::io::Seek as _;
            let mut file = start.into_inner();
            file.rewind().map_err(failed)?;
            return parquet::rows(file, place);
        }
        Kind::Arrow => return arrow::rows(start, place),
        _ => {}
    }
    // What the bytes say counts more than the name: a mirror may have unpacked the file, or packed it.
    let reader: Box<dyn BufRead + Send> = match compression_of_content(&head) {
        Compression::None => Box::new(start),
        Compression::Gzip => unpacked(flate2::bufread::MultiGzDecoder::new(start)),
        Compression::Zstd => unpacked(zstd::stream::read::Decoder::with_buffer(start).map_err(failed)?),
    };
    Ok(text_rows(kind, reader, place))
}

/// The rows in bytes of this kind, without compression.
fn rows_of_bytes(kind: Kind, bytes: Vec<u8>, path: &Path) -> Result<Rows> {
    let place = Place::new(path, 0);
    match kind {
        Kind::Parquet => parquet::rows(bytes::Bytes::from(bytes), place),
        Kind::Arrow => arrow::rows(std::io::Cursor::new(bytes), place),
        _ => Ok(text_rows(kind, Box::new(std::io::Cursor::new(bytes)), place)),
    }
}

/// What the fuzz targets run: the bytes to rows, as the kind of file of this name, and the rows to conversations. Gives
/// how many rows were read; at most 1,000 are.
#[doc(hidden)]
pub fn read_through(name: &str, bytes: &[u8]) -> usize {
    let Some((kind, _)) = kind_of_ending(name) else { return 0 };
    let Ok(rows) = rows_of_bytes(kind, bytes.to_vec(), Path::new(name)) else { return 0 };
    let mut format = None;
    let mut count = 0;
    for row in rows.take(1000).flatten() {
        count += 1;
        if format.is_none() {
            format = crate::formats::recognise(&row).ok();
        }
        if let Some(format) = &format {
            let _ = format.conversation(&row);
        }
    }
    count
}

fn text_rows(kind: Kind, reader: Box<dyn BufRead + Send>, place: Place) -> Rows {
    let source = Source::new(reader, place);
    let separated = |source, separator| {
        let mut rows = csv::CsvRows::new(source, separator);
        until_over(move || rows.read())
    };
    match kind {
        Kind::Json => Box::new(json::JsonRows::new(source, json::Shape::Any)),
        Kind::JsonLines => Box::new(json::JsonRows::new(source, json::Shape::Lines)),
        Kind::Csv => separated(source, b','),
        Kind::Tsv => separated(source, b'\t'),
        _ => {
            let mut rows = text::TextRows::new(source);
            until_over(move || rows.read())
        }
    }
}

fn unpacked(reader: impl Read + Send + 'static) -> Box<dyn BufRead + Send> {
    Box::new(BufReader::with_capacity(1 << 16, reader))
}

fn compression_of_content(head: &[u8]) -> Compression {
    match head {
        [0x1F, 0x8B, ..] => Compression::Gzip,
        [0x28, 0xB5, 0x2F, 0xFD, ..] => Compression::Zstd,
        _ => Compression::None,
    }
}

fn kind_of_content(head: &[u8]) -> Option<(Kind, Compression)> {
    let kind = match head {
        [b'P', b'A', b'R', b'1', ..] => Kind::Parquet,
        [b'A', b'R', b'R', b'O', b'W', b'1', ..] | [0xFF, 0xFF, 0xFF, 0xFF, ..] => Kind::Arrow,
        _ => match head.trim_ascii_start().first()? {
            b'[' | b'{' => Kind::Json,
            _ => return None,
        },
    };
    Some((kind, Compression::None))
}

/// A text file that is read line by line or byte by byte, and counts its lines.
pub(crate) struct Source {
    reader: Box<dyn BufRead + Send>,
    /// The file; the line is the one that comes next, from 1.
    place: Place,
    started: bool,
}

/// What [`Source::line`] found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Line {
    /// Nothing: the file is over.
    End,
    /// A line.
    Whole,
    /// A line over [`LONGEST_ROW`], which was passed over.
    TooLong,
}

impl Source {
    fn new(reader: Box<dyn BufRead + Send>, place: Place) -> Source {
        Source { reader, place: Place { line: 1, ..place }, started: false }
    }

    fn failed(&self, source: std::io::Error) -> Error {
        Error::File { action: "read", path: self.place.file.to_path_buf(), source }
    }

    /// The bytes that come next; none at the end. A byte order mark at the start is passed over.
    fn peek(&mut self) -> Result<&[u8]> {
        loop {
            match self.reader.fill_buf() {
                Ok(_) => break,
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                Err(error) => return Err(self.failed(error)),
            }
        }
        if !self.started {
            self.started = true;
            let bytes = self.reader.fill_buf().unwrap_or(&[]);
            if bytes.starts_with(b"\xEF\xBB\xBF") {
                self.reader.consume(3);
                return self.peek();
            }
        }
        // It is there already, unless an error came between, which comes again.
        Ok(self.reader.fill_buf().unwrap_or(&[]))
    }

    /// Goes on by `count` of the bytes that [`Source::peek`] showed, of which `lines` end a line.
    fn pass(&mut self, count: usize, lines: usize) {
        self.reader.consume(count);
        self.place.line += lines;
    }

    /// Reads a line into `line`, without its end.
    fn line(&mut self, line: &mut Vec<u8>) -> Result<Line> {
        line.clear();
        let (mut any, mut long) = (false, false);
        loop {
            let bytes = self.peek()?;
            if bytes.is_empty() {
                break;
            }
            any = true;
            let end = memchr::memchr(b'\n', bytes);
            let count = end.unwrap_or(bytes.len());
            if line.len() + count > LONGEST_ROW {
                long = true;
                line.clear();
            }
            if !long {
                line.extend_from_slice(&bytes[..count]);
            }
            self.pass(count + usize::from(end.is_some()), usize::from(end.is_some()));
            if end.is_some() {
                break;
            }
        }
        if line.last() == Some(&b'\r') {
            line.pop();
        }
        Ok(match (any, long) {
            (false, _) => Line::End,
            (_, true) => Line::TooLong,
            _ => Line::Whole,
        })
    }

    /// An error about the row on this line.
    fn row_error(&self, line: usize, message: impl Into<String>) -> Error {
        Error::Row { place: self.at(line), message: message.into() }
    }

    /// An error after which there is no telling where the next row starts.
    fn broken(&self, line: usize, message: impl Into<String>) -> Error {
        Error::Broken { place: self.at(line), message: message.into() }
    }

    fn at(&self, line: usize) -> Place {
        Place { line, ..self.place.clone() }
    }
}

/// What a reader reads, until nothing comes any more.
fn until_over(mut read: impl FnMut() -> Result<Option<Row>> + Send + 'static) -> Rows {
    let mut over = false;
    Box::new(std::iter::from_fn(move || {
        if over {
            return None;
        }
        let row = read().transpose();
        over = ends(&row);
        row
    }))
}

/// Whether nothing comes after this: the end, or an error that isn't about one row.
fn ends(row: &Option<Result<Row>>) -> bool {
    !matches!(row, Some(Ok(_) | Err(Error::Row { .. })))
}

fn too_long() -> String {
    format!("the row is longer than {} MiB", LONGEST_ROW >> 20)
}

/// The fields of a row that was read as `value`, or what else it is.
fn fields(value: Value) -> Result<serde_json::Map<String, Value>, String> {
    match value {
        Value::Object(fields) => Ok(fields),
        other => Err(format!("expected an object, found {}", crate::formats::kind(&other))),
    }
}

#[cfg(test)]
mod tests;
