use std::fmt;

use crate::{Error, Result};

/// A model's name on a hub.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Name {
    /// `organisation/model`, or `model` alone.
    pub(crate) model: String,
    /// One file of it.
    pub(crate) file: Option<String>,
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.file {
            Some(file) => write!(f, "{}/{file}", self.model),
            None => f.write_str(&self.model),
        }
    }
}

/// Takes a name apart that is no path.
pub(crate) fn parse(name: &str) -> Result<Name> {
    let not_there =
        || Error::new(format!("`{name}`: no such file or folder, and no model's name on a hub either"));
    if name.starts_with(['/', '.', '~']) || name.contains('\\') {
        return Err(Error::new(format!("`{name}`: no such file or folder")));
    }
    let parts: Vec<&str> = name.split('/').collect();
    if !parts.iter().all(|it| is_plain(it)) {
        return Err(not_there());
    }
    match parts[..] {
        [model] if !model.to_lowercase().ends_with(".gguf") => Ok(Name { model: model.into(), file: None }),
        [organisation, model] if !model.to_lowercase().ends_with(".gguf") => {
            Ok(Name { model: format!("{organisation}/{model}"), file: None })
        }
        [organisation, model, .., file] if parts.len() > 2 && file.to_lowercase().ends_with(".gguf") => {
            Ok(Name { model: format!("{organisation}/{model}"), file: Some(parts[2..].join("/")) })
        }
        _ => Err(not_there()),
    }
}

/// One part of a path that leads nowhere else.
pub(crate) fn is_plain(part: &str) -> bool {
    let good = |it: char| it.is_alphanumeric() || "-_.+ ".contains(it);
    !part.is_empty() && !part.starts_with('.') && part.chars().all(good)
}

/// A file's path within a model, that stays within it.
pub(crate) fn is_safe_path(path: &str) -> bool {
    path.split('/').all(is_plain)
}
