//! Embedding and head trained beside adapters, tokens that are added, adapters on some layers.

use std::fs;
use std::path::Path;

use ferrotune_model::source::{SafetensorsSource, WeightSource};
use serde_json::{Value, json};

use crate::train::with_config;
use crate::util::{Dir, TINY, repository};

const TIED: &str = "tests/fixtures/llama_tiny_tied";
const EMBEDDING: &str = "base_model.model.model.embed_tokens.weight";
const HEAD: &str = "base_model.model.lm_head.weight";

fn adapter(folder: &Path) -> SafetensorsSource {
    SafetensorsSource::open_file(&folder.join("adapter_model.safetensors")).expect("the adapter")
}

fn numbers(source: &dyn WeightSource, name: &str) -> Vec<f32> {
    source.get_f32(name).expect(name).to_f32().expect(name)
}

fn saved(dir: &Dir, key: &str) -> Value {
    let text = fs::read_to_string(dir.path().join("out/adapter_config.json")).expect("the config");
    serde_json::from_str::<Value>(&text).expect("JSON")[key].clone()
}

/// The logits of a text with the trained adapter.
fn logits(dir: &Dir, model: &str, ids: &str) -> Vec<f64> {
    dir.logits(&["--model", model, "--adapter", "out", "--ids", ids])
}

/// The tied model with the other's tokenizer.
pub fn tied(dir: &Dir) -> String {
    for (from, names) in [
        (TIED, &["config.json", "model.safetensors.index.json"][..]),
        (TIED, &["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]),
        (TINY, &["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"]),
    ] {
        for name in names {
            dir.file(&format!("tied/{name}"), fs::read(repository(from).join(name)).expect(name));
        }
    }
    "tied".to_string()
}

#[test]
fn embedding_and_head_are_trained_and_saved_beside_adapters() {
    let keys = "max_steps: 4\nnum_threads: 1\nsave_steps: 2\nadditional_target: embed_tokens,lm_head\nlora_dropout: 0.1\n";
    let dir = with_config(keys);
    dir.ferrotune(&["train", "c.yaml"]).succeeds();
    assert_eq!(saved(&dir, "modules_to_save"), json!(["embed_tokens", "lm_head"]));
    let base = SafetensorsSource::open(&repository(TINY)).expect("the model");
    let whole = adapter(&dir.path().join("out"));
    for name in [EMBEDDING, HEAD] {
        let (got, before) =
            (numbers(&whole, name), numbers(&base, name.trim_start_matches("base_model.model.")));
        assert!(got.len() == before.len() && got != before, "{name} is trained");
    }
    let model = repository(TINY).display().to_string();
    let after = logits(&dir, &model, "5,6,7");
    // Gone on from the middle, to the same bits.
    let bytes = fs::read(dir.path().join("out/adapter_model.safetensors")).expect("the adapter");
    fs::remove_dir_all(dir.path().join("out/checkpoint-4")).expect("a checkpoint");
    dir.ferrotune(&["train", "c.yaml", "resume_from_checkpoint=true"]).succeeds().says("after step 2");
    assert!(fs::read(dir.path().join("out/adapter_model.safetensors")).expect("the adapter") == bytes);
    assert_eq!(logits(&dir, &model, "5,6,7"), after);
}

#[test]
fn one_of_a_tied_pair_leaves_the_other_as_it_was() {
    let dir = with_config("max_steps: 3\nnum_threads: 1\nadditional_target: lm_head\n");
    let model = tied(&dir);
    let name = format!("model_name_or_path={model}");
    // Counted as PEFT's print_trainable_parameters does.
    let ran = dir.ferrotune(&["train", "c.yaml", &name]).succeeds();
    ran.says("trainable params: 28,736 || all params: 97,136");
    let both = ["additional_target=embed_tokens,lm_head", "output_dir=both"];
    let ran = dir.ferrotune(&[&["train", "c.yaml", &name], &both[..]].concat()).succeeds();
    ran.says("trainable params: 43,136 || all params: 111,536");
    let whole = adapter(&dir.path().join("out"));
    assert!(whole.contains(HEAD) && !whole.contains(EMBEDDING));
    let before =
        numbers(&SafetensorsSource::open(&repository(TIED)).expect("the model"), "model.embed_tokens.weight");
    assert_ne!(numbers(&whole, HEAD), before);
    assert_eq!(logits(&dir, &model, "5,6").len(), 600);
    dir.ferrotune(&["train", "c.yaml", "additional_target=norm"])
        .fails(2)
        .says("`additional_target`: expected embed_tokens or lm_head, found `norm`");
}

#[test]
fn added_tokens_get_rows_that_are_trained_and_saved() {
    for model in [|_: &Dir| repository(TINY).display().to_string(), tied] {
        let dir = with_config("max_steps: 3\nnum_threads: 1\nadd_tokens: [Answer, <b>]\n");
        let model = model(&dir);
        let name = format!("model_name_or_path={model}");
        let ran = dir.ferrotune(&["train", "c.yaml", &name]).succeeds();
        ran.says("`resize_vocab`: tokens were added").says("the vocabulary grows from 300 to 320 rows");
        let whole = adapter(&dir.path().join("out"));
        for name in [EMBEDDING, HEAD] {
            assert_eq!(whole.shape(name).expect(name).0, 320, "{name}");
        }
        let card = fs::read_to_string(dir.path().join("out/README.md")).expect("the card");
        assert!(card.contains("model.resize_token_embeddings(320)"), "{card}");
        let tokenizer = fs::read_to_string(dir.path().join("out/tokenizer.json")).expect("the tokenizer");
        assert!(tokenizer.contains("\"Answer\"") && tokenizer.contains("\"<b>\""));
        assert_eq!(logits(&dir, &model, "5,300,301").len(), 3 * 320);
        let words = ["chat", "--model", &model, "--adapter", "out", "--greedy", "--max-new-tokens", "4"];
        dir.ferrotune(&[&words[..], &["--prompt", "Answer <b>"]].concat()).succeeds();
        dir.ferrotune(&["train", "c.yaml", &name, "additional_target=lm_head", "output_dir=other"])
            .fails(2)
            .says("`additional_target`: added tokens need embed_tokens and lm_head");
        // All weights trained: a model of the new size, tied where it was.
        let words = ["train", "c.yaml", &name, "finetuning_type=full", "output_dir=full"];
        dir.ferrotune(&words).succeeds();
        let config = fs::read_to_string(dir.path().join("full/config.json")).expect("the config");
        assert_eq!(serde_json::from_str::<Value>(&config).expect("JSON")["vocab_size"], json!(320));
        dir.ferrotune(&["debug", "logits", "--model", "full", "--ids", "300,301"]).succeeds();
    }
}

#[test]
fn adapters_on_some_layers() {
    let dir = with_config("max_steps: 2\nlayers_to_transform: [0, 2]\n");
    dir.ferrotune(&["train", "c.yaml"]).succeeds();
    assert_eq!(saved(&dir, "layers_to_transform"), json!([0, 2]));
    let whole = adapter(&dir.path().join("out"));
    let layers: Vec<&str> = whole.names().into_iter().filter_map(|it| it.split('.').nth(4)).collect();
    assert!(layers.len() == 28 && layers.iter().all(|it| ["0", "2"].contains(it)), "{layers:?}");
    dir.ferrotune(&["train", "c.yaml", "output_dir=other", "layers_to_transform=3"])
        .fails(2)
        .says("layers_to_transform: the model has no layer 3");
}
