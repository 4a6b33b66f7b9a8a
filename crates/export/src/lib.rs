//! One file for each format a trained model leaves in.
//!
//! [`PeftAdapter`] is the adapter alone, as PEFT writes and reads it.

mod card;
mod files;
mod merge;
mod model;
mod peft;

pub use card::ModelCard;
pub use files::write_whole;
pub use merge::{merge, with_saved};
pub use model::{SavedAs, write_model};
pub use peft::{LoraTensors, Modules, PeftAdapter, write_tensors};
