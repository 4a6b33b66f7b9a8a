//! The tokenizer, as llama.cpp's `llama-vocab.cpp` reads it.

use ferrotune_model::source::GgufVocabulary;

use super::GgufTokenizer;
use super::file::{Metadata, Value};

/// The type of a token that stands for nothing.
const UNUSED: i32 = 5;

/// Writes `tokenizer.*`. Rows of the embedding that have no token get one that is never used.
pub(super) fn write(tokenizer: &GgufTokenizer, rows: usize, metadata: &mut Metadata) -> Result<(), String> {
    match tokenizer {
        GgufTokenizer::Made(vocabulary) => made(vocabulary, rows, metadata),
        GgufTokenizer::Kept(entries) => {
            let entries = entries.iter().map(|(key, value)| (key.clone(), Value::Raw(value.clone())));
            metadata.0.extend(entries);
            Ok(())
        }
    }
}

fn made(vocabulary: &GgufVocabulary, rows: usize, metadata: &mut Metadata) -> Result<(), String> {
    let count = vocabulary.tokens.len();
    if count > rows {
        return Err(format!("the tokenizer has {count} tokens, and the embedding {rows} rows"));
    }
    let padded = || count..rows;
    metadata.text("tokenizer.ggml.model", &vocabulary.model);
    metadata.text("tokenizer.ggml.pre", &vocabulary.pre);
    let mut tokens = vocabulary.tokens.clone();
    tokens.extend(padded().map(|id| format!("[PAD{id}]")));
    metadata.set("tokenizer.ggml.tokens", Value::Texts(tokens));
    if !vocabulary.scores.is_empty() {
        let mut scores = vocabulary.scores.clone();
        scores.resize(rows, -10_000.0);
        metadata.set("tokenizer.ggml.scores", Value::F32s(scores));
    }
    let mut types = vocabulary.token_types.clone();
    types.resize(count, 1);
    types.resize(rows, UNUSED);
    metadata.set("tokenizer.ggml.token_type", Value::I32s(types));
    if vocabulary.model == "gpt2" {
        metadata.set("tokenizer.ggml.merges", Value::Texts(vocabulary.merges.clone()));
    }
    let ids = [
        ("bos", vocabulary.bos_token_id),
        ("eos", vocabulary.eos_token_id),
        ("eot", vocabulary.eot_token_id),
        ("unknown", vocabulary.unk_token_id),
        ("padding", vocabulary.pad_token_id),
    ];
    for (name, id) in ids {
        if let Some(id) = id {
            metadata.set(format!("tokenizer.ggml.{name}_token_id"), Value::U32(id));
        }
    }
    let flags = [
        ("add_bos_token", vocabulary.add_bos_token),
        ("add_eos_token", vocabulary.add_eos_token),
        ("add_space_prefix", vocabulary.add_space_prefix),
    ];
    for (name, flag) in flags {
        if let Some(flag) = flag {
            metadata.set(format!("tokenizer.ggml.{name}"), Value::Bool(flag));
        }
    }
    if let Some(template) = &vocabulary.chat_template {
        metadata.text("tokenizer.chat_template", template);
    }
    for (name, template) in &vocabulary.more_templates {
        metadata.text(format!("tokenizer.chat_template.{name}"), template);
    }
    if !vocabulary.more_templates.is_empty() {
        let names = vocabulary.more_templates.iter().map(|it| it.0.clone()).collect();
        metadata.set("tokenizer.chat_templates", Value::Texts(names));
    }
    Ok(())
}
