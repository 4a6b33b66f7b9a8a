//! Adapters beyond plain LoRA from the start, against PEFT: going on from a trained one, DoRA, PiSSA, LoftQ,
//! merging. The numbers are `fixtures/make_adapters.py`'s, or those of the collection beside the checkout, where that is.

use std::path::Path;

use ferrotune_data::Batch;
use ferrotune_export::{PeftAdapter, merge};
use ferrotune_lora::{Iterations, LoraAdapter, LoraConfig, loftq, pissa};
use ferrotune_model::source::{ModelFiles, Stored};
use ferrotune_model::{BuildOptions, PartSpec, build, dense_part};
use ferrotune_nn::{Context, LanguageModel, Weight};
use ferrotune_quant::{Nf4Weight, Scales};
use ferrotune_tensor::product::matmul;
use ferrotune_tensor::{DType, Device, MatrixMut, Precision, Result, Tensor};
use ferrotune_tests::hashed;
use serde_json::Value;

use super::golden::{check_near, ten_steps};
use super::{Adapters, Base, context, decoder, fixture, json, tensors};

/// Takes ten steps and compares each one's loss and norm.
fn check_steps(what: &str, expected: &Value, base: Base, adapters: &Adapters) {
    let (plan, samples) = ten_steps();
    for device in Device::each() {
        let mut model = decoder(&device, &fixture("llama_tiny"), base, adapters);
        plan.run(&mut model, samples.clone(), |step, outcome, _| {
            let of = |i: usize| expected["steps"][step][i].as_f64().unwrap();
            check_near(&format!("{what}: loss {step}"), outcome.loss, of(0), 1e-4);
            check_near(&format!("{what}: norm {step}"), outcome.grad_norm, of(1), 1e-4);
        });
    }
}

#[test]
fn going_on_from_a_trained_adapter_takes_pefts_steps() {
    let adapters = Adapters::Lora { tensors: tensors("lora_tiny/after_ten_steps.safetensors"), scaling: 2.0 };
    check_steps("further", &json("adapters.json")["further"], Base::Dense, &adapters);
}

#[test]
fn dora_takes_pefts_steps() {
    for (name, base) in [("f32", Base::Dense), ("nf4", Base::Bitsandbytes)] {
        let tensors = tensors("lora_tiny/adapter_model.safetensors");
        let adapters = Adapters::Dora { tensors, scaling: 2.0 };
        let golden = &json("adapters.json")["dora"][name];
        check_steps(name, golden, base, &adapters);
        check_magnitudes(name, &golden["first"], base, &adapters);
    }
}

/// The first step's gradient of each magnitude vector, by its norm.
fn check_magnitudes(what: &str, golden: &Value, base: Base, adapters: &Adapters) {
    let (_, samples) = ten_steps();
    for device in Device::each() {
        let mut model = decoder(&device, &fixture("llama_tiny"), base, adapters);
        let batch = Batch::new(&samples[..4]);
        let total = batch.trained_tokens() as f64;
        let dlogp: Vec<f64> = batch.trained.iter().map(|it| if *it { -1.0 / total } else { 0.0 }).collect();
        let (hidden, saved) = model.forward(&context(&batch), &batch.tokens).unwrap();
        let head = model.head_backward(&hidden, &batch.targets, &dlogp).unwrap();
        model.backward(&context(&batch), saved, head.dhidden.unwrap()).unwrap();
        let vectors = model.parameters().into_iter().filter(|it| it.name.ends_with("vector"));
        let vectors: Vec<_> = vectors.collect();
        assert_eq!(vectors.len(), golden.as_object().unwrap().len());
        for it in vectors {
            let got = it.grad.to_f32().unwrap().iter().map(|it| f64::from(it * it)).sum::<f64>().sqrt();
            let expected = golden[&it.name].as_f64().unwrap();
            assert!((got / expected - 1.0).abs() < 1e-4, "{what}: {}: {got}, not {expected}", it.name);
        }
    }
}

