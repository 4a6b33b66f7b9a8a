//! A text without roles, trained as a whole (pretraining).

use super::{Format, Row};
use crate::conversation::{Conversation, Message, Role};
use crate::counts::Purpose;
use crate::error::Result;

/// Plain texts, with their column's name.
#[derive(Debug)]
pub struct Text {
    column: String,
}

impl Text {
    /// Texts in `column`.
    pub fn new(column: String) -> Text {
        Text { column }
    }
}

impl Format for Text {
    fn name(&self) -> &'static str {
        "text"
    }

    fn purpose(&self) -> Purpose {
        Purpose::Text
    }

    fn conversation(&self, row: &Row) -> Result<Conversation> {
        let text = row.text(&self.column)?;
        if text.is_empty() {
            return Err(row.error("the text is empty: there is nothing to train on"));
        }
        Ok(Conversation { messages: vec![Message::new(Role::Text, text)], ..Conversation::default() })
    }
}
