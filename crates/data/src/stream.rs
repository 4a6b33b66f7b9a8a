//! Batches of data that doesn't fit in memory: read, encoded and shuffled as they are asked for.
//!
//! In memory are a buffer of samples, out of which each next one is drawn, and the batches that were asked for ahead.
//! Everything drawn is a function of seed, epoch and a counter, so that a cursor is found again by reading from the
//! start of its epoch.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::path::{Path, PathBuf};

use rayon::prelude::*;

use crate::batch::{Batch, BatchOptions, BatchSource, Cursor, mix, packed, shuffle};
use crate::conversation::Conversation;
use crate::counts::SetCounts;
use crate::error::{Error, Place, Result};
use crate::marked::Sample;
use crate::mixing::{MixStrategy, Mixer};
use crate::prepare::{pieces, usable};
use crate::source::{DataSet, SetReader, SourceOptions};

/// Conversations that are read before they are encoded together, on all cores.
const CHUNK: usize = 512;
/// Samples among which bins are filled, with packing.
const WINDOW: usize = 1024;

/// What is done with texts that are too long.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Long {
    /// Whatever `encode` does.
    AsEncoded,
    /// Several samples are made of one, as in pretraining.
    Split,
}

/// How a stream is made.
pub struct StreamOptions {
    /// How samples become batches; `shuffle` draws from the buffer.
    pub batch: BatchOptions,
    /// Samples in the buffer of which each next one is drawn.
    pub buffer_size: usize,
    /// How several sets become one.
    pub strategy: MixStrategy,
    /// Chances of the sets, or empty for turns.
    pub chances: Vec<f64>,
    /// The first so many samples are left to evaluation.
    pub evaluation: usize,
    /// What is done with samples longer than `batch.cutoff_len`.
    pub long: Long,
}

type Encode = Box<dyn Fn(&Conversation) -> Result<Sample> + Send + Sync>;

/// What a pass is made of.
struct Input {
    sets: Vec<DataSet>,
    source: SourceOptions,
    encode: Encode,
    options: StreamOptions,
}

/// Batches that are made as they are asked for.
pub struct StreamedBatches {
    input: Input,
    cursor: Cursor,
    /// Is read ahead by [`BatchSource::trained_ahead`], too.
    reading: RefCell<Reading>,
}

/// A set, with the conversation that comes next read already: so it is known when the last one is given.
struct Opened {
    reader: SetReader,
    next: Option<(Place, Conversation)>,
}

impl Opened {
    fn new(set: &DataSet, source: &SourceOptions) -> Result<Opened> {
        let mut reader = set.reader(source)?.without_duplicates();
        let next = reader.next_conversation()?;
        reader.check_used()?;
        Ok(Opened { reader, next })
    }
}

/// One pass over the data, as far as it is.
struct Reading {
    epoch: u64,
    sets: Vec<Opened>,
    mixer: Mixer,
    /// Samples left to evaluation that are still to come.
    evaluation: usize,
    /// Out of which the next samples are drawn.
    buffer: Vec<Sample>,
    /// Samples drawn so far.
    drawn: u64,
    /// All rows were read.
    read: bool,
    /// Samples in their order, not yet in a batch.
    waiting: Vec<Sample>,
    ready: VecDeque<Batch>,
    /// What a method that gives no error met.
    error: Option<Error>,
}

impl StreamedBatches {
    /// Opens the sets and reads as far as the first batch.
    ///
    /// # Errors
    /// When one can't be opened or its form isn't known, when a set asks for `num_samples`, or nothing can be trained
    /// on though nothing is left to evaluation.
    pub fn new(
        sets: Vec<DataSet>,
        source: SourceOptions,
        encode: impl Fn(&Conversation) -> Result<Sample> + Send + Sync + 'static,
        options: StreamOptions,
    ) -> Result<StreamedBatches> {
        if let Some(set) = sets.iter().find(|set| set.num_samples.is_some()) {
            return Err(Error::Dataset(format!(
                "data set `{}` asks for `num_samples`, which are drawn from the whole set: not with `streaming`",
                set.name
            )));
        }
        let input = Input { sets, source, encode: Box::new(encode), options };
        let reading = RefCell::new(Reading::new(&input, 0, input.options.evaluation)?);
        let batches = StreamedBatches { input, cursor: Cursor::default(), reading };
        batches.read_ahead(1)?;
        if batches.is_empty() && batches.input.options.evaluation == 0 {
            return Err(Error::Dataset("no row of the data gives anything to train on".to_string()));
        }
        Ok(batches)
    }

