//! Low-rank adapters: LoRA (Hu et al. 2021), rsLoRA (Kalajdzievski 2023) and DoRA (Liu et al. 2024).
//!
//! A [`LoraAdapter`] joins a network as an [`Adapter`](ferrotune_nn::Adapter): it knows neither the
//! format of the weight beside it nor the model around it.

mod adapter;
mod change;
mod config;
mod dora;
mod initial;
mod svd;

pub use adapter::LoraAdapter;
pub use change::Change;
pub use config::{LoraConfig, Target};
pub use dora::{DoraAdapter, magnitudes};
pub use initial::{Initial, loftq, pissa, residual};
pub use svd::Iterations;
