//! One decoder by spec, the families that fill a spec in, and the files weights come from.
//!
//! `config.json` → [`families`] → [`spec::ModelSpec`]; that and a [`source::WeightSource`] →
//! [`build`] → [`Decoder`]. Outside `families/` nobody asks which family it is. How a projection is
//! stored and whether it is adapted is the caller's choice, a closure given to [`build`]: this crate
//! knows neither NF4 nor LoRA.

mod block;
mod build;
mod decoder;
pub mod families;
pub mod source;
pub mod spec;
mod token_steps;

pub use block::{Block, BlockSaved, Sublayer, SublayerSaved};
pub use build::{BuildOptions, MakePart, PartSpec, build, dense_part};
pub use decoder::{Decoder, DecoderSaved, KvCache, Recompute};
pub use token_steps::TokenSteps;
