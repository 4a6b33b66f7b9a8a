//! Matrix products: `c = alpha·a·b + beta·c`.
//!
//! Operands are views with strides, so that parts of stacked outputs and transposes need no copy.
//! The right operand may also be a [`Tiles`], a matrix that can only write out pieces of itself
//! (a quantised weight): it is never whole in memory.

#[cfg(target_arch = "x86_64")]
mod blocked;
#[cfg(target_arch = "x86_64")]
mod engine;
#[cfg(target_arch = "x86_64")]
mod kernel_amx;
#[cfg(target_arch = "x86_64")]
mod kernel_avx512;
#[cfg(target_arch = "x86_64")]
mod kernel_split;
#[cfg(target_arch = "x86_64")]
mod pack;
mod portable;
mod scratch;
mod tensors;
#[cfg(target_arch = "x86_64")]
mod thin;

use std::any::TypeId;
use std::ops::Range;

use half::bf16;

use crate::tensor::Real;

pub(crate) use tensors::{Layout, Placed, Product};
pub use tensors::{Operand, multiply, multiply_on_gpu};

/// How exactly products are computed on the CPU. Sums are always kept in f32 (or f64).
///
/// [`bf16_products`] says what the second choice comes to here.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Precision {
    /// Operands as they are. With AMX, f32 ones are multiplied in parts that add up to them, as exactly as in f32.
    #[default]
    Full,
    /// f32 operands are rounded to bf16 (nearest even) first where that is faster. Thin products, and
    /// all products of CPUs whose bf16 is no faster, are as with `Full`.
    Bf16,
}

/// A matrix that is read.
#[derive(Clone, Copy, Debug)]
pub struct Matrix<'a, T> {
    /// Element (r, c) is at `r · row_stride + c · col_stride`.
    pub data: &'a [T],
    /// Rows.
    pub rows: usize,
    /// Columns.
    pub cols: usize,
    /// From one row to the next, in elements.
    pub row_stride: usize,
    /// From one column to the next, in elements.
    pub col_stride: usize,
}

impl<'a, T> Matrix<'a, T> {
    /// A contiguous matrix, row after row.
    pub fn new(data: &'a [T], rows: usize, cols: usize) -> Matrix<'a, T> {
        assert!(data.len() >= rows * cols);
        Matrix { data, rows, cols, row_stride: cols, col_stride: 1 }
    }

    /// Rows and columns exchanged.
    pub fn transposed(self) -> Matrix<'a, T> {
        Matrix {
            rows: self.cols,
            cols: self.rows,
            row_stride: self.col_stride,
            col_stride: self.row_stride,
            ..self
        }
    }

    /// The same matrix, when it is one of f32.
    fn as_f32(&self) -> Option<Matrix<'a, f32>>
    where
        T: 'static,
    {
        let Matrix { data, rows, cols, row_stride, col_stride } = *self;
        (TypeId::of::<T>() == TypeId::of::<f32>()).then(|| {
            // SAFETY: T is f32.
            let data = unsafe { std::slice::from_raw_parts(data.as_ptr().cast(), data.len()) };
            Matrix { data, rows, cols, row_stride, col_stride }
        })
    }

    /// Some of the columns.
    pub fn columns(self, cols: Range<usize>) -> Matrix<'a, T> {
        assert!(cols.end <= self.cols);
        let start = (cols.start * self.col_stride).min(self.data.len());
        Matrix { data: &self.data[start..], cols: cols.len(), ..self }
    }

    /// Some of the rows.
    pub fn rows(self, rows: Range<usize>) -> Matrix<'a, T> {
        assert!(rows.end <= self.rows);
        let start = (rows.start * self.row_stride).min(self.data.len());
        Matrix { data: &self.data[start..], rows: rows.len(), ..self }
    }
}

/// A matrix that is written.
#[derive(Debug)]
pub struct MatrixMut<'a, T> {
    /// Element (r, c) is at `r · row_stride + c`.
    pub data: &'a mut [T],
    /// Rows.
    pub rows: usize,
    /// Columns.
    pub cols: usize,
    /// From one row to the next, in elements.
    pub row_stride: usize,
}

