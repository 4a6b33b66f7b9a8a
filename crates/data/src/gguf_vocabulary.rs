//! A tokenizer out of what a GGUF file says about it, exact to `tokenizer.ggml.pre`.
//!
//! transformers' own conversion falls back to GPT-2's pattern for every byte-level vocabulary; llama.cpp goes by
//! the name in `tokenizer.ggml.pre`, and so do we: the patterns below are llama.cpp's, applied one after another.
//! A name that isn't known is an error, because a wrong split trains on tokens the model has never seen.

pub(crate) mod describe;

use std::collections::HashSet;

use tokenizers::decoders::DecoderWrapper;
use tokenizers::decoders::byte_fallback::ByteFallback;
use tokenizers::decoders::fuse::Fuse;
use tokenizers::decoders::sequence::Sequence as DecoderSequence;
use tokenizers::decoders::strip::Strip;
use tokenizers::models::bpe::{BPE, Vocab};
use tokenizers::normalizers::replace::Replace;
use tokenizers::normalizers::{NormalizerWrapper, Prepend, Sequence as NormalizerSequence};
use tokenizers::pre_tokenizers::PreTokenizerWrapper;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::sequence::Sequence;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::{AddedToken, SplitDelimiterBehavior};

use crate::error::{Error, Result};

/// What a GGUF file's `tokenizer.*` keys say; filled by whoever reads the file.
#[derive(Clone, Debug, Default)]
pub struct GgufVocabulary {
    /// `tokenizer.ggml.model`: `gpt2` (byte-level BPE) or `llama` (SentencePiece BPE).
    pub model: String,
    /// `tokenizer.ggml.pre`: the name of the pre-tokenizer; empty counts as `default`.
    pub pre: String,
    /// `tokenizer.ggml.tokens`, by id.
    pub tokens: Vec<String>,
    /// `tokenizer.ggml.scores`, by id; used by `llama` only.
    pub scores: Vec<f32>,
    /// `tokenizer.ggml.token_type`, by id: 1 normal, 2 unknown, 3 control, 4 user-defined, 5 unused, 6 byte.
    pub token_types: Vec<i32>,
    /// `tokenizer.ggml.merges`: pairs with one space between; used by `gpt2` only.
    pub merges: Vec<String>,
    /// `tokenizer.ggml.bos_token_id`.
    pub bos: Option<u32>,
    /// `tokenizer.ggml.eos_token_id`.
    pub eos: Option<u32>,
    /// `tokenizer.ggml.eot_token_id`.
    pub eot: Option<u32>,
    /// `tokenizer.ggml.unknown_token_id`.
    pub unk: Option<u32>,
    /// `tokenizer.ggml.padding_token_id`.
    pub pad: Option<u32>,
    /// `tokenizer.ggml.add_bos_token`; absent means true for `llama` and for the `llama-bpe` pre-tokenizer.
    pub add_bos: Option<bool>,
    /// `tokenizer.ggml.add_eos_token`.
    pub add_eos: Option<bool>,
    /// `tokenizer.ggml.add_space_prefix`; absent means true. Used by `llama` only.
    pub add_space_prefix: Option<bool>,
    /// `tokenizer.chat_template`.
    pub chat_template: Option<String>,
    /// `tokenizer.chat_template.{name}`, templates for other uses.
    pub more_templates: Vec<(String, String)>,
}

impl GgufVocabulary {
    /// Whether an encoded text starts with the BOS token.
    pub fn adds_bos(&self) -> bool {
        let by_default = self.model == "llama" || LLAMA_3.contains(&self.pre.as_str());
        self.add_bos.unwrap_or(by_default)
    }
}

const LLAMA_3: &[&str] =
    &["llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2"];

const GPT_2: &str = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)";
const LLAMA_3_PATTERN: &str = concat!(
    r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|",
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
);
const QWEN_2: &str = concat!(
    r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|",
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
);
const GPT_4O: &str = concat!(
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+",
    r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])?|",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*",
    r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])?|",
    r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
);
const TEKKEN: &str = concat!(
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|",
    r"\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
);
const DEEPSEEK_V3: &str = concat!(
    r##"[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+|"##,
    r" ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
);

