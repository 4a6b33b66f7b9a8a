//! A conversation to tokens, each with its mark: trained or not. Both are made together, from the same text.
//!
//! The rendered text is tokenised as a whole, as transformers does; a token is trained where any of its bytes
//! lies in a turn of the assistant ([`crate::spans`]). BOS is the template's business: what it renders is what
//! there is, and nothing is added, so it is never there twice.
//!
//! Control tokens that somebody typed inside a message stay text. To know them from the template's own after
//! rendering, a non-character is put into each before, and taken out after.

use std::ops::Range;

use rayon::prelude::*;
use serde_json::{Map, Value};

use crate::conversation::{Conversation, Role};
use crate::error::{Error, Place, Result, SampleError};
use crate::report::Report;
use crate::source::Dropped;
use crate::spans::{Spans, assistant_spans};
use crate::template::Template;
use crate::tokenizer::Tokenizer;

/// Stands in a control token that was typed, so that it comes out of the template recognisably; a non-character.
const TYPED: char = '\u{FDD2}';

/// How conversations are marked and cut.
#[derive(Clone, Debug, PartialEq)]
pub struct MarkOptions {
    /// Train on every token, prompts included.
    pub train_on_prompt: bool,
    /// Train on the last turn of the assistant only.
    pub mask_history: bool,
    /// Longest sample, in tokens; a longer one is cut at its end.
    pub cutoff_len: usize,
    /// The system turn of conversations that have none.
    pub default_system: Option<String>,
    /// Whether control tokens typed inside messages are encoded as text (true), or as control tokens.
    pub split_control_tokens: bool,
    /// Further variables of the template (`enable_thinking` …).
    pub template_variables: Map<String, Value>,
}

impl MarkOptions {
    /// Assistant turns only, typed control tokens as text, samples of up to `cutoff_len` tokens.
    pub fn new(cutoff_len: usize) -> MarkOptions {
        MarkOptions {
            train_on_prompt: false,
            mask_history: false,
            cutoff_len,
            default_system: None,
            split_control_tokens: true,
            template_variables: Map::new(),
        }
    }
}

/// A conversation as the model sees it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Sample {
    /// Token ids (N).
    pub tokens: Vec<u32>,
    /// For each token, whether the model is trained to produce it (N).
    pub trained: Vec<bool>,
    /// How many tokens were cut off.
    pub cut: usize,
}

impl Sample {
    /// Number of tokens that are trained as targets: marked ones, less the first token of the sample.
    pub fn trained_tokens(&self) -> usize {
        self.trained.iter().skip(1).filter(|trained| **trained).count()
    }
}

/// Renders, tokenises and marks one conversation.
///
/// Errors: the template's own; [`SampleError`] where there is nothing to train on (also after cutting).
pub fn encode_conversation(
    conversation: &Conversation,
    template: &Template,
    tokenizer: &Tokenizer,
    options: &MarkOptions,
) -> Result<Sample> {
    if let Some(text) = conversation.messages.iter().find(|message| message.role == Role::Text) {
        return encode_text(&text.content, tokenizer, options);
    }
    let marked = mark_conversation(conversation, template, tokenizer, options)?;
    let encoded = tokenizer.encode_segments(&marked.text, &marked.typed)?;
    let mut trained = vec![options.train_on_prompt; encoded.ids.len()];
    let mut turns = marked.trained.iter().peekable();
    for (mark, range) in trained.iter_mut().zip(&encoded.ranges) {
        while turns.peek().is_some_and(|turn| turn.end <= range.start) {
            turns.next();
        }
        *mark |= turns.peek().is_some_and(|turn| turn.start < range.end && range.start < turn.end);
    }
    cut(Sample { tokens: encoded.ids, trained, cut: 0 }, options, || {
        let has_assistant = conversation.messages.iter().any(|message| message.role == Role::Assistant);
        let why = if has_assistant {
            "the template renders none of the assistant's turns, or all are excluded"
        } else {
            "the conversation has no assistant turn"
        };
        why.to_string()
    })
}

