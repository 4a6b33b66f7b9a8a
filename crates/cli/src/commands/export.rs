//! `ferrotune export`: the model and its adapter as one, in the formats that other programs read.

mod gguf;
mod ollama;
mod verify;

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use ferrotune_export::{
    FolderOptions, merge, merged_card, rounded, rounded_as_gguf, write_bnb, write_folder, write_whole,
};
use ferrotune_model::source::ModelFiles;
use ferrotune_model::spec::names;
use ferrotune_tensor::DType;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use super::push::Destination;
use crate::Outcome;
use crate::args::ExportArgs;
use crate::config::{ExportFormat, InferDtype, RunConfig};
use crate::console::{Console, bytes};
use crate::run::{UntemplatedModel, mistake, read_adapter, set_threads};
use verify::Logits;

/// Merges, writes, and compares what was written with what it was made of.
pub fn run(args: &ExportArgs, console: &Console) -> anyhow::Result<Outcome> {
    let config = args.chosen.config([
        ("export_dir", args.output.as_ref().map(|path| path.display().to_string())),
        ("export_format", args.format.clone()),
        ("export_verify", args.no_verify.then(|| "false".to_string())),
        ("export_hub_model_id", args.push_to.clone()),
    ])?;
    config.notes.iter().for_each(|note| console.note(note));
    set_threads(&config);
    let model = UntemplatedModel::open(&config, console)?;
    let folder = folder(&config, &model)?;
    let hub = config.export_hub_model_id.as_ref();
    let hub = hub.map(|name| Destination::known(&config, name, "Exported with Ferrotune")).transpose()?;
    export(config, model, &folder, console)?;
    if let Some(hub) = hub {
        hub.send(&folder, console)?;
    }
    Ok(Outcome::Done)
}

/// Writes what the config says into a folder.
fn export(
    mut config: RunConfig,
    mut model: UntemplatedModel,
    folder: &Path,
    console: &Console,
) -> anyhow::Result<()> {
    let experts = model.files.spec.layers.iter().any(|it| it.mlp.experts.is_some());
    if experts && config.export_format == ExportFormat::BnbFourBit {
        console.note(
            "experts stay in 16 bits: transformers stacks them in tensors that bitsandbytes doesn't quantise; \
             GGUF has them in few bits",
        );
    }
    // One that is another model's is named before anything is computed.
    let read = |folder: &PathBuf| read_adapter(folder, &model.files.spec);
    let adapters = config.adapter_name_or_path.iter().map(read).collect::<anyhow::Result<Vec<_>>>()?;
    model.set_template(&config)?;
    // An adapter alone has nothing of the base's weights.
    if config.export_format != ExportFormat::GgufAdapter {
        warn_of_few_bits(&mut config, &model.files, !adapters.is_empty(), console)?;
    }
    let card = merged_card(&model.name, adapters.last());

    if config.export_format == ExportFormat::GgufAdapter {
        let UntemplatedModel { name, files, tokenizer } = &model;
        let [adapter] = adapters.as_slice() else {
            let message = "`gguf-adapter` needs one adapter; give `adapter_name_or_path`, or --adapter";
            return Err(mistake(&config, "export_format", message));
        };
        gguf::write_adapter(folder, name, files, tokenizer, adapter, console)?;
        return Ok(());
    }

    let UntemplatedModel { name, files, tokenizer } = model;
    let (files, expected) = match config.export_verify {
        false => (files, None),
        true => {
            let (files, logits) = Logits::of_live(&config, files, &tokenizer, console)?;
            (files, Some(logits))
        }
    };
    let files = adapters.into_iter().try_fold(files, merge)?;
    tracing::info!("{name}: {} tensors", files.spec.tensors().len());
    if let Some(mix) = gguf::mix(config.export_format) {
        let path = gguf::write_model(folder, &name, &files, &tokenizer, mix, console)?;
        if let Some(expected) = expected {
            let rounded = rounded_as_gguf(files, mix)?;
            expected.rounded_as(&rounded, &config)?.compare(&config, &path, console)?;
        }
        return Ok(());
    }
    // What rounding to few bits comes to is no fault: formats of few bits are compared with the same in memory.
    let (files, expected) = match (expected, config.export_format) {
        (Some(live), ExportFormat::BnbFourBit) => {
            let files = rounded(files, folder_options(&config))?;
            let expected = live.in_four_bits(&config, &files)?;
            (files, Some(expected))
        }
        (expected, _) => (files, expected),
    };
    write(&config, folder, &files, console)?;
    tokenizer.save(folder)?;
    // Older converters read the model of SentencePiece itself.
    let pieces = files.path.join("tokenizer.model");
    if pieces.is_file() && tokenizer.new_tokens().is_empty() {
        fs::copy(&pieces, folder.join("tokenizer.model")).with_context(|| pieces.display().to_string())?;
    }
    write_whole(&folder.join("README.md"), card.as_bytes())?;
    drop(files);
    console.plain(format!("wrote {} ({})", folder.display(), bytes(size_of(folder))));
    if let Some(expected) = expected {
        expected.compare(&config, folder, console)?;
    }
    Ok(())
}

