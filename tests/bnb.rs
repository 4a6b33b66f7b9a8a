//! Checkpoints in 4 bits as bitsandbytes serialises them: ours against its own (`fixtures/make_bnb.py`), and back.

mod hashed;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use ferrotune_export::{FolderOptions, write_bnb};
use ferrotune_model::families;
use ferrotune_model::source::{ModelFiles, SafetensorsSource, Stored, WeightSource};
use ferrotune_model::{BuildOptions, PartSpec, build, dense_part};
use ferrotune_nn::{Context, LanguageModel, Weight};
use ferrotune_quant::{Absmax, NF4_LEVELS, Nf4Weight, Scales, dynamic_map};
use ferrotune_tensor::{DType, Device, Precision, Tensor, bf16, f16};
use serde_json::{Value, json};

use hashed::{Checkpoint, batch, logits_off, numbers, weight};

const OPTIONS: FolderOptions = FolderOptions { dtype: None, shard_bytes: u64::MAX };

fn golden() -> Value {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/bnb.json");
    serde_json::from_str(&fs::read_to_string(path).unwrap()).unwrap()
}

fn fnv(bytes: impl IntoIterator<Item = u8>) -> String {
    let mix = |hash: u64, byte: u8| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
    format!("{:016x}", bytes.into_iter().fold(0xcbf2_9ce4_8422_2325, mix))
}

/// Numbers in a type, little-endian.
fn bytes_as(values: &[f32], dtype: DType) -> Vec<u8> {
    let values = values.iter();
    match dtype {
        DType::BF16 => values.flat_map(|it| bf16::from_f32(*it).to_le_bytes()).collect(),
        DType::F16 => values.flat_map(|it| f16::from_f32(*it).to_le_bytes()).collect(),
        _ => values.flat_map(|it| it.to_le_bytes()).collect(),
    }
}

/// The tensors of a safetensors file: type, shape and bytes.
type Tensors = BTreeMap<String, (String, Value, Vec<u8>)>;

fn read(path: &Path) -> Tensors {
    let bytes = fs::read(path).unwrap();
    let header = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let json: serde_json::Map<String, Value> = serde_json::from_slice(&bytes[8..8 + header]).unwrap();
    let tensors = json.into_iter().filter(|it| it.0 != "__metadata__").map(|(name, it)| {
        let offset = |index: usize| 8 + header + it["data_offsets"][index].as_u64().unwrap() as usize;
        let bytes = bytes[offset(0)..offset(1)].to_vec();
        (name, (it["dtype"].as_str().unwrap().to_string(), it["shape"].clone(), bytes))
    });
    tensors.collect()
}

fn write(path: &Path, tensors: &Tensors) {
    let (mut header, mut data) = (serde_json::Map::new(), Vec::new());
    for (name, (dtype, shape, bytes)) in tensors {
        let offsets = [data.len(), data.len() + bytes.len()];
        let info = json!({ "dtype": dtype, "shape": shape, "data_offsets": offsets });
        header.insert(name.to_string(), info);
        data.extend(bytes);
    }
    let header = Value::from(header).to_string();
    fs::write(path, [&(header.len() as u64).to_le_bytes(), header.as_bytes(), &data].concat()).unwrap();
}

/// Our file of the golden model, in 4 bits.
fn exported(name: &str, golden: &Value) -> (Checkpoint, PathBuf) {
    let checkpoint = Checkpoint::new(name, &golden["config"], &golden["shapes"]);
    let out = checkpoint.0.join("out");
    write_bnb(&out, &ModelFiles::open(&checkpoint.0).unwrap(), OPTIONS, &mut |_, _| {}).unwrap();
    (checkpoint, out)
}

#[test]
fn what_is_written_is_what_bitsandbytes_writes() {
    let golden = golden();
    let (_checkpoint, out) = exported("bnb-written", &golden);
    let expected = golden["tensors"].as_object().unwrap();
    let tensors = read(&out.join("model.safetensors"));
    assert_eq!(tensors.len(), expected.len());
    for (name, (dtype, shape, bytes)) in tensors {
        let kind = match dtype.as_str() {
            "U8" => "uint8",
            "F32" => "float32",
            _ => "bfloat16",
        };
        match &expected[&name] {
            Value::String(state) => {
                let json = |text: &str| serde_json::from_str::<Value>(text).expect("JSON");
                let got = String::from_utf8(bytes).unwrap();
                assert_eq!(json(&got), json(state), "{name}");
                assert_eq!(got.trim_end(), state, "{name}: the very text");
            }
            other => assert_eq!(&json!([kind, shape, fnv(bytes)]), other, "{name}"),
        }
    }
    let config: Value = serde_json::from_str(&fs::read_to_string(out.join("config.json")).unwrap()).unwrap();
    assert_eq!(config["quantization_config"], golden["quantization_config"]);
}

