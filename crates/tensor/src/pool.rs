//! Memory of dropped tensors, lent out again.
//!
//! A training step makes the same tensors every time. Taking them fresh from the system costs a page
//! fault for every 4 KiB and writing zeros over what is about to be written anyway.

use std::collections::HashMap;
use std::sync::Mutex;

/// Shorter buffers are left to the allocator.
const SHORTEST: usize = 4096;
/// The most bytes that lie here unused.
const MOST_BYTES: usize = 1 << 30;

/// Unused buffers by their size class.
struct Pool {
    buffers: Option<HashMap<usize, Vec<Vec<f32>>>>,
    bytes: usize,
}

static POOL: Mutex<Pool> = Mutex::new(Pool { buffers: None, bytes: 0 });

/// Eight sizes to each power of two, so that batches of nearly the same length share their buffers.
fn class(len: usize) -> usize {
    len.next_multiple_of((len.next_power_of_two() / 16).max(1))
}

/// A buffer of this length; what it holds is unspecified.
pub(crate) fn take(len: usize) -> Vec<f32> {
    if len < SHORTEST {
        return vec![0.0; len];
    }
    let class = class(len);
    let mut pool = POOL.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
    let found = pool.buffers.get_or_insert_default().get_mut(&class).and_then(Vec::pop);
    if found.is_some() {
        pool.bytes -= class * size_of::<f32>();
    }
    drop(pool);
    let mut buffer = found.unwrap_or_else(|| vec![0.0; class]);
    buffer.resize(len, 0.0);
    buffer
}

/// Takes back a buffer of [`take`] that isn't used any more.
pub(crate) fn give_back(buffer: Vec<f32>) {
    if buffer.len() < SHORTEST {
        return;
    }
    let class = class(buffer.len());
    let mut pool = POOL.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
    if pool.bytes + class * size_of::<f32>() <= MOST_BYTES {
        pool.bytes += class * size_of::<f32>();
        pool.buffers.get_or_insert_default().entry(class).or_default().push(buffer);
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
        let again = take(len - 1000);
        assert_eq!(again.as_ptr(), address);
        assert_eq!(take(10).len(), 10);
    }

    #[test]
    fn a_class_holds_its_length_and_little_more() {
        for len in [4096, 5000, 65_536, 65_537, 1_000_003] {
            assert!(class(len) >= len && class(len) <= len + len / 8, "{len}: {}", class(len));
        }
    }
}
