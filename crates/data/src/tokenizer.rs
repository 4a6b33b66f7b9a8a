//! Text to token ids and back, from a Hugging Face folder or a GGUF vocabulary.
//!
//! Two ways in: [`Tokenizer::encode_with_control`] recognises control tokens (`<|im_end|>`) in the text, as
//! transformers does; [`Tokenizer::encode_plain`] does not, so that what a person typed stays text. *Control*
//! means special; other added tokens (runs of spaces, `<think>`) are part of the vocabulary in both.

mod save;

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::Path;
use std::sync::OnceLock;

use serde_json::{Map, Value};
use tokenizers::decoders::DecoderWrapper;
use tokenizers::pre_tokenizers::PreTokenizerWrapper;
use tokenizers::pre_tokenizers::metaspace::PrependScheme;

use crate::error::{Error, Result, read_file};
use crate::gguf_vocabulary::{self, GgufVocabulary};
use crate::template::Template;
use crate::words::Words;

pub use save::Added;

/// A tokenizer with its special tokens and chat template.
pub struct Tokenizer {
    name: String,
    /// Without its post-processor: what that adds is in `prefix` and `suffix`.
    inner: tokenizers::Tokenizer,
    plain: OnceLock<Plain>,
    words: OnceLock<Option<Words>>,
    control: OnceLock<Vec<String>>,
    prefix: Vec<u32>,
    suffix: Vec<u32>,
    special_tokens: BTreeMap<String, String>,
    chat_template: Option<Value>,
    /// `tokenizer.json` as it was read, to be saved unchanged.
    original: Option<Vec<u8>>,
    config: Map<String, Value>,
    /// Added tokens that the vocabulary didn't have.
    new_tokens: Vec<String>,
}

/// Encoders that take control tokens for text: at the start of a text, and after something else.
struct Plain {
    at_start: tokenizers::Tokenizer,
    later: Option<tokenizers::Tokenizer>,
}

/// Token ids with the bytes of the text each stands for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Encoded {
    /// Token ids.
    pub ids: Vec<u32>,
    /// For each id, the byte range of the text; tokens that share one character share its range.
    pub ranges: Vec<Range<usize>>,
}

const SPECIAL_KEYS: [&str; 7] =
    ["bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"];

impl std::fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Tokenizer").field("name", &self.name).field("special", &self.special_tokens).finish()
    }
}

impl Tokenizer {
    /// Reads `tokenizer.json`, and where present `tokenizer_config.json`, `special_tokens_map.json` and
    /// `chat_template.jinja` (which wins over the configuration's `chat_template`).
    pub fn from_folder(folder: &Path) -> Result<Tokenizer> {
        let name = folder.display().to_string();
        let file = folder.join("tokenizer.json");
        let bytes = read_file(&file)?;
        let wrong = |message: String| Error::Tokenizer { name: file.display().to_string(), message };
        let mut inner =
            tokenizers::Tokenizer::from_bytes(&bytes).map_err(|error| wrong(error.to_string()))?;
        // Padding and truncation of the file are other programs' settings.
        inner.with_padding(None);
        inner.with_truncation(None).map_err(|error| wrong(error.to_string()))?;
        let (prefix, suffix) = added_around(&inner).map_err(|error| wrong(error.to_string()))?;
        inner.with_post_processor(None::<tokenizers::PostProcessorWrapper>);
        let config = read_object(&folder.join("tokenizer_config.json"))?;
        let map = read_object(&folder.join("special_tokens_map.json"))?;
        let mut special_tokens = BTreeMap::new();
        for key in SPECIAL_KEYS {
            let token = config.get(key).filter(|token| !token.is_null()).or_else(|| map.get(key));
            if let Some(token) = token.and_then(token_text) {
                special_tokens.insert(key.to_string(), token);
            }
        }
        let jinja = folder.join("chat_template.jinja");
        let chat_template = if jinja.is_file() {
            let text = String::from_utf8(read_file(&jinja)?).map_err(|_| Error::Template {
                name: jinja.display().to_string(),
                message: "not UTF-8 text".to_string(),
            })?;
            Some(Value::from(text))
        } else {
            config.get("chat_template").filter(|template| !template.is_null()).cloned()
        };
        let (plain, words, control) = (OnceLock::new(), OnceLock::new(), OnceLock::new());
        let original = Some(bytes);
        Ok(Tokenizer {
            name,
            inner,
            plain,
            words,
            control,
            prefix,
            suffix,
            special_tokens,
            chat_template,
            original,
            config,
            new_tokens: Vec::new(),
        })
    }

