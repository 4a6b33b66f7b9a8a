//! A whole decoder on a GPU, token by token, against the whole pass on the CPU.

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};

use ferrotune_lora::LoraAdapter;
use ferrotune_model::source::{ModelFiles, Stored};
use ferrotune_model::{BuildOptions, Decoder, PartSpec, TokenSteps, build, dense_part};
use ferrotune_nn::check::seeded;
use ferrotune_nn::{Activation, Context, LanguageModel, Layer, Linear, Mlp, Part};
use ferrotune_quant::{Nf4GpuWeight, Nf4Weight, Scales};
use ferrotune_tensor::{DType, Device, Precision, Result};

const HIDDEN: usize = 192;
const INNER: usize = 1088;
const VOCAB: usize = 300;
const LAYERS: usize = 2;
const HEADS: (usize, usize, usize) = (6, 2, 32); // H, K, D
const RANK: usize = 5;

/// How the projections are stored.
#[derive(Clone, Copy, Debug)]
enum Base {
    Dense,
    Nf4(Scales),
}

/// Random numbers under the names of a checkpoint; every dimension divides by 64, as the kernels for single rows want it.
fn checkpoint() -> PathBuf {
    let folder = std::env::temp_dir().join(format!("ferrotune-devices-{}", std::process::id()));
    fs::create_dir_all(&folder).unwrap();
    let (heads, kv_heads, head_dim) = HEADS;
    let config = serde_json::json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": VOCAB, "hidden_size": HIDDEN,
        "num_hidden_layers": LAYERS, "num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": head_dim,
        "intermediate_size": INNER, "tie_word_embeddings": true, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
        "max_position_embeddings": 512, "hidden_act": "silu", "torch_dtype": "float32",
    });
    fs::write(folder.join("config.json"), config.to_string()).unwrap();
    let mut tensors = HashMap::new();
    let mut add = |name: String, rows: usize, cols: usize, scale: f32| {
        let values: Vec<f32> = seeded(rows, cols, tensors.len() as u64 + 1).to_f32().unwrap();
        let values: Vec<f32> = values.iter().map(|it| it * scale).collect();
        let shape: &[usize] = if cols == 1 { &[rows] } else { &[rows, cols] };
        let tensor = candle_core::Tensor::from_vec(values, shape, &candle_core::Device::Cpu).unwrap();
        tensors.insert(name, tensor);
    };
    add("model.embed_tokens.weight".into(), VOCAB, HIDDEN, 1.0);
    add("model.norm.weight".into(), HIDDEN, 1, 2.0);
    for layer in 0..LAYERS {
        let at = format!("model.layers.{layer}.");
        let (q, kv) = (heads * head_dim, kv_heads * head_dim);
        for (part, rows, cols) in [
            ("self_attn.q_proj", q, HIDDEN),
            ("self_attn.k_proj", kv, HIDDEN),
            ("self_attn.v_proj", kv, HIDDEN),
            ("self_attn.o_proj", HIDDEN, q),
            ("mlp.gate_proj", INNER, HIDDEN),
            ("mlp.up_proj", INNER, HIDDEN),
            ("mlp.down_proj", HIDDEN, INNER),
        ] {
            add(format!("{at}{part}.weight"), rows, cols, 0.3);
        }
        add(format!("{at}input_layernorm.weight"), HIDDEN, 1, 2.0);
        add(format!("{at}post_attention_layernorm.weight"), HIDDEN, 1, 2.0);
    }
    candle_core::safetensors::save(&tensors, folder.join("model.safetensors")).unwrap();
    folder
}

fn decoder(folder: &Path, device: &Device, dtype: DType, base: Base) -> Decoder {
    let options = BuildOptions { precision: Precision::Full, dtype, device: device.clone() };
    let files = ModelFiles::open(folder).unwrap();
    let mut make = |spec: &PartSpec, weight: Stored| -> Result<_> {
        let original = match &weight {
            Stored::Dense(value) => value.try_clone()?,
            _ => unreachable!("the checkpoint has plain numbers"),
        };
        let mut part = dense_part(spec, weight, &options)?;
        if let Base::Nf4(scales) = base {
            let stored = Nf4Weight::quantize(&original, scales, Precision::Full)?;
            part.weight = match device.gpu() {
                Some(gpu) => Box::new(Nf4GpuWeight::from_cpu(stored, gpu)?),
                None => Box::new(stored),
            };
        }
        let seed = spec.name.bytes().map(u64::from).sum();
        let random = |rows: usize, cols: usize, seed: u64| seeded(rows, cols, seed).cast(DType::F32);
        let (a, b) = (random(RANK, spec.in_features, seed)?, random(spec.out_features, RANK, seed + 1)?);
        let adapter = LoraAdapter::from_parts(&spec.name, a, b, 0.5, 0.0, Precision::Full)?;
        part.adapter = Some(Box::new(adapter.to_device(device, dtype)?));
        Ok(part)
    };
    build(&files.spec, files.source.as_ref(), options.clone(), &mut make).unwrap()
}

