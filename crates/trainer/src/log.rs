//! `trainer_log.jsonl`: a line for each report, in LLaMA-Factory's form
//! (LLaMA-Factory src/llamafactory/train/callbacks.py).

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};

use ferrotune_tensor::{Error, Result};
use serde_json::json;

use crate::StepReport;

/// Appends reports to a file.
#[derive(Debug)]
pub struct LogWriter {
    path: PathBuf,
    file: File,
}

impl LogWriter {
    /// Opens the log of a run; a run that is resumed after `keep_steps` steps keeps its lines up to there.
    ///
    /// # Errors
    /// When the file can't be written.
    pub fn open(output_dir: &Path, keep_steps: usize) -> Result<LogWriter> {
        let path = output_dir.join("trainer_log.jsonl");
        let old = std::fs::read_to_string(&path).unwrap_or_default();
        let step_of = |line: &str| -> Option<u64> {
            serde_json::from_str::<serde_json::Value>(line).ok()?.get("current_steps")?.as_u64()
        };
        let kept = old.lines().filter(|line| step_of(line).is_some_and(|step| step as usize <= keep_steps));
        let kept: String = kept.map(|line| format!("{line}\n")).collect();
        std::fs::write(&path, kept).map_err(|source| Error::io(&path, source))?;
        let file = OpenOptions::new().append(true).open(&path).map_err(|source| Error::io(&path, source))?;
        Ok(LogWriter { path, file })
    }

    /// Adds a line.
    ///
    /// # Errors
    /// When the file can't be written.
    pub fn write(&mut self, report: &StepReport) -> Result<()> {
        let line = json!({
            "current_steps": report.step,
            "total_steps": report.total_steps,
            "loss": report.loss,
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
        writeln!(self.file, "{line}").map_err(|source| Error::io(&self.path, source))
    }
}

/// H:MM:SS
fn clock(seconds: f64) -> String {
    let seconds = seconds.max(0.0) as u64;
    format!("{}:{:02}:{:02}", seconds / 3600, seconds / 60 % 60, seconds % 60)
}
