//! `ferrotune debug`: JSON for bug reports and comparisons.

use std::collections::BTreeMap;
use std::fs;
use std::io::{Read as _, Write as _};
use std::ops::Range;
use std::path::Path;

use anyhow::{Context as _, bail, ensure};
use ferrotune_data::{
    Batch, Conversation, Error, Place, Row, Sample, Template, assistant_spans, encode_conversation, formats,
    mark_conversation,
};
use ferrotune_export::write_tensors;
use ferrotune_nn::{Context, LanguageModel as _};
use ferrotune_tensor::DType;
use ferrotune_trainer::LossScale;
use serde::Deserialize;
use serde_json::{Map, Value, json};

use crate::Outcome;
use crate::args::{GradientsArgs, LogitsArgs, RenderArgs, TokenizeArgs};
use crate::config::RunConfig;
use crate::console::{Console, Usage};
use crate::run::{Vocabulary, lora_tensors, mark_options, open_decoder};

/// `{"input_ids": […], "logits": [[…], …]}`: logits after each token; with `--top`, the likeliest tokens alone, as
/// `[[id, logit], …]`.
pub fn logits(args: &LogitsArgs, console: &Console) -> anyhow::Result<Outcome> {
    let mut config = RunConfig::load(None, &args.overrides)?;
    config.model_name_or_path = Some(args.model.clone());
    config.adapter_name_or_path = args.adapter.clone().or(config.adapter_name_or_path);
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
    config.adapter_name_or_path = Some(args.adapter.clone());
    let (_, mut decoder) = open_decoder(&config, console)?;

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
    write_tensors(&args.output, &lora_tensors(&mut decoder, |it| &it.grad)?)?;
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

/// `{"text": …, "trained": [[start, end], …], "ids": […], "trained_tokens": […]}`: a conversation as the model sees
/// it; spans are in bytes of the text.
pub fn render(args: &RenderArgs, console: &Console) -> anyhow::Result<Outcome> {
    let (conversation, special_tokens) = conversation(&input(args.conversation.as_deref())?)?;
    let mut vocabulary = args.model.as_deref().map(|model| vocabulary(model, console)).transpose()?;
    if let Some(file) = &args.template {
        let source = fs::read_to_string(file).with_context(|| format!("can't read {}", file.display()))?;
        let special = vocabulary.as_ref().map_or(&special_tokens, |it| it.tokenizer.special_tokens());
        let template = Template::new(&file.display().to_string(), &source, special)?;
        match &mut vocabulary {
            Some(vocabulary) => vocabulary.template = template,
            None => return render_text(&conversation, &template, args.generation_prompt, console),
        }
    }
    let Some(vocabulary) = vocabulary else {
        return Err(Usage::one("expected --model or --template").into());
    };
    let Vocabulary { tokenizer, template } = &vocabulary;
    if args.generation_prompt {
        return render_text(&conversation, template, true, console);
    }
    let options = mark_options(&RunConfig { cutoff_len: usize::MAX, ..RunConfig::default() });
    let marked = mark_conversation(&conversation, template, tokenizer, &options)?;
    let (ids, trained) = match encode_conversation(&conversation, template, tokenizer, &options) {
        Ok(sample) => (sample.tokens, sample.trained),
        // Without an answer there is nothing to train on, but still something to see.
        Err(Error::Sample(_)) => {
            let ids = tokenizer.encode_segments(&marked.text, &marked.typed)?.ids;
            let trained = vec![false; ids.len()];
            (ids, trained)
        }
        Err(error) => return Err(error.into()),
    };
    let trained: Vec<u8> = trained.into_iter().map(u8::from).collect();
    let spans = pairs(&marked.trained);
    print(console, &json!({ "text": marked.text, "trained": spans, "ids": ids, "trained_tokens": trained }))
}

/// A conversation without tokens.
fn render_text(
    conversation: &Conversation,
    template: &Template,
    generation_prompt: bool,
    console: &Console,
) -> anyhow::Result<Outcome> {
    let (messages, tools) = (conversation.to_json(None), conversation.tools.as_ref());
    if generation_prompt {
        let rendered = template.render(&messages, tools, true, &Map::new())?;
        return print(console, &json!({ "text": rendered.text }));
    }
    let spans = assistant_spans(template, &messages, tools, &Map::new())?;
    let ranges: Vec<Range<usize>> = spans.turns.iter().map(|turn| turn.range.clone()).collect();
    print(console, &json!({ "text": spans.text, "trained": pairs(&ranges) }))
}

fn pairs(ranges: &[Range<usize>]) -> Vec<[usize; 2]> {
    ranges.iter().map(|range| [range.start, range.end]).collect()
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

/// A row of any format there is, or a bare list of messages; beside it `special_tokens` for templates without a model.
fn conversation(text: &str) -> anyhow::Result<(Conversation, BTreeMap<String, String>)> {
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
    let rows = [Row { place: Place::new("conversation", 1), fields }];
    Ok((formats::recognise(&rows)?.conversation(&rows[0])?, special_tokens))
}

fn print(console: &Console, value: &Value) -> anyhow::Result<Outcome> {
    let mut out = console.out();
    writeln!(out, "{value}")?;
    out.flush()?;
    Ok(Outcome::Done)
}