/// Logits (tokens, V) of the whole pass.
fn whole(model: &Decoder, tokens: &[u32], adapters: bool) -> Vec<f32> {
    let ctx = Context { adapters, ..Context::new(vec![0, tokens.len()]) };
    let hidden = model.hidden(&ctx, tokens).unwrap();
    model.logits(&hidden).unwrap().to_f32().unwrap()
}

/// The same after a prompt and then token by token; on a GPU recorded, growing the cache on the way.
fn piecewise(model: &Decoder, tokens: &[u32], adapters: bool) -> Vec<f32> {
    let mut cache = model.cache();
    let (prompt, rest) = tokens.split_at(3);
    let hidden = model.step(prompt, adapters, &mut cache).unwrap();
    let mut logits = model.logits(&hidden).unwrap().to_f32().unwrap();
    if !TokenSteps::are_for(model, adapters).unwrap() {
        assert!(hidden.gpu().is_none(), "there are kernels for all of this model");
        for token in rest {
            let hidden = model.step(&[*token], adapters, &mut cache).unwrap();
            logits.extend(model.logits(&hidden).unwrap().to_f32().unwrap());
        }
        return logits;
    }
    let mut steps = TokenSteps::new(model, &mut cache, adapters).unwrap();
    for (i, token) in rest.iter().enumerate() {
        steps.step(*token).unwrap();
        let all = steps.logits().unwrap();
        if i % 3 == 0 {
            let best = (0..VOCAB).fold(0, |best, it| if all[it] > all[best] { it } else { best });
            assert_eq!(steps.most_likely().unwrap(), best as u32);
        }
        logits.extend(all);
    }
    logits
}

#[test]
fn a_token_at_a_time_gives_what_the_whole_pass_gives() {
    let folder = checkpoint();
    let tokens: Vec<u32> = (0..300).map(|i| i * 7919 % VOCAB as u32).collect();
    for base in [Base::Dense, Base::Nf4(Scales::Plain), Base::Nf4(Scales::Nested)] {
        let expected =
            [true, false].map(|on| whole(&decoder(&folder, &Device::Cpu, DType::F32, base), &tokens, on));
        for device in Device::each() {
            let bf16 = device.gpu().is_some_and(|it| it.has_bf16());
            for (dtype, tolerance) in [(DType::F32, 2e-5), (DType::F16, 4e-3), (DType::BF16, 3e-2)] {
                if dtype != DType::F32 && (device.gpu().is_none() || dtype == DType::BF16 && !bf16) {
                    continue;
                }
                let model = decoder(&folder, &device, dtype, base);
                for (expected, adapters) in expected.iter().zip([true, false]) {
                    let got = piecewise(&model, &tokens, adapters);
                    let norm = |it: &[f64]| it.iter().map(|it| it * it).sum::<f64>().sqrt();
                    let off: Vec<f64> = got.iter().zip(expected).map(|(a, b)| f64::from(a - b)).collect();
                    let all: Vec<f64> = expected.iter().map(|it| f64::from(*it)).collect();
                    let error = norm(&off) / norm(&all);
                    let what = format!("token by token, {base:?}, adapters {adapters}");
                    eprintln!("{what:<60} {:<5} {error:.1e}", dtype.as_str());
                    assert!(
                        got.len() == expected.len() && error < tolerance,
                        "{what} on {device:?}: {error:.1e}"
                    );
                }
            }
        }
    }
    fs::remove_dir_all(folder).unwrap();
}

/// Parts of so many rows and ranks (0: no adapter) that read `inputs` numbers.
fn adapted(device: &Device, dtype: DType, base: Base, inputs: usize, parts: &[(usize, usize)]) -> Linear {
    let part = |(i, (rows, rank)): (usize, &(usize, usize))| -> Result<Part> {
        let random = |rows: usize, cols: usize, seed: usize| -> Result<_> {
            let mut values = seeded(rows, cols, (100 * i + seed) as u64);
            values.scale(0.3)?;
            values.cast(DType::F32)
        };
        let name = format!("part {i}");
        let spec = PartSpec { name: name.clone(), out_features: *rows, in_features: inputs };
        let options = BuildOptions { precision: Precision::Full, dtype, device: device.clone() };
        let original = random(*rows, inputs, 1)?;
        let mut part = dense_part(&spec, Stored::Dense(original.try_clone()?), &options)?;
        if let Base::Nf4(scales) = base {
            let stored = Nf4Weight::quantize(&original, scales, Precision::Full)?;
            part.weight = match device.gpu() {
                Some(gpu) => Box::new(Nf4GpuWeight::from_cpu(stored, gpu)?),
                None => Box::new(stored),
            };
        }
        if *rank > 0 {
            let (a, b) = (random(*rank, inputs, 2)?, random(*rows, *rank, 3)?);
            let adapter = LoraAdapter::from_parts(&name, a, b, 0.5, 0.0, Precision::Full)?;
            part.adapter = Some(Box::new(adapter.to_device(device, dtype)?));
        }
        Ok(part)
    };
    Linear::new(parts.iter().enumerate().map(|it| part(it).unwrap()).collect())
}

