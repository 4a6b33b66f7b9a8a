//! One file for each format a trained model leaves in.
//!
//! [`PeftAdapter`] is the adapter alone, as PEFT writes and reads it. [`merge`] makes one model of base and
//! adapter, a [`ModelFiles`](ferrotune_model::source::ModelFiles) whose weights are read as any other's: what
//! writes a whole model ([`write_folder`]) takes such files and asks for rows or tensors by canonical names.

mod bnb;
mod card;
mod checkpoint;
mod files;
mod gguf;
mod merge;
mod model;
mod peft;
mod rounded;
#[cfg(test)]
mod scratch;

pub use bnb::{goes_into_bnb, write_bnb};
pub use card::{ModelCard, is_hub_name, merged_card};
pub use files::write_whole;
pub use gguf::{
    GgufMix, GgufModel, GgufReport, GgufTokenizer, rounded_as_gguf, write_gguf, write_gguf_adapter,
};
pub use merge::{merge, with_saved};
pub use model::{FolderOptions, SavedAs, write_folder, write_model};
pub use peft::{LoraTensors, ModulePlace, Modules, PeftAdapter, write_tensors};
pub use rounded::rounded;
