//! Whether a template and a tokenizer belong together.

use serde_json::{Map, Value};

use crate::error::{Error, Result};
use crate::template::{Ending, Template};
use crate::tokenizer::Tokenizer;

/// Checks that `tokenizer` has the control tokens `template` writes; the error names those that are missing.
///
/// Looked at are tokens of the shape `<|name|>` (also `<｜name｜>`, `<start_of_turn>`, `<end_of_turn>`) in what
/// the template renders of a short conversation, and `bos_token` and `eos_token` where it uses them.
pub fn check_template(template: &Template, tokenizer: &Tokenizer) -> Result<()> {
    let wrong = |message: String| Error::Template { name: template.name().to_string(), message };
    for key in ["bos_token", "eos_token"] {
        let used = template.source().to_string().contains(key);
        if used && !template.special_tokens().contains_key(key) {
            return Err(wrong(format!(
                "it uses `{key}`, which tokenizer `{}` does not name",
                tokenizer.name()
            )));
        }
    }
    let turns = [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")];
    let messages: Vec<Value> =
        turns.iter().map(|(role, content)| serde_json::json!({"role": role, "content": content})).collect();
    // A template that wants something else in a conversation is not judged by this one.
    let Ok(rendered) = template.render(&messages, None, Ending::Complete, &Map::new()) else { return Ok(()) };
    let text = rendered.text;
    let mut missing: Vec<&str> = token_shapes(&text).filter(|token| !tokenizer.is_added(token)).collect();
    missing.sort_unstable();
    missing.dedup();
    if missing.is_empty() {
        return Ok(());
    }
    Err(wrong(format!(
        "it writes {}, which tokenizer `{}` does not have as single tokens; use the template that belongs to \
         this model",
        missing.iter().map(|token| format!("`{token}`")).collect::<Vec<_>>().join(", "),
        tokenizer.name()
    )))
}

fn token_shapes(text: &str) -> impl Iterator<Item = &str> {
    text.match_indices('<').filter_map(|(at, _)| {
        let token = &text[at..at + text[at..].find('>')? + 1];
        let inner = &token[1..token.len() - 1];
        let barred =
            |bar: char| inner.len() > 2 * bar.len_utf8() && inner.starts_with(bar) && inner.ends_with(bar);
        let named = matches!(inner, "start_of_turn" | "end_of_turn");
        let whole = !inner.contains(char::is_whitespace) && !inner.contains('<');
        (whole && (named || barred('|') || barred('｜'))).then_some(token)
    })
}
