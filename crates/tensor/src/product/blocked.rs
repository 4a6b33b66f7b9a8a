//! The loops around a micro-kernel.
//!
//! `a` is packed once, by all threads, into panels of a tile's rows. Then each task takes a block of
//! `b`'s columns (and, when there are few columns, a part of the rows): for each block of k it packs
//! its piece of `b` into a buffer of its own that stays in the L2 cache, and runs all rows past it.
//! So every piece of `b` is read once, which is what counts where reading means dequantising.
//! k is never shared out and its blocks depend on k alone: every result is the same whatever the
//! number of threads.

use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};

use rayon::prelude::*;

use super::engine::{COLS, Engine, Tile};
use super::pack::Source;
use super::scratch::{self, lend};
use super::{Matrix, MatrixMut, Tiles};

/// The right operand.
#[derive(Clone, Copy)]
pub(super) enum Right<'a> {
    Dense(Matrix<'a, f32>),
    Tiles { w: &'a dyn Tiles, transposed: bool },
}

/// Columns of a block, however little depth it has.
const BLOCK_COLS: usize = 1024;
/// Bytes of packed `a` at once; more rows than fit here read `b` again.
const PACKED_BYTES: usize = 32 << 20;
/// Up to so many columns, `a` is read where it lies: packing would cost too much of the product.
const IN_PLACE_COLS: usize = 128;
/// Up to so many rows, the same for `b`.
const IN_PLACE_ROWS: usize = 32;
/// Of a [`Tiles`], so many numbers of k are read at once: for all columns of a block, or for 16.
const PIECE: (usize, usize) = (32, 256);
/// Numbers in a page, and lines of the L1 cache that may have one place in their pages.
const PAGE: usize = 1024;
const WAYS: usize = 8;
/// With k up to this, `c` sets the speed.
const SHALLOW: usize = 64;
/// Panels of `a` that one task packs.
const PANELS_TO_PACK: usize = 2;

/// `c = alpha·a·b + beta·c` with shapes already checked and nothing empty.
pub(super) fn product(
    engine: Engine,
    alpha: f32,
    a: Matrix<'_, f32>,
    b: Right<'_>,
    beta: f32,
    c: MatrixMut<'_, f32>,
    threads: usize,
) {
    let most = (PACKED_BYTES / 4 / a.cols).max(512);
    let rows = a.rows.div_ceil(a.rows.div_ceil(most)).next_multiple_of(engine.rows());
    for start in (0..a.rows).step_by(rows) {
        let a = a.rows(start..a.rows.min(start + rows));
        let c = Target(c.data[start * c.row_stride..].as_mut_ptr(), c.row_stride);
        Product::new(engine, alpha, a, b, beta, c, threads).run(threads);
    }
}

/// Where `c` is, and how far its rows are apart. Tasks write to it side by side.
#[derive(Clone, Copy)]
pub(super) struct Target(pub(super) *mut f32, pub(super) usize);
// SAFETY: every task writes tiles of its own.
unsafe impl Send for Target {}
// SAFETY: the same.
unsafe impl Sync for Target {}

impl Target {
    pub(super) fn columns_from(self, col: usize) -> Target {
        Target(self.0.wrapping_add(col), self.1)
    }
}

/// Packed `a`, written by all threads and then read by all.
#[derive(Clone, Copy)]
struct Packed(*mut f32);
// SAFETY: panels are written by one task each, and read only when all of them are done.
unsafe impl Send for Packed {}
// SAFETY: the same.
unsafe impl Sync for Packed {}

/// How the kernel reads `a`.
#[derive(Clone, Copy, PartialEq)]
enum Left {
    Packed,
    /// Where it lies, rows × k.
    Rows,
    /// Where it lies, k × rows.
    Interleaved,
}

/// One product, cut up.
struct Product<'a> {
    engine: Engine,
    alpha: f32,
    a: Matrix<'a, f32>,
    left: Left,
    b: Right<'a>,
    /// Dense, and read where it lies.
    b_in_place: Option<Matrix<'a, f32>>,
    beta: f32,
    c: Target,
    cols: usize,
    /// Numbers in a block of k.
    depth: usize,
    /// Rows of a panel.
    tile_rows: usize,
    row_panels: usize,
    col_panels: usize,
    /// There are `row_parts · col_blocks` tasks.
    row_parts: usize,
    col_blocks: usize,
}

