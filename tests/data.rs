//! `ferrotune data`, and what a run says about data that can't be used.

use crate::util::{Dir, TINY, repository};

const GOOD: &str = "{\"messages\": [{\"role\": \"user\", \"content\": \"Who are you?\"}, {\"role\": \"assistant\", \"content\": \"I am {{name}}.\"}]}\n";

/// A config on the tiny model; the data set is rows.jsonl.
fn with_rows(rows: &str, keys: &str) -> Dir {
    let dir = Dir::new();
    dir.file("rows.jsonl", rows);
    let model = repository(TINY);
    let config =
        format!("model_name_or_path: {}\ndataset: rows.jsonl\noutput_dir: out\n{keys}", model.display());
    dir.file("c.yaml", config);
    dir
}

/// What `data` and `train` say alike, at the same place.
#[track_caller]
fn check_refused(rows: &str, keys: &str, said: &str) {
    let dir = with_rows(rows, keys);
    for verb in ["data", "train"] {
        dir.ferrotune(&[verb, "c.yaml"]).fails(1).says(said);
    }
    assert!(!dir.path().join("out").exists(), "nothing is written before everything is checked");
}

#[test]
fn shows_what_is_trained_on() {
    let dir = with_rows(&GOOD.repeat(3), "dataset_values: {name: Ferris}\n");
    let ran = dir.ferrotune(&["data", "c.yaml", "-n", "1"]).succeeds();
    let expected = "── sample 1 of 3 · rows.jsonl:1 · ";
    assert!(ran.stdout.starts_with(expected), "{}", ran.stdout);
    let ran = ran
        .prints("<|im_start|>user\nWho are you?<|im_end|>\n<|im_start|>assistant\n⟦I am Ferris.<|im_end|>⟧")
        .prints("data set  rows.jsonl (openai): 3 rows\n          2: the same as an earlier row (rows.jsonl:2, rows.jsonl:3)\nsamples   3\n")
        .prints("cutoff    2,048; none is longer\nsteps     9 of 1 sample\n");
    assert!(!ran.stdout.contains("sample 2"), "{}", ran.stdout);

    let colored = dir.ferrotune(&["data", "c.yaml", "--color", "always"]).succeeds();
    colored.prints("\x1b[2massistant\n\x1b[0m\x1b[32mI am Ferris.\x1b[0m\x1b[33m<|im_end|>\x1b[0m");
}

#[test]
fn keys_change_what_is_trained_on() {
    let dir = with_rows(GOOD, "dataset_values: {name: Ferris}\n");
    dir.ferrotune(&["data", "c.yaml", "train_on_prompt=true"]).succeeds().prints("⟦<|im_start|>user\n");
    dir.ferrotune(&["data", "c.yaml", "default_system=Be brief"])
        .succeeds()
        .prints("system\nBe brief<|im_end|>");
    let cut = dir.ferrotune(&["data", "c.yaml", "cutoff_len=25"]).succeeds().prints("⟪").prints(" cut off\n");
    cut.says("warning: 1 of 1 samples are longer than `cutoff_len`");
    dir.ferrotune(&["data", "c.yaml", "dataset_values.name=Ada"]).succeeds().prints("⟦I am Ada.");
}

#[test]
fn rows_that_are_wrong_are_named_with_file_and_line() {
    let good = GOOD.replace("{{name}}", "Ferris");
    let stop = "on_bad_row: stop\n";
    check_refused(&format!("{good}\n{{\"messages\": \n"), stop, "error: rows.jsonl:3: ");
    check_refused("{\"text\": 7}\n", stop, "error: rows.jsonl:1: ");
    check_refused(&format!("{good}[1]\n"), stop, "error: rows.jsonl:2: expected an object");
    // Without a good row there is nothing to go on with.
    check_refused("{\"text\": 7}\n", "", "the first one: rows.jsonl:1: expected a text in column `text`");
    check_refused(
        GOOD,
        "dataset_values: {author: Ada}\n",
        "error: rows.jsonl:1: placeholder `{{name}}` has no value",
    );
    check_refused("", "", "has no rows");
    check_refused("{\"a\": 1}\n", "", "rows.jsonl:1");
}

