//! Preference data whose chosen and rejected answers are whole conversations, and KTO's labels on any format.
//!
//! (Pairs of single answers are a matter of the format that their question has: `Alpaca::pairs` and others.)

use serde_json::Value;

use super::turns::insert_system;
use super::{Format, Mapping, Messages, Row, kind};
use crate::conversation::Conversation;
use crate::counts::Purpose;
use crate::error::Result;

/// Lists of messages, which differ in the last one: TRL's form, with the question in a column of its own or in
/// both lists.
#[derive(Debug)]
pub struct PreferenceLists {
    messages: Messages,
    prompt: Option<String>,
    chosen: String,
    rejected: String,
    system: Option<String>,
    tools: String,
}

impl PreferenceLists {
    /// With the columns `chosen` and `rejected` where `mapping` names none; `messages` is the question's.
    pub fn new(mapping: &Mapping) -> PreferenceLists {
        PreferenceLists {
            messages: Messages::new(mapping),
            prompt: mapping.columns.get("messages").cloned(),
            chosen: mapping.column("chosen", "chosen"),
            rejected: mapping.column("rejected", "rejected"),
            system: mapping.columns.get("system").cloned(),
            tools: mapping.column("tools", "tools"),
        }
    }
}

impl Format for PreferenceLists {
    fn name(&self) -> &'static str {
        "openai"
    }

    fn purpose(&self) -> Purpose {
        Purpose::Preference
    }

    fn conversation(&self, row: &Row) -> Result<Conversation> {
        let question = self.prompt.as_ref().map_or(Ok(Vec::new()), |it| self.messages.turns(row, it))?;
        let [chosen, rejected] = [&self.chosen, &self.rejected].map(|column| -> Result<_> {
            let mut messages = question.clone();
            messages.extend(self.messages.turns(row, column)?);
            let system = self.system.as_deref().map_or(Ok(""), |column| row.optional_text(column))?;
            insert_system(&mut messages, system);
            self.messages.check(row, &messages)?;
            Ok(messages)
        });
        let (mut messages, mut others) = (chosen?, rejected?);
        let (answer, rejected) = (messages.pop(), others.pop());
        if messages != others {
            return Err(row.error(format!(
                "`{}` and `{}` differ before their last message",
                self.chosen, self.rejected
            )));
        }
        messages.extend(answer);
        Ok(Conversation { messages, tools: row.tools(&self.tools)?, rejected, label: None })
    }
}

/// KTO: conversations of any format, each labelled good or bad.
#[derive(Debug)]
pub struct Labelled {
    inner: Box<dyn Format>,
    column: String,
}

impl Labelled {
    /// `inner` with a label in `column`.
    pub fn new(inner: Box<dyn Format>, column: String) -> Labelled {
        Labelled { inner, column }
    }
}

impl Format for Labelled {
    fn name(&self) -> &'static str {
        self.inner.name()
    }

    fn purpose(&self) -> Purpose {
        Purpose::Labelled
    }

    fn conversation(&self, row: &Row) -> Result<Conversation> {
        let label = match row.value(&self.column)? {
            Value::Bool(label) => *label,
            // CSV has no booleans.
            Value::String(text) if text.eq_ignore_ascii_case("true") => true,
            Value::String(text) if text.eq_ignore_ascii_case("false") => false,
            other => {
                return Err(row.error(format!(
                    "expected true or false in column `{}`, found {}",
                    self.column,
                    kind(other)
                )));
            }
        };
        Ok(Conversation { label: Some(label), ..self.inner.conversation(row)? })
    }
}
