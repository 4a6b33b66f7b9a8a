//! Control tokens that somebody typed inside a message: known from the template's own, so that they stay text.

use std::collections::HashSet;
use std::ops::Range;

use serde_json::Value;

use crate::spans::{Spans, Turn};

/// Stands in a control token that was typed, so that it comes out of the template recognisably; a non-character.
const TYPED: char = '\u{FDD2}';

/// Whose typed control tokens are escaped.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Escape {
    Everything,
    NotAssistant,
}

/// Messages and tools with [`TYPED`] in every control token inside them; none where there are no such tokens.
pub(crate) fn escaped(
    messages: &[Value],
    tools: Option<&Value>,
    control: &[String],
    escape: Escape,
) -> Option<(Vec<Value>, Option<Value>)> {
    let firsts: HashSet<char> = control.iter().filter_map(|token| token.chars().next()).collect();
    let may_hold = |value: &Value| holds_any(value, &firsts);
    if !messages.iter().chain(tools).any(may_hold) {
        return None;
    }
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

/// Whether a text inside `value` has one of these characters: most have none, and need no closer look.
fn holds_any(value: &Value, characters: &HashSet<char>) -> bool {
    match value {
        Value::String(text) => text.contains(|c| characters.contains(&c)),
        Value::Array(items) => items.iter().any(|item| holds_any(item, characters)),
        Value::Object(fields) => fields.values().any(|item| holds_any(item, characters)),
        _ => false,
    }
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

/// Control tokens in a text, in order: where, which, and whether it was typed.
fn tokens_in<'a>(text: &str, control: &'a [String]) -> Vec<(Range<usize>, &'a str, bool)> {
    let mut all = Vec::new();
    let mut at = 0;
    while let Some(c) = text[at..].chars().next() {
        let typed = text[at + c.len_utf8()..].starts_with(TYPED);
        let fits = control.iter().filter(|token| {
            token.starts_with(c)
                && match typed {
                    true => text[at + c.len_utf8() + TYPED.len_utf8()..].starts_with(&token[c.len_utf8()..]),
                    false => text[at..].starts_with(token.as_str()),
                }
        });
        let token = fits.max_by_key(|token| token.len());
        let length =
            token.map_or(c.len_utf8(), |token| token.len() + if typed { TYPED.len_utf8() } else { 0 });
        all.extend(token.map(|token| (at..at + length, token.as_str(), typed)));
        at += length;
    }
    all
}

/// Where in `plain` the tokens are that were typed, by what came of them escaped; none where the template makes
/// something else of escaped messages.
pub(crate) fn typed_in(plain: &str, escaped: &str, control: &[String]) -> Option<Vec<Range<usize>>> {
    let (plain, escaped) = (tokens_in(plain, control), tokens_in(escaped, control));
    let same = plain.iter().map(|it| it.1).eq(escaped.iter().map(|it| it.1));
    let typed = plain.into_iter().zip(escaped).filter(|(_, (_, _, typed))| *typed);
    same.then(|| typed.map(|((range, _, _), _)| range).collect())
}

/// Takes [`TYPED`] out again and says which tokens had it; the ranges of the turns move with it.
pub(crate) fn without_typed(spans: &Spans, control: &[String]) -> (Spans, Vec<Range<usize>>) {
    let removed: Vec<usize> = spans.text.match_indices(TYPED).map(|(at, _)| at).collect();
    let moved = |at: usize| at - removed.partition_point(|removed| *removed < at) * TYPED.len_utf8();
    let moved = |range: &Range<usize>| moved(range.start)..moved(range.end);
    let typed = tokens_in(&spans.text, control).iter().filter(|it| it.2).map(|it| moved(&it.0)).collect();
    let turns = spans.turns.iter().map(|turn| Turn { range: moved(&turn.range), ..turn.clone() }).collect();
    (Spans { text: spans.text.replace(TYPED, ""), turns }, typed)
}
