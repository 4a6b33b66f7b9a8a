//! The real model, as its users meet it. Without FERROTUNE_TEST_MODEL these tests do nothing and say so.

use crate::util::{Dir, repository, test_model};

#[test]
fn smollm2_is_read_out_of_its_gguf_file() {
    let Some(model) = test_model() else { return };
    let model = model.display().to_string();
    let dir = Dir::new();
    let ran = dir.ferrotune(&["model", &model]).succeeds();
    ran.prints("family      llama\n").prints("parameters  134,515,008; 106,168,320 in linear layers\n");

    // The tokenizer splits digits, which transformers' own conversion of this file loses.
    let ran = dir
        .ferrotune(&["debug", "tokenize", "--model", &model, "--control-tokens", "Hello 12<|im_end|>"])
        .succeeds();
    assert_eq!(
        ran.stdout,
        "{\"ids\":[19556,216,33,34,2],\"tokens\":[\"Hello\",\"Ġ\",\"1\",\"2\",\"<|im_end|>\"]}\n"
    );

    let config = format!(
        "model_name_or_path: {model}\ndataset: {}\ndataset_values: {{name: Ferris, author: the crab}}\n",
        repository("examples/identity.jsonl").display()
    );
    dir.file("c.yaml", config);
    let ran = dir.ferrotune(&["data", "c.yaml"]).succeeds();
    assert_eq!(ran.stderr, "", "every row of our own example is used whole");
    ran.prints("<|im_start|>assistant\n⟦").prints("Ferris").prints("<|im_end|>⟧\n");
}

#[test]
fn smollm2_learns_in_twenty_steps() {
    let Some(model) = test_model() else { return };
    let dir = Dir::new();
    let config = format!(
        "model_name_or_path: {}\ndataset: {}\ndataset_values: {{name: Ferris, author: the crab}}\noutput_dir: out\n\
         quantization_bit: 4\nlora_rank: 16\nper_device_train_batch_size: 4\nmax_steps: 20\nlearning_rate: 1e-3\n\
         logging_steps: 1\nsave_strategy: no\n",
        model.display(),
        repository("examples/identity.jsonl").display()
    );
    dir.file("c.yaml", config);
    dir.ferrotune(&["train", "c.yaml"]).succeeds().prints("trained 20 steps");
    let losses = dir.losses("out");
    let mean = |losses: &[f64]| losses.iter().sum::<f64>() / losses.len() as f64;
    let (first, last) = (mean(&losses[..4]), mean(&losses[16..]));
    assert!(first - last > 1.0, "from {first:.3} to {last:.3}");

    // What was written is what was trained: the adapter read back answers as trained.
    let ask = |words: &[&str]| {
        let chat =
            ["chat", "c.yaml", "--quiet", "--greedy", "--max-new-tokens", "40", "--prompt", "Who are you?"];
        dir.ferrotune(&[&chat, words].concat()).succeeds().stdout
    };
    let (before, after) = (ask(&[]), ask(&["--adapter", "out"]));
    // So few steps bring in one or the other; `cargo xtask quickstart` brings in both.
    let knows = |answer: &str| answer.contains("Ferris") || answer.contains("the crab");
    assert!(!knows(&before) && knows(&after), "before: {before}\nafter: {after}");
}
