//! From logits to a token, in transformers' order: temperature, top-k, top-p, min-p
//! (transformers/generation/logits_process.py).

use ferrotune_tensor::Counter;

/// How a token is chosen.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Sampling {
    /// The most likely one.
    Greedy,
    /// By chance.
    Random {
        /// Logits are divided by it; above 0.
        temperature: f64,
        /// Only this many of the most likely; 0: all.
        top_k: usize,
        /// Only the most likely that together have this probability; 1: all.
        top_p: f64,
        /// Only those at least this likely relative to the most likely; 0: all.
        min_p: f64,
        /// Of the choices.
        seed: u64,
    },
}

/// Chooses token after token.
#[derive(Clone, Debug)]
pub struct Sampler {
    sampling: Sampling,
    drawn: u64,
}

impl Sampler {
    /// At the start of its random numbers.
    pub fn new(sampling: Sampling) -> Sampler {
        Sampler { sampling, drawn: 0 }
    }

    /// Always the most likely token.
    pub fn is_greedy(&self) -> bool {
        match self.sampling {
            Sampling::Greedy => true,
            Sampling::Random { temperature, .. } => temperature <= 0.0,
        }
    }

    /// The next token; uses the logits up.
    pub fn choose(&mut self, logits: &mut [f32]) -> u32 {
        match self.sampling {
            Sampling::Greedy => most_likely(logits),
            Sampling::Random { temperature, top_k, top_p, min_p, seed } => {
                if temperature <= 0.0 {
                    return most_likely(logits);
                }
                let candidates = candidates(logits, temperature, top_k, top_p, min_p);
                let draw = f64::from(Counter::new(&[seed]).unit(self.drawn));
                self.drawn += 1;
                pick(&candidates, draw)
            }
        }
    }
}

fn most_likely(logits: &[f32]) -> u32 {
    let better = |best: usize, it: usize| if logits[it] > logits[best] { it } else { best };
    (0..logits.len()).fold(0, better) as u32
}

/// Tokens left with their weights, the most likely first.
fn candidates(logits: &[f32], temperature: f64, top_k: usize, top_p: f64, min_p: f64) -> Vec<(u32, f64)> {
    let best = f64::from(logits[most_likely(logits) as usize]);
    let weigh =
        |(token, logit): (usize, &f32)| (token as u32, ((f64::from(*logit) - best) / temperature).exp());
    let mut all: Vec<(u32, f64)> = logits.iter().enumerate().map(weigh).collect();
    all.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
    if top_k > 0 {
        all.truncate(top_k.max(1));
    }
    if top_p < 1.0 {
        let total: f64 = all.iter().map(|it| it.1).sum();
        let mut before = 0.0;
        let kept = all.iter().take_while(|it| {
            let keep = before < top_p * total;
            before += it.1;
            keep
        });
        let kept = kept.count().max(1);
        all.truncate(kept);
    }
    // Weights are relative to the most likely token's.
    all.retain(|it| it.1 >= min_p);
    all
}

fn pick(candidates: &[(u32, f64)], draw: f64) -> u32 {
    let total: f64 = candidates.iter().map(|it| it.1).sum();
    let mut left = draw * total;
    for (token, weight) in candidates {
        if left < *weight {
            return *token;
        }
        left -= weight;
    }
    candidates.last().map_or(0, |it| it.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tokens(temperature: f64, top_k: usize, top_p: f64, min_p: f64) -> Vec<u32> {
        let logits = [0.4f32.ln(), 0.1f32.ln(), 0.3f32.ln(), 0.2f32.ln()];
        let mut tokens: Vec<u32> =
            candidates(&logits, temperature, top_k, top_p, min_p).iter().map(|it| it.0).collect();
        tokens.sort_unstable();
        tokens
    }

    #[test]
    fn each_limit_leaves_what_it_should() {
        assert_eq!(tokens(1.0, 0, 1.0, 0.0), [0, 1, 2, 3]);
        assert_eq!(tokens(1.0, 2, 1.0, 0.0), [0, 2]);
        assert_eq!(tokens(1.0, 0, 0.65, 0.0), [0, 2]);
        assert_eq!(tokens(1.0, 0, 0.75, 0.0), [0, 2, 3]);
        assert_eq!(tokens(1.0, 0, 1.0, 0.45), [0, 2, 3]);
        assert_eq!(tokens(1.0, 0, 1e-9, 0.0), [0]);
    }

    #[test]
    fn frequencies_follow_the_probabilities() {
        let mut sampler =
            Sampler::new(Sampling::Random { temperature: 1.0, top_k: 0, top_p: 1.0, min_p: 0.0, seed: 7 });
        let mut counts = [0; 4];
        for _ in 0..20_000 {
            counts[sampler.choose(&mut [0.4f32.ln(), 0.1f32.ln(), 0.3f32.ln(), 0.2f32.ln()]) as usize] += 1;
        }
        for (count, p) in counts.iter().zip([0.4, 0.1, 0.3, 0.2]) {
            assert!((f64::from(*count) / 20_000.0 - p).abs() < 0.02, "{counts:?}");
        }
    }

    #[test]
    fn greedy_takes_the_first_of_the_best() {
        assert_eq!(Sampler::new(Sampling::Greedy).choose(&mut [1.0, 3.0, 3.0]), 1);
    }
}
