use std::collections::BTreeSet;
use std::fs::{self, File};
use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::name::{Name, is_safe_path};
use crate::options::{home, set};
use crate::{Error, Hub, HubOptions, Result};

/// Ferrotune's own cache: `$FERROTUNE_HOME`, `$XDG_CACHE_HOME/ferrotune` or `~/.cache/ferrotune`.
/// Models are in `models/<organisation>--<model>` there.
///
/// # Errors
/// When none of these is known.
pub fn cache_dir() -> Result<PathBuf> {
    if let Some(folder) = set("FERROTUNE_HOME") {
        return Ok(folder.into());
    }
    if let Some(folder) = set("XDG_CACHE_HOME") {
        return Ok(PathBuf::from(folder).join("ferrotune"));
    }
    Ok(home()?.join(".cache").join("ferrotune"))
}

/// Copies a GGUF file into the model cache, where [`crate::resolve`] finds it under the hub name.
///
/// # Errors
/// When the name is no hub name, or the file can't be copied.
pub fn import(name: &str, file: &Path) -> Result<PathBuf> {
    import_into(&cache_dir()?.join("models"), name, file)
}

pub(crate) fn import_into(models: &Path, name: &str, file: &Path) -> Result<PathBuf> {
    let parsed = crate::name::parse(name)?;
    let file_name = file.file_name().filter(|_| file.extension().is_some_and(|it| it == "gguf"));
    let Some(file_name) = file_name else {
        return Err(Error::new(format!("{}: expected a .gguf file", file.display())));
    };
    let folder = folder(models, &parsed, &HubOptions::default());
    fs::create_dir_all(&folder).map_err(Error::io(&folder))?;
    let target = folder.join(file_name);
    let part = folder.join(format!("{}.{}.part", file_name.to_string_lossy(), std::process::id()));
    let copied = fs::copy(file, &part)
        .and_then(|_| File::open(&part)?.sync_all())
        .and_then(|()| fs::rename(&part, &target));
    if let Err(source) = copied {
        let _ = fs::remove_file(&part);
        return Err(Error::Io { path: target, source });
    }
    Ok(target)
}

/// The folder of a model or data set and a revision.
pub(crate) fn folder(parent: &Path, name: &Name, options: &HubOptions) -> PathBuf {
    let mut folder = name.model.replace('/', "--");
    if options.revision() != options.hub.branch() {
        folder += "@";
        folder += &options.revision().replace(['/', '\\'], "--");
    }
    parent.join(folder)
}

/// A whole model in a folder: the folder, or its one GGUF file.
pub(crate) fn found(folder: &Path, file: Option<&str>) -> Option<PathBuf> {
    if let Some(file) = file {
        let path = folder.join(file);
        return path.is_file().then_some(path);
    }
    if folder.join("config.json").is_file() && has_weights(folder) {
        return Some(folder.to_path_buf());
    }
    let entries = fs::read_dir(folder).ok()?.flatten().map(|it| it.path());
    let mut files = entries.filter(|it| it.is_file() && it.extension().is_some_and(|it| it == "gguf"));
    let first = files.next()?;
    files.next().is_none().then_some(first)
}

fn has_weights(folder: &Path) -> bool {
    if folder.join("model.safetensors").is_file() {
        return true;
    }
    let Ok(index) = fs::read(folder.join("model.safetensors.index.json")) else { return false };
    shards(&index).is_some_and(|names| names.iter().all(|it| folder.join(it).is_file()))
}

/// The files that an index names; none when it can't be read.
pub(crate) fn shards(index: &[u8]) -> Option<Vec<String>> {
    let index: Value = serde_json::from_slice(index).ok()?;
    let map = index.get("weight_map")?.as_object()?;
    let names: Option<BTreeSet<&str>> =
        map.values().map(|it| it.as_str().filter(|it| is_safe_path(it))).collect();
    names.map(|it| it.into_iter().map(str::to_string).collect())
}

/// A whole model in Python's cache.
pub(crate) fn found_in_python(name: &Name, options: &HubOptions) -> Option<PathBuf> {
    match options.hub {
        Hub::HuggingFace => found(&python_snapshot("models", name, options)?, name.file.as_deref()),
        Hub::ModelScope => {
            modelscope_folders(name, options).iter().find_map(|it| found(it, name.file.as_deref()))
        }
    }
}

/// Where ModelScope's library keeps a model: `models/<organisation>--<model>/snapshots/<revision>`, and its older versions
/// `[hub/]models/<organisation>/<model>`, with `___` for each dot. These know of no revision.
fn modelscope_folders(name: &Name, options: &HubOptions) -> Vec<PathBuf> {
    let (Some(cache), revision) = (&options.python_cache, options.revision()) else { return Vec::new() };
    if !is_safe_path(revision) {
        return Vec::new();
    }
    let new = cache.join("models").join(name.model.replace('/', "--")).join("snapshots").join(revision);
    let mut folders = vec![new];
    if let (Some((owner, model)), true) = (name.model.split_once('/'), revision == options.hub.branch()) {
        let old = |parent: PathBuf| parent.join("models").join(owner).join(model.replace('.', "___"));
        folders.extend([old(cache.clone()), old(cache.join("hub"))]);
    }
    folders
}

/// What Python's cache has of a revision: `models--<organisation>--<model>/snapshots/<commit>`, or `datasets--…`.
pub(crate) fn python_snapshot(kind: &str, name: &Name, options: &HubOptions) -> Option<PathBuf> {
    let folder = format!("{kind}--{}", name.model.replace('/', "--"));
    let folder = options.python_cache.as_ref()?.join(folder);
    let revision = options.revision();
    if !is_safe_path(revision) {
        return None;
    }
    let commit = fs::read_to_string(folder.join("refs").join(revision)).unwrap_or(revision.to_string());
    let commit = commit.trim();
    if !is_safe_path(commit) {
        return None;
    }
    Some(folder.join("snapshots").join(commit)).filter(|it| it.is_dir())
}
