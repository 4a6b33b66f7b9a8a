//! A run opened and checked: everything that can be found wrong is, before the first step.
//!
//! What is cheap to check comes first: keys, folders, the model's header, its tokenizer and chat
//! template, the data, and last the memory. The crates get plain values out of here, never the config.

mod adapters;
mod data;
mod decoder;
mod hub;
mod kept;
mod kernels;
mod model;
mod saved;
mod trained;

use std::fs;
use std::path::PathBuf;

use anyhow::{Context as _, bail};
use ferrotune_data::{BatchSource, Batches, StreamedBatches};
use ferrotune_export::PeftAdapter;
use ferrotune_model::BuildOptions;
use ferrotune_model::source::ModelFiles;
use ferrotune_model::spec::{BaseWeights, MemoryEstimate, MemoryPlan, ModelSpec, TensorSpec, names};
use ferrotune_tensor::product::bf16_products;
use ferrotune_tensor::{DType, Device, Precision};
use ferrotune_trainer::{LOCK_FILE, RunLock, checkpoints, newest_checkpoint, verify_checkpoint};

use crate::config::{FinetuningType, QuantizationBit, Recompute, Resume, RunConfig};
use crate::console::{Console, Usage, bytes};
use crate::machine;

use adapters::adapter_to_train;

pub use adapters::{merge_all, read_adapter};
pub use data::{DataUse, OpenData, mark_options, warn_of_rows};
pub use decoder::{Adapters, Subtracted, build_decoder, build_quantised, lora_tensors, open_decoder};
pub use hub::{download_bar, hub_options};
pub use kept::wait_for_writers;
pub use model::{OpenModel, TemplateSource, UntemplatedModel, Vocabulary, model_spec, template_source};
pub use trained::{check_trained, is_trained, load_trained, prepare, save_trained};

/// What the base model's files say, before anything is changed for a run.
#[derive(Clone, Copy, Debug)]
pub struct Unchanged {
    /// Rows of the embedding.
    pub vocab_size: usize,
    /// Embedding and head are one.
    pub tied: bool,
}

/// A training run, opened and checked.
pub struct Run {
    /// What was typed.
    pub config: RunConfig,
    /// Where the run is written; it exists.
    pub output_dir: PathBuf,
    /// The checkpoint to go on from.
    pub resume_from: Option<PathBuf>,
    /// What computes, and in which type.
    pub computing: BuildOptions,
    /// The base model's files, tokenizer and chat template.
    pub model: OpenModel,
    /// Its vocabulary as the files have it.
    pub unchanged: Unchanged,
    /// The adapter that training goes on with.
    pub adapter: Option<Box<PeftAdapter>>,
    /// The samples.
    pub data: OpenData,
    /// What is evaluated on.
    pub evaluation: Option<OpenData>,
    /// Keeps other runs out of `output_dir`.
    _lock: RunLock,
}

impl Run {
    /// Opens and checks everything that training needs; what is only doubtful is said on the console.
    ///
    /// # Errors
    /// At the first thing that is missing or wrong, cheapest checks first.
    pub fn open(mut config: RunConfig, console: &Console) -> anyhow::Result<Run> {
        config.notes.iter().for_each(|note| console.note(note));
        if config.dataset.is_empty() {
            return Err(mistake(
                &config,
                "dataset",
                "no data set is named; give a path, or a name in dataset_info.json",
            ));
        }
        let (output_dir, resume_from) = output(&config, console)?;
        // Known early where the folder is there; else it is made when all has been checked.
        let lock = output_dir.is_dir().then(|| RunLock::take(&output_dir)).transpose()?;
        set_threads(&config);
        let computing = open_device(&config, console)?;
        let model = OpenModel::open(&config, console)?;
        say_four_bits(&config, &model.files, console);
        let ModelSpec { vocab_size, tie_word_embeddings: tied, .. } = model.files.spec;
        let unchanged = Unchanged { vocab_size, tied };
        let (model, adapter) = adapter_to_train(&mut config, model, console)?;
        let adapter = adapter.map(Box::new);
        let model = prepare(&mut config, model, console)?;
        let tokens = model.files.spec.vocab_size;
        check_trained(&config, &model)?;
        let mut data = OpenData::open(&config, &model.vocabulary, DataUse::Train(tokens), console)?;
        data.warn(console);
        let evaluation = OpenData::open_evaluation(&config, &model.vocabulary, tokens, console)?;
        let evaluation = evaluation.or_else(|| data.take_evaluation());
        evaluation.iter().for_each(|it| it.warn(console));
        check_fit(&config, &model, &data, console)?;
        let plan = memory_plan(&config, &model.files, &computing, data.longest_batch(&config));
        check_memory(&model.files.spec.memory(&plan), &computing, console)?;
        fs::create_dir_all(&output_dir).with_context(|| format!("can't create {}", output_dir.display()))?;
        let lock = lock.map_or_else(|| RunLock::take(&output_dir), Ok)?;
        Ok(Run {
            config,
            output_dir,
            resume_from,
            computing,
            model,
            unchanged,
            adapter,
            data,
            evaluation,
            _lock: lock,
        })
    }

