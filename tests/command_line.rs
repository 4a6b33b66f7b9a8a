//! Verbs, help, exit codes, colours, pipes.

use std::io::Read as _;
use std::process::Stdio;

use crate::util::Dir;

const VERBS: &[&[&str]] = &[
    &["train"],
    &["chat"],
    &["push"],
    &["data"],
    &["model"],
    &["debug", "logits"],
    &["debug", "tokenize"],
    &["debug", "render"],
    &["doctor"],
];

#[test]
fn help_of_each_verb_has_an_example_that_names_it() {
    let dir = Dir::new();
    dir.ferrotune(&["--help"]).succeeds().prints("Example:\n  ferrotune train ").prints("Exit codes: 0 ");
    for verb in VERBS {
        for flag in ["-h", "--help"] {
            let ran = dir.ferrotune(&[*verb, &[flag]].concat()).succeeds().prints("Example");
            let example = ran.stdout.split_once("Example").expect("an example").1;
            assert!(example.contains(&format!("ferrotune {}", verb.join(" "))), "{}", ran.stdout);
        }
    }
    dir.ferrotune(&["train", "--help"])
        .succeeds()
        .prints("    lora_rank: 8\n")
        .prints("    adam_epsilon: 1e-8\n");
}

#[test]
fn mistakes_in_words_end_with_code_2() {
    let dir = Dir::new();
    dir.ferrotune(&["trian"]).fails(2).says("unrecognized subcommand 'trian'").says("'train'");
    dir.ferrotune(&["train"]).fails(2).says("<CONFIG>");
    dir.ferrotune(&["doctor", "--loud"]).fails(2).says("--loud");
    dir.ferrotune(&["--quiet", "-v", "doctor"]).fails(2).says("cannot be used with");
    let empty = dir.ferrotune(&[]).fails(2);
    assert!(empty.stderr.contains("Usage: ferrotune"), "{}", empty.stderr);
}

#[test]
fn version_is_one_line() {
    let ran = Dir::new().ferrotune(&["--version"]).succeeds();
    assert_eq!(ran.stdout, format!("ferrotune {}\n", env!("CARGO_PKG_VERSION")));
}

#[test]
fn a_reader_that_leaves_is_no_error() {
    let dir = Dir::new();
    for words in [&["doctor"][..], &["train", "--help"]] {
        let mut command = dir.ferrotune(words).command();
        let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("the program");
        // Closed before the program has written anything.
        drop(child.stdout.take());
        let mut stderr = String::new();
        child.stderr.take().expect("its errors").read_to_string(&mut stderr).expect("UTF-8");
        let status = child.wait().expect("the program");
        assert_eq!((status.code(), stderr.as_str()), (Some(0), ""), "{words:?}");
    }
}

#[test]
fn colours_only_where_they_are_wanted() {
    let dir = Dir::new();
    let colored = |words: &[&str], no_color: &str| {
        let ran = dir.ferrotune(words).env("NO_COLOR", no_color).succeeds();
        ran.stdout.contains('\x1b')
    };
    assert!(!colored(&["doctor"], ""), "a pipe is no terminal");
    assert!(colored(&["doctor", "--color", "always"], ""));
    assert!(colored(&["doctor", "--color", "always"], "1"), "what is typed wins over NO_COLOR");
    assert!(!colored(&["doctor", "--color=never"], ""));
    dir.file("c.yaml", "x: 1\n");
    let ran = dir.ferrotune(&["train", "c.yaml"]).fails(2);
    assert!(!ran.stderr.contains('\x1b'), "{}", ran.stderr);
    dir.ferrotune(&["train", "c.yaml", "--color", "always"])
        .fails(2)
        .says("\x1b[31merror\x1b[0m: c.yaml:1: ");
}

#[test]
fn a_key_typed_as_a_flag_is_answered_with_how_keys_are_typed() {
    let dir = Dir::new();
    let ran = dir.ferrotune(&["train", "c.yaml", "--learning_rate", "1e-4"]).fails(2);
    ran.says("unexpected argument '--learning_rate'").says("learning_rate=VALUE");
}
