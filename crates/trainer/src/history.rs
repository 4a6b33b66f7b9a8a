//! `trainer_state.json` as transformers writes it (transformers/trainer_callback.py), so that its readers
//! of curves read ours.

use std::fs;
use std::path::Path;

use serde_json::{Value, json};

use ferrotune_tensor::{Error, Result};

use crate::{EvalReport, RunState, Settings, StepReport};

/// The file's name.
pub(crate) const HISTORY_FILE: &str = "trainer_state.json";

/// A line of the log as transformers keeps it.
pub(crate) fn train_entry(report: &StepReport) -> Value {
    json!({
        "epoch": report.epoch,
        "grad_norm": report.grad_norm,
        "learning_rate": report.learning_rate,
        "loss": report.mean_loss,
        "step": report.step,
    })
}

/// An evaluation as transformers keeps it.
pub(crate) fn eval_entry(report: &EvalReport) -> Value {
    json!({
        "epoch": report.epoch,
        "eval_accuracy": report.accuracy,
        "eval_loss": report.loss,
        "eval_perplexity": report.perplexity(),
        "eval_runtime": report.runtime,
        "eval_samples_per_second": report.samples as f64 / report.runtime,
        "eval_steps_per_second": report.batches as f64 / report.runtime,
        "step": report.step,
    })
}

/// The mean of all steps' losses, of which each entry has that of the steps since the one before; none without.
pub(crate) fn mean_loss(history: &[Value]) -> Option<f64> {
    let (mut steps, mut sum) = (0.0, 0.0);
    let logged = history.iter().filter_map(|it| Some((it["step"].as_f64()?, it["loss"].as_f64()?)));
    for (step, loss) in logged {
        sum += loss * (step - steps);
        steps = step;
    }
    (steps > 0.0).then_some(sum / steps)
}

/// Writes the file into a folder.
pub(crate) fn write(folder: &Path, settings: &Settings, state: &RunState) -> Result<()> {
    let best = state.best.as_ref();
    let best_checkpoint = best.map(|it| settings.output_dir.join(format!("checkpoint-{}", it.step)));
    let best_checkpoint = best_checkpoint.filter(|it| it.exists() || folder.ends_with(it));
    let evaluation = settings.evaluation.as_ref();
    // Sorted keys, two spaces, a newline.
    let text = json!({
        "best_global_step": best.map(|it| it.step),
        "best_metric": best.map(|it| it.metric),
        "best_model_checkpoint": best_checkpoint.map(|it| it.display().to_string()),
        "epoch": state.history.last().and_then(|it| it.get("epoch").cloned()),
        "eval_steps": evaluation.map_or(0, |it| it.steps),
        "global_step": state.step,
        "is_hyper_param_search": false,
        "is_local_process_zero": true,
        "is_world_process_zero": true,
        "log_history": state.history,
        "logging_steps": settings.logging_steps,
        "max_steps": settings.schedule.total_steps,
        "num_input_tokens_seen": state.total_tokens,
        "num_train_epochs": settings.num_train_epochs,
        "save_steps": settings.save_steps,
        "stateful_callbacks": {},
        "total_flos": 0,
        "train_batch_size": settings.train_batch_size,
        "trial_name": null,
        "trial_params": null,
    });
    let path = folder.join(HISTORY_FILE);
    let text = serde_json::to_string_pretty(&text).map_err(|error| Error::file(&path, error.to_string()))?;
    fs::write(&path, text + "\n").map_err(|source| Error::io(&path, source))
}

/// The log in a checkpoint's file.
pub(crate) fn read(checkpoint: &Path) -> Result<Vec<Value>> {
    let path = checkpoint.join(HISTORY_FILE);
    let text = fs::read_to_string(&path).map_err(|source| Error::io(&path, source))?;
    let mut value: Value =
        serde_json::from_str(&text).map_err(|error| Error::file(&path, error.to_string()))?;
    match value["log_history"].take() {
        Value::Array(entries) => Ok(entries),
        _ => Err(Error::file(&path, "has no `log_history`")),
    }
}
