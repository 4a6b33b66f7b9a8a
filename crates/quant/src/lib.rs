//! Weights stored in few bits.
//!
//! [`Nf4Weight`] is the 4-bit NormalFloat of QLoRA (Dettmers et al. 2023) in bitsandbytes' own layout,
//! so that its files are read and written bit for bit. It joins a network as a
//! [`Weight`](ferrotune_nn::Weight): products read it in pieces, and it is never whole in 16 or 32 bits.

mod gpu;
mod mean;
mod nf4;
mod tables;

pub use gpu::Nf4GpuWeight;
pub use nf4::{Absmax, BLOCK as NF4_BLOCK, GROUP as NF4_GROUP, Nf4Weight, Scales};
pub use tables::{NF4_LEVELS, dynamic_map};
