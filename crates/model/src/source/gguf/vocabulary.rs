use std::path::Path;

use ferrotune_tensor::Error;

use super::header::{self, Header, List, Value};
use crate::source::mapped::Mapped;

/// The tokenizer that a GGUF file carries, `tokenizer.*`, as it stands there.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct GgufVocabulary {
    /// `tokenizer.ggml.model`: `gpt2` for byte-level pairs, `llama` for SentencePiece.
    pub model: String,
    /// `tokenizer.ggml.pre`: how text is cut before pairs are merged.
    pub pre: String,
    /// The tokens, by id.
    pub tokens: Vec<String>,
    /// SentencePiece's scores; empty for byte-level pairs.
    pub scores: Vec<f32>,
    /// 1 normal, 2 unknown, 3 control, 4 user-defined, 5 unused, 6 byte; may be empty.
    pub token_types: Vec<i32>,
    /// `left right`, the first first.
    pub merges: Vec<String>,
    /// The token that a text begins with.
    pub bos_token_id: Option<u32>,
    /// The token that ends a text.
    pub eos_token_id: Option<u32>,
    /// The token that ends a turn, where it is another.
    pub eot_token_id: Option<u32>,
    /// The token for what isn't known.
    pub unk_token_id: Option<u32>,
    /// The token that fills up rows.
    pub pad_token_id: Option<u32>,
    /// Whether texts begin with the first of these.
    pub add_bos_token: Option<bool>,
    /// Whether texts end with the token that ends them.
    pub add_eos_token: Option<bool>,
    /// Whether a space is put before a text.
    pub add_space_prefix: Option<bool>,
    /// The chat template.
    pub chat_template: Option<String>,
    /// Templates for other uses, by name.
    pub more_templates: Vec<(String, String)>,
}

/// A value of a file's metadata, as it stands there.
#[derive(Clone, Debug, PartialEq)]
pub struct RawValue {
    /// Its type's number.
    pub kind: u32,
    /// What follows that number.
    pub bytes: Vec<u8>,
}

impl RawValue {
    /// A text.
    pub fn text(text: &str) -> RawValue {
        let length = (text.len() as u64).to_le_bytes();
        RawValue { kind: 8, bytes: [&length, text.as_bytes()].concat() }
    }

    /// A number of 32 bits.
    pub fn whole(number: u32) -> RawValue {
        RawValue { kind: 4, bytes: number.to_le_bytes().to_vec() }
    }
}

impl GgufVocabulary {
    /// Reads the vocabulary of a GGUF file of any family, with or without weights.
    ///
    /// # Errors
    /// When the file is truncated or contradicts itself.
    pub fn open(path: &Path) -> Result<GgufVocabulary, Error> {
        let file = Mapped::open(path)?;
        let header = header::parse(file.bytes()).map_err(|message| Error::file(path, message))?;
        read(&header, file.bytes()).map_err(|message| Error::file(path, message))
    }
}

/// All that a file says about its tokenizer, `tokenizer.*`, for another file to say the same.
///
/// # Errors
/// When the file is truncated or contradicts itself.
pub fn raw_vocabulary(path: &Path) -> Result<Vec<(String, RawValue)>, Error> {
    let file = Mapped::open(path)?;
    let header = header::parse(file.bytes()).map_err(|message| Error::file(path, message))?;
    let ours = header.places.into_iter().filter(|it| it.0.starts_with("tokenizer."));
    let raw = |(key, kind, bytes): (String, u32, std::ops::Range<usize>)| {
        (key, RawValue { kind, bytes: file.bytes()[bytes].to_vec() })
    };
    Ok(ours.map(raw).collect())
}

/// Reads the vocabulary out of a header; `file` is the whole file.
pub(super) fn read(header: &Header, file: &[u8]) -> Result<GgufVocabulary, String> {
    let get = |key: &str| header.values.get(&format!("tokenizer.{key}"));
    let text = |key: &str| match get(key) {
        Some(Value::Text(text)) => Some(text.clone()),
        _ => None,
    };
    let list = |key: &str| -> Option<&List> {
        match get(key) {
            Some(Value::List(list)) => Some(list),
            _ => None,
        }
    };
    let wrong = |key: &str| format!("`tokenizer.{key}` is no list of the expected kind: the file is damaged");
    let strings = |key: &str| list(key).map_or(Ok(Vec::new()), |it| it.strings(file).ok_or(wrong(key)));
    let numbers = |key: &str| list(key).map_or(Ok(Vec::new()), |it| it.numbers(file).ok_or(wrong(key)));
    let id = |key: &str| match get(&format!("ggml.{key}_token_id")) {
        Some(Value::Whole(id)) => u32::try_from(*id).ok(),
        _ => None,
    };
    let flag = |key: &str| match get(key) {
        Some(Value::Bool(flag)) => Some(*flag),
        _ => None,
    };
    let vocabulary = GgufVocabulary {
        model: text("ggml.model").unwrap_or_default(),
        pre: text("ggml.pre").unwrap_or_default(),
        tokens: strings("ggml.tokens")?,
        scores: numbers("ggml.scores")?.into_iter().map(|it| it as f32).collect(),
        token_types: numbers("ggml.token_type")?.into_iter().map(|it| it as i32).collect(),
        merges: strings("ggml.merges")?,
        bos_token_id: id("bos"),
        eos_token_id: id("eos"),
        eot_token_id: id("eot"),
        unk_token_id: id("unknown"),
        pad_token_id: id("padding"),
        add_bos_token: flag("ggml.add_bos_token"),
        add_eos_token: flag("ggml.add_eos_token"),
        add_space_prefix: flag("ggml.add_space_prefix"),
        chat_template: text("chat_template"),
        more_templates: strings("chat_templates")?
            .into_iter()
            .filter_map(|name| text(&format!("chat_template.{name}")).map(|it| (name, it)))
            .collect(),
    };
    let count = vocabulary.tokens.len();
    for (key, length) in [("scores", vocabulary.scores.len()), ("token_type", vocabulary.token_types.len())] {
        if length != 0 && length != count {
            return Err(format!(
                "`tokenizer.ggml.{key}` has {length} entries for {count} tokens: the file is damaged"
            ));
        }
    }
    Ok(vocabulary)
}
