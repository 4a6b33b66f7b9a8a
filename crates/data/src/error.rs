//! The one error type of this crate: what, where, what was expected, what to do.

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::{Deserialize, Serialize};

/// Where a row comes from: a file and a line, both as a text editor counts them.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Place {
    /// The file, as it was opened.
    pub file: Arc<Path>,
    /// The line the row starts on, from 1.
    pub line: usize,
}

impl Place {
    /// The place of line `line` (from 1) of `file`.
    pub fn new(file: impl Into<PathBuf>, line: usize) -> Place {
        Place { file: Arc::from(file.into()), line }
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.file.display(), self.line)
    }
}

/// What can go wrong between a file of rows and a batch of tokens.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file could not be read or written.
    #[error("cannot {action} `{}`: {source}", path.display())]
    File {
        /// What was tried: `read` or `write`.
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// What the operating system said.
        source: std::io::Error,
    },
    /// One row of a data set is not what it should be.
    #[error("{place}: {message}")]
    Row {
        /// File and line of the row.
        place: Place,
        /// What is wrong with it and what was expected.
        message: String,
    },
    /// From here on a file cannot be read: there is no telling where the next row starts.
    #[error("{place}: {message}")]
    Broken {
        /// File and line.
        place: Place,
        /// What is wrong and what was expected.
        message: String,
    },
    /// A data set as a whole cannot be used: not found, empty, of an unknown form.
    #[error("{0}")]
    Dataset(String),
    /// A chat template cannot be parsed, or raised an error of its own while rendering.
    #[error("chat template `{name}`: {message}")]
    Template {
        /// Name of the template (a file, or the model it came with).
        name: String,
        /// The template's own message, or the engine's with the line.
        message: String,
    },
    /// A tokenizer cannot be built, read, saved or used.
    #[error("tokenizer `{name}`: {message}")]
    Tokenizer {
        /// Name of the tokenizer (a folder, or the GGUF pre-tokenizer).
        name: String,
        /// What is wrong and what was expected.
        message: String,
    },
    /// A conversation that gives no sample; a caller may count it and go on.
    #[error("{0}")]
    Sample(#[from] SampleError),
}

/// Why one conversation gives nothing to train on.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SampleError {
    /// No token of the conversation is marked as trained.
    #[error("nothing to train on: {0}")]
    NothingTrained(String),
    /// Cutting at `cutoff_len` left no trained token.
    #[error(
        "cutoff_len {cutoff_len} cuts off everything to train on ({trained} trained tokens start at token {first}); raise cutoff_len"
    )]
    CutAway {
        /// The cutoff, in tokens.
        cutoff_len: usize,
        /// How many trained tokens the whole sample has.
        trained: usize,
        /// Index of the first trained token of the whole sample.
        first: usize,
    },
    /// The template's output does not show what belongs to the assistant.
    #[error("cannot find the assistant's turn {turn} in what chat template `{template}` renders: {why}")]
    SpanNotFound {
        /// Name of the template.
        template: String,
        /// Index of the message in the conversation, from 0.
        turn: usize,
        /// What was tried.
        why: String,
    },
}

/// `std::result::Result` with this crate's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

pub(crate) fn read_file(path: &Path) -> Result<Vec<u8>> {
    std::fs::read(path).map_err(|source| Error::File { action: "read", path: path.to_path_buf(), source })
}

pub(crate) fn write_file(path: &Path, bytes: &[u8]) -> Result<()> {
    std::fs::write(path, bytes).map_err(|source| Error::File {
        action: "write",
        path: path.to_path_buf(),
        source,
    })
}
