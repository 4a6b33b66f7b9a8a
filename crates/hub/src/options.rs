use std::env;
use std::ffi::OsString;
use std::fmt;
use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use crate::cache::cache_dir;
use crate::{Error, Result};

/// Whose names and questions are used.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Hub {
    /// Hugging Face's, and mirrors of it.
    #[default]
    HuggingFace,
    /// ModelScope's.
    ModelScope,
}

/// Where models are looked for and how they are fetched.
#[derive(Clone)]
pub struct HubOptions {
    /// Which hub it is.
    pub hub: Hub,
    /// Where models are kept, instead of `models` in [`cache_dir`].
    pub cache_dir: Option<PathBuf>,
    /// Branch, tag or commit; `main` (ModelScope: `master`) where none is given.
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

/// Says nothing of the token.
impl fmt::Debug for HubOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("HubOptions")
            .field("hub", &self.hub)
            .field("endpoint", &self.endpoint)
            .field("revision", &self.revision())
            .field("offline", &self.offline)
            .finish_non_exhaustive()
    }
}

impl Hub {
    /// Its address.
    pub(crate) fn endpoint(self) -> &'static str {
        match self {
            Hub::HuggingFace => "https://huggingface.co",
            Hub::ModelScope => "https://www.modelscope.cn",
        }
    }

    /// The variable that has another address, a mirror's for one.
    pub(crate) fn endpoint_variable(self) -> &'static str {
        match self {
            Hub::HuggingFace => "HF_ENDPOINT",
            Hub::ModelScope => "MODELSCOPE_ENDPOINT",
        }
    }

    /// The variable that has the token.
    pub(crate) fn token_variable(self) -> &'static str {
        match self {
            Hub::HuggingFace => "HF_TOKEN",
            Hub::ModelScope => "MODELSCOPE_API_TOKEN",
        }
    }

    /// Where a person gets a token, below the address.
    pub(crate) fn token_page(self) -> &'static str {
        match self {
            Hub::HuggingFace => "settings/tokens",
            Hub::ModelScope => "my/myaccesstoken",
        }
    }

    /// What a model's files are taken from unless something else is said.
    pub(crate) fn branch(self) -> &'static str {
        match self {
            Hub::HuggingFace => "main",
            Hub::ModelScope => "master",
        }
    }

    /// Its folder within ours: a name is another model on another hub.
    fn folder(self) -> &'static str {
        match self {
            Hub::HuggingFace => "models",
            Hub::ModelScope => "modelscope",
        }
    }
}

impl Default for HubOptions {
    /// The public hub, no token, nothing from the environment.
    fn default() -> HubOptions {
        HubOptions {
            hub: Hub::default(),
            cache_dir: None,
            revision: None,
            token: None,
            offline: false,
            endpoint: Hub::default().endpoint().into(),
            python_cache: None,
            retries: 5,
            retry_wait: Duration::from_secs(1),
        }
    }
}

impl HubOptions {
    /// What the variables say that Python's huggingface_hub reads too: `HF_ENDPOINT`, `HF_TOKEN` (or the
    /// file that `hf auth login` writes), `HF_HUB_OFFLINE`, `HF_HOME`, `HF_HUB_CACHE`; of ModelScope, what its own library
    /// reads: `MODELSCOPE_ENDPOINT` (or `MODELSCOPE_DOMAIN`), `MODELSCOPE_API_TOKEN`, `MODELSCOPE_CACHE`.
    pub fn from_env(hub: Hub) -> HubOptions {
        match hub {
            Hub::HuggingFace => HubOptions::hugging_face(),
            Hub::ModelScope => HubOptions::modelscope(),
        }
    }

    /// The hub that LLaMA-Factory would take: ModelScope where `USE_MODELSCOPE_HUB` says so.
    pub fn hub_from_env() -> Hub {
        match text("USE_MODELSCOPE_HUB").is_some_and(yes) {
            true => Hub::ModelScope,
            false => Hub::HuggingFace,
        }
    }

    fn modelscope() -> HubOptions {
        let domain = || text("MODELSCOPE_DOMAIN").map(|it| format!("https://{it}"));
        let python_cache = set("MODELSCOPE_CACHE").map(PathBuf::from);
        HubOptions {
            hub: Hub::ModelScope,
            token: text("MODELSCOPE_API_TOKEN"),
            offline: text("HF_HUB_OFFLINE").is_some_and(yes),
            endpoint: text("MODELSCOPE_ENDPOINT")
                .or_else(domain)
                .unwrap_or(Hub::ModelScope.endpoint().into()),
            python_cache: python_cache.or_else(|| Some(home().ok()?.join(".cache").join("modelscope"))),
            ..HubOptions::default()
        }
    }

    fn hugging_face() -> HubOptions {
        let default = HubOptions::default();
        let python_home = set("HF_HOME").map(PathBuf::from);
        let python_home = python_home.or_else(|| Some(home().ok()?.join(".cache").join("huggingface")));
        let token = text("HF_TOKEN").or_else(|| text("HUGGING_FACE_HUB_TOKEN"));
        let token = token.or_else(|| {
            let file =
                set("HF_TOKEN_PATH").map(PathBuf::from).or(Some(python_home.as_ref()?.join("token")))?;
            Some(fs::read_to_string(file).ok()?.trim().to_string()).filter(|it| !it.is_empty())
        });
        HubOptions {
            token,
            offline: text("HF_HUB_OFFLINE").is_some_and(yes),
            endpoint: text("HF_ENDPOINT").unwrap_or(default.endpoint.clone()),
            python_cache: set("HF_HUB_CACHE").map(PathBuf::from).or(python_home.map(|it| it.join("hub"))),
            ..default
        }
    }

    pub(crate) fn models_dir(&self) -> Result<PathBuf> {
        match (&self.cache_dir, self.hub) {
            (Some(folder), Hub::HuggingFace) => Ok(folder.clone()),
            (Some(folder), hub) => Ok(folder.join(hub.folder())),
            (None, hub) => Ok(cache_dir()?.join(hub.folder())),
        }
    }

    pub(crate) fn data_sets_dir(&self) -> Result<PathBuf> {
        match &self.cache_dir {
            Some(folder) => Ok(folder.join("datasets")),
            None => Ok(cache_dir()?.join("datasets")),
        }
    }

    pub(crate) fn revision(&self) -> &str {
        self.revision.as_deref().unwrap_or(self.hub.branch())
    }
}

/// What huggingface_hub takes for yes.
fn yes(text: String) -> bool {
    matches!(text.to_lowercase().as_str(), "1" | "true" | "yes" | "on")
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
