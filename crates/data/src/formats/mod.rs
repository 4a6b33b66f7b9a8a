//! One file for each form that rows come in; a form is found by looking, or by its name.
//!
//! To add one: a file with a type that implements [`Format`], and a line in [`by_name`] (and in [`recognise`]
//! where its keys give it away).

mod alpaca;
mod messages;
mod preference;
mod sharegpt;
mod text;
mod turns;

use std::borrow::Cow;
use std::collections::BTreeMap;

use serde_json::{Map, Value};

pub use alpaca::Alpaca;
pub use messages::Messages;
pub use preference::{Labelled, PreferenceLists};
pub use sharegpt::ShareGpt;
pub use text::Text;

use crate::conversation::Conversation;
use crate::counts::Purpose;
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

    /// Whether there is something in `column`.
    pub(crate) fn has(&self, column: &str) -> bool {
        self.fields.get(column).is_some_and(|value| !value.is_null())
    }

    /// What is in `column`, which must be there.
    pub(crate) fn value(&self, column: &str) -> Result<&Value> {
        self.fields.get(column).ok_or_else(|| self.missing(column))
    }

    /// The answer in `column`: a text, though it may be empty.
    pub(crate) fn answer(&self, column: &str) -> Result<&str> {
        match self.value(column)? {
            Value::Null => {
                Err(self.error(format!("no answer in column `{column}`: there is nothing to train on")))
            }
            _ => self.optional_text(column),
        }
    }

    /// The list in `column`, which must be there: as such, or as a text that holds one as JSON.
    pub(crate) fn list(&self, column: &str) -> Result<Cow<'_, [Value]>> {
        let wrong = |found: &str| self.error(format!("expected a list in column `{column}`, found {found}"));
        match self.value(column)? {
            Value::Array(items) => Ok(Cow::Borrowed(items)),
            Value::String(text) => match serde_json::from_str(text) {
                Ok(Value::Array(items)) => Ok(Cow::Owned(items)),
                _ => Err(wrong("a text")),
            },
            other => Err(wrong(kind(other))),
        }
    }

    /// The object in `column`, which must be there: as such, or as a text that holds one as JSON.
    pub(crate) fn object(&self, column: &str) -> Result<Cow<'_, Value>> {
        match self.value(column)? {
            value @ Value::Object(_) => Ok(Cow::Borrowed(value)),
            Value::String(text) => match serde_json::from_str(text) {
                Ok(value @ Value::Object(_)) => Ok(Cow::Owned(value)),
                _ => Err(turns::not_an_object(self, column, &Value::from(""))),
            },
            other => Err(turns::not_an_object(self, column, other)),
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
        self.error(format!("no column `{column}`; the row has: {}", self.columns()))
    }

    /// The names of its columns.
    fn columns(&self) -> String {
        self.fields.keys().map(String::as_str).collect::<Vec<_>>().join(", ")
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

    /// What its rows are for.
    fn purpose(&self) -> Purpose;

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

    /// A column that a set may do without: as in LLaMA-Factory the default counts only where no column is named.
    pub(crate) fn optional(&self, name: &str, default: &str) -> Option<String> {
        let default = self.columns.is_empty().then(|| default.to_string());
        self.columns.get(name).cloned().or(default)
    }

    pub(crate) fn tag(&self, name: &str, default: &str) -> String {
        self.tags.get(name).map_or(default, String::as_str).to_string()
    }
}

/// Whether rows have a pair of answers: `ranking` of `dataset_info.json`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Answers {
    /// One answer.
    #[default]
    One,
    /// A chosen and a rejected one.
    Pair,
}

