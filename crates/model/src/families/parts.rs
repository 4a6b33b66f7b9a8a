//! What most families share: the plain layer, and what stands around the layers. A family changes fields of it.

use ferrotune_nn::{Activation, NormKind, Rope};
use ferrotune_tensor::Result;
use serde_json::json;

use super::config::Config;
use super::rope;
use crate::spec::{
    AttentionSpec, CheckpointForm, ExpertsSpec, LayerSpec, MlpSpec, ModelSpec, NormPlaces, NormSpec, QkNorm,
    Residual,
};

/// A layer without biases, windows and scales, turned by `rope`.
pub(super) fn layer(config: &Config, rope: Rope, activation: Activation) -> Result<LayerSpec> {
    let (num_attention_heads, head_dim) = heads(config)?;
    Ok(LayerSpec {
        attention: AttentionSpec {
            num_attention_heads,
            num_key_value_heads: config.size_or("num_key_value_heads", num_attention_heads)?,
            head_dim,
            scale: 1.0 / (head_dim as f64).sqrt(),
            rope: Some(rope),
            qk_norm: QkNorm::None,
            qkv_bias: false,
            out_bias: false,
            window: None,
            softcap: None,
        },
        mlp: MlpSpec {
            intermediate_size: config.size("intermediate_size")?,
            gated: true,
            activation,
            bias: false,
            experts: None,
        },
        norms: NormPlaces::Before,
        residual: Residual::Sequential,
        residual_scale: 1.0,
    })
}

/// The plain layer whose heads are turned in their whole width.
pub(super) fn turned_layer(config: &Config) -> Result<LayerSpec> {
    // transformers takes neither in these families, so anything but these is another model.
    config.only("partial_rotary_factor", json!(1.0))?;
    config.only("rope_interleaved", json!(false))?;
    layer(config, rope::read(config, heads(config)?.1)?, config.activation("hidden_act")?)
}

/// Query heads, and the width of each.
pub(super) fn heads(config: &Config) -> Result<(usize, usize)> {
    let num_attention_heads = config.size("num_attention_heads")?;
    Ok((num_attention_heads, config.head_dim(config.size("hidden_size")?, num_attention_heads)?))
}

/// A model of these layers: RMSNorm, nothing scaled.
pub(super) fn model(config: &Config, family: &'static str, layers: Vec<LayerSpec>) -> Result<ModelSpec> {
    Ok(ModelSpec {
        family,
        vocab_size: config.size("vocab_size")?,
        hidden_size: config.size("hidden_size")?,
        norm: NormSpec { kind: NormKind::Rms, eps: config.number_or("rms_norm_eps", 1e-6)?, bias: false },
        embedding_scale: 1.0,
        logit_scale: 1.0,
        logit_softcap: None,
        tie_word_embeddings: config.flag("tie_word_embeddings", false)?,
        max_position_embeddings: config.size_or("max_position_embeddings", 2048)?,
        bos_token_id: config.tokens("bos_token_id")?.first().copied(),
        eos_token_ids: config.tokens("eos_token_id")?,
        pad_token_id: config.tokens("pad_token_id")?.first().copied(),
        layers,
        long_rope: None,
        checkpoint: CheckpointForm::Canonical,
    })
}

/// As many layers as the config says, the window where `layer_types` or else `slides` says so.
pub(super) fn windowed(
    config: &Config,
    layer: &LayerSpec,
    window: Option<usize>,
    slides: impl Fn(usize) -> bool,
) -> Result<Vec<LayerSpec>> {
    let count = config.layer_count()?;
    let types = config.layer_types(count)?;
    let slides = |index| types.as_ref().map_or_else(|| slides(index), |it| it[index]);
    let one = |index| {
        let mut layer = layer.clone();
        layer.attention.window = window.filter(|_| slides(index));
        layer
    };
    Ok((0..count).map(one).collect())
}

/// The window of families that switch it on with `use_sliding_window`.
pub(super) fn switched_window(config: &Config) -> Result<Option<usize>> {
    let (on, window) = (config.flag("use_sliding_window", false)?, config.optional_size("sliding_window")?);
    Ok(window.filter(|_| on))
}

/// How many experts there are, and how many a token uses; what they are weighted by is the softmax of all scores.
pub(super) fn experts(
    config: &Config,
    num_experts: usize,
    num_experts_per_tok: usize,
) -> Result<ExpertsSpec> {
    // Another loss would join that of the tokens. Without it, its weight counts for nothing.
    config.only("output_router_logits", json!(false))?;
    config.optional_number("router_aux_loss_coef")?;
    // transformers 5 writes one name for both.
    let either = config.size_or("num_local_experts", config.size_or("num_experts", num_experts)?)?;
    Ok(ExpertsSpec {
        num_experts: either,
        num_experts_per_tok: config.size_or("num_experts_per_tok", num_experts_per_tok)?,
        normalised: false,
    })
}
