//! `ferrotune watch`: the curve of a run on the terminal, while it goes on and afterwards.

use std::io::IsTerminal as _;
use std::path::Path;
use std::time::Duration;

use anyhow::Context as _;
use ratatui::Frame;
use ratatui::crossterm::event::{self, Event, KeyCode, KeyModifiers};
use ratatui::layout::{Constraint, Layout};
use ratatui::style::{Color, Style};
use ratatui::symbols::Marker;
use ratatui::text::{Line, Span};
use ratatui::widgets::{Axis, Block, Chart, Dataset, GraphType, Paragraph};

use crate::Outcome;
use crate::args::WatchArgs;
use crate::console::{Console, Usage, fitting};
use crate::plot::{smoothed, value_range};
use crate::run_log::RunLog;

/// How often the log is read again.
const PAUSE: Duration = Duration::from_millis(500);

/// Draws until a key ends it.
pub fn run(args: &WatchArgs, _console: &Console) -> anyhow::Result<Outcome> {
    if !std::io::stdout().is_terminal() {
        return Err(Usage::one("`watch` draws on a terminal; `ferrotune runs` prints lines").into());
    }
    let read = || {
        RunLog::read(&args.folder)
            .with_context(|| format!("{}: no run, there is no log", args.folder.display()))
    };
    let mut log = read()?;
    let mut terminal = ratatui::try_init().context("can't draw on this terminal")?;
    let watched = loop {
        if let Err(error) = terminal.draw(|frame| draw(frame, &args.folder, &log)) {
            break Err(error.into());
        }
        match event::poll(PAUSE).and_then(|there| there.then(event::read).transpose()) {
            Ok(Some(Event::Key(key))) => {
                let interrupted =
                    key.code == KeyCode::Char('c') && key.modifiers.contains(KeyModifiers::CONTROL);
                if interrupted || matches!(key.code, KeyCode::Char('q') | KeyCode::Esc) {
                    break Ok(Outcome::Done);
                }
            }
            Ok(_) => {}
            Err(error) => break Err(error.into()),
        }
        match read() {
            Ok(again) => log = again,
            Err(error) => break Err(error),
        }
    };
    ratatui::restore();
    watched
}

fn draw(frame: &mut Frame, folder: &Path, log: &RunLog) {
    let [head, body, foot] =
        Layout::vertical([Constraint::Length(2), Constraint::Min(5), Constraint::Length(1)])
            .areas(frame.area());
    let number = |key: &str| log.last[key].as_f64();
    let last = |curve: &[(f64, f64)]| curve.last().map(|it| it.1);
    let shown = |value: Option<f64>, show: fn(f64) -> String| value.map_or_else(String::new, show);
    let left = log.last["remaining_time"].as_str();
    let facts = [
        (0, format!("step {}", log.progress())),
        (1, shown(last(&log.losses), |it| format!("loss {it:.4}"))),
        (3, shown(last(&log.evaluations), |it| format!("eval loss {it:.4}"))),
        (4, shown(number("lr"), |it| format!("lr {it:.2e}"))),
        (6, shown(number("grad_norm"), |it| format!("norm {it:.2}"))),
        (5, shown(number("throughput"), |it| format!("{it:.0} tokens/s"))),
        (2, left.map_or_else(String::new, |it| format!("{it} left"))),
    ];
    let facts = fitting(&facts, usize::from(head.width));
    let title = format!("{}: {}", folder.display(), log.state);
    frame.render_widget(Paragraph::new(vec![Line::from(title), Line::from(facts)]), head);
    frame.render_widget(Line::from("q leaves"), foot);

    let smooth = smoothed(&log.losses);
    let all = || log.losses.iter().chain(&smooth).chain(&log.evaluations);
    let low = all().map(|it| it.1).fold(f64::MAX, f64::min);
    let high = all().map(|it| it.1).fold(f64::MIN, f64::max);
    let last = all().map(|it| it.0).fold(1.0, f64::max);
    if low > high {
        return frame.render_widget(Paragraph::new("no losses yet"), body);
    }
    let (low, high) = value_range(low, high);
    // Named in the frame, where no curve is.
    let mut title = vec![Span::from("loss: ")];
    let mut curves = Vec::new();
    for (name, color, points) in [
        ("raw", Color::DarkGray, &log.losses),
        ("smoothed", Color::Cyan, &smooth),
        ("evaluation", Color::Yellow, &log.evaluations),
    ] {
        if !points.is_empty() {
            let line = Dataset::default().marker(Marker::Braille).graph_type(GraphType::Line);
            curves.push(line.style(Style::default().fg(color)).data(points));
            title.push(Span::styled(format!("{name} "), Style::default().fg(color)));
        }
    }
    let steps = [0.0, last / 2.0, last].map(|it| format!("{it:.0}"));
    let values = [low, (low + high) / 2.0, high].map(|it| format!("{it:.3}"));
    let chart = Chart::new(curves)
        .block(Block::bordered().title(Line::from(title)))
        .legend_position(None)
        .x_axis(Axis::default().title("step").bounds([0.0, last]).labels(steps))
        .y_axis(Axis::default().bounds([low, high]).labels(values));
    frame.render_widget(chart, body);
}

#[cfg(test)]
mod tests {
    use ratatui::Terminal;
    use ratatui::backend::TestBackend;
    use serde_json::json;

    use super::*;
    use crate::run_log::RunState;

    fn drawn(log: &RunLog) -> String {
        drawn_in(log, 100)
    }

    fn drawn_in(log: &RunLog, width: u16) -> String {
        let mut terminal = Terminal::new(TestBackend::new(width, 24)).unwrap();
        terminal.draw(|frame| draw(frame, Path::new("out/bakery"), log)).unwrap();
        terminal.backend().to_string()
    }

    #[test]
    fn curves_and_facts_are_drawn() {
        let log = RunLog {
            losses: (1..=20).map(|step| (f64::from(step), 3.0 / f64::from(step))).collect(),
            evaluations: vec![(10.0, 1.5), (20.0, 1.25)],
            last: json!({ "current_steps": 20, "total_steps": 40, "lr": 1e-4, "grad_norm": 0.5, "throughput": 180.2, "remaining_time": "0:00:09" }),
            state: RunState::Running("process 7".to_string()),
        };
        let text = drawn(&log);
        for part in [
            "out/bakery: running (process 7)",
            "step 20/40  loss 0.1500  eval loss 1.2500  lr 1.00e-4  norm 0.50  180 tokens/s  0:00:09 left",
            "loss: raw smoothed evaluation",
            "q leaves",
        ] {
            assert!(text.contains(part), "{part} is not in\n{text}");
        }
        let braille = text.chars().filter(|it| ('\u{2801}'..='\u{28FF}').contains(it)).count();
        assert!(braille > 20, "{text}");
        let range = value_range(0.1, 3.0);
        assert!(range.0 == 0.0 && range.1 > 3.1 && value_range(-1.0, 3.0).0 < -1.1, "{range:?}");
        let one = value_range(2.5, 2.5);
        assert!(one.0 < 2.46 && one.1 > 2.54, "labels differ: {one:?}");
        // Fields go, from a line that would be cut.
        let narrow = drawn_in(&log, 50);
        assert!(narrow.contains("step 20/40  loss 0.1500  0:00:09 left"), "{narrow}");
        let (losses, evaluations) = (Vec::new(), Vec::new());
        let nothing = RunLog { losses, evaluations, last: json!({}), state: RunState::Stopped(None) };
        assert!(drawn(&nothing).contains("no losses yet"));
    }
}