    /// Builds the tokenizer a GGUF file describes. Fails on an unknown `tokenizer.ggml.pre`, by name.
    pub fn from_gguf(vocabulary: &GgufVocabulary) -> Result<Tokenizer> {
        let inner = gguf_vocabulary::build(vocabulary)?;
        let mut special_tokens = BTreeMap::new();
        for (key, id) in [
            ("bos_token", vocabulary.bos),
            ("eos_token", vocabulary.eos),
            ("unk_token", vocabulary.unk),
            ("pad_token", vocabulary.pad),
        ] {
            let Some(id) = id else { continue };
            let token = vocabulary.tokens.get(id as usize).ok_or_else(|| Error::Tokenizer {
                name: vocabulary.pre.clone(),
                message: format!("{key} has id {id}, but there are only {} tokens", vocabulary.tokens.len()),
            })?;
            special_tokens.insert(key.to_string(), token.clone());
        }
        let prefix = vocabulary.bos.filter(|_| vocabulary.adds_bos()).into_iter().collect();
        Ok(Tokenizer {
            name: format!("{}/{}", vocabulary.model, vocabulary.pre),
            inner,
            plain: OnceLock::new(),
            words: OnceLock::new(),
            control: OnceLock::new(),
            prefix,
            suffix: Vec::new(),
            special_tokens,
            chat_template: vocabulary.chat_template.clone().map(Value::from),
            original: None,
            config: Map::new(),
            new_tokens: Vec::new(),
        })
    }

    /// What a GGUF file says of this tokenizer, for llama.cpp; and where llama.cpp cuts text otherwise.
    ///
    /// # Errors
    /// When it is of a kind that GGUF files don't have, or its pre-tokenizer isn't known.
    pub fn gguf_vocabulary(&self) -> Result<(GgufVocabulary, Vec<String>)> {
        let (mut vocabulary, mut notes) =
            gguf_vocabulary::describe::describe(&self.inner).map_err(|message| self.error(message))?;
        (vocabulary.bos, vocabulary.eos) = (self.bos(), self.eos());
        (vocabulary.unk, vocabulary.pad) = (self.unk(), self.pad());
        let around =
            |ids: &[u32], own: Option<u32>, what: &str| match ids {
                [] => Ok(false),
                [id] if Some(*id) == own => Ok(true),
                _ => Err(self
                    .error(format!("it puts other tokens than {what} around a text, which GGUF can't say"))),
            };
        vocabulary.add_bos = Some(around(&self.prefix, self.bos(), "bos_token")?);
        vocabulary.add_eos = Some(around(&self.suffix, self.eos(), "eos_token")?);
        match &self.chat_template {
            Some(Value::Array(list)) => {
                for entry in list {
                    let (name, template) = (entry["name"].as_str(), entry["template"].as_str());
                    match (name, template) {
                        (Some("default"), Some(text)) => vocabulary.chat_template = Some(text.to_string()),
                        (Some(name), Some(text)) => {
                            vocabulary.more_templates.push((name.to_string(), text.to_string()))
                        }
                        _ => {}
                    }
                }
            }
            template => {
                vocabulary.chat_template = template.as_ref().and_then(Value::as_str).map(str::to_string)
            }
        }
        let probe = gguf_vocabulary::describe::PROBE;
        if Tokenizer::from_gguf(&vocabulary)?.encode_plain(probe)? != self.encode_plain(probe)? {
            notes.push("llama.cpp will cut some texts into other tokens than this tokenizer".to_string());
        }
        Ok((vocabulary, notes))
    }

    /// What it was made from.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// What differs where two tokenizers give different tokens; a key for what is made with one.
    ///
    /// # Errors
    /// When the tokenizer can't be written.
    pub fn identity(&self) -> Result<String> {
        let inner = self
            .inner
            .to_string(false)
            .map_err(|error| Error::Tokenizer { name: self.name.clone(), message: error.to_string() })?;
        Ok(format!("{inner} {:?} {:?} {:?}", self.prefix, self.suffix, self.special_tokens))
    }

