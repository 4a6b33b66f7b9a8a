//! `ferrotune data`: what the model will see, before it is trained on.

mod cost;
mod summary;

use std::io::Write;
use std::sync::Arc;

use ferrotune_data::{Conversation, Fate, Place, Shown, show_conversation};
use serde_json::{Value, json};

use crate::Outcome;
use crate::args::DataArgs;
use crate::config::RunConfig;
use crate::console::{Color, Console};
use crate::run::{DataUse, OpenData, Vocabulary, mark_options, mistake, set_threads};

/// Shows the first samples in colours, and counts.
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
    let cost = cost::Cost::of(&config, &data, console);
    let shown = data.conversations.iter().take(args.samples);
    let shown = shown.map(|(place, conversation)| (place, show(conversation, &vocabulary, &config)));
    let mut out = console.out();
    if args.json {
        let mut value = summary::json(&data, &cost);
        value["shown"] = shown.map(|(place, shown)| sample_json(place, shown)).collect();
        writeln!(out, "{value}")?;
        out.flush()?;
        return Ok(Outcome::Done);
    }
    let colored = console.color_out;
    let (mut any, mut any_cut) = (false, false);
    for (index, (place, shown)) in shown.enumerate() {
        any = true;
        let title = format!("── sample {} of {} · {place}", index + 1, data.conversations.len());
        write!(out, "{}", Color::Bold.paint(colored, &title))?;
        match shown {
            Ok(shown) => {
                any_cut |= shown.sample.cut > 0;
                write_sample(&mut out, &shown, colored)?;
            }
            Err(error) => writeln!(out, "\nleft out: {error}")?,
        }
        writeln!(out)?;
    }
    if any {
        let mut legend = vec![(Fate::Trained, false, "trained on"), (Fate::Read, false, "read only")];
        legend.extend(colored.then_some((Fate::Read, true, "control token")));
        legend.extend(any_cut.then_some((Fate::Cut, false, "cut off")));
        let legend = legend.into_iter().map(|(fate, control, text)| painted(fate, control, text, colored));
        writeln!(out, "{}\n", legend.collect::<Vec<_>>().join(", "))?;
    }
    summary::write(&mut out, &data, &config, &cost)?;
    out.flush()?;
    data.warn(console);
    Ok(Outcome::Done)
}

fn show(
    conversation: &Conversation,
    vocabulary: &Vocabulary,
    config: &RunConfig,
) -> ferrotune_data::Result<Shown> {
    show_conversation(conversation, &vocabulary.template, &vocabulary.tokenizer, &mark_options(config))
}

/// A piece in its colour, or in brackets.
fn painted(fate: Fate, control: bool, text: &str, colored: bool) -> String {
    match (fate, control, colored) {
        (Fate::Trained, true, true) => Color::Yellow.paint(true, text),
        (Fate::Trained, false, true) => Color::Green.paint(true, text),
        (Fate::Read, true, true) => Color::Cyan.paint(true, text),
        (Fate::Read, false, true) => Color::Dim.paint(true, text),
        (Fate::Cut, _, true) => Color::Red.paint(true, text),
        (Fate::Trained, _, false) => format!("⟦{text}⟧"),
        (Fate::Cut, _, false) => format!("⟪{text}⟫"),
        (Fate::Read, _, false) => text.to_string(),
    }
}

/// One sample, as it is or will be cut.
fn write_sample(out: &mut impl Write, shown: &Shown, colored: bool) -> anyhow::Result<()> {
    let sample = &shown.sample;
    let cut = if sample.cut > 0 { format!(", {} cut off", sample.cut) } else { String::new() };
    writeln!(out, " · {} tokens, {} trained{cut}", sample.tokens.len(), sample.trained_tokens())?;
    let mut pieces = shown.pieces.iter().peekable();
    while let Some(piece) = pieces.next() {
        let mut text = piece.text.clone();
        // Without colours, control tokens look as they are.
        while let Some(next) = pieces.next_if(|next| !colored && next.fate == piece.fate) {
            text.push_str(&next.text);
        }
        write!(out, "{}", painted(piece.fate, piece.control, &text, colored))?;
    }
    if !shown.pieces.last().is_some_and(|piece| piece.text.ends_with('\n')) {
        writeln!(out)?;
    }
    Ok(())
}

fn sample_json(place: &Place, shown: ferrotune_data::Result<Shown>) -> Value {
    let mut value = json!({ "place": place.to_string() });
    match shown {
        Err(error) => value["left_out"] = json!(error.to_string()),
        Ok(Shown { sample, pieces }) => {
            let fate = |fate| match fate {
                Fate::Read => "read",
                Fate::Trained => "trained",
                Fate::Cut => "cut",
            };
            let pieces = pieces.iter().map(|piece| {
                json!({ "text": piece.text, "fate": fate(piece.fate), "control": piece.control, "tokens": piece.tokens })
            });
            value["pieces"] = pieces.collect();
            value["trained_tokens"] = json!(sample.trained_tokens());
            value["cut_tokens"] = json!(sample.cut);
            value["ids"] = json!(sample.tokens);
        }
    }
    value
}
