//! Qwen 2, 2.5 and 3 (dense, and with experts): biases on q, k and v in the former, norms of q and k in the latter; windows in
//! the layers from `max_window_layers` on, where they are switched on.

use ferrotune_tensor::Result;

use super::config::Config;
use super::parts;
use crate::spec::{ExpertsSpec, LayerSpec, ModelSpec, QkNorm};

pub(super) fn qwen2(config: &Config) -> Result<ModelSpec> {
    let mut layer = parts::turned_layer(config)?;
    layer.attention.qkv_bias = true;
    model(config, "qwen2", layer)
}

pub(super) fn qwen3(config: &Config) -> Result<ModelSpec> {
    model(config, "qwen3", qwen3_layer(config)?)
}

/// Layers with experts but every `decoder_sparse_step`-th, and but those that `mlp_only_layers` names.
pub(super) fn qwen3_moe(config: &Config) -> Result<ModelSpec> {
    let dense = qwen3_layer(config)?;
    let mut sparse = dense.clone();
    let normalised = config.flag("norm_topk_prob", false)?;
    sparse.mlp.intermediate_size = config.size_or("moe_intermediate_size", 768)?;
    sparse.mlp.experts = Some(ExpertsSpec { normalised, ..parts::experts(config, 128, 8)? });
    let (step, plain) = (config.size_or("decoder_sparse_step", 1)?, config.indices("mlp_only_layers")?);
    config.optional_number("max_window_layers")?; // all layers have the window, where it is on
    let mut layers = parts::windowed(config, &sparse, parts::switched_window(config)?, |_| true)?;
    let is_dense = |index: usize| plain.contains(&index) || !(index + 1).is_multiple_of(step);
    for (_, layer) in layers.iter_mut().enumerate().filter(|(index, _)| is_dense(*index)) {
        layer.mlp = dense.mlp.clone();
    }
    parts::model(config, "qwen3_moe", layers)
}

fn qwen3_layer(config: &Config) -> Result<LayerSpec> {
    let mut layer = parts::turned_layer(config)?;
    layer.biases(config.flag("attention_bias", false)?, false);
    layer.attention.qk_norm = QkNorm::PerHead;
    Ok(layer)
}

fn model(config: &Config, family: &'static str, layer: LayerSpec) -> Result<ModelSpec> {
    let window = parts::switched_window(config)?;
    let first = config.optional_number("max_window_layers")?.unwrap_or(28.0);
    let layers = parts::windowed(config, &layer, window, |index| index as f64 >= first)?;
    parts::model(config, family, layers)
}