    /// Number of tokens, added ones included; the model's embedding may have more rows.
    pub fn vocabulary_size(&self) -> usize {
        self.inner.get_vocab_size(true)
    }

    /// `bos_token`, `eos_token`, `unk_token`, `pad_token` … by the names templates use.
    pub fn special_tokens(&self) -> &BTreeMap<String, String> {
        &self.special_tokens
    }

    /// Id of `bos_token`.
    pub fn bos(&self) -> Option<u32> {
        self.special("bos_token")
    }

    /// Whether a text by itself begins with `bos_token`.
    pub fn adds_bos(&self) -> bool {
        self.bos().is_some_and(|bos| self.prefix == [bos])
    }

    /// Id of `eos_token`.
    pub fn eos(&self) -> Option<u32> {
        self.special("eos_token")
    }

    /// Id of `pad_token`.
    pub fn pad(&self) -> Option<u32> {
        self.special("pad_token")
    }

    /// Id of `unk_token`.
    pub fn unk(&self) -> Option<u32> {
        self.special("unk_token")
    }

    fn special(&self, key: &str) -> Option<u32> {
        self.inner.token_to_id(self.special_tokens.get(key)?)
    }

    /// The `chat_template` value: a text, or a list of named texts.
    pub fn chat_template(&self) -> Option<&Value> {
        self.chat_template.as_ref()
    }

    /// Takes another chat template, for encoding and for [`Tokenizer::save`].
    pub fn set_chat_template(&mut self, template: Value) {
        self.chat_template = Some(template);
    }

    /// The parsed chat template. Fails where there is none, or it does not parse.
    pub fn template(&self) -> Result<Template> {
        let source = self.chat_template.as_ref().ok_or_else(|| Error::Template {
            name: self.name.clone(),
            message: "the model has no chat template; give one with `chat_template`".to_string(),
        })?;
        Template::from_value(&self.name, source, &self.special_tokens)
    }

    /// Id of a token by its exact text in the vocabulary.
    pub fn token_to_id(&self, token: &str) -> Option<u32> {
        self.inner.token_to_id(token)
    }

    /// Whether `id` is an added token that is special: a control token.
    pub fn is_control(&self, id: u32) -> bool {
        self.inner.get_added_vocabulary().get_added_tokens_decoder().get(&id).is_some_and(|t| t.special)
    }

    /// Texts of all control tokens, sorted.
    pub fn control_tokens(&self) -> &[String] {
        self.control.get_or_init(|| {
            let added = self.inner.get_added_vocabulary().get_added_tokens_decoder();
            let control = added.values().filter(|token| token.special);
            let mut tokens: Vec<String> = control.map(|token| token.content.clone()).collect();
            tokens.sort();
            tokens
        })
    }

    /// Whether `token` is an added token, special or not, that text is cut at.
    pub fn is_added(&self, token: &str) -> bool {
        self.inner.get_added_vocabulary().get_vocab().contains_key(token)
    }

    /// Ids of `text`; control tokens in it are text like any other.
    pub fn encode_plain(&self, text: &str) -> Result<Vec<u32>> {
        let encoding = self.plain()?.at_start.encode_fast(text, false);
        Ok(encoding.map_err(|error| self.error(error.to_string()))?.get_ids().to_vec())
    }

    /// Ids of `text`; control tokens in it are recognised. Nothing is added around it.
    pub fn encode_with_control(&self, text: &str) -> Result<Vec<u32>> {
        let encoding = self.inner.encode_fast(text, false);
        Ok(encoding.map_err(|error| self.error(error.to_string()))?.get_ids().to_vec())
    }

    /// A text by itself, as transformers' `tokenizer(text)` has it: control tokens recognised, BOS (or whatever the
    /// tokenizer adds) around it unless the text already starts with it; and EOS at the end, once. Tokens that are added
    /// stand for no byte of the text.
    pub fn encode_document(&self, text: &str) -> Result<Encoded> {
        let mut all = encoded(&self.inner, text, 0).map_err(|error| self.error(error.to_string()))?;
        if !all.ids.starts_with(&self.prefix) {
            all.ids.splice(0..0, self.prefix.iter().copied());
            all.ranges.splice(0..0, self.prefix.iter().map(|_| 0..0));
        }
        all.ids.extend(&self.suffix);
        if let Some(eos) = self.eos().filter(|eos| all.ids.last() != Some(eos)) {
            all.ids.push(eos);
        }
        all.ranges.resize(all.ids.len(), text.len()..text.len());
        Ok(all)
    }

