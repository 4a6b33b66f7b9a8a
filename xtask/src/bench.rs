//! Speed and memory of training.

use std::fs;
use std::process::Command;
use std::time::Instant;

use crate::{Result, cargo, program, root, run, test_model};

/// Tokens of every row.
const ROW: &str = "512";

/// `cargo xtask bench cpu`: SmolLM2, LoRA r=16 on the seven kinds, rows of 512 tokens.
pub fn cpu() -> Result<()> {
    run(&mut cargo(&["build", "--release", "--locked", "--package", "ferrotune-cli"]))?;
    let model = test_model::fetch()?;
    let folder = root().join("target").join("bench");
    fs::create_dir_all(&folder).map_err(|error| format!("can't create {}: {error}", folder.display()))?;
    let rows = folder.join("rows.jsonl");
    fs::write(&rows, long_rows(64)).map_err(|error| format!("can't write {}: {error}", rows.display()))?;

    let train = |name: &str, steps: usize, extra: &[&str]| -> Result<f64> {
        let config = folder.join(format!("{name}.yaml"));
        let text = format!(
            "model_name_or_path: {}\ndataset: {}\noutput_dir: {}\noverwrite_output_dir: true\ncutoff_len: {ROW}\n\
             train_on_prompt: true\nlora_rank: 16\nlora_target: all\nlearning_rate: 1e-4\nmax_steps: {steps}\n\
             logging_steps: 1\nsave_strategy: no\ndevice: cpu\n",
            model.display(),
            rows.display(),
            folder.join(name).display(),
        );
        fs::write(&config, text).map_err(|error| format!("can't write {}: {error}", config.display()))?;
        let start = Instant::now();
        run(Command::new(program()).arg("train").arg(&config).args(extra))?;
        Ok(start.elapsed().as_secs_f64())
    };
    for (name, extra) in [("f32", &[][..]), ("f32-4bit", &["quantization_bit=4"]), ("bf16", &["bf16=true"])] {
        println!("── {name}");
        // The first run also brings the files into the page cache.
        train(name, 1, extra)?;
        let first = train(name, 1, extra)?;
        train(name, 12, extra)?;
        println!("{name}: process start to end of a run of one step: {first:.2} s");
    }
    Ok(())
}

/// Rows that are longer than any row of the bench; each differs, none means anything.
fn long_rows(count: usize) -> String {
    let words =
        ["river", "seven", "paper", "light", "under", "green", "stone", "music", "early", "north", "glass"];
    let mut state = 1_usize;
    let mut text = String::new();
    for _ in 0..count {
        let mut sentence = String::new();
        for _ in 0..700 {
            state = (state * 1_103_515_245 + 12_345) % (1 << 31);
            sentence.push_str(words[(state >> 8) % words.len()]);
            sentence.push(' ');
        }
        let row = format!(
            "{{\"messages\": [{{\"role\": \"user\", \"content\": \"go on\"}}, {{\"role\": \"assistant\", \"content\": \"{}\"}}]}}\n",
            sentence.trim_end()
        );
        text.push_str(&row);
    }
    text
}
