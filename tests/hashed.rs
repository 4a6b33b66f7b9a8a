//! Tiny models whose weights are hashes of their names, as `fixtures/make_families.py` has them: nothing needs to be stored.
#![allow(dead_code, reason = "each test binary uses some of it")]

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::path::PathBuf;

use candle_core::{DType as CandleDType, Device as CandleDevice};
use ferrotune_data::{Batch, Sample};
use ferrotune_export::{LoraTensors, Modules, PeftAdapter};
use ferrotune_model::Decoder;
use ferrotune_model::spec::ModelSpec;
use ferrotune_nn::Context;
use ferrotune_tensor::Tensor;
pub use ferrotune_tests::hashed as numbers;
use serde_json::Value;

pub const LENGTHS: [usize; 2] = [12, 7];
pub const POSITIONS: [&[usize]; 2] = [&[0, 3, 6, 11], &[2, 6]];

pub fn weight(name: &str, count: usize) -> Vec<f32> {
    let norm = name.contains("norm");
    numbers(name, count).into_iter().map(|it| if norm { 1.0 + it / 2.0 } else { it / 4.0 }).collect()
}

pub fn floats(value: &Value) -> Vec<f64> {
    value.as_array().unwrap().iter().map(|it| it.as_f64().unwrap()).collect()
}

/// A checkpoint as transformers would write it; gone when dropped.
pub struct Checkpoint(pub PathBuf);

impl Checkpoint {
    pub fn new(name: &str, config: &Value, shapes: &Value) -> Checkpoint {
        let folder = std::env::temp_dir().join(format!("ferrotune-{name}-{}", std::process::id()));
        fs::create_dir_all(&folder).unwrap();
        fs::write(folder.join("config.json"), config.to_string()).unwrap();
        let dtype = match config["torch_dtype"].as_str() {
            Some("bfloat16") => CandleDType::BF16,
            _ => CandleDType::F32,
        };
        let tensors = shapes.as_object().unwrap().iter().map(|(name, shape)| {
            let shape: Vec<usize> = floats(shape).into_iter().map(|it| it as usize).collect();
            let values = weight(name, shape.iter().product());
            let tensor = candle_core::Tensor::from_vec(values, shape, &CandleDevice::Cpu).unwrap();
            (name.clone(), tensor.to_dtype(dtype).unwrap())
        });
        let tensors: HashMap<String, candle_core::Tensor> = tensors.collect();
        candle_core::safetensors::save(&tensors, folder.join("model.safetensors")).unwrap();
        Checkpoint(folder)
    }
}

impl Drop for Checkpoint {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

pub fn batch(vocab_size: usize) -> Batch {
    let samples = LENGTHS.iter().enumerate().map(|(index, length)| {
        let tokens = numbers(&format!("tokens.{index}"), *length);
        let tokens = tokens.iter().map(|it| ((f64::from(*it) + 1.0) / 2.0 * vocab_size as f64) as u32);
        Sample { tokens: tokens.collect(), trained: vec![true; *length], ..Sample::default() }
    });
    Batch::new(&samples.collect::<Vec<_>>())
}

/// The largest difference of the logits, relative to them where they are above 1.
pub fn logits_off(model: &Decoder, ctx: &Context, hidden: &Tensor, golden: &Value) -> f64 {
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
pub fn largest(numbers: impl Iterator<Item = f64>) -> f64 {
    numbers.fold(0.0, |most, it| if most.is_nan() || it <= most { most } else { it })
}

/// An adapter on every projection, as a folder holds it.
pub fn adapter(spec: &ModelSpec, r: usize, lora_alpha: f64) -> PeftAdapter {
    let tensors = spec.projections().map(|(module, it)| {
        let matrix = |kind: &str, rows: usize, cols: usize| {
            Tensor::from_vec(rows, cols, weight(&format!("{module}.{kind}.weight"), rows * cols)).unwrap()
        };
        let (a, b) = (matrix("lora_A", r, it.in_features), matrix("lora_B", it.out_features, r));
        LoraTensors { module, a, b, magnitude: None }
    });
    PeftAdapter {
        base_model_name_or_path: String::new(),
        revision: None,
        r,
        lora_alpha,
        lora_dropout: 0.0,
        use_rslora: false,
        use_dora: false,
        target_modules: Modules::Pattern("all-linear".into()),
        exclude_modules: None,
        layers_to_transform: Vec::new(),
        saved: BTreeMap::new(),
        tensors: tensors.collect(),
    }
}
