//! What is trained, and its numbers to files and back.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use ferrotune_export::{LoraTensors, ModelCard, PeftAdapter, SavedAs, write_model};
use ferrotune_model::Decoder;
use ferrotune_model::source::{FileKind, NewRows, Replacement, SafetensorsSource, WeightSource as _};
use ferrotune_model::spec::{CheckpointForm, names};
use ferrotune_nn::{LanguageModel as _, Parameter};
use ferrotune_tensor::{DType, Error, Result, Tensor};

use super::decoder::{Subtracted, lora_config, projections};
use super::saved::{peft_adapter, split_pissa};
use super::{OpenModel, mistake};
use crate::config::{FinetuningType, RunConfig};
use crate::console::{Console, Usage};

/// Whether a weight of this canonical name is trained itself, by the config.
pub fn is_trained(config: &RunConfig, layers: usize, name: &str) -> bool {
    match config.finetuning_type {
        FinetuningType::Lora => saves(config, name),
        FinetuningType::Full => true,
        FinetuningType::Freeze => is_thawed(config, layers, name),
    }
}

/// Whether a module is trained and saved whole beside adapters; with a vocabulary that grows, both are unless
/// others are named, as LLaMA-Factory does it.
fn saves(config: &RunConfig, name: &str) -> bool {
    let module = name.trim_end_matches(".weight").rsplit('.').next().unwrap_or_default();
    match config.additional_target.is_empty() {
        true => config.resize_vocab && [names::EMBEDDING, names::HEAD].contains(&name),
        false => config.additional_target.iter().any(|it| it == module),
    }
}

/// Gives the model what training needs beyond its files: a head of its own, where embedding and head are one and
/// one of them is trained beside adapters (as PEFT does), and rows for new tokens.
///
/// # Errors
/// Naming the key.
pub fn prepare(config: &mut RunConfig, mut model: OpenModel, console: &Console) -> anyhow::Result<OpenModel> {
    let new = model.vocabulary.tokenizer.new_tokens();
    let lora = config.finetuning_type == FinetuningType::Lora;
    if !new.is_empty() && !config.resize_vocab {
        console.note("`resize_vocab`: tokens were added, so it is true");
        config.resize_vocab = true;
    }
    let saves_both = [names::EMBEDDING, names::HEAD].iter().all(|it| saves(config, it));
    if lora && !new.is_empty() && !saves_both {
        let message = "added tokens need embed_tokens and lm_head, both; name both, or leave the key out";
        return Err(mistake(config, "additional_target", message));
    }
    let (stored, tied) = (model.files.spec.vocab_size, model.files.spec.tie_word_embeddings);
    let ids: Vec<usize> =
        new.iter().filter_map(|it| Some(model.vocabulary.tokenizer.token_to_id(it)? as usize)).collect();
    let needed = ids.iter().max().map_or(0, |it| it + 1);
    // LLaMA-Factory's multiple.
    let rows = if needed > stored { needed.next_multiple_of(64) } else { stored };
    let also: Vec<usize> = ids.into_iter().filter(|it| *it < stored).collect();
    let grown = |of: &str| {
        let rows = NewRows { of: of.to_string(), rows, also: also.clone(), seed: config.seed };
        match needed {
            0 => Replacement::Other(of.to_string()),
            _ => Replacement::Rows(rows),
        }
    };
    let untied = tied && lora && (saves(config, names::EMBEDDING) || saves(config, names::HEAD));
    let mut changes = BTreeMap::new();
    if needed > 0 {
        changes.insert(names::EMBEDDING.to_string(), grown(names::EMBEDDING));
    }
    if untied {
        changes.insert(names::HEAD.to_string(), grown(names::EMBEDDING));
    } else if !tied && needed > 0 {
        changes.insert(names::HEAD.to_string(), grown(names::HEAD));
    }
    if needed > stored {
        console.note(format!("the vocabulary grows from {stored} to {rows} rows"));
    }
    if !changes.is_empty() {
        model.files = model.files.change(changes)?;
    }
    Ok(model)
}

