//! A tokenizer in the words of a GGUF file: [`super::build`] backwards.
//!
//! llama.cpp's conversion knows a pre-tokenizer by a hash of what the whole tokenizer makes of a text; another token
//! more and it isn't known any more. Here the pieces that a text is cut into are compared with those of each
//! pre-tokenizer that llama.cpp has. What is written of tokens follows its `conversion/base.py`.

use std::collections::HashMap;

use serde_json::Value;
use tokenizers::pre_tokenizers::PreTokenizerWrapper;
use tokenizers::{OffsetReferential, OffsetType, PreTokenizedString, PreTokenizer};

use super::{GgufVocabulary, pre_tokenizer};

/// Names of pre-tokenizers that cut differently, the likeliest first.
const CANDIDATES: [&str; 10] = [
    "llama-bpe",
    "qwen2",
    "smollm",
    "gpt-2",
    "dbrx",
    "gpt-4o",
    "tekken",
    "deepseek-v3",
    "deepseek-coder",
    "default",
];

/// Of which merges don't count where a word is a token.
const WHOLE_WORDS: [&str; 2] = ["llama-bpe", "tekken"];

/// Spaces, digits, scripts, contractions, cases and signs: what pre-tokenizers differ in.
pub(crate) const PROBE: &str = "\n \n\n \t\t  words   and 3 33 333 3333 33333 numbers 3.3 3..3, 12345678 ²½ \r\n\r\n\tCamelCase HTTPServer \
     iPhone don't DON'T we'Ve a'lL 'tis I'm; (well)-known!? ...!!! $5 <a href=\"#\">\n/*code*/ x_1+=y->z;\n\n\n\
     你好，世界。今天12点 カタカナ ひらがな 한국어 Ελληνικά Привет мир ไทย हिन्दी العربية é e\u{301} 🙂👍🏽 \u{a0}end  ";

const NORMAL: i32 = 1;
const UNKNOWN: i32 = 2;
const CONTROL: i32 = 3;
const USER_DEFINED: i32 = 4;
const UNUSED: i32 = 5;
const BYTE: i32 = 6;
/// What llama.cpp's conversion gives tokens that were added to SentencePiece's.
const ADDED_SCORE: f32 = -1000.0;

/// The vocabulary of a tokenizer, without its special tokens' ids and its template; and what differs.
pub(crate) fn describe(inner: &tokenizers::Tokenizer) -> Result<(GgufVocabulary, Vec<String>), String> {
    let text = inner.to_string(false).map_err(|error| error.to_string())?;
    let json: Value = serde_json::from_str(&text).map_err(|error| error.to_string())?;
    let model = &json["model"];
    let kind = model["type"].as_str().unwrap_or_default();
    let Some(vocab) = model["vocab"].as_object().filter(|_| kind == "BPE") else {
        return Err(format!("a tokenizer of the kind `{kind}` has no form in GGUF here, only BPE has"));
    };
    let mut vocabulary = GgufVocabulary::default();
    let mut ids: Vec<(usize, &str)> = Vec::new();
    for (token, id) in vocab {
        ids.push((id.as_u64().unwrap_or_default() as usize, token));
    }
    let added: Vec<&Value> = json["added_tokens"].as_array().into_iter().flatten().collect();
    let last = ids.iter().map(|it| it.0).chain(added.iter().map(|it| id_of(it))).max();
    let count = last.map_or(0, |last| last + 1);
    if count > 1 << 24 {
        return Err(format!("it has a token with the number {}", count - 1));
    }
    vocabulary.tokens = (0..count).map(|id| format!("[PAD{id}]")).collect();
    vocabulary.token_types = vec![UNUSED; count];
    for (id, token) in ids {
        vocabulary.tokens[id] = token.to_string();
        vocabulary.token_types[id] = NORMAL;
    }
    let byte_level = json["decoder"].to_string().contains("\"ByteLevel\"");
    let notes = if byte_level {
        byte_level_form(inner, &json, &mut vocabulary)?
    } else if model["byte_fallback"].as_bool() == Some(true) {
        sentence_piece_form(&json, &mut vocabulary)?;
        Vec::new()
    } else {
        return Err(
            "a BPE tokenizer of neither bytes nor SentencePiece's pieces has no form in GGUF here".into()
        );
    };
    for token in added {
        let (id, content) = (id_of(token), token["content"].as_str().unwrap_or_default());
        if token["special"].as_bool() == Some(true) || looks_special(content) {
            vocabulary.tokens[id] = content.to_string();
            vocabulary.token_types[id] =
                if Some(content) == model["unk_token"].as_str() && !byte_level { UNKNOWN } else { CONTROL };
        } else {
            vocabulary.tokens[id] = content.replace('▁', " ");
            vocabulary.token_types[id] = USER_DEFINED;
        }
        if let Some(score) = vocabulary.scores.get_mut(id) {
            *score = ADDED_SCORE;
        }
    }
    Ok((vocabulary, notes))
}

fn id_of(added: &Value) -> usize {
    added["id"].as_u64().unwrap_or_default() as usize
}

