//! Speed and memory of training.

use std::fs;
use std::path::PathBuf;
use std::process::Command;
use std::time::Instant;

use crate::{Result, cargo, program, root, run, test_model};

/// Tokens of every row.
const ROW: &str = "512";

/// `cargo xtask bench cpu`: SmolLM2, LoRA r=16 on the seven kinds, rows of 512 tokens.
pub fn cpu() -> Result<()> {
    let folder = built()?;
    let model = test_model::fetch()?;
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

/// `cargo xtask bench gpu CONFIG [key=value …]`: steps of a config as they are, then with each kernel measured. The second run
/// prints a token's operations, the card's own rate of products, the share of it that was reached, and a line for each kernel:
/// time, share of the step, rate, and that beside the best the card does. Evaluation data would be measured too.
pub fn gpu(config: &str, keys: &[&str]) -> Result<()> {
    let out = format!("output_dir={}", built()?.join("gpu").display());
    let train = |name: &str, profile: bool| {
        println!("── {name}");
        let mut command = Command::new(program());
        command.args(["train", config, "device=cuda", "max_steps=8", "logging_steps=1", "save_strategy=no"]);
        // Nothing of a config that isn't training, and nothing that others see.
        command.args([
            "push_to_hub=false",
            "resume_from_checkpoint=false",
            "do_predict=false",
            "eval_strategy=no",
        ]);
        command.args([out.as_str(), "overwrite_output_dir=true", "val_size=0"]).args(keys);
        if profile {
            command.env("FERROTUNE_PROFILE", "1");
        }
        run(&mut command)
    };
    train("speed", false)?;
    train("kernels", true)
}

/// Builds the program; the folder for what is measured with it.
fn built() -> Result<PathBuf> {
    // The whole workspace, as other verbs build it: another choice of packages would be built anew.
    run(&mut cargo(&["build", "--release", "--locked", "--workspace", "--bins"]))?;
    let folder = root().join("target").join("bench");
    fs::create_dir_all(&folder).map_err(|error| format!("can't create {}: {error}", folder.display()))?;
    Ok(folder)
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