impl<'a> Product<'a> {
    fn new(
        engine: Engine,
        alpha: f32,
        a: Matrix<'a, f32>,
        b: Right<'a>,
        beta: f32,
        c: Target,
        threads: usize,
    ) -> Product<'a> {
        let cols = match b {
            Right::Dense(b) => b.cols,
            Right::Tiles { w, transposed } => {
                if transposed {
                    w.rows()
                } else {
                    w.cols()
                }
            }
        };
        let left = match a {
            _ if !engine.reads_in_place() || cols > IN_PLACE_COLS => Left::Packed,
            Matrix { col_stride: 1, .. } => Left::Rows,
            Matrix { row_stride: 1, .. } => Left::Interleaved,
            _ => Left::Packed,
        };
        let b_in_place = match b {
            Right::Dense(b) if b.col_stride == 1 && a.rows <= IN_PLACE_ROWS => Some(b),
            _ => None,
        };
        let depth = a.cols.div_ceil(a.cols.div_ceil(engine.depth())).next_multiple_of(64);
        // Rows that are whole pages apart push one another out of the L1 cache: fewer at a time.
        let pages = |step: usize| step.is_multiple_of(PAGE);
        let few = left == Left::Rows && pages(a.row_stride) || a.cols <= SHALLOW && pages(c.1);
        let tile_rows = engine.tile_rows(a.rows, if few { WAYS } else { usize::MAX });
        let row_panels = a.rows.div_ceil(tile_rows);
        let col_panels = cols.div_ceil(COLS);
        let widest = engine.block_bytes() / 4 / COLS / engine.words(depth.min(a.cols));
        let widest = widest.clamp(1, BLOCK_COLS / COLS);
        let packing = match b {
            _ if b_in_place.is_some() => 0,
            Right::Dense(_) => engine.rows_per_packing(),
            Right::Tiles { w, .. } if engine.takes_bf16() && w.as_bf16().is_some() => {
                engine.rows_per_packing() / 4
            }
            Right::Tiles { .. } => 3 * engine.rows_per_packing(),
        };
        // Enough blocks that each fits the cache; then what keeps the slowest thread shortest.
        let blocks = col_panels.div_ceil(widest);
        let mut best = (usize::MAX, 1, blocks);
        for parts in 1..=threads.min(row_panels) {
            let fewest = (parts * blocks).div_ceil(threads);
            for rounds in fewest..fewest + 3 {
                let blocks = (rounds * threads / parts).clamp(blocks, col_panels);
                let rounds = (parts * blocks).div_ceil(threads);
                let rows = row_panels.div_ceil(parts) * tile_rows + packing;
                let time = rounds * rows * col_panels.div_ceil(blocks);
                if time < best.0 {
                    best = (time, parts, blocks);
                }
            }
        }
        let (_, row_parts, col_blocks) = best;
        Product {
            engine,
            alpha,
            a,
            left,
            b,
            b_in_place: b_in_place.filter(|_| engine.reads_in_place()),
            beta,
            c,
            cols,
            depth,
            tile_rows,
            row_panels,
            col_panels,
            row_parts,
            col_blocks,
        }
    }

    fn run(&self, threads: usize) {
        let threads = threads.min((self.row_parts * self.col_blocks).max(self.row_panels / PANELS_TO_PACK));
        let k_blocks = self.a.cols.div_ceil(self.depth);
        let to_pack = if self.left == Left::Packed { self.row_panels.div_ceil(PANELS_TO_PACK) } else { 0 };
        let panels = (k_blocks - 1) * self.engine.panel(self.depth)
            + self.engine.panel(self.a.cols - (k_blocks - 1) * self.depth);
        let packed = if to_pack > 0 { self.row_panels * panels } else { 0 };
        lend(&scratch::LEFT, packed, |packed| {
            let packed = Packed(packed.as_mut_ptr());
            let (to_do, done, tasks) = (AtomicUsize::new(0), AtomicUsize::new(0), AtomicUsize::new(0));
            let work = || {
                loop {
                    let task = to_do.fetch_add(1, Ordering::Relaxed);
                    if task >= to_pack {
                        break;
                    }
                    let first = task * PANELS_TO_PACK;
                    for panel in first..self.row_panels.min(first + PANELS_TO_PACK) {
                        self.pack_rows(panel, packed);
                    }
                    done.fetch_add(1, Ordering::Release);
                }
                // The others are about to finish: they pack and wait for nothing.
                let mut turns = 0;
                while done.load(Ordering::Acquire) < to_pack {
                    turns += 1;
                    if turns < 1000 { std::hint::spin_loop() } else { std::thread::yield_now() }
                }
                loop {
                    let task = tasks.fetch_add(1, Ordering::Relaxed);
                    if task >= self.row_parts * self.col_blocks {
                        break;
                    }
                    self.task(task / self.row_parts, task % self.row_parts, packed);
                }
            };
            if threads == 1 {
                work();
            } else {
                (0..threads).into_par_iter().with_max_len(1).for_each(|_| work());
            }
        });
    }

    /// Where a panel of packed `a` begins.
    fn panel(&self, packed: Packed, k: &Range<usize>, panel: usize) -> *mut f32 {
        let before = k.start / self.depth * self.row_panels * self.engine.panel(self.depth);
        packed.0.wrapping_add(before + panel * self.engine.panel(k.len()))
    }

    fn k_blocks(&self) -> impl Iterator<Item = Range<usize>> {
        let (depth, k) = (self.depth, self.a.cols);
        (0..k).step_by(depth).map(move |start| start..k.min(start + depth))
    }

    fn pack_rows(&self, panel: usize, packed: Packed) {
        let row = panel * self.tile_rows;
        for k in self.k_blocks() {
            let source = Source {
                data: at(&self.a, row, k.start),
                lane_step: self.a.row_stride,
                depth_step: self.a.col_stride,
                lanes: self.tile_rows.min(self.a.rows - row),
                depth: k.len(),
            };
            // SAFETY: the rows and the depth exist in `a`; no other task has this panel.
            unsafe { self.engine.pack_rows(source, self.panel(packed, &k, panel)) };
        }
    }

    /// A block of columns times a part of the rows.
    fn task(&self, block: usize, part: usize, packed: Packed) {
        let share = |count: usize, of: usize, index: usize| count * index / of..count * (index + 1) / of;
        let rows = share(self.row_panels, self.row_parts, part);
        let panels = share(self.col_panels, self.col_blocks, block);
        let cols = panels.start * COLS..self.cols.min(panels.end * COLS);
        let words = self.engine.words(self.depth.min(self.a.cols));
        lend(&scratch::RIGHT, panels.len() * COLS * words, |buffer| {
            for k in self.k_blocks() {
                let beta = if k.start == 0 { self.beta } else { 1.0 };
                if let Some(b) = self.b_in_place {
                    // One panel after the other, so that its lines are fetched once for all rows.
                    for start in cols.clone().step_by(COLS) {
                        let cols = start..cols.end.min(start + COLS);
                        let in_place = (at(&b, k.start, start), b.row_stride);
                        let ragged = cols.len() % 16 != 0;
                        if ragged {
                            self.pack_cols(&k, &cols, buffer);
                        }
                        let b = if ragged { (buffer.as_ptr(), COLS) } else { in_place };
                        for row in rows.clone() {
                            self.tile(row, &k, &cols, b, beta, packed);
                        }
                    }
                } else {
                    self.pack_cols(&k, &cols, buffer);
                    let panel = COLS * self.engine.words(k.len());
                    self.engine.ready(|| {
                        for row in rows.clone() {
                            for (start, b) in cols.clone().step_by(COLS).zip(buffer.chunks(panel)) {
                                let cols = start..cols.end.min(start + COLS);
                                self.tile(row, &k, &cols, (b.as_ptr(), COLS), beta, packed);
                            }
                        }
                    });
                }
            }
        });
    }

    fn tile(
        &self,
        panel: usize,
        k: &Range<usize>,
        cols: &Range<usize>,
        (b, b_step): (*const f32, usize),
        beta: f32,
        packed: Packed,
    ) {
        let row = panel * self.tile_rows;
        let (a, a_step, by_rows) = match self.left {
            Left::Packed => (self.panel(packed, k, panel).cast_const(), 16, false),
            Left::Rows => (at(&self.a, row, k.start), self.a.row_stride, true),
            Left::Interleaved => (at(&self.a, row, k.start), self.a.col_stride, false),
        };
        let tile = Tile {
            words: self.engine.words(k.len()),
            a,
            a_step,
            b,
            b_step,
            c: self.c.0.wrapping_add(row * self.c.1 + cols.start),
            c_step: self.c.1,
            cols: cols.len(),
            alpha: self.alpha,
            beta,
        };
        // SAFETY: the operands are packed (or in place) for this block of k, and this tile of `c`
        // belongs to this task.
        unsafe { self.engine.multiply(self.tile_rows.min(self.a.rows - row), by_rows, &tile) };
    }

    /// Packs a piece of `b`, panel after panel.
    fn pack_cols(&self, k: &Range<usize>, cols: &Range<usize>, out: &mut [f32]) {
        let panel = COLS * self.engine.words(k.len());
        // Half a panel: 16 columns, from some depth on.
        let mut pack = |half: usize, depth: usize, source: Source| {
            let start = half / 2 * panel + half % 2 * 16 + self.engine.words(depth) * COLS;
            let out = &mut out[start..];
            assert!(out.len() + 16 >= self.engine.words(source.depth) * COLS);
            // SAFETY: `source` is made from slices that were asked for these lanes and depth, and
            // `out` has room, as asserted.
            unsafe { self.engine.pack_cols(source, out.as_mut_ptr(), depth + source.depth == k.len()) };
        };
        let halves = cols.len().div_ceil(16);
        let lanes = |half: usize| (cols.len() - half * 16).min(16);
        match self.b {
            Right::Dense(b) => {
                // Where rows of `b` are contiguous, go along them.
                let step = if b.col_stride == 1 { PIECE.0 } else { k.len() };
                for start in k.clone().step_by(step) {
                    let depth = (k.end - start).min(step);
                    for half in 0..halves {
                        let data = at(&b, start, cols.start + half * 16);
                        let (lane_step, depth_step) = (b.col_stride, b.row_stride);
                        let source = Source { data, lane_step, depth_step, lanes: lanes(half), depth };
                        pack(half, start - k.start, source);
                    }
                }
            }
            Right::Tiles { w, transposed } if self.engine.takes_bf16() && w.as_bf16().is_some() => {
                let (width, values) = (w.cols(), w.as_bf16().unwrap_or_default());
                assert_eq!(values.len(), w.rows() * width, "numbers of a weight in bf16");
                for half in 0..halves {
                    let first = cols.start + half * 16;
                    let (start, lane_step, depth_step) = match transposed {
                        true => (first * width + k.start, width, 1),
                        false => (k.start * width + first, 1, width),
                    };
                    let (data, depth, lanes) = (values[start..].as_ptr(), k.len(), lanes(half));
                    let start = half / 2 * panel + half % 2 * 16;
                    assert!(out.len() - start + 16 >= panel);
                    let source = Source { data, lane_step, depth_step, lanes, depth };
                    // SAFETY: the lanes and the depth exist in `w`, and `out` has room, as asserted.
                    unsafe { self.engine.pack_halves(source, out[start..].as_mut_ptr()) };
                }
            }
            Right::Tiles { w, transposed: true } => lend(&scratch::PIECE, 16 * PIECE.1, |piece| {
                for half in 0..halves {
                    let first = cols.start + half * 16;
                    for start in k.clone().step_by(PIECE.1) {
                        let depth = (k.end - start).min(PIECE.1);
                        let piece = &mut piece[..lanes(half) * depth];
                        w.read(first..first + lanes(half), start..start + depth, piece);
                        let (data, lane_step) = (piece.as_ptr(), depth);
                        let source = Source { data, lane_step, depth_step: 1, lanes: lanes(half), depth };
                        pack(half, start - k.start, source);
                    }
                }
            }),
            Right::Tiles { w, transposed: false } => lend(&scratch::PIECE, PIECE.0 * cols.len(), |piece| {
                for start in k.clone().step_by(PIECE.0) {
                    let depth = (k.end - start).min(PIECE.0);
                    let piece = &mut piece[..depth * cols.len()];
                    w.read(start..start + depth, cols.clone(), piece);
                    for half in 0..halves {
                        let (data, depth_step) = (piece[half * 16..].as_ptr(), cols.len());
                        let source = Source { data, lane_step: 1, depth_step, lanes: lanes(half), depth };
                        pack(half, start - k.start, source);
                    }
                }
            }),
        }
    }
}

/// Where an element is.
fn at(matrix: &Matrix<'_, f32>, row: usize, col: usize) -> *const f32 {
    matrix.data.as_ptr().wrapping_add(row * matrix.row_stride + col * matrix.col_stride)
}
