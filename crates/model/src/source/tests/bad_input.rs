use serde_json::{Value, json};

use super::*;

/// llama_tiny with another config.
fn with_config(change: impl FnOnce(&mut Value)) -> Scratch {
    let scratch = Scratch::of("llama_tiny");
    let mut config = json(&scratch.0.join("config.json"));
    change(&mut config);
    scratch.write("config.json", config.to_string());
    scratch
}

#[track_caller]
fn config_refused(key: &str, value: Value, parts: &[&str]) {
    let scratch = with_config(|config| config[key] = value);
    refused(&scratch.0, &[&["config.json", key], parts].concat());
}

#[test]
fn configs_that_are_not_understood() {
    config_refused("model_type", json!("mamba"), &["mamba", "llama"]);
    config_refused("use_quantum_attention", json!(true), &["llama", "may change what the model computes"]);
    config_refused("sliding_window", json!(4096), &["4096"]);
    config_refused("hidden_act", json!("relu"), &["relu", "silu"]);
    config_refused("hidden_size", json!("64"), &["positive whole number"]);
    config_refused("hidden_size", json!(0), &["positive whole number"]);
    config_refused("num_hidden_layers", json!(100_000_000), &["4096"]);
    config_refused("num_key_value_heads", json!(3), &["doesn't divide"]);
    config_refused("head_dim", json!(15), &["must be even"]);
    config_refused("attention_dropout", json!(0.1), &["0.1"]);
    config_refused("partial_rotary_factor", json!(0.5), &["1.0"]);
    config_refused("eos_token_id", json!("</s>"), &["token id"]);
    for kind in ["yarn", "longrope"] {
        config_refused(
            "rope_scaling",
            json!({ "type": kind, "factor": 2.0 }),
            &[kind, "linear, dynamic, llama3"],
        );
    }
    config_refused("rope_scaling", json!({ "rope_type": "linear", "factor": 2.0, "twist": 3 }), &["twist"]);
    config_refused("rope_scaling", json!({ "rope_type": "linear" }), &["rope_scaling.factor", "missing"]);
    config_refused("rope_scaling", json!({ "rope_type": "linear", "factor": -2.0 }), &["positive"]);
    config_refused("quantization_config", json!({ "quant_method": "gptq", "bits": 4 }), &["GPTQ", "16 bits"]);
    config_refused("quantization_config", json!({ "quant_method": "awq" }), &["AWQ"]);
    let eight = json!({ "quant_method": "bitsandbytes", "load_in_8bit": true });
    config_refused("quantization_config", eight, &["bitsandbytes 8-bit", "`-bnb-4bit`"]);
    let four = json!({ "quant_method": "bitsandbytes", "load_in_4bit": true });
    config_refused("quantization_config", four, &["but they aren't", "`quantization_bit: 4`"]);
    refused(
        &with_config(|config| drop(config.as_object_mut().unwrap().remove("vocab_size"))).0,
        &["vocab_size", "missing"],
    );
    let scratch = Scratch::of("llama_tiny");
    scratch.write("config.json", "{ \"model_type\":");
    refused(&scratch.0, &["config.json", "not JSON"]);
}

