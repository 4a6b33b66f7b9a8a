use std::sync::{Arc, Mutex, OnceLock};

use ferrotune_tensor::{DType, Device, Error, Result, Tensor};

use crate::{Context, Rope};

/// What the layers of one pass share and would else make again: tables of angles, and on a GPU the
/// list of attention's blocks.
#[derive(Debug, Default)]
pub struct PassCache {
    pub(crate) rope: Mutex<Vec<(Rope, DType, Arc<Tensor>)>>,
    /// (1, half) in f32: those of each rope, on a GPU.
    pub(crate) frequencies: Mutex<Vec<(Rope, Arc<Tensor>)>>,
    query_blocks: OnceLock<(usize, Tensor)>,
    key_blocks: OnceLock<(usize, Tensor)>,
}

impl PassCache {
    /// Forgets the tables of angles, which belong to the positions of one pass.
    pub fn forget_angles(&self) {
        self.rope.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).clear();
    }
}

impl Context {
    /// (blocks, 4) of at most `most` queries: first query row, queries, first key row, position of the
    /// first query; those with the most keys first, so that no long one begins when others end. All layers
    /// of a model take blocks of one size.
    pub(crate) fn query_blocks(&self, device: &Device, most: usize) -> Result<&Tensor> {
        let block = |sequence: &std::ops::Range<usize>, start: usize| {
            [start, most.min(sequence.end - start), sequence.start, start - sequence.start]
        };
        self.blocks(&self.shared.query_blocks, device, most, block, |[.., position]| position)
    }

    /// (blocks, 4) of at most `most` keys: first key row, keys, first row and end of the sequence.
    pub(crate) fn key_blocks(&self, device: &Device, most: usize) -> Result<&Tensor> {
        let block = |sequence: &std::ops::Range<usize>, start: usize| {
            [start, most.min(sequence.end - start), sequence.start, sequence.end]
        };
        self.blocks(&self.shared.key_blocks, device, most, block, |[key, _, _, end]| end - key)
    }

    fn blocks<'a>(
        &'a self,
        kept: &'a OnceLock<(usize, Tensor)>,
        device: &Device,
        most: usize,
        block: impl Fn(&std::ops::Range<usize>, usize) -> [usize; 4],
        work: impl Fn([usize; 4]) -> usize,
    ) -> Result<&'a Tensor> {
        if let Some((size, blocks)) = kept.get() {
            if *size != most {
                return Err(Error::msg(format!(
                    "attention in blocks of {most} rows and of {size} in one pass"
                )));
            }
            return Ok(blocks);
        }
        let mut all = Vec::new();
        for sequence in self.sequences() {
            all.extend(sequence.clone().step_by(most).map(|start| block(&sequence, start)));
        }
        all.sort_by_key(|it| std::cmp::Reverse(work(*it)));
        let blocks = descriptors(all.into_iter(), device)?;
        Ok(&kept.get_or_init(|| (most, blocks)).1)
    }
}

/// Blocks as the kernels read them.
pub(crate) fn descriptors(blocks: impl Iterator<Item = [usize; 4]>, device: &Device) -> Result<Tensor> {
    let words: Result<Vec<u32>> = blocks
        .flatten()
        .map(|it| {
            i32::try_from(it)
                .map(|it| it as u32)
                .map_err(|_| Error::msg(format!("row {it} is beyond what a pass counts")))
        })
        .collect();
    let words = words?;
    Tensor::from_vec(words.len() / 4, 4, words)?.to_device(device)
}
