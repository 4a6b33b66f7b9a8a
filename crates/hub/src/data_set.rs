//! Data sets: what files there are, and those of them that are wanted.
//!
//! Beside the files lies the list of all that the data set has, so that a later start asks nobody.

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use crate::download;
use crate::http::{Client, Repository};
use crate::name::{Name, is_plain, parse};
use crate::plan::{RemoteFile, listed};
use crate::{Error, Hub, HubOptions, Progress, Result, cache};

/// The list, as the hub gave it.
const LISTING: &str = ".listing.json";
/// How deep Python's cache is looked into.
const DEEPEST: usize = 8;

/// A data set of a hub, known by the list of its files.
#[derive(Clone, Debug)]
pub struct DataSetFiles {
    name: Name,
    commit: String,
    files: Vec<RemoteFile>,
    folder: PathBuf,
    /// In Python's cache, which is only read.
    foreign: bool,
}

/// The files of the data set `owner/name`, out of the cache or by asking the hub.
///
/// # Errors
/// When there is no such data set, or the hub can't be asked; the message says what to do.
pub fn data_set(name: &str, options: &HubOptions) -> Result<DataSetFiles> {
    let name = parse(name)?;
    if options.hub == Hub::ModelScope {
        return Err(Error::new(format!(
            "data set `{name}`: data sets of ModelScope can't be fetched: take it from another hub, or give the path of a \
             file or folder that holds it"
        )));
    }
    let folder = cache::folder(&options.data_sets_dir()?, &name, options);
    if let Some(set) = cached(&name, options, &folder) {
        return Ok(set);
    }
    if let Some(snapshot) = cache::python_snapshot("datasets", &name, options) {
        let mut files = Vec::new();
        under(&snapshot, "", 0, &mut files);
        if !files.is_empty() {
            let commit = String::new();
            return Ok(DataSetFiles { name, commit, files, folder: snapshot, foreign: true });
        }
    }
    if options.offline {
        return Err(Error::new(format!(
            "data set `{name}` is not in the cache ({}), and nothing is fetched in offline mode: unset \
             HF_HUB_OFFLINE, or give the path of a file or folder that holds it",
            folder.display()
        )));
    }
    let client = Client::new(Repository::DataSet, &name, options)?;
    let answer = download::listing(&client, &name, options)?;
    let (commit, files) = listed(&name, options, &answer)?;
    keep(&folder, &answer)?;
    Ok(DataSetFiles { name, commit, files, folder, foreign: false })
}

fn cached(name: &Name, options: &HubOptions, folder: &Path) -> Option<DataSetFiles> {
    let text = fs::read(folder.join(LISTING)).ok()?;
    let (commit, files) = listed(name, options, &serde_json::from_slice(&text).ok()?).ok()?;
    Some(DataSetFiles { name: name.clone(), commit, files, folder: folder.to_path_buf(), foreign: false })
}

/// Writes the list: beside, then renamed.
fn keep(folder: &Path, answer: &Value) -> Result<()> {
    fs::create_dir_all(folder).map_err(Error::io(folder))?;
    let path = folder.join(LISTING);
    let part = folder.join(format!("{LISTING}.{}.part", std::process::id()));
    let kept = json!({ "sha": answer.get("sha"), "siblings": answer.get("siblings") });
    let written = fs::write(&part, kept.to_string()).and_then(|()| fs::rename(&part, &path));
    if written.is_err() {
        let _ = fs::remove_file(&part);
    }
    written.map_err(Error::io(&path))
}

fn under(folder: &Path, path: &str, depth: usize, files: &mut Vec<RemoteFile>) {
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        if !is_plain(&name) {
            continue;
        }
        let path = if path.is_empty() { name } else { format!("{path}/{name}") };
        // Through the links of Python's cache.
        match fs::metadata(entry.path()) {
            Ok(it) if it.is_dir() && depth < DEEPEST => under(&entry.path(), &path, depth + 1, files),
            Ok(it) if it.is_file() => files.push(RemoteFile { path, size: Some(it.len()), sha256: None }),
            _ => {}
        }
    }
}

impl DataSetFiles {
    /// The paths of all its files.
    pub fn paths(&self) -> Vec<&str> {
        self.files.iter().map(|it| it.path.as_str()).collect()
    }

    /// Brings these of its files and says where they are, in the same order.
    ///
    /// # Errors
    /// When one can't be fetched.
    pub fn fetch(
        &self,
        paths: &[String],
        options: &HubOptions,
        progress: &mut dyn FnMut(&Progress),
    ) -> Result<Vec<PathBuf>> {
        let name = &self.name;
        let find = |path: &String| {
            let found = self.files.iter().find(|it| it.path == *path).cloned();
            found.ok_or_else(|| Error::new(format!("data set `{name}` has no file `{path}`")))
        };
        let wanted: Vec<RemoteFile> = paths.iter().map(find).collect::<Result<_>>()?;
        let missing = wanted.iter().find(|it| !it.is_in(&self.folder));
        if let Some(missing) = missing {
            if options.offline || self.foreign {
                return Err(Error::new(format!(
                    "`{}` of data set `{name}` is not in the cache ({}), and nothing is fetched in offline mode: \
                     unset HF_HUB_OFFLINE, or give the path of a file or folder that holds it",
                    missing.path,
                    self.folder.display()
                )));
            }
            let client = Client::new(Repository::DataSet, name, options)?;
            download::files(&client, &self.commit, &wanted, &self.folder, options, progress)?;
        }
        Ok(wanted.iter().map(|it| self.folder.join(&it.path)).collect())
    }
}