#[test]
fn switched_off_keys_are_taken() {
    let scratch = with_config(|config| {
        config["use_quantum_attention"] = json!(false);
        config["sliding_window"] = Value::Null;
        config["rope_scaling"] = json!({ "type": "linear", "factor": 4.0 });
        config["eos_token_id"] = json!([2, 5]);
    });
    scratch.write("generation_config.json", r#"{ "eos_token_id": [5, 9] }"#);
    let spec = ModelFiles::open(&scratch.0).unwrap().spec;
    assert_eq!(spec.layers[0].attention.rope.as_ref().unwrap().inverse_frequencies[0], 0.25);
    assert_eq!(spec.eos_token_ids, [2, 5, 9]);
}

#[test]
fn config_and_weights_that_differ() {
    let wide = with_config(|config| config["intermediate_size"] = json!(101));
    refused(&wide.0, &["mlp.gate_proj.weight", "101 x 64", "100 x 64"]);
    refused(&with_config(|config| config["num_hidden_layers"] = json!(4)).0, &["model.layers.3", "missing"]);
    refused(&with_config(|config| config["num_hidden_layers"] = json!(2)).0, &["model.layers.2", "no place"]);
    refused(
        &with_config(|config| config["attention_bias"] = json!(true)).0,
        &["self_attn.q_proj.bias", "missing"],
    );
}

#[test]
fn damaged_safetensors() {
    let scratch = Scratch::of("llama_tiny");
    let whole = fs::read(scratch.0.join("model.safetensors")).unwrap();
    let header = u64::from_le_bytes(whole[..8].try_into().unwrap()) as usize;
    let damaged = |bytes: &[u8], parts: &[&str]| {
        scratch.write("model.safetensors", bytes);
        refused(&scratch.0, &[&["model.safetensors", "download it again"], parts].concat());
    };
    damaged(&[], &["0 bytes"]);
    damaged(&whole[..5], &["5 bytes"]);
    damaged(&whole[..100], &["the file has 100"]);
    let cut = whole.len() - 1000;
    damaged(&whole[..cut], &[&format!("promises {} bytes", whole.len()), &cut.to_string()]);
    let mut long = whole.clone();
    long[..8].copy_from_slice(&u64::MAX.to_le_bytes());
    damaged(&long, &["18446744073709551615"]);
    let text = String::from_utf8(whole[8..8 + header].to_vec()).unwrap();
    let lie = |from: &str, to: &str| {
        let text = text.replacen(from, to, 1);
        let mut bytes = (text.len() as u64).to_le_bytes().to_vec();
        bytes.extend(text.as_bytes());
        bytes.extend(&whole[8 + header..]);
        bytes
    };
    damaged(&lie("[300,64]", "[300,65]"), &["shape"]);
    damaged(&lie("[300,64]", "[4611686018427387904,64]"), &[]);
    damaged(&lie("\"F32\"", "\"F31\""), &["F31"]);
    damaged(&lie("{", "["), &[]);
    // A name that is there twice leaves a hole where the first was.
    damaged(&lie("model.layers.0.input_layernorm.weight", "model.layers.0.mlp.down_proj.weight"), &[]);
}

#[test]
fn shards_that_are_not_there() {
    let scratch = Scratch::of("llama_tiny_tied");
    let second = scratch.0.join("model-00002-of-00002.safetensors");
    let bytes = fs::read(&second).unwrap();
    fs::remove_file(&second).unwrap();
    refused(&scratch.0, &["model-00002-of-00002.safetensors", "isn't there", "download"]);
    fs::copy(scratch.0.join("model-00001-of-00002.safetensors"), &second).unwrap();
    refused(&scratch.0, &["model-00002-of-00002.safetensors", "is missing, which"]);
    fs::write(&second, bytes).unwrap();
    ModelFiles::open(&scratch.0).unwrap();
    for shard in ["../x.safetensors", "/etc/passwd", "a/b.safetensors", "..", "a\\b"] {
        let index = json!({ "weight_map": { "model.norm.weight": shard } }).to_string();
        scratch.write("model.safetensors.index.json", index);
        refused(&scratch.0, &["index.json", "the name of a file beside this one"]);
    }
    // An index of itself.
    let name = "model.safetensors.index.json";
    scratch.write(name, json!({ "weight_map": { "model.norm.weight": name } }).to_string());
    refused(&scratch.0, &["index.json", "either it isn't safetensors"]);
    let twice = r#"{"weight_map": {"a": "model-00001-of-00002.safetensors", "a": "nowhere.safetensors"}}"#;
    scratch.write(name, twice);
    refused(&scratch.0, &["nowhere.safetensors", "isn't there"]);
    for (map, expected) in [
        (json!([]), "weight_map"),
        (json!({ "model.norm.weight": 7 }), "the name of a file beside this one"),
        (json!({ "model.norm.weight": [name] }), "the name of a file beside this one"),
    ] {
        scratch.write(name, json!({ "weight_map": map }).to_string());
        refused(&scratch.0, &["index.json", expected]);
    }
}

#[test]
fn folders_without_weights() {
    let scratch = Scratch::new();
    refused(&scratch.0.join("nowhere"), &["nowhere"]);
    refused(&scratch.0, &["config.json"]);
    fs::copy(fixture("llama_tiny").join("config.json"), scratch.0.join("config.json")).unwrap();
    refused(&scratch.0, &["neither model.safetensors"]);
    scratch.write("pytorch_model.bin", "…");
    refused(&scratch.0, &["pytorch_model.bin", "pickle", "save_pretrained"]);
    refused(&scratch.write("model.txt", "…"), &[".gguf"]);
    refused(&fixture("lora_tiny"), &["adapter", "base"]);
}

/// A small GGUF file by hand.
struct Gguf(Vec<u8>);

impl Gguf {
    fn new(tensors: u64, values: u64) -> Gguf {
        let mut bytes = b"GGUF\x03\0\0\0".to_vec();
        bytes.extend(tensors.to_le_bytes());
        bytes.extend(values.to_le_bytes());
        Gguf(bytes)
    }

    fn text(mut self, text: &str) -> Gguf {
        self.0.extend((text.len() as u64).to_le_bytes());
        self.0.extend(text.as_bytes());
        self
    }

    fn u32(mut self, value: u32) -> Gguf {
        self.0.extend(value.to_le_bytes());
        self
    }

    fn u64(mut self, value: u64) -> Gguf {
        self.0.extend(value.to_le_bytes());
        self
    }

    #[track_caller]
    fn refused(self, parts: &[&str]) {
        let scratch = Scratch::new();
        refused(&scratch.write("bad.gguf", self.0), &[&["bad.gguf"], parts].concat());
    }
}

#[test]
fn lying_gguf_headers() {
    Gguf(Vec::new()).refused(&["magic"]);
    Gguf(b"GGML1234".to_vec()).refused(&["not a GGUF file"]);
    Gguf(b"GGUF\x09\0\0\0".to_vec()).refused(&["version 9"]);
    Gguf::new(u64::MAX, 0).refused(&["number of tensors", "18446744073709551615"]);
    Gguf::new(0, 1 << 40).refused(&["metadata entries"]);
    Gguf::new(0, 1).u64(u64::MAX).u64(0).refused(&["download it again"]);
    Gguf::new(0, 1).text("a").u32(99).u64(0).refused(&["`a`", "type 99"]);
    Gguf::new(0, 1).text("a").u32(9).u32(8).u64(1 << 60).refused(&["the length of `a`"]);
    Gguf::new(0, 1).text("a").u32(9).u32(9).u64(1).u64(0).refused(&["`a`", "list of type 9"]);
    Gguf::new(0, 2).text("a").u32(4).u32(1).text("a").u32(4).u32(1).refused(&["`a` is there twice"]);
    Gguf::new(0, 1).text("general.architecture").u32(8).text("mamba").refused(&["mamba", "llama"]);
    Gguf::new(0, 1).text("general.name").u32(8).text("nameless").refused(&["general.architecture"]);
    Gguf::new(0, 1).text("split.count").u32(4).u32(3).refused(&["3 parts"]);
    let tensor = |dimensions: &[u64], kind: u32, offset: u64| {
        let gguf = Gguf::new(1, 0).text("w").u32(dimensions.len() as u32);
        dimensions.iter().fold(gguf, |gguf, size| gguf.u64(*size)).u32(kind).u64(offset)
    };
    tensor(&[1, 1, 1, 1, 1], 0, 0).refused(&["`w`", "5 dimensions"]);
    tensor(&[32, 1 << 40], 8, 0).refused(&["`w`", "damaged"]);
    tensor(&[1 << 40, 1 << 40], 0, 0).refused(&["`w`", "damaged"]);
    tensor(&[8], 0, u64::MAX - 7).refused(&["`w`", "damaged"]);
    tensor(&[31, 2], 8, 0).refused(&["`w`", "Q8_0"]);
    tensor(&[256], 23, 0).refused(&["`w`", "IQ4_XS"]);
    tensor(&[256], 1000, 0).refused(&["`w`", "type 1000"]);
}

#[test]
fn truncated_gguf_at_any_length() {
    let whole = fs::read(fixture("gguf").join("tiny.gguf")).unwrap();
    let scratch = Scratch::new();
    for length in (0..whole.len() - 1).step_by(997).chain([whole.len() - 1]) {
        refused(&scratch.write("cut.gguf", &whole[..length]), &["cut.gguf"]);
    }
}
