//! A run as its folder shows it, while it goes on and afterwards.

use std::fs;
use std::path::Path;

use ferrotune_trainer::{RunLock, checkpoints};
use serde_json::Value;

use crate::results::has_results;

/// What is known of a run.
pub struct RunLog {
    /// (step, loss) of each line of the log.
    pub losses: Vec<(f64, f64)>,
    /// The same of evaluations.
    pub evaluations: Vec<(f64, f64)>,
    /// The last line of the log that tells of a step.
    pub last: Value,
    /// What it is doing.
    pub state: RunState,
}

/// What a run is doing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RunState {
    /// A process trains.
    Running(String),
    /// It came to its end.
    Finished,
    /// It was stopped or killed before; the step of its newest checkpoint.
    Stopped(Option<usize>),
}

impl std::fmt::Display for RunState {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            RunState::Running(process) => write!(f, "running ({process})"),
            RunState::Finished => f.write_str("finished"),
            RunState::Stopped(Some(step)) => write!(f, "stopped, saved at step {step}"),
            RunState::Stopped(None) => f.write_str("stopped, nothing saved"),
        }
    }
}

/// Whether a folder holds a run: a log, or a checkpoint.
pub fn is_run(folder: &Path) -> bool {
    folder.join("trainer_log.jsonl").is_file() || !checkpoints(folder).is_empty()
}

impl RunLog {
    /// The run in this folder; none where it holds neither a log nor a checkpoint.
    pub fn read(folder: &Path) -> Option<RunLog> {
        if !is_run(folder) {
            return None;
        }
        // One that was stopped early may have logged nothing yet.
        let text = fs::read_to_string(folder.join("trainer_log.jsonl")).unwrap_or_default();
        let lines: Vec<Value> = text.lines().filter_map(|line| serde_json::from_str(line).ok()).collect();
        let curve = |key: &str| -> Vec<(f64, f64)> {
            lines.iter().filter_map(|it| Some((it["current_steps"].as_f64()?, it[key].as_f64()?))).collect()
        };
        let state = match RunLock::holder(folder) {
            Some(process) => RunState::Running(process),
            None if has_results(folder) => RunState::Finished,
            None => RunState::Stopped(checkpoints(folder).last().map(|it| it.0)),
        };
        let last = lines.iter().rev().find(|it| it.get("lr").is_some()).cloned().unwrap_or_default();
        Some(RunLog { losses: curve("loss"), evaluations: curve("eval_loss"), last, state })
    }

    /// `12/100`
    pub fn progress(&self) -> String {
        let steps = |key: &str| self.last[key].as_u64().map_or_else(|| "?".to_string(), |it| it.to_string());
        format!("{}/{}", steps("current_steps"), steps("total_steps"))
    }
}
