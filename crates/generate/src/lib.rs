//! Decoding: a model's own words after a prompt, token by token.

mod sampler;

use std::ops::ControlFlow;

use ferrotune_model::{Decoder, KvCache};
use ferrotune_tensor::{Error, Result};

pub use sampler::{Sampler, Sampling};

/// What one generation is made with.
#[derive(Clone, Debug)]
pub struct GenerateOptions {
    /// The most tokens that are generated.
    pub max_new_tokens: usize,
    /// Tokens that end the answer; they are not given out.
    pub stop_tokens: Vec<u32>,
    /// Adapters take part; off, the base model speaks.
    pub adapters: bool,
}

/// Why a generation ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Finish {
    /// The model said so.
    Stop,
    /// `max_new_tokens` were given.
    Length,
    /// The receiver of tokens said so.
    Cancelled,
}

/// Generates after what the cache holds and `prompt`; gives each token to `receive` as it comes.
/// The cache then holds all but the last token, so that a conversation can go on.
///
/// # Errors
/// When the prompt is empty or a token is outside the vocabulary.
pub fn generate(
    model: &Decoder,
    cache: &mut KvCache,
    prompt: &[u32],
    options: &GenerateOptions,
    sampler: &mut Sampler,
    mut receive: impl FnMut(u32) -> ControlFlow<()>,
) -> Result<Finish> {
    if prompt.is_empty() {
        return Err(Error::msg("the prompt is empty"));
    }
    let mut next = next_logits(model, cache, prompt, options.adapters)?;
    for _ in 0..options.max_new_tokens {
        let token = sampler.choose(&mut next);
        if options.stop_tokens.contains(&token) {
            return Ok(Finish::Stop);
        }
        if receive(token).is_break() {
            return Ok(Finish::Cancelled);
        }
        next = next_logits(model, cache, &[token], options.adapters)?;
    }
    Ok(Finish::Length)
}

/// Logits (V) after these further tokens.
fn next_logits(model: &Decoder, cache: &mut KvCache, tokens: &[u32], adapters: bool) -> Result<Vec<f32>> {
    let hidden = model.step(tokens, adapters, cache)?;
    let mut last = hidden.empty_like(1, hidden.cols())?;
    last.write_block((0, 0), &hidden, (tokens.len() - 1..tokens.len(), 0..hidden.cols()))?;
    model.logits(&last)?.to_f32()
}
