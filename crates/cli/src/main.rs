//! Fine-tunes chat models.
fn main() {}
