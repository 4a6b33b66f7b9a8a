//! Adapters beyond a new LoRA: going on from trained ones, DoRA, PiSSA, LoftQ.

use std::fs;

use ferrotune_model::source::{SafetensorsSource, WeightSource};
use serde_json::Value;

use crate::train::with_config;
use crate::util::{Dir, TINY, repository};

/// Ten rows, one a step, in the same order each epoch, by an optimizer without a state.
const PLAIN: &str = "max_samples: 10\ndisable_shuffling: true\noptim: sgd\nlr_scheduler_type: constant\nnum_threads: 1\nlearning_rate: 0.5\nlora_rank: 3\nlora_alpha: 5\nlora_target: q_proj,down_proj\nsave_strategy: no\n";

fn config(more: &str) -> Dir {
    let dir = with_config("");
    let text = fs::read_to_string(dir.path().join("c.yaml")).expect("the config");
    dir.file("c.yaml", text.replace("learning_rate: 1e-2\n", "") + PLAIN + more);
    dir
}

fn adapter(dir: &Dir, folder: &str) -> Vec<u8> {
    fs::read(dir.path().join(folder).join("adapter_model.safetensors")).expect("an adapter")
}

fn settings(dir: &Dir, folder: &str) -> Value {
    let text = fs::read_to_string(dir.path().join(folder).join("adapter_config.json")).expect("a config");
    serde_json::from_str(&text).expect("JSON")
}

fn logits(dir: &Dir, adapters: &str) -> Vec<f64> {
    let model = repository(TINY).display().to_string();
    let adapters = format!("adapter_name_or_path={adapters}");
    let words = ["debug", "logits", "--model", &model, "--ids", "5,6,7", &adapters];
    let value: Value = serde_json::from_str(&dir.ferrotune(&words).succeeds().stdout).expect("JSON");
    let rows = value["logits"].as_array().expect("rows").iter().flat_map(|it| it.as_array().expect("a row"));
    rows.map(|it| it.as_f64().expect("a number")).collect()
}

#[test]
fn ten_steps_and_ten_more_are_twenty() {
    let dir = config("");
    dir.ferrotune(&["train", "c.yaml", "max_steps=20", "output_dir=twenty"]).succeeds();
    dir.ferrotune(&["train", "c.yaml", "max_steps=10", "output_dir=ten"]).succeeds();
    // With the adapter's rank, alpha and modules, whatever the config says.
    let words =
        ["train", "c.yaml", "max_steps=10", "output_dir=more", "adapter_name_or_path=ten", "lora_rank=8"];
    let ran = dir.ferrotune(&words).succeeds();
    ran.says("command line: `lora_rank`: the adapter that training goes on with has 3, not 8");
    assert!(adapter(&dir, "more") == adapter(&dir, "twenty"), "the same bits");
    assert!(adapter(&dir, "more") != adapter(&dir, "ten"));
    assert_eq!(settings(&dir, "more"), settings(&dir, "twenty"));
    let (more, twenty) = (dir.losses("more"), dir.losses("twenty"));
    assert_eq!(more, twenty[10..]);
}

