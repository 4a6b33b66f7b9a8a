//! Conversation so far → tokens that the model answers.

use crate::conversation::Conversation;
use crate::error::Result;
use crate::marked::{Escape, MarkOptions, escaped, without_typed};
use crate::spans::Spans;
use crate::template::Template;
use crate::tokenizer::Tokenizer;

/// Renders a conversation up to where the assistant speaks next, and tokenises it as training does:
/// control tokens that somebody typed are text, unless `options` say otherwise.
///
/// Errors: the template's own, and the tokenizer's.
pub fn encode_prompt(
    conversation: &Conversation,
    template: &Template,
    tokenizer: &Tokenizer,
    options: &MarkOptions,
) -> Result<Vec<u32>> {
    let messages = conversation.to_json(options.default_system.as_deref());
    let control = if options.split_control_tokens { tokenizer.control_tokens() } else { &[] };
    let tools = conversation.tools.as_ref();
    let (messages, tools) =
        escaped(&messages, tools, control, Escape::Everything).unwrap_or((messages, tools.cloned()));
    let text = template.render(&messages, tools.as_ref(), true, &options.template_variables)?.text;
    let marked = without_typed(&Spans { text, turns: Vec::new() }, control);
    Ok(tokenizer.encode_segments(&marked.text, &marked.typed)?.ids)
}