/// LLaMA-Factory's freeze-tuning: the last layers (the first, where the number is negative), or some of
/// their modules, and extra ones outside of the layers.
fn is_thawed(config: &RunConfig, layers: usize, name: &str) -> bool {
    let Some((layer, rest)) = name.strip_prefix("model.layers.").and_then(|it| it.split_once('.')) else {
        return config.freeze_extra_modules.iter().any(|it| name.split('.').any(|part| part == it));
    };
    let layer: usize = layer.parse().unwrap_or(usize::MAX);
    let count = usize::try_from(config.freeze_trainable_layers.unsigned_abs()).unwrap_or(layers).min(layers);
    let chosen = match config.freeze_trainable_layers > 0 {
        true => layers - count..layers,
        false => 0..count,
    };
    let modules = &config.freeze_trainable_modules;
    chosen.contains(&layer) && modules.iter().any(|it| it == "all" || rest.split('.').next() == Some(it))
}

/// Checks that the config's way of training goes with the model, and that its modules are there.
///
/// # Errors
/// Naming the key.
pub fn check_trained(config: &RunConfig, model: &OpenModel) -> anyhow::Result<()> {
    if config.finetuning_type == FinetuningType::Lora {
        // Its message names the key, which may be another than lora_target.
        let checked = lora_config(config).check(&projections(&model.files));
        return checked.map_err(|error| Usage::one(error.to_string()).into());
    }
    if model.files.kind != FileKind::Folder {
        let message = format!(
            "training whole weights needs a model folder as Hugging Face lays it out, and the model is a GGUF file, {}; \
             name a folder (with another `cache_dir`, a name is fetched anew), or use `finetuning_type: lora`",
            model.files.path.display()
        );
        return Err(mistake(config, "finetuning_type", &message));
    }
    if model.files.four_bit.is_some() {
        let message = "weights in 4 bits can't be trained themselves; use `finetuning_type: lora`, or the 16-bit original";
        return Err(mistake(config, "finetuning_type", message));
    }
    if model.files.spec.checkpoint != CheckpointForm::Canonical {
        let message = format!(
            "training whole weights of the family {} is not there yet, LoRA is: its checkpoints have a form that \
             can be read but not yet written",
            model.files.spec.family
        );
        return Err(mistake(config, "finetuning_type", &message));
    }
    if config.finetuning_type == FinetuningType::Freeze {
        let names = model.files.source.names();
        let inside = |module: &String| names.iter().any(|it| it.split('.').nth(3) == Some(module));
        if let Some(module) = config.freeze_trainable_modules.iter().find(|it| *it != "all" && !inside(it)) {
            let message = format!("`{module}` is no module of a layer; there are self_attn, mlp and norms");
            return Err(mistake(config, "freeze_trainable_modules", &message));
        }
        let outside = |module: &String| {
            names.iter().any(|it| !it.contains(".layers.") && it.split('.').any(|part| part == module))
        };
        if let Some(module) = config.freeze_extra_modules.iter().find(|it| !outside(it)) {
            let message =
                format!("`{module}` is no module beside the layers; there are embed_tokens, norm, lm_head");
            return Err(mistake(config, "freeze_extra_modules", &message));
        }
    }
    Ok(())
}

/// Writes what was trained: an adapter, or the whole model.
///
/// # Errors
/// When a file can't be written.
pub fn save_trained(
    config: &RunConfig,
    base: &OpenModel,
    (model, subtracted): (&mut Decoder, &Subtracted),
    folder: &Path,
    saved_as: SavedAs,
    card: &ModelCard,
) -> Result<()> {
    if config.finetuning_type == FinetuningType::Lora {
        return peft_adapter(config, base, model, subtracted)?.write(folder, card);
    }
    let trained = model.parameters().into_iter().map(|it| Ok((it.name.clone(), it.value.to_cpu()?)));
    write_model(folder, &base.files, &trained.collect::<Result<BTreeMap<_, _>>>()?, saved_as)
}

