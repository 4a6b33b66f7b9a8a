//! `ferrotune debug`: JSON for bug reports and comparisons.

use std::collections::BTreeMap;
use std::fs;
use std::io::{Read as _, Write as _};
use std::path::Path;

use anyhow::{Context as _, bail, ensure};
use ferrotune_data::{
    Batch, Ending, Error, MarkOptions, Now, Place, Row, Sample, Template, encode_conversation, formats,
    mark_conversation, render_conversation,
};
use ferrotune_export::{ModulePlace, write_tensors};
use ferrotune_nn::{Context, LanguageModel as _};
use ferrotune_tensor::DType;
use ferrotune_trainer::LossScale;
use serde::Deserialize;
use serde_json::{Map, Value, json};

use crate::Outcome;
use crate::args::{GradientsArgs, LogitsArgs, RenderArgs, TokenizeArgs};
use crate::config::{RunConfig, TemplateName};
use crate::console::{Console, Usage};
use crate::run::{TemplateSource, Vocabulary, lora_tensors, mark_options, open_decoder, template_source};

/// `{"input_ids": […], "logits": [[…], …]}`: logits after each token; with `--top`, the likeliest tokens alone, as
/// `[[id, logit], …]`.
pub fn logits(args: &LogitsArgs, console: &Console) -> anyhow::Result<Outcome> {
    let mut config = RunConfig::load(None, &args.overrides)?;
    config.model_name_or_path = Some(args.model.clone());
    if let Some(adapter) = &args.adapter {
        config.adapter_name_or_path = vec![adapter.clone()];
    }
    let (_, decoder) = open_decoder(&config, console)?;
    let hidden = decoder.hidden(&Context::new(vec![0, args.ids.len()]), &args.ids)?;
    let logits = decoder.logits(&hidden)?;
    let values = logits.to_f32()?;
    let rows = values.chunks(logits.cols());
    let rows: Vec<Value> = match args.top {
        None => rows.map(|row| json!(row)).collect(),
        Some(top) => rows.map(|row| json!(likeliest(row, top))).collect(),
    };
    print(console, &json!({ "input_ids": args.ids, "logits": rows }))
}

fn likeliest(row: &[f32], top: usize) -> Vec<(usize, f32)> {
    let mut all: Vec<(usize, f32)> = row.iter().copied().enumerate().collect();
    all.sort_by(|a, b| b.1.total_cmp(&a.1));
    all.truncate(top);
    all
}

/// `{"loss": …, "trained_tokens": …}`, and in a file the gradients of this loss, the mean over the trained tokens.
pub fn gradients(args: &GradientsArgs, console: &Console) -> anyhow::Result<Outcome> {
    let batch = labelled(&input(args.sequences.as_deref())?)?;
    let mut config = RunConfig::load(None, &args.overrides)?;
    config.model_name_or_path = Some(args.model.clone());
    config.adapter_name_or_path = vec![args.adapter.clone()];
    let (model, mut decoder) = open_decoder(&config, console)?;

    let ctx = Context::new(batch.sequence_starts.iter().map(|it| *it as usize).collect());
    let (hidden, saved) = decoder.forward(&ctx, &batch.tokens)?;
    let total = batch.trained_tokens() as f64;
    let scale = match decoder.dtype {
        DType::F16 => LossScale::dynamic().value,
        _ => 1.0,
    };
    let dlogp: Vec<f64> = batch.trained.iter().map(|it| if *it { -scale / total } else { 0.0 }).collect();
    let pass = decoder.head_backward(&hidden, &batch.targets, &dlogp)?;
    decoder.backward(&ctx, saved, pass.dhidden.context("the head gave no gradient")?)?;
    for parameter in decoder.parameters() {
        parameter.grad.scale(1.0 / scale)?;
    }
    let gradients = lora_tensors(&mut decoder, |it| &it.grad)?;
    write_tensors(&args.output, ModulePlace::of(&model.files), &gradients, &BTreeMap::new())?;
    let loss: f64 = pass.logp.iter().zip(&dlogp).map(|(logp, dlogp)| logp * dlogp / scale).sum();
    print(console, &json!({ "loss": loss, "trained_tokens": batch.trained_tokens() }))
}

