//! The counts of data sets, for people and for programs.

use std::io::Write;

use ferrotune_data::{Noticed, SetCounts};
use serde_json::{Value, json};

use super::cost::Cost;
use crate::config::RunConfig;
use crate::console::{clock, counted, thousands};
use crate::run::OpenData;

/// Widest bar of the histogram, in characters.
const BAR: usize = 40;
/// Most bars of the histogram.
const BARS: usize = 12;

/// What was left out while encoding, by reason.
fn left_out(data: &OpenData) -> Vec<Noticed> {
    let mut counts = SetCounts::default();
    data.report.dropped.iter().for_each(|it| counts.skip(&it.place, &it.reason));
    counts.skipped
}

/// Everything as an object.
pub fn json(data: &OpenData, cost: &Cost) -> Value {
    let report = &data.report;
    let bars = report.histogram(BARS);
    let bars = bars.iter().map(|bar| json!({ "from": bar.from, "to": bar.to, "samples": bar.samples }));
    json!({
        "sets": data.counts,
        "samples": report.samples,
        "evaluation_samples": data.evaluation.len(),
        "tokens": report.tokens,
        "trained_tokens": report.trained_tokens,
        "truncated": report.truncated,
        "cut_tokens": report.cut_tokens,
        "left_out": left_out(data),
        "lengths": {
            "shortest": report.quantile(0.0),
            "median": report.quantile(0.5),
            "p95": report.quantile(0.95),
            "longest": report.quantile(1.0),
            "histogram": bars.collect::<Vec<_>>(),
        },
        "cost": {
            "steps": cost.steps,
            "rows_per_step": cost.rows_per_step,
            "tokens": cost.tokens,
            "tokens_per_second": cost.tokens_per_second,
            "seconds": cost.seconds(),
        },
    })
}

fn count(number: usize) -> String {
    thousands(number as u64)
}

fn rows(number: usize) -> String {
    counted(number as u64, "row")
}

/// Rows with what they have in common, and where the first of them are.
fn noticed(it: &Noticed) -> String {
    let places: Vec<String> = it.first.iter().map(ToString::to_string).collect();
    let more = if it.rows > it.first.len() { ", …" } else { "" };
    format!("{}: {} ({}{more})", count(it.rows), it.reason, places.join(", "))
}

/// Tables for people.
pub fn write(out: &mut impl Write, data: &OpenData, config: &RunConfig, cost: &Cost) -> anyhow::Result<()> {
    let report = &data.report;
    for set in &data.counts {
        let skipped = match set.skipped_rows() {
            0 => String::new(),
            rows => format!(", {} left out", count(rows)),
        };
        writeln!(out, "data set  {} ({}): {}{skipped}", set.name, set.format, rows(set.rows))?;
        for doubt in set.skipped.iter().chain(&set.doubtful).chain(&set.duplicates) {
            writeln!(out, "          {}", noticed(doubt))?;
        }
    }
    let further = match report.dropped.len() {
        0 => String::new(),
        dropped => format!("; {} left out", rows(dropped)),
    };
    writeln!(out, "samples   {}{further}", count(report.samples))?;
    for reason in left_out(data) {
        writeln!(out, "          {}", noticed(&reason))?;
    }
    if !data.evaluation.is_empty() {
        let by = if config.val_size > 0.0 { "val_size" } else { "eval_dataset" };
        writeln!(out, "evaluated {} set apart by `{by}`", counted(data.evaluation.len() as u64, "sample"))?;
    }
    let share = 100.0 * report.trained_share();
    let trained = count(report.trained_tokens);
    writeln!(out, "tokens    {}; {trained} trained ({share:.0} %)", count(report.tokens))?;
    let cut = match report.truncated {
        0 => "none is longer".to_string(),
        samples => format!("{} are cut, {} tokens in all", count(samples), count(report.cut_tokens)),
    };
    writeln!(out, "cutoff    {}; {cut}", count(config.cutoff_len))?;
    let about = if config.packs() { "about " } else { "" };
    let of = counted(cost.rows_per_step as u64, if config.packs() { "packed row" } else { "sample" });
    writeln!(out, "steps     {about}{} of {of}", thousands(cost.steps))?;
    let time = match (cost.seconds(), cost.tokens_per_second) {
        (Some(seconds), Some(speed)) => {
            format!("; about {} here, at {} tokens a second", clock(seconds), thousands(speed as u64))
        }
        _ => String::new(),
    };
    writeln!(out, "cost      {} tokens{time}", thousands(cost.tokens))?;
    lengths(out, data)
}

fn lengths(out: &mut impl Write, data: &OpenData) -> anyhow::Result<()> {
    let report = &data.report;
    let quantile = |share: f64| count(report.quantile(share));
    writeln!(
        out,
        "lengths   {} shortest, {} median, {} for 95 % of samples, {} longest",
        quantile(0.0),
        quantile(0.5),
        quantile(0.95),
        quantile(1.0)
    )?;
    let bars = report.histogram(BARS);
    let empty = bars.iter().take_while(|bar| bar.samples == 0).count();
    let bars = &bars[empty..];
    let highest = bars.iter().map(|bar| bar.samples).max().unwrap_or(0).max(1);
    let longest = report.quantile(1.0);
    let last = |to: usize| count((to - 1).min(longest));
    let width = bars.last().map_or(0, |bar| last(bar.to).len());
    for bar in bars {
        // A bar that stands for anything is seen.
        let length = (bar.samples * BAR).div_ceil(highest);
        let (from, to) = (count(bar.from), last(bar.to));
        writeln!(out, "{from:>width$} – {to:<width$} {} {}", "█".repeat(length), count(bar.samples))?;
    }
    Ok(())
}
