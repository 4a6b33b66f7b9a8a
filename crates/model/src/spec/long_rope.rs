use ferrotune_nn::Rope;

use super::ModelSpec;

/// Two ropes of all layers, by the length of what is computed (longrope). transformers takes the second where a batch has a longer
/// sequence; here it is settled before anything is computed, by [`ModelSpec::settle_rope`].
#[derive(Clone, Debug, PartialEq)]
pub struct LongRope {
    /// Up to so many tokens.
    pub original_context: usize,
    /// Whose powers are divided, by other factors in each of them.
    pub theta: f64,
    /// For these; layers have it unless another is settled.
    pub short: Rope,
    /// For longer ones.
    pub long: Rope,
}

impl LongRope {
    /// What the powers of theta are divided by in one of them.
    pub fn factors(&self, rope: &Rope) -> Vec<f32> {
        let frequencies = &rope.inverse_frequencies;
        let exponent = |i: usize| -(i as f64) / frequencies.len() as f64;
        let factor = |(i, frequency): (usize, &f64)| (self.theta.powf(exponent(i)) / frequency) as f32;
        frequencies.iter().enumerate().map(factor).collect()
    }
}

impl ModelSpec {
    /// Chooses between two ropes, for sequences of up to so many tokens.
    pub fn settle_rope(&mut self, tokens: usize) {
        let Some(LongRope { original_context, short, long, .. }) = &self.long_rope else { return };
        let rope = if tokens > *original_context { long } else { short };
        self.layers.iter_mut().for_each(|layer| layer.attention.rope = Some(rope.clone()));
    }
}
