//! CSV and TSV: the first line names the columns; an empty field is null, as pandas reads it.

use std::io::{self, BufRead, Read};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use csv::{ByteRecord, Reader, ReaderBuilder};
use serde_json::{Map, Value};

use super::{LONGEST_ROW, Source, too_long};
use crate::error::{Error, Place, Result};
use crate::formats::Row;

pub(super) struct CsvRows {
    reader: Reader<Capped>,
    place: Place,
    left: Arc<AtomicUsize>,
    /// None until the first line was read.
    columns: Option<Vec<String>>,
    record: ByteRecord,
}

/// Reads only so much for one record: a quote that is never closed takes the rest of the file with it.
struct Capped {
    source: Source,
    left: Arc<AtomicUsize>,
}

impl Read for Capped {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let left = self.left.load(Ordering::Relaxed);
        if left == 0 {
            return Err(io::Error::other(too_long()));
        }
        // The mark at the start is passed over.
        self.source.peek().map_err(|error| io::Error::other(error.to_string()))?;
        let mut bytes = self.source.reader.fill_buf()?;
        let count = bytes.read(buffer)?;
        self.source.reader.consume(count);
        self.left.store(left.saturating_sub(count), Ordering::Relaxed);
        Ok(count)
    }
}

impl CsvRows {
    pub(super) fn new(source: Source, delimiter: u8) -> CsvRows {
        let left = Arc::new(AtomicUsize::new(LONGEST_ROW));
        let place = source.place.clone();
        let mut builder = ReaderBuilder::new();
        builder.delimiter(delimiter).has_headers(false).flexible(true);
        let reader = builder.from_reader(Capped { source, left: left.clone() });
        CsvRows { reader, place, left, columns: None, record: ByteRecord::new() }
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
        self.left.store(LONGEST_ROW, Ordering::Relaxed);
        let read = self.reader.read_byte_record(&mut self.record);
        let line = self.record.position().map_or(0, csv::Position::line) as usize;
        let place = Place { line: line.max(1), ..self.place.clone() };
        match read {
            Ok(true) => Ok(Some(place)),
            Ok(false) => Ok(None),
            Err(error) => {
                let place = Place { line: self.reader.position().line() as usize, ..place };
                Err(Error::Broken { place, message: error.to_string() })
            }
        }
    }
}
