//! `check(input, expected)` for configs.

use super::choices::TemplateName;
use super::kinds::{MaxSteps, Steps};
use super::*;
use std::path::PathBuf;

fn words(words: &[&str]) -> Vec<String> {
    words.iter().map(|word| word.to_string()).collect()
}

#[track_caller]
fn fine(text: &str, typed: &[&str]) -> RunConfig {
    match RunConfig::from_text("c.yaml", text, &words(typed)) {
        Ok(config) => config,
        Err(error) => panic!("{error:#}"),
    }
}

#[track_caller]
fn check_errors(text: &str, typed: &[&str], expected: &[&str]) {
    let error =
        RunConfig::from_text("c.yaml", text, &words(typed)).expect_err("this config should be refused");
    let usage = error.downcast_ref::<Usage>().expect("a usage error");
    assert_eq!(usage.0, expected);
}

#[test]
fn words_win_over_the_file_and_the_file_over_defaults() {
    let config = fine(
        "lora_rank: 16\nlearning_rate: 1e-4\nseed: 7\n",
        &["lora_rank=32", "lora_target=[q_proj, v_proj]"],
    );
    assert_eq!((config.lora_rank, config.learning_rate, config.seed, config.cutoff_len), (32, 1e-4, 7, 2048));
    assert_eq!(config.lora_target, ["q_proj", "v_proj"]);
    assert_eq!(config.alpha(), 64.0);
    assert_eq!(config.place("lora_rank"), "command line: ");
    assert_eq!(config.place("seed"), "c.yaml:3: ");
    assert_eq!(config.place("cutoff_len"), "");
}

#[test]
fn values_of_each_kind() {
    let config = fine(
        "lora_target: q_proj, v_proj\ndataset:\n  - a.jsonl\n  - b\noutput_dir: out/x\nhf_hub_token: '0123'\n\
         quantization_bit: 4\ndouble_quantization: no\nsave_steps: 0.1\nmax_steps: -1\nlogging_steps: 5.0\n\
         dataset_values: {name: Ada, author: \"Lovelace & Co\"}\nresume_from_checkpoint: out/x/checkpoint-5\n\
         lora_alpha: null\nmax_samples: 1_000\nlr_scheduler_type: cosine\noptim: adamw_bnb_8bit\n",
        &["dataset_values.name=Grace", "warmup_ratio=.1", "default_system=You: a #1 poet"],
    );
    assert_eq!(config.lora_target, ["q_proj", "v_proj"]);
    assert_eq!(config.dataset, ["a.jsonl", "b"]);
    assert_eq!(config.output_dir, Some(PathBuf::from("out/x")));
    assert_eq!(config.hf_hub_token.as_deref(), Some("0123"));
    assert_eq!(config.quantization_bit, Some(QuantizationBit::Four));
    assert!(!config.double_quantization);
    assert_eq!((config.save_steps, config.save_steps.of(25)), (Steps::Share(0.1), 3));
    assert_eq!((config.max_steps, config.logging_steps), (MaxSteps(None), Steps::Count(5)));
    assert_eq!(config.dataset_values["name"], "Grace");
    assert_eq!(config.dataset_values["author"], "Lovelace & Co");
    assert_eq!(config.resume_from_checkpoint, Resume::From(PathBuf::from("out/x/checkpoint-5")));
    assert_eq!((config.max_samples, config.optim), (Some(1000), Optimizer::AdamW8bit));
    assert_eq!(config.warmup(50), 5);
    assert_eq!(config.default_system.as_deref(), Some("You: a #1 poet"));
    assert!(!config.values().iter().any(|(_, value)| value.contains("0123")), "no secrets");
}

#[test]
fn unknown_keys_name_the_nearest() {
    check_errors("lora_rnak: 8\n", &[], &["c.yaml:1: `lora_rnak` is not a key; did you mean `lora_rank`?"]);
    check_errors(
        "",
        &["learning-rate=1"],
        &["command line: `learning-rate` is not a key; did you mean `learning_rate`?"],
    );
    check_errors(
        "",
        &["Qqqqqq=1"],
        &["command line: `Qqqqqq` is not a key; `ferrotune train --help` lists the keys"],
    );
    check_errors("", &["out"], &["command line: expected `key=value`, found `out`"]);
}

