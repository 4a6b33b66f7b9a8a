//! Several data sets to one order, as `datasets.interleave_datasets` understands LLaMA-Factory's `mix_strategy`.
//!
//! Everything drawn is a function of the seed and a counter, so that an order is the same on every machine and can
//! be taken up anywhere.

use crate::batch::{mix, shuffle};

/// How several data sets become one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum MixStrategy {
    /// One after another.
    #[default]
    Concat,
    /// In turns, until the first set is used up.
    InterleaveUnder,
    /// In turns, until all are used up; shorter sets begin again.
    InterleaveOver,
    /// In turns, until all are used up; each row once.
    InterleaveOnce,
}

/// Says from which set the next row comes.
#[derive(Clone, Debug)]
pub(crate) struct Mixer {
    strategy: MixStrategy,
    /// Chances added up; empty: in turns.
    upto: Vec<f64>,
    seed: u64,
    /// Draws so far.
    draws: u64,
    /// Whether a set was used up, once at least.
    exhausted: Vec<bool>,
}

impl Mixer {
    /// For `sets` sets; `chances` in their order, or empty for turns.
    pub(crate) fn new(strategy: MixStrategy, sets: usize, chances: &[f64], seed: u64) -> Mixer {
        let all: f64 = chances.iter().sum();
        let upto = chances.iter().scan(0.0, |upto, chance| {
            *upto += chance / all;
            Some(*upto)
        });
        Mixer { strategy, upto: upto.collect(), seed, draws: 0, exhausted: vec![false; sets] }
    }

    /// The set whose turn it is; none when the mix is over.
    pub(crate) fn next(&mut self) -> Option<usize> {
        let sets = self.exhausted.len();
        if self.strategy == MixStrategy::Concat {
            return self.exhausted.iter().position(|it| !it);
        }
        // In turns a round is finished; by chance the mix ends at once.
        let round = !self.upto.is_empty() || sets == 0 || self.draws.is_multiple_of(sets as u64);
        let over = match self.strategy {
            MixStrategy::InterleaveUnder => round && (sets == 0 || self.exhausted.contains(&true)),
            MixStrategy::InterleaveOver => round && !self.exhausted.contains(&false),
            _ => !self.exhausted.contains(&false),
        };
        if over {
            return None;
        }
        loop {
            let set = match self.upto.is_empty() {
                true => (self.draws % sets as u64) as usize,
                false => {
                    let draw = (mix(self.seed ^ mix(self.draws)) >> 11) as f64 / (1u64 << 53) as f64;
                    self.upto.iter().position(|upto| draw < *upto).unwrap_or(sets - 1)
                }
            };
            self.draws += 1;
            if self.strategy != MixStrategy::InterleaveOnce || !self.exhausted[set] {
                return Some(set);
            }
        }
    }

    /// Is told that a set has no more rows; says whether it begins again.
    pub(crate) fn used_up(&mut self, set: usize) -> bool {
        self.exhausted[set] = true;
        matches!(self.strategy, MixStrategy::InterleaveOver | MixStrategy::InterleaveUnder)
    }
}

/// The order of rows out of sets of these lengths, as (set, row). Sets without rows are passed over.
pub fn order(strategy: MixStrategy, lengths: &[usize], chances: &[f64], seed: u64) -> Vec<(usize, usize)> {
    let kept: Vec<usize> = (0..lengths.len()).filter(|set| lengths[*set] > 0).collect();
    let chances: Vec<f64> = kept.iter().filter_map(|set| chances.get(*set).copied()).collect();
    let mut mixer = Mixer::new(strategy, kept.len(), &chances, seed);
    let mut next = vec![0; kept.len()];
    let mut order = Vec::new();
    while let Some(at) = mixer.next() {
        let set = kept[at];
        order.push((set, next[at]));
        next[at] += 1;
        if next[at] == lengths[set] && mixer.used_up(at) {
            next[at] = 0;
        }
    }
    order
}

/// `count` of `length` rows, drawn by `seed`: each once, and then some again where there are too few.
pub(crate) fn drawn(length: usize, count: usize, seed: u64) -> Vec<usize> {
    let mut all: Vec<usize> = (0..length).collect();
    shuffle(&mut all, seed, 0);
    all.truncate(count);
    for again in all.len()..count {
        let draw = (u128::from(mix(mix(seed ^ 0xA6A1) ^ again as u64)) * length as u128) >> 64;
        all.push(draw as usize);
    }
    all
}

/// Which of `length` samples are set apart for evaluation, drawn by `seed`: their indices, sorted.
pub fn split(length: usize, evaluation: usize, seed: u64) -> Vec<usize> {
    let mut chosen = drawn(length, evaluation.min(length), mix(seed ^ 0x5E7_A9A7));
    chosen.sort_unstable();
    chosen
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Sets as letters, rows as numbers: `a0 b0 a1`.
    fn check(strategy: MixStrategy, lengths: &[usize], expected: &str) {
        let shown = |(set, row): (usize, usize)| format!("{}{row}", ["a", "b", "c"][set]);
        let shown: Vec<String> = order(strategy, lengths, &[], 7).into_iter().map(shown).collect();
        assert_eq!(shown.join(" "), expected);
    }

    #[test]
    fn in_turns_as_interleave_datasets() {
        check(MixStrategy::Concat, &[2, 1], "a0 a1 b0");
        check(MixStrategy::InterleaveUnder, &[3, 2], "a0 b0 a1 b1");
        check(MixStrategy::InterleaveUnder, &[2, 3], "a0 b0 a1 b1");
        check(MixStrategy::InterleaveOver, &[3, 2], "a0 b0 a1 b1 a2 b0");
        check(MixStrategy::InterleaveOver, &[1, 3], "a0 b0 a0 b1 a0 b2");
        check(MixStrategy::InterleaveOnce, &[3, 1, 2], "a0 b0 c0 a1 c1 a2");
        check(MixStrategy::InterleaveOnce, &[0, 2], "b0 b1");
    }

    #[test]
    fn by_chance() {
        let lengths = [1000, 1000];
        let counts = |order: &[(usize, usize)]| order.iter().filter(|(set, _)| *set == 0).count();
        let under = order(MixStrategy::InterleaveUnder, &lengths, &[0.7, 0.3], 1);
        // The first is used up after about 1000 / 0.7 draws.
        assert_eq!(counts(&under), 1000);
        assert!((1350..1510).contains(&under.len()), "{}", under.len());
        assert_eq!(under, order(MixStrategy::InterleaveUnder, &lengths, &[7.0, 3.0], 1));
        assert_ne!(under, order(MixStrategy::InterleaveUnder, &lengths, &[0.7, 0.3], 2));
        let over = order(MixStrategy::InterleaveOver, &lengths, &[0.7, 0.3], 1);
        assert!((3000..3700).contains(&over.len()), "{}", over.len());
        let mut once = order(MixStrategy::InterleaveOnce, &lengths, &[0.7, 0.3], 1);
        once.sort_unstable();
        once.dedup();
        assert_eq!(once.len(), 2000);
    }

    #[test]
    fn draws() {
        let mut all = drawn(5, 5, 3);
        assert_ne!(all, [0, 1, 2, 3, 4]);
        all.sort_unstable();
        assert_eq!(all, [0, 1, 2, 3, 4]);
        let more = drawn(3, 8, 3);
        assert_eq!((more.len(), more.iter().all(|it| *it < 3)), (8, true));
        assert_eq!(split(10, 3, 1).len(), 3);
        assert_eq!(split(2, 3, 1), [0, 1]);
    }
}
