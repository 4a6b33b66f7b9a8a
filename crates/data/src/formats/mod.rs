//! One file for each form that rows come in; a form is found by looking, or by its name.
//!
//! To add one: a file with a type that implements [`Format`], and a line in [`by_name`] (and in [`recognise`]
//! where its keys give it away).

mod alpaca;
mod messages;
mod sharegpt;
mod text;

use std::collections::BTreeMap;

use serde_json::{Map, Value};

pub use alpaca::Alpaca;
pub use messages::Messages;
pub use sharegpt::ShareGpt;
pub use text::Text;

use crate::conversation::Conversation;
use crate::error::{Error, Place, Result};

/// One row of a data set: its keys, and where it stands.
#[derive(Clone, Debug, PartialEq)]
pub struct Row {
    /// File and line.
    pub place: Place,
    /// The row's keys and values, in the order of the file.
    pub fields: Map<String, Value>,
}

impl Row {
    /// An error about this row.
    pub fn error(&self, message: impl Into<String>) -> Error {
        Error::Row { place: self.place.clone(), message: message.into() }
    }

    /// The text in `column`; empty where the column is absent or null.
    pub(crate) fn optional_text(&self, column: &str) -> Result<&str> {
        match self.fields.get(column) {
            None | Some(Value::Null) => Ok(""),
            Some(Value::String(text)) => Ok(text),
            Some(other) => {
                Err(self.error(format!("expected a text in column `{column}`, found {}", kind(other))))
            }
        }
    }

    /// The text in `column`, which must be there.
    pub(crate) fn text(&self, column: &str) -> Result<&str> {
        if !self.fields.contains_key(column) {
            return Err(self.missing(column));
        }
        self.optional_text(column)
    }

    /// The list in `column`, which must be there.
    pub(crate) fn list(&self, column: &str) -> Result<&[Value]> {
        match self.fields.get(column) {
            Some(Value::Array(items)) => Ok(items),
            Some(other) => {
                Err(self.error(format!("expected a list in column `{column}`, found {}", kind(other))))
            }
            None => Err(self.missing(column)),
        }
    }

    /// The tools in `column`: a list, or a text that holds one as JSON; none where it is absent or empty.
    pub(crate) fn tools(&self, column: &str) -> Result<Option<Value>> {
        match self.fields.get(column) {
            None | Some(Value::Null) => Ok(None),
            Some(Value::String(text)) if text.trim().is_empty() => Ok(None),
            Some(Value::String(text)) => serde_json::from_str(text).map(Some).map_err(|error| {
                self.error(format!("expected a JSON list of tools in column `{column}`: {error}"))
            }),
            Some(Value::Array(tools)) if tools.is_empty() => Ok(None),
            Some(tools) => Ok(Some(tools.clone())),
        }
    }

    fn missing(&self, column: &str) -> Error {
        let columns: Vec<&str> = self.fields.keys().map(String::as_str).collect();
        self.error(format!("no column `{column}`; the row has: {}", columns.join(", ")))
    }
}

pub(crate) fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a text",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}

/// Turns rows of one form into conversations.
pub trait Format: Send + Sync + std::fmt::Debug {
    /// The name by which configuration and reports call it.
    fn name(&self) -> &'static str;

    /// The conversation of one row. Errors name the row's file and line, what was expected and what there is.
    fn conversation(&self, row: &Row) -> Result<Conversation>;
}

/// How a data set names its columns and roles: `columns` and `tags` of `dataset_info.json`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Mapping {
    /// Our name of a column (`prompt`, `messages` …) to the file's.
    pub columns: BTreeMap<String, String>,
    /// Our name of a tag (`role_tag`, `user_tag` …) to the file's.
    pub tags: BTreeMap<String, String>,
}

impl Mapping {
    pub(crate) fn column(&self, name: &str, default: &str) -> String {
        self.columns.get(name).map_or(default, String::as_str).to_string()
    }

    pub(crate) fn tag(&self, name: &str, default: &str) -> String {
        self.tags.get(name).map_or(default, String::as_str).to_string()
    }
}

