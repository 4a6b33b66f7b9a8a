//! `instruction` (+ `input`) → `output`, with `history` pairs before and a `system` text.

use serde_json::Value;

use super::{Format, Mapping, Row, kind};
use crate::conversation::{Conversation, Message, Role};
use crate::error::Result;

/// The alpaca form, with its column names.
#[derive(Debug)]
pub struct Alpaca {
    prompt: String,
    query: String,
    response: String,
    history: String,
    system: Option<String>,
    tools: Option<String>,
}

impl Alpaca {
    /// With LLaMA-Factory's default columns where `mapping` names none.
    pub fn new(mapping: &Mapping) -> Alpaca {
        Alpaca {
            prompt: mapping.column("prompt", "instruction"),
            query: mapping.column("query", "input"),
            response: mapping.column("response", "output"),
            history: mapping.column("history", "history"),
            system: mapping.columns.get("system").cloned(),
            tools: mapping.columns.get("tools").cloned(),
        }
    }
}

impl Format for Alpaca {
    fn name(&self) -> &'static str {
        "alpaca"
    }

    fn conversation(&self, row: &Row) -> Result<Conversation> {
        let mut messages = Vec::new();
        let system = self.system.as_deref().map_or(Ok(""), |column| row.optional_text(column))?;
        if !system.is_empty() {
            messages.push(Message::new(Role::System, system));
        }
        if let Some(history) = row.fields.get(&self.history).filter(|history| !history.is_null()) {
            let wrong = || row.error(format!("expected pairs of texts in column `{}`", self.history));
            for pair in history.as_array().ok_or_else(wrong)? {
                let Some([Value::String(question), Value::String(answer)]) =
                    pair.as_array().map(Vec::as_slice)
                else {
                    return Err(row.error(format!(
                        "expected a pair of texts in column `{}`, found {}",
                        self.history,
                        kind(pair)
                    )));
                };
                messages.push(Message::new(Role::User, question.as_str()));
                messages.push(Message::new(Role::Assistant, answer.as_str()));
            }
        }
        let parts = [row.text(&self.prompt)?, row.optional_text(&self.query)?];
        let prompt: Vec<&str> = parts.into_iter().filter(|part| !part.is_empty()).collect();
        messages.push(Message::new(Role::User, prompt.join("\n")));
        messages.push(Message::new(Role::Assistant, row.text(&self.response)?));
        let tools = self.tools.as_deref().map_or(Ok(None), |column| row.tools(column))?;
        Ok(Conversation { messages, tools, ..Conversation::default() })
    }
}
