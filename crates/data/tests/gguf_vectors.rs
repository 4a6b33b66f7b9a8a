//! llama.cpp's own tokenizer vectors on vocabularies out of GGUF files, where they are beside the checkout.

use std::path::{Path, PathBuf};

use ferrotune_data::{GgufVocabulary, Tokenizer};

/// Reads the metadata of a GGUF file: just enough for the vocabulary.
struct Reader<'a> {
    bytes: &'a [u8],
}

#[derive(Debug)]
enum Item {
    Number(f64),
    Text(String),
    List(Vec<Item>),
}

impl Reader<'_> {
    fn take<const N: usize>(&mut self) -> [u8; N] {
        let (head, rest) = self.bytes.split_at(N);
        self.bytes = rest;
        head.try_into().unwrap()
    }

    fn text(&mut self) -> String {
        let length = u64::from_le_bytes(self.take()) as usize;
        let (head, rest) = self.bytes.split_at(length);
        self.bytes = rest;
        String::from_utf8_lossy(head).into_owned()
    }

    fn item(&mut self, kind: u32) -> Item {
        Item::Number(match kind {
            0 | 7 => f64::from(self.take::<1>()[0]),
            1 => f64::from(i8::from_le_bytes(self.take())),
            2 => f64::from(u16::from_le_bytes(self.take())),
            3 => f64::from(i16::from_le_bytes(self.take())),
            4 => f64::from(u32::from_le_bytes(self.take())),
            5 => f64::from(i32::from_le_bytes(self.take())),
            6 => f64::from(f32::from_le_bytes(self.take())),
            10 => u64::from_le_bytes(self.take()) as f64,
            11 => i64::from_le_bytes(self.take()) as f64,
            12 => f64::from_le_bytes(self.take()),
            8 => return Item::Text(self.text()),
            9 => {
                let kind = u32::from_le_bytes(self.take());
                let length = u64::from_le_bytes(self.take());
                return Item::List((0..length).map(|_| self.item(kind)).collect());
            }
            other => panic!("unknown kind {other}"),
        })
    }
}

fn vocabulary(path: &Path) -> GgufVocabulary {
    let file = std::fs::read(path).unwrap();
    let mut reader = Reader { bytes: &file };
    assert_eq!(&reader.take::<4>(), b"GGUF");
    let _version: [u8; 4] = reader.take();
    let _tensors: [u8; 8] = reader.take();
    let count = u64::from_le_bytes(reader.take());
    let mut vocabulary = GgufVocabulary::default();
    let texts = |list: Vec<Item>| -> Vec<String> {
        list.into_iter().map(|item| if let Item::Text(t) = item { t } else { panic!() }).collect()
    };
    let numbers = |list: Vec<Item>| -> Vec<f64> {
        list.into_iter().map(|item| if let Item::Number(n) = item { n } else { panic!() }).collect()
    };
    for _ in 0..count {
        let key = reader.text();
        let kind = u32::from_le_bytes(reader.take());
        match (key.as_str(), reader.item(kind)) {
            ("tokenizer.ggml.model", Item::Text(text)) => vocabulary.model = text,
            ("tokenizer.ggml.pre", Item::Text(text)) => vocabulary.pre = text,
            ("tokenizer.chat_template", Item::Text(text)) => vocabulary.chat_template = Some(text),
            ("tokenizer.ggml.tokens", Item::List(list)) => vocabulary.tokens = texts(list),
            ("tokenizer.ggml.merges", Item::List(list)) => vocabulary.merges = texts(list),
            ("tokenizer.ggml.scores", Item::List(list)) => {
                vocabulary.scores = numbers(list).into_iter().map(|n| n as f32).collect();
            }
            ("tokenizer.ggml.token_type", Item::List(list)) => {
                vocabulary.token_types = numbers(list).into_iter().map(|n| n as i32).collect();
            }
            ("tokenizer.ggml.bos_token_id", Item::Number(n)) => vocabulary.bos = Some(n as u32),
            ("tokenizer.ggml.eos_token_id", Item::Number(n)) => vocabulary.eos = Some(n as u32),
            ("tokenizer.ggml.unknown_token_id", Item::Number(n)) => vocabulary.unk = Some(n as u32),
            ("tokenizer.ggml.padding_token_id", Item::Number(n)) => vocabulary.pad = Some(n as u32),
            ("tokenizer.ggml.add_bos_token", Item::Number(n)) => vocabulary.add_bos = Some(n != 0.0),
            ("tokenizer.ggml.add_space_prefix", Item::Number(n)) => {
                vocabulary.add_space_prefix = Some(n != 0.0);
            }
            _ => {}
        }
    }
    vocabulary
}

fn folder() -> Option<PathBuf> {
    let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../../shared/data/llama.cpp/vocab");
    let present = folder.is_dir();
    if !present {
        eprintln!("skipped: {} is not there", folder.display());
    }
    present.then_some(folder)
}

