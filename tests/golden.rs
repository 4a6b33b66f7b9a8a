//! Whole runs against transformers' trainer: full fine-tuning of our tiny models, and the runs in the
//! collection beside the checkout, where that is.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use ferrotune_data::{BatchOptions, Batches, Sample};
use ferrotune_model::Decoder;
use ferrotune_model::source::ModelFiles;
use ferrotune_model::spec::names;
use ferrotune_nn::{Context, LanguageModel};
use ferrotune_tensor::Device;
use ferrotune_trainer::{
    AdamW, NextToken, ParameterGroups, Schedule, ScheduleKind, StateMemory, StepOutcome, StepSettings,
    optimizer_step,
};
use serde_json::Value;

use super::{Adapters, Base, fixture, floats, json, sample};

/// How a run is taken: steps, batch size, micro-batches, highest rate, warm-up, decay.
pub(super) struct Plan {
    steps: usize,
    batch_size: usize,
    accumulation: usize,
    learning_rate: f64,
    warmup_steps: usize,
    weight_decay: f64,
}

impl Plan {
    fn schedule(&self) -> Schedule {
        Schedule {
            kind: ScheduleKind::Linear,
            learning_rate: self.learning_rate,
            warmup_steps: self.warmup_steps,
            total_steps: self.steps,
        }
    }

    /// Takes the steps in the data's order; `look` sees the model after each.
    pub(super) fn run(
        &self,
        model: &mut Decoder,
        samples: Vec<Sample>,
        mut look: impl FnMut(usize, &StepOutcome, &mut Decoder),
    ) {
        let options = BatchOptions {
            per_device_train_batch_size: self.batch_size,
            packing: false,
            cutoff_len: 512,
            seed: 0,
            shuffle: false,
            group_by_length: 0,
        };
        let mut batches = Batches::new(samples, options).unwrap();
        let groups = ParameterGroups::with_decay(self.weight_decay);
        let mut optimizer = AdamW::new(0.9, 0.999, 1e-8, groups, StateMemory::Device);
        for step in 0..self.steps {
            let settings = StepSettings {
                gradient_accumulation_steps: self.accumulation,
                max_grad_norm: 1.0,
                seed: 0,
                step: step as u64,
                learning_rate: self.schedule().at(step),
                loss_scale: 1.0,
            };
            let outcome = optimizer_step(&settings, model, &mut batches, &NextToken, &mut optimizer);
            look(step, &outcome.unwrap().unwrap(), model);
        }
    }
}

/// All weights trained, or adapters on all projections.
fn decoder(folder: &Path, adapters: &Adapters, device: &Device) -> Decoder {
    let mut decoder = super::decoder(device, folder, Base::Dense, adapters);
    if let Adapters::None = adapters {
        let spec = ModelFiles::open(folder).unwrap().spec;
        decoder.train(&spec, &|_| true).unwrap();
    }
    decoder
}

#[track_caller]
pub(super) fn check_near(what: &str, got: f64, expected: f64, tolerance: f64) {
    let off = (got - expected).abs() / expected.abs().max(1.0);
    assert!(off < tolerance, "{what}: {got}, not {expected} (off by {off:.1e})");
}

fn numbers(it: &Value) -> Vec<f64> {
    it.as_array().unwrap().iter().map(|it| it.as_f64().unwrap()).collect()
}

fn norm(values: &[f32]) -> f64 {
    values.iter().map(|it| f64::from(*it) * f64::from(*it)).sum::<f64>().sqrt()
}

/// A run of ten steps on the rows of lora_tiny.
pub(super) fn ten_steps() -> (Plan, Vec<Sample>) {
    let steps = json("lora_tiny/steps.json");
    let rows = steps["batches"].as_array().unwrap().iter().flat_map(|it| it.as_array().unwrap());
    let samples: Vec<Sample> = rows.flat_map(|it| it.as_array().unwrap()).map(sample).collect();
    let plan = Plan {
        steps: 10,
        batch_size: 2,
        accumulation: 2,
        learning_rate: 1e-3,
        warmup_steps: 2,
        weight_decay: 0.01,
    };
    (plan, samples)
}

