//! Decoding: a model's own words after a prompt, token by token.

mod sampler;

use std::ops::ControlFlow;

use ferrotune_model::{Decoder, KvCache, TokenSteps};
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
    let mut next = sampler.choose(&mut last_logits(model, cache, prompt, options.adapters)?);
    let mut steps = Steps::new(model, cache, options.adapters)?;
    for _ in 0..options.max_new_tokens {
        if options.stop_tokens.contains(&next) {
            return Ok(Finish::Stop);
        }
        if receive(next).is_break() {
            return Ok(Finish::Cancelled);
        }
        next = steps.next(next, sampler)?;
    }
    Ok(Finish::Length)
}

/// How a token is read after another.
enum Steps<'a> {
    Recorded(Box<TokenSteps<'a>>),
    Plain { model: &'a Decoder, cache: &'a mut KvCache, adapters: bool },
}

impl<'a> Steps<'a> {
    fn new(model: &'a Decoder, cache: &'a mut KvCache, adapters: bool) -> Result<Steps<'a>> {
        if TokenSteps::are_for(model, adapters)? {
            return Ok(Steps::Recorded(Box::new(TokenSteps::new(model, cache, adapters)?)));
        }
        Ok(Steps::Plain { model, cache, adapters })
    }

    /// The token after this one.
    fn next(&mut self, token: u32, sampler: &mut Sampler) -> Result<u32> {
        match self {
            Steps::Recorded(steps) => {
                steps.step(token)?;
                if sampler.is_greedy() {
                    return steps.most_likely();
                }
                Ok(sampler.choose(&mut steps.logits()?))
            }
            Steps::Plain { model, cache, adapters } => {
                Ok(sampler.choose(&mut last_logits(model, cache, &[token], *adapters)?))
            }
        }
    }
}

/// Logits (V) after these further tokens.
fn last_logits(model: &Decoder, cache: &mut KvCache, tokens: &[u32], adapters: bool) -> Result<Vec<f32>> {
    let hidden = model.step(tokens, adapters, cache)?;
    let mut last = hidden.empty_like(1, hidden.cols())?;
    last.write_block((0, 0), &hidden, (tokens.len() - 1..tokens.len(), 0..hidden.cols()))?;
    model.logits(&last)?.to_f32()
}