    /// Ids of `text` with their byte ranges. Control tokens are recognised, except where they touch `typed`:
    /// byte ranges, in order, that a person wrote.
    pub fn encode_segments(&self, text: &str, typed: &[Range<usize>]) -> Result<Encoded> {
        let words = self.words.get_or_init(|| Words::of(&self.inner));
        let whole = match words {
            Some(words) => words.encode(&self.inner, text),
            None => encoded(&self.inner, text, 0),
        };
        let whole = whole.map_err(|error| self.error(error.to_string()))?;
        let touches = |range: &Range<usize>| {
            typed.iter().any(|typed| typed.start < range.end && range.start < typed.end)
        };
        let control = |at: &usize| self.is_control(whole.ids[*at]);
        if !(0..whole.ids.len()).filter(control).any(|at| touches(&whole.ranges[at])) {
            return Ok(whole);
        }
        // The control tokens that remain are hard boundaries; what lies between is encoded as plain text.
        let mut out = Encoded::default();
        let mut start = 0;
        let boundaries = (0..whole.ids.len()).filter(control).filter(|at| !touches(&whole.ranges[*at]));
        for at in boundaries {
            let range = whole.ranges[at].clone();
            self.encode_between(text, start..range.start, &mut out)?;
            start = range.end;
            out.ids.push(whole.ids[at]);
            out.ranges.push(range);
        }
        self.encode_between(text, start..text.len(), &mut out)?;
        Ok(out)
    }

    fn encode_between(&self, text: &str, range: Range<usize>, out: &mut Encoded) -> Result<()> {
        if range.is_empty() {
            return Ok(());
        }
        let plain = self.plain()?;
        let encoder = match &plain.later {
            Some(later) if range.start > 0 => later,
            _ => &plain.at_start,
        };
        let piece = encoded(encoder, &text[range.clone()], range.start);
        let piece = piece.map_err(|error| self.error(error.to_string()))?;
        out.ids.extend(piece.ids);
        out.ranges.extend(piece.ranges);
        Ok(())
    }

    fn plain(&self) -> Result<&Plain> {
        if let Some(plain) = self.plain.get() {
            return Ok(plain);
        }
        let mut at_start = self.inner.clone();
        at_start.set_encode_special_tokens(true);
        // A Metaspace that marks only the beginning of a text must not mark the beginning of a later segment.
        let later = match at_start.get_pre_tokenizer() {
            Some(PreTokenizerWrapper::Metaspace(space))
                if space.get_prepend_scheme() == PrependScheme::First =>
            {
                let mut space = space.clone();
                space.set_prepend_scheme(PrependScheme::Never);
                let mut later = at_start.clone();
                later.with_pre_tokenizer(Some(PreTokenizerWrapper::Metaspace(space)));
                Some(later)
            }
            _ => None,
        };
        Ok(self.plain.get_or_init(|| Plain { at_start, later }))
    }

    /// Text of `ids`; control tokens are left out where `skip_control`. An incomplete character becomes U+FFFD.
    pub fn decode(&self, ids: &[u32], skip_control: bool) -> Result<String> {
        self.inner.decode(ids, skip_control).map_err(|error| self.error(error.to_string()))
    }

    /// A decoder that gives out text as tokens arrive; control tokens are left out where `skip_control`.
    pub fn stream(&self, skip_control: bool) -> TokenStream<'_> {
        TokenStream { tokenizer: self, skip_control, ids: Vec::new(), given: 0 }
    }

    /// The token as the vocabulary writes it (`Ġthe`, `▁the`, `<|im_end|>`).
    pub fn piece(&self, id: u32) -> Option<String> {
        self.inner.id_to_token(id)
    }

    /// The bytes a token stands for, which need not be whole characters.
    pub fn token_bytes(&self, id: u32) -> Option<Vec<u8>> {
        let piece = self.inner.id_to_token(id)?;
        if let Some(added) = self.inner.get_added_vocabulary().get_added_tokens_decoder().get(&id) {
            return Some(added.content.clone().into_bytes());
        }
        if matches!(self.inner.get_decoder(), Some(DecoderWrapper::ByteLevel(_))) {
            return Some(piece.chars().flat_map(byte_of_alphabet).collect());
        }
        if let Some(byte) = piece.strip_prefix("<0x").and_then(|hex| hex.strip_suffix('>'))
            && let Ok(byte) = u8::from_str_radix(byte, 16)
        {
            return Some(vec![byte]);
        }
        Some(piece.replace('▁', " ").into_bytes())
    }

    fn error(&self, message: String) -> Error {
        Error::Tokenizer { name: self.name.clone(), message }
    }
}