    /// The batches of the run; takes the samples out of `data`.
    ///
    /// # Errors
    /// When a sample does not fit its pack.
    pub fn batches(&mut self) -> anyhow::Result<RunBatches> {
        if let Some(stream) = self.data.stream.take() {
            return Ok(RunBatches::Streamed(Box::new(stream)));
        }
        let samples = std::mem::take(&mut self.data.samples);
        Ok(RunBatches::InMemory(Batches::new(samples, data::batch_options(&self.config))?))
    }
}

/// Says what becomes of weights that bitsandbytes has put into 4 bits, where that may not be expected.
fn say_four_bits(config: &RunConfig, files: &ModelFiles, console: &Console) {
    let Some(kind) = &files.four_bit else { return };
    if config.quantization_bit.is_some() {
        console.note("`quantization_bit`: the model is in 4 bits already, and is taken as it is");
    }
    if !kind.is_nf4() {
        console.note(format!(
            "the model's {} weights are kept in 16 or 32 bits while it trains",
            kind.quant_type
        ));
    }
}

/// The batches of a run.
pub enum RunBatches {
    /// Of samples that are all there.
    InMemory(Batches),
    /// Made as they are needed.
    Streamed(Box<StreamedBatches>),
}

impl RunBatches {
    /// What the trainer takes them from.
    pub fn source(&mut self) -> &mut dyn BatchSource {
        match self {
            RunBatches::InMemory(batches) => batches,
            RunBatches::Streamed(batches) => batches.as_mut(),
        }
    }

    /// Optimizer steps in an epoch; of a stream nobody knows, and `max_steps` counts.
    pub fn steps_per_epoch(&self, gradient_accumulation_steps: usize) -> usize {
        match self {
            RunBatches::InMemory(batches) => batches.steps_per_epoch(gradient_accumulation_steps),
            RunBatches::Streamed(_) => usize::MAX,
        }
    }
}

/// A mistake in a key, with its place.
pub fn mistake(config: &RunConfig, key: &str, message: &str) -> anyhow::Error {
    Usage::one(format!("{}`{key}`: {message}", config.place(key))).into()
}

/// Limits the threads of the process, where the config does.
pub fn set_threads(config: &RunConfig) {
    if let Some(threads) = config.num_threads {
        // It fails only when a pool is there already, which then keeps its size.
        let _ = rayon::ThreadPoolBuilder::new().num_threads(threads).build_global();
    }
}

/// Opens the device and chooses how it computes.
///
/// # Errors
/// When the device can't be used, or can't compute in the type asked for.
pub fn open_device(config: &RunConfig, console: &Console) -> anyhow::Result<BuildOptions> {
    let device = match Device::open(&config.device) {
        Ok(device) => device,
        Err(error) => bail!("{}{error}", config.place("device")),
    };
    let Some(gpu) = device.gpu() else {
        if config.fp16 {
            let message =
                "training in f16 needs a GPU, and this runs on the cpu; use `bf16: true`, or leave both out";
            return Err(mistake(config, "fp16", message));
        }
        if config.bf16 && bf16_products().is_none() {
            console.note("`bf16`: this cpu multiplies bf16 no faster; products are computed in f32");
        }
        let precision = if config.bf16 { Precision::Bf16 } else { Precision::Full };
        return Ok(BuildOptions { precision, dtype: DType::F32, device });
    };
    if config.bf16 && !gpu.has_bf16() {
        let message = format!("{} has no bf16; use `fp16: true`, or leave both out", gpu.name);
        return Err(mistake(config, "bf16", &message));
    }
    let refused = |key: &str| config.places.contains_key(key);
    let dtype = match (config.bf16, config.fp16) {
        (true, _) => DType::BF16,
        (_, true) => DType::F16,
        _ if gpu.has_bf16() && !refused("bf16") => DType::BF16,
        _ if !gpu.has_bf16() && !refused("fp16") => DType::F16,
        _ => DType::F32,
    };
    tracing::info!("{gpu:?} computes in {dtype:?}; products by {}", gpu.products());
    Ok(BuildOptions { precision: Precision::Full, dtype, device })
}

