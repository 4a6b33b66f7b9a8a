//! What the assistant generated, found in what any template renders.
//!
//! No markers are searched for. A template with `{% generation %}` says it itself. For any other:
//!
//! - a turn starts where the text equals the prompt that the model would have been given: the conversation up
//!   to the turn, with the generation prompt;
//! - it ends where the text equals the conversation up to and with the turn, less trailing whitespace (so the
//!   end-of-turn token is in, the line break after it is not).
//!
//! Where a template rewrites earlier turns (stripped thinking, another token at the very end), these prefixes
//! differ from the text. Then places are found by perturbing: a non-character is put before or after one
//! message's content, and the first difference of the two renders is where that content begins or ends.

use std::ops::Range;

use serde_json::{Map, Value};

use crate::error::{Error, Result, SampleError};
use crate::template::{Ending, Template};

/// Put into a content to see where it comes out; a non-character.
const PROBE: char = '\u{FDD3}';

/// One assistant turn in a rendered text, or a piece of one that the template renders as several.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Turn {
    /// Index of the message among those rendered; none where the template's marks don't tell.
    pub message: Option<usize>,
    /// Bytes of the text that the model generates in this turn, its end-of-turn token included.
    pub range: Range<usize>,
}

/// A rendered conversation with the assistant's turns in it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Spans {
    /// The rendered text.
    pub text: String,
    /// The assistant's turns, in order, disjoint.
    pub turns: Vec<Turn>,
}

impl Spans {
    /// The turns in Unicode code points of the text.
    pub fn in_code_points(&self) -> Vec<Range<usize>> {
        let count = |at: usize| self.text[..at].chars().count();
        self.turns.iter().map(|turn| count(turn.range.start)..count(turn.range.end)).collect()
    }
}

/// Renders `messages` and finds the assistant's turns.
///
/// `extra` are further variables of the template. Fails with the template's own error where the whole
/// conversation cannot be rendered, and with [`SampleError::SpanNotFound`] rather than guess.
pub fn assistant_spans(
    template: &Template,
    messages: &[Value],
    tools: Option<&Value>,
    extra: &Map<String, Value>,
) -> Result<Spans> {
    let assistants: Vec<usize> =
        (0..messages.len()).filter(|index| messages[*index]["role"] == "assistant").collect();
    let rendered = template.render(messages, tools, Ending::Complete, extra)?;
    if template.marks_generation() {
        let mut bytes: Vec<usize> = rendered.text.char_indices().map(|(at, _)| at).collect();
        bytes.push(rendered.text.len());
        // Marks that aren't one for each turn are turns of nobody in particular.
        let spans = &rendered.generation_spans;
        let one_each = spans.len() == assistants.len();
        let turns = spans.iter().enumerate().map(|(index, span)| Turn {
            message: one_each.then(|| assistants[index]),
            range: bytes[span.start]..bytes[span.end],
        });
        return Ok(Spans { turns: turns.collect(), text: rendered.text });
    }
    let search = Search { template, messages, tools, extra, full: rendered.text };
    let mut turns: Vec<Turn> = Vec::with_capacity(assistants.len());
    for index in assistants {
        let start = search.start(index)?;
        let end = search.end(index, start)?;
        let previous = turns.last().map_or(0, |turn| turn.range.end);
        if start < previous || end < start {
            return Err(search.not_found(index, "its turn overlaps the one before"));
        }
        let pieces = search.without_headers(index, start..end).into_iter();
        turns.extend(pieces.map(|range| Turn { message: Some(index), range }));
    }
    Ok(Spans { text: search.full, turns })
}

/// A conversation rendered by hand, for `ferrotune debug render`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RenderedConversation {
    /// The text.
    pub rendered: String,
    /// What is trained on, in Unicode code points of the text; none where it cannot be found.
    pub spans: Option<Vec<Range<usize>>>,
    /// Why the spans cannot be found.
    pub why_no_spans: Option<String>,
}

