//! Samples to batches: packed rows without padding, shuffled by seed and epoch, resumable at any batch.
//!
//! The order of an epoch is a function of (seed, epoch) alone: a Fisher-Yates shuffle whose draws come from a
//! counter, `mix(seed, epoch, i)` with splitmix64's finaliser, the same on every platform. With packing, samples
//! are put into bins once (best fit, longest first) and the bins are shuffled, so that every epoch has the same
//! number of batches.

use crate::error::{Error, Result};
use crate::marked::Sample;

/// Rows of several sequences, one after another, without padding.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Batch {
    /// Token ids (N).
    pub tokens: Vec<u32>,
    /// The next token in the same sequence (N); 0 at a sequence's last position.
    pub targets: Vec<u32>,
    /// Whether the target is trained on (N); false at a sequence's last position.
    pub trained: Vec<bool>,
    /// First row of each sequence, then N.
    pub sequence_starts: Vec<u32>,
}

impl Batch {
    /// A batch of these samples; each stays a sequence of its own.
    pub fn new<'a>(samples: impl IntoIterator<Item = &'a Sample>) -> Batch {
        let mut batch = Batch { sequence_starts: vec![0], ..Batch::default() };
        for sample in samples.into_iter().filter(|sample| !sample.tokens.is_empty()) {
            batch.tokens.extend(&sample.tokens);
            batch.targets.extend(&sample.tokens[1..]);
            batch.targets.push(0);
            batch.trained.extend(&sample.trained[1..]);
            batch.trained.push(false);
            batch.sequence_starts.push(batch.tokens.len() as u32);
        }
        batch
    }

    /// Number of positions whose target is trained on.
    pub fn trained_tokens(&self) -> usize {
        self.trained.iter().filter(|trained| **trained).count()
    }

    /// Number of sequences.
    pub fn sequences(&self) -> usize {
        self.sequence_starts.len().saturating_sub(1)
    }
}

/// How samples become batches.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BatchOptions {
    /// Sequences in a batch; with packing, bins in a batch.
    pub per_device_train_batch_size: usize,
    /// Whether several samples share a bin of up to `cutoff_len` tokens; they stay sequences of their own.
    pub packing: bool,
    /// Size of a bin in tokens.
    pub cutoff_len: usize,
    /// Seed of the order.
    pub seed: u64,
    /// Whether the order changes with the epoch; false keeps the order of the data.
    pub shuffle: bool,
    /// Puts samples of like lengths into the same step, which takes so many (transformers'
    /// `group_by_length`); 0: no.
    pub group_by_length: usize,
}

/// Where a source of batches stands: the batch that [`BatchSource::next`] gives next.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Cursor {
    /// Epoch, from 0.
    pub epoch: u64,
    /// Batch within the epoch, from 0.
    pub position: u64,
}

/// Gives batches, epoch after epoch.
pub trait BatchSource: Send {
    /// The next batch; none once at the end of each epoch, after which the next epoch begins.
    fn next(&mut self) -> Result<Option<Batch>>;

    /// Where the source stands.
    fn cursor(&self) -> Cursor;

    /// Goes to `cursor`; what follows is what followed when the cursor was taken.
    fn seek(&mut self, cursor: Cursor);

    /// Number of batches in an epoch.
    fn batches_per_epoch(&self) -> usize;

    /// Trained tokens of the next `batches` batches of this epoch (fewer where it ends before): the divisor of
    /// an optimizer step, known before its first micro-batch.
    fn trained_ahead(&self, batches: usize) -> usize;

    /// Numbers of the samples in the same batches, for messages; none from a source that doesn't count them.
    fn samples_ahead(&self, _batches: usize) -> Vec<usize> {
        Vec::new()
    }
}

/// Batches of samples held in memory.
#[derive(Debug)]
pub struct Batches {
    samples: Vec<Sample>,
    /// Samples that go together: one each without packing.
    bins: Vec<Vec<usize>>,
    options: BatchOptions,
    cursor: Cursor,
    /// The bins in this epoch's order.
    order: Vec<usize>,
}

