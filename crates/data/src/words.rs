//! Text to tokens word by word, with the tokens of words seen before kept.
//!
//! Byte-level BPE first cuts a text by a pattern, and no token reaches over a cut. All the patterns in use cut before
//! a space between something that is none and a letter: `one| two,| three`. So a text may be taken apart there, its pieces encoded by
//! themselves, and the result is the same; most pieces are words that came before. Tokenizers of which this isn't
//! known for certain are left alone.

use std::cell::RefCell;
use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};

use serde_json::Value;

use crate::tokenizer::Encoded;

/// Beginnings of patterns that cut as described, whatever comes after: GPT-2, Llama 3 and Qwen (written in two ways),
/// and GPT-4o.
const PATTERNS: [&str; 4] = [
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+|",
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|",
    r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])|[^\r\n\p{L}\p{N}]?\p{L}+|",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+",
];
/// Pieces that each thread keeps.
const KEPT: usize = 1 << 17;
/// Longer pieces don't come again.
const LONGEST: usize = 64;

/// A token of a piece: its id, and its bytes within the piece.
type Token = (u32, u8, u8);
/// The tokens of pieces seen before.
type Table = HashMap<Box<str>, Box<[Token]>>;

thread_local! {
    /// Of the tokenizer used last, by the number of its [`Words`]: threads that share a table wait for each other.
    static TABLE: RefCell<(u64, Table)> = RefCell::default();
}

/// A tokenizer that cuts as described.
pub(crate) struct Words {
    number: u64,
}

impl Words {
    /// None where the tokenizer isn't known to cut as described.
    pub(crate) fn of(tokenizer: &tokenizers::Tokenizer) -> Option<Words> {
        let bpe =
            matches!(tokenizer.get_model(), tokenizers::ModelWrapper::BPE(bpe) if bpe.dropout.is_none());
        let plain = tokenizer.get_normalizer().is_none()
            && tokenizer.get_truncation().is_none()
            && tokenizer.get_padding().is_none();
        let cuts = tokenizer.get_pre_tokenizer().and_then(|it| serde_json::to_value(it).ok());
        let added = tokenizer.get_added_vocabulary().get_added_tokens_decoder();
        // An added token may not reach over a cut, nor look at what is beside it.
        let narrow = added.values().all(|token| {
            let spaces = token.content.contains(' ') && !token.content.trim_matches(' ').is_empty();
            !token.single_word && !token.lstrip && !token.rstrip && !spaces && token.content != " "
        });
        static NUMBER: AtomicU64 = AtomicU64::new(1);
        let words = bpe && plain && narrow && cuts.is_some_and(|it| cuts_words(&it));
        words.then(|| Words { number: NUMBER.fetch_add(1, Ordering::Relaxed) })
    }

    /// Ids and ranges of `text`, as `tokenizer` gives them for the whole.
    pub(crate) fn encode(
        &self,
        tokenizer: &tokenizers::Tokenizer,
        text: &str,
    ) -> Result<Encoded, tokenizers::Error> {
        TABLE.with_borrow_mut(|(number, table)| {
            if *number != self.number {
                table.clear();
                *number = self.number;
            }
            let mut out = Encoded::default();
            for (start, piece) in pieces(text) {
                if let Some(tokens) = table.get(piece) {
                    out.ids.extend(tokens.iter().map(|it| it.0));
                    let ranges = tokens.iter().map(|it| start + usize::from(it.1)..start + usize::from(it.2));
                    out.ranges.extend(ranges);
                    continue;
                }
                let encoding = tokenizer.encode(piece, false)?;
                let tokens = encoding.get_ids().iter().zip(encoding.get_offsets());
                for (id, (from, to)) in tokens.clone() {
                    out.ids.push(*id);
                    out.ranges.push(start + from..start + to);
                }
                if piece.len() <= LONGEST && table.len() < KEPT {
                    table
                        .insert(piece.into(), tokens.map(|(id, it)| (*id, it.0 as u8, it.1 as u8)).collect());
                }
            }
            Ok(out)
        })
    }
}

/// Whether a pre-tokenizer, as tokenizer.json writes it, cuts between words and at nothing that looks further.
fn cuts_words(cuts: &Value) -> bool {
    let step = |step: &Value| match step["type"].as_str() {
        Some("Digits") => Some(false),
        Some("ByteLevel") if step["add_prefix_space"] == false => Some(step["use_regex"] != false),
        Some("Split") if step["behavior"] == "Isolated" && step["invert"] == false => {
            let pattern = step["pattern"]["Regex"].as_str()?;
            let digits = pattern == r"\p{N}" || pattern == r"\p{N}{1,3}";
            let known = PATTERNS.iter().any(|it| pattern.starts_with(it));
            (known || digits).then_some(known)
        }
        _ => None,
    };
    let steps = match cuts["pretokenizers"].as_array() {
        Some(steps) => steps.as_slice(),
        None => std::slice::from_ref(cuts),
    };
    let known: Option<Vec<bool>> = steps.iter().map(step).collect();
    known.is_some_and(|cuts| cuts.contains(&true))
}

/// The text in pieces with their starts.
fn pieces(text: &str) -> impl Iterator<Item = (usize, &str)> {
    let bytes = text.as_bytes();
    let letter = |at: usize| bytes.get(at).is_some_and(u8::is_ascii_alphabetic);
    let cut = move |at: usize| bytes[at] == b' ' && bytes[at - 1].is_ascii_graphic() && letter(at + 1);
    let mut start = 0;
    std::iter::from_fn(move || {
        if start >= bytes.len() {
            return None;
        }
        let from = start;
        start = (from + 1..bytes.len()).find(|at| cut(*at)).unwrap_or(bytes.len());
        Some((from, &text[from..start]))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_are_taken_apart_before_words_only() {
        let check = |text: &str, expected: &[&str]| {
            let found: Vec<&str> = pieces(text).map(|it| it.1).collect();
            assert_eq!(found, expected);
            assert_eq!(found.concat(), text);
        };
        check("one two  three, four 5 six", &["one", " two  three,", " four 5", " six"]);
        check(" a b\n c é d", &[" a", " b\n c é d"]);
        check("", &[]);
    }

    #[test]
    fn only_known_patterns_are_taken() {
        let byte_level = |regex: bool| serde_json::json!({"type": "ByteLevel", "add_prefix_space": false, "use_regex": regex});
        let split = |pattern: &str| {
            serde_json::json!({"type": "Sequence", "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": false}, byte_level(false)]})
        };
        assert!(cuts_words(&byte_level(true)));
        assert!(!cuts_words(&byte_level(false)));
        assert!(cuts_words(&split(r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}")));
        assert!(!cuts_words(&split(r"\w+ \w+")));
        assert!(!cuts_words(&serde_json::json!({"type": "Metaspace"})));
        assert!(!cuts_words(
            &serde_json::json!({"type": "ByteLevel", "add_prefix_space": true, "use_regex": true})
        ));
    }
}
