use std::path::Path;

use super::*;

/// Headers with random changes are refused or read, and never panic. `FERROTUNE_FUZZ_RUNS` asks for more.
#[test]
fn damaged_headers_never_panic() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures/gguf/tiny.gguf");
    let whole = std::fs::read(path).unwrap();
    let end = header::parse(&whole).unwrap().data;
    let runs = std::env::var("FERROTUNE_FUZZ_RUNS").ok().and_then(|it| it.parse().ok()).unwrap_or(5000u64);
    let (mut state, mut read) = (1u64, 0);
    let mut random = |below: usize| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) as usize % below
    };
    for _ in 0..runs {
        let mut bytes = whole.clone();
        for _ in 0..1 + random(4) {
            let at = random(end);
            match random(4) {
                0 => bytes[at] = random(256) as u8,
                1 => bytes[at] ^= 1 << random(8),
                // Lengths and offsets at their limits.
                2 => bytes[at..at + 8].fill(0xff),
                _ => bytes.truncate(end + random(whole.len() - end)),
            }
        }
        let Ok(header) = header::parse(&bytes) else { continue };
        let config = config::read(&header, &bytes, GgufArchitecture::named("llama").unwrap(), None);
        let _ = config.map(|it| crate::families::spec(&it, Path::new("x")));
        let _ = vocabulary::read(&header, &bytes);
        let tensor = header.tensors.values().nth(random(header.tensors.len().max(1)));
        if let Some(tensor) = tensor {
            let mut out = vec![0.0; tensor.shape.iter().product()];
            tensor.kind.read(&bytes[tensor.bytes.clone()], &mut out);
            read += 1;
        }
    }
    assert!(runs < 100 || read > 10, "{read} of {runs} were readable");
}