fn encode_text(text: &str, tokenizer: &Tokenizer, options: &MarkOptions) -> Result<Sample> {
    let mut tokens = tokenizer.encode_document(text)?;
    if let Some(eos) = tokenizer.eos().filter(|eos| tokens.last() != Some(eos)) {
        tokens.push(eos);
    }
    let trained = vec![true; tokens.len()];
    cut(Sample { tokens, trained, cut: 0 }, options, || "the text is empty".to_string())
}

/// Cuts the end off a sample that is too long; an error where nothing to train on is left.
fn cut(mut sample: Sample, options: &MarkOptions, why_none: impl Fn() -> String) -> Result<Sample> {
    let trained = sample.trained_tokens();
    if trained == 0 {
        return Err(SampleError::NothingTrained(why_none()).into());
    }
    if sample.tokens.len() > options.cutoff_len {
        let first = sample.trained.iter().skip(1).position(|trained| *trained).map_or(0, |at| at + 1);
        sample.cut = sample.tokens.len() - options.cutoff_len;
        sample.tokens.truncate(options.cutoff_len);
        sample.trained.truncate(options.cutoff_len);
        if sample.trained_tokens() == 0 {
            let cutoff_len = options.cutoff_len;
            return Err(SampleError::CutAway { cutoff_len, trained, first }.into());
        }
    }
    Ok(sample)
}

/// A rendered conversation with what is trained in it and what was typed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct MarkedText {
    /// The text the model sees.
    pub text: String,
    /// Byte ranges trained on, in order, disjoint.
    pub trained: Vec<Range<usize>>,
    /// Byte ranges of control tokens that somebody typed: text, not control tokens.
    pub typed: Vec<Range<usize>>,
}

