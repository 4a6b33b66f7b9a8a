//! Buffers that every thread keeps from one product to the next.

use std::cell::Cell;
use std::thread::LocalKey;

/// A cache line, so that buffers are aligned to one.
#[derive(Clone, Copy)]
#[repr(align(64))]
pub(super) struct Line(#[expect(dead_code, reason = "used through a pointer")] [f32; 16]);

/// A buffer of a thread. It grows and is never given back.
pub(super) type Scratch = LocalKey<Cell<Vec<Line>>>;

thread_local! {
    /// Packed `a`, kept by the thread that asks for the product.
    pub(super) static LEFT: Cell<Vec<Line>> = const { Cell::new(Vec::new()) };
    /// Packed `b`.
    pub(super) static RIGHT: Cell<Vec<Line>> = const { Cell::new(Vec::new()) };
    /// A piece of a [`super::Tiles`].
    pub(super) static PIECE: Cell<Vec<Line>> = const { Cell::new(Vec::new()) };
}

/// Lends a buffer of at least `len` numbers that hold anything. It is taken out of its place
/// meanwhile, so that a product inside `work` gets another one.
pub(super) fn lend<R>(scratch: &'static Scratch, len: usize, work: impl FnOnce(&mut [f32]) -> R) -> R {
    let mut lines = scratch.take();
    let count = len.div_ceil(16);
    if lines.len() < count {
        drop(lines);
        lines = vec![Line([0.0; 16]); count];
    }
    // SAFETY: a line is 16 numbers without padding, and `lines` is borrowed exclusively.
    let numbers = unsafe { std::slice::from_raw_parts_mut(lines.as_mut_ptr().cast(), lines.len() * 16) };
    let result = work(numbers);
    scratch.set(lines);
    result
}