impl Batches {
    /// Batches of `samples`. Fails without samples, with a batch size of 0, or a sample longer than a bin.
    pub fn new(samples: Vec<Sample>, options: BatchOptions) -> Result<Batches> {
        if samples.is_empty() {
            return Err(Error::Dataset("no samples to make batches of".to_string()));
        }
        if options.per_device_train_batch_size == 0 {
            return Err(Error::Dataset("per_device_train_batch_size is 0; expected at least 1".to_string()));
        }
        let bins = if options.packing {
            packed(&samples, options.cutoff_len)?
        } else {
            (0..samples.len()).map(|index| vec![index]).collect()
        };
        let mut batches = Batches { samples, bins, options, cursor: Cursor::default(), order: Vec::new() };
        batches.seek(Cursor::default());
        Ok(batches)
    }

    /// The samples, in the order they were given.
    pub fn samples(&self) -> &[Sample] {
        &self.samples
    }

    /// Optimizer steps in an epoch when each takes `gradient_accumulation_steps` batches; the last may take fewer.
    pub fn steps_per_epoch(&self, gradient_accumulation_steps: usize) -> usize {
        self.batches_per_epoch().div_ceil(gradient_accumulation_steps.max(1))
    }

    /// Sorts stretches of the order, of about fifty steps each, by falling length; the longest bin comes first,
    /// so that memory that doesn't suffice shows at once (`get_length_grouped_indices` of transformers).
    fn group_by_length(&mut self) {
        let length =
            |bin: &usize| -> usize { self.bins[*bin].iter().map(|it| self.samples[*it].tokens.len()).sum() };
        let step = self.options.group_by_length;
        let stretch = step * (self.order.len() / (step * 4)).clamp(1, 50);
        for bins in self.order.chunks_mut(stretch) {
            bins.sort_by_key(|bin| std::cmp::Reverse(length(bin)));
        }
        let firsts = (0..self.order.len()).step_by(stretch);
        if let Some(longest) = firsts.max_by_key(|at| (length(&self.order[*at]), std::cmp::Reverse(*at))) {
            self.order.swap(0, longest);
        }
    }

    fn bins_of(&self, position: u64) -> &[usize] {
        let size = self.options.per_device_train_batch_size;
        let start = (position as usize).saturating_mul(size).min(self.order.len());
        &self.order[start..start.saturating_add(size).min(self.order.len())]
    }
}

impl BatchSource for Batches {
    fn next(&mut self) -> Result<Option<Batch>> {
        let bins = self.bins_of(self.cursor.position);
        if bins.is_empty() {
            self.seek(Cursor { epoch: self.cursor.epoch + 1, position: 0 });
            return Ok(None);
        }
        let samples = bins.iter().flat_map(|bin| &self.bins[*bin]).map(|index| &self.samples[*index]);
        let batch = Batch::new(samples);
        self.cursor.position += 1;
        Ok(Some(batch))
    }

    fn cursor(&self) -> Cursor {
        self.cursor
    }

    fn seek(&mut self, cursor: Cursor) {
        if self.order.is_empty() || cursor.epoch != self.cursor.epoch {
            self.order = (0..self.bins.len()).collect();
            if self.options.shuffle {
                shuffle(&mut self.order, self.options.seed, cursor.epoch);
            }
            if self.options.group_by_length > 0 {
                self.group_by_length();
            }
        }
        self.cursor = cursor;
    }

    fn batches_per_epoch(&self) -> usize {
        self.bins.len().div_ceil(self.options.per_device_train_batch_size)
    }

    fn trained_ahead(&self, batches: usize) -> usize {
        (0..batches as u64)
            .flat_map(|ahead| self.bins_of(self.cursor.position + ahead))
            .flat_map(|bin| &self.bins[*bin])
            .map(|index| self.samples[*index].trained_tokens())
            .sum()
    }