/// Renders messages with their trained spans; a turn that is to be continued is none. Fails with the template's own
/// error.
pub fn render_conversation(
    template: &Template,
    messages: &[Value],
    tools: Option<&Value>,
    ending: Ending,
    extra: &Map<String, Value>,
) -> Result<RenderedConversation> {
    let rendered = template.render(messages, tools, ending, extra)?;
    if template.marks_generation() && ending != Ending::ContinueFinalMessage {
        let spans = Some(rendered.generation_spans);
        return Ok(RenderedConversation { rendered: rendered.text, spans, why_no_spans: None });
    }
    let found = assistant_spans(template, messages, tools, extra).and_then(|mut spans| {
        if ending == Ending::ContinueFinalMessage {
            let whole = |turn: &Turn| match turn.message {
                Some(message) => message + 1 < messages.len(),
                None => turn.range.end <= rendered.text.len(),
            };
            spans.turns.retain(whole);
        }
        let end = spans.turns.last().map_or(0, |turn| turn.range.end);
        if rendered.text.starts_with(&spans.text[..end]) {
            return Ok(spans.in_code_points());
        }
        let message = "what follows the last turn changes how those before it are rendered".to_string();
        Err(Error::Template { name: template.name().to_string(), message })
    });
    let rendered = rendered.text;
    Ok(match found {
        Ok(spans) => RenderedConversation { rendered, spans: Some(spans), why_no_spans: None },
        Err(error) => RenderedConversation { rendered, spans: None, why_no_spans: Some(error.to_string()) },
    })
}

struct Search<'a> {
    template: &'a Template,
    messages: &'a [Value],
    tools: Option<&'a Value>,
    extra: &'a Map<String, Value>,
    full: String,
}

