//! Parquet, by rows: nested lists, structs and maps become lists and objects.
//!
//! Read through the parquet crate's records, which need none of Arrow's arrays and hold a page of each column.

use std::panic::{AssertUnwindSafe, catch_unwind};

use parquet::errors::ParquetError;
use parquet::file::reader::{ChunkReader, FileReader as _, SerializedFileReader};
use parquet::record::reader::RowIter;
use parquet::record::{Field, Row as Record};
use serde_json::{Map, Value};

use super::Rows;
use crate::error::{Error, Place, Result};
use crate::formats::Row;

/// The rows of a Parquet file; a row's line is its number.
pub(super) fn rows<R: ChunkReader + 'static>(file: R, mut place: Place) -> Result<Rows> {
    let open = || {
        let reader = SerializedFileReader::new(file)?;
        let columns = reader.metadata().file_metadata().schema_descr().num_columns();
        if columns == 0 {
            return Err(ParquetError::General("it has no columns".to_string()));
        }
        reader.metadata().row_groups().iter().try_for_each(check_sizes)?;
        Ok(RowIter::from_file_into(Box::new(reader)))
    };
    let mut records: RowIter<'static> = guarded(&place, open)?;
    Ok(super::until_over(move || {
        place.line += 1;
        let record = guarded(&place, || records.next().transpose())?;
        Ok(record.map(|record| Row { place: place.clone(), fields: fields(record) }))
    }))
}

/// A damaged header may ask for more memory than the whole column has.
fn check_sizes(group: &parquet::file::metadata::RowGroupMetaData) -> parquet::errors::Result<()> {
    let negative = group.num_rows() < 0
        || group.columns().iter().any(|it| it.num_values() < 0 || it.uncompressed_size() < 0);
    match negative {
        true => Err(ParquetError::General("a negative size".to_string())),
        false => Ok(()),
    }
}

/// What the parquet crate says, as our error; where it panics on a damaged file, that too.
fn guarded<T>(place: &Place, read: impl FnOnce() -> parquet::errors::Result<T>) -> Result<T> {
    let message = match catch_unwind(AssertUnwindSafe(read)) {
        Ok(Ok(value)) => return Ok(value),
        Ok(Err(error)) => error.to_string(),
        Err(_) => "the file is damaged".to_string(),
    };
    Err(Error::Broken { place: place.clone(), message: format!("can't read Parquet: {message}") })
}

fn fields(record: Record) -> Map<String, Value> {
    record.into_columns().into_iter().map(|(name, field)| (name, value(field))).collect()
}

fn value(field: Field) -> Value {
    match field {
        Field::Null => Value::Null,
        Field::Bool(it) => it.into(),
        Field::Byte(it) => it.into(),
        Field::Short(it) => it.into(),
        Field::Int(it) => it.into(),
        Field::Long(it) => it.into(),
        Field::UByte(it) => it.into(),
        Field::UShort(it) => it.into(),
        Field::UInt(it) => it.into(),
        Field::ULong(it) => it.into(),
        Field::Float16(it) => f32::from(it).into(),
        Field::Float(it) => it.into(),
        Field::Double(it) => it.into(),
        Field::Str(it) => it.into(),
        // Texts of writers that don't say that they are texts.
        Field::Bytes(it) => String::from_utf8_lossy(it.data()).into(),
        Field::Group(record) => Value::Object(fields(record)),
        Field::ListInternal(list) => list.elements().iter().cloned().map(value).collect(),
        Field::MapInternal(map) => {
            let entry = |(key, it): &(Field, Field)| {
                let key = match value(key.clone()) {
                    Value::String(text) => text,
                    other => other.to_string(),
                };
                (key, value(it.clone()))
            };
            Value::Object(map.entries().iter().map(entry).collect())
        }
        // Dates, times and decimals, as the crate prints them.
        other => other.to_string().into(),
    }
}
