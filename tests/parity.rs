//! The whole against transformers, PEFT and bitsandbytes: logits, loss, every adapter gradient by
//! name, ten optimizer steps, bit-identical continuation. The numbers are `fixtures/make.py`'s.

mod adapters;
mod golden;

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use ferrotune_data::{Batch, BatchOptions, BatchSource, Batches, Sample};
use ferrotune_lora::{DoraAdapter, LoraAdapter, magnitudes};
use ferrotune_model::source::{ModelFiles, Stored};
use ferrotune_model::{BuildOptions, Decoder, PartSpec, Recompute, build, dense_part};
use ferrotune_nn::{Adapter, Context, LanguageModel, Weight};
use ferrotune_quant::{Absmax, Nf4GpuWeight, Nf4Weight, Scales, dynamic_map};
use ferrotune_tensor::{DType, Device, Precision, Result, Tensor};
use ferrotune_trainer::{
    AdamW, NextToken, Optimizer, ParameterGroups, Schedule, ScheduleKind, StateMemory, StepSettings,
    evaluate, optimizer_step,
};
use serde_json::Value;

type Tensors = HashMap<String, candle_core::Tensor>;

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures").join(name)
}

fn json(name: &str) -> Value {
    serde_json::from_str(&std::fs::read_to_string(fixture(name)).unwrap()).unwrap()
}

fn tensors(name: &str) -> Tensors {
    candle_core::safetensors::load(fixture(name), &candle_core::Device::Cpu).unwrap()
}