/// Renders a conversation and marks its text: what `ferrotune data` shows before tokens are made.
pub fn mark_conversation(
    conversation: &Conversation,
    template: &Template,
    tokenizer: &Tokenizer,
    options: &MarkOptions,
) -> Result<MarkedText> {
    let messages = conversation.to_json(options.default_system.as_deref());
    let inserted = messages.len() - conversation.messages.len();
    let render = |messages: &[Value], tools: Option<&Value>| {
        assistant_spans(template, messages, tools, &options.template_variables)
    };
    let control = if options.split_control_tokens { tokenizer.control_tokens() } else { Vec::new() };
    let spans = match escaped(&messages, conversation.tools.as_ref(), &control, Escape::Everything) {
        None => render(&messages, conversation.tools.as_ref())?,
        Some((whole, tools)) => {
            // A template may look for such tokens in what the model said (to strip a thought): there they are
            // the training data's own, so they stay; everybody else's are escaped in any case.
            let plain = render(&messages, conversation.tools.as_ref())?;
            let spans = render(&whole, tools.as_ref())?;
            if spans.text.replace(TYPED, "") == plain.text {
                spans
            } else {
                match escaped(&messages, conversation.tools.as_ref(), &control, Escape::NotAssistant) {
                    Some((others, tools)) => render(&others, tools.as_ref())?,
                    None => plain,
                }
            }
        }
    };
    let mut marked = without_typed(&spans, &control);
    let last = spans.turns.len().saturating_sub(1);
    let mut kept = Vec::with_capacity(marked.trained.len());
    for (index, range) in marked.trained.into_iter().enumerate() {
        let message = spans.turns[index].message.map(|at| at.checked_sub(inserted));
        let message = message.flatten().and_then(|at| conversation.messages.get(at));
        let excluded = message.is_some_and(|message| message.trained == Some(false));
        if !excluded && (!options.mask_history || index == last) {
            kept.push(range);
        }
    }
    let some_excluded = conversation.messages.iter().any(|message| message.trained == Some(false));
    if some_excluded && spans.turns.iter().any(|turn| turn.message.is_none()) {
        return Err(Error::Template {
            name: template.name().to_string(),
            message: "its generation marks do not match the turns one by one, so single turns cannot be \
                      excluded from training"
                .to_string(),
        });
    }
    marked.trained = kept;
    Ok(marked)
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Escape {
    Everything,
    NotAssistant,
}

/// Messages and tools with [`TYPED`] in every control token inside them; none where there are no such tokens.
fn escaped(
    messages: &[Value],
    tools: Option<&Value>,
    control: &[String],
    escape: Escape,
) -> Option<(Vec<Value>, Option<Value>)> {
    let mut found = false;
    let mut messages = messages.to_vec();
    for message in &mut messages {
        if escape == Escape::NotAssistant && message["role"] == "assistant" {
            continue;
        }
        for (key, value) in message.as_object_mut().into_iter().flatten() {
            if key != "role" {
                found |= escape_value(value, control);
            }
        }
    }
    let mut tools = tools.cloned();
    found |= tools.as_mut().is_some_and(|tools| escape_value(tools, control));
    found.then_some((messages, tools))
}

fn escape_value(value: &mut Value, control: &[String]) -> bool {
    match value {
        Value::String(text) => {
            let mut found = false;
            for token in control.iter().filter(|token| token.chars().count() > 1) {
                if text.contains(token.as_str()) {
                    found = true;
                    let first = token.chars().next().map_or(0, char::len_utf8);
                    *text = text
                        .replace(token.as_str(), &format!("{}{TYPED}{}", &token[..first], &token[first..]));
                }
            }
            found
        }
        Value::Array(items) => {
            items.iter_mut().fold(false, |found, item| escape_value(item, control) | found)
        }
        Value::Object(fields) => {
            fields.values_mut().fold(false, |found, item| escape_value(item, control) | found)
        }
        _ => false,
    }
}

/// Takes [`TYPED`] out again and says where it was; the ranges of the turns move with it.
fn without_typed(spans: &Spans, control: &[String]) -> MarkedText {
    let mut marked = MarkedText::default();
    let mut removed = Vec::new();
    for (at, c) in spans.text.char_indices() {
        if c == TYPED {
            removed.push(at);
        } else {
            marked.text.push(c);
        }
    }
    let moved = |at: usize| at - removed.partition_point(|removed| *removed < at) * TYPED.len_utf8();
    marked.trained = spans.turns.iter().map(|turn| moved(turn.range.start)..moved(turn.range.end)).collect();
    for at in removed.iter().map(|at| moved(*at)) {
        // The token begins one character before the place; the longest that fits is the one that was typed.
        let start = marked.text[..at].char_indices().next_back().map_or(0, |(start, _)| start);
        let fits = control.iter().filter(|token| marked.text[start..].starts_with(token.as_str()));
        let length = fits.map(String::len).max().unwrap_or(at + 1 - start);
        marked.typed.push(start..(start + length).min(marked.text.len()));
    }
    marked
}

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
    let text = template.render(&messages, None, false, &Map::new())?.text;
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

/// Encodes all conversations on all cores, in order. Those that give nothing to train on, and those the template
/// refuses, are left out and reported with their place; it is an error where none is left.
pub fn encode_all(
    conversations: &[(Place, Conversation)],
    template: &Template,
    tokenizer: &Tokenizer,
    options: &MarkOptions,
) -> Result<(Vec<Sample>, Report)> {
    if conversations
        .iter()
        .any(|(_, conversation)| conversation.messages.iter().all(|m| m.role != Role::Text))
    {
        check_template(template, tokenizer)?;
    }
    let results: Vec<Result<Sample>> = conversations
        .par_iter()
        .map(|(_, conversation)| encode_conversation(conversation, template, tokenizer, options))
        .collect();
    let mut samples = Vec::with_capacity(results.len());
    let mut dropped = Vec::new();
    for (result, (place, _)) in results.into_iter().zip(conversations) {
        match result {
            Ok(sample) => samples.push(sample),
            Err(error @ (Error::Sample(_) | Error::Template { .. })) => {
                dropped.push(Dropped { place: place.clone(), reason: error.to_string() });
            }
            Err(error) => return Err(error),
        }
    }
    if samples.is_empty() {
        let first = dropped.first().map_or_else(
            || "there are no conversations".to_string(),
            |dropped| format!("{}: {}", dropped.place, dropped.reason),
        );
        return Err(Error::Dataset(format!(
            "no conversation gives anything to train on; the first one: {first}"
        )));
    }
    let report = Report::new(&samples, dropped);
    Ok((samples, report))
}
