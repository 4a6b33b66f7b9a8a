//! `ferrotune debug` and `ferrotune model`

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
        ran.stdout.starts_with(&format!("{{\"text\":\"{text}\",\"trained\":[[52,64]],\"ids\":[1,")),
        "{}",
        ran.stdout
    );

    dir.file("t.jinja", "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}");
    let with_tokens =
        format!("{{\"messages\": {conversation}, \"special_tokens\": {{\"bos_token\": \"<s>\"}}}}");
    let ran = dir.ferrotune(&["debug", "render", "--template", "t.jinja"]).input(&with_tokens);
    assert!(
        ran.stdout.starts_with("{\"text\":\"<s>[user] Hi\\n[assistant] Yo\\n\",\"trained\":[["),
        "{}{}",
        ran.stdout,
        ran.stderr
    );

    let wrong = dir.ferrotune(&["debug", "render", "--model", &tiny()]).input("Hi");
    assert_eq!(wrong.code, Some(1));
    wrong.says("error: the conversation is not JSON: ");
    dir.ferrotune(&["debug", "render"]).fails(2).says("--model");
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
