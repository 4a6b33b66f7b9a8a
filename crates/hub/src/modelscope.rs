//! ModelScope's questions and answers: `GET /api/v1/models/<name>/repo/files` lists a model's files, and
//! `…/repo?Revision=…&FilePath=…` gives one. A revision is a branch or tag; what was checked is the SHA-256 of each file.

use serde_json::Value;

use crate::http::escaped;
use crate::name::{Name, is_safe_path};
use crate::plan::{RemoteFile, hexadecimal};
use crate::{Error, Result};

/// Where the hub lists a model's files.
pub(crate) fn listing(endpoint: &str, name: &Name, revision: &str) -> String {
    let (model, revision) = (escaped(&name.model, true), escaped(revision, false));
    format!("{endpoint}/api/v1/models/{model}/repo/files?Revision={revision}&Recursive=True")
}

/// Where a file is.
pub(crate) fn file(endpoint: &str, name: &Name, revision: &str, path: &str) -> String {
    let (model, revision, path) =
        (escaped(&name.model, true), escaped(revision, false), escaped(path, false));
    format!("{endpoint}/api/v1/models/{model}/repo?Revision={revision}&FilePath={path}")
}

/// Reads the list. The revision stands for the commit, which isn't told.
pub(crate) fn listed(name: &Name, revision: &str, answer: &Value) -> Result<(String, Vec<RemoteFile>)> {
    let files = answer.get("Data").and_then(|it| it.get("Files")).and_then(Value::as_array);
    let Some(files) = files else {
        let said = answer.get("Message").and_then(Value::as_str).filter(|it| !it.is_empty());
        let message = match said {
            Some(said) => format!("`{name}`: the hub says \"{said}\""),
            None => {
                format!(
                    "`{name}`: the hub's answer lists no files: is MODELSCOPE_ENDPOINT a hub as ModelScope is?"
                )
            }
        };
        return Err(Error::new(message));
    };
    let files = files.iter().filter_map(remote_file).filter(|it| is_safe_path(&it.path));
    Ok((revision.to_string(), files.collect()))
}

fn remote_file(entry: &Value) -> Option<RemoteFile> {
    if entry.get("Type").and_then(Value::as_str) == Some("tree") {
        return None;
    }
    Some(RemoteFile {
        path: entry.get("Path")?.as_str()?.to_string(),
        size: entry.get("Size").and_then(Value::as_u64),
        sha256: entry.get("Sha256").and_then(hexadecimal),
    })
}