/// Gives out text as tokens arrive, whole characters only.
#[derive(Debug)]
pub struct TokenStream<'a> {
    tokenizer: &'a Tokenizer,
    skip_control: bool,
    /// Tokens whose text may still change the spacing of what follows.
    ids: Vec<u32>,
    /// How many of `ids` have been given out.
    given: usize,
}

impl TokenStream<'_> {
    /// Takes one token and returns the text that is now certain; empty while a character is incomplete.
    pub fn push(&mut self, id: u32) -> Result<String> {
        self.ids.push(id);
        let before = self.tokenizer.decode(&self.ids[..self.given], self.skip_control)?;
        let now = self.tokenizer.decode(&self.ids, self.skip_control)?;
        if now.ends_with('\u{FFFD}') || now.len() <= before.len() {
            return Ok(String::new());
        }
        let Some(text) = now.strip_prefix(before.as_str()) else { return Ok(String::new()) };
        let text = text.to_string();
        // The last given tokens stay as context, because decoders treat the first token of a text differently.
        self.ids.drain(..self.given);
        self.given = self.ids.len();
        Ok(text)
    }

    /// What is left when no more tokens come: an incomplete character, as U+FFFD.
    pub fn finish(self) -> Result<String> {
        let before = self.tokenizer.decode(&self.ids[..self.given], self.skip_control)?;
        let now = self.tokenizer.decode(&self.ids, self.skip_control)?;
        Ok(now.strip_prefix(before.as_str()).unwrap_or_default().to_string())
    }
}

fn encoded(
    tokenizer: &tokenizers::Tokenizer,
    text: &str,
    offset: usize,
) -> Result<Encoded, tokenizers::Error> {
    let encoding = tokenizer.encode(text, false)?;
    let ranges = encoding.get_offsets().iter().map(|(start, end)| start + offset..end + offset).collect();
    Ok(Encoded { ids: encoding.get_ids().to_vec(), ranges })
}

/// What the post-processor puts before and after a text.
fn added_around(tokenizer: &tokenizers::Tokenizer) -> Result<(Vec<u32>, Vec<u32>), tokenizers::Error> {
    let with = tokenizer.encode_fast("a", true)?.get_ids().to_vec();
    let without = tokenizer.encode_fast("a", false)?.get_ids().to_vec();
    let at = with.windows(without.len().max(1)).position(|window| window == without);
    Ok(match at {
        Some(at) => (with[..at].to_vec(), with[at + without.len()..].to_vec()),
        None => (Vec::new(), Vec::new()),
    })
}

/// GPT-2's alphabet backwards: printable bytes are themselves, the others were moved to U+0100 and up.
fn byte_of_alphabet(c: char) -> Vec<u8> {
    let printable = |byte: u32| matches!(byte, 0x21..=0x7E | 0xA1..=0xAC | 0xAE..=0xFF);
    let code = c as u32;
    if printable(code) {
        return vec![code as u8];
    }
    let moved = (0..256).filter(|byte| !printable(*byte)).nth((code as usize).wrapping_sub(256));
    match moved {
        Some(byte) => vec![byte as u8],
        None => c.to_string().into_bytes(),
    }
}

fn token_text(token: &Value) -> Option<String> {
    Some(token.as_str().or_else(|| token.get("content")?.as_str())?.to_string())
}

