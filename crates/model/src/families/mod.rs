//! config.json in, [`ModelSpec`] out: one file for each family, and what they read it with.

mod cohere2;
mod config;
mod gemma;
mod granite;
mod internlm3;
mod llama;
mod mistral;
mod mixtral;
mod olmo2;
mod parts;
mod phi3;
mod qwen;
mod rope;
mod smollm3;

use std::path::Path;

use ferrotune_tensor::{Error, Result};
use serde_json::Value;

use crate::spec::ModelSpec;
pub(crate) use rope::{Llama3, llama3_factors};

/// A family: its `model_type` in config.json, transformers' class, and what turns the rest into a spec.
type Family = (&'static str, &'static str, fn(&config::Config) -> Result<ModelSpec>);

/// The families that are there.
const FAMILIES: &[Family] = &[
    ("llama", "LlamaForCausalLM", llama::spec),
    ("mistral", "MistralForCausalLM", mistral::spec),
    ("qwen2", "Qwen2ForCausalLM", qwen::qwen2),
    ("qwen3", "Qwen3ForCausalLM", qwen::qwen3),
    ("smollm3", "SmolLM3ForCausalLM", smollm3::spec),
    ("olmo2", "Olmo2ForCausalLM", olmo2::spec),
    ("granite", "GraniteForCausalLM", granite::spec),
    ("gemma", "GemmaForCausalLM", gemma::gemma),
    ("gemma2", "Gemma2ForCausalLM", gemma::gemma2),
    ("gemma3_text", "Gemma3ForCausalLM", gemma::gemma3),
    ("phi3", "Phi3ForCausalLM", phi3::spec),
    ("internlm3", "InternLM3ForCausalLM", internlm3::spec),
    ("cohere2", "Cohere2ForCausalLM", cohere2::spec),
    ("mixtral", "MixtralForCausalLM", mixtral::spec),
    ("qwen3_moe", "Qwen3MoeForCausalLM", qwen::qwen3_moe),
];

/// Families that people ask for, and what they may take instead.
const INSTEAD: &[(&str, &str)] = &[
    (
        "internlm2",
        "its weights are laid out in a way of their own; take InternLM 3, or a copy in Llama's form",
    ),
    ("deepseek_v2", LATENT),
    ("deepseek_v3", LATENT),
    ("gemma3n", "take a Gemma 3"),
];
const LATENT: &str = "it has latent attention; deepseek-llm and deepseek-coder (llama) and what R1 was distilled into (llama, \
                      qwen2) are of families that are there";

/// The config of the part for text, where a model of more than text has one that is a family by itself: Gemma 3 from 4B on.
/// What it leaves out is what transformers takes then.
pub fn text_part(config: &Value) -> Option<Value> {
    let is_one = config.get("model_type").and_then(Value::as_str) == Some("gemma3");
    let text = config.get("text_config").and_then(Value::as_object).filter(|_| is_one)?;
    Some(gemma::text_part(config, text))
}

/// Reads a config.json, or what a GGUF file says in its place. `file` is for messages.
///
/// # Errors
/// When the family isn't there yet, a key is missing or holds something else than expected, or a
/// key that may change the mathematics isn't known. The message names it.
pub fn spec(config: &Value, file: &Path) -> Result<ModelSpec> {
    let model_type = config.get("model_type").and_then(Value::as_str);
    let there: Vec<&str> = FAMILIES.iter().map(|it| it.0).collect();
    let Some(model_type) = model_type else {
        let message =
            format!("`model_type` is missing: it names the model's family (there are: {})", there.join(", "));
        return Err(Error::file(file, message));
    };
    if let Some(text) = text_part(config) {
        return spec(&text, file);
    }
    let modality =
        ["vision_config", "audio_config"].into_iter().find(|it| config.get(it).is_some_and(Value::is_object));
    if let Some(modality) = modality {
        let message = format!(
            "`{modality}`: a model of more than text (`{model_type}`) can't be trained; take a text-only model, \
             such as its family's smaller ones"
        );
        return Err(Error::file(file, message));
    }
    let Some((name, _, read)) = FAMILIES.iter().find(|it| it.0 == model_type) else {
        let instead = INSTEAD.iter().find(|it| it.0 == model_type);
        let message = format!(
            "`model_type` is `{model_type}`: that family is not there yet{}, only: {}",
            instead.map_or(String::new(), |it| format!(" ({})", it.1)),
            there.join(", ")
        );
        return Err(Error::file(file, message));
    };
    let config = config::Config::new(config, file, name)?;
    let spec = read(&config)?;
    config.refuse_unread()?;
    spec.check().map_err(|error| Error::file(file, error.to_string()))?;
    Ok(spec)
}

/// transformers' class of a `model_type`, as config.json's `architectures` names it.
pub fn architecture(model_type: &str) -> Option<&'static str> {
    FAMILIES.iter().find(|it| it.0 == model_type).map(|it| it.1)
}
