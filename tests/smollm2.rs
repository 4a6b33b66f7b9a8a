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