/// A JSON object from a file; empty where there is no such file.
fn read_object(path: &Path) -> Result<Map<String, Value>> {
    if !path.is_file() {
        return Ok(Map::new());
    }
    let bytes = read_file(path)?;
    serde_json::from_slice(&bytes).map_err(|error| Error::Tokenizer {
        name: path.display().to_string(),
        message: format!("not a JSON object: {error}"),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::test_support::{tokenizer, vocabulary};

    #[test]
    fn control_tokens_are_recognised_or_not() {
        let tokenizer = tokenizer();
        let check = |text: &str, control: usize, plain: usize| {
            assert_eq!(tokenizer.encode_with_control(text).unwrap().len(), control, "{text}");
            assert_eq!(tokenizer.encode_plain(text).unwrap().len(), plain, "{text}");
        };
        check("ab", 2, 2);
        check("a<s>b", 3, 5);
        check("é", 2, 2);
        check("", 0, 0);
    }

    /// Word by word is the same as the whole, for every tokenizer of which that is believed.
    #[test]
    fn texts_in_pieces_give_the_same_tokens() {
        let tokenizer = tokenizer();
        let words = Words::of(&tokenizer.inner).expect("a known pattern");
        let shapes = [
            "one two",
            "  x",
            " (a b)",
            "don't we 're",
            "a\nb c\n\n d",
            "é ü",
            "1 a 2b",
            "<|im_start|>user x",
            "I.e. a, b; c",
            "\u{a0}a b",
            "ß a's b",
        ];
        let mut text = String::new();
        for round in 0..400u64 {
            let shape = shapes[(crate::batch::mix(round) % shapes.len() as u64) as usize];
            text.push_str(shape);
            if round % 3 == 0 {
                text.push(' ');
            }
            let (whole, pieces) =
                (encoded(&tokenizer.inner, &text, 0), words.encode(&tokenizer.inner, &text));
            assert_eq!(pieces.unwrap(), whole.unwrap(), "{text}");
            if text.len() > 200 {
                text.clear();
            }
        }
    }

    #[test]
    fn typed_control_tokens_stay_text() {
        let tokenizer = tokenizer();
        let check = |text: &str, typed: Option<Range<usize>>, expected: &[&str]| {
            let encoded = tokenizer.encode_segments(text, typed.as_slice()).unwrap();
            let pieces: Vec<&str> = encoded.ranges.iter().map(|range| &text[range.clone()]).collect();
            assert_eq!(pieces, expected);
            let decoded = tokenizer.decode(&encoded.ids, false).unwrap();
            assert_eq!(decoded, text);
        };
        check("<s>a</s>", None, &["<s>", "a", "</s>"]);
        check("<s>a</s>", Some(4..8), &["<s>", "a", "<", "/", "s", ">"]);
        check("<s><s>é", Some(0..3), &["<", "s", ">", "<s>", "é", "é"]);
    }

    #[test]
    fn streaming_gives_whole_characters() {
        let tokenizer = tokenizer();
        let text = "a 你😀é!";
        let mut stream = tokenizer.stream(true);
        let mut pieces = Vec::new();
        for id in tokenizer.encode_with_control(&format!("{text}<|im_end|>")).unwrap() {
            pieces.push(stream.push(id).unwrap());
        }
        assert_eq!(pieces.concat(), text);
        assert!(pieces.iter().all(|piece| !piece.contains('\u{FFFD}')));
        let mut stream = tokenizer.stream(true);
        assert_eq!(stream.push(tokenizer.encode_plain("é").unwrap()[0]).unwrap(), "");
        assert_eq!(stream.finish().unwrap(), "\u{FFFD}");
    }

    #[test]
    fn bytes_of_tokens() {
        let tokenizer = tokenizer();
        for (id, byte) in tokenizer.encode_plain("é \n").unwrap().into_iter().zip("é \n".bytes()) {
            assert_eq!(tokenizer.token_bytes(id), Some(vec![byte]));
        }
        assert_eq!(tokenizer.token_bytes(257), Some(b"<|im_end|>".to_vec()));
        assert_eq!(
            (tokenizer.piece(257).as_deref(), tokenizer.token_bytes(9999)),
            (Some("<|im_end|>"), None)
        );
    }

    #[test]
    fn saved_and_read_again() {
        let mut vocabulary = vocabulary();
        vocabulary.add_bos = Some(true);
        let first = Tokenizer::from_gguf(&vocabulary).unwrap();
        let folder = std::env::temp_dir().join(format!("ferrotune-data-{}-save", std::process::id()));
        for again in ["a", "b"] {
            std::fs::create_dir_all(folder.join(again)).unwrap();
        }
        first.save(&folder.join("a")).unwrap();
        let second = Tokenizer::from_folder(&folder.join("a")).unwrap();
        second.save(&folder.join("b")).unwrap();
        for file in
            ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"]
        {
            let read = |again: &str| std::fs::read(folder.join(again).join(file)).unwrap();
            assert_eq!(read("a"), read("b"), "{file}");
        }
        std::fs::remove_dir_all(&folder).unwrap();
        let text = "<|im_start|>x 1234\né<|im_end|>";
        assert_eq!(first.encode_with_control(text).unwrap(), second.encode_with_control(text).unwrap());
        assert_eq!(first.encode_document("x").unwrap(), second.encode_document("x").unwrap());
        assert_eq!(second.encode_document("<|im_start|>x").unwrap().ids.len(), 3);
        assert_eq!((second.bos(), second.eos(), second.pad()), (Some(256), Some(257), None));
        assert_eq!(first.chat_template(), second.chat_template());
    }

    #[test]
    fn tokens_can_be_added() {
        let mut tokenizer = tokenizer();
        let before = tokenizer.vocabulary_size();
        tokenizer.add_tokens(&["<|im_end|>".to_string(), "<x>".to_string()], Added::Control).unwrap();
        tokenizer.add_tokens(&["word".to_string()], Added::Plain).unwrap();
        assert_eq!(tokenizer.new_tokens(), ["<x>", "word"]);
        let ids = tokenizer.encode_with_control("<x>a word").unwrap();
        assert_eq!((ids[0], *ids.last().unwrap()), (before as u32, before as u32 + 1));
        assert!(tokenizer.is_control(ids[0]) && !tokenizer.is_control(ids[3]));
        assert_eq!(tokenizer.encode_plain("<x>").unwrap().len(), 3);
        let folder = std::env::temp_dir().join(format!("ferrotune-data-{}-added", std::process::id()));
        std::fs::create_dir_all(&folder).unwrap();
        tokenizer.save(&folder).unwrap();
        let mut read = Tokenizer::from_folder(&folder).unwrap();
        assert_eq!(read.encode_with_control("<x>a word").unwrap(), ids);
        // Once more, with a file to keep.
        read.add_tokens(&["<y>".to_string()], Added::Control).unwrap();
        read.set_special_token("eos_token", "<y>").unwrap();
        read.save(&folder).unwrap();
        let read = Tokenizer::from_folder(&folder).unwrap();
        assert_eq!(
            (read.eos(), read.encode_with_control("<y>").unwrap()),
            (Some(before as u32 + 2), vec![before as u32 + 2])
        );
        std::fs::remove_dir_all(&folder).unwrap();
        let error = tokenizer.set_special_token("eos_token", "<none>").unwrap_err().to_string();
        assert!(error.contains("has no token `<none>`"), "{error}");
    }

    #[test]
    fn what_is_wrong_is_named() {
        let check = |change: &dyn Fn(&mut GgufVocabulary), expected: &str| {
            let mut vocabulary = vocabulary();
            change(&mut vocabulary);
            assert_eq!(Tokenizer::from_gguf(&vocabulary).unwrap_err().to_string(), expected);
        };
        check(
            &|v| v.pre = "novel".to_string(),
            "tokenizer `gpt2/novel`: unknown pre-tokenizer `novel` in `tokenizer.ggml.pre`; use the model's folder \
             with tokenizer.json instead of the GGUF file",
        );
        check(
            &|v| v.model = "bert".to_string(),
            "tokenizer `bert/smollm`: `tokenizer.ggml.model` is `bert`; expected `gpt2` or `llama` (others are not \
             there yet)",
        );
        check(
            &|v| v.merges = vec!["ab".to_string()],
            "tokenizer `gpt2/smollm`: merge 0 `ab` is not two parts with a space",
        );
        check(
            &|v| v.eos = Some(999),
            "tokenizer `smollm`: eos_token has id 999, but there are only 260 tokens",
        );
        check(&|v| v.token_types = vec![1], "tokenizer `gpt2/smollm`: 1 token types for 260 tokens");
    }
}
