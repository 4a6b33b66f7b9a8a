//! Phi 3 and 4: q, k, v are one projection in the checkpoint, and so are gate and up; heads may be turned in
//! a part of their width. The long-context variants (longrope) are refused.

use ferrotune_tensor::Result;

use super::config::Config;
use super::{parts, rope};
use crate::spec::{CheckpointForm, ModelSpec};

pub(super) fn spec(config: &Config) -> Result<ModelSpec> {
    let rope = rope::read_partial(config, parts::heads(config)?.1)?;
    let layer = parts::layer(config, rope, config.activation("hidden_act")?)?;
    // Read by longrope alone.
    config.size_or("original_max_position_embeddings", 4096)?;
    let window = config.optional_size("sliding_window")?;
    let mut model = parts::model(config, "phi3", parts::windowed(config, &layer, window, |_| true)?)?;
    model.norm.eps = config.number_or("rms_norm_eps", 1e-5)?;
    model.checkpoint = CheckpointForm::Fused;
    Ok(model)
}
