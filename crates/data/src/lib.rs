//! Rows of any data set to conversations, to text, to marked tokens, to packed batches.
//!
//! ```text
//! file ─ source ─► Row ─ formats ─► Conversation ─ template ─► text ─ spans, tokenizer ─► Sample ─ batch ─► Batch
//! ```
//!
//! - [`DataSet`] finds files (or an entry of `dataset_info.json`), [`readers`] make [`Row`]s of them, and a [`Format`]
//!   turns each into a [`Conversation`].
//! - [`Template`] renders a conversation byte by byte as transformers does; [`assistant_spans`] finds in the text
//!   what the model generated, for any template.
//! - [`encode_all`] makes tokens and marks together ([`Sample`]), with a [`Report`] of what was cut and left out.
//! - [`Batches`] gives packed [`Batch`]es in an order that seed and epoch determine, and can resume at any.
//!
//! Invariants: this crate knows no device and none of our other crates; plain vectors come out. It prints nothing.

mod batch;
pub mod cache;
mod check;
mod conversation;
mod counts;
mod cut;
mod error;
pub mod formats;
mod gguf_vocabulary;
mod jinja;
mod marked;
mod mixing;
mod named;
mod prepare;
mod prompt;
pub mod readers;
mod registry;
mod report;
mod show;
mod source;
mod spans;
mod stream;
mod substitute;
mod template;
#[cfg(test)]
mod test_support;
mod tokenizer;
mod typed;
mod words;

pub use batch::{Batch, BatchOptions, BatchSource, Batches, Cursor};
pub use check::check_template;
pub use conversation::{Conversation, Message, Role};
pub use counts::{Noticed, Purpose, SetCounts};
pub use error::{Error, Place, Result, SampleError};
pub use formats::{Format, Mapping, Row};
pub use gguf_vocabulary::GgufVocabulary;
pub use jinja::Now;
pub use marked::{MarkOptions, MarkedText, Sample, encode_all, encode_conversation, mark_conversation};
pub use mixing::{MixStrategy, order, split};
pub use named::{NamedTemplate, named_template, template_names};
pub use prepare::{Encode, PreparedSet, encode_set, split_long};
pub use prompt::encode_prompt;
pub use registry::HubSet;
pub use report::{Bar, Report};
pub use show::{Fate, Piece, Shown, show_conversation};
pub use source::{DataSet, Dropped, Fetch, Loaded, OnBadRow, SetReader, SourceOptions};
pub use spans::{RenderedConversation, Spans, Turn, assistant_spans, render_conversation};
pub use stream::{Long, StreamOptions, StreamedBatches};
pub use template::{Ending, Rendered, Template};
pub use tokenizer::{Added, Encoded, TokenStream, Tokenizer};
