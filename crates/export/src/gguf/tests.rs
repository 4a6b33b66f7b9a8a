use std::path::PathBuf;

use ferrotune_model::source::{ModelFiles, raw_vocabulary};

use super::*;
use crate::scratch::Scratch;

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures")
}

/// In −1..1, more of them near zero: lowbias32 (Wellons) of the index, cubed.
fn numbers(count: usize) -> Vec<f32> {
    let number = |index: usize| {
        let mut x = index as u32;
        x = (x ^ (x >> 16)).wrapping_mul(0x7FEB_352D);
        x = (x ^ (x >> 15)).wrapping_mul(0x846C_A68B);
        x ^= x >> 16;
        let value = (f64::from(x >> 8) / f64::from(1 << 23) - 1.0) as f32;
        value * value * value
    };
    (0..count).map(number).collect()
}

/// Hashes (FNV-1a) of what ggml's `ggml_quantize_chunk` makes of these numbers (llama.cpp as in
/// llama-cpp-python 0.3.36).
#[test]
fn blocks_have_the_bits_of_ggml() {
    let golden = [
        (GgufType::F16, 0xd5bd_9f09_d1fd_d63a_u64),
        (GgufType::Bf16, 0x32e8_f1f6_fbbb_1043),
        (GgufType::Q4_0, 0x21d3_ad98_f630_0e97),
        (GgufType::Q4_1, 0xea08_6888_b5c9_b0f8),
        (GgufType::Q5_0, 0xd92c_4fee_25be_9dcd),
        (GgufType::Q5_1, 0x24d1_626c_f239_8e02),
        (GgufType::Q8_0, 0x3529_5855_70d8_03ca),
        (GgufType::Q4K, 0x460b_2a69_5d2f_b688),
        (GgufType::Q5K, 0xab57_1d98_7776_e376),
        (GgufType::Q6K, 0x2bc5_2075_e37a_1a36),
    ];
    let values = numbers(256 * 64);
    for (kind, expected) in golden {
        let mut bytes = vec![0; blocks::length(kind, values.len())];
        blocks::write(kind, &values, &mut bytes).unwrap();
        let hash = bytes.iter().fold(0xcbf2_9ce4_8422_2325_u64, |hash, it| {
            (hash ^ u64::from(*it)).wrapping_mul(0x0100_0000_01b3)
        });
        assert_eq!(hash, expected, "{}", kind.name());
    }
}

#[test]
fn numbers_that_do_not_fit_are_refused() {
    let check = |kind, value: f32, expected: &str| {
        let mut values = vec![0.5; 256];
        values[77] = value;
        let mut bytes = vec![0; blocks::length(kind, 256)];
        assert_eq!(blocks::write(kind, &values, &mut bytes).unwrap_err(), expected);
    };
    check(GgufType::Q4K, f32::NAN, "holds NaN");
    check(GgufType::F32, f32::INFINITY, "holds inf");
    check(GgufType::F16, -70_000.0, "holds -70000, which is too large for F16; write BF16 or F32");
}

/// What llama-quantize (llama.cpp as in llama-cpp-python 0.3.36) gives the tensors of SmolLM2-135M: 30 layers, rows of
/// 576 and, in ffn_down, 1536; the head is the embedding.
#[test]
fn mixes_are_those_of_llama_quantize() {
    let mut tensors = vec![("token_embd.weight".to_string(), Some(49152), 576)];
    for layer in 0..30 {
        tensors.push((format!("blk.{layer}.attn_norm.weight"), None, 576));
        for (name, rows, cols) in [
            ("attn_q", 576, 576),
            ("attn_k", 192, 576),
            ("attn_v", 192, 576),
            ("attn_output", 576, 576),
            ("ffn_gate", 1536, 576),
            ("ffn_up", 1536, 576),
            ("ffn_down", 576, 1536),
        ] {
            tensors.push((format!("blk.{layer}.{name}.weight"), Some(rows), cols));
        }
        tensors.push((format!("blk.{layer}.ffn_norm.weight"), None, 576));
    }
    tensors.push(("output_norm.weight".into(), None, 576));
    let shapes: Vec<Shape> =
        tensors.iter().map(|(name, rows, cols)| Shape { name, rows: *rows, cols: *cols }).collect();
    let check = |mix: GgufMix, expected: &[(&str, usize)]| {
        let kinds = mix::types(mix, &shapes, 30, Size::Usual);
        let mut counts = counted(&kinds);
        counts.retain(|it| it.0 != "F32");
        counts.sort_unstable();
        assert_eq!(counts, expected, "{mix:?}");
    };
    check(GgufMix::Bf16, &[("BF16", 211)]);
    check(GgufMix::Q8_0, &[("Q8_0", 211)]);
    check(GgufMix::Q4_0, &[("Q4_0", 210), ("Q8_0", 1)]);
    check(GgufMix::Q4KM, &[("Q4_K", 16), ("Q5_0", 166), ("Q6_K", 14), ("Q8_0", 15)]);
    check(GgufMix::Q5KM, &[("Q5_1", 166), ("Q5_K", 16), ("Q6_K", 14), ("Q8_0", 15)]);
    check(GgufMix::Q6K, &[("Q6_K", 30), ("Q8_0", 181)]);
    // Rows that no block fits, a head of its own, and the 70 B of Llama, whose attn_v is Q5_K at least.
    let own = [
        Shape { name: "token_embd.weight", rows: Some(8), cols: 256 },
        Shape { name: "output.weight", rows: Some(8), cols: 256 },
        Shape { name: "blk.0.attn_v.weight", rows: Some(8), cols: 256 },
        Shape { name: "blk.1.attn_v.weight", rows: Some(8), cols: 48 },
    ];
    let kinds = |size| mix::types(GgufMix::Q4KM, &own, 80, size);
    use GgufType::{F16, F32, Q4K, Q5K, Q6K, Q8_0};
    assert_eq!(kinds(Size::Usual), [Q4K, Q6K, Q4K, F16]);
    assert_eq!(kinds(Size::SeventyBillion)[2], Q5K);
    // Attention beside eight experts, and what sends tokens to them.
    let parts = ["attn_k", "attn_v", "attn_output", "ffn_gate_inp", "ffn_down_exps", "ffn_up_exps"];
    let names = parts.map(|it| format!("blk.0.{it}.weight"));
    let mixtral: Vec<Shape> = names.iter().map(|name| Shape { name, rows: Some(8), cols: 256 }).collect();
    let kinds = |size| mix::types(GgufMix::Q4KM, &mixtral, 32, size);
    assert_eq!(kinds(Size::EightExperts), [Q8_0, Q8_0, Q5K, F32, Q6K, Q4K]);
    assert_eq!(kinds(Size::Usual), [Q4K, Q6K, Q4K, F32, Q6K, Q4K]);
    for mix in GgufMix::names() {
        assert_eq!(GgufMix::named(&mix.to_lowercase()).unwrap().name(), mix);
    }
}