fn floats(tensor: &candle_core::Tensor) -> Vec<f32> {
    tensor.to_dtype(DType::F32).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

fn bytes(tensor: &candle_core::Tensor) -> Vec<u8> {
    tensor.flatten_all().unwrap().to_vec1().unwrap()
}

fn matrix(tensor: &candle_core::Tensor) -> Tensor {
    let (rows, cols) = tensor.dims2().unwrap();
    Tensor::from_vec(rows, cols, floats(tensor)).unwrap()
}

/// What the adapters of a test are.
enum Adapters {
    None,
    Lora {
        tensors: Tensors,
        scaling: f64,
    },
    /// With the magnitudes of the base.
    Dora {
        tensors: Tensors,
        scaling: f64,
    },
}

impl Adapters {
    /// Those of lora_tiny.
    fn tiny(scaling: f64) -> Adapters {
        Adapters::Lora { tensors: tensors("lora_tiny/adapter_model.safetensors"), scaling }
    }

    fn make(
        &self,
        spec: &PartSpec,
        weight: &dyn Weight,
        device: &Device,
    ) -> Result<Option<Box<dyn Adapter>>> {
        let (Adapters::Lora { tensors, scaling } | Adapters::Dora { tensors, scaling }) = self else {
            return Ok(None);
        };
        let read = |kind: &str| matrix(&tensors[&format!("base_model.model.{}.{kind}.weight", spec.name)]);
        let lora = |b: Tensor| {
            LoraAdapter::from_parts(&spec.name, read("lora_A"), b, *scaling, 0.0, Precision::Full)
        };
        let (plain, b) = (lora(read("lora_B"))?, read("lora_B"));
        if let Adapters::Lora { .. } = self {
            return Ok(Some(Box::new(plain.to_device(device, DType::F32)?)));
        }
        let before = magnitudes(&lora(b.zeros_like(b.rows(), b.cols())?)?, weight)?;
        let dora = DoraAdapter::from_parts(plain, before, weight)?;
        Ok(Some(Box::new(dora.to_device(device, DType::F32)?)))
    }
}

/// How the base of a test is stored.
#[derive(Clone, Copy)]
enum Base {
    Dense,
    Bitsandbytes,
}

fn decoder(device: &Device, folder: &Path, base: Base, adapters: &Adapters) -> Decoder {
    let options = BuildOptions { precision: Precision::Full, dtype: DType::F32, device: device.clone() };
    let files = ModelFiles::open(folder).unwrap();
    let stored = tensors("lora_tiny/base_nf4.safetensors");
    let mut make = |spec: &PartSpec, weight: Stored| -> Result<_> {
        let mut part = dense_part(spec, weight, &options)?;
        if let Base::Bitsandbytes = base {
            let weight = bitsandbytes(&stored, spec);
            part.weight = match device.gpu() {
                Some(gpu) => Box::new(Nf4GpuWeight::from_cpu(weight, gpu)?),
                None => Box::new(weight),
            };
        }
        part.adapter = adapters.make(spec, part.weight.as_ref(), device)?;
        Ok(part)
    };
    build(&files.spec, files.source.as_ref(), options.clone(), &mut make).unwrap()
}

/// The weight as bitsandbytes stored it.
fn bitsandbytes(stored: &Tensors, spec: &PartSpec) -> Nf4Weight {
    let get = |suffix: &str| &stored[&format!("{}.weight{suffix}", spec.name)];
    let state: Value = serde_json::from_slice(&bytes(get(".quant_state.bitsandbytes__nf4"))).unwrap();
    let absmax = Absmax::Nested {
        codes: bytes(get(".absmax")),
        nested_absmax: floats(get(".nested_absmax")),
        offset: state["nested_offset"].as_f64().unwrap() as f32,
    };
    let dtype = match state["dtype"].as_str().unwrap() {
        "bfloat16" => DType::BF16,
        "float16" => DType::F16,
        _ => DType::F32,
    };
    let shape = (spec.out_features, spec.in_features);
    Nf4Weight::from_parts(shape, bytes(get("")), absmax, dtype, Precision::Full).unwrap()
}

/// A sequence of a fixture: labels are −100 where nothing is trained.
fn sample(sequence: &Value) -> Sample {
    let numbers = |key: &str| -> Vec<i64> {
        sequence[key].as_array().unwrap().iter().map(|it| it.as_i64().unwrap()).collect()
    };
    Sample {
        tokens: numbers("ids").iter().map(|it| *it as u32).collect(),
        trained: numbers("labels").iter().map(|it| *it != -100).collect(),
        ..Sample::default()
    }
}

fn batch_of(sequences: &Value) -> Batch {
    let samples: Vec<Sample> = sequences.as_array().unwrap().iter().map(sample).collect();
    Batch::new(&samples)
}

fn context(batch: &Batch) -> Context {
    Context::new(batch.sequence_starts.iter().map(|it| *it as usize).collect())
}

/// Checks logits (sequence × position × vocabulary) at some positions.
fn check_logits(model: &Decoder, batch: &Batch, positions: &Value, expected: &Value, tolerance: f64) {
    let hidden = model.hidden(&context(batch), &batch.tokens).unwrap();
    let logits = model.logits(&hidden).unwrap();
    let values = logits.to_f32().unwrap();
    let mut compared = 0;
    for (s, positions) in positions.as_array().unwrap().iter().enumerate() {
        for (p, position) in positions.as_array().unwrap().iter().enumerate() {
            let row = batch.sequence_starts[s] as usize + position.as_u64().unwrap() as usize;
            for (t, expected) in expected[s][p].as_array().unwrap().iter().enumerate() {
                let got = f64::from(values[row * logits.cols() + t]);
                let expected = expected.as_f64().unwrap();
                let error = (got - expected).abs() / expected.abs().max(1.0);
                assert!(
                    error < tolerance,
                    "sequence {s} position {position} token {t}: {got}, not {expected}"
                );
                compared += 1;
            }
        }
    }
    assert!(compared >= 300, "only {compared} logits were compared");
}

#[test]
fn logits_and_loss_equal_those_of_transformers() {
    for device in Device::each() {
        for folder in ["llama_tiny", "llama_tiny_tied"] {
            let golden = json(&format!("{folder}/golden.json"));
            let model = decoder(&device, &fixture(folder), Base::Dense, &Adapters::None);
            let batch = batch_of(&golden["sequences"]);
            check_logits(&model, &batch, &golden["positions"], &golden["logits"], 1e-4);
            let samples: Vec<Sample> = golden["sequences"].as_array().unwrap().iter().map(sample).collect();
            let loss = evaluate(&model, &samples, 8).unwrap().loss;
            assert!((loss - golden["loss"].as_f64().unwrap()).abs() < 1e-4, "{folder}: {loss}");
        }
    }
}

/// Forward and backward over both sequences of `llama_tiny`: the loss; gradients are in the model.
fn pass(model: &mut Decoder) -> f64 {
    let batch = batch_of(&json("llama_tiny/golden.json")["sequences"]);
    let ctx = context(&batch);
    let (hidden, saved) = model.forward(&ctx, &batch.tokens).unwrap();
    let total = batch.trained_tokens() as f64;
    let dlogp: Vec<f64> = batch.trained.iter().map(|it| if *it { -1.0 / total } else { 0.0 }).collect();
    let head = model.head_backward(&hidden, &batch.targets, &dlogp).unwrap();
    model.backward(&ctx, saved, head.dhidden.unwrap()).unwrap();
    head.logp.iter().zip(&dlogp).map(|(l, d)| l * d).sum()
}

/// Checks the gradients that a file of PEFT's names holds.
fn check_gradients(model: &mut Decoder, file: &str, expected_count: usize) {
    let golden = tensors(file);
    let mut compared = 0;
    for parameter in model.parameters() {
        let Some(expected) = golden.get(&format!("base_model.model.{}", parameter.name)) else { continue };
        let (expected, got) = (floats(expected), parameter.grad.to_f32().unwrap());
        let difference: f32 = got.iter().zip(&expected).map(|(a, b)| (a - b) * (a - b)).sum();
        let norm: f32 = expected.iter().map(|it| it * it).sum();
        let error = (difference / norm).sqrt();
        assert!(error < 1e-3, "{}: off by {error:.1e} of its norm", parameter.name);
        compared += 1;
    }
    assert_eq!((compared, golden.len()), (expected_count, expected_count), "gradients compared");
}

#[test]
fn every_adapter_gradient_equals_pefts() {
    for device in Device::each() {
        let golden = json("lora_tiny/golden.json");
        for recompute in [Recompute::Keep, Recompute::Recompute, Recompute::Offload] {
            let mut model = decoder(&device, &fixture("llama_tiny"), Base::Dense, &Adapters::tiny(2.0));
            model.recompute.fill(recompute);
            let batch = batch_of(&json("llama_tiny/golden.json")["sequences"]);
            check_logits(&model, &batch, &golden["positions"], &golden["logits"], 1e-4);
            let loss = pass(&mut model);
            assert!((loss - golden["loss"].as_f64().unwrap()).abs() < 1e-4, "{loss}");
            check_gradients(&mut model, "lora_tiny/grads.safetensors", 42);
        }
    }
}

#[test]
fn rslora_scales_by_the_root_of_the_rank() {
    for device in Device::each() {
        let golden = json("lora_tiny/golden.json");
        let model = decoder(&device, &fixture("llama_tiny"), Base::Dense, &Adapters::tiny(4.0));
        let batch = batch_of(&json("llama_tiny/golden.json")["sequences"]);
        check_logits(&model, &batch, &golden["few_positions"], &golden["rslora_logits"], 1e-4);
    }
}

#[test]
fn a_four_bit_base_gives_what_bitsandbytes_gives() {
    for device in Device::each() {
        let golden = json("lora_tiny/golden.json");
        let mut model = decoder(&device, &fixture("llama_tiny"), Base::Bitsandbytes, &Adapters::tiny(2.0));
        let batch = batch_of(&json("llama_tiny/golden.json")["sequences"]);
        check_logits(&model, &batch, &golden["few_positions"], &golden["nf4_logits"], 1e-4);
        let loss = pass(&mut model);
        assert!((loss - golden["nf4_loss"].as_f64().unwrap()).abs() < 1e-4, "{loss}");
        check_gradients(&mut model, "lora_tiny/nf4_grads.safetensors", 14);
    }
}

#[test]
fn codes_and_scales_equal_those_of_bitsandbytes() {
    for device in Device::each() {
        let golden = tensors("nf4/nf4.safetensors");
        let cases = &json("nf4/nf4.json")["cases"];
        let names: Vec<&str> = golden.keys().filter_map(|key| key.strip_suffix(".input")).collect();
        assert!(names.len() >= 8, "only {} matrices", names.len());
        let stored = tensors("lora_tiny/base_nf4.safetensors");
        let map = floats(&stored["model.layers.0.mlp.down_proj.weight.nested_quant_map"]);
        assert_eq!(dynamic_map().to_vec(), map, "dynamic map");
        let (mut codes_off, mut codes_seen) = (0, 0);
        for name in names {
            let get = |suffix: &str| &golden[&format!("{name}.{suffix}")];
            let dtype = get("input").dtype();
            let input = matrix(get("input")).cast(dtype).unwrap();
            let plain = quantize(&device, &input, Scales::Plain);
            assert_eq!(plain.codes, bytes(get("packed")), "{name}: codes");
            assert_eq!(plain.absmax, Absmax::Plain(floats(get("absmax"))), "{name}: scales");
            check_hash(&plain, &cases[name]["dequantized"]);

            let nested = quantize(&device, &input, Scales::Nested);
            let Absmax::Nested { codes, nested_absmax, offset } = &nested.absmax else {
                panic!("{name}: not nested")
            };
            let expected_offset = floats(get("double.nested_offset"))[0];
            // On the CPU the mean is taken in PyTorch's own order, on a GPU in f64.
            let most = if device.gpu().is_some() { 2 } else { 1 };
            let off = offset.to_bits().abs_diff(expected_offset.to_bits());
            assert!(off <= most, "{name}: {offset} {expected_offset}");
            if *offset == expected_offset {
                assert_eq!(nested_absmax, &floats(get("double.nested_absmax")), "{name}: scales of scales");
            }
            for (got, expected) in codes.iter().zip(bytes(get("double.absmax"))) {
                assert!(got.abs_diff(expected) <= 1, "{name}: scale's code {got}, not {expected}");
                codes_off += usize::from(*got != expected);
                codes_seen += 1;
            }
            let theirs = Absmax::Nested {
                codes: bytes(get("double.absmax")),
                nested_absmax: floats(get("double.nested_absmax")),
                offset: expected_offset,
            };
            let shape = input.shape();
            let read = Nf4Weight::from_parts(shape, nested.codes, theirs, dtype, Precision::Full).unwrap();
            check_hash(&read, &cases[name]["double_dequantized"]);
        }
        assert!(codes_off * 1000 <= 3 * codes_seen, "{codes_off} of {codes_seen} nested codes differ");
    }
}

/// Quantised on a device; the bits.
fn quantize(device: &Device, input: &Tensor, scales: Scales) -> Nf4Weight {
    match device {
        Device::Cpu => Nf4Weight::quantize(input, scales, Precision::Full).unwrap(),
        gpu => {
            let input = input.try_clone().unwrap().to_device(gpu).unwrap();
            let weight = Nf4GpuWeight::quantize(&input, scales).unwrap();
            let (here, bits) = (weight.dequantize(DType::F32).unwrap(), weight.to_cpu().unwrap());
            assert_eq!(here.to_f32().unwrap(), bits.to_dense().unwrap().to_f32().unwrap(), "dequantised");
            bits
        }
    }
}

/// Checks dequantised numbers bit for bit by the hash that the fixture's script took of theirs.
fn check_hash(weight: &Nf4Weight, expected: &serde_json::Value) {
    let numbers = weight.to_dense().unwrap().to_f32().unwrap();
    let bytes = numbers.iter().flat_map(|it| (it + 0.0).to_le_bytes());
    let hash = bytes.fold(0xCBF2_9CE4_8422_2325, |hash: u64, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01B3)
    });
    assert_eq!(expected.as_str(), Some(format!("{hash:016x}").as_str()), "dequantised numbers");
}

