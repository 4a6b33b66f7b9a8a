//! A model's or a data set's name to local files: folders, the cache, hub downloads.
//!
//! ```no_run
//! use ferrotune_hub::{Hub, HubOptions, resolve};
//!
//! let options = HubOptions::from_env(Hub::HuggingFace);
//! let path = resolve("HuggingFaceTB/SmolLM2-135M-Instruct", &options, &mut |_| {})?;
//! # Ok::<(), ferrotune_hub::Error>(())
//! ```
//!
//! A name is looked for as a path, in Ferrotune's model cache, in Python's (huggingface_hub's or modelscope's, which are
//! only read), and on the hub, in this order. [`push()`] is the way back.

mod cache;
mod data_set;
mod download;
mod error;
mod http;
mod modelscope;
mod name;
mod options;
mod patience;
mod plan;
mod push;
#[cfg(test)]
mod tests;

use std::path::{Path, PathBuf};

pub use cache::{cache_dir, import};
pub use data_set::{DataSetFiles, data_set};
pub use error::{Error, Result};
pub use options::{Hub, HubOptions, Progress};
pub use push::{Push, Pushed, check_push, model_files, push};

/// The local folder or GGUF file of a model that is named by path or as on the hub
/// (`organisation/model`, or `organisation/model/file.gguf` where there are several files).
/// `progress` is called as bytes come.
///
/// # Errors
/// When there is no such path or model, or it can't be fetched; the message says what to do.
pub fn resolve(name: &str, options: &HubOptions, progress: &mut dyn FnMut(&Progress)) -> Result<PathBuf> {
    let path = expanded(name)?;
    if path.exists() {
        return Ok(path);
    }
    let name = name::parse(name)?;
    let models = options.models_dir()?;
    let folder = cache::folder(&models, &name, options);
    if let Some(found) = cache::found(&folder, name.file.as_deref()) {
        return Ok(found);
    }
    if let Some(found) = cache::found_in_python(&name, options) {
        return Ok(found);
    }
    if options.offline {
        return Err(Error::new(format!(
            "`{name}` is not in the model cache ({}), and nothing is fetched in offline mode: unset \
             HF_HUB_OFFLINE, or give the path of a folder that holds it",
            folder.display()
        )));
    }
    download::model(&name, &folder, options, progress)
}

/// `~/x` as a path under the user's home.
fn expanded(name: &str) -> Result<PathBuf> {
    let rest = if name == "~" { Some("") } else { name.strip_prefix("~/") };
    match rest {
        Some(rest) => Ok(options::home()?.join(rest)),
        None if name.is_empty() => Err(Error::new("no model is named: give a path or a hub name")),
        None => Ok(Path::new(name).to_path_buf()),
    }
}
