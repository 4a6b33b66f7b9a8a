//! Conversation so far → tokens that the model answers.

use crate::conversation::Conversation;
use crate::error::Result;
use crate::marked::MarkOptions;
use crate::spans::Spans;
use crate::template::{Ending, Template};
use crate::tokenizer::Tokenizer;
use crate::typed::{Escape, escaped, typed_in, without_typed};

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
    let render = |messages: &[_], tools| {
        template.render(messages, tools, Ending::GenerationPrompt, &options.template_variables)
    };
    let (text, typed) = match escaped(&messages, tools, control, Escape::Everything) {
        None => (render(&messages, tools)?.text, Vec::new()),
        Some((whole, whole_tools)) => {
            let plain = render(&messages, tools)?.text;
            let escaped = render(&whole, whole_tools.as_ref())?.text;
            match typed_in(&plain, &escaped, control) {
                Some(typed) => (plain, typed),
                None => {
                    let (spans, typed) = without_typed(&Spans { text: escaped, turns: Vec::new() }, control);
                    (spans.text, typed)
                }
            }
        }
    };
    Ok(tokenizer.encode_segments(&text, &typed)?.ids)
}