    fn samples_ahead(&self, batches: usize) -> Vec<usize> {
        let bins = (0..batches as u64).flat_map(|ahead| self.bins_of(self.cursor.position + ahead));
        bins.flat_map(|bin| &self.bins[*bin]).copied().collect()
    }
}

/// Bins of at most `size` tokens: longest sample first, each into the fullest bin it fits.
pub(crate) fn packed(samples: &[Sample], size: usize) -> Result<Vec<Vec<usize>>> {
    let mut by_length: Vec<usize> = (0..samples.len()).collect();
    by_length.sort_by_key(|index| (std::cmp::Reverse(samples[*index].tokens.len()), *index));
    let mut bins: Vec<Vec<usize>> = Vec::new();
    // Bins by the room they have left, so that the best fit is the first with enough.
    let mut room: std::collections::BTreeSet<(usize, usize)> = std::collections::BTreeSet::new();
    for index in by_length {
        let length = samples[index].tokens.len();
        if length > size {
            return Err(Error::Dataset(format!(
                "sample {index} has {length} tokens and does not fit a pack of cutoff_len {size}"
            )));
        }
        let (left, bin) = match room.range((length, 0)..).next().copied() {
            Some(best) => {
                room.remove(&best);
                best
            }
            None => {
                bins.push(Vec::new());
                (size, bins.len() - 1)
            }
        };
        bins[bin].push(index);
        room.insert((left - length, bin));
    }
    Ok(bins)
}

pub(crate) fn shuffle<T>(order: &mut [T], seed: u64, epoch: u64) {
    let key = mix(mix(seed) ^ epoch);
    for last in (1..order.len()).rev() {
        // The high half of a 64 × 64 bit product is a uniform number below `last + 1`, up to 2^-64 · last.
        let draw = (u128::from(mix(key.wrapping_add(last as u64))) * (last as u128 + 1)) >> 64;
        order.swap(last, draw as usize);
    }
}

