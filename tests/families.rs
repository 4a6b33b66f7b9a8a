//! Each family against transformers: logits, loss, and the gradients of adapters on every projection. The
//! numbers are `fixtures/make_families.py`'s; weights, adapters and tokens come from a hash of their names.

mod hashed;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use candle_core::Device as CandleDevice;
use ferrotune_export::{FolderOptions, merge, write_folder};
use ferrotune_lora::LoraAdapter;
use ferrotune_model::source::{ModelFiles, Stored};
use ferrotune_model::spec::ModelSpec;
use ferrotune_model::{BuildOptions, Decoder, PartSpec, build, dense_part, families};
use ferrotune_nn::{Context, LanguageModel};
use ferrotune_tensor::{DType, Device, Precision, Result, Tensor};
use serde_json::Value;

use hashed::{Checkpoint, LENGTHS, VOCAB, adapter, batch, floats, largest, logits_off, numbers, weight};

const RANK: usize = 2;
const SCALING: f64 = 2.0;

fn golden() -> serde_json::Map<String, Value> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/families.json");
    serde_json::from_str(&fs::read_to_string(path).unwrap()).unwrap()
}

/// With the rope for the sequences that there are: both are longer than the original context, or neither is.
fn open(path: &Path) -> ModelFiles {
    let mut files = ModelFiles::open(path).unwrap();
    files.spec.settle_rope(LENGTHS[1]);
    files
}

fn decoder(checkpoint: &Checkpoint, device: &Device) -> Decoder {
    let options = BuildOptions { precision: Precision::Full, dtype: DType::F32, device: device.clone() };
    let files = open(&checkpoint.0);
    let mut make = |spec: &PartSpec, stored: Stored| -> Result<_> {
        let mut part = dense_part(spec, stored, &options)?;
        let matrix = |kind: &str, rows: usize, cols: usize| {
            Tensor::from_vec(rows, cols, weight(&format!("{}.{kind}.weight", spec.name), rows * cols))
        };
        let (a, b) = (matrix("lora_A", RANK, spec.in_features)?, matrix("lora_B", spec.out_features, RANK)?);
        let adapter = LoraAdapter::from_parts(&spec.name, a, b, SCALING, 0.0, Precision::Full)?;
        part.adapter = Some(Box::new(adapter.to_device(device, DType::F32)?));
        Ok(part)
    };
    build(&files.spec, files.source.as_ref(), options.clone(), &mut make).unwrap()
}

/// The largest difference of a gradient's norm and of its dot products with hashed numbers, by its norm.
fn gradients_off(model: &mut Decoder, golden: &Value) -> f64 {
    let expected = golden["gradients"].as_object().unwrap();
    let parameters = model.parameters();
    assert_eq!(parameters.len(), expected.len(), "adapters");
    let off = parameters.iter().map(|parameter| {
        let expected = floats(&expected[&parameter.name]);
        let got = parameter.grad.to_f32().unwrap();
        let dot = |other: &[f32]| -> f64 {
            got.iter().zip(other).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum()
        };
        let mut figures = vec![dot(&got).sqrt()];
        figures.extend((0..2).map(|i| dot(&numbers(&format!("{}.{i}", parameter.name), got.len()))));
        let worst = largest(figures.iter().zip(&expected).map(|(a, b)| (a - b).abs()));
        assert!(expected[0] > 1e-4, "{}: a gradient of {}", parameter.name, expected[0]);
        worst / expected[0]
    });
    largest(off)
}

#[test]
fn logits_loss_and_adapter_gradients_equal_those_of_transformers() {
    for device in Device::each() {
        for (family, golden) in &golden() {
            let checkpoint = Checkpoint::new(family, &golden["config"], &golden["tensors"]);
            let mut model = decoder(&checkpoint, &device);
            let batch = batch(VOCAB);
            let ctx = Context::new(batch.sequence_starts.iter().map(|it| *it as usize).collect());
            let (hidden, saved) = model.forward(&ctx, &batch.tokens).unwrap();
            let logits = logits_off(&model, &ctx, &hidden, golden);
            let total = batch.trained_tokens() as f64;
            let dlogp: Vec<f64> =
                batch.trained.iter().map(|it| if *it { -1.0 / total } else { 0.0 }).collect();
            let head = model.head_backward(&hidden, &batch.targets, &dlogp).unwrap();
            model.backward(&ctx, saved, head.dhidden.unwrap()).unwrap();
            let loss: f64 = head.logp.iter().zip(&dlogp).map(|(l, d)| l * d).sum();
            let loss = (loss - golden["loss"].as_f64().unwrap()).abs();
            let gradients = gradients_off(&mut model, golden);
            println!("{family}: logits {logits:.1e}, loss {loss:.1e}, gradients {gradients:.1e}");
            assert!(logits < 1e-4, "{family}: logits off by {logits:.1e}");
            assert!(loss < 1e-4, "{family}: loss off by {loss:.1e}");
            assert!(gradients < 1e-3, "{family}: gradients off by {gradients:.1e}");
        }
    }
}

