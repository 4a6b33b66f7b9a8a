//! `do_predict` and `do_eval`: a model's answers and loss on `eval_dataset`, after training or without any.

use std::fmt::Write as _;
use std::ops::ControlFlow;
use std::path::Path;
use std::time::Instant;

use anyhow::{Context as _, bail};
use ferrotune_data::{Conversation, Role, encode_prompt};
use ferrotune_export::write_whole;
use ferrotune_generate::{GenerateOptions, Sampler, Sampling, generate};
use ferrotune_model::Decoder;
use ferrotune_trainer::evaluate;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde_json::json;

use super::chat::sampling;
use crate::Outcome;
use crate::config::RunConfig;
use crate::console::Console;
use crate::results::{eval_results, write_results};
use crate::run::{OpenData, OpenModel, mark_options, mistake, open_decoder};
use crate::similarity::{Comparer, Similarity};

/// Evaluates and predicts without training (`do_train: false`).
pub fn run(config: &RunConfig, console: &Console) -> anyhow::Result<Outcome> {
    config.notes.iter().for_each(|note| console.note(note));
    if !config.do_eval && !config.do_predict {
        let message = "nothing to do: `do_eval` and `do_predict` are false too";
        return Err(mistake(config, "do_train", message));
    }
    let Some(output_dir) = &config.output_dir else {
        return Err(mistake(config, "output_dir", "no folder is named to write the results into"));
    };
    let (model, decoder) = open_decoder(config, console)?;
    let tokens = model.files.spec.vocab_size;
    let data = OpenData::open_evaluation(config, &model.vocabulary, tokens, console)?;
    let Some(data) = data else {
        return Err(mistake(config, "do_train", "there is nothing to evaluate on; name an `eval_dataset`"));
    };
    data.warn(console);
    std::fs::create_dir_all(output_dir).with_context(|| format!("can't create {}", output_dir.display()))?;
    if config.do_eval {
        evaluate_at_end(config, &decoder, &data, output_dir, console)?;
    }
    if config.do_predict {
        predict(config, &model, &decoder, &data, output_dir, console)?;
    }
    Ok(Outcome::Done)
}

/// Writes `eval_results.json` and says the loss.
pub fn evaluate_at_end(
    config: &RunConfig,
    decoder: &Decoder,
    data: &OpenData,
    output_dir: &Path,
    console: &Console,
) -> anyhow::Result<()> {
    let report = evaluate(decoder, &data.samples, config.per_device_eval_batch_size)?;
    console.note(super::train::evaluation_line(&report));
    write_results(output_dir, "eval", &eval_results(&report))
}

/// Answers the last question of each conversation; writes `generated_predictions.jsonl` and
/// `predict_results.json`.
pub fn predict(
    config: &RunConfig,
    model: &OpenModel,
    decoder: &Decoder,
    data: &OpenData,
    output_dir: &Path,
    console: &Console,
) -> anyhow::Result<()> {
    let started = Instant::now();
    let questions: Vec<(Conversation, &str)> =
        data.conversations.iter().filter_map(|(_, it)| question(it)).collect();
    if questions.is_empty() {
        bail!("`do_predict`: no conversation of `eval_dataset` has an answer to compare with");
    }
    let bar = ProgressBar::with_draw_target(Some(questions.len() as u64), ProgressDrawTarget::hidden());
    let style = ProgressStyle::with_template("predicting {pos}/{len} [{bar:24}] {eta} left");
    bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()).progress_chars("=> "));
    if console.shows_progress() {
        bar.set_draw_target(ProgressDrawTarget::stderr());
    }
    let (comparer, mut lines, mut sum) = (Comparer::new(), String::new(), Similarity::default());
    for (number, (conversation, label)) in questions.iter().enumerate() {
        let (prompt, answer) = answer(config, model, decoder, conversation, number)?;
        let it = comparer.compare(&answer, label);
        sum = Similarity {
            bleu_4: sum.bleu_4 + it.bleu_4,
            rouge_1: sum.rouge_1 + it.rouge_1,
            rouge_2: sum.rouge_2 + it.rouge_2,
            rouge_l: sum.rouge_l + it.rouge_l,
        };
        let _ = writeln!(lines, "{}", json!({ "prompt": prompt, "predict": answer, "label": label }));
        bar.inc(1);
    }
    bar.finish_and_clear();
    write_whole(&output_dir.join("generated_predictions.jsonl"), lines.as_bytes())?;
    let (count, seconds) = (questions.len() as f64, started.elapsed().as_secs_f64());
    let results = json!({
        "predict_bleu-4": sum.bleu_4 / count,
        "predict_rouge-1": sum.rouge_1 / count,
        "predict_rouge-2": sum.rouge_2 / count,
        "predict_rouge-l": sum.rouge_l / count,
        "predict_runtime": seconds,
        "predict_samples_per_second": count / seconds,
        "predict_steps_per_second": count / seconds,
    });
    console.note(format!(
        "{} predictions: BLEU-4 {:.2}, ROUGE-1 {:.2}, ROUGE-2 {:.2}, ROUGE-L {:.2}",
        questions.len(),
        sum.bleu_4 / count,
        sum.rouge_1 / count,
        sum.rouge_2 / count,
        sum.rouge_l / count
    ));
    write_results(output_dir, "predict", &results)
}

/// A conversation up to the model's last turn, and what that says.
fn question(conversation: &Conversation) -> Option<(Conversation, &str)> {
    let last = conversation.messages.iter().rposition(|it| it.role == Role::Assistant)?;
    let messages = conversation.messages[..last].to_vec();
    let before = Conversation { messages, ..conversation.clone() };
    (last > 0).then_some((before, conversation.messages[last].content.as_str()))
}

/// The prompt as the model sees it, and the model's answer.
fn answer(
    config: &RunConfig,
    model: &OpenModel,
    decoder: &Decoder,
    conversation: &Conversation,
    number: usize,
) -> anyhow::Result<(String, String)> {
    let vocabulary = &model.vocabulary;
    let tokenizer = &vocabulary.tokenizer;
    let ids = encode_prompt(conversation, &vocabulary.template, tokenizer, &mark_options(config))?;
    let mut stop_tokens = model.files.spec.eos_token_ids.clone();
    stop_tokens.extend(tokenizer.eos());
    let options = GenerateOptions { max_new_tokens: config.max_new_tokens, stop_tokens, adapters: true };
    // Each answer is drawn by itself.
    let drawn = match sampling(config) {
        Sampling::Random { temperature, top_k, top_p, min_p, seed } => {
            let seed = seed.wrapping_add(number as u64);
            Sampling::Random { temperature, top_k, top_p, min_p, seed }
        }
        greedy => greedy,
    };
    let (mut cache, mut said) = (decoder.cache(), Vec::new());
    generate(decoder, &mut cache, &ids, &options, &mut Sampler::new(drawn), |token| {
        said.push(token);
        ControlFlow::Continue(())
    })?;
    Ok((tokenizer.decode(&ids, false)?, tokenizer.decode(&said, true)?))
}
