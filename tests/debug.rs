//! `ferrotune debug` and `ferrotune model`

use std::collections::HashMap;
use std::path::Path;

use crate::util::{Dir, TINY, repository};

fn tiny() -> String {
    repository(TINY).display().to_string()
}

#[test]
fn tokenize_prints_ids_and_tokens() {
    let dir = Dir::new();
    let words = ["debug", "tokenize", "--model", &tiny(), "a<|im_end|>"];
    let plain = dir.ferrotune(&words).succeeds();
    assert!(!plain.stdout.contains("\"<|im_end|>\""), "typed control tokens are text: {}", plain.stdout);
    let control = dir.ferrotune(&[&words[..], &["--control-tokens"]].concat()).succeeds();
    assert_eq!(control.stdout, "{\"ids\":[67,2],\"tokens\":[\"a\",\"<|im_end|>\"]}\n");
    // Standard input where no text is given.
    let input = dir.ferrotune(&[&words[..4], &["--control-tokens"]].concat()).input("a<|im_end|>");
    assert_eq!(input.stdout, control.stdout);
}

#[test]
fn render_prints_text_spans_and_marks() {
    let dir = Dir::new();
    let conversation =
        "[{\"role\": \"user\", \"content\": \"Hi\"}, {\"role\": \"assistant\", \"content\": \"Yo\"}]";
    let ran = dir.ferrotune(&["debug", "render", "--model", &tiny()]).input(conversation);
    let text = "<|im_start|>user\\nHi<|im_end|>\\n<|im_start|>assistant\\nYo<|im_end|>\\n";
    assert!(
        ran.stdout.starts_with(&format!("{{\"rendered\":\"{text}\",\"spans\":[[52,64]],\"ids\":[1,")),
        "{}",
        ran.stdout
    );

    dir.file("t.jinja", "{{ bos_token }}{{ strftime_now('%Y') }}{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}");
    dir.file("chat.json", conversation.replace("Hi", "é😀"));
    let words =
        ["debug", "render", "--template", "t.jinja", "--special", "bos_token=<s>", "--now", "2026-01-01"];
    let ran = dir.ferrotune(&[&words[..], &["--conversation", "chat.json"]].concat()).succeeds();
    // Code points, not bytes.
    assert_eq!(ran.stdout, "{\"rendered\":\"<s>2026[user] é😀\\n[assistant] Yo\\n\",\"spans\":[[29,31]]}\n");
    let ran = dir.ferrotune(&[&words[..], &["--continue-final-message"]].concat()).input(conversation);
    assert_eq!(ran.stdout, "{\"rendered\":\"<s>2026[user] Hi\\n[assistant] Yo\",\"spans\":[]}\n");
    let words = [
        "debug",
        "render",
        "--template",
        "qwen3",
        "--set",
        "enable_thinking=false",
        "--add-generation-prompt",
    ];
    let ran = dir
        .ferrotune(&[&words[..], &["--conversation", "-"]].concat())
        .input("[{\"role\": \"user\", \"content\": \"Hi\"}]");
    let text = "<|im_start|>user\\nHi<|im_end|>\\n<|im_start|>assistant\\n<think>\\n\\n</think>\\n\\n";
    assert_eq!(ran.stdout, format!("{{\"rendered\":\"{text}\",\"spans\":[]}}\n"));

    dir.file("raises.jinja", "{{ raise_exception('roles must alternate') }}");
    let ran = dir.ferrotune(&["debug", "render", "--template", "raises.jinja"]).input(conversation);
    assert_eq!(ran.code, Some(1));
    ran.says("error: chat template `raises.jinja`: roles must alternate");
    dir.ferrotune(&["debug", "render", "--template", "t.jinja", "--now", "today", "chat.json"])
        .fails(2)
        .says("--now");

    let wrong = dir.ferrotune(&["debug", "render", "--model", &tiny()]).input("Hi");
    assert_eq!(wrong.code, Some(1));
    wrong.says("error: the conversation is not JSON: ");
    dir.ferrotune(&["debug", "render"]).fails(2).says("--model");
}

#[test]
fn gradients_equal_pefts() {
    let dir = Dir::new();
    let (model, lora) = (tiny(), repository("tests/fixtures/lora_tiny"));
    let adapter = lora.display().to_string();
    let words = [
        "debug",
        "gradients",
        "--model",
        &model,
        "--adapter",
        &adapter,
        "--output",
        "gradients.safetensors",
        "device=cpu",
    ];
    let sequences = repository(TINY).join("golden.json").display().to_string();
    let ran = dir.ferrotune(&[&words[..], &["--sequences", &sequences]].concat()).succeeds();
    let number = |text: &str, key: &str| -> f64 {
        serde_json::from_str::<serde_json::Value>(text).expect("JSON")[key].as_f64().expect("a number")
    };
    let golden = std::fs::read_to_string(lora.join("golden.json")).expect("golden numbers");
    let (loss, expected) = (number(&ran.stdout, "loss"), number(&golden, "loss"));
    assert!((loss - expected).abs() < 1e-4, "{loss}, not {expected}");

    let tensors = |path: &Path| -> HashMap<String, Vec<f32>> {
        let all = candle_core::safetensors::load(path, &candle_core::Device::Cpu).expect("tensors");
        let values = |it: candle_core::Tensor| it.flatten_all().unwrap().to_vec1().unwrap();
        all.into_iter().map(|(name, it)| (name, values(it))).collect()
    };
    let got = tensors(&dir.path().join("gradients.safetensors"));
    let expected = tensors(&lora.join("grads.safetensors"));
    assert_eq!((got.len(), expected.len()), (42, 42));
    for (name, expected) in expected {
        let off: f32 = got[&name].iter().zip(&expected).map(|(a, b)| (a - b) * (a - b)).sum();
        let norm: f32 = expected.iter().map(|it| it * it).sum();
        assert!((off / norm).sqrt() < 1e-3, "{name}: off by {off:e}");
    }

    for (input, message) in [
        ("Hi", "error: the sequences: expected value at line 1 column 1"),
        ("{\"sequences\": []}", "error: no label is trained on; the first of each sequence follows nothing"),
        ("{\"sequences\": [{\"ids\": [1], \"labels\": []}]}", "error: sequence 1 has 1 ids and 0 labels"),
        (
            "{\"sequences\": [{\"ids\": [1, 2], \"labels\": [-100, 7]}]}",
            "error: sequence 1 has the label 7 for token 2, expected that or -100",
        ),
    ] {
        let ran = dir.ferrotune(&words).input(input);
        assert_eq!((ran.code, ran.stderr.trim_end()), (Some(1), message));
    }
}

#[test]
fn model_prints_parameters_and_memory() {
    let ran = Dir::new().ferrotune(&["model", &tiny(), "lora_rank=4", "cutoff_len=512"]).succeeds();
    ran.prints("family      llama\n")
        .prints("parameters  ")
        .prints(" at rank 4 ")
        .prints("micro-batches of 512 tokens")
        .prints("4 bit, recompute: all");
}
