//! Gemma 1, 2 and 3 (of the larger ones of 3, the part for text): embeddings times √C, stored norm weights less one, the tanh form of GELU;
//! from 2 on norms at both ends and windows in turn; in 2 caps, in 3 norms of q and k and two ropes.

use ferrotune_nn::{Activation, Rope};
use ferrotune_tensor::Result;
use serde_json::{Map, Value, json};

use super::config::Config;
use super::{parts, rope};
use crate::spec::{CheckpointForm, LayerSpec, ModelSpec, NormPlaces, QkNorm};

pub(super) fn gemma(config: &Config) -> Result<ModelSpec> {
    let rope = rope::read(config, parts::heads(config)?.1)?;
    let layer = layer(config, rope)?;
    model(config, "gemma", vec![layer; config.layer_count()?])
}

pub(super) fn gemma2(config: &Config) -> Result<ModelSpec> {
    let rope = rope::read(config, parts::heads(config)?.1)?;
    let mut layer = layer(config, rope)?;
    scores(config, &mut layer)?;
    let window = config.optional_size("sliding_window")?;
    model(config, "gemma2", parts::windowed(config, &layer, window, |index| index % 2 == 0)?)
}

pub(super) fn gemma3(config: &Config) -> Result<ModelSpec> {
    let (local, global) = rope::local_and_global(config, parts::heads(config)?.1)?;
    let mut layer = layer(config, global)?;
    scores(config, &mut layer)?;
    layer.attention.qk_norm = QkNorm::PerHead;
    let window = config.size("sliding_window")?;
    let pattern = config.size_or("sliding_window_pattern", 6)?;
    let mut layers = parts::windowed(config, &layer, Some(window), |index| (index + 1) % pattern != 0)?;
    for layer in layers.iter_mut().filter(|it| it.attention.window.is_some()) {
        layer.attention.rope = Some(local.clone());
    }
    model(config, "gemma3_text", layers)
}

/// `text_config` of a Gemma 3 that sees images, as a config by itself. The whole config's own say, about tokens that end a turn and
/// the form of the weights, wins.
pub(super) fn text_part(config: &Value, text: &Map<String, Value>) -> Value {
    let mut all = json!({
        "vocab_size": 262_208, "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26,
        "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "max_position_embeddings": 131_072,
        "sliding_window": 4096, "bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0,
    });
    for (key, value) in text {
        all[key] = value.clone();
    }
    for key in ["bos_token_id", "eos_token_id", "pad_token_id", "dtype", "torch_dtype", "quantization_config"]
    {
        if let Some(value) = config.get(key).filter(|it| !it.is_null()) {
            all[key] = value.clone();
        }
    }
    all["model_type"] = "gemma3_text".into();
    all["architectures"] = json!(["Gemma3ForCausalLM"]);
    all
}

fn layer(config: &Config, rope: Rope) -> Result<LayerSpec> {
    let mut layer = parts::layer(config, rope, activation(config)?)?;
    layer.biases(config.flag("attention_bias", false)?, false);
    Ok(layer)
}

/// The first releases say `gelu` and mean its tanh form.
fn activation(config: &Config) -> Result<Activation> {
    let (new, old) = (config.optional_text("hidden_activation")?, config.optional_text("hidden_act")?);
    match (new, old.as_deref()) {
        (Some(_), _) => config.activation("hidden_activation"),
        (None, None | Some("gelu")) => Ok(Activation::GeluTanh),
        (None, Some(_)) => config.activation("hidden_act"),
    }
}

fn scores(config: &Config, layer: &mut LayerSpec) -> Result<()> {
    layer.norms = NormPlaces::BothEnds;
    layer.attention.scale = 1.0 / config.positive_or("query_pre_attn_scalar", 256.0)?.sqrt();
    layer.attention.softcap = config.optional_number("attn_logit_softcapping")?;
    Ok(())
}

fn model(config: &Config, family: &'static str, layers: Vec<LayerSpec>) -> Result<ModelSpec> {
    let mut model = parts::model(config, family, layers)?;
    model.embedding_scale = (model.hidden_size as f64).sqrt();
    model.logit_softcap = config.optional_number("final_logit_softcapping")?;
    model.tie_word_embeddings = config.flag("tie_word_embeddings", true)?;
    model.checkpoint = CheckpointForm::NormsLessOne;
    Ok(model)
}
