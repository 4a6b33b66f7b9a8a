//! What a set of samples is like: counts, lengths, what was cut and what was left out.

use crate::marked::Sample;
use crate::source::Dropped;

/// Statistics over samples.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Report {
    /// Number of samples.
    pub samples: usize,
    /// Tokens of all samples.
    pub tokens: usize,
    /// Tokens that are trained as targets.
    pub trained_tokens: usize,
    /// Samples that were longer than the cutoff.
    pub truncated: usize,
    /// Tokens cut off from these.
    pub cut_tokens: usize,
    /// Rows and conversations left out, with reasons.
    pub dropped: Vec<Dropped>,
    /// Length of each sample in tokens, sorted.
    pub lengths: Vec<usize>,
}

/// One bar of a histogram: samples with `from <= length < to`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bar {
    /// Shortest length counted, in tokens.
    pub from: usize,
    /// First length no longer counted.
    pub to: usize,
    /// Number of samples.
    pub samples: usize,
}

impl Report {
    /// Statistics of `samples`, of which `dropped` were left out before.
    pub fn new(samples: &[Sample], dropped: Vec<Dropped>) -> Report {
        let mut lengths: Vec<usize> = samples.iter().map(|sample| sample.tokens.len()).collect();
        lengths.sort_unstable();
        Report {
            samples: samples.len(),
            tokens: lengths.iter().sum(),
            trained_tokens: samples.iter().map(Sample::trained_tokens).sum(),
            truncated: samples.iter().filter(|sample| sample.cut > 0).count(),
            cut_tokens: samples.iter().map(|sample| sample.cut).sum(),
            dropped,
            lengths,
        }
    }

    /// Share of tokens that are trained, 0 to 1.
    pub fn trained_share(&self) -> f64 {
        self.trained_tokens as f64 / self.tokens.max(1) as f64
    }

    /// The length that a `share` (0 to 1) of the samples does not exceed; 0 without samples.
    pub fn quantile(&self, share: f64) -> usize {
        let last = self.lengths.len().saturating_sub(1);
        let at = (share.clamp(0.0, 1.0) * last as f64).round() as usize;
        self.lengths.get(at).copied().unwrap_or(0)
    }

    /// Lengths in at most `bars` bars of equal width, a round number of tokens, from 0 to the longest.
    pub fn histogram(&self, bars: usize) -> Vec<Bar> {
        let Some(&longest) = self.lengths.last() else { return Vec::new() };
        let raw = (longest + 1).div_ceil(bars.max(1));
        let step = (0..).flat_map(|power| [1, 2, 5].map(|digit| digit * 10usize.pow(power)));
        let width = step.take_while(|step| *step < 1_000_000_000).find(|step| *step >= raw).unwrap_or(raw);
        let count = longest / width + 1;
        let mut histogram: Vec<Bar> = (0..count)
            .map(|index| Bar { from: index * width, to: (index + 1) * width, samples: 0 })
            .collect();
        for length in &self.lengths {
            histogram[length / width].samples += 1;
        }
        histogram
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn histogram_has_round_bars() {
        let check = |lengths: &[usize], bars: usize, expected: &[(usize, usize, usize)]| {
            let samples: Vec<Sample> = lengths
                .iter()
                .map(|length| Sample {
                    tokens: vec![0; *length],
                    trained: vec![true; *length],
                    ..Sample::default()
                })
                .collect();
            let report = Report::new(&samples, Vec::new());
            let bars = report.histogram(bars).iter().map(|b| (b.from, b.to, b.samples)).collect::<Vec<_>>();
            assert_eq!(bars, expected);
        };
        check(&[3, 9, 12], 4, &[(0, 5, 1), (5, 10, 1), (10, 15, 1)]);
        check(&[100], 10, &[(0, 20, 0), (20, 40, 0), (40, 60, 0), (60, 80, 0), (80, 100, 0), (100, 120, 1)]);
        check(&[], 10, &[]);
    }
}
