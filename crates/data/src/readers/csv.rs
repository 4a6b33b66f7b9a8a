//! CSV and TSV: the first line names the columns; an empty field is null, as pandas reads it.
//!
//! The parser takes what follows a quote that is never closed, to the end of the file, for one field, and doesn't tell;
//! [`Quotes`] follows along and knows on which line that quote opened.

use std::io::{self, BufRead, Read};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

use csv::{ByteRecord, Reader, ReaderBuilder};
use serde_json::{Map, Value};

use super::{LONGEST_ROW, Source, too_long};
use crate::error::{Error, Place, Result};
use crate::formats::Row;

pub(super) struct CsvRows {
    reader: Reader<Capped>,
    place: Place,
    left: Arc<AtomicUsize>,
    unclosed: Arc<AtomicUsize>,
    /// None until the first line was read.
    columns: Option<Vec<String>>,
    record: ByteRecord,
}

/// Reads only so much for one record: a quote that is never closed takes the rest of the file with it.
struct Capped {
    source: Source,
    left: Arc<AtomicUsize>,
    quotes: Quotes,
    /// The line where a quote opened that was still open at the end of the file; else 0.
    unclosed: Arc<AtomicUsize>,
}

impl Read for Capped {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let left = self.left.load(Relaxed);
        if left == 0 {
            let quote =
                self.quotes.open.map_or(String::new(), |line| format!("; a quote opened on line {line}"));
            return Err(io::Error::other(too_long() + &quote));
        }
        // The mark at the start is passed over.
        self.source.peek().map_err(|error| io::Error::other(error.to_string()))?;
        let mut bytes = self.source.reader.fill_buf()?;
        let count = bytes.read(buffer)?;
        self.source.reader.consume(count);
        self.left.store(left.saturating_sub(count), Relaxed);
        self.quotes.follow(&buffer[..count]);
        if count == 0 {
            self.unclosed.store(self.quotes.open.unwrap_or(0), Relaxed);
        }
        Ok(count)
    }
}

/// Where in quotes the bytes are, by the parser's rules: a quote opens only where a field starts, and a doubled one
/// inside is a character.
struct Quotes {
    delimiter: u8,
    line: usize,
    field_starts: bool,
    /// The line where the quote opened.
    open: Option<usize>,
    /// The byte before was a quote that closed the field, or is the first of two; and the line where it had opened.
    closed: Option<usize>,
}

impl Quotes {
    fn new(delimiter: u8) -> Quotes {
        Quotes { delimiter, line: 1, field_starts: true, open: None, closed: None }
    }

    fn follow(&mut self, bytes: &[u8]) {
        for byte in bytes {
            match (byte, self.open, self.closed.take()) {
                (b'"', Some(line), _) => (self.open, self.closed) = (None, Some(line)),
                (b'"', None, Some(line)) => self.open = Some(line),
                (b'"', None, None) if self.field_starts => self.open = Some(self.line),
                _ => {}
            }
            self.field_starts = self.open.is_none() && [self.delimiter, b'\n', b'\r'].contains(byte);
            self.line += usize::from(*byte == b'\n');
        }
    }
}

impl CsvRows {
    pub(super) fn new(source: Source, delimiter: u8) -> CsvRows {
        let left = Arc::new(AtomicUsize::new(LONGEST_ROW));
        let place = source.place.clone();
        let mut builder = ReaderBuilder::new();
        builder.delimiter(delimiter).has_headers(false).flexible(true);
        let unclosed = Arc::new(AtomicUsize::new(0));
        let quotes = Quotes::new(delimiter);
        let capped = Capped { source, left: left.clone(), quotes, unclosed: unclosed.clone() };
        let reader = builder.from_reader(capped);
        CsvRows { reader, place, left, unclosed, columns: None, record: ByteRecord::new() }
    }

    pub(super) fn read(&mut self) -> Result<Option<Row>> {
        if self.columns.is_none() {
            let Some(place) = self.record()? else { return Ok(None) };
            let wrong = |message: String| Error::Broken { place: place.clone(), message };
            let mut columns = Vec::new();
            for name in &self.record {
                let name = std::str::from_utf8(name)
                    .map_err(|_| wrong("the names of the columns are not UTF-8 text".to_string()))?;
                if columns.iter().any(|it| it == name) {
                    return Err(wrong(format!("two columns are called `{name}`")));
                }
                columns.push(name.to_string());
            }
            self.columns = Some(columns);
        }
        let Some(place) = self.record()? else { return Ok(None) };
        let columns = self.columns.as_deref().unwrap_or_default();
        let error = |message: String| Err(Error::Row { place: place.clone(), message });
        if self.record.len() != columns.len() {
            return error(format!("expected {} columns, found {}", columns.len(), self.record.len()));
        }
        let mut fields = Map::new();
        for (name, value) in columns.iter().zip(&self.record) {
            let Ok(text) = std::str::from_utf8(value) else {
                return error(format!("column `{name}` is not UTF-8 text"));
            };
            let value = if text.is_empty() { Value::Null } else { Value::from(text) };
            fields.insert(name.clone(), value);
        }
        Ok(Some(Row { place, fields }))
    }

    /// Reads the next record; its place, or none at the end.
    fn record(&mut self) -> Result<Option<Place>> {
        self.left.store(LONGEST_ROW, Relaxed);
        let read = self.reader.read_byte_record(&mut self.record);
        let line = self.record.position().map_or(0, csv::Position::line) as usize;
        let place = Place { line: line.max(1), ..self.place.clone() };
        match read {
            // The end is read only for the record that it cuts off.
            Ok(true) if self.unclosed.load(Relaxed) > 0 => {
                let opened = self.unclosed.swap(0, Relaxed);
                // All that follows is the last field.
                let taken = self.record.iter().next_back().unwrap_or_default();
                let lost = memchr::memchr_iter(b'\n', taken.strip_suffix(b"\n").unwrap_or(taken)).count();
                let message = format!(
                    "the quote that opens on this line is never closed; it takes the {lost} lines after it along"
                );
                Err(Error::Row { place: Place { line: opened, ..place }, message })
            }
            Ok(true) => Ok(Some(place)),
            Ok(false) => Ok(None),
            Err(error) => {
                let place = Place { line: self.reader.position().line() as usize, ..place };
                Err(Error::Broken { place, message: error.to_string() })
            }
        }
    }
}