/// The patterns a byte-level text is split by, one after another; none for an unknown name.
fn patterns(pre: &str) -> Option<&'static [&'static str]> {
    Some(match pre {
        "" | "default" => &[r"[\p{P}\$\+<=>\^~\|]+", GPT_2, r"\p{N}+", "[0-9][0-9][0-9]"],
        _ if LLAMA_3.contains(&pre) => &[LLAMA_3_PATTERN],
        "dbrx" | "smaug-bpe" => &[LLAMA_3_PATTERN],
        "gpt-2" | "phi-2" | "mpt" | "olmo" | "jais" | "granite-embedding" | "jina-es" | "jina-de"
        | "jina-v2-es" | "jina-v2-de" | "jina-v2-code" | "roberta-bpe" | "gigachat" | "a.x-4.0"
        | "mellum" | "trillion" => &[GPT_2],
        "smollm" | "starcoder" | "refact" | "command-r" | "codeshell" | "exaone" | "minerva-7b" => {
            &[r"\p{N}", GPT_2]
        }
        "qwen2" | "stablelm2" | "deepseek-r1-qwen" | "megrez" | "hunyuan" => &[QWEN_2],
        "gpt-4o" | "llama4" => &[GPT_4O],
        "tekken" => &[TEKKEN],
        "deepseek-coder" => &[r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-퟿]+", r"\p{N}"],
        "deepseek-v3" => &[r"\p{N}{1,3}", "[一-龥぀-ゟ゠-ヿ]+", DEEPSEEK_V3],
        _ => return None,
    })
}

/// Builds the tokenizer of a vocabulary: no post-processor (BOS is added by [`crate::Tokenizer`]).
pub(crate) fn build(vocabulary: &GgufVocabulary) -> Result<tokenizers::Tokenizer> {
    let name = format!("{}/{}", vocabulary.model, vocabulary.pre);
    let wrong = |message: String| Error::Tokenizer { name: name.clone(), message };
    let failed = |error: tokenizers::Error| wrong(error.to_string());
    if vocabulary.tokens.is_empty() {
        return Err(wrong("`tokenizer.ggml.tokens` is empty; the file carries no vocabulary".to_string()));
    }
    if !vocabulary.token_types.is_empty() && vocabulary.token_types.len() != vocabulary.tokens.len() {
        return Err(wrong(format!(
            "{} token types for {} tokens",
            vocabulary.token_types.len(),
            vocabulary.tokens.len()
        )));
    }
    let mut tokenizer = match vocabulary.model.as_str() {
        "gpt2" => byte_level(vocabulary, &wrong)?,
        "llama" => sentence_piece(vocabulary, &wrong)?,
        other => {
            return Err(wrong(format!(
                "`tokenizer.ggml.model` is `{other}`; expected `gpt2` or `llama` (others are not there yet)"
            )));
        }
    };
    let mut added: Vec<AddedToken> = Vec::new();
    for (id, token) in vocabulary.tokens.iter().enumerate() {
        let id = id as u32;
        let kind = vocabulary.token_types.get(id as usize).copied().unwrap_or(1);
        let named = [vocabulary.bos, vocabulary.eos, vocabulary.unk, vocabulary.pad].contains(&Some(id));
        if kind == 3 || kind == 4 || (named && (kind == 2 || vocabulary.token_types.is_empty())) {
            added.push(AddedToken::from(token.as_str(), kind != 4).normalized(false));
        }
    }
    tokenizer.add_tokens(added).map_err(failed)?;
    Ok(tokenizer)
}

fn byte_level(vocabulary: &GgufVocabulary, wrong: &dyn Fn(String) -> Error) -> Result<tokenizers::Tokenizer> {
    let failed = |error: tokenizers::Error| wrong(error.to_string());
    let pre_tokenizer = pre_tokenizer(&vocabulary.pre).map_err(failed)?.ok_or_else(|| {
        wrong(format!(
            "unknown pre-tokenizer `{}` in `tokenizer.ggml.pre`; use the model's folder with tokenizer.json \
             instead of the GGUF file",
            vocabulary.pre
        ))
    })?;
    let mut merges = Vec::with_capacity(vocabulary.merges.len());
    for (index, merge) in vocabulary.merges.iter().enumerate() {
        // The left part may itself start with a space in some vocabularies, so look after the first byte.
        let at = merge.match_indices(' ').map(|(at, _)| at).find(|at| *at > 0);
        let at = at.ok_or_else(|| wrong(format!("merge {index} `{merge}` is not two parts with a space")))?;
        merges.push((merge[..at].to_string(), merge[at + 1..].to_string()));
    }
    let vocab: Vocab = ids(vocabulary);
    let ignore_merges = LLAMA_3.contains(&vocabulary.pre.as_str()) || vocabulary.pre == "tekken";
    let mut builder = BPE::builder().vocab_and_merges(vocab, merges).ignore_merges(ignore_merges);
    if let Some(unk) = vocabulary.unk.and_then(|id| vocabulary.tokens.get(id as usize)) {
        builder = builder.unk_token(unk.clone());
    }
    let mut tokenizer = tokenizers::Tokenizer::new(builder.build().map_err(failed)?);
    tokenizer.with_pre_tokenizer(Some(PreTokenizerWrapper::Sequence(pre_tokenizer)));
    tokenizer.with_decoder(Some(DecoderWrapper::ByteLevel(ByteLevel::new(true, true, true))));
    Ok(tokenizer)
}

