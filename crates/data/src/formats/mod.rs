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

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn row(fields: Value) -> Row {
        Row { place: Place::new("f.json", 7), fields: fields.as_object().cloned().unwrap_or_default() }
    }

    /// The conversation as `role:content`, or the error.
    fn check(fields: Value, expected: &str) {
        let row = row(fields);
        let conversation = recognise(std::slice::from_ref(&row)).and_then(|format| format.conversation(&row));
        let shown = match conversation {
            Ok(conversation) => {
                let turns: Vec<String> = conversation
                    .messages
                    .iter()
                    .map(|m| {
                        let calls = m.tool_calls.as_ref().map_or(String::new(), |calls| format!("+{calls}"));
                        let trained = m.trained.map_or(String::new(), |trained| format!("!{trained}"));
                        format!("{}:{}{calls}{trained}", m.role.name(), m.content)
                    })
                    .collect();
                let tools = conversation.tools.map_or(String::new(), |tools| format!(" tools:{tools}"));
                turns.join(" | ") + &tools
            }
            Err(error) => error.to_string(),
        };
        assert_eq!(shown, expected);
    }

    #[test]
    fn alpaca() {
        check(json!({"instruction": "a", "input": "b", "output": "c"}), "user:a\nb | assistant:c");
        check(json!({"instruction": "a", "input": "", "output": "c"}), "user:a | assistant:c");
        check(
            json!({"instruction": "a", "output": "c", "system": "s", "history": [["q", "r"]]}),
            "system:s | user:q | assistant:r | user:a | assistant:c",
        );
        check(json!({"prompt": "a", "completion": "c"}), "user:a | assistant:c");
        check(
            json!({"instruction": "a", "output": 5}),
            "f.json:7: expected a text in column `output`, found a number",
        );
        check(
            json!({"instruction": "a", "output": "c", "history": [["q"]]}),
            "f.json:7: expected a pair of texts in column `history`, found a list",
        );
    }

    #[test]
    fn sharegpt() {
        check(
            json!({"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}),
            "user:a | assistant:b",
        );
        check(
            json!({"conversations": [
                {"from": "system", "value": "first"},
                {"from": "human", "value": "a"},
                {"from": "function_call", "value": "{\"name\": \"f\", \"arguments\": \"{\\\"x\\\": 1}\"}"},
                {"from": "observation", "value": "o"},
                {"from": "gpt", "value": "b", "train": false},
            ], "system": "column", "tools": "[{\"name\": \"f\"}]"}),
            "system:first | user:a | \
             assistant:+[{\"type\":\"function\",\"function\":{\"name\":\"f\",\"arguments\":{\"x\":1}}}] | \
             tool:o | assistant:b!false tools:[{\"name\":\"f\"}]",
        );
        check(
            json!({"conversations": [{"from": "gpt", "value": "a"}, {"from": "human", "value": "b"}]}),
            "f.json:7: turn 0 is assistant, expected a question; human/observation and gpt/function_call must take turns",
        );
        check(
            json!({"conversations": [{"from": "human", "value": "a"}]}),
            "f.json:7: the conversation has 1 turns and must end with an answer (gpt or function_call)",
        );
        check(
            json!({"conversations": [{"from": "bot", "value": "a"}]}),
            "f.json:7: turn 0: unknown role `bot`; expected human, gpt, function_call, observation or system",
        );
    }

    #[test]
    fn messages() {
        check(
            json!({"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]},
                {"role": "assistant", "content": null, "tool_calls": [
                    {"id": "1", "function": {"name": "f", "arguments": "{\"x\": 1}"}}]},
                {"role": "tool", "content": "o", "tool_call_id": "1"},
                {"role": "assistant", "content": "b", "weight": 0}]}),
            "user:a | assistant:+[{\"id\":\"1\",\"function\":{\"name\":\"f\",\"arguments\":{\"x\":1}}}] | \
             tool:o | assistant:b!false",
        );
        check(
            json!({"messages": [{"role": "robot", "content": "a"}]}),
            "f.json:7: message 0: unknown role `robot`; expected system, developer, user, assistant or tool",
        );
    }

    #[test]
    fn text_and_others() {
        check(json!({"text": "abc"}), "text:abc");
        check(
            json!({"chosen": "a", "rejected": "b"}),
            "f.json:7: preference data (chosen, rejected) is not there yet; only supervised data is",
        );
        check(
            json!({"foo": 1, "bar": 2}),
            "f.json:7: cannot tell the format from the columns foo, bar; expected `conversations`, `messages`, \
             `instruction` and `output`, or `text`; other names can be mapped in dataset_info.json",
        );
        assert_eq!(
            by_name("dpo", &Mapping::default()).unwrap_err().to_string(),
            "data format `dpo` is not there yet; use alpaca, sharegpt, openai or text"
        );
        let kto =
            Mapping { columns: [("kto_tag".to_string(), "label".to_string())].into(), ..Mapping::default() };
        assert_eq!(
            by_name("sharegpt", &kto).unwrap_err().to_string(),
            "KTO data (column `kto_tag`) is not there yet; only supervised data is"
        );
    }

    #[test]
    fn columns_and_tags_are_mapped() {
        let mapping = Mapping {
            columns: [("messages", "chat"), ("system", "sys")]
                .map(|(a, b)| (a.to_string(), b.to_string()))
                .into(),
            tags: [("role_tag", "role"), ("content_tag", "text"), ("user_tag", "u"), ("assistant_tag", "a")]
                .map(|(a, b)| (a.to_string(), b.to_string()))
                .into(),
        };
        let row = row(json!({"sys": "s", "chat": [{"role": "u", "text": "1"}, {"role": "a", "text": "2"}]}));
        for name in ["sharegpt", "openai"] {
            let conversation = by_name(name, &mapping).unwrap().conversation(&row).unwrap();
            let roles: Vec<&str> = conversation.messages.iter().map(|m| m.role.name()).collect();
            assert_eq!(roles, ["system", "user", "assistant"], "{name}");
        }
    }
}
