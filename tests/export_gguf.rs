//! `ferrotune export --format gguf-…`: what is written is chatted with; the files of each family are in gguf.rs.

use std::fs;

use ferrotune_model::source::{ModelFiles, raw_vocabulary};

use crate::saved_modules::tied;
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
fn new_tokens_and_saved_modules_are_in_the_file() {
    let dir = with_config("max_steps: 2\nadd_tokens: [Answer, <b>]\nadd_special_tokens: [<|c|>]\n");
    let model = tied(&dir);
    let gguf = repository("tests/fixtures/gguf/tiny.gguf").display().to_string();
    for (base, out) in [(model, "folder"), (gguf, "gguf")] {
        let words = ["train", "c.yaml", &format!("model_name_or_path={base}"), &format!("output_dir={out}")];
        dir.ferrotune(&words).succeeds();
        let name = format!("{out}-made");
        let words = ["export", "--model", &base, "--adapter", out, "--output", &name, "--format", "gguf-f32"];
        dir.ferrotune(&words).succeeds().says("verified");
        let alone =
            ["export", "--model", &base, "--adapter", out, "--output", "no", "--format", "gguf-adapter"];
        dir.ferrotune(&alone).fails(1).says("export the merged model");
        let file = format!("{name}/{name}-F32.gguf");
        let files = ModelFiles::open(dir.path().join(&file)).unwrap();
        let vocabulary = files.vocabulary.unwrap();
        assert_eq!(vocabulary.tokens.len(), files.spec.vocab_size);
        let kind = |token: &str| {
            let id = vocabulary.tokens.iter().position(|it| it == token);
            id.map(|id| vocabulary.token_types[id])
        };
        assert_eq!([kind("Answer"), kind("<b>"), kind("<|c|>")], [Some(4), Some(4), Some(3)], "{base}");
    }
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
