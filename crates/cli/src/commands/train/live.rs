//! The line that changes while a run goes on. It never wraps: where the terminal is narrow, it says less.

use ferrotune_trainer::StepReport;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use ratatui::crossterm::terminal;

use crate::console::{Console, bytes, clock, fitting};

/// Of the running mean of the loss: how much of it a step leaves.
const KEPT: f64 = 0.9;
/// Columns of the bar, its ends included.
const BAR: usize = 18;
/// Columns of a terminal that doesn't say.
const USUAL: usize = 80;

/// A running mean whose early values aren't drawn to 0: m = 0.9·m + 0.1·x, shown as m/(1 − 0.9ᵗ).
#[derive(Debug, Default)]
struct Smoothed {
    sum: f64,
    weight: f64,
}

impl Smoothed {
    /// With one more value; one that isn't finite is left out.
    fn add(&mut self, value: f64) -> f64 {
        if value.is_finite() {
            self.sum = KEPT * self.sum + (1.0 - KEPT) * value;
            self.weight = KEPT * self.weight + (1.0 - KEPT);
        }
        self.sum / self.weight
    }
}

/// The live line of a run.
pub(super) struct LiveLine {
    bar: ProgressBar,
    loss: Smoothed,
}

impl LiveLine {
    /// Nothing is shown yet, and nothing ever where the console shows no progress.
    pub(super) fn new(console: &Console) -> LiveLine {
        let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::hidden());
        bar.set_style(ProgressStyle::with_template("{msg}").unwrap_or_else(|_| ProgressStyle::default_bar()));
        if console.shows_progress() {
            bar.set_draw_target(ProgressDrawTarget::stderr());
        }
        LiveLine { bar, loss: Smoothed::default() }
    }

    /// Tells of a step.
    pub(super) fn show(&mut self, report: &StepReport, memory: Option<u64>) {
        let loss = self.loss.add(report.loss);
        let width = terminal::size().map_or(USUAL, |(columns, _)| usize::from(columns));
        self.bar.set_message(line(report, loss, memory, width.saturating_sub(1)));
    }

    /// A line that stays, above.
    pub(super) fn say(&self, line: String) {
        self.bar.println(line);
    }

    /// Takes the line away.
    pub(super) fn clear(&self) {
        self.bar.finish_and_clear();
    }
}

/// As much as fits into so many columns: first where the run is, then what matters most.
fn line(report: &StepReport, loss: f64, memory: Option<u64>, width: usize) -> String {
    let StepReport { step, total_steps, .. } = *report;
    // In the order in which they stand, with how soon they are let go: those with the most go first.
    let fields = [
        (0, format!("step {step}/{total_steps}")),
        (4, bar(step, total_steps)),
        (1, format!("loss {loss:.4}")),
        (3, format!("lr {:.2e}", report.learning_rate)),
        (6, format!("norm {:.2}", report.grad_norm)),
        (5, format!("{:.0} tokens/s", report.tokens_per_second)),
        (7, memory.map_or_else(String::new, bytes)),
        (2, format!("{} left", clock(report.remaining_seconds))),
    ];
    fitting(&fields, width)
}

fn bar(step: usize, total_steps: usize) -> String {
    let done = (BAR - 2) * step.min(total_steps) / total_steps.max(1);
    format!("[{}{}]", "=".repeat(done), " ".repeat(BAR - 2 - done))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report(step: usize, total_steps: usize) -> StepReport {
        StepReport {
            step,
            total_steps,
            epoch: 0.5,
            loss: 1.0,
            mean_loss: 1.0,
            logged: false,
            skipped: None,
            samples: Vec::new(),
            grad_norm: 12.3456,
            accuracy: 0.5,
            learning_rate: 1.25e-4,
            elapsed_seconds: 100.0,
            remaining_seconds: 36_000.0,
            tokens_per_second: 123_456.0,
            total_tokens: 1,
        }
    }

    #[test]
    fn it_never_wraps_and_what_matters_most_goes_last() {
        let all = line(&report(123_456, 1_000_000), 2.34567, Some(72_345_678_901), 200);
        assert_eq!(
            all,
            "step 123456/1000000  [=               ]  loss 2.3457  lr 1.25e-4  norm 12.35  123456 tokens/s  67.4 GiB  10:00:00 left"
        );
        for width in 0..all.len() {
            let line = line(&report(123_456, 1_000_000), 2.34567, Some(72_345_678_901), width);
            assert!(line.chars().count() <= width, "{width}: {line}");
            assert!(width < 19 || line.starts_with("step 123456/1000000"), "{width}: {line}");
            assert!(width < 32 || line.contains("loss 2.3457"), "{width}: {line}");
            assert!(width < 47 || line.ends_with("left"), "{width}: {line}");
        }
        let usual = line(&report(12, 500), 2.34567, Some(712_345_678), 79);
        assert_eq!(usual, "step 12/500  [                ]  loss 2.3457  lr 1.25e-4  10:00:00 left");
        assert_eq!(line(&report(5, 5), 1.0, None, 40), "step 5/5  loss 1.0000  10:00:00 left");
    }

    #[test]
    fn the_first_loss_is_its_own_mean_and_steps_left_out_do_not_count() {
        let mut loss = Smoothed::default();
        assert!((loss.add(4.0) - 4.0).abs() < 1e-12);
        assert!((loss.add(f64::NAN) - 4.0).abs() < 1e-12);
        // (0.9·4 + 2)/1.9
        assert!((loss.add(2.0) - 5.6 / 1.9).abs() < 1e-12);
        assert!((0..200).map(|_| loss.add(1.0)).last().is_some_and(|it| (it - 1.0).abs() < 1e-8));
    }
}