#[test]
fn adapters_beneath_become_the_base() {
    let dir = config("max_steps: 10\n");
    dir.ferrotune(&["train", "c.yaml", "output_dir=first"]).succeeds();
    let words = ["train", "c.yaml", "output_dir=second", "adapter_name_or_path=first"];
    let new = ["create_new_adapter=true", "lora_rank=2", "lora_target=v_proj"];
    let ran = dir.ferrotune(&[&words[..], &new].concat()).succeeds();
    ran.says("1 adapter is merged into the base");
    assert_eq!(settings(&dir, "second")["r"], 2);
    let card = fs::read_to_string(dir.path().join("second/README.md")).expect("the card");
    assert!(card.contains("| Merged into the base before | first |"), "{card}");
    // A new adapter changes nothing at first: it begins where the other ended.
    let (first, second) = (dir.losses("first"), dir.losses("second"));
    assert!(second[0] < first[0] - 0.5, "{first:?} {second:?}");
    // The two together answer as the last step left them; the order counts.
    let (both, alone, other) = (logits(&dir, "first,second"), logits(&dir, "second"), logits(&dir, "first"));
    assert!(both != alone && both != other);
    // Going on with the last of two.
    let words = ["train", "c.yaml", "output_dir=third", "adapter_name_or_path=[first, second]"];
    dir.ferrotune(&words).succeeds().says("1 adapter is merged into the base");
    assert_eq!(settings(&dir, "third")["r"], 2);
    let third = dir.losses("third");
    assert!(third[0] < second[0], "{second:?} {third:?}");
    // It holds the modules of the second alone.
    let path = dir.path().join("third/adapter_model.safetensors");
    let source = SafetensorsSource::open_file(&path).expect("the adapter");
    assert!(source.names().iter().all(|it| it.contains(".v_proj.")), "{:?}", source.names());
}

#[test]
fn dora_is_trained_saved_resumed_gone_on_with_and_merged() {
    let dir = config("use_dora: true\nlora_dropout: 0.1\n");
    let file = |folder: &str| dir.path().join(folder).join("adapter_model.safetensors");
    for (name, four) in [("whole", "quantization_bit=null"), ("four", "quantization_bit=4")] {
        let out = format!("output_dir={name}");
        let words = ["train", "c.yaml", "max_steps=10", "save_strategy=steps", "save_steps=4", four, &out];
        dir.ferrotune(&words).succeeds();
        let bytes = adapter(&dir, name);
        let losses = dir.losses(name);
        assert!(losses[9] < losses[0], "{losses:?}");
        fs::remove_dir_all(dir.path().join(name).join("checkpoint-10")).expect("a checkpoint");
        dir.ferrotune(&[&words[..], &["resume_from_checkpoint=true"]].concat())
            .succeeds()
            .says("after step 8");
        assert!(adapter(&dir, name) == bytes, "{name}: the same bits");
    }
    assert_eq!(settings(&dir, "whole")["use_dora"], true);
    let source = SafetensorsSource::open_file(&file("whole")).expect("the adapter");
    let vectors = source.names().into_iter().filter(|it| it.ends_with(".lora_magnitude_vector")).count();
    assert_eq!(vectors, 6, "q and down of three layers: {:?}", source.names());
    // Going on with it, it stays what it is.
    let words = ["train", "c.yaml", "max_steps=2", "use_dora=false", "adapter_name_or_path=whole"];
    let ran = dir.ferrotune(&[&words[..], &["output_dir=more"]].concat()).succeeds();
    ran.says("`use_dora`: the adapter that training goes on with has true, not false");
    // Beside the base and merged into it, beneath a new adapter that changes nothing yet.
    let new = ["create_new_adapter=true", "learning_rate=0", "output_dir=new", "use_dora=true"];
    dir.ferrotune(&[&words[..3], &words[4..], &new].concat()).succeeds();
    let (beside, merged) = (logits(&dir, "whole"), logits(&dir, "whole,new"));
    let off = beside.iter().zip(&merged).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
    assert!(off < 1e-4 && beside != logits(&dir, "more"), "off by {off:.1e}");
    let model = repository(TINY).display().to_string();
    let words = ["chat", "--model", &model, "--adapter", "whole", "--greedy", "--max-new-tokens", "3"];
    dir.ferrotune(&[&words[..], &["--prompt", "Question 1"]].concat()).succeeds();
}

