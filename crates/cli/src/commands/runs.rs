//! `ferrotune runs`

use std::fs;
use std::io::Write as _;
use std::path::{Path, PathBuf};

use crate::Outcome;
use crate::args::RunsArgs;
use crate::console::Console;
use crate::run_log::{RunLog, is_run};

/// How far below the folder runs are looked for.
const DEPTH: usize = 4;

/// Lists the runs below a folder, the last to be written to first.
pub fn run(args: &RunsArgs, console: &Console) -> anyhow::Result<Outcome> {
    let mut folders = Vec::new();
    find(&args.folder, DEPTH, &mut folders);
    let written = |folder: &PathBuf| {
        let log = fs::metadata(folder.join("trainer_log.jsonl"));
        log.or_else(|_| fs::metadata(folder)).and_then(|it| it.modified()).ok()
    };
    folders.sort_by_key(|it| std::cmp::Reverse((written(it), it.clone())));
    let runs: Vec<(PathBuf, RunLog)> =
        folders.into_iter().filter_map(|it| Some((it.clone(), RunLog::read(&it)?))).collect();
    if runs.is_empty() {
        console.note(format!("no runs below {}", args.folder.display()));
        return Ok(Outcome::Done);
    }
    let mut out = console.out();
    let width = runs.iter().map(|it| it.0.display().to_string().chars().count()).max().unwrap_or(0).max(6);
    writeln!(
        out,
        "{:<width$}  {:>13}  {:>9}  {:>9}  {:>8}  state",
        "folder", "steps", "loss", "eval loss", "time"
    )?;
    for (folder, log) in runs {
        let last =
            |curve: &[(f64, f64)]| curve.last().map_or_else(|| "-".to_string(), |it| format!("{:.4}", it.1));
        writeln!(
            out,
            "{:<width$}  {:>13}  {:>9}  {:>9}  {:>8}  {}",
            folder.display().to_string(),
            log.progress(),
            last(&log.losses),
            last(&log.evaluations),
            log.last["elapsed_time"].as_str().unwrap_or("-"),
            log.state
        )?;
    }
    out.flush()?;
    Ok(Outcome::Done)
}

/// Folders of runs; a run's own folders are not looked into.
fn find(folder: &Path, depth: usize, found: &mut Vec<PathBuf>) {
    if is_run(folder) {
        found.push(folder.to_path_buf());
        return;
    }
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    for entry in entries.filter(|it| depth > 0 && it.file_type().is_ok_and(|it| it.is_dir())) {
        if !entry.file_name().to_string_lossy().starts_with('.') {
            let below = entry.path();
            find(below.strip_prefix("./").unwrap_or(&below), depth - 1, found);
        }
    }
}
