//! Adapters that were trained before: those that become part of the base, and the one that stays on top.

use std::path::{Path, PathBuf};

use anyhow::Context as _;
use ferrotune_export::{Modules, PeftAdapter, merge, with_saved};
use ferrotune_model::source::ModelFiles;
use ferrotune_model::spec::ModelSpec;

use super::decoder::{lora_config, projections};
use super::{OpenModel, mistake};
use crate::config::{FinetuningType, InitLoraWeights, RunConfig};
use crate::console::Console;

/// What stays on top of the base.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OnTop {
    /// The last one.
    Last,
    /// None of them: a new one will.
    New,
}

/// A model with the adapters that became part of it.
pub struct Taken {
    /// The model.
    pub model: OpenModel,
    /// The one on top.
    pub adapter: Option<PeftAdapter>,
    /// Modules that it has saved whole, which are the model's now.
    pub saved: Vec<String>,
}

/// Merges the adapters that the config names into the model, in their order, but for the one that stays on top.
///
/// # Errors
/// When an adapter is missing, damaged or of another model, or is to be merged into a base in 4 bits.
pub fn take_adapters(config: &RunConfig, mut model: OpenModel, on_top: OnTop) -> anyhow::Result<Taken> {
    let folders = config.adapter_name_or_path.as_slice();
    let (beneath, last) = match (on_top, folders.split_last()) {
        (_, None) => return Ok(Taken { model, adapter: None, saved: Vec::new() }),
        (OnTop::New, Some(_)) => (folders, None),
        (OnTop::Last, Some((last, beneath))) => (beneath, Some(last)),
    };
    if config.quantization_bit.is_some() && !beneath.is_empty() {
        let (key, message) = match on_top {
            OnTop::New => ("create_new_adapter", "a base in 4 bits takes no adapter beneath a new one"),
            OnTop::Last => ("adapter_name_or_path", "a base in 4 bits takes one adapter, not several"),
        };
        let message = format!("{message}; leave `quantization_bit` out, or merge them before");
        return Err(mistake(config, key, &message));
    }
    model.files = merge_all(model.files, beneath)?;
    let Some(last) = last else { return Ok(Taken { model, adapter: None, saved: Vec::new() }) };
    let mut adapter = read_adapter(last, &model.files.spec)?;
    let weights = std::mem::take(&mut adapter.saved);
    let module = |name: &String| name.trim_end_matches(".weight").rsplit('.').next().map(str::to_string);
    let saved = weights.keys().filter_map(module).collect();
    model.files = with_saved(model.files, weights)?;
    Ok(Taken { model, adapter: Some(adapter), saved })
}

/// Adapters become part of a model, one after the other.
///
/// # Errors
/// As [`read_adapter`].
pub fn merge_all(files: ModelFiles, folders: &[PathBuf]) -> anyhow::Result<ModelFiles> {
    folders.iter().try_fold(files, |files, folder| {
        let adapter = read_adapter(folder, &files.spec)?;
        Ok(merge(files, adapter)?)
    })
}

/// An adapter of a model.
///
/// # Errors
/// When it is missing, damaged or of another model.
pub fn read_adapter(folder: &Path, spec: &ModelSpec) -> anyhow::Result<PeftAdapter> {
    let adapter = PeftAdapter::read(folder)?;
    adapter.check_fits(spec).with_context(|| folder.display().to_string())?;
    Ok(adapter)
}

/// The adapter that training goes on with, if there is one. Its own settings become the config's, as PEFT has it.
///
/// # Errors
/// As [`take_adapters`], and where weights are to be trained themselves.
pub fn adapter_to_train(
    config: &mut RunConfig,
    model: OpenModel,
    console: &Console,
) -> anyhow::Result<(OpenModel, Option<PeftAdapter>)> {
    if config.adapter_name_or_path.is_empty() {
        if config.create_new_adapter {
            console
                .note("`create_new_adapter` does nothing: `adapter_name_or_path` names no adapter to merge");
        }
        return Ok((model, None));
    }
    if config.finetuning_type != FinetuningType::Lora {
        let message = "only `finetuning_type: lora` goes on with an adapter; merge it into the model before";
        return Err(mistake(config, "adapter_name_or_path", message));
    }
    let on_top = if config.create_new_adapter { OnTop::New } else { OnTop::Last };
    let Taken { model, adapter, saved } = take_adapters(config, model, on_top)?;
    let merged = config.merged_adapters().len();
    if merged > 0 {
        let few = if merged == 1 { "adapter is" } else { "adapters are" };
        console.note(format!("{merged} {few} merged into the base; the trained one needs that base"));
    }
    if let Some(adapter) = &adapter {
        adopt(config, adapter, saved, &projections(&model.files), console);
    }
    Ok((model, adapter))
}

/// The settings that the adapter was trained with; those that the config gives otherwise are named.
fn adopt(
    config: &mut RunConfig,
    adapter: &PeftAdapter,
    saved: Vec<String>,
    projections: &[String],
    console: &Console,
) {
    let before: Vec<(&str, String)> = config.values();
    config.lora_rank = adapter.r;
    config.lora_alpha = Some(adapter.lora_alpha);
    config.lora_dropout = adapter.lora_dropout;
    config.use_rslora = adapter.use_rslora;
    config.use_dora = adapter.use_dora;
    config.pissa_init = false;
    config.init_lora_weights = InitLoraWeights::Default;
    config.lora_target = names(&adapter.target_modules);
    config.lora_exclude = adapter.exclude_modules.as_ref().map(names).unwrap_or_default();
    config.layers_to_transform = adapter.layers_to_transform.clone();
    let settings = lora_config(config);
    let mut adapted: Vec<&String> = adapter.tensors.iter().map(|it| &it.module).collect();
    adapted.sort_unstable();
    let mut reached: Vec<&String> = projections.iter().filter(|it| settings.adapts(it)).collect();
    reached.sort_unstable();
    if reached != adapted {
        // Patterns and the like: every module by its whole name.
        config.lora_target = adapted.into_iter().cloned().collect();
        config.lora_exclude = Vec::new();
        config.layers_to_transform = Vec::new();
    }
    for module in saved {
        if !config.additional_target.contains(&module) {
            config.additional_target.push(module);
        }
    }
    let after: Vec<(&str, String)> = config.values();
    for ((key, before), (_, after)) in before.iter().zip(&after) {
        if before != after && config.places.contains_key(key) {
            console.note(format!(
                "{}`{key}`: the adapter that training goes on with has {after}, not {before}",
                config.place(key)
            ));
        }
    }
}

fn names(modules: &Modules) -> Vec<String> {
    match modules {
        Modules::Names(names) => names.clone(),
        Modules::Pattern(_) => Vec::new(),
    }
}
