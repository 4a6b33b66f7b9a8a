//! A byte-level tokenizer of 256 bytes and a few control tokens, for the tests of this crate.

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
