//! OLMo 2: norms after the sublayers, and over all heads of q and of k.

use ferrotune_tensor::Result;

use super::config::Config;
use super::parts;
use crate::spec::{ModelSpec, NormPlaces, QkNorm};

pub(super) fn spec(config: &Config) -> Result<ModelSpec> {
    let mut layer = parts::turned_layer(config)?;
    layer.biases(config.flag("attention_bias", false)?, false);
    layer.attention.qk_norm = QkNorm::WholeRow;
    layer.norms = NormPlaces::After;
    let mut model = parts::model(config, "olmo2", vec![layer; config.layer_count()?])?;
    model.norm.eps = config.number_or("rms_norm_eps", 1e-5)?;
    Ok(model)
}
