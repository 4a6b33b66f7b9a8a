use std::collections::HashMap;
use std::path::Path;

use ferrotune_nn::check::seeded;
use ferrotune_tensor::Device;

use super::*;
use crate::checkpoint;

fn adamw_8bit() -> AdamW8bit {
    AdamW8bit::new(0.9, 0.999, 1e-8, ParameterGroups::with_decay(0.01), StateMemory::Device)
}

/// What bitsandbytes gives: `make_adamw_8bit` in tests/fixtures/make.py.
struct Fixture(HashMap<String, candle_core::Tensor>);

impl Fixture {
    fn read() -> Fixture {
        let file = "../../tests/fixtures/adamw_8bit/adamw_8bit.safetensors";
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(file);
        Fixture(candle_core::safetensors::load(path, &candle_core::Device::Cpu).unwrap())
    }

    fn floats(&self, name: &str) -> Vec<f32> {
        let flat = self.0[name].flatten_all().unwrap();
        flat.to_dtype(DType::F32).unwrap().to_vec1().unwrap()
    }

    fn bytes(&self, name: &str) -> Vec<u8> {
        self.0[name].flatten_all().unwrap().to_vec1().unwrap()
    }

    /// The fixture's three steps over the first elements of its value.
    fn three_steps(&self, rows: usize, cols: usize) -> (Vec<f32>, State) {
        let tensor = |name: &str| {
            let values = self.floats(name)[..rows * cols].to_vec();
            Tensor::from_vec(rows, cols, values).unwrap()
        };
        let (mut p, mut optimizer) = (Parameter::new("p", tensor("value")).unwrap(), adamw_8bit());
        for step in 1..=3 {
            p.grad = tensor(&format!("grad.{step}"));
            optimizer.step(&mut [&mut p], 1e-3, 0.7).unwrap();
        }
        (p.value.to_f32().unwrap(), optimizer.state().unwrap())
    }
}

#[track_caller]
fn check_equal<T: PartialEq + std::fmt::Debug>(what: &str, got: &[T], expected: &[T]) {
    assert_eq!(got.len(), expected.len(), "{what}");
    let different = got.iter().zip(expected).position(|(got, expected)| got != expected);
    assert_eq!(different.map(|at| (at, &got[at], &expected[at])), None, "{what}");
}

#[track_caller]
fn check_near(what: &str, got: &[f32], expected: &[f32], tolerance: impl Fn(usize) -> f32) {
    assert_eq!(got.len(), expected.len(), "{what}");
    for (i, (got, expected)) in got.iter().zip(expected).enumerate() {
        assert!((got - expected).abs() <= tolerance(i), "{what}, element {i}: {got}, not {expected}");
    }
}

#[test]
fn maps_and_nearest_codes_are_those_of_bitsandbytes() {
    let fixture = Fixture::read();
    for (kind, map) in [("signed", dynamic_map()), ("unsigned", unsigned_dynamic_map())] {
        check_equal(kind, map, &fixture.floats(&format!("map.{kind}")));
        let map = Map::new(map);
        let all = map.numbers.iter().chain(&map.midpoints).copied();
        let below = map.midpoints.iter().map(|it| it.next_down());
        let above = map.midpoints.iter().map(|it| it.next_up());
        let codes: Vec<u8> = all.chain(below).chain(above).map(|x| map.nearest(x)).collect();
        check_equal(kind, &codes, &fixture.bytes(&format!("nearest.{kind}")));
        assert_eq!(map.nearest(f32::NAN), 0);
    }
}

#[test]
fn three_steps_equal_those_of_bitsandbytes() {
    let fixture = Fixture::read();
    let (values, state) = fixture.three_steps(8, 537);
    // Bit for bit what its kernel computes when each operation is rounded by itself: ordinary blocks and
    // a partial one, blocks without a gradient, moments below the map, gradients that aren't finite.
    check_equal("values", &values, &fixture.floats("kernel.value"));
    for kind in KINDS {
        let codes = state[&format!("{kind}.p")].values::<u8>().unwrap();
        check_equal(kind, codes, &fixture.bytes(&format!("kernel.{kind}")));
        let absmax = state[&format!("{kind}_absmax.p")].values::<f32>().unwrap();
        check_equal(kind, absmax, &fixture.floats(&format!("kernel.{kind}_absmax")));
        // The library itself takes 1 − β₂ of the f64 on the CPU: 1.3e-5 of v.
        let expected = fixture.floats(&format!("cpu.{kind}_absmax"));
        check_near(kind, absmax, &expected, |i| 2e-5 * expected[i]);
    }
    let (before, after) = (fixture.floats("value"), fixture.floats("cpu.value"));
    let last = fixture.floats("grad.3");
    check_near("values on the CPU", &values, &after, |i| match last[i].is_finite() {
        true => 2e-5 * (after[i] - before[i]).abs() + 2e-7 * before[i].abs().max(1.0),
        false => f32::INFINITY,
    });
}

#[test]
fn small_tensors_are_stepped_in_32_bits() {
    let fixture = Fixture::read();
    let (values, state) = fixture.three_steps(10, 30);
    let expected = fixture.floats("small.value");
    check_near("values", &values, &expected, |i| 1e-6 * expected[i].abs().max(0.1));
    assert_eq!(state["exp_avg.p"].dtype(), DType::F32);
    assert_eq!(state.len(), 3, "{:?}", state.keys());
}