/// splitmix64's step and finaliser.
pub(crate) fn mix(value: u64) -> u64 {
    let mut z = value.wrapping_add(0x9E37_79B9_7F4A_7C15);
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample(length: usize, first: u32) -> Sample {
        let tokens: Vec<u32> = (0..length as u32).map(|at| first + at).collect();
        Sample { trained: tokens.iter().map(|token| token % 2 == 0).collect(), tokens, ..Sample::default() }
    }

    fn options() -> BatchOptions {
        BatchOptions {
            per_device_train_batch_size: 2,
            packing: false,
            cutoff_len: 8,
            seed: 7,
            shuffle: true,
            group_by_length: 0,
        }
    }

    fn epoch(batches: &mut Batches) -> Vec<Batch> {
        std::iter::from_fn(|| batches.next().unwrap()).collect()
    }

    #[test]
    fn targets_stay_in_their_sequence() {
        let batch = Batch::new([&sample(3, 10), &sample(2, 20)]);
        assert_eq!(batch.tokens, [10, 11, 12, 20, 21]);
        assert_eq!(batch.targets, [11, 12, 0, 21, 0]);
        assert_eq!(batch.trained, [false, true, false, false, false]);
        assert_eq!(batch.sequence_starts, [0, 3, 5]);
        assert_eq!((batch.trained_tokens(), batch.sequences()), (1, 2));
    }

    #[test]
    fn an_epoch_has_every_sample_once() {
        let samples: Vec<Sample> = (0..7).map(|index| sample(1 + index, 100 * index as u32)).collect();
        for packing in [false, true] {
            let mut batches = Batches::new(samples.clone(), BatchOptions { packing, ..options() }).unwrap();
            let (first, second) = (epoch(&mut batches), epoch(&mut batches));
            assert_ne!(first, second);
            for all in [&first, &second] {
                assert_eq!(all.len(), batches.batches_per_epoch());
                let starts = all.iter().flat_map(|batch| {
                    let starts = &batch.sequence_starts[..batch.sequences()];
                    starts.iter().map(|start| batch.tokens[*start as usize]).collect::<Vec<_>>()
                });
                let mut starts: Vec<u32> = starts.collect();
                starts.sort_unstable();
                assert_eq!(starts, [0, 100, 200, 300, 400, 500, 600], "{packing}");
            }
        }
    }

    #[test]
    fn packing_fills_bins() {
        let samples: Vec<Sample> = [5, 3, 4, 4, 8, 1].into_iter().map(|length| sample(length, 0)).collect();
        let bins = packed(&samples, 8).unwrap();
        assert_eq!(bins, [vec![4], vec![0, 1], vec![2, 3], vec![5]]);
        let error = packed(&samples, 7).unwrap_err().to_string();
        assert_eq!(error, "sample 4 has 8 tokens and does not fit a pack of cutoff_len 7");
    }

    #[test]
    fn resuming_goes_on_exactly() {
        let samples: Vec<Sample> = (0..9).map(|index| sample(4, 10 * index)).collect();
        let mut batches = Batches::new(samples.clone(), options()).unwrap();
        let mut all = Vec::new();
        let mut cursors = Vec::new();
        for _ in 0..14 {
            cursors.push(batches.cursor());
            all.push(batches.next().unwrap());
        }
        for (index, cursor) in cursors.iter().enumerate() {
            let mut resumed = Batches::new(samples.clone(), options()).unwrap();
            resumed.seek(*cursor);
            for expected in &all[index..] {
                assert_eq!(&resumed.next().unwrap(), expected);
            }
        }
    }

    #[test]
    fn tokens_of_a_step_are_known_ahead() {
        let samples: Vec<Sample> = (0..5).map(|index| sample(3 + index, 0)).collect();
        let mut batches = Batches::new(samples, options()).unwrap();
        assert_eq!((batches.batches_per_epoch(), batches.steps_per_epoch(2)), (3, 2));
        let ahead = batches.trained_ahead(2);
        let step: usize = (0..2).map(|_| batches.next().unwrap().unwrap().trained_tokens()).sum();
        assert_eq!(ahead, step);
        assert_eq!(batches.trained_ahead(2), batches.trained_ahead(1));
    }

    #[test]
    fn the_order_is_fixed_by_seed_and_epoch() {
        let order = |seed: u64, epoch: u64| {
            let mut order: Vec<usize> = (0..8).collect();
            shuffle(&mut order, seed, epoch);
            order
        };
        assert_eq!(order(42, 0), order(42, 0));
        assert_ne!(order(42, 0), order(42, 1));
        assert_ne!(order(42, 0), order(43, 0));
        assert_eq!(mix(0), 0xE220_A839_7B1D_CDAF);
    }

    #[test]
    fn lengths_that_are_alike_go_together() {
        let samples: Vec<Sample> = (0..96).map(|n| sample(2 + (n * 37) % 95, 0)).collect();
        let grouped = |group_by_length: usize| {
            let options = BatchOptions { per_device_train_batch_size: 4, group_by_length, ..options() };
            let mut batches = Batches::new(samples.clone(), options).unwrap();
            let (mut spread, mut tokens, mut first) = (0, 0, 0);
            while let Some(batch) = batches.next().unwrap() {
                let lengths: Vec<u32> = batch.sequence_starts.windows(2).map(|it| it[1] - it[0]).collect();
                spread += lengths.iter().max().unwrap() - lengths.iter().min().unwrap();
                first = if tokens == 0 { lengths[0] } else { first };
                tokens += batch.tokens.len();
            }
            (spread, tokens, first)
        };
        let (mixed, grouped) = (grouped(0), grouped(4));
        assert_eq!(mixed.1, grouped.1, "each sample once");
        assert!(grouped.0 * 3 < mixed.0, "{} {}", grouped.0, mixed.0);
        assert_eq!(grouped.2, 96, "the longest first");
    }
}
