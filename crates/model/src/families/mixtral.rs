//! Mixtral: Mistral whose mlps are experts.

use ferrotune_tensor::Result;

use super::config::Config;
use super::parts;
use crate::spec::{CheckpointForm, ExpertsSpec, ModelSpec};

pub(super) fn spec(config: &Config) -> Result<ModelSpec> {
    let mut layer = parts::turned_layer(config)?;
    layer.mlp.experts = Some(ExpertsSpec { normalised: true, ..parts::experts(config, 8, 2)? });
    let window = config.optional_size("sliding_window")?;
    let layers = parts::windowed(config, &layer, window, |_| true)?;
    let mut model = parts::model(config, "mixtral", layers)?;
    model.checkpoint = CheckpointForm::Mixtral;
    Ok(model)
}