    /// Whether there is no batch at all.
    pub fn is_empty(&self) -> bool {
        self.reading.borrow().ready.is_empty()
    }

    /// The samples left to evaluation: the first ones, in their order.
    ///
    /// # Errors
    /// As reading does.
    pub fn evaluation(&self) -> Result<Vec<Sample>> {
        let mut reading = Reading::new(&self.input, 0, 0)?;
        let mut samples = Vec::new();
        while samples.len() < self.input.options.evaluation && !reading.read {
            samples.extend(reading.chunk(&self.input)?);
        }
        samples.truncate(self.input.options.evaluation);
        Ok(samples)
    }

    /// The files that are read.
    pub fn files(&self) -> impl Iterator<Item = &Path> {
        self.input.sets.iter().flat_map(|set| set.files.iter().map(PathBuf::as_path))
    }

    /// What reading gave in this epoch so far; conversations that gave nothing to train on count as left out.
    pub fn counts(&self) -> Vec<SetCounts> {
        self.reading.borrow().sets.iter().map(|set| set.reader.counts().clone()).collect()
    }

    /// Makes batches until so many are ready or the epoch is over.
    fn read_ahead(&self, batches: usize) -> Result<()> {
        let reading = &mut *self.reading.borrow_mut();
        while reading.ready.len() < batches && !reading.over() {
            reading.more(&self.input)?;
        }
        Ok(())
    }
}

impl Reading {
    fn new(input: &Input, epoch: u64, evaluation: usize) -> Result<Reading> {
        let options = &input.options;
        let opened = input.sets.iter().map(|set| Opened::new(set, &input.source));
        Ok(Reading {
            epoch,
            sets: opened.collect::<Result<_>>()?,
            mixer: Mixer::new(options.strategy, input.sets.len(), &options.chances, options.batch.seed),
            evaluation,
            buffer: Vec::new(),
            drawn: 0,
            read: false,
            waiting: Vec::new(),
            ready: VecDeque::new(),
            error: None,
        })
    }

    fn over(&self) -> bool {
        self.read && self.buffer.is_empty() && self.waiting.is_empty()
    }

    /// Reads and encodes the next conversations of the mix.
    fn chunk(&mut self, input: &Input) -> Result<Vec<Sample>> {
        let mut conversations = Vec::with_capacity(CHUNK);
        while conversations.len() < CHUNK {
            let Some(set) = self.mixer.next() else {
                self.read = true;
                break;
            };
            let opened = &mut self.sets[set];
            // The mixer asks a set that is used up only after that was begun again.
            conversations.extend(opened.next.take().map(|conversation| (set, conversation)));
            opened.next = opened.reader.next_conversation()?;
            if opened.next.is_none() && self.mixer.used_up(set) {
                *opened = Opened::new(&input.sets[set], &input.source)?;
            }
        }
        let encoded: Vec<Result<Sample>> =
            conversations.par_iter().map(|(_, (_, conversation))| (input.encode)(conversation)).collect();
        let mut samples = Vec::with_capacity(encoded.len());
        for (result, (set, (place, _))) in encoded.into_iter().zip(&conversations) {
            match usable(result, place)? {
                Ok(sample) if input.options.long == Long::Split => {
                    samples.extend(pieces(sample, input.options.batch.cutoff_len));
                }
                Ok(sample) => samples.push(sample),
                Err(dropped) => self.sets[*set].reader.leave_out(&dropped.place, &dropped.reason),
            }
        }
        Ok(samples)
    }

