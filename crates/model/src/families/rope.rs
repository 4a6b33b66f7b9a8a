//! Rope scaling of config.json → inverse frequencies and one factor.

use std::f64::consts::TAU;

use ferrotune_nn::Rope;
use ferrotune_tensor::Result;
use serde_json::Value;

use super::config::Config;

/// Reads `rope_theta` with `rope_scaling` (transformers 4) or `rope_parameters` (5).
pub(super) fn read(config: &Config, width: usize) -> Result<Rope> {
    let old = config.section("rope_scaling")?;
    let new = config.section("rope_parameters")?;
    let theta = config.optional_number("rope_theta")?;
    let Some(section) = new.or(old) else {
        return Ok(rope(base(width, theta.unwrap_or(10_000.0))));
    };
    let theta = section.optional_number("rope_theta")?.or(theta).unwrap_or(10_000.0);
    section.only("partial_rotary_factor", Value::from(1.0))?;
    let base = base(width, theta);
    let old_name = section.optional_text("type")?;
    let kind = section.optional_text("rope_type")?.or(old_name).unwrap_or("default".into());
    let frequencies = match kind.as_str() {
        "default" | "none" => base,
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
                "`{name}` is of type `{other}`, which is not there yet, only: default, linear, llama3"
            );
            return Err(section.error(&message));
        }
    };
    section.refuse_unread()?;
    Ok(rope(frequencies))
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
