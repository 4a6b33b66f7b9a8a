//! Plain text: each line is a row with the one column `text`, as `datasets` reads it.

use serde_json::{Map, Value};

use super::{Line, Source, too_long};
use crate::error::Result;
use crate::formats::Row;

pub(super) struct TextRows {
    source: Source,
    line: Vec<u8>,
}

impl TextRows {
    pub(super) fn new(source: Source) -> TextRows {
        TextRows { source, line: Vec::new() }
    }

    pub(super) fn read(&mut self) -> Result<Option<Row>> {
        let line = self.source.place.line;
        match self.source.line(&mut self.line)? {
            Line::End => return Ok(None),
            Line::TooLong => return Err(self.source.row_error(line, too_long())),
            Line::Whole => {}
        }
        let text =
            std::str::from_utf8(&self.line).map_err(|_| self.source.row_error(line, "not UTF-8 text"))?;
        let fields = Map::from_iter([("text".to_string(), Value::from(text))]);
        Ok(Some(Row { place: self.source.at(line), fields }))
    }
}
