//! Mistral: Llama with a window, where `sliding_window` says so (7B v0.1).

use ferrotune_tensor::Result;

use super::config::Config;
use super::parts;
use crate::spec::ModelSpec;

pub(super) fn spec(config: &Config) -> Result<ModelSpec> {
    let layer = parts::turned_layer(config)?;
    let window = config.optional_size("sliding_window")?;
    let layers = parts::windowed(config, &layer, window, |_| true)?;
    parts::model(config, "mistral", layers)
}