#[test]
fn a_model_is_read_back_as_it_was() {
    let scratch = Scratch::new();
    let files = ModelFiles::open(fixtures().join("llama_tiny")).unwrap();
    let kept = raw_vocabulary(&fixtures().join("gguf/tiny.gguf")).unwrap();
    let tokenizer = GgufTokenizer::Kept(kept.clone());
    let base_model = Some("somebody/tiny-llama".to_string());
    let model = GgufModel {
        spec: &files.spec,
        weights: files.source.as_ref(),
        tokenizer,
        name: "Tiny".into(),
        base_model,
    };
    for (mix, allowed) in
        [(GgufMix::F32, 0.0), (GgufMix::Bf16, 4e-3), (GgufMix::F16, 6e-4), (GgufMix::Q8_0, 2e-2)]
    {
        let path = scratch.0.join(format!("{}.gguf", mix.name()));
        let report = write_gguf(&path, &model, mix).unwrap();
        assert_eq!(report.bytes, std::fs::metadata(&path).unwrap().len());
        assert_eq!(raw_vocabulary(&path).unwrap(), kept);
        let again = ModelFiles::open(&path).unwrap();
        assert_close(&again.spec, &files.spec);
        for tensor in files.spec.tensors() {
            let (ours, theirs) =
                (files.source.get_f32(&tensor.name).unwrap(), again.source.get_f32(&tensor.name).unwrap());
            let (ours, theirs) = (ours.values::<f32>().unwrap(), theirs.values::<f32>().unwrap());
            let largest = ours.iter().fold(0.0f32, |most, it| most.max(it.abs()));
            let off = ours.iter().zip(theirs).fold(0.0f32, |most, (a, b)| most.max((a - b).abs()));
            assert!(off <= allowed * largest, "{mix:?} {}: off by {off} of {largest}", tensor.name);
        }
    }
    assert!(std::fs::read_dir(&scratch.0).unwrap().count() == 4, "something was left beside");
}

/// The same layers, but for the last digits of frequencies, which went through f32.
fn assert_close(got: &ModelSpec, expected: &ModelSpec) {
    let taken = |spec: &ModelSpec| {
        let mut layers = spec.layers.clone();
        let ropes: Vec<_> = layers.iter_mut().map(|it| it.attention.rope.take()).collect();
        (layers, ropes)
    };
    let ((got, got_ropes), (layers, ropes)) = (taken(got), taken(expected));
    assert_eq!(got, layers);
    for (got, expected) in got_ropes.iter().flatten().zip(ropes.iter().flatten()) {
        let pairs = got.inverse_frequencies.iter().zip(&expected.inverse_frequencies);
        pairs.for_each(|(a, b)| assert!((a / b - 1.0).abs() < 1e-6, "{a} {b}"));
    }
}

#[test]
fn ropes_come_apart_into_what_they_were_made_of() {
    let rope = |frequencies: Vec<f64>| ferrotune_model::spec::Rope {
        inverse_frequencies: frequencies,
        attention_factor: 1.0,
        interleaved: false,
    };
    let base = |theta: f64, half: i32| (0..half).map(move |i| theta.powf(-f64::from(i) / f64::from(half)));
    for (theta, half) in [(10_000.0, 32), (500_000.0, 64), (100.0, 8), (1_000_000.0, 128), (130_000.0, 32)] {
        let parts = metadata::rope_parts(&rope(base(theta, half).collect()));
        assert_eq!((parts.theta, parts.factors), (theta as f32, None));
        let parts = metadata::rope_parts(&rope(base(theta, half).map(|it| it / 8.0).collect()));
        assert_eq!((parts.theta, parts.factors), (theta as f32, None));
        let parts = metadata::rope_parts(&rope(
            base(theta, half).map(|it| if it < 0.1 { it / 32.0 } else { it }).collect(),
        ));
        let factors = parts.factors.unwrap();
        let (first, last) = (factors[0], *factors.last().unwrap());
        assert!((first - 1.0).abs() < 1e-6 && (last - 32.0).abs() < 1e-4, "{first} {last}");
    }
}
