//! What is typed wrongly is named with its place. All kinds of values are tested in the cli crate.

use crate::util::Dir;

#[track_caller]
fn check(config: &str, words: &[&str], stderr: &str) {
    let dir = Dir::new();
    dir.file("c.yaml", config);
    dir.ferrotune(&[&["train", "c.yaml"], words].concat()).fails_with(2, stderr);
}

#[test]
fn unknown_keys_name_the_nearest() {
    check("lora_rnak: 8\n", &[], "error: c.yaml:1: `lora_rnak` is not a key; did you mean `lora_rank`?");
    check(
        "",
        &["lerning_rate=1"],
        "error: command line: `lerning_rate` is not a key; did you mean `learning_rate`?",
    );
}

#[test]
fn every_mistake_has_its_line() {
    check(
        "lora_rank: many\n\nbf16: 7\nstage: dpo\ndeepspeed: z3.json\n",
        &["device=cuda:0,1"],
        "error: c.yaml:1: `lora_rank`: expected a whole number, 0 or more, found `many`\n\
         error: c.yaml:3: `bf16`: expected true or false, found `7`\n\
         error: c.yaml:4: `stage`: `dpo` is not there yet; there is sft, pt\n\
         error: c.yaml:5: `deepspeed` is not there yet; leave it out\n\
         error: command line: `device`: several GPUs are not there yet; name one, as in `cuda:0`",
    );
}

#[test]
fn files_that_are_no_config() {
    let dir = Dir::new();
    dir.ferrotune(&["train", "none.yaml"]).fails_with(2, "error: none.yaml: no such file");
    dir.file("bytes.yaml", [0xff, 0xfe, 0x00]);
    dir.ferrotune(&["train", "bytes.yaml"])
        .fails_with(2, "error: bytes.yaml: not UTF-8 text; a config is a YAML file");
    dir.file("broken.yaml", "lora_rank: 8\nlora_target: [q_proj\nseed: 1\n");
    dir.ferrotune(&["train", "broken.yaml"]).fails(2).says("error: broken.yaml:3: ");
    dir.file("list.yaml", "- lora_rank: 8\n");
    dir.ferrotune(&["train", "list.yaml"])
        .fails_with(2, "error: list.yaml:1: expected lines of `key: value`, found a list");
    // A folder can be opened, but not read.
    dir.ferrotune(&["train", "."]).fails(1).says("error: can't read .: ");
}

#[test]
fn several_configs_are_refused_by_chat() {
    Dir::new().ferrotune(&["chat", "a.yaml", "b.yaml"]).fails(2).says("second config");
}
