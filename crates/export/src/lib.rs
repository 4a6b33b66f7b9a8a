//! One file for each format a trained model leaves in.
//!
//! [`PeftAdapter`] is the adapter alone, as PEFT writes and reads it.

mod card;
mod files;
mod gguf;
mod model;
mod peft;
#[cfg(test)]
mod scratch;

pub use card::ModelCard;
pub use files::write_whole;
pub use gguf::{GgufMix, GgufModel, GgufReport, GgufTokenizer, write_gguf, write_gguf_adapter};
pub use model::{SavedAs, write_model};
pub use peft::{LoraTensors, Modules, PeftAdapter, write_tensors};
