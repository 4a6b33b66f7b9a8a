//! A mixture of experts from the file to the answer: 4-bit experts, adapters on all of them, merged at the end.

use std::collections::HashMap;
use std::fs;

use candle_core::Device as CandleDevice;
use ferrotune_model::families;
use ferrotune_model::source::{SafetensorsSource, WeightSource};
use ferrotune_tensor::{Counter, stream_of, uniform};
use serde_json::json;

use crate::train::with_config;
use crate::util::{Dir, TINY, repository};

/// A folder as the hub has it, with TINY's tokenizer.
fn mixtral(dir: &Dir) -> String {
    let config = json!({
        "model_type": "mixtral", "architectures": ["MixtralForCausalLM"], "vocab_size": 300, "hidden_size": 64,
        "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "num_local_experts": 4, "num_experts_per_tok": 2, "rms_norm_eps": 1e-5, "rope_theta": 1e4, "torch_dtype": "float32",
        "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu", "max_position_embeddings": 512
    });
    let file = dir.file("mixtral/config.json", config.to_string());
    let spec = families::spec(&config, &file).expect("a config");
    let tensor = |it: ferrotune_model::spec::CheckpointTensor| {
        let count = it.rows * it.cols;
        let mut values = uniform(Counter::new(&[stream_of(&it.name)]), 0.2, count);
        if it.name.ends_with("norm.weight") {
            values.iter_mut().for_each(|it| *it += 1.0);
        }
        let shape = it.shape();
        (it.name, candle_core::Tensor::from_vec(values, shape, &CandleDevice::Cpu).expect("numbers"))
    };
    let tensors: HashMap<String, candle_core::Tensor> =
        spec.checkpoint_tensors().into_iter().map(tensor).collect();
    assert!(tensors.contains_key("model.layers.1.block_sparse_moe.experts.3.w2.weight"));
    candle_core::safetensors::save(&tensors, file.with_file_name("model.safetensors")).expect("a file");
    for name in ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"] {
        dir.file(&format!("mixtral/{name}"), fs::read(repository(TINY).join(name)).expect(name));
    }
    "mixtral".to_string()
}

#[test]
fn experts_in_four_bits_are_adapted_and_merged() {
    let dir = with_config("max_steps: 12\nquantization_bit: 4\nlora_target: all\ndevice: cpu\n");
    let model = mixtral(&dir);
    dir.ferrotune(&["train", "c.yaml", &format!("model_name_or_path={model}")]).succeeds();
    let losses = dir.losses("out");
    assert!(losses[11] < losses[0] - 0.5, "{losses:?}");
    let adapter =
        SafetensorsSource::open_file(&dir.path().join("out/adapter_model.safetensors")).expect("the adapter");
    let trained = |expert: usize| {
        let name = format!("base_model.model.model.layers.1.mlp.experts.{expert}.down_proj.lora_B.weight");
        adapter
            .get_f32(&name)
            .expect("an expert's adapter")
            .to_f32()
            .expect(&name)
            .iter()
            .any(|it| *it != 0.0)
    };
    assert!((0..4).any(trained), "no expert has learned");
    let merge = ["export", "--model", &model, "--adapter", "out", "--output", "merged"];
    dir.ferrotune(&merge).succeeds();
    let with_adapter = dir.logits(&["--model", &model, "--adapter", "out", "--ids", "5,6,7"]);
    let merged = dir.logits(&["--model", "merged", "--ids", "5,6,7"]);
    let off =
        |logits: &[f64]| with_adapter.iter().zip(logits).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
    assert!(off(&merged) < 1e-3, "merged logits are off by {}", off(&merged));

    // What is written is read again and compared, in few bits with the same rounding in memory.
    for format in ["gguf-f32", "gguf-q8_0", "gguf-adapter", "bnb-4bit"] {
        let more = ["export", "--model", &model, "--adapter", "out", "--output", format, "--format", format];
        let ran = dir.ferrotune(&more).succeeds();
        let verified = format == "gguf-adapter" || ran.stderr.contains("verified");
        assert!(verified, "{format}: {}", ran.stderr);
        assert_eq!(ran.stderr.contains("experts stay in 16 bits"), format == "bnb-4bit", "{}", ran.stderr);
    }
    let file = fs::read_dir(dir.path().join("gguf-f32")).expect("a folder").flatten();
    let file =
        file.map(|it| it.path()).find(|it| it.extension().is_some_and(|it| it == "gguf")).expect("a file");
    let read = dir.logits(&["--model", &file.display().to_string(), "--ids", "5,6,7"]);
    assert!(off(&read) < 1e-3, "logits of the GGUF file are off by {}", off(&read));
}
