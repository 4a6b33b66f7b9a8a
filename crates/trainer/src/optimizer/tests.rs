//! 200 steps against PyTorch, transformers and bitsandbytes: `tests/fixtures/make_optimizers.py`.

use std::path::Path;

use serde_json::Value;

use super::*;

/// The fixture's tensors: name, rows, columns.
const SHAPES: [(&str, usize, usize); 2] =
    [("model.layers.0.self_attn.q_proj.weight", 9, 6), ("model.norm.weight", 1, 7)];

fn parameters(device: &Device) -> Vec<Parameter> {
    let parameter = |(n, (name, rows, cols)): (usize, (&str, usize, usize))| {
        let value = (0..rows * cols).map(|i| (1.7 * i as f64 + 0.3 * n as f64).sin() as f32).collect();
        let value = Tensor::from_vec(rows, cols, value).unwrap().to_device(device).unwrap();
        Parameter::new(name, value).unwrap()
    };
    SHAPES.into_iter().enumerate().map(parameter).collect()
}

/// The script's `gradient`.
fn set_gradients(parameters: &mut [Parameter], step: usize) {
    for (n, parameter) in parameters.iter_mut().enumerate() {
        let (rows, cols) = parameter.value.shape();
        let gradient = |i: usize| {
            let scale = 10f64.powi(i as i32 % 4 - 3);
            let steady = 0.4 * (0.9 * i as f64 + n as f64).cos();
            (scale * (steady + (0.37 * i as f64 + 0.61 * step as f64).sin())) as f32
        };
        let grad = Tensor::from_vec(rows, cols, (0..rows * cols).map(gradient).collect()).unwrap();
        parameter.grad = grad.to_device(&parameter.value.device()).unwrap();
    }
}

fn take(
    optimizer: &mut dyn Optimizer,
    parameters: &mut [Parameter],
    steps: std::ops::Range<usize>,
    rate: f64,
) {
    for step in steps {
        set_gradients(parameters, step);
        let mut parameters: Vec<&mut Parameter> = parameters.iter_mut().collect();
        optimizer.step(&mut parameters, rate, 1.0).unwrap();
    }
}

/// On every device: the fixture's parameters within `tolerance`, and a resumed optimizer the same bits.
fn check(name: &str, rate: f64, tolerance: f64, new: &dyn Fn() -> Box<dyn Optimizer>) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures/optimizers.json");
    let golden: Value = serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap();
    for device in Device::each() {
        let (mut all, mut optimizer, mut done) = (parameters(&device), new(), 0);
        let (mut worst, mut seen) = (0.0f64, 0);
        for last in [1, 2, 20, 200] {
            take(optimizer.as_mut(), &mut all, done + 1..last + 1, rate);
            done = last;
            for parameter in &all {
                let Some(expected) = golden[name][last.to_string()].get(&parameter.name) else { continue };
                let expected = expected.as_array().unwrap();
                let got = parameter.value.to_f32().unwrap();
                assert_eq!(got.len(), expected.len());
                for (got, expected) in got.iter().zip(expected) {
                    worst = worst.max((f64::from(*got) - expected.as_f64().unwrap()).abs());
                    seen += 1;
                }
            }
        }
        assert!(seen >= 4 * 54 && worst < tolerance, "{name} on {}: off by {worst:.1e}", device.name());
        check_resumed(name, rate, &device, new);
    }
}

fn check_resumed(name: &str, rate: f64, device: &Device, new: &dyn Fn() -> Box<dyn Optimizer>) {
    let (mut whole, mut before) = (new(), parameters(device));
    take(whole.as_mut(), &mut before, 1..4, rate);
    let (mut resumed, mut after) = (new(), parameters(device));
    after.iter_mut().zip(&before).for_each(|(after, before)| after.value.copy_from(&before.value).unwrap());
    resumed.restore(whole.state().unwrap(), &after.iter_mut().collect::<Vec<_>>()).unwrap();
    take(whole.as_mut(), &mut before, 4..9, rate);
    take(resumed.as_mut(), &mut after, 4..9, rate);
    for (before, after) in before.iter().zip(&after) {
        assert_eq!(before.value.to_f32().unwrap(), after.value.to_f32().unwrap(), "{name}");
    }
    let mut state = whole.state().unwrap();
    state.insert("foreign.p".into(), Tensor::from_vec(1, 1, vec![0.0f32]).unwrap());
    let error = new().restore(state, &after.iter_mut().collect::<Vec<_>>()).unwrap_err().to_string();
    assert!(error.contains("`foreign.p` belongs to no trained parameter"), "{error}");
}

fn groups() -> ParameterGroups {
    ParameterGroups::with_decay(0.1)
}

fn adamw(memory: StateMemory) -> AdamW {
    AdamW::new(0.9, 0.95, 1e-8, groups(), memory)
}

#[test]
fn adamw_and_sgd_take_pytorchs_steps() {
    for memory in [StateMemory::Device, StateMemory::Host] {
        check("adamw", 1e-2, 1e-5, &|| Box::new(adamw(memory)));
    }
    check("sgd", 1e-2, 1e-5, &|| Box::new(OnHost::new(Sgd { momentum: 0.0 }, groups())));
    check("sgd_momentum", 1e-2, 1e-5, &|| Box::new(OnHost::new(Sgd { momentum: 0.9 }, groups())));
}

#[test]
fn lion_takes_the_steps_of_bitsandbytes() {
    check("lion", 1e-3, 1e-5, &|| Box::new(OnHost::new(Lion { beta1: 0.9, beta2: 0.95 }, groups())));
}

#[test]
fn adafactor_takes_the_steps_of_transformers() {
    check("adafactor", 1e-2, 1e-5, &|| Box::new(OnHost::new(Adafactor, groups())));
}

#[test]
fn muon_takes_pytorchs_steps() {
    check("muon", 1e-2, 1e-4, &|| Box::new(Muon::new(0.95, groups(), adamw(StateMemory::Device))));
}

#[test]
fn lora_plus_takes_longer_steps_with_b() {
    let parameter = |name: &str| Parameter::new(name, Tensor::from_vec(1, 1, vec![1.0f32]).unwrap()).unwrap();
    let groups = ParameterGroups { weight_decay: 0.0, loraplus_lr_ratio: Some(4.0) };
    let mut optimizer = AdamW::new(0.9, 0.95, 1e-8, groups, StateMemory::Device);
    let (mut a, mut b) = (parameter("q.lora_A.weight"), parameter("q.lora_B.weight"));
    for it in [&mut a, &mut b] {
        it.grad = Tensor::from_vec(1, 1, vec![0.5f32]).unwrap();
    }
    optimizer.step(&mut [&mut a, &mut b], 1e-2, 1.0).unwrap();
    // The first step is as long as the learning rate.
    let moved = |it: &Parameter| 1.0 - it.value.to_f32().unwrap()[0];
    assert!(
        (moved(&a) - 0.01).abs() < 1e-6 && (moved(&b) - 0.04).abs() < 1e-6,
        "{} {}",
        moved(&a),
        moved(&b)
    );
}