#[test]
fn full_fine_tuning_takes_pytorchs_steps() {
    let (plan, samples) = ten_steps();
    for (device, folder) in Device::each()
        .into_iter()
        .flat_map(|it| ["llama_tiny", "llama_tiny_tied"].map(|folder| (it.clone(), folder)))
    {
        let golden = &json("full_tiny.json")[folder];
        let mut model = decoder(&fixture(folder), &Adapters::None, &device);
        check_first_gradients(golden, &fixture(folder), &samples[..4], &device);
        plan.run(&mut model, samples.clone(), |step, outcome, _| {
            let expected = &golden["steps"][step];
            let what = |it: &str| format!("{folder}, step {step}: {it}");
            check_near(&what("loss"), outcome.loss, expected["loss"].as_f64().unwrap(), 1e-4);
            check_near(&what("norm"), outcome.grad_norm, expected["grad_norm"].as_f64().unwrap(), 1e-4);
            check_near(&what("rate"), plan.schedule().at(step), expected["lr"].as_f64().unwrap(), 1e-9);
        });
        let after = golden["after"].as_object().unwrap();
        let parameters = model.parameters();
        assert_eq!(parameters.len(), after.len());
        for parameter in parameters {
            let (got, expected) = (parameter.value.to_f32().unwrap(), numbers(&after[&parameter.name]));
            let ends = [norm(&got), f64::from(got[0]), f64::from(got[got.len() - 1])];
            for (got, expected) in ends.into_iter().zip(expected) {
                check_near(&format!("{folder}: {}", parameter.name), got, expected, 2e-4);
            }
        }
    }
}

#[test]
fn adapters_with_embedding_and_head_take_pefts_steps() {
    let (plan, samples) = ten_steps();
    let golden = json("saved_tiny.json");
    for device in Device::each() {
        let mut model = decoder(&fixture("llama_tiny"), &Adapters::tiny(2.0), &device);
        let spec = ModelFiles::open(fixture("llama_tiny")).unwrap().spec;
        model.train(&spec, &|name| [names::EMBEDDING, names::HEAD].contains(&name)).unwrap();
        plan.run(&mut model, samples.clone(), |step, outcome, _| {
            let expected = &golden["steps"][step];
            check_near(&format!("loss {step}"), outcome.loss, expected["loss"].as_f64().unwrap(), 1e-4);
            check_near(
                &format!("norm {step}"),
                outcome.grad_norm,
                expected["grad_norm"].as_f64().unwrap(),
                1e-4,
            );
        });
        let whole = model.parameters().into_iter().filter(|it| !it.name.contains(".lora_"));
        for parameter in whole {
            let (got, expected) =
                (parameter.value.to_f32().unwrap(), numbers(&golden["after"][&parameter.name]));
            for (got, expected) in
                [norm(&got), f64::from(got[0]), f64::from(got[got.len() - 1])].iter().zip(expected)
            {
                check_near(&parameter.name, *got, expected, 2e-4);
            }
        }
    }
}

/// Every weight's gradient of the first step, by norm and at five places.
fn check_first_gradients(golden: &Value, folder: &Path, samples: &[Sample], device: &Device) {
    let mut model = decoder(folder, &Adapters::None, device);
    let batch = ferrotune_data::Batch::new(samples);
    let ctx = Context::new(batch.sequence_starts.iter().map(|it| *it as usize).collect());
    let total = batch.trained_tokens() as f64;
    let dlogp: Vec<f64> = batch.trained.iter().map(|it| if *it { -1.0 / total } else { 0.0 }).collect();
    let (hidden, saved) = model.forward(&ctx, &batch.tokens).unwrap();
    let head = model.head_backward(&hidden, &batch.targets, &dlogp).unwrap();
    model.backward(&ctx, saved, head.dhidden.unwrap()).unwrap();
    for parameter in model.parameters() {
        let expected = numbers(&golden["first_gradients"][&parameter.name]);
        let got = parameter.grad.to_f32().unwrap();
        let places = (0..5).map(|i| f64::from(got[(got.len() - 1) * i / 4]));
        for (got, it) in [norm(&got)].into_iter().chain(places).zip(&expected) {
            let off = (got - it).abs() / expected[0];
            assert!(off < 1e-4, "gradient of {}: {got}, not {it}", parameter.name);
        }
    }
}