#[test]
fn weights_are_read_bit_for_bit_and_compute_what_transformers_computes() {
    let golden = golden();
    let (_checkpoint, out) = exported("bnb-read", &golden);
    let files = ModelFiles::open(&out).unwrap();
    let kind = files.four_bit.clone().unwrap();
    assert_eq!((kind.quant_type.as_str(), kind.double_quantized, kind.count), ("nf4", true, 7));
    for (name, hash) in golden["dequantised"].as_object().unwrap() {
        let got = files.source.get_f32(name).unwrap().to_f32().unwrap();
        assert_eq!(Value::from(fnv(bytes_as(&got, DType::BF16))), *hash, "{name}");
        assert_eq!(files.source.stored_dtype(name).unwrap(), None);
    }
    for device in Device::each() {
        let options = BuildOptions { precision: Precision::Full, dtype: DType::F32, device: device.clone() };
        let mut make = |spec: &PartSpec, stored: Stored| dense_part(spec, stored, &options);
        let model = build(&files.spec, files.source.as_ref(), options.clone(), &mut make).unwrap();
        let batch = batch(files.spec.vocab_size);
        let ctx = Context::new(batch.sequence_starts.iter().map(|it| *it as usize).collect());
        let off = logits_off(&model, &ctx, &model.hidden(&ctx, &batch.tokens).unwrap(), &golden);
        assert!(off < 1e-4, "{device:?}: {off:.1e}");
    }
}

const Q: &str = "model.layers.0.self_attn.q_proj.weight";
const K: &str = "model.layers.0.self_attn.k_proj.weight";
const STATE: &str = ".quant_state.bitsandbytes__nf4";

/// The model in 4 bits with something changed in its file.
fn changed(name: &str, change: impl FnOnce(&mut Tensors)) -> (Checkpoint, PathBuf) {
    let (checkpoint, out) = exported(name, &golden());
    let file = out.join("model.safetensors");
    let mut tensors = read(&file);
    change(&mut tensors);
    write(&file, &tensors);
    (checkpoint, out)
}

#[test]
fn codes_in_another_type_and_weights_left_out_are_read() {
    let golden = golden();
    let (_checkpoint, out) = changed("bnb-others", |tensors| {
        // `bnb_4bit_quant_storage: bfloat16` has the same bytes.
        let (dtype, shape, bytes) = tensors.get_mut(Q).unwrap();
        (*dtype, *shape) = ("BF16".to_string(), golden["stored_in_bfloat16"][Q][1].clone());
        assert_eq!(Value::from(fnv(bytes.iter().copied())), golden["stored_in_bfloat16"][Q][2]);
        // `llm_int8_skip_modules` leaves a weight in 16 bits.
        tensors.retain(|name, _| !name.starts_with(K));
        tensors
            .insert(K.into(), ("BF16".into(), json!([32, 64]), bytes_as(&weight(K, 32 * 64), DType::BF16)));
    });
    let files = ModelFiles::open(&out).unwrap();
    assert_eq!(files.four_bit.as_ref().unwrap().count, 6);
    let got = files.source.get_f32(Q).unwrap().to_f32().unwrap();
    assert_eq!(Value::from(fnv(bytes_as(&got, DType::BF16))), golden["dequantised"][Q]);
    assert_eq!(files.source.stored_dtype(K).unwrap(), Some(DType::BF16));
    assert!(matches!(files.source.get(K).unwrap(), Stored::Dense(_)));
}

#[test]
fn fp4_means_what_its_table_says() {
    let golden = golden();
    let fp4 = &golden["fp4"];
    let floats = |values: &[f32]| bytes_as(values, DType::F32);
    let (_checkpoint, out) = changed("bnb-fp4", |tensors| {
        tensors.retain(|name, _| !name.starts_with(K));
        let codes =
            numbers("fp4.codes", 1024).into_iter().map(|it| ((f64::from(it) + 1.0) / 2.0 * 256.0) as u8);
        let absmax: Vec<f32> = numbers("fp4.absmax", 32).into_iter().map(f32::abs).collect();
        let table: Vec<f32> = hashed::floats(&fp4["quant_map"]).into_iter().map(|it| it as f32).collect();
        let state = fp4["state"].as_str().unwrap().as_bytes().to_vec();
        let mut put = |suffix: &str, dtype: &str, shape: Value, bytes| {
            tensors.insert(format!("{K}{suffix}"), (dtype.into(), shape, bytes));
        };
        put("", "U8", json!([1024, 1]), codes.collect());
        put(".absmax", "F32", json!([32]), floats(&absmax));
        put(".quant_map", "F32", json!([16]), floats(&table));
        put(".quant_state.bitsandbytes__fp4", "U8", json!([state.len()]), state);
    });
    let files = ModelFiles::open(&out).unwrap();
    let got = files.source.get_f32(K).unwrap().to_f32().unwrap();
    assert_eq!(fp4["dequantised"], Value::from(fnv(bytes_as(&got, DType::F16))));
    assert_eq!(files.source.get(K).unwrap().into_dense().unwrap().dtype(), DType::F16);
}

