//! GGUF files of each family: what is exported is read back and computes the same, and an adapter's file adds what the
//! adapter adds. llama.cpp itself is asked by `cargo xtask peers`.

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::path::{Path, PathBuf};

use candle_core::Device as CandleDevice;
use candle_core::quantized::gguf_file::Content;
use ferrotune_export::{
    GgufMix, GgufModel, GgufTokenizer, PeftAdapter, merge, write_gguf, write_gguf_adapter,
};
use ferrotune_model::source::{GgufVocabulary, ModelFiles, Stored};
use ferrotune_model::spec::names;
use ferrotune_model::{BuildOptions, PartSpec, build, dense_part, families};
use ferrotune_nn::{Context, LanguageModel};
use ferrotune_tensor::{DType, Device, Precision, Tensor};
use serde_json::{Value, json};

mod hashed;

use hashed::{Checkpoint, VOCAB, adapter, llama_cpp_configs};

const RANK: usize = 2;
const TOKENS: [u32; 12] = [1, 17, 4, 33, 9, 0, 21, 5, 38, 2, 11, 7];

/// A folder as transformers would write it; gone when dropped.
struct Model(Checkpoint);

impl Model {
    fn new(name: &str, config: &Value) -> Model {
        let spec = families::spec(config, Path::new("config.json")).unwrap();
        let tensors = spec.checkpoint_tensors().into_iter();
        let shapes: serde_json::Map<String, Value> =
            tensors.map(|it| (it.name.clone(), json!(it.shape()))).collect();
        Model(Checkpoint::new(&format!("gguf-{}", name.replace(' ', "-")), config, &shapes.into()))
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.0.join(name)
    }

    fn files(&self) -> ModelFiles {
        ModelFiles::open(&self.0.0).unwrap()
    }

    fn merged(&self) -> ModelFiles {
        let files = self.files();
        let adapter = rslora(&files);
        merge(files, adapter).unwrap()
    }
}

/// An rsLoRA adapter on every projection.
fn rslora(files: &ModelFiles) -> PeftAdapter {
    PeftAdapter { use_rslora: true, ..adapter(&files.spec, RANK, 3.0) }
}

fn export(files: &ModelFiles, path: &Path, mix: GgufMix) -> Vec<String> {
    let tokens = (0..files.spec.vocab_size - 2).map(|id| format!("<{id}>")).collect();
    let vocabulary = GgufVocabulary {
        model: "gpt2".into(),
        pre: "qwen2".into(),
        tokens,
        bos_token_id: files.spec.bos_token_id,
        eos_token_id: Some(2),
        add_bos_token: Some(false),
        chat_template: Some("{{ messages }}".into()),
        ..GgufVocabulary::default()
    };
    let tokenizer = GgufTokenizer::Made(Box::new(vocabulary));
    let (spec, weights) = (&files.spec, files.source.as_ref());
    let model = GgufModel { spec, weights, tokenizer, name: "Tiny".into(), base_model: None };
    write_gguf(path, &model, mix).unwrap().notes
}

fn logits(files: &ModelFiles) -> Vec<f32> {
    let options = BuildOptions { precision: Precision::Full, dtype: DType::F32, device: Device::Cpu };
    let mut make = |spec: &PartSpec, stored: Stored| dense_part(spec, stored, &options);
    let model = build(&files.spec, files.source.as_ref(), options.clone(), &mut make).unwrap();
    let hidden = model.hidden(&Context::new(vec![0, TOKENS.len()]), &TOKENS).unwrap();
    model.logits(&hidden).unwrap().to_f32().unwrap().to_vec()
}

/// The largest difference by the largest number; not a number where one isn't.
fn difference(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    let not_less = |most: f32, it: f32| if it.is_nan() || it > most { it } else { most };
    let largest = a.iter().fold(0.0, |most, it| not_less(most, it.abs()));
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, not_less) / largest
}

#[test]
fn what_is_exported_is_read_back_and_computes_the_same() {
    for (name, config) in llama_cpp_configs() {
        let checkpoint = Model::new(name, &config);
        let (base, merged) = (checkpoint.files(), checkpoint.merged());
        let expected = logits(&merged);
        assert!(difference(&expected, &logits(&base)) > 0.01, "{name}: the adapter changes nothing");
        for (mix, allowed) in [(GgufMix::F32, 1e-5), (GgufMix::F16, 2e-2), (GgufMix::Q8_0, 1e-1)] {
            let path = checkpoint.path(&format!("{}.gguf", mix.name()));
            assert_eq!(export(&merged, &path, mix), [""; 0], "{name}");
            let again = ModelFiles::open(&path).unwrap();
            let off = difference(&expected, &logits(&again));
            println!("{name} {}: {off:.1e}", mix.name());
            assert!(off < allowed, "{name} {}: logits off by {off:.1e}", mix.name());
            let vocabulary = again.vocabulary.unwrap();
            assert_eq!((vocabulary.tokens.len(), vocabulary.eos_token_id), (VOCAB, Some(2)), "{name}");
            assert_eq!(vocabulary.tokens[VOCAB - 1], format!("[PAD{}]", VOCAB - 1));
            assert_eq!(vocabulary.token_types[VOCAB - 1], 5);
        }
    }
}