/// The format called `name` (`alpaca`, `sharegpt`, `openai` or `messages`, `text`) with a data set's columns.
pub fn by_name(name: &str, mapping: &Mapping) -> Result<Box<dyn Format>> {
    for (column, stage) in [("chosen", "preference"), ("rejected", "preference"), ("kto_tag", "KTO")] {
        if mapping.columns.contains_key(column) {
            return Err(Error::Dataset(format!(
                "{stage} data (column `{column}`) is not there yet; only supervised data is"
            )));
        }
    }
    Ok(match name {
        "alpaca" if is_pretraining(mapping) => Box::new(Text::new(mapping.column("prompt", "text"))),
        "alpaca" => Box::new(Alpaca::new(mapping)),
        "sharegpt" => Box::new(ShareGpt::new(mapping)),
        "openai" | "messages" => Box::new(Messages::new(mapping)),
        "text" => Box::new(Text::new(mapping.column("prompt", "text"))),
        "preference" | "dpo" | "kto" => {
            return Err(Error::Dataset(format!(
                "data format `{name}` is not there yet; use alpaca, sharegpt, openai or text"
            )));
        }
        _ => {
            return Err(Error::Dataset(format!(
                "unknown data format `{name}`; expected alpaca, sharegpt, openai or text"
            )));
        }
    })
}

/// LLaMA-Factory writes a pretraining set as alpaca with nothing but a prompt.
fn is_pretraining(mapping: &Mapping) -> bool {
    mapping.columns.len() == 1 && mapping.columns.get("prompt").is_some_and(|column| column == "text")
}

/// The format of rows like these, by their keys; the error lists the keys there are.
pub fn recognise(rows: &[Row]) -> Result<Box<dyn Format>> {
    let Some(row) = rows.first() else {
        return Err(Error::Dataset("cannot tell the format of a data set without rows".to_string()));
    };
    let has = |column: &str| row.fields.contains_key(column);
    let mapped = |ours: &str, theirs: &str| (ours.to_string(), theirs.to_string());
    if has("chosen") && has("rejected") {
        return Err(row.error("preference data (chosen, rejected) is not there yet; only supervised data is"));
    }
    if has("kto_tag") || (has("label") && has("completion")) {
        return Err(row.error("KTO data (label) is not there yet; only supervised data is"));
    }
    for column in ["messages", "conversations", "conversation"] {
        let Some(Value::Array(turns)) = row.fields.get(column) else { continue };
        let turn_has = |key: &str| turns.first().is_some_and(|turn| turn.get(key).is_some());
        let mut mapping = Mapping { columns: [mapped("messages", column)].into(), ..Mapping::default() };
        for extra in ["system", "tools"].into_iter().filter(|column| has(column)) {
            mapping.columns.insert(extra.to_string(), extra.to_string());
        }
        if turn_has("from") {
            return Ok(Box::new(ShareGpt::new(&mapping)));
        }
        if turn_has("role") {
            return Ok(Box::new(Messages::new(&mapping)));
        }
    }
    for (prompt, response) in
        [("instruction", "output"), ("prompt", "completion"), ("prompt", "response"), ("question", "answer")]
    {
        if has(prompt) && has(response) {
            let mut mapping = Mapping {
                columns: [mapped("prompt", prompt), mapped("response", response)].into(),
                ..Mapping::default()
            };
            for extra in ["system", "history"].into_iter().filter(|column| has(column)) {
                mapping.columns.insert(extra.to_string(), extra.to_string());
            }
            return Ok(Box::new(Alpaca::new(&mapping)));
        }
    }
    if has("text") {
        return Ok(Box::new(Text::new("text".to_string())));
    }
    let columns: Vec<&str> = row.fields.keys().map(String::as_str).collect();
    Err(row.error(format!(
        "cannot tell the format from the columns {}; expected `conversations`, `messages`, `instruction` and \
         `output`, or `text`; other names can be mapped in dataset_info.json",
        columns.join(", ")
    )))
}