#[test]
fn lies_about_parts_are_refused() {
    let refused = |what: &str, change: &dyn Fn(&mut Tensors), parts: &[&str]| {
        let (_checkpoint, out) = changed("bnb-lies", |tensors| change(tensors));
        let Err(error) = ModelFiles::open(&out) else { panic!("{what} was opened") };
        let error = error.to_string();
        assert!(parts.iter().all(|part| error.contains(part)), "{what}: {error}");
    };
    let state = |from: &'static str, to: &'static str| {
        move |tensors: &mut Tensors| {
            let (_, shape, bytes) = tensors.get_mut(&format!("{Q}{STATE}")).unwrap();
            let text = String::from_utf8(bytes.clone()).unwrap();
            assert!(text.contains(from), "{text}");
            *bytes = text.replacen(from, to, 1).into_bytes();
            *shape = json!([bytes.len()]);
        }
    };
    for (from, to, part) in [
        ("[64, 64]", "[64, 65]", "64 x 65"),
        ("[64, 64]", "[4294967296, 4294967296]", "`shape`"),
        ("[64, 64]", "[16777216, 16777216]", "bytes"),
        ("[64, 64]", "[64, 64, 1]", "`shape`"),
        ("[64, 64]", "[-64, 64]", "`shape`"),
        ("[64, 64]", "[0, 64]", "`shape`"),
        ("[64, 64]", "[128, 32]", "the config asks for 64 x 64"),
        ("\"blocksize\": 64", "\"blocksize\": 0", "`blocksize` is 0"),
        ("\"blocksize\": 64", "\"blocksize\": 128", "in blocks of 128"),
        ("\"blocksize\": 64", "\"blocksize\": 18446744073709551615", "`blocksize`"),
        ("bfloat16", "float8", "`dtype` is \"float8\""),
        ("\"nf4\"", "\"fp4\"", "the name says nf4"),
        ("float32", "float64", "`nested_dtype`"),
        ("256", "255", "`nested_blocksize`"),
        ("\"nested_offset\": 0", "\"nested_offset\": \"x\", \"more\": 0", "`nested_offset`"),
        ("{", "[", "not JSON"),
    ] {
        refused(&format!("{from} as {to}"), &state(from, to), &["q_proj.weight", part]);
    }
    let part = |suffix: &'static str, change: fn(&mut (String, Value, Vec<u8>))| {
        move |tensors: &mut Tensors| change(tensors.get_mut(&format!("{Q}{suffix}")).unwrap())
    };
    let shorter = |it: &mut (String, Value, Vec<u8>)| {
        it.2.truncate(4);
        it.1 = json!([it.2.len() / if it.0 == "F32" { 4 } else { 1 }]);
    };
    refused("codes cut", &part("", shorter), &["2048 bytes", "the file 4"]);
    refused("scales cut", &part(".absmax", shorter), &[".absmax", "64 bytes of U8"]);
    refused("scales of scales of another type", &part(".nested_absmax", |it| it.0 = "I32".into()), &["I32"]);
    refused("the table cut", &part(".quant_map", shorter), &[".quant_map", "64 bytes"]);
    refused("the map cut", &part(".nested_quant_map", shorter), &[".nested_quant_map", "1024 bytes"]);
    let long = |it: &mut (String, Value, Vec<u8>)| {
        it.2 = vec![b' '; 1 << 20];
        it.1 = json!([1 << 20]);
    };
    refused("a long state", &part(STATE, long), &["up to 4096 bytes"]);
    refused(
        "no scales",
        &|it| drop(it.remove(&format!("{Q}.absmax"))),
        &["`model.layers.0.self_attn.q_proj.weight.absmax` is missing"],
    );
    refused("no state", &|it| drop(it.remove(&format!("{Q}{STATE}"))), &["q_proj.weight"]);
    let twice = |tensors: &mut Tensors| {
        let state = tensors[&format!("{Q}{STATE}")].clone();
        tensors.insert(format!("{Q}.quant_state.bitsandbytes__int3"), state);
    };
    refused("another kind", &twice, &["`int3`"]);
    let (_checkpoint, out) = changed("bnb-nan", |tensors| {
        let (_, _, bytes) = tensors.get_mut(&format!("{Q}.nested_absmax")).unwrap();
        bytes.copy_from_slice(&f32::NAN.to_le_bytes());
    });
    let error = ModelFiles::open(&out).unwrap().source.get(Q).unwrap_err().to_string();
    assert!(error.contains("q_proj.weight.nested_absmax` holds NaN or infinity"), "{error}");
}

