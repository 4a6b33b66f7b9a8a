//! Damaged models: whatever the bytes, a file is read or refused with a message, soon and without a panic.
//!
//! Mutations of small files of each kind, the same on every machine: `FUZZ_RUNS` of each (500 unless set), others for each
//! `FUZZ_SEED` (0 unless set); `FUZZ_TARGET` names one kind. The files are made here, so that this program can be carried to a
//! machine by itself; they are in the system's folder for temporary files, which had best be memory. `FUZZ_CORPUS` names a folder
//! to write the whole files into, where a fuzzer may begin.

mod hashed;

use std::env;
use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::time::Instant;

use ferrotune_export::{FolderOptions, write_bnb};
use ferrotune_model::source::{ModelFiles, read_gguf_through};
use ferrotune_tensor::{Counter, Result};
use serde_json::{Value, json};

use hashed::Checkpoint;

/// Pieces that mean something to some reader.
const PIECES: [&[u8]; 18] = [
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
    b"GGUF\x03\x00\x00\x00",
    b"\x01\x00\x00\x00\x00\x00\x00\x00",
];

/// A file with some bytes changed: before `header`, but one change in `anywhere`.
fn mutated(seed: &[u8], header: usize, anywhere: usize, draws: Counter) -> Vec<u8> {
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

/// A model of one narrow layer: the header is a good part of its file.
fn model() -> (Value, Value) {
    let config = json!({
        "model_type": "llama", "vocab_size": 24, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1,
        "num_attention_heads": 2, "num_key_value_heads": 1, "rms_norm_eps": 1e-6, "torch_dtype": "bfloat16",
    });
    let layer = |part: &str| format!("model.layers.0.{part}.weight");
    let mut shapes = json!({
        "model.embed_tokens.weight": [24, 32], "model.norm.weight": [32], "lm_head.weight": [24, 32],
    });
    for (part, shape) in [
        ("self_attn.q_proj", json!([32, 32])),
        ("self_attn.k_proj", json!([16, 32])),
        ("self_attn.v_proj", json!([16, 32])),
        ("self_attn.o_proj", json!([32, 32])),
        ("mlp.gate_proj", json!([48, 32])),
        ("mlp.up_proj", json!([48, 32])),
        ("mlp.down_proj", json!([32, 48])),
        ("input_layernorm", json!([32])),
        ("post_attention_layernorm", json!([32])),
    ] {
        shapes[layer(part)] = shape;
    }
    (config, shapes)
}

/// A kind of file, and how it is read.
struct Target<'a> {
    name: &'static str,
    /// The whole file.
    seed: Vec<u8>,
    /// Where its description ends.
    header: usize,
    /// One change in so many is anywhere.
    anywhere: usize,
    read: Read<'a>,
}

/// How many numbers or tensors there are in these bytes.
type Read<'a> = Box<dyn Fn(&[u8]) -> Result<usize> + 'a>;

/// Reads a folder whose weights are replaced by other bytes.
fn of_folder<'a>(name: &'static str, folder: &'a Path, anywhere: usize) -> Target<'a> {
    let file = folder.join("model.safetensors");
    let seed = fs::read(&file).unwrap();
    let header = u64::from_le_bytes(seed[..8].try_into().unwrap()) as usize + 8;
    let read = move |bytes: &[u8]| {
        fs::write(&file, bytes).unwrap();
        read_through(folder)
    };
    Target { name, seed, header, anywhere, read: Box::new(read) }
}

#[test]
fn damaged_models_are_read_or_refused() {
    let number = |name: &str| env::var(name).ok().and_then(|it| it.parse::<u64>().ok());
    let (runs, seed) = (number("FUZZ_RUNS").unwrap_or(500), number("FUZZ_SEED").unwrap_or(0));
    let only = env::var("FUZZ_TARGET").ok();
    let (config, shapes) = model();
    let whole = Checkpoint::new("fuzz", &config, &shapes);
    let coded = whole.0.join("coded");
    let options = FolderOptions { dtype: None, shard_bytes: u64::MAX };
    write_bnb(&coded, &ModelFiles::open(&whole.0).unwrap(), options, &mut |_, _| {}).unwrap();
    let gguf = include_bytes!("fixtures/gguf/tiny.gguf").to_vec();
    let targets = [
        of_folder("safetensors", &whole.0, 8),
        // The texts of quant_states are among the numbers.
        of_folder("bnb", &coded, 2),
        Target {
            name: "gguf",
            header: 6400,
            anywhere: 8,
            seed: gguf,
            read: Box::new(|bytes| Ok(read_gguf_through(bytes))),
        },
    ];

    let mut failed = Vec::new();
    for Target { name, seed: file, header, anywhere, read } in &targets {
        if only.as_deref().is_some_and(|it| it != *name) {
            continue;
        }
        if let Some(folder) = env::var_os("FUZZ_CORPUS") {
            fs::write(Path::new(&folder).join(name), file).unwrap();
        }
        let all = read(file).unwrap();
        assert!(all > 0, "{name}");
        let (mut whole, mut refused, start) = (0, 0, Instant::now());
        for run in 0..runs {
            let bytes = mutated(file, *header, *anywhere, Counter::new(&[seed, run]));
            let start = Instant::now();
            match catch_unwind(AssertUnwindSafe(|| read(&bytes))) {
                Ok(Ok(some)) if some == all => whole += 1,
                Ok(Ok(_)) => refused += 1,
                Ok(Err(error)) => {
                    refused += 1;
                    assert!(!error.to_string().is_empty());
                }
                Err(_) => failed.push(format!("{name} seed {seed} run {run}: a panic")),
            }
            if start.elapsed().as_secs() > 5 {
                failed.push(format!("{name} seed {seed} run {run}: {:?}", start.elapsed()));
            }
        }
        let took = start.elapsed();
        println!(
            "{name}: seed {seed}, {runs} runs in {took:.1?}, {whole} read whole, {refused} refused or read in part"
        );
        assert!(runs < 100 || (whole > 0 && refused > 0), "{name}: mutations reach both");
    }
    assert!(failed.is_empty(), "{failed:?}");
}
