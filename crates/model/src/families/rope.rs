//! Rope scaling of config.json → inverse frequencies and one factor.

use std::f64::consts::TAU;

use ferrotune_nn::Rope;
use ferrotune_tensor::Result;
use serde_json::Value;

use super::config::Config;
use crate::spec::LongRope;

/// Reads `rope_theta` with `rope_scaling` (transformers 4) or `rope_parameters` (5).
pub(super) fn read(config: &Config, width: usize) -> Result<Rope> {
    let old = config.section("rope_scaling")?;
    let new = config.section("rope_parameters")?;
    let theta = config.optional_number("rope_theta")?;
    let section = new.or(old);
    if let Some(section) = &section {
        section.only("partial_rotary_factor", Value::from(1.0))?;
    }
    scaled(section.as_ref(), theta.unwrap_or(10_000.0), width)
}

/// The same where `partial_rotary_factor` may leave the end of a head unturned, and where there may be another rope for long
/// sequences: `longrope`, which old configs call `su`.
/// Ding et al. 2024, "LongRoPE"; transformers/modeling_rope_utils.py.
pub(super) fn read_long(config: &Config, head_dim: usize) -> Result<(Rope, Option<LongRope>)> {
    let old = config.section("rope_scaling")?;
    let section = config.section("rope_parameters")?.or(old);
    let theta = config.number_or("rope_theta", 10_000.0)?;
    let own = section.as_ref().map(|it| it.optional_number("partial_rotary_factor")).transpose()?.flatten();
    let share = config.number_or("partial_rotary_factor", 1.0)?;
    let width = (head_dim as f64 * own.unwrap_or(share)) as usize;
    if width == 0 || width > head_dim || !width.is_multiple_of(2) {
        let message = format!(
            "`partial_rotary_factor` turns {width} of a head's {head_dim} channels, expected an even number of them"
        );
        return Err(config.error(&message));
    }
    let original = config.size_or("original_max_position_embeddings", 4096)?;
    match section {
        Some(section) if ["longrope", "su"].contains(&kind(&section)?.as_str()) => {
            let original = section.size_or("original_max_position_embeddings", original)?;
            let long_rope = long_rope(config, &section, theta, width, original)?;
            Ok((long_rope.short.clone(), Some(long_rope)))
        }
        section => Ok((scaled(section.as_ref(), theta, width)?, None)),
    }
}

/// Each frequency divided by a factor of its own; cosine and sine grow with the logarithm of how much longer the context became.
fn long_rope(
    config: &Config,
    section: &Config,
    theta: f64,
    width: usize,
    original_context: usize,
) -> Result<LongRope> {
    let theta = section.optional_number("rope_theta")?.unwrap_or(theta);
    let whole = config.size_or("max_position_embeddings", 4096)?;
    let grown = section.positive_or("factor", whole as f64 / original_context as f64)?;
    let grown = match grown > 1.0 {
        true => (1.0 + grown.ln() / (original_context as f64).ln()).sqrt(),
        false => 1.0,
    };
    let attention_factor = section.positive_or("attention_factor", grown)?;
    let base = base(width, theta);
    let by = |key: &str| -> Result<Rope> {
        let inverse_frequencies = divided(&base, &section.numbers(key, base.len())?);
        Ok(Rope { inverse_frequencies, attention_factor, interleaved: false })
    };
    let (short, long) = (by("short_factor")?, by("long_factor")?);
    section.refuse_unread()?;
    Ok(LongRope { original_context, theta, short, long })
}

/// Gemma 3: of layers with a window, and of those without, which alone are scaled.
pub(super) fn local_and_global(config: &Config, width: usize) -> Result<(Rope, Rope)> {
    let local = config.number_or("rope_local_base_freq", 10_000.0)?;
    let global = config.number_or("rope_theta", 1_000_000.0)?;
    let scaling = config.section("rope_scaling")?;
    let Some(both) = config.section("rope_parameters")? else {
        return Ok((scaled(None, local, width)?, scaled(scaling.as_ref(), global, width)?));
    };
    let (sliding, full) = (both.section("sliding_attention")?, both.section("full_attention")?);
    both.refuse_unread()?;
    Ok((scaled(sliding.as_ref(), local, width)?, scaled(full.as_ref(), global, width)?))
}

fn scaled(section: Option<&Config>, theta: f64, width: usize) -> Result<Rope> {
    let Some(section) = section else { return Ok(rope(base(width, theta))) };
    let theta = section.optional_number("rope_theta")?.unwrap_or(theta);
    let base = base(width, theta);
    let frequencies = match kind(section)?.as_str() {
        "default" | "none" => base,
        // Beyond the context that the model was made for, it would depend on the length.
        "dynamic" => {
            section.positive("factor")?;
            base
        }
        "linear" => divided(&base, &vec![section.positive("factor")?; base.len()]),
        "llama3" => {
            let scaling = Llama3 {
                factor: section.positive("factor")?,
                low_freq_factor: section.positive("low_freq_factor")?,
                high_freq_factor: section.positive("high_freq_factor")?,
                original_context: section.positive("original_max_position_embeddings")?,
            };
            divided(&base, &llama3_factors(&base, &scaling))
        }
        // A GGUF file's own list, where it isn't one of the above.
        "frequency_factors" => divided(&base, &section.numbers("factors", base.len())?),
        other => {
            let name = section.name();
            let message = format!(
                "`{name}` is of type `{other}`, which is not there yet, only: default, linear, dynamic, llama3, and longrope in phi3"
            );
            return Err(section.error(&message));
        }
    };
    section.refuse_unread()?;
    Ok(rope(frequencies))
}

/// What a section calls itself.
fn kind(section: &Config) -> Result<String> {
    let old_name = section.optional_text("type")?;
    Ok(section.optional_text("rope_type")?.or(old_name).unwrap_or("default".into()))
}

fn rope(inverse_frequencies: Vec<f64>) -> Rope {
    Rope { inverse_frequencies, attention_factor: 1.0, interleaved: false }
}

/// theta^(−2i/width)
fn base(width: usize, theta: f64) -> Vec<f64> {
    (0..width / 2).map(|i| theta.powf(-2.0 * i as f64 / width as f64)).collect()
}

fn divided(base: &[f64], factors: &[f64]) -> Vec<f64> {
    base.iter().zip(factors).map(|(frequency, factor)| frequency / factor).collect()
}

/// The four numbers of Llama 3.1's rope scaling.
pub(crate) struct Llama3 {
    pub(crate) factor: f64,
    pub(crate) low_freq_factor: f64,
    pub(crate) high_freq_factor: f64,
    pub(crate) original_context: f64,
}

/// What each frequency is divided by: 1 for short waves, `factor` for long ones, between them smoothly.
pub(crate) fn llama3_factors(base: &[f64], scaling: &Llama3) -> Vec<f64> {
    let Llama3 { factor, low_freq_factor: low, high_freq_factor: high, original_context } = *scaling;
    let divisor = |frequency: &f64| {
        let wave_length = TAU / frequency;
        if wave_length < original_context / high {
            1.0
        } else if wave_length > original_context / low {
            factor
        } else {
            let smooth = (original_context / wave_length - low) / (high - low);
            1.0 / ((1.0 - smooth) / factor + smooth)
        }
    };
    base.iter().map(divisor).collect()
}
