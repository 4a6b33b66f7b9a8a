//! Qwen 2, 2.5 and 3: biases on q, k and v in the former, norms of q and k in the latter; windows in
//! the layers from `max_window_layers` on, where they are switched on.

use ferrotune_tensor::Result;

use super::config::Config;
use super::parts;
use crate::spec::{LayerSpec, ModelSpec, QkNorm};

pub(super) fn qwen2(config: &Config) -> Result<ModelSpec> {
    let mut layer = parts::turned_layer(config)?;
    layer.attention.qkv_bias = true;
    model(config, "qwen2", layer)
}

pub(super) fn qwen3(config: &Config) -> Result<ModelSpec> {
    let mut layer = parts::turned_layer(config)?;
    layer.biases(config.flag("attention_bias", false)?, false);
    layer.attention.qk_norm = QkNorm::PerHead;
    model(config, "qwen3", layer)
}

fn model(config: &Config, family: &'static str, layer: LayerSpec) -> Result<ModelSpec> {
    let window = parts::switched_window(config)?;
    let first = config.optional_number("max_window_layers")?.unwrap_or(28.0);
    let layers = parts::windowed(config, &layer, window, |index| index as f64 >= first)?;
    parts::model(config, family, layers)
}