/// The fixture's ten steps as a source of batches, in order.
fn ten_steps() -> Batches {
    let steps = json("lora_tiny/steps.json");
    let micro_batches = steps["batches"].as_array().unwrap().iter().flat_map(|it| it.as_array().unwrap());
    let samples: Vec<Sample> = micro_batches.flat_map(|it| it.as_array().unwrap()).map(sample).collect();
    assert_eq!(samples.len(), 40);
    let options = BatchOptions {
        per_device_train_batch_size: 2,
        packing: false,
        cutoff_len: 512,
        seed: 0,
        shuffle: false,
        group_by_length: 0,
    };
    Batches::new(samples, options).unwrap()
}

fn take_steps(
    model: &mut Decoder,
    optimizer: &mut AdamW,
    batches: &mut Batches,
    steps: std::ops::Range<u64>,
) -> Vec<(f64, f64)> {
    let schedule =
        Schedule { kind: ScheduleKind::Linear, learning_rate: 1e-3, warmup_steps: 2, total_steps: 10 };
    steps
        .map(|step| {
            let settings = StepSettings {
                gradient_accumulation_steps: 2,
                max_grad_norm: 1.0,
                seed: 0,
                step,
                learning_rate: schedule.at(step as usize),
                loss_scale: 1.0,
            };
            let outcome = optimizer_step(&settings, model, batches, &NextToken, optimizer).unwrap().unwrap();
            (outcome.loss, outcome.grad_norm)
        })
        .collect()
}

