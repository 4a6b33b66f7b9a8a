//! Tiny models whose weights are hashes of their names, as `fixtures/make_families.py` has them: nothing needs to be stored.
#![allow(dead_code, reason = "each test binary uses some of it")]

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::path::PathBuf;

use candle_core::{DType as CandleDType, Device as CandleDevice};
use ferrotune_data::{Batch, Sample};
use ferrotune_export::{LoraTensors, ModulePlace, Modules, PeftAdapter};
use ferrotune_model::Decoder;
use ferrotune_model::spec::ModelSpec;
use ferrotune_nn::Context;
use ferrotune_tensor::Tensor;
pub use ferrotune_tests::hashed as numbers;
use serde_json::{Value, json};

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
        place: ModulePlace::Model,
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

/// Rows of the embedding of those below.
pub const VOCAB: usize = 40;

/// Tiny models with all that llama.cpp computes of each family.
pub fn llama_cpp_configs() -> Vec<(&'static str, Value)> {
    let base = json!({
        "vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "hidden_act": "silu",
        "rms_norm_eps": 1e-6, "rope_theta": 100.0, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3,
        "tie_word_embeddings": false,
    });
    let llama3 = json!({
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    });
    let gelu = "gelu_pytorch_tanh";
    let all = [
        ("llama", "llama", json!({ "rope_scaling": llama3, "attention_bias": true, "mlp_bias": true })),
        ("mistral", "mistral", json!({ "head_dim": 32 })),
        ("qwen2", "qwen2", json!({ "tie_word_embeddings": true })),
        (
            "qwen3",
            "qwen3",
            json!({ "head_dim": 32, "rope_scaling": { "rope_type": "linear", "factor": 2.0 } }),
        ),
        ("smollm3", "smollm3", json!({ "num_hidden_layers": 4 })),
        ("olmo2", "olmo2", json!({ "rms_norm_eps": 1e-5 })),
        ("olmo2 tied", "olmo2", json!({ "tie_word_embeddings": true })),
        (
            "granite",
            "granite",
            json!({
                "attention_bias": true, "mlp_bias": true, "embedding_multiplier": 3.0, "attention_multiplier": 0.2,
                "residual_multiplier": 0.6, "logits_scaling": 2.5, "tie_word_embeddings": true,
            }),
        ),
        (
            "gemma",
            "gemma",
            json!({ "head_dim": 32, "hidden_act": "gelu", "tie_word_embeddings": true, "num_key_value_heads": 1 }),
        ),
        (
            "gemma2",
            "gemma2",
            json!({
                "head_dim": 32, "hidden_activation": gelu, "tie_word_embeddings": true, "query_pre_attn_scalar": 32,
                "sliding_window": 4, "attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0,
            }),
        ),
        (
            "gemma3",
            "gemma3_text",
            json!({
                "head_dim": 32, "hidden_activation": gelu, "num_hidden_layers": 3, "tie_word_embeddings": true,
                "query_pre_attn_scalar": 32, "sliding_window": 4, "sliding_window_pattern": 2,
                "rope_local_base_freq": 10.0, "rope_scaling": { "rope_type": "linear", "factor": 8.0 },
            }),
        ),
        ("phi3", "phi3", json!({ "partial_rotary_factor": 0.5 })),
        (
            "phi3 long",
            "phi3",
            json!({
                "partial_rotary_factor": 0.5, "original_max_position_embeddings": 8, "rope_scaling": {
                    "type": "longrope", "short_factor": [1.0, 1.1, 1.2, 1.4], "long_factor": [1.0, 2.0, 4.0, 8.0],
                },
            }),
        ),
        ("mixtral", "mixtral", json!({ "num_local_experts": 5, "num_experts_per_tok": 2 })),
        (
            "qwen3_moe",
            "qwen3_moe",
            json!({
                "head_dim": 32, "num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 32,
                "norm_topk_prob": true, "tie_word_embeddings": true,
            }),
        ),
        (
            "cohere2",
            "cohere2",
            json!({
                "num_hidden_layers": 3, "layer_norm_eps": 1e-5, "logit_scale": 0.25, "sliding_window": 4,
                "sliding_window_pattern": 2, "tie_word_embeddings": true,
            }),
        ),
    ];
    let config = |(name, family, more): (&'static str, &str, Value)| {
        let mut config = base.as_object().unwrap().clone();
        config.insert("model_type".into(), family.into());
        config.extend(more.as_object().unwrap().clone());
        (name, Value::Object(config))
    };
    all.map(config).to_vec()
}
