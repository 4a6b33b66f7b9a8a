//! InternLM 3: Llama, with a switch of its own for the biases of q, k and v.

use ferrotune_tensor::Result;

use super::config::Config;
use super::parts;
use crate::spec::ModelSpec;

pub(super) fn spec(config: &Config) -> Result<ModelSpec> {
    let mut layer = parts::turned_layer(config)?;
    let bias = config.flag("bias", false)?;
    layer.biases(bias, bias);
    layer.attention.qkv_bias = config.flag("qkv_bias", false)?;
    parts::model(config, "internlm3", vec![layer; config.layer_count()?])
}