#[test]
fn what_does_not_go_with_given_adapters_is_said() {
    let dir = config("max_steps: 1\n");
    dir.ferrotune(&["train", "c.yaml", "output_dir=first"]).succeeds();
    let check = |words: &[&str], message: &str| {
        let words = [&["train", "c.yaml", "output_dir=other"], words].concat();
        dir.ferrotune(&words).fails(2).says(message);
    };
    let first = "adapter_name_or_path=first";
    let four = "quantization_bit=4";
    check(
        &[first, four, "create_new_adapter=true"],
        "`create_new_adapter`: a base in 4 bits takes no adapter",
    );
    check(&["adapter_name_or_path=first,first", four], "`adapter_name_or_path`: a base in 4 bits takes one");
    check(&[first, "finetuning_type=full"], "only `finetuning_type: lora` goes on with an adapter");
    let words = ["train", "c.yaml", "output_dir=other", "adapter_name_or_path=nowhere"];
    dir.ferrotune(&words).fails(1).says("nowhere: no such folder");
    dir.ferrotune(&["train", "c.yaml", "output_dir=other", first, four]).succeeds();
}

#[test]
fn whole_modules_and_new_tokens_are_trained_further() {
    let dir = config("max_steps: 10\nadd_tokens: [Answer]\n");
    dir.ferrotune(&["train", "c.yaml", "output_dir=first"]).succeeds();
    let text = fs::read_to_string(dir.path().join("c.yaml")).expect("the config");
    dir.file("c.yaml", text.replace("add_tokens: [Answer]\n", ""));
    let words = ["train", "c.yaml", "output_dir=more", "adapter_name_or_path=first"];
    dir.ferrotune(&words).succeeds();
    assert_eq!(settings(&dir, "more")["modules_to_save"], settings(&dir, "first")["modules_to_save"]);
    let (first, more) = (dir.losses("first"), dir.losses("more"));
    assert!(more[0] < first[0], "{first:?} {more:?}");
    let read = |folder: &str| {
        let path = dir.path().join(folder).join("adapter_model.safetensors");
        let source = SafetensorsSource::open_file(&path).expect("the adapter");
        source
            .get_f32("base_model.model.model.embed_tokens.weight")
            .expect("a table")
            .to_f32()
            .expect("numbers")
    };
    let (before, after) = (read("first"), read("more"));
    assert!(before.len() == after.len() && before != after && before.len() == 320 * 64);
}

/// The loss of the rows with an adapter beside the base as it is stored.
fn judged(dir: &Dir, adapter: &str, more: &[&str]) -> f64 {
    let adapter = format!("adapter_name_or_path={adapter}");
    let words = ["train", "c.yaml", "do_train=false", "do_eval=true", "output_dir=judged", &adapter];
    let rest = ["eval_dataset=rows.jsonl", "overwrite_output_dir=true", "pissa_init=false"];
    dir.ferrotune(&[&words[..], &rest, more].concat()).succeeds();
    eval_loss(dir, "judged")
}

fn eval_loss(dir: &Dir, folder: &str) -> f64 {
    let text = fs::read_to_string(dir.path().join(folder).join("eval_results.json")).expect("results");
    serde_json::from_str::<Value>(&text).expect("JSON")["eval_loss"].as_f64().expect("a loss")
}