/// llama.cpp takes these for control tokens whatever the tokenizer says.
fn looks_special(token: &str) -> bool {
    ["<pad>", "<mask>", "<2mass>", "[@BOS@]"].contains(&token)
        || (token.starts_with("<|") && token.ends_with("|>"))
        || (token.starts_with("<｜") && token.ends_with("｜>"))
        || (token.starts_with("<unused") && token.ends_with('>'))
}

fn merges(json: &Value) -> Result<Vec<(String, String)>, String> {
    let list = json["model"]["merges"].as_array().ok_or("it has no list of merges")?;
    let pair = |merge: &Value| match merge {
        Value::String(text) => text.split_once(' ').map(|(a, b)| (a.to_string(), b.to_string())),
        Value::Array(pair) => Some((pair.first()?.as_str()?.to_string(), pair.get(1)?.as_str()?.to_string())),
        _ => None,
    };
    list.iter().map(|it| pair(it).ok_or(format!("the merge {it} is no pair"))).collect()
}

fn byte_level_form(
    inner: &tokenizers::Tokenizer,
    json: &Value,
    vocabulary: &mut GgufVocabulary,
) -> Result<Vec<String>, String> {
    vocabulary.model = "gpt2".into();
    // Bringing characters into their usual form is what most typing does; llama.cpp doesn't.
    let normalizer = &json["normalizer"];
    let steps = normalizer["normalizers"].as_array().map_or(std::slice::from_ref(normalizer), Vec::as_slice);
    if let Some(other) = steps.iter().filter_map(|it| it["type"].as_str()).find(|it| *it != "NFC") {
        return Err(format!("its normalizer `{other}` has no form in GGUF"));
    }
    // A space within a part is written as bytes are, so that the one between the parts is the only one.
    let spaced = |part: String| part.replace(' ', "Ġ");
    vocabulary.merges =
        merges(json)?.into_iter().map(|(a, b)| format!("{} {}", spaced(a), spaced(b))).collect();
    let own = inner.get_pre_tokenizer().map(pieces).transpose()?.unwrap_or_default();
    let cuts_alike = |name: &&&str| {
        let other = pre_tokenizer(name).ok().flatten();
        other.and_then(|it| pieces(&PreTokenizerWrapper::Sequence(it)).ok()).is_some_and(|it| it == own)
    };
    let alike: Vec<&str> = CANDIDATES.iter().filter(cuts_alike).copied().collect();
    let whole_words = json["model"]["ignore_merges"].as_bool() == Some(true);
    let best = alike.iter().find(|it| WHOLE_WORDS.contains(it) == whole_words).or(alike.first());
    let Some(best) = best else {
        return Err(
            "llama.cpp has no pre-tokenizer, that is known here, which cuts text into its pieces".into()
        );
    };
    vocabulary.pre = best.to_string();
    let mut notes = Vec::new();
    if WHOLE_WORDS.contains(best) != whole_words {
        notes.push(format!(
            "the tokenizer is written as `{best}`, which treats words that merges don't reach otherwise"
        ));
    }
    Ok(notes)
}

/// What the probe is cut into.
fn pieces(pre_tokenizer: &PreTokenizerWrapper) -> Result<Vec<String>, String> {
    let mut text = PreTokenizedString::from(PROBE);
    pre_tokenizer.pre_tokenize(&mut text).map_err(|error| error.to_string())?;
    let splits = text.get_splits(OffsetReferential::Original, OffsetType::Byte);
    Ok(splits.into_iter().map(|it| it.0.to_string()).collect())
}

/// tokenizer.json has no scores but the order of merges, which was theirs.
fn sentence_piece_form(json: &Value, vocabulary: &mut GgufVocabulary) -> Result<(), String> {
    vocabulary.model = "llama".into();
    vocabulary.pre = "default".into();
    let known = ["Prepend", "Replace", "Sequence"];
    let mut steps = vec![&json["normalizer"]];
    while let Some(step) = steps.pop() {
        steps.extend(step["normalizers"].as_array().into_iter().flatten());
        if let Some(other) = step["type"].as_str().filter(|it| !known.contains(it)) {
            return Err(format!("its normalizer `{other}` has no form in GGUF"));
        }
    }
    let prepends = json["normalizer"].to_string().contains("\"Prepend\"");
    let scheme = json["pre_tokenizer"]["prepend_scheme"].as_str();
    vocabulary.add_space_prefix = Some(prepends || scheme.is_some_and(|it| it != "never"));
    let mut order: HashMap<String, usize> = HashMap::new();
    let merges = merges(json)?;
    let count = merges.len();
    for (rank, (left, right)) in merges.into_iter().enumerate() {
        order.entry(left + &right).or_insert(rank);
    }
    // What no merge makes comes last; of single characters and bytes it is never asked.
    let score = |token: &String| -(*order.get(token).unwrap_or(&count) as f32);
    vocabulary.scores = vocabulary.tokens.iter().map(score).collect();
    for (token, kind) in vocabulary.tokens.iter().zip(&mut vocabulary.token_types) {
        let hex = token.strip_prefix("<0x").and_then(|it| it.strip_suffix('>'));
        if hex.is_some_and(|it| it.len() == 2 && u8::from_str_radix(it, 16).is_ok()) {
            *kind = BYTE;
        }
    }
    Ok(())
}
