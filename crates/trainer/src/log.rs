//! `trainer_log.jsonl`: a line for each report, in LLaMA-Factory's form
//! (LLaMA-Factory src/llamafactory/train/callbacks.py).

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};

use ferrotune_tensor::{Error, Result};
use serde::{Deserialize, Serialize};
use serde_json::json;

use crate::{EvalReport, StepReport};

/// Losses that have been added up.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Window {
    sum: f64,
    count: usize,
}

impl Window {
    /// One more, unless it isn't finite.
    pub fn add(&mut self, loss: f64) {
        if loss.is_finite() {
            self.sum += loss;
            self.count += 1;
        }
    }

    /// NaN without any.
    pub fn mean(&self) -> f64 {
        self.sum / self.count as f64
    }
}

/// Appends reports to a file, which is made with the first of them.
#[derive(Debug)]
pub struct LogWriter {
    path: PathBuf,
    keep_steps: Option<usize>,
    file: Option<File>,
}

impl LogWriter {
    /// The log of a run; one that goes on after `keep_steps` steps keeps its lines up to there, a new one none.
    pub fn new(output_dir: &Path, keep_steps: Option<usize>) -> LogWriter {
        LogWriter { path: output_dir.join("trainer_log.jsonl"), keep_steps, file: None }
    }

    fn open(&self) -> std::io::Result<File> {
        let old = std::fs::read_to_string(&self.path).unwrap_or_default();
        let step_of = |line: &str| -> Option<u64> {
            serde_json::from_str::<serde_json::Value>(line).ok()?.get("current_steps")?.as_u64()
        };
        let kept = old
            .lines()
            .filter(|line| step_of(line).is_some_and(|step| Some(step as usize) <= self.keep_steps));
        let kept: String = kept.map(|line| format!("{line}\n")).collect();
        // Beside and renamed: a run that is killed here loses no line.
        let beside = self.path.with_extension("jsonl.part");
        std::fs::write(&beside, kept)?;
        std::fs::rename(&beside, &self.path)?;
        OpenOptions::new().append(true).open(&self.path)
    }

    /// Adds a line.
    ///
    /// # Errors
    /// When the file can't be written.
    pub fn write(&mut self, report: &StepReport) -> Result<()> {
        let line = json!({
            "current_steps": report.step,
            "total_steps": report.total_steps,
            "loss": report.mean_loss,
            "lr": report.learning_rate,
            "grad_norm": report.grad_norm,
            "accuracy": report.accuracy,
            "epoch": report.epoch,
            "percentage": (10_000.0 * report.step as f64 / report.total_steps.max(1) as f64).round() / 100.0,
            "elapsed_time": clock(report.elapsed_seconds),
            "remaining_time": clock(report.remaining_seconds),
            "throughput": report.tokens_per_second,
            "total_tokens": report.total_tokens,
        });
        self.append(&line)
    }

    /// Adds a line for an evaluation.
    ///
    /// # Errors
    /// When the file can't be written.
    pub fn write_evaluation(&mut self, report: &EvalReport) -> Result<()> {
        let line = json!({
            "current_steps": report.step,
            "total_steps": report.total_steps,
            "eval_loss": report.loss,
            "eval_perplexity": report.perplexity(),
            "eval_accuracy": report.accuracy,
            "epoch": report.epoch,
            "percentage": (10_000.0 * report.step as f64 / report.total_steps.max(1) as f64).round() / 100.0,
            "eval_runtime": report.runtime,
        });
        self.append(&line)
    }

    fn append(&mut self, line: &serde_json::Value) -> Result<()> {
        let written = match self.file.take().map_or_else(|| self.open(), Ok) {
            Ok(file) => writeln!(self.file.insert(file), "{line}"),
            Err(error) => Err(error),
        };
        written.map_err(|source| Error::io(&self.path, source))
    }
}

/// H:MM:SS
fn clock(seconds: f64) -> String {
    let seconds = seconds.max(0.0) as u64;
    format!("{}:{:02}:{:02}", seconds / 3600, seconds / 60 % 60, seconds % 60)
}