/// Tiny mixtures of experts in bf16.
fn mixtures() -> [Value; 2] {
    let with = |more: Value| {
        let mut config = json!({
            "vocab_size": 40, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "hidden_act": "silu",
            "rms_norm_eps": 1e-6, "rope_theta": 100.0, "bos_token_id": 1, "eos_token_id": 2, "torch_dtype": "bfloat16",
            "tie_word_embeddings": false, "num_experts_per_tok": 2,
        });
        let more = more.as_object().unwrap().clone();
        config.as_object_mut().unwrap().extend(more);
        config
    };
    [
        with(json!({ "model_type": "mixtral", "num_local_experts": 3 })),
        with(
            json!({ "model_type": "qwen3_moe", "num_experts": 3, "moe_intermediate_size": 64, "head_dim": 16 }),
        ),
    ]
}

fn mixture(name: &str, config: &Value) -> Checkpoint {
    let spec = families::spec(config, Path::new("config.json")).unwrap();
    let tensors = spec.checkpoint_tensors().into_iter();
    let shapes: serde_json::Map<String, Value> =
        tensors.map(|it| (it.name.clone(), json!(it.shape()))).collect();
    Checkpoint::new(&format!("{name}-{}", spec.family), config, &shapes.into())
}

fn logits(files: &ModelFiles) -> Vec<f32> {
    let options = BuildOptions { precision: Precision::Full, dtype: DType::F32, device: Device::Cpu };
    let mut make = |spec: &PartSpec, stored: Stored| dense_part(spec, stored, &options);
    let model = build(&files.spec, files.source.as_ref(), options.clone(), &mut make).unwrap();
    let batch = batch(files.spec.vocab_size);
    let ctx = Context::new(batch.sequence_starts.iter().map(|it| *it as usize).collect());
    model.logits(&model.hidden(&ctx, &batch.tokens).unwrap()).unwrap().to_f32().unwrap()
}

/// Every expert and the router in 4 bits, as transformers 4 has published them.
#[test]
fn experts_that_are_linear_layers_in_4_bits_are_read() {
    for config in mixtures() {
        let checkpoint = mixture("bnb-experts", &config);
        let file = checkpoint.0.join("model.safetensors");
        let (plain, mut coded) = (read(&file), Tensors::new());
        let mut dequantised = plain.clone();
        for (name, (dtype, shape, bytes)) in plain {
            let sizes: Vec<usize> = hashed::floats(&shape).into_iter().map(|it| it as usize).collect();
            if sizes.len() != 2 || name.contains("embed") || name.contains("lm_head") {
                coded.insert(name, (dtype, shape, bytes));
                continue;
            }
            let values: Vec<bf16> =
                bytes.chunks_exact(2).map(|it| bf16::from_le_bytes([it[0], it[1]])).collect();
            let value = Tensor::from_vec(sizes[0], sizes[1], values).unwrap();
            let weight = Nf4Weight::quantize(&value, Scales::Nested, Precision::Full).unwrap();
            let Absmax::Nested { codes: absmax, nested_absmax, offset } = &weight.absmax else {
                unreachable!()
            };
            let state = json!({
                "quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": sizes, "nested_blocksize": 256,
                "nested_dtype": "float32", "nested_offset": offset,
            });
            let state = state.to_string().into_bytes();
            let mut put = |suffix: &str, dtype: &str, count: usize, bytes: Vec<u8>| {
                coded.insert(format!("{name}{suffix}"), (dtype.into(), json!([count]), bytes));
            };
            let floats = |values: &[f32]| bytes_as(values, DType::F32);
            put("", "U8", weight.codes.len(), weight.codes.clone());
            put(".absmax", "U8", absmax.len(), absmax.clone());
            put(".quant_map", "F32", 16, floats(&NF4_LEVELS));
            put(".nested_absmax", "F32", nested_absmax.len(), floats(nested_absmax));
            put(".nested_quant_map", "F32", 256, floats(dynamic_map()));
            put(STATE, "U8", state.len(), state);
            let exact = bytes_as(&weight.to_dense().unwrap().to_f32().unwrap(), DType::BF16);
            dequantised.insert(name, (dtype, shape, exact));
        }
        write(&file, &dequantised);
        let expected = logits(&ModelFiles::open(&checkpoint.0).unwrap());
        write(&file, &coded);
        let files = ModelFiles::open(&checkpoint.0).unwrap();
        for (module, _) in files.spec.projections() {
            let stored = files.source.get(&format!("{module}.weight")).unwrap();
            assert!(matches!(stored, Stored::FourBit(_)), "{module}");
        }
        assert_eq!(logits(&files), expected, "{}", files.spec.family);
    }
}

