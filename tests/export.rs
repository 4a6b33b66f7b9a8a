//! `ferrotune export`: merged models, read by the program itself. Each family's are in families.rs.

use std::fs;
use std::path::Path;

use ferrotune_export::{PeftAdapter, merge};
use ferrotune_model::source::{ModelFiles, SafetensorsSource, WeightSource};
use ferrotune_model::spec::names;
use ferrotune_tensor::DType;
use serde_json::{Value, json};

use crate::saved_modules::tied;
use crate::train::with_config;
use crate::util::{Dir, TINY, repository};

const LORA: &str = "tests/fixtures/lora_tiny";

fn config(folder: &Path) -> Value {
    serde_json::from_str(&fs::read_to_string(folder.join("config.json")).expect("the config")).expect("JSON")
}

/// The largest difference by the largest number.
fn difference(a: &[f64], b: &[f64]) -> f64 {
    assert_eq!(a.len(), b.len());
    let most = |numbers: &mut dyn Iterator<Item = f64>| numbers.fold(0.0, f64::max);
    most(&mut a.iter().zip(b).map(|(a, b)| (a - b).abs())) / most(&mut a.iter().map(|it| it.abs()))
}

#[test]
fn train_export_chat() {
    let dir = with_config(
        "max_steps: 4\nquantization_bit: 4\nuse_rslora: true\nlora_alpha: 3\nlayers_to_transform: [0, 2]\n",
    );
    dir.ferrotune(&["train", "c.yaml"]).succeeds();
    let words = ["export", "c.yaml", "--adapter", "out", "--output", "merged", "export_size=0.0002"];
    dir.ferrotune(&words)
        .succeeds()
        .says("`quantization_bit`: the adapter is merged into the weights of the base model as they are")
        .says("wrote merged")
        .says("verified: logits differ by");
    let merged = dir.path().join("merged");
    let index = fs::read_to_string(merged.join("model.safetensors.index.json")).expect("the index");
    let index: Value = serde_json::from_str(&index).expect("JSON");
    let source = SafetensorsSource::open(&merged).expect("the shards");
    assert_eq!(index["metadata"]["total_parameters"], json!(133_312));
    assert_eq!(index["metadata"]["total_size"], json!(4 * 133_312));
    assert_eq!(index["weight_map"].as_object().expect("a map").len(), source.names().len());
    for shard in fs::read_dir(&merged).expect("the folder").flatten() {
        let name = shard.file_name().to_string_lossy().into_owned();
        let length = shard.metadata().expect("its length").len();
        assert!(!name.ends_with(".safetensors") || length < 202_000, "{name}: {length}");
        assert!(!name.ends_with(".part"), "{name}");
    }
    let model = repository(TINY).display().to_string();
    let live = dir.logits(&["--model", &model, "--adapter", "out", "--ids", "5,6,7,8"]);
    let got = dir.logits(&["--model", "merged", "--ids", "5,6,7,8"]);
    assert!(difference(&live, &got) < 1e-5, "{}", difference(&live, &got));
    let ask = ["chat", "--prompt", "Question 3", "--greedy", "--max-new-tokens", "8", "--model"];
    let live = dir.ferrotune(&[&ask[..], &[&model, "--adapter", "out"]].concat()).succeeds().stdout;
    assert_eq!(dir.ferrotune(&[&ask[..], &["merged"]].concat()).succeeds().stdout, live);

    // Once more, in one file: what was there before would be read in its place.
    dir.ferrotune(&[&words[..6], &["overwrite_output_dir=true", "export_verify=false"]].concat()).succeeds();
    assert!(
        merged.join("model.safetensors").is_file() && !merged.join("model.safetensors.index.json").exists()
    );
    assert!(!merged.join("model-00001-of-00003.safetensors").exists());
    assert_eq!(dir.logits(&["--model", "merged", "--ids", "5,6,7,8"]), got);
}

#[test]
fn keys_of_llama_factory_and_types() {
    let dir = Dir::new();
    let config_text = format!(
        "model_name_or_path: {}\nadapter_name_or_path: {}\ntemplate: chatml\ntrust_remote_code: true\nexport_dir: out\n\
         export_size: 5\nexport_device: cpu\nexport_legacy_format: false\n",
        repository(TINY).display(),
        repository(LORA).display()
    );
    dir.file("merge.yaml", config_text);
    for (name, dtype) in [("bfloat16", DType::BF16), ("float16", DType::F16), ("float32", DType::F32)] {
        let words = ["export", "merge.yaml", "overwrite_output_dir=true"];
        let ran = dir.ferrotune(&[&words[..], &[&format!("infer_dtype={name}")]].concat()).succeeds();
        ran.says("verified");
        let files = ModelFiles::open(dir.path().join("out")).expect("the model");
        let all = files.source.names().into_iter().map(|it| files.source.dtype(it).expect(it));
        assert!(all.collect::<Vec<_>>().iter().all(|it| *it == dtype), "{name}");
        let out = dir.path().join("out");
        assert_eq!(config(&out)["torch_dtype"], json!(name));
        let template = fs::read_to_string(out.join("chat_template.jinja")).expect("the template");
        assert!(template.contains("<|im_end|>"), "chatml, as asked for");
    }
}

