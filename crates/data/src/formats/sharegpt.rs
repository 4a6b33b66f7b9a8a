//! ShareGPT's `conversations`: from and value, with tool calls (`function_call`) and results (`observation`).
//!
//! As in LLaMA-Factory a person (or a result) and the model take turns, and a first system turn wins over the
//! `system` column.

use serde_json::{Value, json};

use super::turns::{ToolResults, check_turns, insert_system, push_pair};
use super::{Format, Mapping, Row, kind};
use crate::conversation::{Conversation, Message, Role};
use crate::counts::Purpose;
use crate::error::Result;

/// The sharegpt form, with its column and tag names.
#[derive(Debug)]
pub struct ShareGpt {
    messages: String,
    pair: Option<[String; 2]>,
    system: Option<String>,
    tools: Option<String>,
    role: String,
    content: String,
    user: String,
    assistant: String,
    observation: String,
    function: String,
    system_tag: String,
}

impl ShareGpt {
    /// With LLaMA-Factory's default columns and tags where `mapping` names none.
    pub fn new(mapping: &Mapping) -> ShareGpt {
        ShareGpt {
            messages: mapping.column("messages", "conversations"),
            pair: None,
            system: mapping.columns.get("system").cloned(),
            tools: mapping.columns.get("tools").cloned(),
            role: mapping.tag("role_tag", "from"),
            content: mapping.tag("content_tag", "value"),
            user: mapping.tag("user_tag", "human"),
            assistant: mapping.tag("assistant_tag", "gpt"),
            observation: mapping.tag("observation_tag", "observation"),
            function: mapping.tag("function_tag", "function_call"),
            system_tag: mapping.tag("system_tag", "system"),
        }
    }

    /// The same with a chosen and a rejected answer.
    pub fn pairs(mapping: &Mapping) -> ShareGpt {
        let pair = ["chosen", "rejected"].map(|name| mapping.column(name, name));
        ShareGpt { pair: Some(pair), ..ShareGpt::new(mapping) }
    }

    fn message(&self, row: &Row, index: usize, turn: &Value) -> Result<Message> {
        let wrong = |message: String| row.error(format!("turn {index}: {message}"));
        let text = |key: &str| {
            turn.get(key).and_then(Value::as_str).ok_or_else(|| {
                let found = turn.get(key).map_or("nothing", kind);
                wrong(format!("expected a text in `{key}`, found {found}"))
            })
        };
        let (tag, content) = (text(&self.role)?, text(&self.content)?);
        let role = if tag == self.user {
            Role::User
        } else if tag == self.assistant || tag == self.function {
            Role::Assistant
        } else if tag == self.observation {
            Role::Tool
        } else if tag == self.system_tag {
            Role::System
        } else {
            return Err(wrong(format!(
                "unknown role `{tag}`; expected {}, {}, {}, {} or {}",
                self.user, self.assistant, self.function, self.observation, self.system_tag
            )));
        };
        let mut message = Message::new(role, content);
        if tag == self.function {
            let calls = serde_json::from_str::<Value>(content)
                .map_err(|error| wrong(format!("expected a tool call as JSON: {error}")))?;
            let calls = if calls.is_array() { calls } else { json!([calls]) };
            let calls: Vec<Value> = calls
                .as_array()
                .into_iter()
                .flatten()
                .map(|call| json!({"type": "function", "function": call}))
                .collect();
            message.tool_calls = Some(super::messages::parsed_arguments(&Value::Array(calls)));
            message.content = String::new();
        }
        message.trained = super::turns::trained(turn);
        Ok(message)
    }
}

impl Format for ShareGpt {
    fn name(&self) -> &'static str {
        "sharegpt"
    }

    fn purpose(&self) -> Purpose {
        if self.pair.is_some() { Purpose::Preference } else { Purpose::Supervised }
    }

    fn conversation(&self, row: &Row) -> Result<Conversation> {
        let mut messages = Vec::new();
        for (index, turn) in row.list(&self.messages)?.iter().enumerate() {
            messages.push(self.message(row, index, turn)?);
        }
        let system = self.system.as_deref().map_or(Ok(""), |column| row.optional_text(column))?;
        insert_system(&mut messages, system);
        let rejected =
            push_pair(row, &mut messages, self.pair.as_ref(), |index, turn| self.message(row, index, turn))?;
        let questions = format!("{}/{}", self.user, self.observation);
        let answers = format!("{}/{}", self.assistant, self.function);
        check_turns(row, &messages, [&questions, &answers], ToolResults::OneAtATime)?;
        let tools = self.tools.as_deref().map_or(Ok(None), |column| row.tools(column))?;
        Ok(Conversation { messages, tools, rejected, label: None })
    }
}