impl Search<'_> {
    fn not_found(&self, turn: usize, why: &str) -> Error {
        let template = self.template.name().to_string();
        SampleError::SpanNotFound { template, turn, why: why.to_string() }.into()
    }

    /// The conversation up to message `count`; none where the template refuses so short a one.
    fn part(&self, count: usize, ending: Ending) -> Option<String> {
        let messages = self.messages.get(..count)?;
        self.template.render(messages, self.tools, ending, self.extra).ok().map(|r| r.text)
    }

    /// Where the content of message `index` begins (or ends) in the first `count` messages' text.
    fn content_edge(
        &self,
        text: &str,
        count: usize,
        index: usize,
        after: bool,
        ending: Ending,
    ) -> Option<usize> {
        let mut messages = self.messages.get(..count)?.to_vec();
        let content = messages.get(index)?.get("content")?.as_str()?.to_string();
        let mut shown = |place: usize| {
            let (before, rest) = content.split_at(place);
            messages[index]["content"] = Value::from(format!("{before}{PROBE}{rest}"));
            let probed = self.template.render(&messages, self.tools, ending, self.extra).ok()?.text;
            // A probe that was dropped, or came out changed (as an escape), shows nothing. Around it the template may
            // have kept whitespace that it trims without it.
            let at = common_prefix(text, &probed);
            probed[at..].trim_start().starts_with(PROBE).then_some(at)
        };
        if after {
            return shown(content.len());
        }
        shown(0).or_else(|| {
            // Its beginning may be left out (a thought): then what is left begins at the first place that shows.
            let places: Vec<usize> =
                content.char_indices().map(|(at, _)| at).chain([content.len()]).collect();
            let mut at = shown(content.len())?;
            let (mut hidden, mut seen) = (0, places.len() - 1);
            while hidden + 1 < seen {
                let middle = usize::midpoint(hidden, seen);
                match shown(places[middle]) {
                    Some(place) => (seen, at) = (middle, place),
                    None => hidden = middle,
                }
            }
            Some(at)
        })
    }

    fn start(&self, index: usize) -> Result<usize> {
        let full = &self.full;
        let content = || self.content_edge(full, self.messages.len(), index, false, Ending::Complete);
        let Some(prompt) =
            self.part(index, Ending::GenerationPrompt).filter(|prompt| index > 0 && !prompt.is_empty())
        else {
            return content()
                .ok_or_else(|| self.not_found(index, "the template does not render what comes before it"));
        };
        let plain = || {
            let message = &self.messages[index];
            let has = |key: &&str| message.get(*key).is_some_and(|value| !value.is_null());
            !["tool_calls", "reasoning_content", "thinking", "reasoning"].iter().any(has)
        };
        // A template that ignores add_generation_prompt leaves the header out of the prompt.
        let ignored = self.part(index, Ending::Complete).as_deref() == Some(prompt.as_str());
        if full.starts_with(&prompt) {
            if ignored {
                let header = content().filter(|at| *at > prompt.len());
                let header = header.filter(|at| !full[prompt.len()..*at].trim().is_empty());
                return Ok(header.filter(|_| plain()).unwrap_or(prompt.len()));
            }
            return Ok(prompt.len());
        }
        // It says nothing at all, then, where it also writes something at the very end.
        if let Some(at) = content().filter(|_| ignored && plain()) {
            return Ok(at);
        }
        // The prompt differs somewhere before: compare from the end of the message before, in both.
        let before = index - 1;
        let in_full = self.content_edge(full, self.messages.len(), before, true, Ending::Complete);
        let in_prompt = self.content_edge(&prompt, index, before, true, Ending::GenerationPrompt);
        let (from, header) = match (in_full, in_prompt) {
            (Some(from), Some(at)) => (from, &prompt[at..]),
            _ => {
                return content().ok_or_else(|| {
                    self.not_found(index, "neither the message before it nor its content can be followed")
                });
            }
        };
        let same = common_prefix(&full[from..], header);
        if same == header.len() {
            return Ok(from + same);
        }
        // The generation prompt goes on differently (an opened thought): what both have is the header.
        let shared = whole_tags(&full[from..from + same]);
        let Some(at) = content() else {
            return Err(self.not_found(index, "its header is not the generation prompt's"));
        };
        // The end of the turn before may stand in between; then the header ends at the content.
        let rest = &header[shared..];
        let between = full.get(from + shared..at).and_then(|between| between.strip_suffix(rest));
        if !rest.trim().is_empty() && between.is_some_and(only_tags) {
            return Ok(at);
        }
        Ok(at.min(from + shared).max(from))
    }

    fn end(&self, index: usize, start: usize) -> Result<usize> {
        let full = &self.full;
        let last = index + 1 == self.messages.len();
        let upto = if last { Some(full.clone()) } else { self.part(index + 1, Ending::Complete) };
        let trimmed = |end: usize| start + full[start..end].trim_end().len();
        let upto = upto.ok_or_else(|| {
            self.not_found(index, "the template does not render a conversation that ends with it")
        })?;
        if full.starts_with(&upto) && upto.len() >= start {
            let end = trimmed(upto.len());
            let ended = full[start..end].ends_with(['>', ']', '[']);
            return Ok(if ended || last { end } else { self.end_in_next_header(index, end).unwrap_or(end) });
        }
        // The turn is rendered differently when it is the last: compare from the end of its content, in both.
        let in_full = self.content_edge(full, self.messages.len(), index, true, Ending::Complete);
        let in_part = self.content_edge(&upto, index + 1, index, true, Ending::Complete);
        let edges = in_full.zip(in_part).filter(|(from, _)| *from >= start);
        // A turn of tool calls may not show its content; then its beginning is what both have.
        let edges = edges.or_else(|| Some((start, self.start_in(&upto, index, start)?)));
        let Some((from, at)) = edges else {
            return Err(self.not_found(index, "its content cannot be followed to its end"));
        };
        let tail = &upto[at..];
        let same = common_prefix(&full[from..], tail);
        if same == tail.len() {
            return Ok(trimmed(from + same).max(from));
        }
        // What follows differs. It may be the whitespace before the same token …
        let (rest, tail) = (&full[from + same..], &tail[same..]);
        let space = rest.len() - rest.trim_start().len();
        if let Some(tag) = first_tag(&rest[space..]).filter(|tag| tail.trim_start().starts_with(tag)) {
            return Ok(from + same + space + tag.len());
        }
        // … or the end-of-turn token is in what is the same …
        let common = &full[from..from + whole_tags(&full[from..from + same])];
        if common.trim_end().ends_with('>') {
            return Ok(trimmed(from + common.len()));
        }
        // … or another token ends a turn in the middle of a conversation: that token is the end.
        match token_at(full, from, from + same) {
            Some(end) => Ok(end),
            None if !common.trim().is_empty() => Ok(trimmed(from + common.len())),
            None => Err(self.not_found(index, "its end is not the one it has as the last turn")),
        }
    }
}