/// The folder to write into: a new or an empty one, unless all in it may go.
fn folder(config: &RunConfig, model: &UntemplatedModel) -> anyhow::Result<PathBuf> {
    let wrong = |message: String| Err(mistake(config, "export_dir", &message));
    let Some(folder) = &config.export_dir else {
        return wrong("no folder is named to write the model into; give one, or --output".to_string());
    };
    let shown = folder.display();
    if folder.exists() && !folder.is_dir() {
        return wrong(format!("`{shown}` is a file, expected a folder"));
    }
    let same = |other: &Path| {
        other.canonicalize().is_ok_and(|other| folder.canonicalize().is_ok_and(|folder| folder == other))
    };
    if same(&model.files.path) || config.adapter_name_or_path.iter().any(|it| same(it)) {
        return wrong(format!("`{shown}` holds what is to be exported; name another folder"));
    }
    let empty = fs::read_dir(folder).map_or(true, |mut entries| entries.next().is_none());
    if !empty && !config.overwrite_output_dir {
        return wrong(format!(
            "`{shown}` is not empty; name another folder, or set `overwrite_output_dir: true`"
        ));
    }
    Ok(folder.clone())
}

/// Merging is exact with the weights that the base model was made with, and with no others.
fn warn_of_few_bits(
    config: &mut RunConfig,
    files: &ModelFiles,
    merges: bool,
    console: &Console,
) -> anyhow::Result<()> {
    if config.quantization_bit.take().is_some() && merges {
        console
            .note("`quantization_bit`: the adapter is merged into the weights of the base model as they are");
    }
    let few = files.source.stored_dtype(&names::weight(0, names::O))?.is_none();
    if few {
        let what = match merges {
            true => "the adapter is merged into what they are read as",
            false => "they are written as what they are read as",
        };
        console.warn(format!(
            "{}: the weights are in few bits; {what}. Name the 16-bit original as the model for an exact result",
            files.path.display()
        ));
    }
    Ok(())
}

fn write(config: &RunConfig, folder: &Path, files: &ModelFiles, console: &Console) -> anyhow::Result<()> {
    let bar = ProgressBar::hidden();
    let style = ProgressStyle::with_template("writing [{bar:30}] {percent} %, {eta} left");
    bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()).progress_chars("=> "));
    if console.shows_progress() {
        bar.set_draw_target(ProgressDrawTarget::stderr());
    }
    let mut progress = |done: u64, total: u64| {
        bar.set_length(total);
        bar.set_position(done);
    };
    let written = match config.export_format {
        ExportFormat::Safetensors => write_folder(folder, files, folder_options(config), &mut progress),
        ExportFormat::BnbFourBit => write_bnb(folder, files, folder_options(config), &mut progress),
        _ => Ok(()), // one file, which `gguf` has written
    };
    bar.finish_and_clear();
    Ok(written?)
}

fn folder_options(config: &RunConfig) -> FolderOptions {
    let dtype = match config.infer_dtype {
        InferDtype::Auto => None,
        InferDtype::Bf16 => Some(DType::BF16),
        InferDtype::F16 => Some(DType::F16),
        InferDtype::F32 => Some(DType::F32),
    };
    FolderOptions { dtype, shard_bytes: (config.export_size * 1e9) as u64 }
}

/// Bytes of the files in a folder.
fn size_of(folder: &Path) -> u64 {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    entries.filter_map(|it| it.metadata().ok()).filter(|it| it.is_file()).map(|it| it.len()).sum()
}