/// The format called `name` (`alpaca`, `sharegpt`, `openai` or `messages`, `text`) with a data set's columns.
///
/// # Errors
/// When there is no such format, or not with these columns.
pub fn by_name(name: &str, mapping: &Mapping, answers: Answers) -> Result<Box<dyn Format>> {
    let label = mapping.columns.get("kto_tag");
    if answers == Answers::Pair && label.is_some() {
        return Err(Error::Dataset(
            "rows are either ranked (`ranking`) or labelled (`kto_tag`), not both".to_string(),
        ));
    }
    let format: Box<dyn Format> = match (name, answers) {
        ("alpaca", Answers::Pair) => Box::new(Alpaca::pairs(mapping)),
        ("alpaca", _) if is_pretraining(mapping) => Box::new(Text::new(mapping.column("prompt", "text"))),
        ("alpaca", _) => Box::new(Alpaca::new(mapping)),
        ("sharegpt", Answers::Pair) => Box::new(ShareGpt::pairs(mapping)),
        ("sharegpt", _) => Box::new(ShareGpt::new(mapping)),
        ("openai" | "messages", Answers::Pair) => Box::new(Messages::pairs(mapping)),
        ("openai" | "messages", _) => Box::new(Messages::new(mapping)),
        ("text", Answers::One) => Box::new(Text::new(mapping.column("prompt", "text"))),
        _ => {
            return Err(Error::Dataset(format!(
                "unknown data format `{name}`; expected alpaca, sharegpt, openai or text"
            )));
        }
    };
    Ok(match label {
        Some(column) => Box::new(Labelled::new(format, column.clone())),
        None => format,
    })
}

/// LLaMA-Factory writes a pretraining set as alpaca with nothing but a prompt.
fn is_pretraining(mapping: &Mapping) -> bool {
    mapping.columns.len() == 1 && mapping.columns.contains_key("prompt")
}

/// The format of rows like this one, by its keys; the error lists the keys there are.
pub fn recognise(row: &Row) -> Result<Box<dyn Format>> {
    let label =
        ["label", "kto_tag"].into_iter().find(|it| matches!(row.fields.get(*it), Some(Value::Bool(_))));
    // A boolean beside a conversation or a completion is KTO's; beside anything else it is something else's.
    let format = supervised_or_pairs(row)?;
    match label {
        Some(column) if format.purpose() == Purpose::Supervised => {
            Ok(Box::new(Labelled::new(format, column.to_string())))
        }
        _ => Ok(format),
    }
}

/// The conversation of a row in a form that is found by looking; messages may come in any order.
///
/// # Errors
/// As [`recognise`] and [`Format::conversation`].
pub fn as_written(row: &Row) -> Result<Conversation> {
    let turns = row.fields.get("messages").and_then(Value::as_array);
    if turns.is_some_and(|turns| turns.first().is_some_and(|turn| turn.get("role").is_some())) {
        return Messages::new(&Mapping::default()).as_written(row);
    }
    recognise(row)?.conversation(row)
}

fn supervised_or_pairs(row: &Row) -> Result<Box<dyn Format>> {
    let has = |column: &str| row.fields.contains_key(column);
    let mut mapping = Mapping::default();
    for extra in ["system", "tools", "history"].into_iter().filter(|column| has(column)) {
        mapping.columns.insert(extra.to_string(), extra.to_string());
    }
    let map = |mapping: &mut Mapping, ours: &str, theirs: &str| {
        mapping.columns.insert(ours.to_string(), theirs.to_string());
    };
    // Turns: whole conversations, or what comes before a pair of answers.
    let mut turns = None;
    for column in ["messages", "conversations", "conversation", "prompt"] {
        // Tables have their lists as JSON in a text; what is called a prompt is mostly a text of its own.
        let Some(list) = row.list(column).ok().filter(|_| row.has(column)) else { continue };
        let key = |key: &str| list.first().is_some_and(|turn| turn.get(key).is_some());
        if key("from") || key("role") {
            map(&mut mapping, "messages", column);
            turns = Some(if key("from") { "sharegpt" } else { "openai" });
            break;
        }
    }
    for [chosen, rejected] in [["chosen", "rejected"], ["chosen_messages", "rejected_messages"]] {
        if !(has(chosen) && has(rejected)) {
            continue;
        }
        map(&mut mapping, "chosen", chosen);
        map(&mut mapping, "rejected", rejected);
        return match (row.fields.get(chosen), turns) {
            (Some(Value::Array(_)), Some("openai") | None) => Ok(Box::new(PreferenceLists::new(&mapping))),
            (Some(Value::Object(_)), Some(name)) => by_name(name, &mapping, Answers::Pair),
            (Some(Value::String(_)), None) => {
                question(row, &mut mapping)?;
                by_name("alpaca", &mapping, Answers::Pair)
            }
            (Some(other), _) => Err(row.error(format!(
                "cannot tell the form of the preference pairs: column `{chosen}` is {}; the row has: {}",
                kind(other),
                row.columns()
            ))),
            (None, _) => Err(row.missing(chosen)),
        };
    }
    if let Some(name) = turns.filter(|_| !matches!(row.fields.get("prompt"), Some(Value::Array(_)))) {
        return by_name(name, &mapping, Answers::One);
    }
    for (prompt, response) in
        [("instruction", "output"), ("prompt", "completion"), ("prompt", "response"), ("question", "answer")]
    {
        if has(prompt) && has(response) {
            map(&mut mapping, "prompt", prompt);
            map(&mut mapping, "response", response);
            if has("input") && prompt == "instruction" {
                map(&mut mapping, "query", "input");
            }
            return by_name("alpaca", &mapping, Answers::One);
        }
    }
    if has("text") {
        return Ok(Box::new(Text::new("text".to_string())));
    }
    Err(row.error(format!(
        "cannot tell the format from the columns {}; expected `conversations`, `messages`, `instruction` and \
         `output`, or `text`; other names can be mapped in dataset_info.json",
        row.columns()
    )))
}

