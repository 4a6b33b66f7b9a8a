//! Damaged models: whatever the bytes, a file is read or refused with a message, soon and without a panic.
//!
//! Mutations of the headers of small safetensors files, bitsandbytes' among them, the same on every machine: `FUZZ_RUNS` of each
//! (500 unless set); `FUZZ_TARGET` names one. `cargo xtask fuzz safetensors` and so on run many.

mod hashed;

use std::env;
use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::time::Instant;

use ferrotune_export::{FolderOptions, write_bnb};
use ferrotune_model::source::ModelFiles;
use ferrotune_tensor::{Counter, Result};
use serde_json::Value;

use hashed::Checkpoint;

/// Pieces that mean something to some reader.
const PIECES: [&[u8]; 16] = [
    b"\"",
    b"{",
    b"]",
    b",",
    b":",
    b"-",
    b"0",
    b"99999999999999999999",
    b"U8",
    b"F32",
    b"BF16",
    b"null",
    b"\xFF\xFF\xFF\xFF\xFF\xFF\xFF\xFF",
    b"\x00\x00\x00\x00",
    b"\xFF\xFF\xFF\x7F",
    b"bitsandbytes__fp4",
];

/// A file with some bytes changed: before `header`, but one change in `anywhere`.
fn mutated(seed: &[u8], header: usize, anywhere: usize, run: u64) -> Vec<u8> {
    let draws = Counter::new(&[run]);
    let mut count = 0;
    let mut below = |limit: usize| {
        count += 1;
        (draws.bits(count) % limit.max(1) as u64) as usize
    };
    let mut bytes = seed.to_vec();
    for _ in 0..1 + below(3) {
        let end = if below(anywhere) == 0 { bytes.len() } else { header.min(bytes.len()) };
        let at = below(end.max(1));
        let piece = PIECES[below(PIECES.len())];
        match below(6) {
            0 if at < bytes.len() => bytes[at] = below(256) as u8,
            1 if at < bytes.len() => bytes[at] ^= 1 << below(8),
            2 => bytes.truncate(at),
            3 => drop(bytes.splice(at..(at + piece.len()).min(bytes.len()), piece.iter().copied())),
            4 => drop(bytes.splice(at..at, piece.iter().copied())),
            _ => drop(bytes.drain(at..(at + below(16)).min(bytes.len()))),
        }
    }
    bytes
}

/// Opens a model and reads all of it; how many numbers that are.
fn read_through(path: &Path) -> Result<usize> {
    let files = ModelFiles::open(path)?;
    let mut numbers = 0;
    for name in files.source.names() {
        let tensor = files.source.get(name)?.into_dense()?;
        numbers += files.source.get_f32(name)?.len();
        assert_eq!(tensor.shape(), files.source.shape(name)?, "{name}");
    }
    Ok(numbers)
}

#[test]
fn damaged_models_are_read_or_refused() {
    let runs: u64 = env::var("FUZZ_RUNS").ok().and_then(|it| it.parse().ok()).unwrap_or(500);
    let only = env::var("FUZZ_TARGET").ok();
    let text = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/bnb.json")).unwrap();
    let golden: Value = serde_json::from_str(&text).unwrap();
    let whole = Checkpoint::new("fuzz", &golden["config"], &golden["shapes"]);
    let coded = whole.0.join("coded");
    let options = FolderOptions { dtype: None, shard_bytes: u64::MAX };
    write_bnb(&coded, &ModelFiles::open(&whole.0).unwrap(), options, &mut |_, _| {}).unwrap();

    let mut failed = Vec::new();
    let targets = [
        ("safetensors", &whole.0, whole.0.join("model.safetensors")),
        ("bnb", &coded, coded.join("model.safetensors")),
    ];
    for (target, folder, file) in targets {
        if only.as_deref().is_some_and(|it| it != target) {
            continue;
        }
        let seed = fs::read(&file).unwrap();
        let json = u64::from_le_bytes(seed[..8].try_into().unwrap()).saturating_add(8) as usize;
        let (header, anywhere) = match target {
            // The texts of quant_states are among the numbers.
            "bnb" => (json, 2),
            _ => (json, 8),
        };
        assert!(read_through(folder).unwrap() > 10_000, "{target}");
        let (mut read, mut messages) = (0, 0);
        for run in 0..runs {
            fs::write(&file, mutated(&seed, header, anywhere, run)).unwrap();
            let start = Instant::now();
            match catch_unwind(AssertUnwindSafe(|| read_through(folder))) {
                Ok(Ok(_)) => read += 1,
                Ok(Err(error)) => {
                    messages += 1;
                    assert!(!error.to_string().is_empty());
                }
                Err(_) => failed.push(format!("{target} run {run}: a panic")),
            }
            if start.elapsed().as_secs() > 5 {
                failed.push(format!("{target} run {run}: {:?}", start.elapsed()));
            }
        }
        fs::write(&file, &seed).unwrap();
        eprintln!("{target}: {runs} runs, {read} read, {messages} refused");
        assert!(runs < 100 || (read > 0 && messages > 0), "{target}: mutations reach both");
    }
    assert!(failed.is_empty(), "{failed:?}");
}
