//! A text without roles, trained as a whole (pretraining).

use super::{Format, Row};
use crate::conversation::{Conversation, Message, Role};
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

    fn conversation(&self, row: &Row) -> Result<Conversation> {
        let text = row.text(&self.column)?;
        Ok(Conversation { messages: vec![Message::new(Role::Text, text)], ..Conversation::default() })
    }
}