#[test]
fn saved_modules_and_grown_vocabularies_are_merged() {
    for keys in ["additional_target: lm_head\n", "add_tokens: [Answer, <b>]\n"] {
        let dir = with_config(&format!("max_steps: 3\nnum_threads: 1\n{keys}"));
        let model = tied(&dir);
        dir.ferrotune(&["train", "c.yaml", &format!("model_name_or_path={model}")]).succeeds();
        dir.ferrotune(&["export", "--model", &model, "--adapter", "out", "--output", "merged"])
            .succeeds()
            .says("verified");
        let merged = dir.path().join("merged");
        let rows = if keys.contains("add_tokens") { 320 } else { 300 };
        assert_eq!(config(&merged)["vocab_size"], json!(rows));
        assert_eq!(config(&merged)["tie_word_embeddings"], json!(false));
        let source = SafetensorsSource::open(&merged).expect("the model");
        assert_eq!(source.shape(names::HEAD).expect("the head").0, rows);
        let ids = if rows == 320 { "5,300,301" } else { "5,6,7" };
        let live = dir.logits(&["--model", &model, "--adapter", "out", "--ids", ids]);
        let got = dir.logits(&["--model", "merged", "--ids", ids]);
        assert!(difference(&live, &got) < 2e-2, "the base is bf16");
        let tokenizer = fs::read_to_string(merged.join("tokenizer.json")).expect("the tokenizer");
        assert_eq!(tokenizer.contains("<b>"), rows == 320);
    }
}

#[test]
fn a_gguf_file_becomes_a_folder() {
    let dir = Dir::new();
    let gguf = repository("tests/fixtures/gguf/tiny.gguf").display().to_string();
    dir.ferrotune(&["export", "--model", &gguf, "--output", "out"])
        .succeeds()
        .says("the weights are in few bits; they are written as what they are read as")
        .says("verified");
    let out = dir.path().join("out");
    let written = config(&out);
    assert_eq!(written["architectures"], json!(["LlamaForCausalLM"]));
    assert_eq!(written["torch_dtype"], json!("bfloat16"));
    let (before, after) =
        (ModelFiles::open(&gguf).expect("the file"), ModelFiles::open(&out).expect("the folder"));
    assert_eq!(before.spec, after.spec);
    assert!(out.join("tokenizer.json").is_file() && out.join("generation_config.json").is_file());
    let off = difference(
        &dir.logits(&["--model", &gguf, "--ids", "5,6,7"]),
        &dir.logits(&["--model", "out", "--ids", "5,6,7"]),
    );
    assert!(off < 2e-2, "{off}");
    // Rounded to 16 bits before it goes into 4.
    let words = ["export", "--model", &gguf, "--output", "coded", "--format", "bnb-4bit"];
    dir.ferrotune(&words).succeeds().says("verified: logits are those of the merged model in few bits");
}

#[test]
fn mistakes_are_named_before_anything_is_written() {
    let dir = Dir::new();
    let (model, lora) = (repository(TINY).display().to_string(), repository(LORA).display().to_string());
    let export = |words: &[&str]| dir.ferrotune(&[&["export", "--model", &model], words].concat());
    export(&[]).fails(2).says("`export_dir`: no folder is named");
    export(&["--output", &model]).fails(2).says("holds what is to be exported");
    export(&["--output", &lora, "--adapter", &lora, "overwrite_output_dir=true"])
        .fails(2)
        .says("holds what is to be exported");
    export(&["--output", "out", "--format", "gptq"]).fails(2).says("`export_format`: expected safetensors");
    export(&["--output", "out", "export_size=0"]).fails(2).says("`export_size`: expected more than 0");
    export(&["--output", "out", "export_quantization_bit=4"]).fails(2).says("GPTQ will not come");
    dir.file("full/notes.txt", "mine");
    export(&["--output", "full"]).fails(2).says("is not empty");
    let other = repository("tests/fixtures/gguf/tiny.gguf").display().to_string();
    let words = ["export", "--model", &other, "--adapter", &lora, "--output", "out"];
    dir.ferrotune(&words).fails(1).says("the adapter belongs to another model");
    assert!(!dir.path().join("out").exists());
}