impl<'a, T> MatrixMut<'a, T> {
    /// A contiguous matrix, row after row.
    pub fn new(data: &'a mut [T], rows: usize, cols: usize) -> MatrixMut<'a, T> {
        assert!(data.len() >= rows * cols);
        MatrixMut { data, rows, cols, row_stride: cols }
    }

    /// The same matrix, when it is one of f32.
    fn into_f32(self) -> Option<MatrixMut<'a, f32>>
    where
        T: 'static,
    {
        let MatrixMut { data, rows, cols, row_stride } = self;
        (TypeId::of::<T>() == TypeId::of::<f32>()).then(|| {
            // SAFETY: T is f32, and the borrow is handed on.
            let data = unsafe { std::slice::from_raw_parts_mut(data.as_mut_ptr().cast(), data.len()) };
            MatrixMut { data, rows, cols, row_stride }
        })
    }

    /// Some of the columns.
    pub fn columns(self, cols: Range<usize>) -> MatrixMut<'a, T> {
        assert!(cols.end <= self.cols);
        let start = cols.start.min(self.data.len());
        MatrixMut { data: &mut self.data[start..], cols: cols.len(), ..self }
    }
}

/// A matrix that writes out any piece of itself: weights in few bits, or in another type.
pub trait Tiles: Sync {
    /// Rows.
    fn rows(&self) -> usize;
    /// Columns.
    fn cols(&self) -> usize;
    /// Writes the piece row after row: element (r, c) goes to
    /// `out[(r − rows.start) · cols.len() + (c − cols.start)]`.
    fn read(&self, rows: Range<usize>, cols: Range<usize>, out: &mut [f32]);
    /// All of it, row after row, where it is there in bf16: then nothing is widened to be rounded again.
    fn as_bf16(&self) -> Option<&[bf16]> {
        None
    }
}

/// The instructions that [`Precision::Bf16`] uses on this CPU; without any it changes nothing.
pub fn bf16_products() -> Option<&'static str> {
    #[cfg(target_arch = "x86_64")]
    if let Some(engine) = engine::Engine::bf16() {
        return Some(engine.name());
    }
    None
}

/// How this CPU multiplies, for people: "f32 with AVX-512, bf16 with AMX-BF16".
pub fn cpu_products() -> String {
    #[cfg(target_arch = "x86_64")]
    let full = engine::Engine::f32().map(|it| it.name());
    #[cfg(not(target_arch = "x86_64"))]
    let full: Option<&str> = None;
    let full = full.unwrap_or("the gemm crate");
    match bf16_products() {
        Some(half) => format!("f32 with {full}, bf16 with {half}"),
        None => format!("f32 with {full}, no faster bf16"),
    }
}

/// `c = alpha·a·b + beta·c` on all cores. With `beta` 0, what `c` held is not read.
pub fn matmul<T: Real>(
    precision: Precision,
    alpha: T,
    a: Matrix<'_, T>,
    b: Matrix<'_, T>,
    beta: T,
    c: MatrixMut<'_, T>,
) {
    let threads = threads(a.rows, a.cols, b.cols);
    dense(precision, alpha, a, b, beta, c, threads);
}

/// [`matmul`] on the calling thread alone, for many small products side by side.
pub fn matmul_serial<T: Real>(
    precision: Precision,
    alpha: T,
    a: Matrix<'_, T>,
    b: Matrix<'_, T>,
    beta: T,
    c: MatrixMut<'_, T>,
) {
    dense(precision, alpha, a, b, beta, c, 1);
}

/// `c = alpha·a·w + beta·c`, or with `transposed` `c = alpha·a·wᵀ + beta·c`, on all cores.
/// `w` is read piece by piece into reused buffers.
pub fn matmul_tiles(
    precision: Precision,
    alpha: f32,
    a: Matrix<'_, f32>,
    w: &dyn Tiles,
    transposed: bool,
    beta: f32,
    mut c: MatrixMut<'_, f32>,
) {
    let (k, n) = if transposed { (w.cols(), w.rows()) } else { (w.rows(), w.cols()) };
    check(&a, (k, n), &c);
    if scaled_only(a.cols, beta, &mut c) {
        return;
    }
    let threads = threads(a.rows, k, n);
    #[cfg(target_arch = "x86_64")]
    if let Some(engine) = engine::Engine::of(precision, a.rows, k, n) {
        let engine = if w.as_bf16().is_some() { engine.with_right_in_bf16() } else { engine };
        return by_engine(engine, alpha, a, blocked::Right::Tiles { w, transposed }, beta, c, threads);
    }
    let _ = precision;
    portable::product_tiles(alpha, a, w, transposed, beta, c, threads);
}

