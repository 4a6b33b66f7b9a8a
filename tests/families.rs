//! Each family against transformers: logits, loss, and the gradients of adapters on every projection. The
//! numbers are `fixtures/make_families.py`'s; weights, adapters and tokens come from a hash of their names.

mod hashed;

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use candle_core::Device as CandleDevice;
use ferrotune_export::{FolderOptions, merge, write_folder};
use ferrotune_lora::LoraAdapter;
use ferrotune_model::source::{ModelFiles, Stored};
use ferrotune_model::{BuildOptions, Decoder, PartSpec, build, dense_part, families};
use ferrotune_nn::{Context, LanguageModel};
use ferrotune_tensor::{DType, Device, Precision, Result, Tensor};
use serde_json::Value;

use hashed::{Checkpoint, LENGTHS, adapter, batch, floats, largest, logits_off, numbers, weight};

const RANK: usize = 2;
const SCALING: f64 = 2.0;

fn golden() -> serde_json::Map<String, Value> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/families.json");
    serde_json::from_str(&fs::read_to_string(path).unwrap()).unwrap()
}

fn decoder(checkpoint: &Checkpoint, device: &Device) -> Decoder {
    let options = BuildOptions { precision: Precision::Full, dtype: DType::F32, device: device.clone() };
    let files = ModelFiles::open(&checkpoint.0).unwrap();
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
            let batch = batch(golden["config"]["vocab_size"].as_u64().unwrap() as usize);
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
        let files = ModelFiles::open(&checkpoint.0).unwrap();
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
        let expected: BTreeSet<&String> = tensors.keys().collect();
        assert_eq!(map.keys().collect::<BTreeSet<_>>(), expected, "{family}");
        let shards: BTreeSet<&str> = map.values().filter_map(Value::as_str).collect();
        assert!(shards.len() > 1, "{family}: {shards:?}");
        let raw = candle_core::safetensors::MmapedSafetensors::multi;
        let paths: Vec<PathBuf> = shards.iter().map(|it| out.join(it)).collect();
        // SAFETY: nobody changes the files.
        let raw = unsafe { raw(&paths) }.unwrap();
        for (name, shape) in tensors {
            let got = raw.load(name, &CandleDevice::Cpu).unwrap();
            assert_eq!(serde_json::json!(got.dims()), *shape, "{family}: {name}");
        }

        let files = ModelFiles::open(&out).unwrap();
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
            let tokens =
                &batch(golden["config"]["vocab_size"].as_u64().unwrap() as usize).tokens[..LENGTHS[0]];
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
    let mut gemma = golden["gemma3_text"]["config"].clone();
    gemma["vision_config"] = serde_json::json!({ "hidden_size": 8 });
    refused(&gemma, "`vision_config`");
    let mut phi = golden["phi3"]["config"].clone();
    phi["rope_scaling"] =
        serde_json::json!({ "type": "longrope", "short_factor": [1.0], "long_factor": [2.0] });
    refused(&phi, "`longrope`");
}

#[test]
fn what_a_family_does_not_know_is_refused_by_name() {
    for (family, golden) in &golden() {
        let mut config = golden["config"].clone();
        config["logit_twist"] = 0.5.into();
        let error = families::spec(&config, Path::new("config.json")).unwrap_err().to_string();
        assert!(error.contains("`logit_twist` is 0.5"), "{family}: {error}");
    }
}