#[test]
fn pissa_begins_as_the_base_and_is_saved_for_it() {
    let dir = config("max_steps: 10\n");
    dir.ferrotune(&["train", "c.yaml", "output_dir=plain"]).succeeds();
    for (name, more) in [
        ("pissa", &["pissa_iter=4"][..]),
        ("exact", &["pissa_iter=-1", "use_rslora=true", "use_dora=true", "lora_dropout=0.1"]),
    ] {
        let out = format!("output_dir={name}");
        let words = ["train", "c.yaml", "pissa_init=true", "learning_rate=0.05", &out];
        let saves = ["save_strategy=steps", "save_steps=4", "eval_dataset=rows.jsonl"];
        let words = [&words[..], &saves, more].concat();
        dir.ferrotune(&words).succeeds();
        let (plain, losses) = (dir.losses("plain"), dir.losses(name));
        let close = |a: f64, b: f64, tolerance: f64| assert!((a - b).abs() < tolerance, "{name}: {a} {b}");
        if name == "pissa" {
            close(losses[0], plain[0], 1e-5);
        }
        assert!(losses[9] < losses[0], "{losses:?}");
        let settings = settings(&dir, name);
        assert_eq!((&settings["r"], &settings["init_lora_weights"]), (&6.into(), &true.into()));
        let scaling =
            settings["lora_alpha"].as_f64().expect("alpha") / if name == "pissa" { 6.0 } else { 6f64.sqrt() };
        close(scaling, if name == "pissa" { 5.0 / 3.0 } else { 5.0 / 3f64.sqrt() }, 1e-9);
        // Beside the unchanged base it is what it was beside the rest of it.
        close(judged(&dir, name, &[]), eval_loss(&dir, name), 1e-5);
        let bytes = adapter(&dir, name);
        fs::remove_dir_all(dir.path().join(name).join("checkpoint-10")).expect("a checkpoint");
        let ran = dir.ferrotune(&[&words[..], &["resume_from_checkpoint=true"]].concat()).succeeds();
        ran.says("after step 8");
        assert!(adapter(&dir, name) == bytes, "{name}: the same bits");
        // From here on it is an adapter as any other.
        let given = format!("adapter_name_or_path={name}");
        let words =
            ["train", "c.yaml", "max_steps=1", "output_dir=more", "overwrite_output_dir=true", &given];
        dir.ferrotune(&words).succeeds();
    }
}

#[test]
fn loftq_brings_four_bits_nearer_to_the_base() {
    let dir = config("max_steps: 1\nquantization_bit: 4\n");
    let words = ["train", "c.yaml", "learning_rate=0", "lora_target=all", "lora_rank=24"];
    dir.ferrotune(&[&words[..], &["output_dir=plain"]].concat()).succeeds();
    dir.ferrotune(&[&words[..], &["output_dir=loftq", "init_lora_weights=loftq"]].concat()).succeeds();
    let model = repository(TINY).display().to_string();
    let logits = |more: &[&str]| -> Vec<f64> {
        let words = ["debug", "logits", "--model", &model, "--ids", "5,6,7,8"];
        let value: Value =
            serde_json::from_str(&dir.ferrotune(&[&words[..], more].concat()).succeeds().stdout)
                .expect("JSON");
        let rows = value["logits"].as_array().expect("rows").iter();
        rows.flat_map(|it| it.as_array().expect("a row")).map(|it| it.as_f64().expect("a number")).collect()
    };
    let whole = logits(&[]);
    let off = |adapter: &str| -> f64 {
        let near = logits(&["--adapter", adapter, "quantization_bit=4"]);
        near.iter().zip(&whole).map(|(a, b)| (a - b) * (a - b)).sum::<f64>().sqrt()
    };
    let (plain, loftq) = (off("plain"), off("loftq"));
    assert!(loftq < 0.75 * plain, "{loftq} is not much less than {plain}");
    let card = fs::read_to_string(dir.path().join("loftq/README.md")).expect("the card");
    assert!(card.contains("LoftQ: made for the base in NF4"), "{card}");
    let check = |words: &[&str], message: &str| {
        let words = [&["train", "c.yaml", "output_dir=other"], words].concat();
        dir.ferrotune(&words).fails(2).says(message);
    };
    check(&["pissa_init=true"], "`pissa_init`: PiSSA changes the base's weights, which are in 4 bits");
    check(&["init_lora_weights=loftq", "quantization_bit=null"], "`init_lora_weights`: loftq makes up for");
    check(&["init_lora_weights=pissa"], "use `pissa_init: true`");
    let many = ["pissa_init=true", "quantization_bit=null", "lora_rank=65"];
    dir.ferrotune(&[&["train", "c.yaml", "output_dir=other"], &many[..]].concat())
        .fails(1)
        .says("a weight of 64 x 64 has no 65 singular values");
}