    /// Reads on, draws from the buffer, and makes what batches there are.
    fn more(&mut self, input: &Input) -> Result<()> {
        let options = &input.options;
        let mut samples = if self.read { Vec::new() } else { self.chunk(input)? };
        let left_out = self.evaluation.min(samples.len());
        self.evaluation -= left_out;
        for sample in samples.drain(left_out..) {
            if !options.batch.shuffle {
                self.waiting.push(sample);
            } else if self.buffer.len() < options.buffer_size.max(1) {
                self.buffer.push(sample);
            } else {
                // The new one takes the place of the one that is drawn.
                let key = mix(mix(options.batch.seed) ^ self.epoch);
                let draw = (u128::from(mix(key ^ mix(self.drawn))) * self.buffer.len() as u128) >> 64;
                self.drawn += 1;
                self.waiting.push(std::mem::replace(&mut self.buffer[draw as usize], sample));
            }
        }
        if self.read {
            let mut order: Vec<usize> = (0..self.buffer.len()).collect();
            shuffle(&mut order, options.batch.seed, self.epoch);
            let mut rest: Vec<Option<Sample>> =
                std::mem::take(&mut self.buffer).into_iter().map(Some).collect();
            self.waiting.extend(order.into_iter().filter_map(|index| rest[index].take()));
        }
        self.make_batches(&options.batch)
    }

    /// Puts the waiting samples into batches; all of them once everything was read.
    fn make_batches(&mut self, options: &BatchOptions) -> Result<()> {
        let size = options.per_device_train_batch_size.max(1);
        if !options.packing {
            let whole = self.waiting.len() / size * size;
            let count = if self.read { self.waiting.len() } else { whole };
            let samples: Vec<Sample> = self.waiting.drain(..count).collect();
            self.ready.extend(samples.chunks(size).map(Batch::new));
            return Ok(());
        }
        while self.waiting.len() >= WINDOW || (self.read && !self.waiting.is_empty()) {
            let count = self.waiting.len().min(WINDOW);
            let samples: Vec<Sample> = self.waiting.drain(..count).collect();
            let mut bins = packed(&samples, options.cutoff_len)?;
            if options.shuffle {
                // Bins come longest sample first.
                shuffle(&mut bins, options.seed ^ self.drawn, self.epoch);
            }
            let batch = |bins: &[Vec<usize>]| Batch::new(bins.iter().flatten().map(|index| &samples[*index]));
            self.ready.extend(bins.chunks(size).map(batch));
        }
        Ok(())
    }
}

impl BatchSource for StreamedBatches {
    fn next(&mut self) -> Result<Option<Batch>> {
        if let Some(error) = self.reading.get_mut().error.take() {
            return Err(error);
        }
        self.read_ahead(1)?;
        match self.reading.get_mut().ready.pop_front() {
            Some(batch) => {
                self.cursor.position += 1;
                Ok(Some(batch))
            }
            None => {
                self.seek(Cursor { epoch: self.cursor.epoch + 1, position: 0 });
                Ok(None)
            }
        }
    }

    fn cursor(&self) -> Cursor {
        self.cursor
    }

    fn seek(&mut self, cursor: Cursor) {
        self.cursor = cursor;
        let again = || {
            let mut reading = Reading::new(&self.input, cursor.epoch, self.input.options.evaluation)?;
            let mut passed = 0;
            while passed < cursor.position && !(reading.over() && reading.ready.is_empty()) {
                match reading.ready.pop_front() {
                    Some(_) => passed += 1,
                    None => reading.more(&self.input)?,
                }
            }
            Ok(reading)
        };
        match again() {
            Ok(reading) => *self.reading.get_mut() = reading,
            Err(error) => self.reading.get_mut().error = Some(error),
        }
    }

    /// Nobody knows before the end.
    fn batches_per_epoch(&self) -> usize {
        usize::MAX
    }

    fn trained_ahead(&self, batches: usize) -> usize {
        if let Err(error) = self.read_ahead(batches) {
            self.reading.borrow_mut().error.get_or_insert(error);
        }
        let reading = self.reading.borrow();
        reading.ready.iter().take(batches).map(Batch::trained_tokens).sum()
    }
}

#[cfg(test)]
mod tests;