/// Puts the numbers of a folder that [`save_trained`] wrote into the model's parameters.
///
/// # Errors
/// When a file is damaged, or holds other parameters than the model has.
pub fn load_trained(config: &RunConfig, model: &mut Decoder, folder: &Path) -> Result<()> {
    if config.finetuning_type != FinetuningType::Lora {
        let source = SafetensorsSource::open_file(&folder.join("model.safetensors"))?;
        return model
            .parameters()
            .into_iter()
            .try_for_each(|parameter| set(parameter, source.get(&parameter.name)?.into_dense()?));
    }
    let mut adapter = PeftAdapter::read(folder)?;
    if config.pissa_init {
        let trained = adapter.tensors.into_iter().map(|it| Ok(split_pissa(it, config.lora_rank)?.0));
        adapter.tensors = trained.collect::<Result<_>>()?;
    }
    let tensors = adapter.tensors.into_iter().flat_map(|LoraTensors { module, a, b, magnitude }| {
        let magnitude = magnitude.map(|it| (format!("{module}.lora_magnitude_vector"), it));
        let matrices = [(format!("{module}.lora_A.weight"), a), (format!("{module}.lora_B.weight"), b)];
        matrices.into_iter().chain(magnitude)
    });
    let mut tensors: HashMap<String, Tensor> = tensors.chain(adapter.saved).collect();
    for parameter in model.parameters() {
        let Some(tensor) = tensors.remove(&parameter.name) else {
            return Err(Error::file(folder, format!("has no `{}`, which is trained", parameter.name)));
        };
        set(parameter, tensor).map_err(|error| Error::file(folder, error.to_string()))?;
    }
    match tensors.keys().next() {
        None => Ok(()),
        Some(name) => Err(Error::file(folder, format!("has `{name}`, which is not trained"))),
    }
}

fn set(parameter: &mut Parameter, tensor: Tensor) -> Result<()> {
    let tensor = tensor.cast(DType::F32)?.to_device(&parameter.value.device())?;
    parameter.value.copy_from(&tensor)?;
    match &mut parameter.copy {
        Some(copy) => parameter.value.cast_into(copy),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(layers: i64, modules: &[&str], extra: &[&str], expected: &[&str]) {
        let owned = |it: &[&str]| it.iter().map(|it| it.to_string()).collect();
        let config = RunConfig {
            finetuning_type: FinetuningType::Freeze,
            freeze_trainable_layers: layers,
            freeze_trainable_modules: owned(modules),
            freeze_extra_modules: owned(extra),
            ..RunConfig::default()
        };
        let names = [
            "model.embed_tokens.weight",
            "model.layers.0.mlp.up_proj.weight",
            "model.layers.1.input_layernorm.weight",
            "model.layers.11.mlp.up_proj.weight",
            "model.layers.11.self_attn.q_proj.bias",
            "model.norm.weight",
        ];
        let got: Vec<&str> = names.into_iter().filter(|it| is_trained(&config, 12, it)).collect();
        assert_eq!(got, expected, "{layers} {modules:?} {extra:?}");
    }

    #[test]
    fn layers_and_modules_that_are_thawed() {
        let (up, bias) = ("model.layers.11.mlp.up_proj.weight", "model.layers.11.self_attn.q_proj.bias");
        check(2, &["all"], &[], &[up, bias]);
        check(2, &["mlp"], &["norm"], &[up, "model.norm.weight"]);
        check(
            -1,
            &["all"],
            &["embed_tokens"],
            &["model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight"],
        );
        check(-2, &["input_layernorm"], &[], &["model.layers.1.input_layernorm.weight"]);
        check(99, &["self_attn"], &[], &[bias]);
    }
}
