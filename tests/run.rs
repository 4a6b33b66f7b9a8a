//! What is checked before a run begins: folders, model files.

use std::fs;

use crate::util::{Dir, TINY, repository};

const ROW: &str = "{\"messages\": [{\"role\": \"user\", \"content\": \"Hi\"}, {\"role\": \"assistant\", \"content\": \"Yo\"}]}\n";

fn with_model(model: &str) -> Dir {
    let dir = Dir::new();
    dir.file("rows.jsonl", ROW);
    dir.file("c.yaml", format!("model_name_or_path: {model}\ndataset: rows.jsonl\noutput_dir: out\n"));
    dir
}

/// The tiny model's files in `model`, with one of them changed.
fn with_changed(name: &str, change: impl FnOnce(Vec<u8>) -> Option<Vec<u8>>) -> Dir {
    let dir = with_model("model");
    for entry in fs::read_dir(repository(TINY)).expect("the tiny model").flatten() {
        let bytes = fs::read(entry.path()).expect("a file");
        dir.file(&format!("model/{}", entry.file_name().to_string_lossy()), bytes);
    }
    let path = dir.path().join("model").join(name);
    match change(fs::read(&path).expect("the file to change")) {
        Some(bytes) => fs::write(&path, bytes).expect("a file"),
        None => fs::remove_file(&path).expect("a file"),
    }
    dir
}

#[track_caller]
fn check_refused(dir: &Dir, said: &[&str]) {
    let ran = dir.ferrotune(&["train", "c.yaml"]).fails(1);
    said.iter().fold(ran, |ran, part| ran.says(part));
    assert!(!dir.path().join("out").exists(), "nothing is written before everything is checked");
}

#[test]
fn output_dir_is_not_overwritten_by_accident() {
    let dir = with_model(&repository(TINY).display().to_string());
    dir.file("out/adapter_model.safetensors", "precious");
    dir.ferrotune(&["train", "c.yaml"]).fails_with(
        2,
        "error: c.yaml:3: `output_dir`: `out` is not empty; name another folder, or set `overwrite_output_dir: true` to train anew",
    );
    dir.ferrotune(&["train", "c.yaml", "resume_from_checkpoint=true"])
        .fails(2)
        .says("has no whole checkpoint to go on from");
    dir.ferrotune(&["train", "c.yaml", "resume_from_checkpoint=out/checkpoint-9"])
        .fails(2)
        .says("there is no folder `out/checkpoint-9`");
    dir.ferrotune(&["train", "c.yaml", "output_dir=rows.jsonl"]).fails(2).says("`rows.jsonl` is a file");
    dir.ferrotune(&["train", "c.yaml", "output_dir=null"]).fails(2).says("no folder is named");
}

#[test]
fn what_is_missing_is_said_by_key() {
    let dir = with_model("null");
    dir.ferrotune(&["train", "c.yaml"]).fails(2).says("`model_name_or_path`: no model is named");
    dir.ferrotune(&["train", "c.yaml", "do_train=false"]).fails(2).says("`do_train`: nothing to do");
    let without_gpu = |words: &[&str]| dir.ferrotune(words).env("CUDA_VISIBLE_DEVICES", "");
    let ran = without_gpu(&["train", "c.yaml", "device=cuda:0"]).fails(1);
    ran.says("device `cuda:0`: ").says("set `device: cpu`");
    without_gpu(&["train", "c.yaml", "fp16=true", "device=auto"]).fails(2).says("needs a GPU");
}

#[test]
fn models_that_are_not_there() {
    check_refused(&with_model("./nowhere"), &["error: ", "./nowhere", "no such file or folder"]);
    check_refused(&with_model("someone/something"), &["error: ", "someone/something", "offline"]);
    let dir = with_model("empty");
    fs::create_dir(dir.path().join("empty")).expect("a folder");
    check_refused(&dir, &["error: ", "empty", "config.json"]);
    check_refused(&with_model("c.yaml"), &["error: c.yaml: expected a model's folder"]);
}

#[test]
fn model_files_that_are_damaged() {
    let cut = |bytes: Vec<u8>| Some(bytes[..bytes.len() - 100].to_vec());
    check_refused(&with_changed("model.safetensors", cut), &["error: ", "model.safetensors"]);
    let lying = |mut bytes: Vec<u8>| {
        bytes[..8].copy_from_slice(&u64::MAX.to_le_bytes());
        Some(bytes)
    };
    check_refused(&with_changed("model.safetensors", lying), &["error: ", "model.safetensors"]);
    let wider = |bytes: Vec<u8>| {
        let text =
            String::from_utf8(bytes).expect("JSON").replace("\"vocab_size\": 300", "\"vocab_size\": 301");
        Some(text.into_bytes())
    };
    check_refused(&with_changed("config.json", wider), &["error: ", "tensor `", "300", "301"]);
    check_refused(
        &with_changed("config.json", |_| Some(b"{".to_vec())),
        &["error: ", "config.json", "not JSON"],
    );
    check_refused(&with_changed("tokenizer.json", |_| None), &["error: ", "tokenizer.json"]);
    check_refused(&with_changed("chat_template.jinja", |_| None), &["error: ", "chat template"]);
    let foreign = |bytes: Vec<u8>| {
        Some(String::from_utf8(bytes).expect("text").replace("im_end", "eot_id").into_bytes())
    };
    check_refused(&with_changed("chat_template.jinja", foreign), &["error: ", "`<|eot_id|>`"]);
    let broken = |_| Some(b"{% for m in messages %}".to_vec());
    check_refused(&with_changed("chat_template.jinja", broken), &["error: chat template"]);
}
