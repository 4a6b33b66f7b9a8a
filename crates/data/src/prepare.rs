//! Conversations to samples on all cores, and what that gave, set by set.

use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use crate::conversation::Conversation;
use crate::counts::SetCounts;
use crate::error::{Error, Place, Result};
use crate::marked::Sample;
use crate::source::Dropped;

/// Conversations encoded between two calls of `progress`: enough to keep the cores busy.
const CHUNK: usize = 2048;

/// Makes a sample of a conversation.
pub type Encode<'a> = &'a (dyn Fn(&Conversation) -> Result<Sample> + Sync);

/// A data set, read and encoded.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PreparedSet {
    /// What reading gave.
    pub counts: SetCounts,
    /// What is trained on, in the order of the rows.
    #[serde(skip)]
    pub samples: Vec<Sample>,
    /// Conversations that gave nothing to train on.
    pub dropped: Vec<Dropped>,
}

/// Encodes conversations on all cores, in order; `progress` is told how many are done. Those that give nothing to
/// train on, and those the template refuses, are left out.
///
/// # Errors
/// Those of `encode` that aren't about one conversation.
pub fn encode_set(
    counts: SetCounts,
    conversations: &[(Place, Conversation)],
    encode: Encode,
    progress: &mut dyn FnMut(usize),
) -> Result<PreparedSet> {
    let mut set = PreparedSet { counts, ..PreparedSet::default() };
    set.samples.reserve(conversations.len());
    for chunk in conversations.chunks(CHUNK) {
        let encoded: Vec<Result<Sample>> = chunk.par_iter().map(|(_, it)| encode(it)).collect();
        for (result, (place, _)) in encoded.into_iter().zip(chunk) {
            match usable(result, place)? {
                Ok(sample) => set.samples.push(sample),
                Err(dropped) => set.dropped.push(dropped),
            }
        }
        progress(set.samples.len() + set.dropped.len());
    }
    Ok(set)
}

/// A sample, or why there is none; other errors are passed on.
pub(crate) fn usable(result: Result<Sample>, place: &Place) -> Result<Result<Sample, Dropped>> {
    match result {
        Ok(sample) => Ok(Ok(sample)),
        Err(error @ (Error::Sample(_) | Error::Template { .. })) => {
            Ok(Err(Dropped { place: place.clone(), reason: error.to_string() }))
        }
        Err(error) => Err(error),
    }
}

/// Texts of pretraining that are longer than `longest` tokens as several samples: nothing is cut off. A piece of one
/// token would train nothing and stays with the one before it, which is then shorter by one.
pub fn split_long(samples: Vec<Sample>, longest: usize) -> Vec<Sample> {
    let longest = longest.max(2);
    samples.into_iter().flat_map(|sample| pieces(sample, longest)).collect()
}

pub(crate) fn pieces(sample: Sample, longest: usize) -> Vec<Sample> {
    if sample.tokens.len() <= longest {
        return vec![sample];
    }
    let mut pieces = Vec::new();
    let mut from = 0;
    while from < sample.tokens.len() {
        let left = sample.tokens.len() - from;
        let count = if left == longest + 1 && longest > 2 { longest - 1 } else { longest.min(left) };
        pieces.push(Sample {
            tokens: sample.tokens[from..from + count].to_vec(),
            trained: sample.trained[from..from + count].to_vec(),
            ..Sample::default()
        });
        from += count;
    }
    pieces.retain(|piece| piece.trained_tokens() > 0);
    pieces
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_texts_are_cut_into_pieces_that_hold_everything() {
        let check = |length: usize, longest: usize, expected: &[usize]| {
            let tokens: Vec<u32> = (0..length as u32).collect();
            let sample = Sample { trained: vec![true; length], tokens: tokens.clone(), ..Sample::default() };
            let pieces = split_long(vec![sample], longest);
            let lengths: Vec<usize> = pieces.iter().map(|it| it.tokens.len()).collect();
            assert_eq!(lengths, expected);
            assert_eq!(pieces.into_iter().flat_map(|it| it.tokens).collect::<Vec<_>>(), tokens);
        };
        check(5, 8, &[5]);
        check(8, 4, &[4, 4]);
        check(9, 4, &[4, 3, 2]);
        check(10, 4, &[4, 4, 2]);
    }
}
