//! Rows of any data set to conversations, to text, to marked tokens, to packed batches.
mod error;
mod gguf_vocabulary;
mod jinja;
mod template;
mod tokenizer;
pub use error::{Error, Place, Result, SampleError};
pub use gguf_vocabulary::GgufVocabulary;
pub use jinja::Now;
pub use template::{Rendered, Template};
pub use tokenizer::{Encoded, TokenStream, Tokenizer};
