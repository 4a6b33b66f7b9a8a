//! From a fresh machine to a fine-tuned real model, its answers before and after.

use std::process::Command;

use crate::{Result, cargo, program, run, test_model};

const CONFIG: &str = "examples/quickstart.yaml";
const QUESTIONS: &str = "examples/heldback.jsonl";
const ADAPTER: &str = "out/quickstart";

/// `cargo xtask quickstart`
pub fn run_all() -> Result<()> {
    run(&mut cargo(&["build", "--release", "--locked", "--package", "ferrotune-cli"]))?;
    test_model::fetch()?;
    let answers = |words: &[&str]| {
        let mut chat = Command::new(program());
        run(chat
            .args(["chat", CONFIG, "--quiet", "--greedy", "--max-new-tokens", "60", "--prompts", QUESTIONS])
            .args(words))
    };
    println!("── before\n");
    answers(&[])?;
    println!("── training\n");
    let output = format!("output_dir={ADAPTER}");
    run(Command::new(program()).args(["train", CONFIG, &output, "overwrite_output_dir=true"]))?;
    println!("\n── after\n");
    answers(&["--adapter", ADAPTER])?;
    println!("Talk to it: {} chat {CONFIG} --adapter {ADAPTER}", program().display());
    Ok(())
}
