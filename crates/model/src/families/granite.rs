//! Granite 3 (dense): Llama whose embeddings, scores, sublayers and logits are scaled.

use ferrotune_tensor::Result;

use super::config::Config;
use super::parts;
use crate::spec::ModelSpec;

pub(super) fn spec(config: &Config) -> Result<ModelSpec> {
    let mut layer = parts::turned_layer(config)?;
    layer.biases(config.flag("attention_bias", false)?, config.flag("mlp_bias", false)?);
    layer.attention.scale = config.number_or("attention_multiplier", 1.0)?;
    layer.residual_scale = config.number_or("residual_multiplier", 1.0)?;
    let mut model = parts::model(config, "granite", vec![layer; config.layer_count()?])?;
    model.embedding_scale = config.number_or("embedding_multiplier", 1.0)?;
    model.logit_scale = 1.0 / config.positive_or("logits_scaling", 1.0)?;
    Ok(model)
}