/// Some tensors in 8 bits, one of them in several chunks with a partial block, and a small one.
fn parameters(device: &Device) -> Vec<Parameter> {
    let shapes = [(37, 1001), (64, 64), (10, 30)];
    let parameter = |(i, (rows, cols)): (usize, (usize, usize))| {
        let value = seeded(rows, cols, i as u64).cast(DType::F32).unwrap().to_device(device).unwrap();
        Parameter::new(format!("p{i}"), value).unwrap()
    };
    shapes.into_iter().enumerate().map(parameter).collect()
}

/// With gradients over six decades, other ones in each step.
fn take_steps(optimizer: &mut AdamW8bit, parameters: &mut [Parameter], steps: std::ops::Range<u64>) {
    for step in steps {
        for (i, parameter) in parameters.iter_mut().enumerate() {
            let (rows, cols) = parameter.value.shape();
            let unit = seeded(rows, cols, 100 * (step + 1) + i as u64);
            let grad = unit.values::<f64>().unwrap().iter().map(|x| (2.0 * x).powi(7) as f32).collect();
            let grad = Tensor::from_vec(rows, cols, grad).unwrap();
            parameter.grad = grad.to_device(&parameter.value.device()).unwrap();
        }
        let mut parameters: Vec<&mut Parameter> = parameters.iter_mut().collect();
        optimizer.step(&mut parameters, 1e-3, 0.7).unwrap();
    }
}

fn values(parameters: &[Parameter]) -> Vec<f32> {
    parameters.iter().flat_map(|it| it.value.to_f32().unwrap()).collect()
}

#[test]
fn every_device_takes_the_same_steps() {
    for device in Device::each() {
        let run = |device: &Device| {
            let (mut optimizer, mut parameters) = (adamw_8bit(), parameters(device));
            take_steps(&mut optimizer, &mut parameters, 0..20);
            (values(&parameters), optimizer.state().unwrap())
        };
        let ((got, got_state), (expected, expected_state)) = (run(&device), run(&Device::Cpu));
        check_near(&device.name(), &got, &expected, |i| 1e-6 * expected[i].abs());
        let (mut seen, mut different) = (0, 0);
        for (name, expected) in expected_state.iter().filter(|(_, it)| it.dtype() == DType::U8) {
            let (got, expected) = (got_state[name].values::<u8>().unwrap(), expected.values::<u8>().unwrap());
            seen += got.len();
            different += got.iter().zip(expected).filter(|(got, expected)| got != expected).count();
        }
        assert_eq!(seen, 2 * (37 * 1001 + 64 * 64), "codes");
        assert!(different * 1000 <= seen, "{}: {different} of {seen} codes differ", device.name());
    }
}

#[test]
fn a_restored_optimizer_goes_on_bit_for_bit() {
    for device in Device::each() {
        let (mut whole, mut before) = (adamw_8bit(), parameters(&device));
        take_steps(&mut whole, &mut before, 0..3);
        let mut after = parameters(&device);
        for (after, before) in after.iter_mut().zip(&before) {
            after.value.copy_from(&before.value).unwrap();
        }
        // Through the file of a checkpoint.
        let dir = std::env::temp_dir().join(format!("ferrotune-adamw-8bit-{}", std::process::id()));
        let path = dir.join("optimizer.safetensors");
        std::fs::create_dir_all(&dir).unwrap();
        checkpoint::write_tensors(&path, &whole.state().unwrap()).unwrap();
        let state = checkpoint::read_tensors(&path).unwrap();
        std::fs::remove_dir_all(&dir).unwrap();
        let mut resumed = adamw_8bit();
        resumed.restore(state, &after.iter_mut().collect::<Vec<_>>()).unwrap();
        take_steps(&mut whole, &mut before, 3..7);
        take_steps(&mut resumed, &mut after, 3..7);
        assert!(values(&before) == values(&after), "{}", device.name());
        for (name, state) in whole.state().unwrap() {
            let resumed = resumed.state().unwrap();
            let same = match state.dtype() {
                DType::U8 => state.values::<u8>().unwrap() == resumed[&name].values::<u8>().unwrap(),
                DType::U32 => state.values::<u32>().unwrap() == resumed[&name].values::<u32>().unwrap(),
                _ => state.values::<f32>().unwrap() == resumed[&name].values::<f32>().unwrap(),
            };
            assert!(same, "{}: {name}", device.name());
        }
    }
}

#[test]
fn a_foreign_state_is_refused() {
    let (mut optimizer, mut all) = (adamw_8bit(), parameters(&Device::Cpu));
    take_steps(&mut optimizer, &mut all, 0..1);
    let check = |change: &dyn Fn(&mut State), said: &[&str]| {
        let (mut state, mut all) = (optimizer.state().unwrap(), parameters(&Device::Cpu));
        change(&mut state);
        let parameters: Vec<&mut Parameter> = all.iter_mut().collect();
        let error = adamw_8bit().restore(state, &parameters).unwrap_err().to_string();
        assert!(said.iter().all(|part| error.contains(part)), "{error}");
    };
    let zeros = |rows, cols| Tensor::from_vec(rows, cols, vec![0.0f32; rows * cols]).unwrap();
    check(&|state| drop(state.remove("exp_avg_sq_absmax.p1")), &["`exp_avg_sq_absmax.p1` is missing"]);
    check(
        &|state| drop(state.insert("exp_avg_absmax.p0".into(), zeros(1, 3))),
        &["exp_avg_absmax.p0", "(1, 145)"],
    );
    // Moments of another optimizer.
    check(&|state| drop(state.insert("exp_avg.p1".into(), zeros(64, 64))), &["exp_avg.p1", "F32", "u8"]);
    check(
        &|state| drop(state.insert("exp_avg.p9".into(), zeros(1, 1))),
        &["exp_avg.p9", "no trained parameter"],
    );
}
