//! Damaged files: whatever the bytes, reading ends with what is there or an error, never with a panic. `FUZZ_RUNS` (5,000
//! unless set) mutations of small files of every architecture; `cargo xtask fuzz gguf` runs many.

use super::*;

/// A small file of an architecture, with all keys that are read for some.
fn seed(architecture: &str) -> Vec<u8> {
    let text = |out: &mut Vec<u8>, text: &str| {
        out.extend((text.len() as u64).to_le_bytes());
        out.extend(text.as_bytes());
    };
    let mut values: Vec<(String, u32, Vec<u8>)> = Vec::new();
    let mut string = |key: &str, value: &str| {
        let mut bytes = Vec::new();
        text(&mut bytes, value);
        values.push((key.into(), 8, bytes));
    };
    string("general.architecture", architecture);
    string("tokenizer.ggml.model", "gpt2");
    string("tokenizer.chat_template", "{{ x }}");
    let mut own =
        |key: &str, kind: u32, bytes: Vec<u8>| values.push((format!("{architecture}.{key}"), kind, bytes));
    for (key, value) in [
        ("block_count", 1u32),
        ("context_length", 64),
        ("embedding_length", 64),
        ("feed_forward_length", 64),
        ("attention.head_count", 4),
        ("attention.head_count_kv", 2),
        ("attention.key_length", 16),
        ("rope.dimension_count", 16),
    ] {
        own(key, 4, value.to_le_bytes().to_vec());
    }
    own("attention.layer_norm_rms_epsilon", 6, 1e-5f32.to_le_bytes().to_vec());
    if architecture == "qwen3moe" {
        for (key, value) in
            [("expert_count", 2u32), ("expert_used_count", 1), ("expert_feed_forward_length", 8)]
        {
            own(key, 4, value.to_le_bytes().to_vec());
        }
    }
    if architecture == "cohere2" {
        own("attention.layer_norm_epsilon", 6, 1e-5f32.to_le_bytes().to_vec());
        own("logit_scale", 6, 0.25f32.to_le_bytes().to_vec());
    }
    if ["gemma2", "gemma3", "cohere2"].contains(&architecture) {
        own("attention.sliding_window", 4, 8u32.to_le_bytes().to_vec());
        let list = [&7u32.to_le_bytes()[..], &1u64.to_le_bytes(), &[1]].concat();
        own("attention.sliding_window_pattern", 9, list);
    }
    let mut tokens = [8u32.to_le_bytes().to_vec(), 2u64.to_le_bytes().to_vec()].concat();
    text(&mut tokens, "a");
    text(&mut tokens, "b");
    values.push(("tokenizer.ggml.tokens".into(), 9, tokens));
    let tensors: [(&str, &[u64], u32, usize); 6] = [
        ("token_embd.weight", &[64, 2], 0, 512),
        ("blk.0.attn_q.weight", &[64, 64], 8, 4352),
        ("blk.0.attn_k.bias", &[32], 0, 128),
        ("blk.0.ffn_norm.weight", &[64], 1, 128),
        ("rope_freqs.weight", &[8], 0, 32),
        ("blk.0.ffn_up_exps.weight", &[64, 8, 2], 0, 4096),
    ];
    let mut bytes = b"GGUF\x03\0\0\0".to_vec();
    bytes.extend((tensors.len() as u64).to_le_bytes());
    bytes.extend((values.len() as u64).to_le_bytes());
    for (key, kind, value) in &values {
        text(&mut bytes, key);
        bytes.extend(kind.to_le_bytes());
        bytes.extend(value);
    }
    let mut offset = 0u64;
    for (name, shape, kind, length) in tensors {
        text(&mut bytes, name);
        bytes.extend((shape.len() as u32).to_le_bytes());
        shape.iter().for_each(|size| bytes.extend(size.to_le_bytes()));
        bytes.extend(kind.to_le_bytes());
        bytes.extend(offset.to_le_bytes());
        offset += length as u64;
    }
    bytes.resize(bytes.len().next_multiple_of(32) + offset as usize, 0x3c);
    bytes
}

#[test]
fn damaged_files_never_panic() {
    let tiny = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures/gguf/tiny.gguf");
    let seeds: Vec<Vec<u8>> = architecture::ARCHITECTURES.iter().map(|it| seed(it.name)).collect();
    for (seed, it) in seeds.iter().zip(architecture::ARCHITECTURES) {
        assert_eq!(read_gguf_through(seed), 6, "{}", it.name); // each of two experts by itself
        let source = GgufSource::of(Mapped::held("f.gguf", seed)).unwrap();
        let spec = crate::families::spec(&source.config().unwrap(), source.path());
        assert!(spec.is_ok() || it.name == "qwen2", "{}: {spec:?}", it.name);
    }
    let seeds: Vec<Vec<u8>> = seeds.into_iter().chain([std::fs::read(tiny).unwrap()]).collect();
    let runs = std::env::var("FUZZ_RUNS").ok().and_then(|it| it.parse().ok()).unwrap_or(5000u64);
    let (mut state, mut read) = (1u64, 0);
    let mut random = |below: usize| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) as usize % below.max(1)
    };
    for run in 0..runs as usize {
        let mut bytes = seeds[run % seeds.len()].clone();
        let end = header::parse(&bytes).unwrap().data;
        for _ in 0..1 + random(4) {
            let at = random(end.min(bytes.len()));
            match random(7) {
                0 => bytes[at] = random(256) as u8,
                1 => bytes[at] ^= 1 << random(8),
                // Lengths and offsets at their limits.
                2 => bytes[at..].iter_mut().take(8).for_each(|it| *it = 0xff),
                3 => bytes[at..].iter_mut().take(4).for_each(|it| *it = 0),
                4 => {
                    let removed = at..(at + random(16)).min(bytes.len());
                    bytes.drain(removed);
                }
                5 => {
                    let copied = bytes[at..(at + random(64)).min(bytes.len())].to_vec();
                    bytes.splice(at..at, copied);
                }
                _ => bytes.truncate(bytes.len() - random(bytes.len() / 4)),
            }
        }
        read += read_gguf_through(&bytes);
    }
    assert!(runs < 100 || read > 10, "{read} tensors of {runs} files were readable");
}
