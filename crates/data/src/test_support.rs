//! A byte-level tokenizer of 256 bytes and a few control tokens, for the tests of this crate.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};

use crate::gguf_vocabulary::GgufVocabulary;
use crate::tokenizer::Tokenizer;

pub(crate) const CHATML: &str = "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + \
     message['content'] + '<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}\
     {{ '<|im_start|>assistant\n' }}{% endif %}";

pub(crate) fn vocabulary() -> GgufVocabulary {
    let printable = |byte: &u32| matches!(byte, 0x21..=0x7E | 0xA1..=0xAC | 0xAE..=0xFF);
    let mut moved = 0x100..;
    let byte = |byte: u32| if printable(&byte) { Some(byte) } else { moved.next() };
    let bytes = (0..256).filter_map(byte).filter_map(char::from_u32).map(String::from);
    let control = ["<|im_start|>", "<|im_end|>", "<s>", "</s>"].map(String::from);
    let tokens: Vec<String> = bytes.chain(control).collect();
    let token_types = (0..tokens.len()).map(|id| if id < 256 { 1 } else { 3 }).collect();
    GgufVocabulary {
        model: "gpt2".to_string(),
        pre: "smollm".to_string(),
        tokens,
        token_types,
        bos: Some(256),
        eos: Some(257),
        add_bos: Some(false),
        chat_template: Some(CHATML.to_string()),
        ..GgufVocabulary::default()
    }
}

pub(crate) fn tokenizer() -> Tokenizer {
    Tokenizer::from_gguf(&vocabulary()).unwrap()
}

/// A folder of its own, taken away at the end.
pub(crate) struct Scratch(PathBuf);

impl Scratch {
    pub(crate) fn new() -> Scratch {
        static COUNT: AtomicUsize = AtomicUsize::new(0);
        let name = format!("ferrotune-data-{}-{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
        let folder = std::env::temp_dir().join(name);
        std::fs::create_dir_all(&folder).unwrap();
        Scratch(folder)
    }

    pub(crate) fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}
