//! Arrow: files and streams, as `datasets` saves them, a batch of rows at a time.

use std::io::BufRead;
use std::panic::{AssertUnwindSafe, catch_unwind};

use arrow_array::cast::AsArray as _;
use arrow_array::{Array, RecordBatch, types};
use arrow_buffer::Buffer;
use arrow_ipc::reader::StreamDecoder;
use arrow_schema::{ArrowError, DataType};
use serde_json::{Map, Value};

use super::Rows;
use crate::error::{Error, Place, Result};
use crate::formats::Row;

struct ArrowRows<R> {
    batches: Batches<R>,
    batch: Option<RecordBatch>,
    /// The next row within `batch`.
    next: usize,
    place: Place,
}

/// The rows of an Arrow file or stream; a row's line is its number.
///
/// Behind its first eight bytes a file is a stream, and its footer, which isn't needed, comes after the stream's end.
pub(super) fn rows(mut file: impl BufRead + Send + 'static, place: Place) -> Result<Rows> {
    let read = |source| Error::File { action: "read", path: place.file.to_path_buf(), source };
    if file.fill_buf().map_err(read)?.starts_with(b"ARROW1") {
        file.read_exact(&mut [0; 8]).map_err(read)?;
    }
    let batches = Batches { file, decoder: StreamDecoder::new(), chunk: Buffer::default() };
    let mut rows = ArrowRows { batches, batch: None, next: 0, place };
    Ok(super::until_over(move || rows.read()))
}

/// The batches of a stream. The decoder holds no more than the bytes that came, whatever lengths the file claims.
struct Batches<R> {
    file: R,
    decoder: StreamDecoder,
    chunk: Buffer,
}

impl<R: BufRead> Batches<R> {
    fn next(&mut self) -> Result<Option<RecordBatch>, ArrowError> {
        loop {
            if self.chunk.is_empty() {
                let bytes = self.file.fill_buf()?;
                if bytes.is_empty() {
                    self.decoder.finish()?;
                    return Ok(None);
                }
                self.chunk = Buffer::from(bytes);
                let count = bytes.len();
                self.file.consume(count);
            }
            match self.decoder.decode(&mut self.chunk) {
                Ok(Some(batch)) => return Ok(Some(batch)),
                Ok(None) => {}
                // What comes after the stream's end is a file's footer.
                Err(ArrowError::IpcError(message)) if message == "Unexpected EOS" => return Ok(None),
                Err(error) => return Err(error),
            }
        }
    }
}

/// What the crate says, as our error; where it panics on a damaged file, that too.
fn guarded<T>(place: &Place, read: impl FnOnce() -> Result<T, ArrowError>) -> Result<T> {
    let message = match catch_unwind(AssertUnwindSafe(read)) {
        Ok(Ok(value)) => return Ok(value),
        Ok(Err(error)) => error.to_string(),
        Err(_) => "the file is damaged".to_string(),
    };
    Err(Error::Broken { place: place.clone(), message: format!("can't read Arrow: {message}") })
}

impl<R: BufRead> ArrowRows<R> {
    fn read(&mut self) -> Result<Option<Row>> {
        loop {
            if let Some(batch) = self.batch.as_ref().filter(|batch| self.next < batch.num_rows()) {
                self.place.line += 1;
                let row = self.next;
                self.next += 1;
                let schema = batch.schema();
                let mut fields = Map::new();
                for (field, column) in schema.fields().iter().zip(batch.columns()) {
                    let value = value(column.as_ref(), row).map_err(|kind| Error::Broken {
                        place: self.place.clone(),
                        message: format!("column `{}` has type {kind}, which is not read", field.name()),
                    })?;
                    fields.insert(field.name().clone(), value);
                }
                return Ok(Some(Row { place: self.place.clone(), fields }));
            }
            let batches = &mut self.batches;
            self.batch = guarded(&self.place, || batches.next())?;
            self.next = 0;
            if self.batch.is_none() {
                return Ok(None);
            }
        }
    }
}

/// One value of a column; an error names a type that isn't read.
fn value(array: &dyn Array, row: usize) -> Result<Value, String> {
    if row >= array.len() || array.is_null(row) {
        return Ok(Value::Null);
    }
    macro_rules! primitive {
        ($kind:ty) => {
            array.as_primitive::<$kind>().value(row).into()
        };
    }
    Ok(match array.data_type() {
        DataType::Null => Value::Null,
        DataType::Boolean => array.as_boolean().value(row).into(),
        DataType::Int8 => primitive!(types::Int8Type),
        DataType::Int16 => primitive!(types::Int16Type),
        DataType::Int32 => primitive!(types::Int32Type),
        DataType::Int64 => primitive!(types::Int64Type),
        DataType::UInt8 => primitive!(types::UInt8Type),
        DataType::UInt16 => primitive!(types::UInt16Type),
        DataType::UInt32 => primitive!(types::UInt32Type),
        DataType::UInt64 => primitive!(types::UInt64Type),
        DataType::Float32 => primitive!(types::Float32Type),
        DataType::Float64 => primitive!(types::Float64Type),
        // Times as their number: nothing that is trained on is one.
        DataType::Timestamp(unit, _) => {
            use arrow_schema::TimeUnit::*;
            match unit {
                Second => primitive!(types::TimestampSecondType),
                Millisecond => primitive!(types::TimestampMillisecondType),
                Microsecond => primitive!(types::TimestampMicrosecondType),
                Nanosecond => primitive!(types::TimestampNanosecondType),
            }
        }
        DataType::Date32 => primitive!(types::Date32Type),
        DataType::Date64 => primitive!(types::Date64Type),
        DataType::Utf8 => array.as_string::<i32>().value(row).into(),
        DataType::LargeUtf8 => array.as_string::<i64>().value(row).into(),
        DataType::Utf8View => array.as_string_view().value(row).into(),
        DataType::Binary => String::from_utf8_lossy(array.as_binary::<i32>().value(row)).into(),
        DataType::LargeBinary => String::from_utf8_lossy(array.as_binary::<i64>().value(row)).into(),
        DataType::List(_) => list(array.as_list::<i32>().value(row).as_ref())?,
        DataType::LargeList(_) => list(array.as_list::<i64>().value(row).as_ref())?,
        DataType::FixedSizeList(_, _) => list(array.as_fixed_size_list().value(row).as_ref())?,
        DataType::Struct(fields) => {
            let columns = fields.iter().zip(array.as_struct().columns());
            let object: Result<Map<String, Value>, String> = columns
                .map(|(field, column)| Ok((field.name().clone(), value(column.as_ref(), row)?)))
                .collect();
            Value::Object(object?)
        }
        DataType::Dictionary(_, _) => {
            let dictionary = array.as_any_dictionary();
            let key = dictionary.normalized_keys().get(row).copied().unwrap_or(usize::MAX);
            value(dictionary.values().as_ref(), key)?
        }
        other => return Err(other.to_string()),
    })
}

fn list(array: &dyn Array) -> Result<Value, String> {
    (0..array.len()).map(|row| value(array, row)).collect()
}
