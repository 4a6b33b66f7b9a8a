//! Texts, tokens and marks over the whole matrix: every template of ours and every public one beside the checkout, with
//! every conversation of the suite.

use std::collections::BTreeMap;
use std::path::PathBuf;

use ferrotune_data::{
    Added, Conversation, Error, Fate, MarkOptions, Message, Role, Template, Tokenizer, assistant_spans,
    named_template, show_conversation, template_names,
};
use serde_json::{Map, Value};

fn repository(path: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../..").join(path)
}

/// A small byte-level tokenizer with the special tokens of the suite.
fn tokenizer() -> Tokenizer {
    let mut tokenizer = Tokenizer::from_folder(&repository("tests/fixtures/llama_tiny")).unwrap();
    let special = ["<s>", "</s>", "<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<|end|>", "<|eot|>"];
    tokenizer.add_tokens(&special.map(str::to_string), Added::Control).unwrap();
    tokenizer.set_special_token("bos_token", "<s>").unwrap();
    tokenizer.set_special_token("eos_token", "</s>").unwrap();
    tokenizer
}

/// Conversations of the suite with texts as contents.
fn conversations() -> Vec<(String, Conversation)> {
    let golden = std::fs::read_to_string(repository("tests/fixtures/templates/golden.json")).unwrap();
    let golden: Value = serde_json::from_str(&golden).unwrap();
    let read = |value: &Value| -> Option<Conversation> {
        let messages = value["messages"].as_array()?.iter().map(|message| {
            let mut fields = message.as_object()?.clone();
            let role = Role::from_name(fields.remove("role")?.as_str()?)?;
            let content = fields.remove("content")?;
            let mut read = Message::new(role, content.as_str().unwrap_or_default());
            read.tool_calls = fields.remove("tool_calls");
            read.extra = fields;
            (content.is_string() || content.is_null()).then_some(read)
        });
        let tools = value.get("tools").cloned();
        Some(Conversation { messages: messages.collect::<Option<_>>()?, tools, ..Conversation::default() })
    };
    let all = golden["conversations"].as_object().unwrap().iter();
    all.filter_map(|(name, value)| Some((name.clone(), read(value)?))).collect()
}

/// Name, source and special tokens of each template.
fn templates() -> Vec<(String, String)> {
    let golden = std::fs::read_to_string(repository("tests/fixtures/templates/golden.json")).unwrap();
    let golden: Value = serde_json::from_str(&golden).unwrap();
    let ours = golden["templates"].as_object().unwrap().iter();
    let mut all: Vec<(String, String)> =
        ours.map(|(name, source)| (name.clone(), source.as_str().unwrap().to_string())).collect();
    all.extend(template_names().map(|name| (name.to_string(), named_template(name).unwrap().source)));
    let shared = repository("../shared/data");
    for folder in ["llama.cpp/templates", "trl_chat_templates", "mistralrs_chat_templates"] {
        let Ok(entries) = std::fs::read_dir(shared.join(folder)) else {
            eprintln!("skipped: {folder} is not beside the checkout");
            continue;
        };
        let files = entries.map(|entry| entry.unwrap().path());
        let mut files: Vec<PathBuf> =
            files.filter(|file| file.extension().is_some_and(|ending| ending == "jinja")).collect();
        files.sort();
        let read = |file: PathBuf| {
            let name = file.file_name().unwrap().to_string_lossy().into_owned();
            (format!("{folder}/{name}"), std::fs::read_to_string(file).unwrap())
        };
        all.extend(files.into_iter().map(read));
    }
    all
}

/// What was counted over the matrix.
#[derive(Debug, Default)]
struct Counts {
    samples: usize,
    /// The template refuses the conversation.
    refused: usize,
    /// Nothing to train on: no answer.
    nothing: usize,
    /// Named, not guessed.
    not_found: usize,
}

#[test]
fn tokens_and_marks_are_those_of_the_text() {
    let tokenizer = tokenizer();
    let bos = tokenizer.bos().unwrap();
    let (conversations, options) = (conversations(), MarkOptions::new(usize::MAX));
    let mut counts = Counts::default();
    for (name, source) in templates() {
        let special: BTreeMap<String, String> = tokenizer.special_tokens().clone();
        let Ok(template) = Template::new(&name, &source, &special) else { continue };
        for (case, conversation) in &conversations {
            let messages = conversation.to_json(None);
            let spans = assistant_spans(&template, &messages, conversation.tools.as_ref(), &Map::new());
            let shown = show_conversation(conversation, &template, &tokenizer, &options);
            let (spans, shown) = match (spans, shown) {
                (Ok(spans), Ok(shown)) => (spans, shown),
                (_, Err(Error::Template { .. })) => {
                    counts.refused += 1;
                    continue;
                }
                (Err(error), Err(Error::Sample(_))) => {
                    eprintln!("{case}: {error}");
                    counts.not_found += 1;
                    continue;
                }
                (Ok(spans), Err(Error::Sample(error))) => {
                    let marked = spans.turns.iter().map(|turn| turn.range.len()).sum::<usize>();
                    assert_eq!(marked, 0, "{name}, {case}: {error}");
                    counts.nothing += 1;
                    continue;
                }
                (spans, shown) => panic!("{name}, {case}: {:?} {:?}", spans.err(), shown.err()),
            };
            counts.samples += 1;
            let text: String = shown.pieces.iter().map(|piece| piece.text.as_str()).collect();
            assert_eq!(text, spans.text, "{name}, {case}: the pieces are the text");
            // A token is trained if any of its bytes is: what is trained covers the turns, and is longer at their edges
            // by less than a token.
            let mut at = 0;
            let mut trained = vec![false; text.len()];
            for piece in &shown.pieces {
                trained[at..at + piece.text.len()].fill(piece.fate == Fate::Trained);
                at += piece.text.len();
            }
            let mut outside = trained.clone();
            for turn in &spans.turns {
                assert!(
                    trained[turn.range.clone()].iter().all(|it| *it),
                    "{name}, {case}: a turn isn't trained"
                );
                outside[turn.range.clone()].fill(false);
            }
            let most = 2 * spans.turns.len() * 4;
            let beyond = outside.iter().filter(|it| **it).count();
            assert!(beyond <= most, "{name}, {case}: {beyond} bytes trained that no turn has");
            // BOS is there as often as the template writes it, and nobody adds another; typed ones are text.
            let written = spans.text.matches("<s>").count();
            let there = shown.sample.tokens.iter().filter(|id| **id == bos).count();
            let typed = conversation.messages.iter().any(|message| message.content.contains("<s>"));
            assert!(
                there == written || typed && there < written,
                "{name}, {case}: BOS {there}, not {written}"
            );
            assert!(
                !shown.sample.tokens.windows(2).any(|pair| pair == [bos, bos]),
                "{name}, {case}: BOS twice"
            );
        }
    }
    eprintln!("{counts:?}");
    assert!(counts.samples > 500, "{counts:?}");
}