fn values(model: &mut Decoder) -> Vec<(String, Vec<f32>)> {
    model.parameters().iter().map(|it| (it.name.clone(), it.value.to_f32().unwrap())).collect()
}

fn adamw() -> AdamW {
    AdamW::new(0.9, 0.999, 1e-8, ParameterGroups::with_decay(0.01), StateMemory::Device)
}

#[test]
fn ten_steps_equal_those_of_the_trainer_of_transformers() {
    for device in Device::each() {
        let golden = json("lora_tiny/golden.json");
        let mut model = decoder(&device, &fixture("llama_tiny"), Base::Dense, &Adapters::tiny(2.0));
        let got = take_steps(&mut model, &mut adamw(), &mut ten_steps(), 0..10);
        for (step, ((loss, norm), expected)) in
            got.iter().zip(golden["steps"].as_array().unwrap()).enumerate()
        {
            let (loss_there, norm_there) =
                (expected["loss"].as_f64().unwrap(), expected["grad_norm"].as_f64().unwrap());
            assert!(
                (loss - loss_there).abs() < 1e-4 * loss_there,
                "step {step}: loss {loss}, not {loss_there}"
            );
            assert!(
                (norm - norm_there).abs() < 1e-3 * norm_there,
                "step {step}: norm {norm}, not {norm_there}"
            );
        }
        let after = tensors("lora_tiny/after_ten_steps.safetensors");
        for (name, got) in values(&mut model) {
            let expected = floats(&after[&format!("base_model.model.{name}")]);
            let worst = got.iter().zip(&expected).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
            assert!(worst < 2e-4, "{name}: off by {worst}");
        }
    }
}

