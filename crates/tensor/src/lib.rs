//! Rows x columns of numbers on a device: storage, products, memory.
