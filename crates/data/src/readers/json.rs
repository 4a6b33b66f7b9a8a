//! JSON: a list of objects, an object on each line, or objects one after another.
//!
//! Where a row ends is found by brackets and quotes alone, so that one that isn't JSON doesn't take the next ones
//! with it, and only one row at a time is in memory.

use serde_json::Value;

use super::{LONGEST_ROW, Line, Source, fields, too_long};
use crate::error::Result;
use crate::formats::Row;

/// What a file may hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Shape {
    /// Whatever it looks like.
    Any,
    /// An object on each line; a list is taken for one as well.
    Lines,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// Nothing was read yet.
    Start,
    /// In lines.
    Lines,
    /// Objects one after another.
    Values,
    /// In a list, before its first row.
    First,
    /// In a list, after a row.
    After,
    /// Done, or broken.
    Over,
}

pub(super) struct JsonRows {
    source: Source,
    shape: Shape,
    state: State,
    row: Vec<u8>,
}

impl JsonRows {
    pub(super) fn new(source: Source, shape: Shape) -> JsonRows {
        JsonRows { source, shape, state: State::Start, row: Vec::new() }
    }

    fn read(&mut self) -> Result<Option<Row>> {
        loop {
            match self.state {
                State::Start => self.start()?,
                State::Lines => return self.line(),
                State::Values => {
                    return match self.space()? {
                        None => Ok(None),
                        Some(_) => self.value().map(Some),
                    };
                }
                State::First | State::After => {
                    let Some(next) = self.space()? else {
                        return Err(self.not_closed());
                    };
                    match next {
                        b']' => {
                            self.source.pass(1, 0);
                            if self.space()?.is_some() {
                                let line = self.source.place.line;
                                return Err(self
                                    .source
                                    .broken(line, "expected nothing after the list of rows"));
                            }
                            return Ok(None);
                        }
                        b',' if self.state == State::After => {
                            self.source.pass(1, 0);
                            if self.space()?.is_none() {
                                return Err(self.not_closed());
                            }
                        }
                        _ if self.state == State::First => {}
                        _ => {
                            let line = self.source.place.line;
                            return Err(self
                                .source
                                .broken(line, "expected `,` or `]` after a row of the list"));
                        }
                    }
                    self.state = State::After;
                    return self.value().map(Some);
                }
                State::Over => return Ok(None),
            }
        }
    }

    fn not_closed(&self) -> crate::Error {
        self.source.broken(self.source.place.line, "the list of rows is not closed with `]`")
    }

    fn start(&mut self) -> Result<()> {
        self.state = match self.space()? {
            None => State::Over,
            Some(b'[') if self.shape == Shape::Any => {
                self.source.pass(1, 0);
                State::First
            }
            Some(_) if self.shape == Shape::Any => State::Values,
            Some(_) => State::Lines,
        };
        Ok(())
    }

    /// Passes over white space; the byte after it.
    fn space(&mut self) -> Result<Option<u8>> {
        loop {
            let bytes = self.source.peek()?;
            if bytes.is_empty() {
                return Ok(None);
            }
            let count = bytes.iter().take_while(|byte| byte.is_ascii_whitespace()).count();
            let next = bytes.get(count).copied();
            let lines = memchr::memchr_iter(b'\n', &bytes[..count]).count();
            self.source.pass(count, lines);
            if next.is_some() {
                return Ok(next);
            }
        }
    }

    fn line(&mut self) -> Result<Option<Row>> {
        loop {
            let line = self.source.place.line;
            match self.source.line(&mut self.row)? {
                Line::End => return Ok(None),
                Line::TooLong => return Err(self.source.row_error(line, too_long())),
                Line::Whole if self.row.trim_ascii().is_empty() => {}
                Line::Whole => return self.parsed(line, "not a JSON object on one line").map(Some),
            }
        }
    }

    /// Reads one value, from its first byte on.
    fn value(&mut self) -> Result<Row> {
        let first_line = self.source.place.line;
        self.row.clear();
        let mut scan = Scan::default();
        let mut long = false;
        loop {
            let bytes = self.source.peek()?;
            if bytes.is_empty() {
                // A bare value, or objects one after another, may end with the file.
                if scan.depth == 0 && !scan.in_string {
                    break;
                }
                return Err(match self.state {
                    State::Values => self.source.broken(first_line, "not JSON: the object is not closed"),
                    _ => self.not_closed(),
                });
            }
            let (count, lines, done) = scan.advance(bytes);
            long |= self.row.len() + count > LONGEST_ROW;
            if long {
                self.row.clear();
            } else {
                self.row.extend_from_slice(&bytes[..count]);
            }
            self.source.pass(count, lines);
            // Objects on lines: one that is not closed where its line ends may be the end of a broken line.
            if done {
                break;
            }
        }
        if long {
            return Err(self.source.row_error(first_line, too_long()));
        }
        self.parsed(first_line, "not JSON")
    }

    /// `self.row`, which starts on line `first_line`, as a row.
    fn parsed(&self, first_line: usize, wrong: &str) -> Result<Row> {
        let error = |line, message: String| Err(self.source.row_error(line, message));
        if let Err(found) = std::str::from_utf8(&self.row) {
            let before = &self.row[..found.valid_up_to()];
            return error(first_line + memchr::memchr_iter(b'\n', before).count(), "not UTF-8 text".into());
        }
        match serde_json::from_slice::<Value>(&self.row) {
            Ok(value) => match fields(value) {
                Ok(fields) => Ok(Row { place: self.source.at(first_line), fields }),
                Err(message) => error(first_line, message),
            },
            Err(found) => {
                let line = first_line + found.line().saturating_sub(1);
                error(line, format!("{wrong}: {}", without_line(&found)))
            }
        }
    }
}

impl Iterator for JsonRows {
    type Item = Result<Row>;

    fn next(&mut self) -> Option<Result<Row>> {
        let row = self.read().transpose();
        if super::ends(&row) {
            self.state = State::Over;
        }
        row
    }
}

/// Finds the end of a value by its brackets and quotes.
#[derive(Default)]
struct Scan {
    depth: usize,
    in_string: bool,
    escaped: bool,
    started: bool,
}

impl Scan {
    /// How many of `bytes` belong to the value, how many lines end among them, and whether it ends there.
    fn advance(&mut self, bytes: &[u8]) -> (usize, usize, bool) {
        let mut lines = 0;
        for (at, byte) in bytes.iter().enumerate() {
            lines += usize::from(*byte == b'\n');
            if self.in_string {
                match byte {
                    _ if self.escaped => self.escaped = false,
                    b'\\' => self.escaped = true,
                    b'"' => {
                        self.in_string = false;
                        if self.depth == 0 {
                            return (at + 1, lines, true);
                        }
                    }
                    _ => {}
                }
                continue;
            }
            match byte {
                b'"' => self.in_string = true,
                b'{' | b'[' => self.depth += 1,
                b'}' | b']' if self.depth > 0 => {
                    self.depth -= 1;
                    if self.depth == 0 {
                        return (at + 1, lines, true);
                    }
                }
                // A bare value ends before these.
                b',' | b']' | b'}' | b' ' | b'\t' | b'\r' | b'\n' if self.depth == 0 && self.started => {
                    return (at, lines - usize::from(*byte == b'\n'), true);
                }
                _ => {}
            }
            self.started = true;
        }
        (bytes.len(), lines, false)
    }
}

/// serde_json's message without its own line number, which counts from the start of the row.
fn without_line(error: &serde_json::Error) -> String {
    let text = error.to_string();
    text.split(" at line ").next().unwrap_or(&text).to_string()
}
