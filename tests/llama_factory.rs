//! The keys of LLaMA-Factory's examples for training on text (its examples/train_lora, train_qlora and
//! train_full): each config runs with a tiny model in the place of its own, or the one key is named that
//! isn't supported.

use crate::util::{Dir, TINY, repository};

/// What the examples share.
const COMMON: &str = "trust_remote_code: true\ncutoff_len: 2048\nmax_samples: 1000\noverwrite_cache: true\n\
    preprocessing_num_workers: 16\ndataloader_num_workers: 4\noutput_dir: saves/run\nlogging_steps: 10\nsave_steps: 500\n\
    plot_loss: true\noverwrite_output_dir: true\nsave_only_model: false\nreport_to: none\n\
    per_device_train_batch_size: 1\ngradient_accumulation_steps: 8\nlearning_rate: 1.0e-4\nnum_train_epochs: 3.0\n\
    lr_scheduler_type: cosine\nwarmup_ratio: 0.1\nbf16: true\nddp_timeout: 180000000\nresume_from_checkpoint: null\n";
const SFT: &str = "stage: sft\ndo_train: true\ndataset: identity,alpaca_en_demo\ntemplate: qwen3_nothink\n";
const LORA: &str = "finetuning_type: lora\nlora_rank: 8\nlora_target: all\n";

/// What is expected of a config.
enum Expected {
    Runs,
    Names(&'static str),
    /// It runs, unless this key isn't there yet: then that is all that is said.
    RunsOrNames(&'static str),
}
use Expected::{Names, Runs, RunsOrNames};

#[track_caller]
fn check(name: &str, keys: &str, expected: Expected) {
    let dir = Dir::new();
    dir.file(
        "data/dataset_info.json",
        r#"{"identity": {"file_name": "identity.json"}, "alpaca_en_demo": {"file_name": "alpaca.json"},
            "c4_demo": {"file_name": "c4.jsonl", "columns": {"prompt": "text"}}}"#,
    );
    let rows = r#"[{"instruction": "hi", "input": "", "output": "Hello! I am {{name}}."},
        {"instruction": "Add.", "input": "1 and 2", "output": "3", "history": [["a", "b"]]}]"#;
    dir.file("data/identity.json", rows);
    dir.file("data/alpaca.json", rows);
    dir.file("data/c4.jsonl", "{\"text\": \"Once upon a time.\"}\n{\"text\": \"There was a model.\"}\n");
    let config = format!("model_name_or_path: Qwen/Qwen3-4B-Instruct-2507\n{COMMON}{keys}");
    dir.file("example.yaml", config);
    // Its own model is replaced, and with it the template and the place to compute.
    let model = format!("model_name_or_path={}", repository(TINY).display());
    let words = ["train", "example.yaml", &model, "template=auto", "device=cpu"];
    let output = dir.ferrotune(&words).command().output().expect("the program");
    let stderr = String::from_utf8_lossy(&output.stderr);
    let names = |key: &str| {
        let errors: Vec<&str> = stderr.lines().filter(|line| line.starts_with("error: ")).collect();
        output.status.code() == Some(2) && errors.len() == 1 && errors[0].contains(&format!("`{key}`"))
    };
    let runs = output.status.code() == Some(0);
    let fine = match expected {
        Runs => runs,
        Names(key) => names(key),
        RunsOrNames(key) => runs || names(key),
    };
    assert!(fine, "{name}: {:?}\n{stderr}", output.status.code());
}

#[test]
fn examples_run_or_name_the_key_that_is_not_supported() {
    check("train_lora/…_lora_sft", &format!("{SFT}{LORA}"), Runs);
    let eval = "eval_dataset: alpaca_en_demo\nper_device_eval_batch_size: 1\neval_strategy: steps\neval_steps: 500\n";
    check("train_lora/…_lora_sft with its eval part", &format!("{SFT}{LORA}{eval}"), Runs);
    let split = "val_size: 0.5\nper_device_eval_batch_size: 1\n";
    check("train_lora/…_lora_sft with its split", &format!("{SFT}{LORA}{split}"), RunsOrNames("val_size"));
    let pretrain = "stage: pt\ndo_train: true\ndataset: c4_demo\n";
    check("train_lora/…_lora_pretrain", &format!("{pretrain}{LORA}"), RunsOrNames("stage"));
    let zero = "deepspeed: examples/deepspeed/ds_z0_config.json\n";
    check("train_lora/…_lora_sft_ds3", &format!("{SFT}{LORA}{zero}"), Names("deepspeed"));
    let preprocess = "tokenized_path: saves/tokens\n";
    check("train_lora/…_preprocess", &format!("{SFT}{LORA}{preprocess}"), RunsOrNames("tokenized_path"));
    check("train_lora/…_lora_sft.sh with ray", &format!("{SFT}{LORA}use_ray: true\n"), Names("use_ray"));

    let four = "quantization_bit: 4\nquantization_method: bnb\n";
    check("train_qlora/…_lora_sft_otfq", &format!("{SFT}{LORA}{four}"), Runs);
    let four = "quantization_bit: 4\nquantization_method: bnb\ndouble_quantization: false\n";
    check("train_qlora/…_lora_sft_bnb_npu", &format!("{SFT}{LORA}{four}"), Runs);
    for method in ["gptq", "awq", "aqlm"] {
        let keys = format!("{SFT}{LORA}quantization_method: {method}\n");
        check(&format!("train_qlora/…_lora_sft_{method}"), &keys, Names("quantization_method"));
    }

    let full = "finetuning_type: full\n";
    check("train_full/…_full_sft on one device", &format!("{SFT}{full}"), Runs);
    let zero = "deepspeed: examples/deepspeed/ds_z3_config.json\n";
    check("train_full/…_full_sft", &format!("{SFT}{full}{zero}"), Names("deepspeed"));
    let predict = "stage: sft\ndo_predict: true\npredict_with_generate: true\neval_dataset: identity,alpaca_en_demo\n\
        per_device_eval_batch_size: 1\nmax_new_tokens: 4\n";
    check("train_full/…_full_predict", &format!("{predict}{full}"), Runs);
}
