//! `ferrotune data`: what the model will see, before it is trained on.

use std::io::Write;
use std::sync::Arc;

use anyhow::Context as _;
use ferrotune_data::{Conversation, Role, encode_conversation, mark_conversation};

use crate::Outcome;
use crate::args::DataArgs;
use crate::config::RunConfig;
use crate::console::{Color, Console, thousands};
use crate::run::{DataUse, OpenData, Vocabulary, mark_options, mistake, set_threads};

/// Widest bar of the histogram, in characters.
const BAR: usize = 40;

/// Shows the first samples in two colours, and counts.
pub fn run(args: &DataArgs, console: &Console) -> anyhow::Result<Outcome> {
    let config = RunConfig::load(Some(&args.config), &args.overrides)?;
    config.notes.iter().for_each(|note| console.note(note));
    if config.dataset.is_empty() {
        return Err(mistake(
            &config,
            "dataset",
            "no data set is named; give a path, or a name in dataset_info.json",
        ));
    }
    set_threads(&config);
    let vocabulary = Arc::new(Vocabulary::open(&config, console)?);
    let data = OpenData::open(&config, &vocabulary, DataUse::Show, console)?;
    let mut out = console.out();
    let shown = data.conversations.iter().take(args.samples);
    for (index, (place, conversation)) in shown.enumerate() {
        let title = format!("── sample {} of {} · {place}", index + 1, data.conversations.len());
        write!(out, "{}", Color::Bold.paint(console.color_out, &title))?;
        show(&mut out, conversation, &vocabulary, &config, console)?;
        writeln!(out)?;
    }
    if args.samples > 0 {
        let trained = if console.color_out {
            Color::Green.paint(true, "trained on")
        } else {
            "⟦trained on⟧".to_string()
        };
        writeln!(out, "{trained}, {}\n", Color::Dim.paint(console.color_out, "read only"))?;
    }
    statistics(&mut out, &data, &config)?;
    out.flush()?;
    data.warn(console);
    Ok(Outcome::Done)
}

/// One conversation, token by token, as it is or will be cut.
fn show(
    out: &mut impl Write,
    conversation: &Conversation,
    vocabulary: &Vocabulary,
    config: &RunConfig,
    console: &Console,
) -> anyhow::Result<()> {
    let (tokenizer, template) = (&vocabulary.tokenizer, &vocabulary.template);
    let options = mark_options(config);
    let sample = match encode_conversation(conversation, template, tokenizer, &options) {
        Ok(sample) => sample,
        Err(error) => {
            writeln!(out, "\nleft out: {error}")?;
            return Ok(());
        }
    };
    writeln!(out, " · {} tokens, {} trained", sample.tokens.len(), sample.trained_tokens())?;
    let text_only = conversation.messages.iter().find(|message| message.role == Role::Text);
    let marked = match text_only {
        Some(message) => ferrotune_data::MarkedText { text: message.content.clone(), ..Default::default() },
        None => mark_conversation(conversation, template, tokenizer, &options)?,
    };
    let encoded = tokenizer.encode_segments(&marked.text, &marked.typed)?;
    // A text without roles may begin with a token that is not in it.
    let first = encoded.ids.first();
    let offset = sample.tokens.iter().position(|token| Some(token) == first).unwrap_or(0);
    let mut runs: Vec<(bool, String)> = Vec::new();
    let mut push = |trained: bool, text: &str| match runs.last_mut() {
        Some((last, run)) if *last == trained => run.push_str(text),
        _ => runs.push((trained, text.to_string())),
    };
    let mut at = 0;
    for (range, trained) in encoded.ranges.iter().zip(&sample.trained[offset..]) {
        // Tokens that share a character share its range.
        if range.end > at {
            push(*trained, marked.text.get(at..range.end).context("token ranges cut a character")?);
            at = range.end;
        }
    }
    for (trained, text) in &runs {
        let shown = match (trained, console.color_out) {
            (true, true) => Color::Green.paint(true, text),
            (true, false) => format!("⟦{text}⟧"),
            (false, colored) => Color::Dim.paint(colored, text),
        };
        write!(out, "{shown}")?;
    }
    if !marked.text[..at].ends_with('\n') {
        writeln!(out)?;
    }
    if sample.cut > 0 {
        writeln!(out, "… {} tokens more are cut off", sample.cut)?;
    }
    Ok(())
}

fn statistics(out: &mut impl Write, data: &OpenData, config: &RunConfig) -> anyhow::Result<()> {
    let report = &data.report;
    for (name, format) in &data.sets {
        writeln!(out, "data set  {name} ({format})")?;
    }
    let count = |number: usize| thousands(number as u64);
    writeln!(out, "samples   {}; {} rows left out", count(report.samples), count(report.dropped.len()))?;
    let share = 100.0 * report.trained_share();
    writeln!(
        out,
        "tokens    {}; {} trained ({share:.0} %)",
        count(report.tokens),
        count(report.trained_tokens)
    )?;
    let cut = match report.truncated {
        0 => "none is longer".to_string(),
        samples => format!("{} are cut, {} tokens in all", count(samples), count(report.cut_tokens)),
    };
    writeln!(out, "cutoff    {}; {cut}", count(config.cutoff_len))?;
    let rows = if config.packs() { report.tokens.div_ceil(config.cutoff_len) } else { report.samples };
    let step = config.per_device_train_batch_size * config.gradient_accumulation_steps;
    let steps_per_epoch =
        rows.div_ceil(config.per_device_train_batch_size).div_ceil(config.gradient_accumulation_steps);
    let about = if config.packs() { "about " } else { "" };
    writeln!(
        out,
        "steps     {about}{} of {step} {}",
        thousands(config.total_steps(steps_per_epoch)),
        if config.packs() { "packed rows" } else { "samples" }
    )?;
    let quantile = |share: f64| count(report.quantile(share));
    writeln!(
        out,
        "lengths   {} shortest, {} median, {} for 95 % of samples, {} longest",
        quantile(0.0),
        quantile(0.5),
        quantile(0.95),
        quantile(1.0)
    )?;
    let bars = report.histogram(12);
    let empty = bars.iter().take_while(|bar| bar.samples == 0).count();
    let bars = &bars[empty..];
    let highest = bars.iter().map(|bar| bar.samples).max().unwrap_or(0).max(1);
    let width = bars.last().map_or(0, |bar| count(bar.to).len());
    for bar in bars {
        // A bar that stands for anything is seen.
        let length = (bar.samples * BAR).div_ceil(highest);
        let to = count(bar.to - 1);
        writeln!(
            out,
            "{:>width$} – {to:<width$} {} {}",
            count(bar.from),
            "█".repeat(length),
            count(bar.samples)
        )?;
    }
    Ok(())
}
