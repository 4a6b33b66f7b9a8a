//! Each family against transformers: logits, loss, and the gradients of adapters on every projection. The
//! numbers are `fixtures/make_families.py`'s; weights, adapters and tokens come from a hash of their names.

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};

use candle_core::Device as CandleDevice;
use ferrotune_data::{Batch, Sample};
use ferrotune_lora::LoraAdapter;
use ferrotune_model::source::{ModelFiles, Stored};
use ferrotune_model::{BuildOptions, Decoder, PartSpec, build, dense_part, families};
use ferrotune_nn::{Context, LanguageModel};
use ferrotune_tensor::{DType, Device, Precision, Result, Tensor};
use ferrotune_tests::hashed;
use serde_json::Value;

const RANK: usize = 2;
const SCALING: f64 = 2.0;
const LENGTHS: [usize; 2] = [12, 7];
const POSITIONS: [&[usize]; 2] = [&[0, 3, 6, 11], &[2, 6]];

fn weight(name: &str, count: usize) -> Vec<f32> {
    let norm = name.contains("norm");
    hashed(name, count).into_iter().map(|it| if norm { 1.0 + it / 2.0 } else { it / 4.0 }).collect()
}

fn golden() -> serde_json::Map<String, Value> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/families.json");
    serde_json::from_str(&fs::read_to_string(path).unwrap()).unwrap()
}

fn floats(value: &Value) -> Vec<f64> {
    value.as_array().unwrap().iter().map(|it| it.as_f64().unwrap()).collect()
}

/// A checkpoint as transformers would write it; gone when dropped.
struct Checkpoint(PathBuf);

impl Checkpoint {
    fn new(family: &str, golden: &Value) -> Checkpoint {
        let folder = std::env::temp_dir().join(format!("ferrotune-{family}-{}", std::process::id()));
        fs::create_dir_all(&folder).unwrap();
        fs::write(folder.join("config.json"), golden["config"].to_string()).unwrap();
        let tensors = golden["tensors"].as_object().unwrap().iter().map(|(name, shape)| {
            let shape: Vec<usize> = floats(shape).into_iter().map(|it| it as usize).collect();
            let values = weight(name, shape.iter().product());
            (name.clone(), candle_core::Tensor::from_vec(values, shape, &CandleDevice::Cpu).unwrap())
        });
        let tensors: HashMap<String, candle_core::Tensor> = tensors.collect();
        candle_core::safetensors::save(&tensors, folder.join("model.safetensors")).unwrap();
        Checkpoint(folder)
    }

    fn decoder(&self, device: &Device) -> Decoder {
        let options = BuildOptions { precision: Precision::Full, dtype: DType::F32, device: device.clone() };
        let files = ModelFiles::open(&self.0).unwrap();
        let mut make = |spec: &PartSpec, stored: Stored| -> Result<_> {
            let mut part = dense_part(spec, stored, &options)?;
            let matrix = |kind: &str, rows: usize, cols: usize| {
                Tensor::from_vec(rows, cols, weight(&format!("{}.{kind}.weight", spec.name), rows * cols))
            };
            let (a, b) =
                (matrix("lora_A", RANK, spec.in_features)?, matrix("lora_B", spec.out_features, RANK)?);
            let adapter = LoraAdapter::from_parts(&spec.name, a, b, SCALING, 0.0, Precision::Full)?;
            part.adapter = Some(Box::new(adapter.to_device(device, DType::F32)?));
            Ok(part)
        };
        build(&files.spec, files.source.as_ref(), options.clone(), &mut make).unwrap()
    }
}

impl Drop for Checkpoint {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn batch(vocab_size: usize) -> Batch {
    let samples = LENGTHS.iter().enumerate().map(|(index, length)| {
        let tokens = hashed(&format!("tokens.{index}"), *length);
        let tokens = tokens.iter().map(|it| ((f64::from(*it) + 1.0) / 2.0 * vocab_size as f64) as u32);
        Sample { tokens: tokens.collect(), trained: vec![true; *length], ..Sample::default() }
    });
    Batch::new(&samples.collect::<Vec<_>>())
}

/// The largest difference of the logits, relative to them where they are above 1.
fn logits_off(model: &Decoder, ctx: &Context, hidden: &Tensor, golden: &Value) -> f64 {
    let logits = model.logits(hidden).unwrap();
    let (values, cols) = (logits.to_f32().unwrap(), logits.cols());
    let rows = POSITIONS
        .iter()
        .zip(ctx.sequences())
        .flat_map(|(positions, sequence)| positions.iter().map(move |position| sequence.start + position));
    let expected = golden["logits"].as_array().unwrap();
    let rows: Vec<usize> = rows.collect();
    assert_eq!((rows.len(), floats(&expected[0]).len()), (expected.len(), cols));
    let off = rows.iter().zip(expected).flat_map(|(row, expected)| {
        let got = values[row * cols..][..cols].to_vec();
        got.into_iter().zip(floats(expected)).map(|(got, it)| (f64::from(got) - it).abs() / it.abs().max(1.0))
    });
    largest(off)
}

/// Not a number where one isn't.
fn largest(numbers: impl Iterator<Item = f64>) -> f64 {
    numbers.fold(0.0, |most, it| if most.is_nan() || it <= most { most } else { it })
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
        figures.extend((0..2).map(|i| dot(&hashed(&format!("{}.{i}", parameter.name), got.len()))));
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
            let checkpoint = Checkpoint::new(family, golden);
            let mut model = checkpoint.decoder(&device);
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
fn token_by_token_gives_what_a_whole_pass_gives() {
    for device in Device::each() {
        for (family, golden) in &golden() {
            let model = Checkpoint::new(&format!("{family}-steps"), golden).decoder(&device);
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
