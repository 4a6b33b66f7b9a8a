//! Samples longer than `cutoff_len`, cut as LLaMA-Factory does it (`infer_seqlen` in its `processor_utils.py`).
//!
//! A sample is pairs of what is read (source) and what is answered (target). From the first pair on (with `mask_history`
//! from the last), each takes what the budget has left: where the target is under half of it, the source is cut;
//! else where the source is, the target; else both in proportion. So a long prompt doesn't push its answer out.

use std::ops::Range;

use crate::error::{Result, SampleError};
use crate::marked::Sample;

/// The pairs of a sample: first token of each source, of its target, and the end of that.
pub(crate) type Pair = (usize, usize, usize);

/// Source and target lengths that fit `budget`.
fn fitting(source: usize, target: usize, budget: usize) -> (usize, usize) {
    let most = if target * 2 < budget {
        budget
    } else if source * 2 < budget {
        budget - source
    } else {
        (budget as f64 * (target as f64 / (source + target) as f64)) as usize
    };
    let target = most.min(target);
    (source.min(budget.saturating_sub(target)), target)
}

/// Which pairs come first when there is not room for all.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Keep {
    First,
    Last,
}

/// Token ranges that are kept of `length` tokens in `pairs`.
fn kept(length: usize, pairs: &[Pair], cutoff_len: usize, keep: Keep) -> Vec<Range<usize>> {
    let mut ranges = Vec::new();
    let mut budget = cutoff_len;
    let mut add = |(start, target, end): Pair| {
        let (source_len, target_len) = fitting(target - start, end - target, budget);
        budget -= source_len + target_len;
        ranges.push(start..start + source_len);
        ranges.push(target..target + target_len);
    };
    match keep {
        Keep::First => pairs.iter().for_each(|pair| add(*pair)),
        Keep::Last => pairs.iter().rev().for_each(|pair| add(*pair)),
    }
    // What follows the last answer is read by nobody; it is there only where there is room.
    let rest = pairs.last().map_or(0, |pair| pair.2);
    ranges.push(rest..length.min(rest + budget));
    ranges.sort_by_key(|range| range.start);
    ranges
}

/// The sample of these tokens, and which of them it has; an error where nothing to train on is left. Without pairs, the
/// end is cut off.
pub(crate) fn cut(
    tokens: &[u32],
    trained: &[bool],
    pairs: &[Pair],
    cutoff_len: usize,
    keep: Keep,
    why_none: impl Fn() -> String,
) -> Result<(Sample, Vec<Range<usize>>)> {
    let of = |ranges: &[Range<usize>]| Sample {
        tokens: ranges.iter().flat_map(|range| &tokens[range.clone()]).copied().collect(),
        trained: ranges.iter().flat_map(|range| &trained[range.clone()]).copied().collect(),
        cut: tokens.len() - ranges.iter().map(ExactSizeIterator::len).sum::<usize>(),
    };
    let first = trained.iter().skip(1).position(|trained| *trained).map(|at| at + 1);
    let Some(first) = first else { return Err(SampleError::NothingTrained(why_none()).into()) };
    let ranges = match tokens.len() > cutoff_len {
        true => kept(tokens.len(), pairs, cutoff_len, keep),
        false => std::iter::once(0..tokens.len()).collect(),
    };
    let sample = of(&ranges);
    if sample.trained_tokens() == 0 {
        let trained = trained.iter().skip(1).filter(|trained| **trained).count();
        return Err(SampleError::CutAway { cutoff_len, trained, first }.into());
    }
    Ok((sample, ranges))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lengths_are_llama_factorys() {
        // (source, target, cutoff) → (source, target), by its own function.
        let check = |input: (usize, usize, usize), expected: (usize, usize)| {
            assert_eq!(fitting(input.0, input.1, input.2), expected, "{input:?}");
        };
        check((3000, 2000, 1000), (600, 400));
        check((2000, 3000, 1000), (400, 600));
        check((1000, 100, 1000), (900, 100));
        check((100, 1000, 1000), (100, 900));
        check((200, 700, 1000), (200, 700));
        check((0, 5, 3), (0, 3));
        check((5, 5, 0), (0, 0));
        check((7, 3, 5), (4, 1));
    }

    #[test]
    fn pairs_share_the_room() {
        let pairs = [(0, 6, 10), (10, 12, 20), (20, 26, 30)];
        let check = |length: usize, cutoff: usize, keep: Keep, expected: &[Range<usize>]| {
            let ranges: Vec<_> =
                kept(length, &pairs, cutoff, keep).into_iter().filter(|it| !it.is_empty()).collect();
            assert_eq!(ranges, expected);
            assert!(ranges.iter().map(ExactSizeIterator::len).sum::<usize>() <= cutoff);
        };
        check(32, 31, Keep::First, &[0..6, 6..10, 10..12, 12..20, 20..26, 26..30, 30..31]);
        check(32, 16, Keep::First, &[0..6, 6..10, 10..12, 12..16]);
        check(32, 9, Keep::First, &[0..5, 6..10]);
        check(32, 8, Keep::First, &[0..5, 6..9]);
        check(32, 16, Keep::Last, &[10..12, 12..16, 20..26, 26..30]);
    }
}
