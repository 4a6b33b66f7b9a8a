use std::env;
use std::ffi::OsString;
use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use crate::cache::cache_dir;
use crate::{Error, Result};

/// Where models are looked for and how they are fetched.
#[derive(Clone, Debug)]
pub struct HubOptions {
    /// Where models are kept, instead of `models` in [`cache_dir`].
    pub cache_dir: Option<PathBuf>,
    /// Branch, tag or commit; `main` where none is given.
    pub revision: Option<String>,
    /// What the hub knows the user by. It is sent to the endpoint alone.
    pub token: Option<String>,
    /// Fetch nothing.
    pub offline: bool,
    /// The hub or its mirror, `https://huggingface.co`.
    pub endpoint: String,
    /// Python's cache of models, which is read and never written.
    pub python_cache: Option<PathBuf>,
    /// How often a cut connection is taken up again without a byte having come.
    pub retries: u32,
    /// How long to wait before the first of these; the wait doubles.
    pub retry_wait: Duration,
}

/// How far a download is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress<'a> {
    /// The file that is coming.
    pub file: &'a str,
    /// Bytes that are there, of all files together.
    pub done: u64,
    /// Bytes of all files together.
    pub total: u64,
}

impl Default for HubOptions {
    /// The public hub, no token, nothing from the environment.
    fn default() -> HubOptions {
        HubOptions {
            cache_dir: None,
            revision: None,
            token: None,
            offline: false,
            endpoint: "https://huggingface.co".into(),
            python_cache: None,
            retries: 5,
            retry_wait: Duration::from_secs(1),
        }
    }
}

impl HubOptions {
    /// What the variables say that Python's huggingface_hub reads too: `HF_ENDPOINT`, `HF_TOKEN` (or the
    /// file that `hf auth login` writes), `HF_HUB_OFFLINE`, `HF_HOME`, `HF_HUB_CACHE`.
    pub fn from_env() -> HubOptions {
        let default = HubOptions::default();
        let python_home = set("HF_HOME").map(PathBuf::from);
        let python_home = python_home.or_else(|| Some(home().ok()?.join(".cache").join("huggingface")));
        let token = text("HF_TOKEN").or_else(|| text("HUGGING_FACE_HUB_TOKEN"));
        let token = token.or_else(|| {
            let file =
                set("HF_TOKEN_PATH").map(PathBuf::from).or(Some(python_home.as_ref()?.join("token")))?;
            Some(fs::read_to_string(file).ok()?.trim().to_string()).filter(|it| !it.is_empty())
        });
        let yes = |it: String| matches!(it.to_lowercase().as_str(), "1" | "true" | "yes" | "on");
        HubOptions {
            token,
            offline: text("HF_HUB_OFFLINE").is_some_and(yes),
            endpoint: text("HF_ENDPOINT").unwrap_or(default.endpoint.clone()),
            python_cache: set("HF_HUB_CACHE").map(PathBuf::from).or(python_home.map(|it| it.join("hub"))),
            ..default
        }
    }

    pub(crate) fn models_dir(&self) -> Result<PathBuf> {
        match &self.cache_dir {
            Some(folder) => Ok(folder.clone()),
            None => Ok(cache_dir()?.join("models")),
        }
    }

    pub(crate) fn data_sets_dir(&self) -> Result<PathBuf> {
        match &self.cache_dir {
            Some(folder) => Ok(folder.join("datasets")),
            None => Ok(cache_dir()?.join("datasets")),
        }
    }

    pub(crate) fn revision(&self) -> &str {
        self.revision.as_deref().unwrap_or("main")
    }
}

/// A variable that is set and not empty.
pub(crate) fn set(name: &str) -> Option<OsString> {
    env::var_os(name).filter(|it| !it.is_empty())
}

fn text(name: &str) -> Option<String> {
    set(name)?.into_string().ok().map(|it| it.trim().to_string()).filter(|it| !it.is_empty())
}

/// The user's home folder.
pub(crate) fn home() -> Result<PathBuf> {
    let home = set("HOME").or_else(|| set("USERPROFILE")).map(PathBuf::from);
    home.ok_or_else(|| Error::new("no home folder: set FERROTUNE_HOME to a folder for models"))
}
