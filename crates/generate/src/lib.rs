//! Decoding: key-value cache, sampling, streaming.
