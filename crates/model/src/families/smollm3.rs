//! SmolLM3: Llama with layers that don't know positions (NoPE), every fourth as a rule.

use ferrotune_tensor::Result;

use super::config::Config;
use super::parts;
use crate::spec::ModelSpec;

pub(super) fn spec(config: &Config) -> Result<ModelSpec> {
    let mut layer = parts::turned_layer(config)?;
    layer.biases(config.flag("attention_bias", false)?, config.flag("mlp_bias", false)?);
    let count = config.layer_count()?;
    let interval = config.size_or("no_rope_layer_interval", 4)?;
    // 1: with positions, whatever the key's name says.
    let turned = config.switches("no_rope_layers", count)?;
    let turned = turned.unwrap_or_else(|| (1..=count).map(|it| it % interval != 0).collect());
    let window = parts::switched_window(config)?;
    let mut layers = parts::windowed(config, &layer, window, |index| !turned[index])?;
    for (layer, turned) in layers.iter_mut().zip(&turned) {
        layer.attention.rope.take_if(|_| !turned);
    }
    let mut model = parts::model(config, "smollm3", layers)?;
    model.tie_word_embeddings = config.flag("tie_word_embeddings", true)?;
    Ok(model)
}
