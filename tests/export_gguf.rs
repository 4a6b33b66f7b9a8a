//! `ferrotune export --format gguf-…`: what is written is chatted with; the files of each family are in gguf.rs.

use std::fs;

use ferrotune_model::source::{ModelFiles, raw_vocabulary};

use crate::train::with_config;
use crate::util::{TINY, repository};

const LORA: &str = "tests/fixtures/lora_tiny";

#[test]
fn train_export_to_gguf_and_chat() {
    let dir = with_config("max_steps: 4\nuse_rslora: true\nlora_alpha: 3\n");
    dir.ferrotune(&["train", "c.yaml"]).succeeds();
    let words = ["export", "c.yaml", "--adapter", "out", "--output", "bakery", "--format", "gguf-f32"];
    dir.ferrotune(&words)
        .succeeds()
        .says("wrote bakery/bakery-F32.gguf")
        .says("verified: logits are those of");
    let model = repository(TINY).display().to_string();
    let file = "bakery/bakery-F32.gguf";
    let ask = ["chat", "--prompt", "Question 3", "--greedy", "--max-new-tokens", "8", "--model"];
    let live = dir.ferrotune(&[&ask[..], &[&model, "--adapter", "out"]].concat()).succeeds().stdout;
    assert_eq!(dir.ferrotune(&[&ask[..], &[file]].concat()).succeeds().stdout, live);
    let modelfile = fs::read_to_string(dir.path().join("bakery/Modelfile")).unwrap();
    assert!(modelfile.starts_with("FROM ./bakery-F32.gguf\nPARAMETER stop \"<|im_end|>\"\n"), "{modelfile}");

    // Text becomes the same tokens, and what the file says of itself is what it was told.
    let text = "Hello,  it's 12345\n<|im_end|>é🙂";
    let tokens = |model: &str| {
        dir.ferrotune(&["debug", "tokenize", "--control-tokens", "--model", model, text]).succeeds().stdout
    };
    assert_eq!(tokens(file), tokens(&model));
    let vocabulary = ModelFiles::open(dir.path().join(file)).unwrap().vocabulary.unwrap();
    assert_eq!((vocabulary.pre.as_str(), vocabulary.add_bos_token), ("smollm", Some(false)));
    assert!(vocabulary.chat_template.is_some());

    // From there on, it is a base as any other, whose file keeps what it says of its tokenizer.
    let words = ["export", "--model", file, "--output", "again", "--format", "gguf-q4_k_m"];
    dir.ferrotune(&words).succeeds().says("wrote again/again-Q4_K_M.gguf").says("verified");
    let kept = |it: &str| raw_vocabulary(&dir.path().join(it)).unwrap();
    assert_eq!(kept("again/again-Q4_K_M.gguf"), kept(file));
}

#[test]
fn an_adapter_goes_to_llama_cpp_by_itself() {
    let dir = with_config("");
    let (model, lora) = (repository(TINY).display().to_string(), repository(LORA).display().to_string());
    let words = ["export", "--model", &model, "--output", "alone", "--format", "gguf-adapter"];
    dir.ferrotune(&words).fails(2).says("`gguf-adapter` needs one adapter");
    dir.ferrotune(&[&words[..], &["--adapter", &lora]].concat())
        .succeeds()
        .says("wrote alone/alone-lora.gguf")
        .says("--format gguf-f16");
    let modelfile = fs::read_to_string(dir.path().join("alone/Modelfile")).unwrap();
    assert!(modelfile.contains("-F16.gguf\nADAPTER ./alone-lora.gguf\n"), "{modelfile}");
    let error = ModelFiles::open(dir.path().join("alone/alone-lora.gguf")).err().unwrap().to_string();
    assert!(error.contains("is of the type `adapter`, not a model"), "{error}");
}

#[test]
fn formats_that_are_not_there_are_named() {
    let dir = with_config("");
    let words = ["export", "--model", "x", "--output", "y", "--format", "gguf-q3_k_m"];
    dir.ferrotune(&words).fails(2).says("gguf-q4_k_m").says("gguf-adapter");
}