impl Search<'_> {
    /// Where turn `index`, which begins at `start` of the full text, begins in the text of a shorter conversation.
    fn start_in(&self, text: &str, index: usize, start: usize) -> Option<usize> {
        let before = index.checked_sub(1)?;
        let in_full = self.content_edge(&self.full, self.messages.len(), before, true, Ending::Complete)?;
        let in_text = self.content_edge(text, index + 1, before, true, Ending::Complete)?;
        let header = self.full.get(in_full..start)?;
        text[in_text..].starts_with(header).then_some(in_text + header.len())
    }

    /// The pieces of a turn whose header is written again within it, as where calls and content are turns of their own.
    fn without_headers(&self, index: usize, range: Range<usize>) -> Vec<Range<usize>> {
        let message = &self.messages[index];
        let header = Some(message)
            .filter(|message| message.get("tool_calls").is_some_and(|calls| !calls.is_null()))
            .and_then(|_| self.part(index, Ending::GenerationPrompt).zip(self.part(index, Ending::Complete)))
            .and_then(|(prompt, before)| {
                // The prompt may go on where the text doesn't (an opened thought).
                let header = &prompt[common_prefix(&prompt, &before)..];
                let mut ends = header.char_indices().map(|(at, c)| at + c.len_utf8());
                let end = ends.rfind(|end| self.full[..range.start].ends_with(&header[..*end]))?;
                Some(header[..end].trim().to_string())
            })
            .filter(|header| first_tag(header).is_some());
        // What the message itself says is no header.
        let Some(header) = header.filter(|header| !message.to_string().contains(header.as_str())) else {
            return vec![range];
        };
        let mut pieces = Vec::new();
        let mut start = range.start;
        for (at, _) in self.full[range.clone()].match_indices(&header) {
            pieces.push(start..range.start + at);
            start = range.start + at + header.len();
        }
        pieces.push(start..range.end);
        let trimmed = |piece: Range<usize>| {
            let text = &self.full[piece.clone()];
            let skipped = if piece.start == range.start { 0 } else { text.len() - text.trim_start().len() };
            piece.start + skipped..piece.start + text.trim_end().len().max(skipped)
        };
        pieces.into_iter().map(trimmed).filter(|piece| !piece.is_empty()).collect()
    }

    /// The end of turn `index` where the template writes the end-of-turn token only before the next message:
    /// what stands between, less the header that a person's first message has as well.
    fn end_in_next_header(&self, index: usize, end: usize) -> Option<usize> {
        let full = &self.full;
        let user = |index: &usize| self.messages.get(*index).is_some_and(|next| next["role"] == "user");
        let next = Some(index + 1).filter(user)?;
        let first = (0..index)
            .find(user)
            .filter(|first| *first == 0 || self.messages[first - 1]["role"] == "system")?;
        let count = self.messages.len();
        let between = full.get(end..self.content_edge(full, count, next, false, Ending::Complete)?)?;
        let before_first = &full[..self.content_edge(full, count, first, false, Ending::Complete)?];
        let same = before_first.bytes().rev().zip(between.bytes().rev()).take_while(|(a, b)| a == b).count();
        // The header begins at a tag.
        let header = between.match_indices('<').map(|(at, _)| at).find(|at| *at >= between.len() - same)?;
        let token = between[..header].trim_end();
        token.ends_with('>').then_some(end + token.len())
    }
}

/// The tag `text` begins with.
fn first_tag(text: &str) -> Option<&str> {
    let tag = &text[..text.find('>')? + 1];
    (tag.starts_with('<') && tag.len() <= 64 && !tag.contains(char::is_whitespace)).then_some(tag)
}

/// Whether `text` is nothing but tags and whitespace.
fn only_tags(text: &str) -> bool {
    let mut rest = text.trim_start();
    while let Some(tag) = first_tag(rest) {
        rest = rest[tag.len()..].trim_start();
    }
    rest.is_empty()
}

/// The length of `text` without a tag that is opened at its end and not closed.
fn whole_tags(text: &str) -> usize {
    match text.rfind('<') {
        Some(open) if !text[open..].contains(['>', '\n', ' ']) => open,
        _ => text.len(),
    }
}

/// Bytes that both begin with, whole characters only.
fn common_prefix(a: &str, b: &str) -> usize {
    let mut same = a.bytes().zip(b.bytes()).take_while(|(a, b)| a == b).count();
    while !a.is_char_boundary(same) {
        same -= 1;
    }
    same
}