/// Sequences with labels, as transformers has them: −100 where nothing is trained, else the token itself.
fn labelled(text: &str) -> anyhow::Result<Batch> {
    #[derive(Deserialize)]
    struct Sequences {
        sequences: Vec<Sequence>,
    }
    #[derive(Deserialize)]
    struct Sequence {
        ids: Vec<u32>,
        labels: Vec<i64>,
    }
    let read: Sequences = serde_json::from_str(text).context("the sequences")?;
    let mut samples = Vec::new();
    for (n, Sequence { ids, labels }) in read.sequences.into_iter().enumerate() {
        let n = n + 1;
        ensure!(!ids.is_empty(), "sequence {n} has no ids");
        ensure!(ids.len() == labels.len(), "sequence {n} has {} ids and {} labels", ids.len(), labels.len());
        let wrong = ids.iter().zip(&labels).find(|(id, label)| **label != -100 && **label != i64::from(**id));
        if let Some((id, label)) = wrong {
            bail!("sequence {n} has the label {label} for token {id}, expected that or -100");
        }
        let trained = labels.iter().map(|it| *it != -100).collect();
        samples.push(Sample { tokens: ids, trained, ..Sample::default() });
    }
    let batch = Batch::new(&samples);
    ensure!(batch.trained_tokens() > 0, "no label is trained on; the first of each sequence follows nothing");
    Ok(batch)
}

/// `{"ids": […], "tokens": […]}`: ids of a text, and how the vocabulary writes each.
pub fn tokenize(args: &TokenizeArgs, console: &Console) -> anyhow::Result<Outcome> {
    let tokenizer = vocabulary(&args.model, console)?.tokenizer;
    let text = match &args.text {
        Some(text) => text.clone(),
        None => input(None)?,
    };
    let ids = match args.control_tokens {
        true => tokenizer.encode_with_control(&text)?,
        false => tokenizer.encode_plain(&text)?,
    };
    let tokens: Vec<Option<String>> = ids.iter().map(|id| tokenizer.piece(*id)).collect();
    print(console, &json!({ "ids": ids, "tokens": tokens }))
}

/// `{"rendered": …, "spans": [[start, end], …]}`, and with a model `"ids": […], "trained_tokens": […]`: a conversation as
/// the model sees it; spans are what is trained on, in Unicode code points.
pub fn render(args: &RenderArgs, console: &Console) -> anyhow::Result<Outcome> {
    let file = args.conversation.as_deref().or(args.file.as_deref()).filter(|file| *file != Path::new("-"));
    let (value, mut special) = conversation(&input(file)?)?;
    special.extend(
        named(&args.special, "--special")?.map(|(name, token)| (name.to_string(), token.to_string())),
    );
    let variables = named(&args.set, "--set")?;
    let variables: Map<String, Value> = variables
        .map(|(name, text)| {
            (name.to_string(), serde_json::from_str(text).unwrap_or_else(|_| Value::from(text)))
        })
        .collect();
    let now = match &args.now {
        Some(date) => Now::parse(date).ok_or_else(|| {
            Usage::one(format!("--now: `{date}` is no date; expected one such as 2026-01-31"))
        })?,
        None => Now::system(),
    };
    let ending = match (args.add_generation_prompt, args.continue_final_message) {
        (true, _) => Ending::GenerationPrompt,
        (_, true) => Ending::ContinueFinalMessage,
        _ => Ending::Complete,
    };
    let tokenizer = match &args.model {
        Some(model) => Some(vocabulary(model, console)?.tokenizer),
        None => None,
    };
    if let Some(tokenizer) = &tokenizer {
        let own = tokenizer.special_tokens().clone();
        special = own.into_iter().chain(special).collect();
    }
    let template = match (&args.template, &tokenizer) {
        (Some(name), _) => {
            let name =
                TemplateName::from_text(name).map_err(|why| Usage::one(format!("--template: {why}")))?;
            let TemplateSource { name, source, .. } = template_source(&name)?;
            Template::from_value_at(&name, &source, &special, now)?
        }
        (None, Some(tokenizer)) => {
            let source = tokenizer
                .chat_template()
                .context("the model has no chat template; give one with --template")?;
            Template::from_value_at(tokenizer.name(), source, &special, now)?
        }
        (None, None) => return Err(Usage::one("expected --model or --template").into()),
    };
    let messages = value["messages"].as_array().map_or(&[][..], Vec::as_slice);
    let rendered = render_conversation(&template, messages, value.get("tools"), ending, &variables)?;
    let mut printed = json!({ "rendered": rendered.rendered });
    match (&rendered.spans, &rendered.why_no_spans) {
        (Some(spans), _) => {
            printed["spans"] = json!(spans.iter().map(|it| [it.start, it.end]).collect::<Vec<_>>())
        }
        (None, why) => {
            printed["spans"] = Value::Null;
            printed["why_no_spans"] = json!(why);
        }
    }
    if let (Some(tokenizer), Ending::Complete) = (&tokenizer, ending) {
        let rows = [Row { place: Place::new("conversation", 1), fields: value }];
        let conversation = formats::as_written(&rows[0])?;
        let config = RunConfig { cutoff_len: usize::MAX, ..RunConfig::default() };
        let options = MarkOptions { template_variables: variables, ..mark_options(&config) };
        let (ids, trained) = match encode_conversation(&conversation, &template, tokenizer, &options) {
            Ok(sample) => (sample.tokens, sample.trained),
            // Without an answer there is nothing to train on, but still something to see.
            Err(Error::Sample(_)) => {
                let marked = mark_conversation(&conversation, &template, tokenizer, &options)?;
                let ids = tokenizer.encode_segments(&marked.text, &marked.typed)?.ids;
                let trained = vec![false; ids.len()];
                (ids, trained)
            }
            Err(error) => return Err(error.into()),
        };
        printed["ids"] = json!(ids);
        printed["trained_tokens"] = trained.into_iter().map(u8::from).collect();
    }
    print(console, &printed)
}

