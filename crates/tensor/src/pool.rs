//! Memory of dropped tensors, lent out again.
//!
//! A training step makes the same tensors every time. Taking them fresh from the system costs a page
//! fault for every 4 KiB and writing zeros over what is about to be written anyway.

use std::collections::BTreeMap;
use std::sync::Mutex;

/// Shorter buffers are left to the allocator.
const SHORTEST: usize = 4096;
/// The most bytes that lie here unused.
const MOST_BYTES: usize = 1 << 30;

/// Unused buffers by their capacity.
struct Pool {
    buffers: BTreeMap<usize, Vec<Vec<f32>>>,
    bytes: usize,
}

static POOL: Mutex<Pool> = Mutex::new(Pool { buffers: BTreeMap::new(), bytes: 0 });

/// A buffer of this length; what it holds is unspecified.
pub(crate) fn take(len: usize) -> Vec<f32> {
    if len < SHORTEST {
        return vec![0.0; len];
    }
    let mut pool = POOL.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
    let fitting = pool.buffers.range(len..=len + len / 4).next().map(|(capacity, _)| *capacity);
    let Some(capacity) = fitting else {
        drop(pool);
        return vec![0.0; len];
    };
    let found = pool.buffers.get_mut(&capacity).and_then(Vec::pop);
    if pool.buffers.get(&capacity).is_some_and(Vec::is_empty) {
        pool.buffers.remove(&capacity);
    }
    pool.bytes -= capacity * size_of::<f32>();
    drop(pool);
    let mut buffer = found.unwrap_or_default();
    buffer.resize(len, 0.0);
    buffer
}

/// Takes back a buffer that isn't used any more.
pub(crate) fn give_back(buffer: Vec<f32>) {
    let capacity = buffer.capacity();
    if capacity < SHORTEST {
        return;
    }
    let mut pool = POOL.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
    if pool.bytes + capacity * size_of::<f32>() <= MOST_BYTES {
        pool.bytes += capacity * size_of::<f32>();
        pool.buffers.entry(capacity).or_default().push(buffer);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_buffer_comes_back_for_the_next_of_its_size() {
        let len = 1_234_567; // no other test's
        let buffer = take(len);
        let address = buffer.as_ptr();
        give_back(buffer);
        assert_eq!(take(len * 9 / 10).as_ptr(), address);
        assert_eq!(take(10).len(), 10);
    }
}