#[test]
fn adapters_that_peft_wrote_answer_alike_beside_the_base_and_merged_into_it() {
    let shared = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../shared/data");
    let golden = shared.join("golden_bnb_peft");
    let Ok(text) = std::fs::read_to_string(golden.join("logits.json")) else {
        return eprintln!("skipped: {} is not there", golden.display());
    };
    let logits: Value = serde_json::from_str(&text).unwrap();
    let ids: Vec<u32> =
        logits["input_ids"].as_array().unwrap().iter().map(|it| it.as_u64().unwrap() as u32).collect();
    for (device, name) in Device::each()
        .into_iter()
        .flat_map(|it| ["peft_lora_r8", "peft_rslora_r16", "peft_dora_r4"].map(|name| (it.clone(), name)))
    {
        let files = ModelFiles::open(shared.join("stories260k/hf")).unwrap();
        let files = merge(files, PeftAdapter::read(&golden.join(name)).unwrap()).unwrap();
        let options = BuildOptions { precision: Precision::Full, dtype: DType::F32, device: device.clone() };
        let mut make = |spec: &PartSpec, stored: Stored| -> Result<_> { dense_part(spec, stored, &options) };
        let model = build(&files.spec, files.source.as_ref(), options.clone(), &mut make).unwrap();
        let hidden = model.hidden(&Context::new(vec![0, ids.len()]), &ids).unwrap();
        let got = model.logits(&hidden).unwrap();
        let (values, last) = (got.to_f32().unwrap(), (ids.len() - 1) * got.cols());
        for (i, expected) in logits[name].as_array().unwrap().iter().enumerate() {
            let (got, expected) = (f64::from(values[last + i]), expected.as_f64().unwrap());
            check_near(&format!("{name}: logit {i}"), got, expected, 1e-4);
        }
    }
}

fn config(r: usize, lora_alpha: f64) -> LoraConfig {
    LoraConfig { r, lora_alpha, ..LoraConfig::default() }
}

/// s·B·A added to a matrix.
fn with(adapter: &LoraAdapter, mut matrix: Tensor) -> Tensor {
    let (rows, cols) = matrix.shape();
    let (a, b) = (adapter.a.value.matrix().unwrap(), adapter.b.value.matrix().unwrap());
    let out = MatrixMut::new(matrix.values_mut::<f32>().unwrap(), rows, cols);
    matmul(Precision::Full, adapter.scaling as f32, b, a, 1.0, out);
    matrix
}

fn length(tensor: &Tensor) -> f64 {
    tensor.square_sum().unwrap().sqrt()
}

#[test]
fn pissa_takes_the_directions_that_peft_takes() {
    let golden = &json("adapters.json")["pissa"];
    let weight = Tensor::from_vec(24, 40, hashed("pissa", 24 * 40)).unwrap();
    // PEFT's fast search looks in no more directions than it takes, and ends a little off.
    for (name, iterations, tolerance) in
        [("pissa", Iterations::Exact, 1e-5), ("pissa_niter_16", Iterations::Count(16), 1e-3)]
    {
        let (adapter, rest) = pissa("q", &weight, &config(4, 6.0), iterations, Precision::Full).unwrap();
        let expected = golden[name]["residual"].as_f64().unwrap();
        assert!((length(&rest) / expected - 1.0).abs() < tolerance, "{name}: {}", length(&rest));
        // Of singular vectors, s·B·A has its values as squared lengths of A's rows.
        let rows = adapter.a.value.values::<f32>().unwrap().chunks(40);
        let values = rows.map(|row| 1.5 * row.iter().map(|it| f64::from(it * it)).sum::<f64>());
        for (got, expected) in values.zip(golden[name]["values"].as_array().unwrap()) {
            let off = got / expected.as_f64().unwrap() - 1.0;
            assert!(off.abs() < tolerance, "{name}: {got}, not {expected}");
        }
        let again = with(&adapter, rest);
        let pairs = again.values::<f32>().unwrap().iter().zip(weight.values::<f32>().unwrap());
        assert!(pairs.map(|(a, b)| (a - b).abs()).fold(0.0, f32::max) < 1e-6);
    }
}

#[test]
fn loftq_makes_up_for_as_much_as_pefts() {
    let golden = &json("adapters.json")["loftq"];
    let weight = Tensor::from_vec(64, 128, hashed("loftq", 64 * 128)).unwrap();
    let stored = Nf4Weight::quantize(&weight, Scales::Nested, Precision::Full).unwrap().to_dense().unwrap();
    let error = |near: Tensor| {
        let mut off = weight.try_clone().unwrap();
        off.add_scaled(-1.0, &near).unwrap();
        length(&off)
    };
    // Whatever alpha is.
    for alpha in [8.0, 20.0] {
        let adapter =
            loftq("q", weight.try_clone().unwrap(), &stored, &config(8, alpha), Precision::Full).unwrap();
        let of = |key: &str| golden[key].as_f64().unwrap();
        let (plain, adapted) =
            (error(stored.try_clone().unwrap()), error(with(&adapter, stored.try_clone().unwrap())));
        assert!((plain / of("plain") - 1.0).abs() < 1e-4, "{plain}");
        assert!((adapted / of("adapted") - 1.0).abs() < 1e-3, "{adapted}");
    }
}