#[test]
fn merged_models_compute_what_base_and_adapter_compute() {
    for (family, golden) in &golden() {
        let checkpoint = Checkpoint::new(&format!("{family}-merged"), &golden["config"], &golden["tensors"]);
        let files = open(&checkpoint.0);
        let out = checkpoint.0.join("merged");
        let options = FolderOptions { dtype: None, shard_bytes: 50_000 };
        let names: Vec<String> = files.source.names().into_iter().map(str::to_string).collect();
        let adapter = adapter(&files.spec, RANK, SCALING * RANK as f64);
        let merged = merge(files, adapter).unwrap();
        write_folder(&out, &merged, options, &mut |_, _| {}).unwrap();

        // Under the names of the family's own checkpoints, in several files.
        let index: Value =
            serde_json::from_str(&fs::read_to_string(out.join("model.safetensors.index.json")).unwrap())
                .unwrap();
        let map = index["weight_map"].as_object().unwrap();
        let tensors = golden["tensors"].as_object().unwrap();
        // A part for text is written as the model by itself that it is.
        let own = |name: &str| match golden["config"].get("text_config") {
            Some(_) => name.strip_prefix("language_model.").map(str::to_string),
            None => Some(name.to_string()),
        };
        let tensors: BTreeMap<String, &Value> =
            tensors.iter().filter_map(|(name, shape)| Some((own(name)?, shape))).collect();
        assert!(map.keys().eq(tensors.keys()), "{family}");
        let shards: BTreeSet<&str> = map.values().filter_map(Value::as_str).collect();
        assert!(shards.len() > 1, "{family}: {shards:?}");
        let raw = candle_core::safetensors::MmapedSafetensors::multi;
        let paths: Vec<PathBuf> = shards.iter().map(|it| out.join(it)).collect();
        // SAFETY: nobody changes the files.
        let raw = unsafe { raw(&paths) }.unwrap();
        for (name, shape) in &tensors {
            let got = raw.load(name, &CandleDevice::Cpu).unwrap();
            assert_eq!(serde_json::json!(got.dims()), **shape, "{family}: {name}");
        }

        let files = open(&out);
        assert_eq!(files.source.names(), names, "{family}");
        let options = BuildOptions { precision: Precision::Full, dtype: DType::F32, device: Device::Cpu };
        let mut make = |spec: &PartSpec, stored: Stored| dense_part(spec, stored, &options);
        let model = build(&files.spec, files.source.as_ref(), options.clone(), &mut make).unwrap();
        let batch = batch(files.spec.vocab_size);
        let ctx = Context::new(batch.sequence_starts.iter().map(|it| *it as usize).collect());
        let hidden = model.hidden(&ctx, &batch.tokens).unwrap();
        let off = logits_off(&model, &ctx, &hidden, golden);
        println!("{family}: merged logits {off:.1e}");
        assert!(off < 1e-4, "{family}: merged logits off by {off:.1e}");
    }
}

#[test]
fn token_by_token_gives_what_a_whole_pass_gives() {
    for device in Device::each() {
        for (family, golden) in &golden() {
            let model = decoder(
                &Checkpoint::new(&format!("{family}-steps"), &golden["config"], &golden["tensors"]),
                &device,
            );
            let tokens = &batch(VOCAB).tokens[..LENGTHS[0]];
            let whole = model.hidden(&Context::new(vec![0, tokens.len()]), tokens).unwrap().to_f32().unwrap();
            let mut cache = model.cache();
            let step = |token| model.step(&[token], true, &mut cache).unwrap().to_f32().unwrap().to_vec();
            let steps: Vec<f32> = tokens.iter().copied().flat_map(step).collect();
            assert_eq!(steps.len(), whole.len());
            let off = largest(steps.iter().zip(&whole).map(|(a, b)| f64::from(a - b).abs()));
            assert!(off < 1e-4, "{family}: off by {off:.1e}");
        }
    }
}

#[test]
fn configs_of_the_hub_and_of_transformers_5_say_the_same() {
    for (family, golden) in &golden() {
        let read = |key: &str| families::spec(&golden[key], Path::new(key)).unwrap();
        assert_eq!(read("config"), read("saved"), "{family}");
    }
}