/// `NAME=VALUE` as it was typed.
fn named<'a>(words: &'a [String], flag: &str) -> anyhow::Result<impl Iterator<Item = (&'a str, &'a str)>> {
    let wrong = words.iter().find(|word| !word.contains('='));
    if let Some(word) = wrong {
        return Err(Usage::one(format!("{flag}: expected NAME=VALUE, not `{word}`")).into());
    }
    Ok(words.iter().filter_map(|word| word.split_once('=')))
}

fn vocabulary(model: &str, console: &Console) -> anyhow::Result<Vocabulary> {
    let config = RunConfig { model_name_or_path: Some(model.to_string()), ..RunConfig::default() };
    Vocabulary::open(&config, console)
}

/// A file, or standard input.
fn input(file: Option<&Path>) -> anyhow::Result<String> {
    match file {
        Some(path) => fs::read_to_string(path).with_context(|| format!("can't read {}", path.display())),
        None => {
            let mut text = String::new();
            std::io::stdin().lock().read_to_string(&mut text).context("can't read standard input")?;
            Ok(text)
        }
    }
}

/// A conversation as its object, with `special_tokens` taken out of it; a bare list is its messages.
///
/// Messages stay as they are written, as for transformers; other formats are brought into that form.
fn conversation(text: &str) -> anyhow::Result<(Map<String, Value>, BTreeMap<String, String>)> {
    let value: Value = serde_json::from_str(text).context("the conversation is not JSON")?;
    let mut fields = match value {
        Value::Object(fields) => fields,
        messages => Map::from_iter([("messages".to_string(), messages)]),
    };
    let special_tokens = match fields.remove("special_tokens") {
        Some(tokens) => {
            serde_json::from_value(tokens).context("`special_tokens`: expected names with texts")?
        }
        None => BTreeMap::new(),
    };
    if !fields.get("messages").is_some_and(Value::is_array) {
        let rows = [Row { place: Place::new("conversation", 1), fields }];
        let read = formats::as_written(&rows[0])?;
        fields = Map::from_iter([("messages".to_string(), Value::from(read.to_json(None)))]);
        fields.extend(read.tools.map(|tools| ("tools".to_string(), tools)));
    }
    Ok((fields, special_tokens))
}

fn print(console: &Console, value: &Value) -> anyhow::Result<Outcome> {
    let mut out = console.out();
    writeln!(out, "{value}")?;
    out.flush()?;
    Ok(Outcome::Done)
}