#[test]
fn models_in_four_bits_are_written_trained_and_merged_again() {
    let dir = with_config("max_steps: 3\nnum_threads: 1\n");
    let (model, lora) = (repository(TINY).display().to_string(), repository(LORA).display().to_string());
    let export =
        |words: &[&str]| dir.ferrotune(&[&["export", "--adapter", &lora, "--model", &model], words].concat());
    export(&["--output", "whole"]).succeeds();
    export(&["--output", "coded", "--format", "bnb-4bit", "export_size=0.00008"])
        .succeeds()
        .says("verified: logits are those of the merged model in few bits");
    // The codes are taken as they are: the same as quantising in memory.
    let expected = dir.logits(&["--model", "whole", "--ids", "5,6,7", "quantization_bit=4"]);
    assert_eq!(dir.logits(&["--model", "coded", "--ids", "5,6,7"]), expected);
    assert_eq!(dir.logits(&["--model", "coded", "--ids", "5,6,7", "quantization_bit=4"]), expected);
    let shown = dir.ferrotune(&["model", "coded"]).succeeds();
    let shown = shown.prints("4 bits by bitsandbytes (nf4, double-quantised): 21 of 21 linear layers");
    assert!(
        shown.stdout.contains("4 bit, recompute: all") && !shown.stdout.contains("32 bit"),
        "{}",
        shown.stdout
    );

    let train =
        |words: &[&str]| dir.ferrotune(&[&["train", "c.yaml", "model_name_or_path=coded"], words].concat());
    train(&["quantization_bit=4"]).succeeds().says("the model is in 4 bits already, and is taken as it is");
    train(&["finetuning_type=full", "output_dir=full"])
        .fails(2)
        .says("weights in 4 bits can't be trained themselves");
    let words = ["chat", "--model", "coded", "--adapter", "out", "--prompt", "Question 3", "--greedy"];
    dir.ferrotune(&[&words[..], &["--max-new-tokens", "4"]].concat()).succeeds();
    dir.ferrotune(&["export", "--model", "coded", "--adapter", "out", "--output", "again"])
        .succeeds()
        .says("the weights are in few bits; the adapter is merged into what they are read as")
        .says("verified");
    let again = config(&dir.path().join("again"));
    assert_eq!((&again["torch_dtype"], again.get("quantization_config")), (&json!("float32"), None));
    let live = dir.logits(&["--model", "coded", "--adapter", "out", "--ids", "5,6,7"]);
    assert!(difference(&live, &dir.logits(&["--model", "again", "--ids", "5,6,7"])) < 1e-5);
}

/// Files that PEFT wrote, with what it computed, and their base; beside the checkout where they are.
#[test]
fn merged_as_peft_merges() {
    let data = repository("../shared/data");
    let golden = data.join("golden_bnb_peft");
    if !golden.is_dir() {
        eprintln!("skipped: {} isn't there", golden.display());
        return;
    }
    let base = data.join("stories260k/hf");
    let merged = |adapter: &str| {
        let adapter = PeftAdapter::read(&golden.join(adapter)).expect(adapter);
        merge(ModelFiles::open(&base).expect("the base"), adapter).expect("a merged model")
    };
    let files = merged("peft_lora_r8");
    let expected = SafetensorsSource::open(&golden.join("merged_lora_r8")).expect("PEFT's");
    for name in files.source.names() {
        let floats = |source: &dyn WeightSource| source.get_f32(name).expect(name).to_f32().expect(name);
        let (got, expected) = (floats(files.source.as_ref()), floats(&expected));
        let off = got.iter().zip(&expected).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        assert!(off < 1e-6, "{name}: {off:.1e}");
    }
    let text = fs::read_to_string(golden.join("logits.json")).expect("the logits");
    let logits: Value = serde_json::from_str(&text).expect("JSON");
    let ids: Vec<String> =
        logits["input_ids"].as_array().expect("ids").iter().map(Value::to_string).collect();
    let dir = Dir::new();
    for (adapter, key) in [
        ("peft_lora_r8", "peft_lora_r8_merged"),
        ("peft_rslora_r16", "peft_rslora_r16_merged"),
        ("peft_dora_r4", "peft_dora_r4_merged"),
    ] {
        let (base, adapter) = (base.display().to_string(), golden.join(adapter).display().to_string());
        let words = ["export", "--model", &base, "--adapter", &adapter, "--output", key];
        dir.ferrotune(&words).succeeds().says("verified");
        let words = ["--model", key, "template=empty", "--ids", &ids.join(",")];
        let got = dir.logits(&words);
        let expected = logits[key].as_array().expect(key).iter().map(|it| it.as_f64().expect("a number"));
        let last = &got[got.len() - got.len() / ids.len()..];
        let off = expected.zip(last).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
        assert!(off < 1e-4, "{key}: {off:.1e}");
    }
}
