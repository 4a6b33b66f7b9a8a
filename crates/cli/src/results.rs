//! `train_results.json`, `eval_results.json`, `predict_results.json`, and `all_results.json` with all of them,
//! as transformers' examples and LLaMA-Factory write them.

use std::fs;
use std::io::ErrorKind;
use std::path::Path;

use anyhow::Context as _;
use ferrotune_export::write_whole;
use ferrotune_trainer::{EvalReport, Summary};
use serde_json::{Map, Value, json};

/// Writes the results of `train`, `eval` or `predict`.
///
/// # Errors
/// When a file can't be written.
pub fn write_results(output_dir: &Path, split: &str, results: &Value) -> anyhow::Result<()> {
    let all = output_dir.join("all_results.json");
    let old = fs::read_to_string(&all).ok().and_then(|text| serde_json::from_str(&text).ok());
    let mut merged: Map<String, Value> = old.unwrap_or_default();
    merged.extend(results.as_object().cloned().unwrap_or_default());
    merged.sort_keys();
    let mut results = results.clone();
    results.sort_all_objects();
    let write = |path: &Path, value: &Value| -> anyhow::Result<()> {
        let text = serde_json::to_string_pretty(value).context("results that are no JSON")?;
        Ok(write_whole(path, (text + "\n").as_bytes())?)
    };
    write(&output_dir.join(format!("{split}_results.json")), &results)?;
    write(&all, &Value::Object(merged))
}

/// Written when all else of a run has been: where it is, the run came to its end.
const TRAIN_RESULTS: &str = "train_results.json";

/// Whether the run in this folder came to its end.
pub fn has_results(output_dir: &Path) -> bool {
    output_dir.join(TRAIN_RESULTS).is_file()
}

/// Takes away what an earlier run in this folder gave, so that one that is killed doesn't seem finished.
///
/// # Errors
/// When the file is there and can't be removed.
pub fn forget_results(output_dir: &Path) -> anyhow::Result<()> {
    let path = output_dir.join(TRAIN_RESULTS);
    match fs::remove_file(&path) {
        Err(error) if error.kind() != ErrorKind::NotFound => {
            Err(error).with_context(|| format!("can't remove {}", path.display()))
        }
        _ => Ok(()),
    }
}

/// What a run of training gave.
pub fn train_results(summary: &Summary, samples_in_step: usize) -> Value {
    let pace = summary.steps as f64 / summary.elapsed_seconds.max(1e-9);
    json!({
        "epoch": summary.epoch,
        "num_input_tokens_seen": summary.total_tokens,
        "total_flos": 0,
        "train_loss": summary.mean_loss,
        "train_runtime": summary.elapsed_seconds,
        "train_samples_per_second": pace * samples_in_step as f64,
        "train_steps_per_second": pace,
    })
}

/// What an evaluation gave.
pub fn eval_results(report: &EvalReport) -> Value {
    json!({
        "eval_accuracy": report.accuracy,
        "eval_loss": report.loss,
        "eval_perplexity": report.perplexity(),
        "eval_runtime": report.runtime,
        "eval_samples_per_second": report.samples as f64 / report.runtime.max(1e-9),
        "eval_steps_per_second": report.batches as f64 / report.runtime.max(1e-9),
    })
}