#[test]
fn data_that_leaves_nothing_to_train_on() {
    let question = "{\"messages\": [{\"role\": \"user\", \"content\": \"Who are you?\"}]}\n";
    check_refused(question, "", "nothing to train on");
    let good = GOOD.replace("{{name}}", "Ferris");
    check_refused(&good, "cutoff_len: 2\n", "raise cutoff_len");
    // One bad row among good ones is counted, with the first one's place.
    let dir = with_rows(&format!("{good}{question}{good}"), "");
    dir.ferrotune(&["data", "c.yaml"])
        .succeeds()
        .says("warning: data set `rows.jsonl`: 1 row is left out; the first, rows.jsonl:2: the conversation has 1 turns");
}

#[test]
fn bad_rows_are_left_out_with_their_reasons() {
    let good = GOOD.replace("{{name}}", "Ferris");
    let silent = good.replace("I am Ferris.", "");
    let rows = format!("{good}[1]\n{{\"messages\": \n{good}{{\"messages\": \n{silent}");
    let dir = with_rows(&rows, "");
    let ran = dir.ferrotune(&["data", "c.yaml"]).succeeds();
    ran.says(
        "data set `rows.jsonl`: 1 row is left out; the first, rows.jsonl:2: expected an object, found a list",
    )
    .says(
        "data set `rows.jsonl`: 2 rows are left out; the first, rows.jsonl:3: not a JSON object on one line",
    )
    .says("data set `rows.jsonl`: 1 row has an answer without a word; the first, rows.jsonl:6");
}

#[test]
fn preference_data_is_shown_and_not_trained_on() {
    let pair = "{\"prompt\": \"Who are you?\", \"chosen\": \"Ferris.\", \"rejected\": \"Nobody.\"}\n";
    let dir = with_rows(&pair.repeat(2), "");
    dir.ferrotune(&["data", "c.yaml"]).succeeds().prints("⟦Ferris.<|im_end|>⟧");
    dir.ferrotune(&["train", "c.yaml"])
        .fails(1)
        .says("error: data set `rows.jsonl` has preference pairs; training on these (`stage: dpo`) is not there yet");
    let labelled = "{\"prompt\": \"Who are you?\", \"completion\": \"Ferris.\", \"label\": true}\n";
    let dir = with_rows(labelled, "");
    dir.ferrotune(&["data", "c.yaml"]).succeeds().prints("⟦Ferris.<|im_end|>⟧");
    dir.ferrotune(&["train", "c.yaml"]).fails(1).says("has labelled answers");
}

#[test]
fn plain_texts_are_packed_whole() {
    let texts = "{\"text\": \"Once upon a time there was a crab, and it was red.\"}\n".repeat(8);
    let keys = "stage: pt\ncutoff_len: 16\nmax_steps: 2\nper_device_train_batch_size: 2\n";
    let dir = with_rows(&texts, keys);
    let ran = dir.ferrotune(&["data", "c.yaml"]).succeeds();
    assert!(!ran.stdout.contains("are cut"), "{}", ran.stdout);
    dir.ferrotune(&["train", "c.yaml"]).succeeds().prints("trained 2 steps");
    let good = GOOD.replace("{{name}}", "Ferris");
    let dir = with_rows(&good, keys);
    dir.ferrotune(&["train", "c.yaml"]).fails(1).says("`stage: pt` trains on plain texts");
}

/// Two sets, `a.jsonl` with 6 rows and `b.jsonl` with 2.
fn two_sets(keys: &str) -> Dir {
    let dir = with_rows("", keys);
    let row = |name: &str, index: usize| GOOD.replace("{{name}}", &format!("{name}{index}"));
    dir.file("a.jsonl", (0..6).map(|index| row("a", index)).collect::<String>());
    dir.file("b.jsonl", (0..2).map(|index| row("b", index)).collect::<String>());
    dir
}

