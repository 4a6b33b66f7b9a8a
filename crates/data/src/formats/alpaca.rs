//! `instruction` (+ `input`) → `output`, with `history` pairs before and a `system` text.

use std::borrow::Cow;

use serde_json::Value;

use super::{Format, Mapping, Row, kind};
use crate::conversation::{Conversation, Message, Role};
use crate::counts::Purpose;
use crate::error::Result;

/// The alpaca form, with its column names.
#[derive(Debug)]
pub struct Alpaca {
    prompt: Option<String>,
    query: Option<String>,
    response: String,
    rejected: Option<String>,
    history: Option<String>,
    system: Option<String>,
    tools: Option<String>,
}

impl Alpaca {
    /// With LLaMA-Factory's default columns where `mapping` names none at all.
    pub fn new(mapping: &Mapping) -> Alpaca {
        Alpaca {
            prompt: mapping.optional("prompt", "instruction"),
            query: mapping.optional("query", "input"),
            response: mapping.column("response", "output"),
            rejected: None,
            history: mapping.columns.get("history").cloned(),
            system: mapping.columns.get("system").cloned(),
            tools: mapping.columns.get("tools").cloned(),
        }
    }

    /// The same with a chosen and a rejected answer.
    pub fn pairs(mapping: &Mapping) -> Alpaca {
        Alpaca {
            response: mapping.column("chosen", "chosen"),
            rejected: Some(mapping.column("rejected", "rejected")),
            ..Alpaca::new(mapping)
        }
    }

    /// Instruction and input, as LLaMA-Factory joins them.
    fn question(&self, row: &Row) -> Result<String> {
        let mut parts = Vec::new();
        if let Some(column) = &self.prompt {
            parts.push(row.text(column)?);
        }
        if let Some(column) = &self.query {
            parts.push(row.optional_text(column)?);
        }
        parts.retain(|part| !part.is_empty());
        Ok(parts.join("\n"))
    }
}

impl Format for Alpaca {
    fn name(&self) -> &'static str {
        "alpaca"
    }

    fn purpose(&self) -> Purpose {
        if self.rejected.is_some() { Purpose::Preference } else { Purpose::Supervised }
    }

    fn conversation(&self, row: &Row) -> Result<Conversation> {
        let mut messages = Vec::new();
        let system = self.system.as_deref().map_or(Ok(""), |column| row.optional_text(column))?;
        if !system.is_empty() {
            messages.push(Message::new(Role::System, system));
        }
        let history = self.history.as_ref().filter(|it| row.has(it));
        for pair in history.map_or(Ok(Cow::default()), |column| row.list(column))?.iter() {
            let pair = match pair.as_array().map(Vec::as_slice) {
                Some([Value::String(question), Value::String(answer)]) => [question, answer],
                _ => {
                    let column = history.map_or("", String::as_str);
                    let found = kind(pair);
                    return Err(
                        row.error(format!("expected a pair of texts in column `{column}`, found {found}"))
                    );
                }
            };
            messages.push(Message::new(Role::User, pair[0].as_str()));
            messages.push(Message::new(Role::Assistant, pair[1].as_str()));
        }
        messages.push(Message::new(Role::User, self.question(row)?));
        messages.push(Message::new(Role::Assistant, row.answer(&self.response)?));
        let rejected = self.rejected.as_deref().map(|column| row.answer(column)).transpose()?;
        let rejected = rejected.map(|text| Message::new(Role::Assistant, text));
        let tools = self.tools.as_deref().map_or(Ok(None), |column| row.tools(column))?;
        Ok(Conversation { messages, tools, rejected, label: None })
    }
}