fn dense<T: Real>(
    precision: Precision,
    alpha: T,
    a: Matrix<'_, T>,
    b: Matrix<'_, T>,
    beta: T,
    mut c: MatrixMut<'_, T>,
    threads: usize,
) {
    check(&a, (b.rows, b.cols), &c);
    assert!(b.data.len() >= reach(b.rows, b.cols, b.row_stride, b.col_stride), "right operand is short");
    if scaled_only(a.cols, beta, &mut c) {
        return;
    }
    #[cfg(target_arch = "x86_64")]
    if let (Some(a), Some(b)) = (a.as_f32(), b.as_f32())
        && let Some(engine) = engine::Engine::of(precision, a.rows, a.cols, b.cols)
    {
        let (alpha, beta) = (alpha.wide() as f32, beta.wide() as f32);
        let c = c.into_f32().expect("the type of a");
        return by_engine(engine, alpha, a, blocked::Right::Dense(b), beta, c, threads);
    }
    let _ = precision;
    // As of a matrix that is read in pieces: the same bits.
    if let (Some(a), Some(b)) = (a.as_f32(), b.as_f32())
        && portable::is_few(&a)
        && b.row_stride == 1
    {
        let c = c.into_f32().expect("the type of a");
        let (alpha, beta) = (alpha.wide() as f32, beta.wide() as f32);
        return portable::few_rows(alpha, a, &portable::Lines(b.transposed()), beta, c, threads);
    }
    portable::product(alpha, a, b, beta, c, threads);
}

#[cfg(target_arch = "x86_64")]
fn by_engine(
    engine: engine::Engine,
    alpha: f32,
    a: Matrix<'_, f32>,
    b: blocked::Right<'_>,
    beta: f32,
    c: MatrixMut<'_, f32>,
    threads: usize,
) {
    if thin::takes(&a, &b) {
        thin::product(alpha, a, b, beta, c, threads);
    } else {
        blocked::product(engine, alpha, a, b, beta, c, threads);
    }
}

/// Threads that are worth waking.
fn threads(m: usize, k: usize, n: usize) -> usize {
    if m * k * n < 64 * 1024 { 1 } else { rayon::current_num_threads() }
}

/// Elements from the first to the last that strides reach.
fn reach(rows: usize, cols: usize, row_stride: usize, col_stride: usize) -> usize {
    if rows == 0 || cols == 0 { 0 } else { (rows - 1) * row_stride + (cols - 1) * col_stride + 1 }
}

/// Every element that is read or written lies inside its slice, and no two of `c` are one.
fn check<T>(a: &Matrix<'_, T>, (k, n): (usize, usize), c: &MatrixMut<'_, T>) {
    assert_eq!((a.rows, a.cols, n), (c.rows, k, c.cols), "shapes of a product");
    assert!(a.data.len() >= reach(a.rows, a.cols, a.row_stride, a.col_stride), "left operand is short");
    assert!(c.data.len() >= reach(c.rows, c.cols, c.row_stride, 1), "result is short");
    assert!(c.rows < 2 || c.row_stride >= c.cols, "rows of the result overlap");
}

/// Does all there is to do when there is nothing to multiply.
fn scaled_only<T: Real>(k: usize, beta: T, c: &mut MatrixMut<'_, T>) -> bool {
    if k == 0 {
        for row in c.data.chunks_mut(c.row_stride.max(1)).take(c.rows) {
            for it in &mut row[..c.cols] {
                *it = if beta == T::zero() { T::zero() } else { beta * *it };
            }
        }
    }
    k == 0 || c.rows == 0 || c.cols == 0
}

#[cfg(test)]
mod tests;
