//! Llama 2, 3, 3.1, 3.2 and what keeps to their form: SmolLM2, TinyLlama, Yi.

use ferrotune_tensor::Result;

use super::config::Config;
use super::parts;
use crate::spec::ModelSpec;

pub(super) fn spec(config: &Config) -> Result<ModelSpec> {
    let mut layer = parts::turned_layer(config)?;
    layer.biases(config.flag("attention_bias", false)?, config.flag("mlp_bias", false)?);
    parts::model(config, "llama", vec![layer; config.layer_count()?])
}
