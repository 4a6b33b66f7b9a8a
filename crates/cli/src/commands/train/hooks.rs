//! What the trainer asks of the program: to save, to tell of a step, to make room.

use std::io::Write as _;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::Context as _;
use ferrotune_export::{ModelCard, SavedAs};
use ferrotune_model::{Decoder, Recompute};
use ferrotune_tensor::{Error, Result, resident_bytes};
use ferrotune_trainer::{Control, EvalReport, EventWriter, LogWriter, RunHooks, Skipped, StepReport};

use super::live::LiveLine;
use crate::INTERRUPTED;
use crate::config::{self, InitLoraWeights};
use crate::console::{Console, clock};
use crate::run::{Run, Subtracted, load_trained, save_trained};

/// Is set by Ctrl-C or a termination signal; a second one ends the process at once.
pub(super) fn interrupted() -> anyhow::Result<Arc<AtomicBool>> {
    let flag = Arc::new(AtomicBool::new(false));
    let set = flag.clone();
    ctrlc::set_handler(move || {
        if set.swap(true, Ordering::SeqCst) {
            std::process::exit(i32::from(INTERRUPTED));
        }
        let _ = writeln!(std::io::stderr(), "\nfinishing the step, then saving; once more to leave at once");
    })
    .context("can't listen for Ctrl-C")?;
    Ok(flag)
}

/// What the trainer can't do itself.
pub(super) struct Hooks<'a> {
    pub(super) run: &'a Run,
    pub(super) subtracted: Subtracted,
    pub(super) console: &'a Console,
    pub(super) live: LiveLine,
    pub(super) log: LogWriter,
    pub(super) events: Option<EventWriter>,
    pub(super) interrupted: Arc<AtomicBool>,
    /// Whether weights stay in a GPU's memory as products read them.
    pub(super) weights_cached: bool,
}

impl RunHooks<Decoder> for Hooks<'_> {
    fn save_model(&mut self, model: &mut Decoder, folder: &Path) -> Result<()> {
        let saved = self.run.model.vocabulary.tokenizer.save(folder);
        saved.map_err(|error| Error::msg(error.to_string()))?;
        let exact = if folder == self.run.output_dir { SavedAs::Stored } else { SavedAs::Trained };
        let (config, base) = (&self.run.config, &self.run.model);
        // Last, with its config at the very end: where that is, the model is whole.
        save_trained(config, base, (model, &self.subtracted), folder, exact, &card(self.run))
    }

    fn report(&mut self, report: &StepReport) -> Result<Control> {
        if report.skipped == Some(Skipped::NotFinite) {
            let places: Vec<String> = report.samples.iter().map(|it| self.run.data.origin(*it)).collect();
            self.console.warn(format!(
                "step {} is left out: its loss is {} and its gradients' norm {}; its samples: {}",
                report.step,
                report.loss,
                report.grad_norm,
                places.join(", ")
            ));
        }
        if report.logged {
            self.log.write(report)?;
            self.events.as_mut().map_or(Ok(()), |events| events.write(report))?;
            if !self.console.shows_progress() && !self.console.quiet {
                self.console.plain(format!(
                    "step {}/{}  loss {:.4}  lr {:.2e}  {:.0} tokens/s  {} left",
                    report.step,
                    report.total_steps,
                    report.mean_loss,
                    report.learning_rate,
                    report.tokens_per_second,
                    clock(report.remaining_seconds)
                ));
            }
        }
        let memory = match self.run.computing.device.gpu() {
            Some(gpu) => Some(gpu.memory().in_use),
            None => resident_bytes(),
        };
        self.live.show(report, memory);
        let stop = self.interrupted.load(Ordering::SeqCst);
        Ok(if stop { Control::Stop } else { Control::Continue })
    }

    fn load_model(&mut self, model: &mut Decoder, folder: &Path) -> Result<()> {
        load_trained(&self.run.config, model, folder)
    }

    fn report_evaluation(&mut self, report: &EvalReport) -> Result<()> {
        self.log.write_evaluation(report)?;
        self.events.as_mut().map_or(Ok(()), |events| events.write_evaluation(report))?;
        let line = format!("step {}/{}  {}", report.step, report.total_steps, evaluation_line(report));
        if self.console.shows_progress() {
            self.live.say(line);
        } else if !self.console.quiet {
            self.console.plain(line);
        }
        Ok(())
    }

    /// First the cache of weights goes; then `recompute: auto` computes half of the blocks that were kept again.
    fn spare_memory(&mut self, model: &mut Decoder, error: &Error) -> bool {
        if std::mem::take(&mut self.weights_cached) {
            model.keep_whole(0);
            self.console.warn(format!("{error}; going on without `weight_cache_gib`"));
            return true;
        }
        let kept = model.recompute.iter().filter(|it| **it == Recompute::Keep).count();
        if kept == 0 || self.run.config.recompute_policy() != config::Recompute::Auto {
            return false;
        }
        let (left, blocks) = (kept / 2, model.recompute.len());
        model.recompute[left..].fill(Recompute::Recompute);
        self.console.warn(format!(
            "{error}; going on with the activations of {left} of {blocks} blocks kept instead of {kept}"
        ));
        true
    }
}

/// An evaluation in a line.
pub fn evaluation_line(report: &EvalReport) -> String {
    format!(
        "eval_loss {:.4}  perplexity {:.3}  token accuracy {:.1} %",
        report.loss,
        report.perplexity(),
        100.0 * report.accuracy
    )
}

fn card(run: &Run) -> ModelCard {
    let config = &run.config;
    let mut training = Vec::new();
    let mut row = |name: &str, value: String| training.push((name.to_string(), value));
    row("Learning rate", config.learning_rate.to_string());
    row("Epochs", config.num_train_epochs.to_string());
    row("Samples in a step", {
        (config.per_device_train_batch_size * config.gradient_accumulation_steps).to_string()
    });
    row("Longest sample", format!("{} tokens", config.cutoff_len));
    if config.pissa_init {
        row("Initialisation", "PiSSA; saved for the unchanged base, with twice the rank".to_string());
    }
    if config.init_lora_weights == InitLoraWeights::Loftq {
        row("Initialisation", "LoftQ: made for the base in NF4, whose losses it makes up for".to_string());
    }
    let base = if config.quantization_bit.is_some() { "4 bits (NF4)" } else { "as stored" };
    row("Base in training", base.to_string());
    if let beneath @ [_, ..] = config.merged_adapters() {
        let names: Vec<String> = beneath.iter().map(|it| it.display().to_string()).collect();
        row("Merged into the base before", names.join(", "));
    }
    let rows = run.model.files.spec.vocab_size;
    let vocab_size = (rows > run.unchanged.vocab_size).then_some(rows);
    ModelCard { title: String::new(), datasets: config.dataset.clone(), vocab_size, training }
}
