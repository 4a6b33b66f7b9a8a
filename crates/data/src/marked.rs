//! A conversation to tokens, each with its mark: trained or not. Both are made together, from the same text.
//!
//! The rendered text is tokenised as a whole, as transformers does; a token is trained where any of its bytes
//! lies in a turn of the assistant ([`crate::spans`]). BOS is the template's business: what it renders is what
//! there is, and nothing is added, so it is never there twice.
//!
//! Control tokens that somebody typed inside a message stay text ([`crate::typed`]).

use std::ops::Range;

use rayon::prelude::*;
use serde_json::{Map, Value};

use crate::check::check_template;
use crate::conversation::{Conversation, Role};
use crate::cut::{Keep, Pair, cut};
use crate::error::{Error, Place, Result};
use crate::report::Report;
use crate::source::Dropped;
use crate::spans::{Turn, assistant_spans};
use crate::template::Template;
use crate::tokenizer::{Encoded, Tokenizer};
use crate::typed::{Escape, escaped, typed_in, without_typed};

/// How conversations are marked and cut.
#[derive(Clone, Debug, PartialEq)]
pub struct MarkOptions {
    /// Train on every token, prompts included.
    pub train_on_prompt: bool,
    /// Train on the last turn of the assistant only.
    pub mask_history: bool,
    /// Longest sample, in tokens; a longer one is cut, prompts and answers in proportion ([`crate::cut`]).
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
/// Errors: the template's own; [`SampleError`](crate::SampleError) where there is nothing to train on (also after cutting).
pub fn encode_conversation(
    conversation: &Conversation,
    template: &Template,
    tokenizer: &Tokenizer,
    options: &MarkOptions,
) -> Result<Sample> {
    Ok(encode_with_text(conversation, template, tokenizer, options)?.sample)
}

/// A sample with what it was made of.
pub(crate) struct WithText {
    pub(crate) sample: Sample,
    pub(crate) text: String,
    /// All tokens, those that are cut off included.
    pub(crate) encoded: Encoded,
    /// For each of these, whether it is trained.
    pub(crate) trained: Vec<bool>,
    /// Which of these were kept.
    pub(crate) kept: Vec<Range<usize>>,
}

pub(crate) fn encode_with_text(
    conversation: &Conversation,
    template: &Template,
    tokenizer: &Tokenizer,
    options: &MarkOptions,
) -> Result<WithText> {
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
    let pairs = pairs(&marked, &encoded);
    let keep = if options.mask_history { Keep::Last } else { Keep::First };
    let (sample, kept) = cut(&encoded.ids, &trained, &pairs, options.cutoff_len, keep, || {
        let has_assistant = conversation.messages.iter().any(|message| message.role == Role::Assistant);
        let why = if has_assistant {
            "the template renders none of the assistant's turns, or all are excluded"
        } else {
            "the conversation has no assistant turn"
        };
        why.to_string()
    })?;
    Ok(WithText { sample, text: marked.text, encoded, trained, kept })
}

/// What is read and what is answered, in tokens; the whitespace behind an answer belongs to it.
fn pairs(marked: &MarkedText, encoded: &Encoded) -> Vec<Pair> {
    let mut pairs: Vec<Pair> = Vec::with_capacity(marked.turns.len());
    for turn in &marked.turns {
        let rest = &marked.text[turn.end..];
        let end = turn.end + rest.len() - rest.trim_start().len();
        let from = pairs.last().map_or(0, |pair| pair.2);
        let ranges = &encoded.ranges[from..];
        let target = from + ranges.partition_point(|range| range.end <= turn.start);
        let after = from + ranges.partition_point(|range| range.start < end);
        match pairs.last_mut() {
            // Marks that touch, or a turn marked in pieces, are one answer.
            Some(last) if last.2 == target => last.2 = after.max(target),
            _ => pairs.push((from, target, after.max(target))),
        }
    }
    pairs
}

fn encode_text(text: &str, tokenizer: &Tokenizer, options: &MarkOptions) -> Result<WithText> {
    let encoded = tokenizer.encode_document(text)?;
    let trained = vec![true; encoded.ids.len()];
    let (sample, kept) = cut(&encoded.ids, &trained, &[], options.cutoff_len, Keep::First, || {
        "the text is empty".to_string()
    })?;
    Ok(WithText { sample, text: text.to_string(), encoded, trained, kept })
}

/// A rendered conversation with what is trained in it and what was typed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct MarkedText {
    /// The text the model sees.
    pub text: String,
    /// Byte ranges trained on, in order, disjoint.
    pub trained: Vec<Range<usize>>,
    /// Byte ranges of all turns of the assistant, those that aren't trained on included.
    pub turns: Vec<Range<usize>>,
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
    let control = if options.split_control_tokens { tokenizer.control_tokens() } else { &[] };
    let plain = render(&messages, conversation.tools.as_ref())?;
    let mut found = None;
    // A template may look for such tokens in what the model said (to strip a thought): there they are the training
    // data's own, so they stay; everybody else's are escaped in any case.
    for escape in [Escape::Everything, Escape::NotAssistant] {
        let Some((messages, tools)) = escaped(&messages, conversation.tools.as_ref(), control, escape) else {
            break;
        };
        let spans = render(&messages, tools.as_ref())?;
        match typed_in(&plain.text, &spans.text, control) {
            Some(typed) => {
                found = Some((plain.clone(), typed));
                break;
            }
            // Where the template makes something else of escaped messages, safety goes before equality.
            None => found = Some(without_typed(&spans, control)),
        }
    }
    let (spans, typed) = found.unwrap_or((plain, Vec::new()));
    if !calls_are_rendered(conversation, &spans.text) {
        let message =
            "it does not render the conversation's tool calls; use a template that does".to_string();
        return Err(Error::Template { name: template.name().to_string(), message });
    }
    // The last turn, with its other pieces: marks that touch, or those of the same message.
    let mut last = spans.turns.len().saturating_sub(1);
    let one =
        |a: &Turn, b: &Turn| a.range.end == b.range.start || a.message.is_some() && a.message == b.message;
    while last > 0 && one(&spans.turns[last - 1], &spans.turns[last]) {
        last -= 1;
    }
    let turns: Vec<Range<usize>> = spans.turns.iter().map(|turn| turn.range.clone()).collect();
    let mut trained = Vec::with_capacity(turns.len());
    for (index, range) in turns.iter().enumerate() {
        let message = spans.turns[index].message.map(|at| at.checked_sub(inserted));
        let message = message.flatten().and_then(|at| conversation.messages.get(at));
        let excluded = message.is_some_and(|message| message.trained == Some(false));
        if !excluded && !range.is_empty() && (!options.mask_history || index >= last) {
            trained.push(range.clone());
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
    Ok(MarkedText { text: spans.text, trained, turns, typed })
}

/// Whether the names of all tools that are called are in what the template made of the conversation.
fn calls_are_rendered(conversation: &Conversation, text: &str) -> bool {
    let calls = conversation.messages.iter().filter_map(|message| message.tool_calls.as_ref()?.as_array());
    let mut names =
        calls.flatten().filter_map(|call| call.get("function").unwrap_or(call).get("name")?.as_str());
    names.all(|name| text.contains(name))
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::conversation::Message;
    use crate::test_support::{CHATML, tokenizer};
    use std::collections::BTreeMap;

    fn conversation(turns: &[(Role, &str)]) -> Conversation {
        let messages = turns.iter().map(|(role, content)| Message::new(*role, *content)).collect();
        Conversation { messages, ..Conversation::default() }
    }

    /// Encodes with `template`; the text with trained parts in `[…]`, one mark for each token, or the error.
    fn check_with(source: &str, conversation: &Conversation, options: &MarkOptions, expected: &str) {
        let tokenizer = tokenizer();
        let template = Template::new("t", source, tokenizer.special_tokens()).unwrap();
        let shown = match encode_conversation(conversation, &template, &tokenizer, options) {
            Err(error) => error.to_string(),
            Ok(sample) => {
                let mut shown = String::new();
                let mut at = 0;
                while at < sample.tokens.len() {
                    let trained = sample.trained[at];
                    let same = sample.trained[at..].iter().take_while(|mark| **mark == trained).count();
                    let text = tokenizer.decode(&sample.tokens[at..at + same], false).unwrap();
                    shown += &if trained { format!("[{text}]") } else { text };
                    at += same;
                }
                shown
            }
        };
        assert_eq!(shown, expected);
    }

    fn check(turns: &[(Role, &str)], expected: &str) {
        check_with(CHATML, &conversation(turns), &MarkOptions::new(1000), expected);
    }

    use Role::{Assistant, System, Text, User};

    #[test]
    fn answers_are_trained_with_their_end() {
        check(
            &[(System, "s"), (User, "q"), (Assistant, "a"), (User, "r"), (Assistant, " b \n")],
            "<|im_start|>system\ns<|im_end|>\n<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n[a<|im_end|>]\n\
             <|im_start|>user\nr<|im_end|>\n<|im_start|>assistant\n[ b \n<|im_end|>]\n",
        );
        check(
            &[(User, "q"), (Assistant, "")],
            "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n[<|im_end|>]\n",
        );
        check(&[(Text, "abc")], "[abc<|im_end|>]");
    }

    #[test]
    fn calls_that_are_not_rendered_are_refused() {
        let mut chat = conversation(&[(User, "q"), (Assistant, "")]);
        chat.messages[1].tool_calls = Some(serde_json::json!([{"function": {"name": "find"}}]));
        let expected =
            "chat template `t`: it does not render the conversation's tool calls; use a template that does";
        check_with(CHATML, &chat, &MarkOptions::new(1000), expected);
        chat.messages[1].content = "find()".to_string();
        let rendered = "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n[find()<|im_end|>]\n";
        check_with(CHATML, &chat, &MarkOptions::new(1000), rendered);
    }

    #[test]
    fn options() {
        let chat = conversation(&[(User, "q"), (Assistant, "a"), (User, "r"), (Assistant, "b")]);
        let end = "<|im_end|>\n<|im_start|>";
        let with = |change: &dyn Fn(&mut MarkOptions)| {
            let mut options = MarkOptions::new(1000);
            change(&mut options);
            options
        };
        check_with(
            CHATML,
            &chat,
            &with(&|o| o.mask_history = true),
            &format!("<|im_start|>user\nq{end}assistant\na{end}user\nr{end}assistant\n[b<|im_end|>]\n"),
        );
        check_with(
            CHATML,
            &chat,
            &with(&|o| o.train_on_prompt = true),
            &format!("[<|im_start|>user\nq{end}assistant\na{end}user\nr{end}assistant\nb<|im_end|>\n]"),
        );
        check_with(
            CHATML,
            &conversation(&[(User, "q"), (Assistant, "a")]),
            &with(&|o| o.default_system = Some("d".to_string())),
            &format!("<|im_start|>system\nd{end}user\nq{end}assistant\n[a<|im_end|>]\n"),
        );
        let mut some = chat.clone();
        some.messages[1].trained = Some(false);
        check_with(
            CHATML,
            &some,
            &MarkOptions::new(1000),
            &format!("<|im_start|>user\nq{end}assistant\na{end}user\nr{end}assistant\n[b<|im_end|>]\n"),
        );
    }

    #[test]
    fn cutting() {
        let chat = conversation(&[(User, "q"), (Assistant, "abcdef")]);
        let cut =
            |length: usize, expected: &str| check_with(CHATML, &chat, &MarkOptions::new(length), expected);
        cut(24, "<|im_start|>user\nq<|im_end|>\n<|im_start|>assist[abcdef<|im_end|>]\n");
        cut(10, "<|im_start|>user\nq<|im_end|>[ab]");
        cut(
            3,
            "cutoff_len 3 cuts off everything to train on (7 trained tokens start at token 20); raise cutoff_len",
        );
        check(&[(User, "q")], "nothing to train on: the conversation has no assistant turn");
        check(&[(Text, "")], "nothing to train on: the text is empty");
    }

    #[test]
    fn typed_control_tokens() {
        let tokenizer = tokenizer();
        let template = Template::new("t", CHATML, tokenizer.special_tokens()).unwrap();
        let chat = conversation(&[(User, "x<|im_end|>y"), (Assistant, "<s>")]);
        let count = |split: bool| {
            let mut options = MarkOptions::new(1000);
            options.split_control_tokens = split;
            let sample = encode_conversation(&chat, &template, &tokenizer, &options).unwrap();
            let controls = sample.tokens.iter().filter(|id| tokenizer.is_control(**id)).count();
            let text = tokenizer.decode(&sample.tokens, false).unwrap();
            assert_eq!(
                text,
                "<|im_start|>user\nx<|im_end|>y<|im_end|>\n<|im_start|>assistant\n<s><|im_end|>\n"
            );
            (controls, sample.trained_tokens())
        };
        assert_eq!(count(true), (4, 4));
        assert_eq!(count(false), (6, 2));
    }

    #[test]
    fn templates_that_look_at_what_they_write() {
        // The model's own control token is looked for by the template: it is stripped, and the person's stays text.
        let strips = "{% for m in messages %}{% if m.role == 'assistant' %}<s>{{ m.content.split('</s>')[-1] }}\
                      <|im_end|>{% else %}{{ m.content | trim }}{% endif %}{% endfor %}\
                      {% if add_generation_prompt %}<s>{% endif %}";
        check_with(
            strips,
            &conversation(&[(User, " q</s> "), (Assistant, "thought</s>answer")]),
            &MarkOptions::new(1000),
            "q</s><s>[answer<|im_end|>]",
        );
    }

    #[test]
    fn marked_templates() {
        let marked = "{% for m in messages %}{% if m.role == 'assistant' %}A:{% generation %}{{ m.content }}</s>\
                      {% endgeneration %}{% else %}U:{{ m.content }}{% endif %}{% endfor %}";
        let turns = [(User, "q"), (Assistant, "a"), (User, "r"), (Assistant, "b")];
        check_with(marked, &conversation(&turns), &MarkOptions::new(99), "U:qA:[a</s>]U:rA:[b</s>]");
        let mut options = MarkOptions::new(99);
        options.mask_history = true;
        check_with(marked, &conversation(&turns), &options, "U:qA:a</s>U:rA:[b</s>]");
    }

    #[test]
    fn rewritten_history() {
        // Thoughts are stripped from all turns but the last, and the very end has another token.
        let source = "{% for m in messages %}{% if m.role == 'assistant' %}<s>bot\n{% if not loop.last %}\
                      {{ m.content.split('/t')[-1] }}<|im_end|>{% else %}{{ m.content }}</s>{% endif %}\
                      {% else %}<s>me\n{{ m.content }}<|im_end|>{% endif %}{% endfor %}\
                      {% if add_generation_prompt %}<s>bot\n{% endif %}";
        check_with(
            source,
            &conversation(&[(User, "q"), (Assistant, "x/ta"), (User, "r"), (Assistant, "y/tb")]),
            &MarkOptions::new(99),
            "<s>me\nq<|im_end|><s>bot\n[a<|im_end|>]<s>me\nr<|im_end|><s>bot\n[y/tb</s>]",
        );
    }

    #[test]
    fn templates_are_checked_against_tokenizers() {
        let tokenizer = tokenizer();
        let check = |source: &str, special: BTreeMap<String, String>, expected: Option<&str>| {
            let template = Template::new("t", source, &special).unwrap();
            let error = check_template(&template, &tokenizer).err().map(|error| error.to_string());
            assert_eq!(error.as_deref(), expected);
        };
        check(CHATML, BTreeMap::new(), None);
        check(
            "<|eot_id|>{{ messages[0].content }}<b><|im_end|><|eot_id|>",
            BTreeMap::new(),
            Some(
                "chat template `t`: it writes `<|eot_id|>`, which tokenizer `gpt2/smollm` does not have as single \
                 tokens; use the template that belongs to this model",
            ),
        );
        check(
            "{{ bos_token }}",
            BTreeMap::new(),
            Some("chat template `t`: it uses `bos_token`, which tokenizer `gpt2/smollm` does not name"),
        );
    }

    #[test]
    fn what_gives_nothing_is_reported() {
        let tokenizer = tokenizer();
        let template = Template::new("t", CHATML, tokenizer.special_tokens()).unwrap();
        let good = conversation(&[(User, "q"), (Assistant, "a")]);
        let bad = conversation(&[(User, "q")]);
        let all = [(Place::new("f", 1), good), (Place::new("f", 2), bad.clone())];
        let (samples, report) = encode_all(&all, &template, &tokenizer, &MarkOptions::new(99)).unwrap();
        assert_eq!((samples.len(), report.samples, report.dropped.len()), (1, 1, 1));
        assert_eq!((report.tokens, report.trained_tokens, report.quantile(1.0)), (23, 2, 23));
        assert_eq!(report.dropped[0].place.to_string(), "f:2");
        let error = encode_all(&[(Place::new("f", 2), bad)], &template, &tokenizer, &MarkOptions::new(99));
        assert_eq!(
            error.unwrap_err().to_string(),
            "no conversation gives anything to train on; the first one: f:2: nothing to train on: the conversation \
             has no assistant turn"
        );
    }
}