#[test]
fn sets_are_mixed() {
    let dir = two_sets("");
    let check = |words: &[&str], samples: usize| {
        let words: Vec<&str> =
            ["data", "c.yaml", "dataset=a.jsonl,b.jsonl"].iter().chain(words).copied().collect();
        dir.ferrotune(&words).succeeds().prints(&format!("samples   {samples}\n"));
    };
    check(&[], 8);
    check(&["mix_strategy=interleave_under"], 4);
    check(&["mix_strategy=interleave_over"], 12);
    check(&["mix_strategy=interleave_once", "interleave_probs=0.9,0.1"], 8);
    check(&["max_samples=1"], 2);
    check(&["val_size=0.25"], 6);
    check(&["val_size=3"], 5);
    dir.ferrotune(&["data", "c.yaml", "dataset=a.jsonl,b.jsonl", "val_size=3"])
        .succeeds()
        .prints("evaluated 3 samples set apart by `val_size`");
    let wrong = |words: &[&str], said: &str| {
        let words: Vec<&str> =
            ["data", "c.yaml", "dataset=a.jsonl,b.jsonl"].iter().chain(words).copied().collect();
        dir.ferrotune(&words).fails(2).says(said);
    };
    wrong(&["interleave_probs=0.5,0.5"], "it has no meaning with `mix_strategy: concat`");
    wrong(&["mix_strategy=interleave_over", "interleave_probs=1"], "expected one chance for each data set");
    wrong(&["val_size=0.1", "eval_dataset=a.jsonl"], "`val_size` and `eval_dataset` exclude each other");
    wrong(&["val_size=1.5"], "expected a share under 1, or a whole number of samples");
    wrong(&["streaming=true"], "set `max_steps`");
    wrong(&["val_size=8"], "`val_size`: it leaves nothing to train on: there are 8 samples");
    dir.ferrotune(&["train", "c.yaml", "dataset=a.jsonl", "streaming=true", "max_steps=2", "val_size=5000"])
        .fails(2)
        .says("`val_size`: it leaves nothing to train on: there are");
    dir.ferrotune(&["train", "c.yaml", "dataset=a.jsonl", "eval_dataset=b.jsonl", "max_steps=1"])
        .succeeds()
        .says("2 samples to evaluate on");
}

#[test]
fn a_stream_is_trained_on_and_resumed_exactly() {
    let dir = two_sets(
        "streaming: true\nmax_steps: 9\nbuffer_size: 3\nsave_steps: 4\nlogging_steps: 1\ndataset: a.jsonl,b.jsonl\n",
    );
    let config =
        std::fs::read_to_string(dir.path().join("c.yaml")).unwrap().replace("dataset: rows.jsonl\n", "");
    dir.file("c.yaml", config);
    dir.ferrotune(&["train", "c.yaml", "num_threads=1"]).succeeds().prints("trained 9 steps");
    let checkpoint = "resume_from_checkpoint=out/checkpoint-4";
    dir.ferrotune(&["train", "c.yaml", "num_threads=1", "output_dir=again", checkpoint]).succeeds();
    let losses = dir.losses("out");
    assert_eq!((losses.len(), &losses[4..]), (9, &dir.losses("again")[..]));
    dir.ferrotune(&["data", "c.yaml"]).succeeds().prints("samples   8\n");
}

#[test]
fn a_second_start_takes_tokens_out_of_the_cache() {
    let dir = two_sets("");
    let log = |words: &[&str]| {
        let words: Vec<&str> =
            ["data", "c.yaml", "dataset=a.jsonl", "-v"].iter().chain(words).copied().collect();
        dir.ferrotune(&words).succeeds()
    };
    let cached = "data set `a.jsonl`: 6 samples out of the cache";
    // The speed that is estimated differs from time to time.
    let counts = |stdout: &str| -> Vec<String> {
        stdout.lines().filter(|line| !line.starts_with("cost ")).map(str::to_string).collect()
    };
    let first = log(&[]);
    assert!(!first.stderr.contains("out of the cache"), "{}", first.stderr);
    assert_eq!(counts(&log(&[]).says(cached).stdout), counts(&first.stdout));
    for words in [
        &["overwrite_cache=true"][..],
        &["cutoff_len=99"],
        &["train_on_prompt=true"],
        &["max_samples=6"],
        &["tokenized_path=here"],
    ] {
        let ran = log(words);
        assert!(!ran.stderr.contains("out of the cache"), "{words:?}: {}", ran.stderr);
    }
    log(&["tokenized_path=here"]).says(cached);
    // A damaged file is made anew, with a line that says so.
    let kept = std::fs::read_dir(dir.path().join("here")).unwrap().next().unwrap().unwrap().path();
    let mut bytes = std::fs::read(&kept).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    std::fs::write(&kept, bytes).unwrap();
    log(&["tokenized_path=here"]).says("are made anew: its checksum is wrong");
    log(&["tokenized_path=here"]).says(cached);
    // Other content is another set.
    dir.file("a.jsonl", GOOD);
    let ran = log(&[]);
    assert!(!ran.stderr.contains("out of the cache"), "{}", ran.stderr);
}