#[test]
fn a_run_that_goes_on_from_its_state_is_bit_identical() {
    for device in Device::each() {
        let new = || decoder(&device, &fixture("llama_tiny"), Base::Dense, &Adapters::tiny(2.0));
        let (mut whole, mut optimizer, mut batches) = (new(), adamw(), ten_steps());
        let losses = take_steps(&mut whole, &mut optimizer, &mut batches, 0..4);
        let (saved, state, cursor) = (values(&mut whole), optimizer.state().unwrap(), batches.cursor());
        let rest = take_steps(&mut whole, &mut optimizer, &mut batches, 4..10);

        let (mut resumed, mut optimizer, mut batches) = (new(), adamw(), ten_steps());
        for (parameter, (_, value)) in resumed.parameters().into_iter().zip(saved) {
            let (rows, cols) = parameter.value.shape();
            let value =
                Tensor::from_vec(rows, cols, value).unwrap().to_device(&parameter.value.device()).unwrap();
            parameter.value.copy_from(&value).unwrap();
        }
        optimizer.restore(state, &resumed.parameters()).unwrap();
        batches.seek(cursor);
        assert_eq!(take_steps(&mut resumed, &mut optimizer, &mut batches, 4..10), rest);
        assert_eq!(values(&mut resumed), values(&mut whole));
        assert!(losses[0].0 > rest[5].0 - 1.0);
    }
}

#[test]
fn the_loss_does_not_depend_on_how_a_step_is_cut_into_batches() {
    for device in Device::each() {
        let losses: Vec<f64> = [(8, 1), (2, 4), (1, 8)]
            .map(|(size, accumulation)| {
                let samples = ten_steps().samples()[..8].to_vec();
                let options = BatchOptions {
                    per_device_train_batch_size: size,
                    packing: false,
                    cutoff_len: 512,
                    seed: 0,
                    shuffle: false,
                    group_by_length: 0,
                };
                let mut batches = Batches::new(samples, options).unwrap();
                let mut model = decoder(&device, &fixture("llama_tiny"), Base::Dense, &Adapters::tiny(2.0));
                let settings = StepSettings {
                    gradient_accumulation_steps: accumulation,
                    max_grad_norm: 1.0,
                    seed: 0,
                    step: 0,
                    learning_rate: 1e-3,
                    loss_scale: 1.0,
                };
                let mut optimizer = adamw();
                optimizer_step(&settings, &mut model, &mut batches, &NextToken, &mut optimizer)
                    .unwrap()
                    .unwrap()
                    .loss
            })
            .to_vec();
        assert!((losses[0] - losses[1]).abs() < 1e-5 && (losses[0] - losses[2]).abs() < 1e-5, "{losses:?}");
    }
}