/// The end of a token like `<|end|>` or `</s>` that begins in `from..=at` and goes on after `at`.
fn token_at(text: &str, from: usize, at: usize) -> Option<usize> {
    let open = text[from..].char_indices().map(|(offset, c)| (from + offset, c));
    let open = open.take_while(|(offset, _)| *offset <= at).filter(|(_, c)| *c == '<').last()?.0;
    let close = text[open..].find('>')? + open + 1;
    let token = &text[open..close];
    (close > at && token.len() <= 64 && !token.contains(char::is_whitespace)).then_some(close)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::test_support::CHATML;
    use serde_json::json;
    use std::collections::BTreeMap;

    /// The trained parts of a conversation, or why there are none.
    fn check(source: &str, turns: &[(&str, &str)], expected: Result<&[&str], &str>) {
        let template = Template::new("t", source, &BTreeMap::new()).unwrap();
        let messages: Vec<Value> =
            turns.iter().map(|(role, content)| json!({"role": role, "content": content})).collect();
        let rendered =
            render_conversation(&template, &messages, None, Ending::Complete, &Map::new()).unwrap();
        let characters: Vec<char> = rendered.rendered.chars().collect();
        let spans = rendered.spans.map(|spans| {
            spans.into_iter().map(|span| characters[span].iter().collect::<String>()).collect::<Vec<_>>()
        });
        match expected {
            Ok(expected) => assert_eq!(spans.unwrap(), expected),
            Err(why) => assert_eq!(rendered.why_no_spans.unwrap(), why),
        }
    }

    const CHAT: &[(&str, &str)] =
        &[("user", "é <|im_end|>"), ("assistant", "ö"), ("user", "ö<|im_end|>"), ("assistant", "user")];

    #[test]
    fn with_and_without_a_generation_prompt() {
        check(CHATML, CHAT, Ok(&["ö<|im_end|>", "user<|im_end|>"]));
        // The header stays out where add_generation_prompt is not looked at.
        let ignores = CHATML.split("{% if add").next().unwrap();
        check(ignores, CHAT, Ok(&["ö<|im_end|>", "user<|im_end|>"]));
        let no_header = "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]\
                         {% else %} {{ m.content }}</s>{% endif %}{% endfor %}";
        check(no_header, CHAT, Ok(&[" ö</s>", " user</s>"]));
    }

    #[test]
    fn a_header_within_a_turn_is_not_trained() {
        let twice = "{% for m in messages %}{% if m.role == 'user' %}<user>{{ m.content }}{% else %}\
                     {% if m.tool_calls %}<assistant>call<end>{% endif %}<assistant>{{ m.content }}<end>{% endif %}\
                     {% endfor %}{% if add_generation_prompt %}<assistant><think>{% endif %}";
        let template = Template::new("t", twice, &BTreeMap::new()).unwrap();
        let calls = json!([{"function": {"name": "f"}}]);
        let check = |content: &str, expected: &[&str]| {
            let messages = [
                json!({"role": "user", "content": "q"}),
                json!({"role": "assistant", "content": content, "tool_calls": calls}),
                json!({"role": "assistant", "content": "a"}),
            ];
            let spans = assistant_spans(&template, &messages, None, &Map::new()).unwrap();
            let turns: Vec<&str> = spans.turns.iter().map(|turn| &spans.text[turn.range.clone()]).collect();
            assert_eq!(turns, expected);
        };
        check("", &["call<end>", "<end>", "a<end>"]);
        check("c", &["call<end>", "c<end>", "a<end>"]);
        // What was typed is text.
        check("<assistant>", &["call<end><assistant><assistant><end>", "a<end>"]);
    }

    #[test]
    fn the_end_may_be_written_before_the_next_turn() {
        let late = "{% for m in messages %}{% if not loop.first %}{% if m.role == 'user' %}<end>{% endif %}{% endif %}\
                    <{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}";
        check(late, CHAT, Ok(&["ö<end>", "user"]));
    }

    #[test]
    fn a_conversation_may_begin_with_the_assistant() {
        check(
            CHATML,
            &[("assistant", "a"), ("user", "b"), ("assistant", "c")],
            Ok(&["a<|im_end|>", "c<|im_end|>"]),
        );
    }

    #[test]
    fn what_cannot_be_found_is_named() {
        let only_whole =
            "{% if messages | length != 2 %}{{ raise_exception('two') }}{% endif %}{{ messages | length }}";
        let why = "cannot find the assistant's turn 1 in what chat template `t` renders: the template does not render \
                   what comes before it";
        check(only_whole, &CHAT[..2], Err(why));
    }
}