#[test]
fn wrong_values_say_key_line_and_what_was_expected() {
    check_errors(
        "\nlora_rank: many\nbf16: maybe\nlr_scheduler_type: cosin\ndataset_dir:\nlora_rank_: [1]\n",
        &["max_steps=0"],
        &[
            "c.yaml:2: `lora_rank`: expected a whole number, 0 or more, found `many`",
            "c.yaml:3: `bf16`: expected true or false, found `maybe`",
            "c.yaml:4: `lr_scheduler_type`: expected linear, cosine, cosine_with_restarts, cosine_with_min_lr, polynomial, constant, constant_with_warmup, inverse_sqrt, warmup_stable_decay, reduce_lr_on_plateau, found `cosin`",
            "c.yaml:5: `dataset_dir`: expected a path, found an empty value",
            "c.yaml:6: `lora_rank_` is not a key; did you mean `lora_rank`?",
            "command line: `max_steps`: expected a number of steps, 1 or more, or null, found `0`",
        ],
    );
    check_errors("lora_rank: 0\n", &[], &["c.yaml:1: `lora_rank`: expected 1 or more"]);
    check_errors(
        "lora_dropout: 1.0\n",
        &[],
        &["c.yaml:1: `lora_dropout`: expected a share, from 0 to under 1"],
    );
    check_errors("just text\n", &[], &["c.yaml:1: expected lines of `key: value`, found `just text`"]);
    check_errors(
        "device: cpu\nfp16: true\n",
        &[],
        &[
            "c.yaml:2: `fp16`: training in f16 needs a GPU (a cpu gains nothing from it); use `bf16: true`, or leave both out",
        ],
    );
}

#[test]
fn later_keys_are_refused_by_name() {
    check_errors(
        "stage: dpo\nuse_galore: true\ndeepspeed: ds.json\ntemplate: llama3\noptim: lion_8bit\n\
         quantization_bit: 8\ndevice: cuda:0,1\ndevice_map: auto\nval_size: 0.1\n",
        &[],
        &[
            "c.yaml:1: `stage`: `dpo` is not there yet; there is sft, pt",
            "c.yaml:2: `use_galore` is not there yet; leave it out",
            "c.yaml:3: `deepspeed` is not there yet; leave it out",
            "c.yaml:5: `optim`: `lion_8bit` is not there yet; there is adamw_torch, adamw_8bit, paged_adamw_32bit, paged_adamw_8bit, sgd, lion_32bit, adafactor, muon",
            "c.yaml:6: `quantization_bit`: `8` is not there yet; there is 4",
            "c.yaml:8: `device_map` is not there yet; leave it out",
            "c.yaml:7: `device`: several GPUs are not there yet; name one, as in `cuda:0`",
        ],
    );
    fine("use_dora: false\nval_size: 0.0\ndeepspeed: null\nneat_packing: false\nmix_strategy: concat\n", &[]);
    check_errors(
        "load_in_4bit: true\n",
        &[],
        &["c.yaml:1: `load_in_4bit` is not supported: use `quantization_bit: 4`"],
    );
}

/// LLaMA-Factory's own example, with its commented evaluation part switched on.
const LLAMA_FACTORY: &str = "### model
model_name_or_path: meta-llama/Meta-Llama-3-8B-Instruct
trust_remote_code: true
### method
stage: sft            # pt|sft|rm|ppo|dpo|kto
do_train: true
finetuning_type: lora # lora|oft|freeze|full
lora_rank: 8
lora_target: all
### dataset
dataset: identity,alpaca_en_demo
template: llama3
cutoff_len: 2048
max_samples: 1000
overwrite_cache: true
preprocessing_num_workers: 16
dataloader_num_workers: 4
### output
output_dir: saves/llama3-8b/lora/sft
logging_steps: 10
save_steps: 500
plot_loss: true
overwrite_output_dir: true
save_only_model: false
report_to: none
### train
per_device_train_batch_size: 1
gradient_accumulation_steps: 8
learning_rate: 1.0e-4
num_train_epochs: 3.0
lr_scheduler_type: cosine
warmup_ratio: 0.1
bf16: true
ddp_timeout: 180000000
resume_from_checkpoint: null
quantization_bit: 4
quantization_method: bnb
";

#[test]
fn llama_factorys_example_runs() {
    let config = fine(LLAMA_FACTORY, &[]);
    assert_eq!(config.template, TemplateName::Named("llama3".to_string()));
    assert_eq!(config.dataset, ["identity", "alpaca_en_demo"]);
    assert_eq!(
        config.notes,
        [
            "c.yaml:3: `trust_remote_code` does nothing: no code of a model is ever run",
            "c.yaml:16: `preprocessing_num_workers` does nothing: data is prepared on all cores; `num_threads` limits them",
            "c.yaml:17: `dataloader_num_workers` does nothing: batches are made in the program itself",
            "c.yaml:34: `ddp_timeout` does nothing: one process trains",
        ]
    );
}

#[test]
fn help_lists_every_key() {
    let help = RunConfig::help();
    for key in RunConfig::keys() {
        assert!(help.contains(&format!("    {}: ", key.name)), "{}", key.name);
    }
    assert!(help.contains("adam_epsilon: 1e-8"), "{help}");
}
