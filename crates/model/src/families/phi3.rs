//! Phi 3, 3.5 and 4: q, k, v are one projection in the checkpoint, and so are gate and up; heads may be turned in a part of their
//! width. Variants for long contexts have two ropes (longrope).

use ferrotune_tensor::Result;

use super::config::Config;
use super::{parts, rope};
use crate::spec::{CheckpointForm, ModelSpec};

pub(super) fn spec(config: &Config) -> Result<ModelSpec> {
    let (rope, long_rope) = rope::read_long(config, parts::heads(config)?.1)?;
    let layer = parts::layer(config, rope, config.activation("hidden_act")?)?;
    let window = config.optional_size("sliding_window")?;
    let mut model = parts::model(config, "phi3", parts::windowed(config, &layer, window, |_| true)?)?;
    model.norm.eps = config.number_or("rms_norm_eps", 1e-5)?;
    model.checkpoint = CheckpointForm::Fused;
    model.long_rope = long_rope;
    Ok(model)
}