/// y, dx and the adapters' gradients of n tokens, with x and dy rounded to `rounded`.
fn passes(mlp: &mut Mlp, n: usize, place: (&Device, DType), rounded: DType, again: bool) -> Vec<Vec<f32>> {
    let ((device, dtype), width) = (place, mlp.gate_up.cols());
    let number = |seed: u64| {
        let values = seeded(n, width, seed).cast(DType::F32).unwrap().cast(rounded).unwrap();
        values.cast(DType::F32).unwrap().cast(dtype).unwrap().to_device(device).unwrap()
    };
    let ctx = Context::new(vec![0, n]);
    let (narrow, dy) = (number(1), number(2));
    // As a norm before it leaves it: low is then kept for the backward pass.
    let room = mlp.gate_up.room(&ctx, &narrow);
    let mut x = narrow.empty_like(n, width + room).unwrap();
    x.write_block((0, 0), &narrow, (0..n, 0..width)).unwrap();
    let (y, saved) = mlp.forward(&ctx, &x).unwrap();
    let saved = if again { mlp.recompute(&ctx, &x).unwrap() } else { saved };
    let dx = mlp.backward(&ctx, &x, saved, dy).unwrap();
    let gradients = mlp.parameters().into_iter().map(|it| it.grad.to_f32().unwrap());
    [y.to_f32().unwrap(), dx.to_f32().unwrap()].into_iter().chain(gradients).collect()
}

/// As many as the pass that makes dlow and dB together asks for, and as few as small blocks of the one that makes low are for; no
/// multiples of what they take at once.
const TOKENS: [usize; 2] = [4111, 611];

#[test]
fn adapters_get_the_gradients_of_the_cpu() {
    // (gate, up), down; the last is more than the kernels take.
    let all = [([16, 16], 16), ([8, 0], 8), ([24, 16], 32), ([64, 8], 40)];
    for base in [Base::Dense, Base::Nf4(Scales::Plain), Base::Nf4(Scales::Nested)] {
        for (ranks, down) in all {
            let make = |device: &Device, dtype: DType| Mlp {
                gate_up: adapted(device, dtype, base, 192, &ranks.map(|rank| (1096, rank))),
                down: adapted(device, dtype, base, 1096, &[(192, down)]),
                activation: Activation::Silu,
            };
            for device in Device::each().into_iter().filter(|it| it.gpu().is_some()) {
                let bf16 = device.gpu().is_some_and(|it| it.has_bf16());
                for (dtype, tolerance) in [(DType::F32, 2e-5), (DType::F16, 4e-3), (DType::BF16, 3e-2)] {
                    if dtype == DType::BF16 && !bf16 {
                        continue;
                    }
                    let cpu = (&Device::Cpu, DType::F32);
                    let expected =
                        TOKENS.map(|n| passes(&mut make(&Device::Cpu, DType::F32), n, cpu, dtype, false));
                    let all = TOKENS.into_iter().zip(&expected);
                    for ((n, expected), recompute) in all.flat_map(|it| [(it, false), (it, true)]) {
                        let place = (&device, dtype);
                        let got = passes(&mut make(&device, dtype), n, place, dtype, recompute);
                        let mut kept = make(&device, dtype);
                        kept.gate_up.keep_whole(true);
                        kept.down.keep_whole(true);
                        let again = passes(&mut kept, n, place, dtype, recompute);
                        assert!(again == got, "weights kept whole on {device:?}");
                        let worst = got.iter().zip(expected).map(|(got, expected)| {
                            let norm =
                                |it: &mut dyn Iterator<Item = f64>| it.map(|it| it * it).sum::<f64>().sqrt();
                            let off = norm(
                                &mut got.iter().zip(expected).map(|(a, b)| f64::from(*a) - f64::from(*b)),
                            );
                            off / norm(&mut expected.iter().map(|it| f64::from(*it)))
                        });
                        let worst =
                            worst.fold(0.0, |most, it| if it > most || it.is_nan() { it } else { most });
                        let what =
                            format!("{n} tokens, ranks {ranks:?} {down}, {base:?}, recompute {recompute}");
                        eprintln!("{what:<75} {:<5} {worst:.1e}", dtype.as_str());
                        assert!(
                            got.len() == expected.len() && worst < tolerance,
                            "{what} on {device:?}: {worst:.1e}"
                        );
                    }
                }
            }
        }
    }
}