fn check(name: &str, expected_right: usize) {
    let Some(folder) = folder() else { return };
    let tokenizer =
        Tokenizer::from_gguf(&vocabulary(&folder.join(format!("ggml-vocab-{name}.gguf")))).unwrap();
    // What it is said to be again is the same, whatever its name is among those that cut alike.
    let (again, notes) = tokenizer.gguf_vocabulary().unwrap();
    let original = vocabulary(&folder.join(format!("ggml-vocab-{name}.gguf")));
    assert!(notes.is_empty(), "{name}: {notes:?}");
    assert_eq!(
        (&again.model, &again.tokens, &again.merges),
        (&original.model, &original.tokens, &original.merges)
    );
    let differ = again.token_types.iter().zip(&original.token_types).filter(|(a, b)| a != b).count();
    eprintln!("{name}: {} for {}, {differ} types differ", again.pre, original.pre);
    let again = Tokenizer::from_gguf(&again).unwrap();
    let texts = std::fs::read_to_string(folder.join(format!("ggml-vocab-{name}.gguf.inp"))).unwrap();
    let ids = std::fs::read_to_string(folder.join(format!("ggml-vocab-{name}.gguf.out"))).unwrap();
    let texts: Vec<&str> = texts.split("\n__ggml_vocab_test__\n").collect();
    let mut right = 0;
    for (text, line) in texts.iter().zip(ids.split('\n')) {
        let expected: Vec<u32> = line.split_whitespace().map(|id| id.parse().unwrap()).collect();
        let ours = tokenizer.encode_plain(text).unwrap();
        assert_eq!(again.encode_plain(text).unwrap(), ours, "{name}: {text:?}");
        right += usize::from(ours == expected);
        if ours != expected {
            eprintln!("{name}: {text:?}\n  ours {ours:?}\n  want {expected:?}");
        }
    }
    assert_eq!((right, texts.len()), (expected_right, 47), "{name}");
}

#[test]
fn llama_bpe() {
    check("llama-bpe", 47);
}

#[test]
fn qwen2() {
    check("qwen2", 47);
}

#[test]
fn gpt_2() {
    check("gpt-2", 47);
}

#[test]
fn deepseek_coder() {
    check("deepseek-coder", 47);
}

#[test]
fn phi_3() {
    check("phi-3", 47);
}

#[test]
fn llama_spm() {
    check("llama-spm", 47);
}

#[test]
fn building_is_quick() {
    let Some(path) = std::env::var_os("FERROTUNE_TEST_GGUF") else { return };
    let vocabulary = vocabulary(Path::new(&path));
    let start = std::time::Instant::now();
    let tokenizer = Tokenizer::from_gguf(&vocabulary).unwrap();
    let built = start.elapsed();
    eprintln!(
        "{} {} tokens, {} merges: {built:?}; bos {:?} eos {:?} add_bos {:?}\n{:?}\n{:?}",
        vocabulary.pre,
        vocabulary.tokens.len(),
        vocabulary.merges.len(),
        vocabulary.bos,
        vocabulary.eos,
        vocabulary.add_bos,
        tokenizer,
        tokenizer.chat_template(),
    );
    assert!(built.as_millis() < 150, "{built:?}");
}

/// tokenizer.json as it is published: merges as pairs and as strings, SentencePiece's without its scores.
#[test]
fn tokenizers_of_folders_say_what_llama_cpp_reads() {
    let tests = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures");
    let shared = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../../shared/data");
    let folders = [(tests.join("llama_tiny"), "smollm"), (shared.join("stories260k/hf"), "default")];
    let texts =
        "Once upon a time,  there was a   little girl. ünïcode 🙂\n\nShe's 3 or 12345!\t\tEnd <s> </s>";
    for (folder, pre) in folders.iter().filter(|it| it.0.is_dir()) {
        assert_eq!(said_again(folder, &[texts]), (pre.to_string(), Vec::new()), "{}", folder.display());
    }
}

/// What llama.cpp reads of a tokenizer cuts texts as the tokenizer does, where nothing is said against it; gives how it cuts them, and
/// what is said.
fn said_again(folder: &Path, texts: &[&str]) -> (String, Vec<String>) {
    let tokenizer = Tokenizer::from_folder(folder).unwrap();
    let (vocabulary, notes) = tokenizer.gguf_vocabulary().unwrap();
    let again = Tokenizer::from_gguf(&vocabulary).unwrap();
    let texts = if notes.is_empty() { texts } else { &[] };
    for text in texts.iter().flat_map(|text| text.split_inclusive(' ').chain([*text])) {
        let plain = |it: &Tokenizer| it.encode_plain(text).unwrap();
        assert_eq!(plain(&again), plain(&tokenizer), "{}: {text:?}", folder.display());
        let control = |it: &Tokenizer| it.encode_with_control(text).unwrap();
        assert_eq!(control(&again), control(&tokenizer), "{}: {text:?}", folder.display());
    }
    assert_eq!((again.bos(), again.eos()), (tokenizer.bos(), tokenizer.eos()));
    assert_eq!(again.chat_template(), tokenizer.chat_template());
    (vocabulary.pre, notes)
}

/// Of families whose tokenizers aren't beside the checkout: `FERROTUNE_TEST_TOKENIZERS` names a folder with a folder of each.
#[test]
fn published_tokenizers_say_what_llama_cpp_reads() {
    let Some(all) = std::env::var_os("FERROTUNE_TEST_TOKENIZERS") else {
        eprintln!("skipped: FERROTUNE_TEST_TOKENIZERS names no folder of tokenizers");
        return;
    };
    let vectors = folder().map(|it| std::fs::read_to_string(it.join("ggml-vocab-qwen2.gguf.inp")).unwrap());
    let vectors = vectors.unwrap_or_default();
    let texts: Vec<&str> = vectors.split("\n__ggml_vocab_test__\n").collect();
    let mut folders: Vec<PathBuf> = std::fs::read_dir(all).unwrap().map(|it| it.unwrap().path()).collect();
    folders.sort();
    for folder in folders {
        let (pre, notes) = said_again(&folder, &texts);
        eprintln!("{}: {pre} {notes:?}", folder.display());
    }
}
