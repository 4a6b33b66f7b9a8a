//! OpenAI's `messages`: role and content, tool calls and tool results.

use serde_json::{Map, Value};

use super::{Format, Mapping, Row, kind};
use crate::conversation::{Conversation, Message, Role};
use crate::error::Result;

/// The messages form, with its column and tag names.
#[derive(Debug)]
pub struct Messages {
    messages: String,
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
            system: mapping.columns.get("system").cloned(),
            tools: mapping.column("tools", "tools"),
            role: mapping.tag("role_tag", "role"),
            content: mapping.tag("content_tag", "content"),
            roles: roles.map(|(tag, default, role)| (mapping.tag(tag, default), role)).into(),
        }
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
        message.trained = match fields.get("train").or_else(|| fields.get("weight")) {
            Some(Value::Bool(trained)) => Some(*trained),
            Some(Value::Number(weight)) => Some(weight.as_f64() != Some(0.0)),
            _ => None,
        };
        let known = [self.role.as_str(), self.content.as_str(), "tool_calls", "train", "weight"];
        let extra = fields.iter().filter(|(key, value)| !known.contains(&key.as_str()) && !value.is_null());
        message.extra = extra.map(|(key, value)| (key.clone(), value.clone())).collect::<Map<_, _>>();
        Ok(message)
    }
}

impl Format for Messages {
    fn name(&self) -> &'static str {
        "openai"
    }

    fn conversation(&self, row: &Row) -> Result<Conversation> {
        let turns = row.list(&self.messages)?;
        let mut messages = Vec::with_capacity(turns.len() + 1);
        for (index, turn) in turns.iter().enumerate() {
            messages.push(self.message(row, index, turn)?);
        }
        if messages.is_empty() {
            return Err(row.error(format!("column `{}` is an empty list", self.messages)));
        }
        let system = self.system.as_deref().map_or(Ok(""), |column| row.optional_text(column))?;
        if !system.is_empty() && messages[0].role != Role::System {
            messages.insert(0, Message::new(Role::System, system));
        }
        Ok(Conversation { messages, tools: row.tools(&self.tools)?, ..Conversation::default() })
    }
}

fn part_text(part: &Value) -> Option<&str> {
    part.as_str().or_else(|| part.get("text")?.as_str())
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
