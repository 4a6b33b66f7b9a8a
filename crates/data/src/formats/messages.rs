//! OpenAI's `messages`: role and content, tool calls and tool results.

use serde_json::{Map, Value};

use super::turns::{ToolResults, check_turns, insert_system, push_pair};
use super::{Format, Mapping, Row, kind};
use crate::conversation::{Conversation, Message, Role};
use crate::counts::Purpose;
use crate::error::Result;

/// The messages form, with its column and tag names.
#[derive(Debug)]
pub struct Messages {
    messages: String,
    pair: Option<[String; 2]>,
    system: Option<String>,
    tools: String,
    role: String,
    content: String,
    roles: Vec<(String, Role)>,
}

impl Messages {
    /// With OpenAI's names where `mapping` gives none.
    pub fn new(mapping: &Mapping) -> Messages {
        let roles = [
            ("system_tag", "system", Role::System),
            ("user_tag", "user", Role::User),
            ("assistant_tag", "assistant", Role::Assistant),
            ("observation_tag", "tool", Role::Tool),
        ];
        Messages {
            messages: mapping.column("messages", "messages"),
            pair: None,
            system: mapping.columns.get("system").cloned(),
            tools: mapping.column("tools", "tools"),
            role: mapping.tag("role_tag", "role"),
            content: mapping.tag("content_tag", "content"),
            roles: roles.map(|(tag, default, role)| (mapping.tag(tag, default), role)).into(),
        }
    }

    /// The same with a chosen and a rejected answer.
    pub fn pairs(mapping: &Mapping) -> Messages {
        let pair = ["chosen", "rejected"].map(|name| mapping.column(name, name));
        Messages { pair: Some(pair), ..Messages::new(mapping) }
    }

    /// The conversation of a row whatever the order of its turns: to be looked at, not to be trained on.
    ///
    /// # Errors
    /// When a message isn't one.
    pub fn as_written(&self, row: &Row) -> Result<Conversation> {
        let messages = self.turns(row, &self.messages)?;
        Ok(Conversation { messages, tools: row.tools(&self.tools)?, ..Conversation::default() })
    }

    /// The messages in a column.
    pub(super) fn turns(&self, row: &Row, column: &str) -> Result<Vec<Message>> {
        let turns = row.list(column)?;
        turns.iter().enumerate().map(|(index, turn)| self.message(row, index, turn)).collect()
    }

    /// Checks the order of turns.
    pub(super) fn check(&self, row: &Row, messages: &[Message]) -> Result<()> {
        check_turns(row, messages, ["user/tool", "assistant"], ToolResults::Several)
    }

    fn message(&self, row: &Row, index: usize, turn: &Value) -> Result<Message> {
        let wrong = |message: String| row.error(format!("message {index}: {message}"));
        let fields =
            turn.as_object().ok_or_else(|| wrong(format!("expected an object, found {}", kind(turn))))?;
        let name = fields
            .get(&self.role)
            .and_then(Value::as_str)
            .ok_or_else(|| wrong(format!("no text `{}`", self.role)))?;
        let mapped = self.roles.iter().find(|(tag, _)| tag == name).map(|(_, role)| *role);
        let role = mapped.or_else(|| Role::from_name(name)).ok_or_else(|| {
            wrong(format!("unknown role `{name}`; expected system, developer, user, assistant or tool"))
        })?;
        let content = match fields.get(&self.content) {
            None | Some(Value::Null) => String::new(),
            Some(Value::String(text)) => text.clone(),
            Some(Value::Array(parts)) => parts
                .iter()
                .map(|part| {
                    part_text(part).ok_or_else(|| {
                        wrong("a part of the content that is not text; only text is supported".to_string())
                    })
                })
                .collect::<Result<Vec<&str>>>()?
                .concat(),
            Some(other) => return Err(wrong(format!("expected a text as content, found {}", kind(other)))),
        };
        let mut message = Message::new(role, content);
        message.tool_calls = match fields.get("tool_calls") {
            None | Some(Value::Null) => None,
            Some(Value::Array(calls)) if calls.is_empty() => None,
            Some(calls) => Some(parsed_arguments(calls)),
        };
        message.trained = super::turns::trained(turn);
        let known = [self.role.as_str(), &self.content, "tool_calls", "train", "weight", "loss_weight"];
        let extra = fields.iter().filter(|(key, value)| !known.contains(&key.as_str()) && !value.is_null());
        message.extra = extra.map(|(key, value)| (key.clone(), value.clone())).collect::<Map<_, _>>();
        Ok(message)
    }
}

impl Format for Messages {
    fn name(&self) -> &'static str {
        "openai"
    }

    fn purpose(&self) -> Purpose {
        if self.pair.is_some() { Purpose::Preference } else { Purpose::Supervised }
    }

    fn conversation(&self, row: &Row) -> Result<Conversation> {
        let mut messages = self.turns(row, &self.messages)?;
        let system = self.system.as_deref().map_or(Ok(""), |column| row.optional_text(column))?;
        insert_system(&mut messages, system);
        let rejected =
            push_pair(row, &mut messages, self.pair.as_ref(), |index, turn| self.message(row, index, turn))?;
        self.check(row, &messages)?;
        Ok(Conversation { messages, tools: row.tools(&self.tools)?, rejected, label: None })
    }
}

fn part_text(part: &Value) -> Option<&str> {
    let text = || part.get("text").or_else(|| part.get("value").filter(|_| part["type"] == "text"));
    part.as_str().or_else(|| text()?.as_str())
}

/// Calls with their arguments as objects: OpenAI's API writes them as JSON in a text, templates want them read.
pub(super) fn parsed_arguments(calls: &Value) -> Value {
    let mut calls = calls.clone();
    for call in calls.as_array_mut().into_iter().flatten() {
        let holder = if call.get("function").is_some() { &mut call["function"] } else { call };
        if let Some(Value::String(text)) = holder.get("arguments")
            && let Ok(arguments @ Value::Object(_)) = serde_json::from_str::<Value>(text)
        {
            holder["arguments"] = arguments;
        }
    }
    calls
}