#[test]
fn tables_are_read() {
    let dir = with_rows("", "");
    dir.file("t.csv", "instruction,output\nWho are you?,Ferris.\n");
    dir.ferrotune(&["data", "c.yaml", "dataset=t.csv"]).succeeds().prints("⟦Ferris.<|im_end|>⟧");
    for name in ["snappy.parquet", "datasets.arrow"] {
        let path = repository("tests/fixtures/rows").join(name);
        let set = format!("dataset={}", path.display());
        let ran =
            dir.ferrotune(&["data", "c.yaml", &set]).succeeds().prints("(sharegpt)").prints("samples   5\n");
        ran.says("1 row has an answer without a word");
    }
    dir.ferrotune(&["data", "c.yaml", "dataset=org/name"])
        .fails(1)
        .says("data set `org/name` is not in the cache");
}

#[test]
fn a_data_set_that_is_not_there() {
    let dir = with_rows("", "");
    dir.ferrotune(&["data", "c.yaml", "dataset=nothing"]).fails(2).says("error: no data set `nothing`");
    dir.ferrotune(&["data", "c.yaml", "dataset="])
        .fails(2)
        .says("command line: `dataset`: no data set is named");
}

#[test]
fn json_has_what_is_shown() {
    let dir = with_rows(&GOOD.repeat(3), "dataset_values: {name: Ferris}\n");
    let printed = dir.ferrotune(&["data", "c.yaml", "-n", "1", "--json", "cutoff_len=30"]).succeeds().stdout;
    let value: serde_json::Value = serde_json::from_str(&printed).expect("one line of JSON");
    assert_eq!(
        (&value["samples"], &value["sets"][0]["duplicates"]["rows"], &value["truncated"]),
        (&3.into(), &2.into(), &3.into())
    );
    let shown = &value["shown"][0];
    let text = |fate: &str| -> String {
        let pieces = shown["pieces"].as_array().unwrap().iter().filter(|piece| piece["fate"] == fate);
        pieces.map(|piece| piece["text"].as_str().unwrap()).collect()
    };
    assert_eq!(format!("{}{}", text("trained"), text("cut")).trim_end(), "I am Ferris.<|im_end|>");
    assert_eq!(shown["ids"].as_array().unwrap().len(), 30);
    assert!(value["cost"]["tokens_per_second"].as_f64().unwrap() > 0.0);
    assert_eq!(value["cost"]["steps"], 9);
}

#[test]
fn a_template_by_name_and_a_tokenizer_are_enough() {
    let dir = with_rows(&GOOD.replace("{{name}}", "Ferris"), "");
    // Nothing but tokenizer.json: no weights, no config, no template, no names of special tokens.
    let folder = dir.path().join("tokenizer");
    std::fs::create_dir(&folder).unwrap();
    std::fs::copy(repository(TINY).join("tokenizer.json"), folder.join("tokenizer.json")).unwrap();
    let words = ["data", "c.yaml", "-n", "1", "model_name_or_path=tokenizer", "template=qwen3_nothink"];
    let ran = dir.ferrotune(&words).succeeds();
    ran.prints("<|im_start|>user\nWho are you?<|im_end|>\n<|im_start|>assistant\n⟦I am Ferris.<|im_end|>⟧")
        .prints("cost      ");
    // A system message that the template brings, and thoughts.
    let with = |more: &[&str]| dir.ferrotune(&[&words[..5], more].concat()).succeeds();
    with(&["template=qwen"]).prints("<|im_start|>system\nYou are Qwen, created by Alibaba Cloud.");
    with(&["template=qwen3"]).prints("assistant\n⟦<think>\n\n</think>\n\nI am Ferris.<|im_end|>⟧");
    with(&["template=qwen3", "enable_thinking=false"])
        .prints("assistant\n<think>\n\n</think>\n\n⟦I am Ferris.<|im_end|>⟧");
    dir.ferrotune(&[&words[..5], &["template=qwen9"]].concat())
        .fails(2)
        .says("command line: `template`: there is no template `qwen9` (nearest: qwen");
    dir.ferrotune(&[&words[..5], &["template=llama3"]].concat()).fails(1).says("has no token `<|eot_id|>`");
    with(&["template=llama3", "add_special_tokens=<|eot_id|>,<|start_header_id|>,<|end_header_id|>"])
        .prints("⟦I am Ferris.<|eot_id|>⟧");
}