/// The folder to write into, and the checkpoint to go on from.
fn output(config: &RunConfig, console: &Console) -> anyhow::Result<(PathBuf, Option<PathBuf>)> {
    let Some(folder) = config.output_dir.clone() else {
        return Err(mistake(config, "output_dir", "no folder is named to write the run into"));
    };
    let wrong = |message: String| Err(mistake(config, "output_dir", &message));
    if folder.exists() && !folder.is_dir() {
        return wrong(format!("`{}` is a file, expected a folder", folder.display()));
    }
    let newest = || {
        let newest = newest_checkpoint(&folder);
        newest.damaged.iter().for_each(|error| console.warn(format!("{error}; looking for an older one")));
        newest.whole
    };
    let resume_from = match &config.resume_from_checkpoint {
        Resume::No => None,
        Resume::Auto => newest(),
        Resume::Newest => {
            let Some(newest) = newest() else {
                let message = format!(
                    "`{}` has no whole checkpoint to go on from; `auto` starts anew in that case",
                    folder.display()
                );
                return Err(mistake(config, "resume_from_checkpoint", &message));
            };
            Some(newest)
        }
        Resume::From(checkpoint) if checkpoint.is_dir() => {
            verify_checkpoint(checkpoint)?;
            Some(checkpoint.clone())
        }
        Resume::From(checkpoint) => {
            let message = format!("there is no folder `{}`", checkpoint.display());
            return Err(mistake(config, "resume_from_checkpoint", &message));
        }
    };
    let empty = match fs::read_dir(&folder) {
        Ok(entries) => entries.flatten().all(|it| it.file_name() == LOCK_FILE),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => true,
        Err(error) => return wrong(format!("can't read `{}`: {error}", folder.display())),
    };
    // A run that ended before its first checkpoint starts anew by itself; a finished one is kept.
    let unfinished = config.resume_from_checkpoint == Resume::Auto
        && ["adapter_config.json", "config.json"].iter().all(|it| !folder.join(it).exists());
    if !empty && !config.overwrite_output_dir && resume_from.is_none() && !unfinished {
        let go_on = match checkpoints(&folder).is_empty() {
            false => ", or go on with `resume_from_checkpoint: true`",
            true => "",
        };
        let folder = folder.display();
        return wrong(format!(
            "`{folder}` is not empty; name another folder, or set `overwrite_output_dir: true` to train anew{go_on}"
        ));
    }
    Ok((folder, resume_from))
}

/// Checks model and data against each other.
fn check_fit(
    config: &RunConfig,
    model: &OpenModel,
    data: &OpenData,
    console: &Console,
) -> anyhow::Result<()> {
    let spec = &model.files.spec;
    let highest = data.samples.iter().flat_map(|sample| &sample.tokens).max().copied().unwrap_or(0);
    if highest as usize >= spec.vocab_size {
        bail!("{}", data::unknown_token(highest, spec.vocab_size));
    }
    let longest = data.report.lengths.last().copied().unwrap_or(0);
    if longest > spec.max_position_embeddings {
        console.warn(format!(
            "the longest sample has {longest} tokens, and the model was made for {}; `cutoff_len` is {}",
            spec.max_position_embeddings, config.cutoff_len
        ));
    }
    Ok(())
}

/// How training uses memory, by the config, with micro-batches of this many tokens.
pub fn memory_plan(
    config: &RunConfig,
    files: &ModelFiles,
    computing: &BuildOptions,
    tokens: usize,
) -> MemoryPlan {
    let base = match (&files.four_bit, config.quantization_bit) {
        (Some(kind), _) if kind.is_nf4() => BaseWeights::FourBit,
        (None, Some(QuantizationBit::Four)) => BaseWeights::FourBit,
        _ => BaseWeights::Whole,
    };
    MemoryPlan {
        base,
        weight_bytes: match computing.precision {
            Precision::Bf16 => 2,
            Precision::Full => computing.dtype.size_in_bytes(),
        },
        lora_rank: if config.finetuning_type == FinetuningType::Lora { config.lora_rank } else { 0 },
        trained_weights: trained_weights(config, &files.spec),
        tokens,
        activation_bytes: computing.dtype.size_in_bytes(),
        recompute: matches!(config.recompute_policy(), Recompute::All | Recompute::Lean | Recompute::Offload),
        host_embedding: computing.device.gpu().is_some()
            && !is_trained(config, files.spec.layers.len(), names::EMBEDDING),
    }
}

/// Weights that are trained themselves.
fn trained_weights(config: &RunConfig, spec: &ModelSpec) -> u64 {
    let trained = |it: &&TensorSpec| is_trained(config, spec.layers.len(), &it.name);
    spec.tensors().iter().filter(trained).map(|it| (it.rows * it.cols) as u64).sum()
}

/// Bytes that the device can still give.
pub fn available_memory(computing: &BuildOptions) -> Option<u64> {
    match computing.device.gpu() {
        Some(gpu) => Some(gpu.available_memory()),
        None => machine::available_memory(),
    }
}

fn check_memory(
    estimate: &MemoryEstimate,
    computing: &BuildOptions,
    console: &Console,
) -> anyhow::Result<()> {
    let Some(available) = available_memory(computing) else { return Ok(()) };
    let weights = estimate.linears + estimate.others + estimate.adapters;
    if weights > available {
        bail!(
            "the model alone takes about {}, and {} of memory are available; take a smaller model, or set `quantization_bit: 4`",
            bytes(weights),
            bytes(available)
        );
    }
    if estimate.total() > available {
        console.warn(format!(
            "training takes about {}, and {} of memory are available; lower `per_device_train_batch_size` or `cutoff_len`, or set `recompute: all`",
            bytes(estimate.total()),
            bytes(available)
        ));
    }
    Ok(())
}