#[test]
fn models_of_more_than_text_and_long_ropes_are_refused_by_name() {
    let refused = |config: &Value, expected: &str| {
        let error = families::spec(config, Path::new("config.json")).unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
    };
    let golden = golden();
    let mut mistral = golden["mistral"]["config"].clone();
    mistral["vision_config"] = serde_json::json!({ "hidden_size": 8 });
    refused(&mistral, "`vision_config`");
    let mut phi = golden["phi3_long"]["config"].clone();
    phi["rope_scaling"]["long_factor"] = serde_json::json!([2.0]);
    refused(&phi, "`rope_scaling.long_factor` is [2.0], expected 8 times a positive number");
    phi["model_type"] = "llama".into();
    refused(&phi, "`longrope`");
    for (model_type, expected) in
        [("internlm2", "InternLM 3"), ("deepseek_v3", "deepseek-llm and deepseek-coder (llama)")]
    {
        phi["model_type"] = model_type.into();
        refused(&phi, expected);
    }
}

#[test]
fn a_rope_for_long_sequences_is_settled_before() {
    let golden = golden();
    let mut spec = families::spec(&golden["phi3_short"]["config"], Path::new("short")).unwrap();
    let rope = |spec: &ModelSpec| spec.layers[0].attention.rope.clone().unwrap();
    let short = rope(&spec);
    spec.settle_rope(32);
    assert_eq!(rope(&spec), short);
    spec.settle_rope(33);
    let long = rope(&spec);
    // The last of its factors are 1.4 and 3.
    let ratio = short.inverse_frequencies[3] / long.inverse_frequencies[3];
    assert!((ratio - 3.0 / 1.4).abs() < 1e-12, "{ratio}");
    spec.settle_rope(1);
    assert_eq!(rope(&spec), short);
}

/// DeepSeek's dense models of the first generation say `llama`; InternLM 3 has names of its own for the same things.
#[test]
fn what_reduces_to_llama_does() {
    let base = serde_json::json!({
        "vocab_size": 40, "hidden_size": 64, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 64, "rms_norm_eps": 1e-6, "rope_theta": 100.0,
        "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu",
    });
    let spec = |more: Value| {
        let mut config = base.clone();
        more.as_object().unwrap().iter().for_each(|(key, value)| config[key] = value.clone());
        families::spec(&config, Path::new("config.json")).unwrap()
    };
    let linear = serde_json::json!({ "type": "linear", "factor": 4.0 });
    let coder = spec(serde_json::json!({ "model_type": "llama", "rope_scaling": linear }));
    assert_eq!(coder.family, "llama");
    let dynamic = serde_json::json!({ "rope_type": "dynamic", "factor": 6.0 });
    let intern = spec(serde_json::json!({
        "model_type": "internlm3", "bias": false, "qkv_bias": true, "rope_scaling": dynamic,
        "auto_map": { "AutoModel": "modeling_internlm3.InternLM3Model" },
    }));
    let mut llama = spec(serde_json::json!({ "model_type": "llama" }));
    llama.family = "internlm3";
    llama.layers.iter_mut().for_each(|layer| layer.attention.qkv_bias = true);
    assert_eq!(intern, llama);
}

/// What a config of the hub leaves out: `text_config` has little but sizes.
#[test]
fn a_part_for_text_has_transformers_defaults() {
    let config = serde_json::json!({
        "model_type": "gemma3", "eos_token_id": [1, 106], "torch_dtype": "bfloat16", "mm_tokens_per_image": 256,
        "text_config": {
            "model_type": "gemma3_text", "hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34,
            "rope_scaling": { "factor": 8.0, "rope_type": "linear" }, "sliding_window": 1024,
        },
        "vision_config": { "hidden_size": 1152 },
    });
    let spec = families::spec(&config, Path::new("config.json")).unwrap();
    let attention = &spec.layers[5].attention;
    assert_eq!((spec.vocab_size, spec.max_position_embeddings), (262_208, 131_072));
    assert_eq!(
        (attention.num_attention_heads, attention.num_key_value_heads, attention.head_dim),
        (8, 4, 256)
    );
    assert_eq!((attention.window, spec.layers[4].attention.window), (None, Some(1024)));
    let ends = (spec.bos_token_id, spec.eos_token_ids, spec.pad_token_id);
    assert_eq!(ends, (Some(2), vec![1, 106], Some(0)));
    assert!(spec.tie_word_embeddings);
}

#[test]
fn what_a_family_does_not_know_is_refused_by_name() {
    for (family, golden) in &golden() {
        let mut config = golden["config"].clone();
        let own = if config.get("text_config").is_some() { &mut config["text_config"] } else { &mut config };
        own["logit_twist"] = 0.5.into();
        let error = families::spec(&config, Path::new("config.json")).unwrap_err().to_string();
        assert!(error.contains("`logit_twist` is 0.5"), "{family}: {error}");
    }
}