/// All tensors of a GGUF file, dequantised, as candle's reader sees them.
fn raw(path: &Path) -> (Content, BTreeMap<String, candle_core::Tensor>) {
    let mut file = File::open(path).unwrap();
    let content = Content::read(&mut file).unwrap();
    let names: Vec<String> = content.tensor_infos.keys().cloned().collect();
    let read = |name: String| {
        let tensor = content.tensor(&mut file, &name, &CandleDevice::Cpu).unwrap();
        (name, tensor.dequantize(&CandleDevice::Cpu).unwrap())
    };
    let tensors = names.into_iter().map(read).collect();
    (content, tensors)
}

#[test]
fn base_and_adapter_files_are_together_the_merged_file() {
    for (name, config) in llama_cpp_configs() {
        let checkpoint = Model::new(&format!("{name}-adapter"), &config);
        let (files, merged) = (checkpoint.files(), checkpoint.merged());
        let path = |it: &str| checkpoint.path(&format!("{it}.gguf"));
        export(&files, &path("base"), GgufMix::F32);
        export(&merged, &path("merged"), GgufMix::F32);
        write_gguf_adapter(&path("adapter"), &files.spec, &rslora(&files), "Tiny").unwrap();
        let (content, adapter) = raw(&path("adapter"));
        let text = |key: &str| content.metadata[key].to_string().unwrap().clone();
        assert_eq!((text("general.type"), text("adapter.type")), ("adapter".to_string(), "lora".to_string()));
        let alpha = f64::from(content.metadata["adapter.lora.alpha"].to_f32().unwrap());
        let (base, merged) = (raw(&path("base")).1, raw(&path("merged")).1);
        let mut changed = 0;
        for (tensor, expected) in &merged {
            let mut got = base[tensor].clone();
            if let Some(a) = adapter.get(&format!("{tensor}.lora_a")) {
                // llama.cpp: alpha by the rank that the file has.
                let b = &adapter[&format!("{tensor}.lora_b")];
                let delta =
                    b.matmul(a).unwrap().affine(alpha / *b.dims().last().unwrap() as f64, 0.0).unwrap();
                got = (got + delta).unwrap();
                changed += 1;
            }
            let flat = |it: &candle_core::Tensor| it.flatten_all().unwrap().to_vec1::<f32>().unwrap();
            let off = difference(&flat(expected), &flat(&got));
            assert!(off < 1e-6, "{name}: {tensor} off by {off:.1e}");
        }
        assert_eq!(2 * changed, adapter.len(), "{name}: some of the adapter has no place");
    }
}

#[test]
fn what_llama_cpp_does_not_compute_is_refused_by_name() {
    let all: HashMap<&str, Value> = llama_cpp_configs().into_iter().collect();
    let check = |name: &str, change: Value, expected: &str| {
        let mut config = all[name].as_object().unwrap().clone();
        config.extend(change.as_object().unwrap().clone());
        let checkpoint = Model::new(&format!("{name}-refused"), &Value::Object(config));
        let files = checkpoint.files();
        let (spec, weights) = (&files.spec, files.source.as_ref());
        let tokenizer = GgufTokenizer::Kept(Vec::new());
        let model = GgufModel { spec, weights, tokenizer, name: "Tiny".into(), base_model: None };
        let path = checkpoint.path("x.gguf");
        let error = write_gguf(&path, &model, GgufMix::F32).unwrap_err().to_string();
        assert!(error.contains(&format!("llama.cpp has no {expected}")), "{error}");
        assert!(!path.exists());
    };
    check("qwen3", json!({ "attention_bias": true }), "biases of o_proj");
    check("smollm3", json!({ "no_rope_layers": [1, 0, 1, 0] }), "positions in these layers");
    check("gemma2", json!({ "query_pre_attn_scalar": 20 }), "a scale of the scores");
    check("gemma2", json!({ "final_logit_softcapping": null }), "logits that aren't capped");
    check("gemma", json!({ "tie_word_embeddings": false }), "a head of its own");
    check("qwen2", json!({ "head_dim": 32 }), "heads of another width");
    check("qwen3_moe", json!({ "norm_topk_prob": false }), "experts whose weights don't add up to 1");
    check("qwen3_moe", json!({ "mlp_only_layers": [1] }), "layers without experts");
    check("cohere2", json!({ "head_dim": 32 }), "heads of another width");
    let llama3 = all["llama"]["rope_scaling"].clone();
    check("qwen2", json!({ "rope_scaling": llama3 }), "a rope scaled this way");

    let window = json!({ "sliding_window": 4 });
    let mut config = all["mistral"].as_object().unwrap().clone();
    config.extend(window.as_object().unwrap().clone());
    let checkpoint = Model::new("mistral-window", &Value::Object(config));
    let notes = export(&checkpoint.files(), &checkpoint.path("x.gguf"), GgufMix::F32);
    assert!(notes[0].contains("beyond 4 tokens"), "{notes:?}");

    let files = checkpoint.files();
    let mut adapter = rslora(&files);
    adapter.saved.insert(names::HEAD.into(), Tensor::from_vec(1, 1, vec![0.0f32]).unwrap());
    let error = write_gguf_adapter(&checkpoint.path("y.gguf"), &files.spec, &adapter, "Tiny").unwrap_err();
    assert!(error.to_string().contains("the whole tensor `lm_head.weight`"), "{error}");
}
