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
        .prints("data set  rows.jsonl (openai)\nsamples   3; 0 rows left out\n")
        .prints("cutoff    2,048; none is longer\nsteps     9 of 1 samples\n");
    assert!(!ran.stdout.contains("sample 2"), "{}", ran.stdout);

    let colored = dir.ferrotune(&["data", "c.yaml", "--color", "always"]).succeeds();
    colored.prints("\x1b[2m<|im_start|>user\nWho are you?<|im_end|>\n<|im_start|>assistant\n\x1b[0m\x1b[32mI am Ferris.<|im_end|>\x1b[0m");
}

#[test]
fn keys_change_what_is_trained_on() {
    let dir = with_rows(GOOD, "dataset_values: {name: Ferris}\n");
    dir.ferrotune(&["data", "c.yaml", "train_on_prompt=true"]).succeeds().prints("⟦<|im_start|>user\n");
    dir.ferrotune(&["data", "c.yaml", "default_system=Be brief"])
        .succeeds()
        .prints("system\nBe brief<|im_end|>");
    let cut =
        dir.ferrotune(&["data", "c.yaml", "cutoff_len=25"]).succeeds().prints("tokens more are cut off");
    cut.says("warning: 1 of 1 samples are longer than `cutoff_len`");
    dir.ferrotune(&["data", "c.yaml", "dataset_values.name=Ada"]).succeeds().prints("⟦I am Ada.");
}

#[test]
fn rows_that_are_wrong_are_named_with_file_and_line() {
    let good = GOOD.replace("{{name}}", "Ferris");
    check_refused(&format!("{good}\n{{\"messages\": \n"), "", "error: rows.jsonl:3: ");
    check_refused("{\"text\": 7}\n", "", "error: rows.jsonl:1: ");
    check_refused(&format!("{good}[1]\n"), "", "error: rows.jsonl:2: expected an object");
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
    check_refused(&good, "cutoff_len: 5\n", "raise cutoff_len");
    // One bad row among good ones is counted, with the first one's place.
    let dir = with_rows(&format!("{good}{question}{good}"), "");
    dir.ferrotune(&["data", "c.yaml"])
        .succeeds()
        .says("warning: 1 rows are left out; the first, rows.jsonl:2: ");
}

#[test]
fn a_data_set_that_is_not_there() {
    let dir = with_rows("", "");
    dir.ferrotune(&["data", "c.yaml", "dataset=nothing"]).fails(1).says("error: no data set `nothing`");
    dir.ferrotune(&["data", "c.yaml", "dataset="])
        .fails(2)
        .says("command line: `dataset`: no data set is named");
}
