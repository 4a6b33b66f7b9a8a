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
use ratatui::text::Line;
use ratatui::widgets::{Axis, Block, Chart, Dataset, GraphType, Paragraph};

use crate::Outcome;
use crate::args::WatchArgs;
use crate::console::{Console, Usage};
use crate::plot::smoothed;
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
    let mut facts = format!("step {}", log.progress());
    for (name, value) in
        [("loss", log.losses.last().map(|it| it.1)), ("eval loss", log.evaluations.last().map(|it| it.1))]
    {
        facts += &value.map_or_else(String::new, |it| format!("  {name} {it:.4}"));
    }
    facts += &number("lr").map_or_else(String::new, |it| format!("  lr {it:.2e}"));
    facts += &number("grad_norm").map_or_else(String::new, |it| format!("  norm {it:.2}"));
    facts += &number("throughput").map_or_else(String::new, |it| format!("  {it:.0} tokens/s"));
    facts += &log.last["remaining_time"].as_str().map_or_else(String::new, |it| format!("  {it} left"));
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
    let (low, high) = (low - 0.05 * (high - low).max(1e-3), high + 0.05 * (high - low).max(1e-3));
    let curve = |name: &'static str, color, points| {
        let line = Dataset::default().name(name).marker(Marker::Braille).graph_type(GraphType::Line);
        line.style(Style::default().fg(color)).data(points)
    };
    let mut curves =
        vec![curve("raw", Color::DarkGray, &log.losses), curve("smoothed", Color::Cyan, &smooth)];
    if !log.evaluations.is_empty() {
        curves.push(curve("evaluation", Color::Yellow, &log.evaluations));
    }
    let steps = [0.0, last / 2.0, last].map(|it| format!("{it:.0}"));
    let values = [low, (low + high) / 2.0, high].map(|it| format!("{it:.3}"));
    let chart = Chart::new(curves)
        .block(Block::bordered().title("loss"))
        .hidden_legend_constraints((Constraint::Ratio(1, 2), Constraint::Ratio(1, 2)))
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
        let mut terminal = Terminal::new(TestBackend::new(100, 24)).unwrap();
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
            "smoothed",
            "evaluation",
            "q leaves",
        ] {
            assert!(text.contains(part), "{part} is not in\n{text}");
        }
        let braille = text.chars().filter(|it| ('\u{2801}'..='\u{28FF}').contains(it)).count();
        assert!(braille > 20, "{text}");
        let nothing =
            RunLog { losses: Vec::new(), evaluations: Vec::new(), last: json!({}), state: RunState::Stopped };
        assert!(drawn(&nothing).contains("no losses yet"));
    }
}