#[test]
fn experts_leave_in_16_bits() {
    for config in mixtures() {
        let checkpoint = mixture("bnb-out", &config);
        let files = ModelFiles::open(&checkpoint.0).unwrap();
        let out = checkpoint.0.join("out");
        write_bnb(&out, &files, OPTIONS, &mut |_, _| {}).unwrap();
        let again = ModelFiles::open(&out).unwrap();
        assert_eq!(again.four_bit.as_ref().unwrap().count, 2 * 4, "q, k, v and o of two layers");
        for (module, it) in again.spec.projections() {
            let name = format!("{module}.weight");
            let stored = again.source.stored_dtype(&name).unwrap();
            assert_eq!(stored, it.expert.map(|_| DType::BF16), "{module}");
            let values = |files: &ModelFiles| files.source.get_f32(&name).unwrap().to_f32().unwrap();
            let (whole, got) = (values(&files), values(&again));
            let off = hashed::largest(whole.iter().zip(&got).map(|(a, b)| f64::from((a - b).abs())));
            // The widest gap between two levels is 0.3 of the largest.
            let allowed = if it.expert.is_some() { 0.0 } else { 0.16 / 4.0 };
            assert!(off <= allowed, "{module}: off by {off:.1e}");
        }
    }
}

/// Files that bitsandbytes and PEFT wrote, with what they computed; beside the checkout where they are.
fn real() -> Option<PathBuf> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../shared/data/golden_bnb_peft");
    if !folder.is_dir() {
        eprintln!("skipped: {} isn't there", folder.display());
        return None;
    }
    Some(folder)
}

#[test]
fn published_checkpoints_are_read_bit_for_bit() {
    let Some(folder) = real() else { return };
    let logits: Value =
        serde_json::from_str(&fs::read_to_string(folder.join("logits.json")).unwrap()).unwrap();
    let ids: Vec<u32> = hashed::floats(&logits["input_ids"]).into_iter().map(|it| it as u32).collect();
    // The logits are those of embeddings and norms in f32, which the files of 16 bits don't have.
    for (name, key, allowed) in [
        ("bnb_nf4_dq_bf16", "nf4_dq_bf16_dequantised_linears_f32", 0.1),
        ("bnb_nf4_f32", "nf4_f32_dequantised_linears_f32", 1e-4),
        ("bnb_fp4_f16", "fp4_f16_dequantised_linears_f32", 0.02),
    ] {
        let files = ModelFiles::open(folder.join(name)).unwrap();
        let exact =
            SafetensorsSource::open_file(&folder.join(name).join("dequantized_f32.safetensors")).unwrap();
        let mut count = 0;
        for weight in exact.names() {
            let name = weight.strip_suffix(".weight").unwrap_or(weight);
            let (got, expected) =
                (files.source.get_f32(&format!("{name}.weight")).unwrap(), exact.get_f32(weight).unwrap());
            assert_eq!(got.to_f32().unwrap(), expected.to_f32().unwrap(), "{name}");
            count += 1;
        }
        assert_eq!(count, files.four_bit.as_ref().unwrap().count);
        let options = BuildOptions { precision: Precision::Full, dtype: DType::F32, device: Device::Cpu };
        let mut make = |spec: &PartSpec, stored: Stored| dense_part(spec, stored, &options);
        let model = build(&files.spec, files.source.as_ref(), options.clone(), &mut make).unwrap();
        let hidden = model.hidden(&Context::new(vec![0, ids.len()]), &ids).unwrap();
        let all = model.logits(&hidden).unwrap();
        let last = &all.to_f32().unwrap()[(ids.len() - 1) * all.cols()..];
        let pairs = last.iter().zip(hashed::floats(&logits[key]));
        let off = hashed::largest(pairs.map(|(a, b)| (f64::from(*a) - b).abs()));
        println!("{name}: {count} weights, logits off by {off:.1e}");
        assert!(off < allowed, "{name}: {off:.1e}");
    }
}
