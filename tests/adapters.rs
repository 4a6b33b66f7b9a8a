//! Adapters beyond plain LoRA from the start, against PEFT: going on from a trained one. The numbers are
//! `fixtures/make_adapters.py`'s.

use ferrotune_tensor::Device;
use serde_json::Value;

use super::golden::{check_near, ten_steps};
use super::{Adapters, Base, decoder, fixture, json, tensors};

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
