use std::path::{Path, PathBuf};

use candle_core::DType;

/// `Result` with this crate's [`Error`], which the numeric crates above share.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What can go wrong with numbers and the files they come from.
///
/// Messages name the thing, where, what was expected and what to do.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Two shapes that don't fit each other.
    #[error("{what}: expected {expected:?} (rows, columns), got {got:?}")]
    Shape {
        /// The tensor or operation.
        what: String,
        /// Rows and columns that were expected.
        expected: (usize, usize),
        /// Rows and columns that came.
        got: (usize, usize),
    },
    /// A number type that an operation does not take.
    #[error("{what}: numbers of type {got:?} are not taken here, expected {expected}")]
    DType {
        /// The tensor or operation.
        what: String,
        /// What would have been taken.
        expected: &'static str,
        /// What came.
        got: DType,
    },
    /// The device can't do it.
    #[error("{0}")]
    Device(String),
    /// The device has no room for a tensor.
    #[error(
        "{device} is out of memory: {} MiB more were wanted while {} of its {} MiB were in use",
        wanted >> 20, allocated >> 20, total >> 20
    )]
    OutOfMemory {
        /// The device.
        device: String,
        /// Bytes that were asked for.
        wanted: u64,
        /// Bytes that tensors held.
        allocated: u64,
        /// Bytes of the card.
        total: u64,
    },
    /// A tensor that a file does not hold.
    #[error("{file}: tensor `{name}` is missing")]
    MissingTensor {
        /// The file or folder.
        file: PathBuf,
        /// The tensor's name there.
        name: String,
    },
    /// A file that can't be read or written.
    #[error("{path}: {source}")]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system says.
        source: std::io::Error,
    },
    /// A file whose content isn't what it should be.
    #[error("{path}: {message}")]
    File {
        /// The file.
        path: PathBuf,
        /// What is wrong and what to do.
        message: String,
    },
    /// What candle says.
    #[error(transparent)]
    Candle(#[from] candle_core::Error),
    /// Anything else, in plain words.
    #[error("{0}")]
    Message(String),
}

impl Error {
    /// An error in plain words.
    pub fn msg(message: impl Into<String>) -> Error {
        Error::Message(message.into())
    }

    /// What the system said of a file.
    pub fn io(path: impl AsRef<Path>, source: std::io::Error) -> Error {
        Error::Io { path: path.as_ref().to_path_buf(), source }
    }

    /// A file whose content isn't what it should be.
    pub fn file(path: impl AsRef<Path>, message: impl Into<String>) -> Error {
        Error::File { path: path.as_ref().to_path_buf(), message: message.into() }
    }

    /// Checks that `got` is `expected` (rows, columns).
    pub fn check_shape(what: &str, expected: (usize, usize), got: (usize, usize)) -> Result<()> {
        if expected == got {
            return Ok(());
        }
        Err(Error::Shape { what: what.to_string(), expected, got })
    }
}
