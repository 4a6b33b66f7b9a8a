//! A matrix in 4 bits as bitsandbytes keeps it, and what it means.
//!
//!   w = table[code]·absmax, in f32, rounded to the original's type
//!   absmax = map[code]·nested_absmax + offset, where scales are quantised as well
//! Source: bitsandbytes/functional.py, csrc/kernels.cu.

use std::borrow::Cow;
use std::ops::Range;

use ferrotune_tensor::{DType, Result, Tensor, bf16, f16};
use rayon::prelude::*;

/// A matrix in 4 bits: two codes in a byte, the earlier element of the row-major matrix in the high half.
#[derive(Clone, Debug, PartialEq)]
pub struct FourBit<'a> {
    /// Rows.
    pub rows: usize,
    /// Columns.
    pub cols: usize,
    /// ⌈rows·cols / 2⌉ bytes.
    pub codes: Cow<'a, [u8]>,
    /// What the codes stand for.
    pub table: [f32; 16],
    /// Elements that share a scale: a power of two.
    pub block: usize,
    /// One for each block.
    pub scales: FourBitScales,
    /// The original's type: f32, f16 or bf16.
    pub dtype: DType,
}

/// The scales of a [`FourBit`]'s blocks.
#[derive(Clone, Debug, PartialEq)]
pub enum FourBitScales {
    /// One f32 a block.
    Plain(Vec<f32>),
    /// One byte a block.
    Nested {
        /// One a block.
        codes: Vec<u8>,
        /// 256 numbers that the bytes stand for.
        map: Vec<f32>,
        /// Blocks that share a scale of scales: a power of two.
        group: usize,
        /// One for each group.
        nested_absmax: Vec<f32>,
        /// Added to each scale.
        offset: f32,
    },
}

impl FourBitScales {
    fn of_block(&self, block: usize) -> f32 {
        match self {
            FourBitScales::Plain(values) => values[block],
            FourBitScales::Nested { codes, map, group, nested_absmax, offset } => {
                map[usize::from(codes[block])] * nested_absmax[block / group] + offset
            }
        }
    }
}

impl FourBit<'_> {
    /// Writes some rows as f32, rounded to the original's type.
    pub fn read_rows(&self, rows: Range<usize>, out: &mut [f32]) {
        const BLOCKS: usize = 256;
        let (start, step) = (rows.start * self.cols, BLOCKS * self.block);
        out.par_chunks_mut(step).enumerate().for_each(|(part, out)| {
            let mut at = start + part * step;
            let mut rest = out;
            while !rest.is_empty() {
                let block = at / self.block;
                let count = ((block + 1) * self.block - at).min(rest.len());
                let (piece, more) = rest.split_at_mut(count);
                let absmax = self.scales.of_block(block);
                for (index, out) in (at..).zip(piece) {
                    let byte = self.codes[index / 2];
                    let code = if index % 2 == 0 { byte >> 4 } else { byte & 15 };
                    *out = self.rounded(self.table[usize::from(code)] * absmax);
                }
                (at, rest) = (at + count, more);
            }
        });
    }

    fn rounded(&self, value: f32) -> f32 {
        match self.dtype {
            DType::BF16 => bf16::from_f32(value).to_f32(),
            DType::F16 => f16::from_f32(value).to_f32(),
            _ => value,
        }
    }

    /// In plain numbers of the original's type.
    ///
    /// # Errors
    /// When that type isn't f32, f16 or bf16.
    pub fn to_dense(&self) -> Result<Tensor> {
        let mut values = vec![0.0; self.rows * self.cols];
        self.read_rows(0..self.rows, &mut values);
        Tensor::from_vec(self.rows, self.cols, values)?.cast(self.dtype)
    }

    /// Some rows, in 4 bits still; none where a block is of rows on both sides.
    pub fn rows(&self, rows: Range<usize>) -> Option<FourBit<'static>> {
        let (start, end) = (rows.start * self.cols, rows.end * self.cols);
        let whole =
            start.is_multiple_of(self.block) && (end.is_multiple_of(self.block) || rows.end == self.rows);
        whole.then(|| FourBit {
            rows: rows.len(),
            codes: self.codes[start / 2..end.div_ceil(2)].to_vec().into(),
            // Groups of scales needn't begin where the rows do.
            scales: FourBitScales::Plain(
                (start / self.block..end.div_ceil(self.block)).map(|it| self.scales.of_block(it)).collect(),
            ),
            cols: self.cols,
            table: self.table,
            block: self.block,
            dtype: self.dtype,
        })
    }

    /// With codes of its own.
    pub fn into_owned(self) -> FourBit<'static> {
        FourBit { codes: Cow::Owned(self.codes.into_owned()), ..self }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_in_four_bits_are_rows_of_the_whole() {
        let (rows, cols, block) = (6, 32, 64);
        let whole = FourBit {
            rows,
            cols,
            codes: (0..rows * cols / 2).map(|it| (it * 37 % 256) as u8).collect::<Vec<_>>().into(),
            table: std::array::from_fn(|it| it as f32 / 3.0 - 2.0),
            block,
            scales: FourBitScales::Nested {
                codes: vec![3, 200, 9],
                map: (0..256).map(|it| it as f32 / 255.0).collect(),
                group: 2,
                nested_absmax: vec![0.5, 0.25],
                offset: 0.1,
            },
            dtype: DType::BF16,
        };
        let all = whole.to_dense().unwrap().to_f32().unwrap();
        let part = whole.rows(2..4).unwrap().to_dense().unwrap();
        assert_eq!(part.to_f32().unwrap(), all[2 * cols..4 * cols]);
        assert_eq!(part.dtype(), DType::BF16);
        assert!(whole.rows(1..4).is_none() && whole.rows(0..3).is_none());
        let mut some = vec![0.0; 3 * cols];
        whole.read_rows(1..4, &mut some);
        assert_eq!(some, all[cols..4 * cols]);
    }
}
