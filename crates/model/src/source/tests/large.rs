//! Real models, where they are at hand: `../shared`, and the file that `FERROTUNE_TEST_GGUF` names.

use std::time::Instant;

use super::*;
use crate::spec::{BaseWeights, MemoryPlan};

#[test]
fn stories260k() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../../shared/data/stories260k/hf");
    if !folder.exists() {
        eprintln!("skipped: {} is not there", folder.display());
        return;
    }
    let files = ModelFiles::open(&folder).unwrap();
    assert_eq!(files.spec.layers.len(), 5);
    assert_eq!(files.spec.linear_parameter_count(), 226_560);
    let plan = MemoryPlan {
        base: BaseWeights::FourBit,
        weight_bytes: 4,
        trained_weights: 0,
        lora_rank: 8,
        tokens: 512,
        activation_bytes: 4,
        recompute: false,
        host_embedding: false,
    };
    let kept = files.spec.memory(&plan);
    assert!(kept.total() > files.spec.memory(&MemoryPlan { recompute: true, ..plan }).total());
    assert!((kept.linears as f64 * 8.0 / 226_560.0 - 4.127).abs() < 0.001);
}

#[test]
fn a_real_gguf_file() {
    let Ok(path) = std::env::var("FERROTUNE_TEST_GGUF") else {
        eprintln!("skipped: FERROTUNE_TEST_GGUF names no file");
        return;
    };
    let start = Instant::now();
    let files = ModelFiles::open(&path).unwrap();
    let open = start.elapsed();
    let start = Instant::now();
    let fingerprint = files.fingerprint();
    let hashed = start.elapsed();
    let start = Instant::now();
    let mut numbers = 0;
    for name in files.source.names() {
        let tensor = files.source.get_f32(name).unwrap();
        assert!(tensor.values::<f32>().unwrap().iter().all(|it| it.is_finite()), "{name}");
        numbers += tensor.rows() * tensor.cols();
    }
    let read = start.elapsed();
    assert_eq!(numbers as u64, files.spec.parameter_count());
    let tokens = files.vocabulary.as_ref().map_or(0, |it| it.tokens.len());
    eprintln!("opened in {open:?} ({tokens} tokens), fingerprint {fingerprint} in {hashed:?}");
    eprintln!("{numbers} numbers in f32 in {read:?}; config {}", files.config);
}