/// What cuts text as `tokenizer.ggml.pre` says; none for an unknown name.
fn pre_tokenizer(pre: &str) -> Result<Option<Sequence>, tokenizers::Error> {
    let Some(patterns) = patterns(pre) else { return Ok(None) };
    let mut steps = Vec::new();
    for pattern in patterns {
        let pattern = SplitPattern::Regex((*pattern).to_string());
        steps.push(PreTokenizerWrapper::Split(Split::new(pattern, SplitDelimiterBehavior::Isolated, false)?));
    }
    steps.push(PreTokenizerWrapper::ByteLevel(ByteLevel::new(false, true, false)));
    Ok(Some(Sequence::new(steps)))
}

fn sentence_piece(
    vocabulary: &GgufVocabulary,
    wrong: &dyn Fn(String) -> Error,
) -> Result<tokenizers::Tokenizer> {
    let failed = |error: tokenizers::Error| wrong(error.to_string());
    if vocabulary.scores.len() != vocabulary.tokens.len() {
        return Err(wrong(format!(
            "{} scores for {} tokens; `tokenizer.ggml.scores` must have one for each",
            vocabulary.scores.len(),
            vocabulary.tokens.len()
        )));
    }
    let vocab: Vocab = ids(vocabulary);
    let merges = merges_from_scores(vocabulary, &vocab);
    let unk = vocabulary.unk.unwrap_or(0);
    let unk = vocabulary.tokens.get(unk as usize).cloned().unwrap_or_else(|| "<unk>".to_string());
    let model = BPE::builder()
        .vocab_and_merges(vocab, merges)
        .unk_token(unk)
        .fuse_unk(true)
        .byte_fallback(true)
        .build()
        .map_err(failed)?;
    let mut tokenizer = tokenizers::Tokenizer::new(model);
    let prefix = vocabulary.add_space_prefix.unwrap_or(true);
    let mut steps = Vec::new();
    if prefix {
        steps.push(NormalizerWrapper::Prepend(Prepend::new("▁".to_string())));
    }
    steps.push(NormalizerWrapper::Replace(Replace::new(" ", "▁").map_err(failed)?));
    tokenizer
        .with_normalizer(Some(NormalizerWrapper::Sequence(NormalizerSequence::new(steps))))
        .map_err(failed)?;
    let mut decoders = vec![
        DecoderWrapper::Replace(Replace::new("▁", " ").map_err(failed)?),
        DecoderWrapper::ByteFallback(ByteFallback::new()),
        DecoderWrapper::Fuse(Fuse::new()),
    ];
    if prefix {
        decoders.push(DecoderWrapper::Strip(Strip::new(' ', 1, 0)));
    }
    tokenizer.with_decoder(Some(DecoderWrapper::Sequence(DecoderSequence::new(decoders))));
    Ok(tokenizer)
}

fn ids(vocabulary: &GgufVocabulary) -> Vocab {
    vocabulary.tokens.iter().enumerate().map(|(id, token)| (token.clone(), id as u32)).collect()
}

/// Every way to make a token of two others, best score first: what SentencePiece decides by scores, as merges.
fn merges_from_scores(vocabulary: &GgufVocabulary, vocab: &Vocab) -> Vec<(String, String)> {
    let control: HashSet<u32> = (0..vocabulary.tokens.len() as u32)
        .filter(|id| vocabulary.token_types.get(*id as usize).is_some_and(|kind| *kind != 1))
        .collect();
    let mut merges: Vec<(f32, u32, u32)> = Vec::new();
    for (id, token) in vocabulary.tokens.iter().enumerate() {
        if control.contains(&(id as u32)) {
            continue;
        }
        let first = merges.len();
        for (at, _) in token.char_indices().skip(1) {
            let (left, right) = token.split_at(at);
            if let (Some(&left), Some(&right)) = (vocab.get(left), vocab.get(right)) {
                merges.push((vocabulary.scores[id], left, right));
            }
        }
        merges[first..].sort_by_key(|(_, left, right)| (*left, *right));
    }
    merges.sort_by(|a, b| b.0.total_cmp(&a.0));
    let text = |id: u32| vocabulary.tokens[id as usize].clone();
    merges.into_iter().map(|(_, left, right)| (text(left), text(right))).collect()
}
