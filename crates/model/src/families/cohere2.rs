//! Command R7B (Cohere 2): attention and mlp read one LayerNorm without bias, and both join x at once. Layers with a
//! window turn neighbouring channels; those that see everything (every fourth) have no positions.

use ferrotune_nn::NormKind;
use ferrotune_tensor::Result;
use serde_json::json;

use super::config::Config;
use super::parts;
use crate::spec::{ModelSpec, NormPlaces, NormSpec, Residual};

pub(super) fn spec(config: &Config) -> Result<ModelSpec> {
    for (key, expected) in [
        ("use_parallel_block", json!(true)),
        ("use_gated_activation", json!(true)),
        ("use_embedding_sharing", json!(true)),
        ("position_embedding_type", json!("rope_gptj")),
        ("order_of_interleaved_layers", json!("local_attn_first")),
        ("rotary_pct", json!(1.0)),
    ] {
        config.only(key, expected)?;
    }
    config.flag("use_parallel_embedding", true)?; // how it was spread over machines
    let mut layer = parts::turned_layer(config)?;
    layer.biases(config.flag("attention_bias", false)?, false);
    layer.attention.rope.iter_mut().for_each(|rope| rope.interleaved = true);
    (layer.norms, layer.residual) = (NormPlaces::Shared, Residual::Parallel);
    let pattern = config.size_or("sliding_window_pattern", config.size_or("layer_switch", 4)?)?;
    let window = config.optional_size("sliding_window")?;
    let mut layers = parts::windowed(config, &layer, window, |index| !(index + 1).is_multiple_of(pattern))?;
    for layer in layers.iter_mut().filter(|it| it.attention.window.is_none()) {
        layer.attention.rope = None;
    }
    let mut model = parts::model(config, "cohere2", layers)?;
    let eps = config.number_or("layer_norm_eps", 1e-5)?;
    model.norm = NormSpec { kind: NormKind::Layer, eps, bias: false };
    model.tie_word_embeddings = config.flag("tie_word_embeddings", true)?;
    model.logit_scale = config.number_or("logit_scale", 0.0625)?;
    Ok(model)
}