/// The collection beside the checkout.
fn collection() -> Option<PathBuf> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../shared/data");
    let there = folder.join("golden_train/logs.json").is_file();
    if !there {
        eprintln!("skipped: {} is not there", folder.join("golden_train").display());
    }
    there.then_some(folder)
}

fn read(path: &Path) -> Value {
    serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap()
}

#[test]
fn twenty_steps_equal_those_of_transformers_trainer() {
    let Some(shared) = collection() else { return };
    let golden = shared.join("golden_train");
    let rows = read(&golden.join("rows.json"));
    let samples: Vec<Sample> = rows
        .as_array()
        .unwrap()
        .iter()
        .map(|row| sample(&serde_json::json!({ "ids": row["input_ids"], "labels": row["labels"] })))
        .collect();
    let logs = read(&golden.join("logs.json"));
    let open = |path: PathBuf| -> HashMap<String, candle_core::Tensor> {
        candle_core::safetensors::load(path, &candle_core::Device::Cpu).unwrap()
    };
    for device in Device::each() {
        for (name, learning_rate) in [("lora_linear", 2e-3), ("full_adamw", 5e-4)] {
            let adapters = match name {
                "lora_linear" => {
                    let tensors = open(golden.join("lora_linear/init/adapter_model.safetensors"));
                    Adapters::Lora { tensors, scaling: 2.0 }
                }
                _ => Adapters::None,
            };
            let mut model = decoder(&shared.join("stories260k/hf"), &adapters, &device);
            let plan = Plan {
                steps: 20,
                batch_size: 2,
                accumulation: 4,
                learning_rate,
                warmup_steps: 5,
                weight_decay: 0.01,
            };
            let mut worst = [0.0f64; 3];
            plan.run(&mut model, samples.clone(), |step, outcome, model| {
                let expected = &logs[name]["log"][step];
                let of = |key: &str| expected[key].as_f64().unwrap();
                let what = |it: &str| format!("{name}, step {}: {it}", step + 1);
                check_near(&what("rate"), plan.schedule().at(step), of("learning_rate"), 1e-9);
                check_near(&what("loss"), outcome.loss, of("loss"), 1e-4);
                check_near(&what("norm"), outcome.grad_norm, of("grad_norm"), 1e-4);
                worst[0] = worst[0].max((outcome.loss - of("loss")).abs());
                worst[1] = worst[1].max((outcome.grad_norm / of("grad_norm") - 1.0).abs());
                let folder = golden.join(format!("lora_linear/out/checkpoint-{}", step + 1));
                if name == "lora_linear" && folder.is_dir() {
                    let saved = open(folder.join("adapter_model.safetensors"));
                    for parameter in model.parameters() {
                        let expected = floats(&saved[&format!("base_model.model.{}", parameter.name)]);
                        let got = parameter.value.to_f32().unwrap();
                        for (got, expected) in got.iter().zip(&expected) {
                            let off = f64::from((got - expected).abs());
                            worst[2] = worst[2].max(off);
                            assert!(off < 1e-4, "{}: {}", what("adapter"), parameter.name);
                        }
                    }
                }
            });
            eprintln!(
                "{name}: loss off by {:.1e}, norm by {:.1e}, adapter by {:.1e}",
                worst[0], worst[1], worst[2]
            );
            let ctx = Context::new(vec![0, samples[0].tokens.len()]);
            let logits = model.logits(&model.hidden(&ctx, &samples[0].tokens).unwrap()).unwrap();
            let (values, last) = (logits.to_f32().unwrap(), (logits.rows() - 1) * logits.cols());
            for (i, expected) in
                numbers(&logs[name]["final_logits_row0_last_first16"]).into_iter().enumerate()
            {
                check_near(&format!("{name}: logit {i}"), f64::from(values[last + i]), expected, 1e-3);
            }
        }
    }
}
