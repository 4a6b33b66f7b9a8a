//! Llama 2, 3, 3.1, 3.2 and what keeps to their form: SmolLM2, TinyLlama, Yi.

use ferrotune_nn::NormKind;
use ferrotune_tensor::Result;
use serde_json::json;

use super::config::Config;
use super::rope;
use crate::spec::{AttentionSpec, LayerSpec, MlpSpec, ModelSpec, NormPlaces, NormSpec, QkNorm, Residual};

pub(super) fn spec(config: &Config) -> Result<ModelSpec> {
    let hidden_size = config.size("hidden_size")?;
    let num_attention_heads = config.size("num_attention_heads")?;
    let head_dim = config.head_dim(hidden_size, num_attention_heads)?;
    let attention_bias = config.flag("attention_bias", false)?;
    // transformers takes neither from a llama config, so anything but these is another model.
    config.only("partial_rotary_factor", json!(1.0))?;
    config.only("rope_interleaved", json!(false))?;
    let layer = LayerSpec {
        attention: AttentionSpec {
            num_attention_heads,
            num_key_value_heads: config.size_or("num_key_value_heads", num_attention_heads)?,
            head_dim,
            scale: 1.0 / (head_dim as f64).sqrt(),
            rope: Some(rope::read(config, head_dim)?),
            qk_norm: QkNorm::None,
            qkv_bias: attention_bias,
            out_bias: attention_bias,
            window: None,
            softcap: None,
        },
        mlp: MlpSpec {
            intermediate_size: config.size("intermediate_size")?,
            gated: true,
            activation: config.activation("hidden_act")?,
            bias: config.flag("mlp_bias", false)?,
        },
        norms: NormPlaces::Before,
        residual: Residual::Sequential,
        residual_scale: 1.0,
    };
    Ok(ModelSpec {
        family: "llama",
        vocab_size: config.size("vocab_size")?,
        hidden_size,
        norm: NormSpec { kind: NormKind::Rms, eps: config.number_or("rms_norm_eps", 1e-6)? },
        embedding_scale: 1.0,
        logit_scale: 1.0,
        logit_softcap: None,
        tie_word_embeddings: config.flag("tie_word_embeddings", false)?,
        max_position_embeddings: config.size_or("max_position_embeddings", 2048)?,
        bos_token_id: config.tokens("bos_token_id")?.first().copied(),
        eos_token_ids: config.tokens("eos_token_id")?,
        pad_token_id: config.tokens("pad_token_id")?.first().copied(),
        layers: vec![layer; config.layer_count()?],
    })
}