/// Finds the column of the question that a pair of answers belongs to.
fn question(row: &Row, mapping: &mut Mapping) -> Result<()> {
    for column in ["instruction", "prompt", "question"] {
        if row.fields.contains_key(column) {
            mapping.columns.insert("prompt".to_string(), column.to_string());
            if column == "instruction" && row.fields.contains_key("input") {
                mapping.columns.insert("query".to_string(), "input".to_string());
            }
            return Ok(());
        }
    }
    Err(row.error(format!(
        "preference pairs without a question: expected a column `instruction`, `prompt` or `question`; the row has: {}",
        row.columns()
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
        let conversation = recognise(&row).and_then(|format| format.conversation(&row));
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
                let rejected = conversation.rejected.map_or(String::new(), |it| format!(" ✗{}", it.content));
                let label = conversation.label.map_or(String::new(), |label| format!(" label:{label}"));
                turns.join(" | ") + &tools + &rejected + &label
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
            "f.json:7: the conversation has 1 turns and must end with an answer (gpt or function_call): there is nothing \
             to train on",
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
        // LLaMA-Factory's own form of parts, and results of tools one after another.
        check(
            json!({"messages": [{"role": "user", "content": [{"type": "text", "value": "a"}], "loss_weight": 0.0},
                {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]},
                {"role": "tool", "content": "1"}, {"role": "tool", "content": "2"},
                {"role": "assistant", "content": [{"type": "text", "value": "b"}], "loss_weight": 1.0}]}),
            "user:a!false | assistant:+[{\"function\":{\"name\":\"f\",\"arguments\":{}}}] | tool:1 | tool:2 | assistant:b!true",
        );
        check(
            json!({"messages": [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]}),
            "f.json:7: turn 1 is user, expected an answer; user/tool and assistant must take turns",
        );
        check(
            json!({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]}),
            "f.json:7: message 0: a part of the content that is not text; only text is supported",
        );
        check(
            json!({"messages": [{"role": "robot", "content": "a"}]}),
            "f.json:7: message 0: unknown role `robot`; expected system, developer, user, assistant or tool",
        );
    }

    #[test]
    fn preference_pairs() {
        check(
            json!({"instruction": "a", "input": "i", "chosen": "b", "rejected": "c"}),
            "user:a\ni | assistant:b ✗c",
        );
        check(
            json!({"prompt": "a", "chosen": "b", "rejected": "c", "system": "s"}),
            "system:s | user:a | assistant:b ✗c",
        );
        check(
            json!({"conversations": [{"from": "human", "value": "a"}], "chosen": {"from": "gpt", "value": "b"},
                   "rejected": {"from": "gpt", "value": "c"}}),
            "user:a | assistant:b ✗c",
        );
        let [question, good, bad] = [("user", "a"), ("assistant", "b"), ("assistant", "c")]
            .map(|(role, text)| json!({"role": role, "content": text}));
        check(json!({"messages": [question], "chosen": good, "rejected": bad}), "user:a | assistant:b ✗c");
        check(json!({"prompt": [question], "chosen": [good], "rejected": [bad]}), "user:a | assistant:b ✗c");
        check(json!({"chosen": [question, good], "rejected": [question, bad]}), "user:a | assistant:b ✗c");
        check(
            json!({"prompt": "a", "chosen": [question, good], "rejected": [question, bad]}),
            "user:a | assistant:b ✗c",
        );
        check(
            json!({"chosen_messages": [question, good], "rejected_messages": [{"role": "user", "content": "other"}, bad]}),
            "f.json:7: `chosen_messages` and `rejected_messages` differ before their last message",
        );
        check(
            json!({"messages": [question], "chosen": question, "rejected": bad}),
            "f.json:7: column `chosen` is of the user, expected an answer",
        );
        check(
            json!({"messages": [question, good], "chosen": good, "rejected": bad}),
            "f.json:7: turn 2 is assistant, expected a question; user/tool and assistant must take turns",
        );
        check(
            json!({"instruction": "a", "chosen": "b", "rejected": null}),
            "f.json:7: no answer in column `rejected`: there is nothing to train on",
        );
        check(
            json!({"chosen": "a", "rejected": "b"}),
            "f.json:7: preference pairs without a question: expected a column `instruction`, `prompt` or `question`; \
             the row has: chosen, rejected",
        );
        check(
            json!({"chosen": 1, "rejected": 2}),
            "f.json:7: cannot tell the form of the preference pairs: column `chosen` is a number; the row has: chosen, rejected",
        );
    }

    #[test]
    fn labels() {
        check(json!({"prompt": "a", "completion": "b", "label": false}), "user:a | assistant:b label:false");
        check(
            json!({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "kto_tag": true}),
            "user:a | assistant:b label:true",
        );
        // Not a boolean: something else's label.
        check(json!({"text": "a", "label": 3}), "text:a");
        let mapping = Mapping {
            columns: [("prompt", "q"), ("response", "a"), ("kto_tag", "good")]
                .map(|(a, b)| (a.into(), b.into()))
                .into(),
            ..Mapping::default()
        };
        let format = by_name("alpaca", &mapping, Answers::One).unwrap();
        let label = |good: Value| {
            format.conversation(&row(json!({"q": "x", "a": "y", "good": good}))).map(|it| it.label)
        };
        assert_eq!(label(json!("False")).unwrap(), Some(false));
        let error = label(json!("maybe")).unwrap_err().to_string();
        assert_eq!(error, "f.json:7: expected true or false in column `good`, found a text");
        let error = by_name("alpaca", &mapping, Answers::Pair).unwrap_err().to_string();
        assert_eq!(error, "rows are either ranked (`ranking`) or labelled (`kto_tag`), not both");
    }

    #[test]
    fn text_and_others() {
        check(json!({"text": "abc"}), "text:abc");
        check(json!({"text": ""}), "f.json:7: the text is empty: there is nothing to train on");
        check(
            json!({"foo": 1, "bar": 2}),
            "f.json:7: cannot tell the format from the columns foo, bar; expected `conversations`, `messages`, \
             `instruction` and `output`, or `text`; other names can be mapped in dataset_info.json",
        );
        assert_eq!(
            by_name("dpo", &Mapping::default(), Answers::One).unwrap_err().to_string(),
            "unknown data format `dpo`; expected alpaca, sharegpt, openai or text"
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
            let conversation = by_name(name, &mapping, Answers::One).unwrap().conversation(&row).unwrap();
            let roles: Vec<&str> = conversation.messages.iter().map(|m| m.role.name()).collect();
            assert_eq!(roles, ["system", "user", "assistant"], "{name}");
        }
    }
}
