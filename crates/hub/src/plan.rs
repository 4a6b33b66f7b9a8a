//! Which of a model's files are fetched.

use std::fs;
use std::path::Path;

use serde_json::Value;

use crate::name::{Name, is_safe_path};
use crate::{Error, Hub, HubOptions, Result, modelscope};

/// A file on the hub.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct RemoteFile {
    pub(crate) path: String,
    /// Its length, where the hub says it.
    pub(crate) size: Option<u64>,
    /// Its checksum, where the hub says it: large files have one.
    pub(crate) sha256: Option<String>,
}

/// What is fetched of a model.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Plan {
    /// The commit that all files are taken from.
    pub(crate) commit: String,
    /// In the order of fetching: config.json comes last, so that a folder with one is whole.
    pub(crate) files: Vec<RemoteFile>,
    /// The one GGUF file that is the model.
    pub(crate) gguf: Option<String>,
}

/// Files beside the weights, where a model has them.
const BESIDE: &[&str] = &[
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
];

impl RemoteFile {
    /// Whether it lies in `folder` with its whole length.
    pub(crate) fn is_in(&self, folder: &Path) -> bool {
        let there = fs::metadata(folder.join(&self.path)).ok().filter(fs::Metadata::is_file);
        there.is_some_and(|there| self.size.is_none_or(|size| size == there.len()))
    }
}

/// Reads the hub's answer about a model or a data set: the commit and its files. What would lie outside of the
/// folder isn't among them.
pub(crate) fn listed(name: &Name, options: &HubOptions, answer: &Value) -> Result<(String, Vec<RemoteFile>)> {
    if options.hub == Hub::ModelScope {
        return modelscope::listed(name, options.revision(), answer);
    }
    let commit = answer.get("sha").and_then(Value::as_str).filter(|it| is_safe_path(it));
    let siblings = answer.get("siblings").and_then(Value::as_array);
    let (Some(commit), Some(siblings)) = (commit, siblings) else {
        return Err(Error::new(format!(
            "`{name}`: the hub's answer lists no files: is HF_ENDPOINT a model hub?"
        )));
    };
    let files = siblings.iter().filter_map(remote_file).filter(|it| is_safe_path(&it.path));
    Ok((commit.to_string(), files.collect()))
}

/// Reads the hub's answer about a model and chooses.
pub(crate) fn plan(name: &Name, options: &HubOptions, answer: &Value) -> Result<Plan> {
    let (commit, all) = listed(name, options, answer)?;
    let find = |path: &str| all.iter().find(|it| it.path == path).cloned();
    let plan = |files, gguf| Ok(Plan { commit: commit.clone(), files, gguf });
    if let Some(wanted) = &name.file {
        let Some(file) = find(wanted) else {
            return Err(Error::new(format!("`{}` has no file `{wanted}`{}", name.model, among(&all))));
        };
        return plan(vec![file], Some(wanted.clone()));
    }
    let index = "model.safetensors.index.json";
    let weights: Vec<RemoteFile> = match (find("model.safetensors"), find(index)) {
        (Some(file), _) => vec![file],
        (None, Some(index)) => {
            let shard = |it: &&RemoteFile| it.path.starts_with("model-") && it.path.ends_with(".safetensors");
            std::iter::once(index).chain(all.iter().filter(shard).cloned()).collect()
        }
        (None, None) => Vec::new(),
    };
    if let Some(config) = find("config.json").filter(|_| !weights.is_empty()) {
        let mut files: Vec<RemoteFile> = BESIDE.iter().filter_map(|it| find(it)).collect();
        files.extend(weights);
        files.push(config);
        return plan(files, None);
    }
    let ggufs: Vec<&RemoteFile> = all.iter().filter(|it| it.path.to_lowercase().ends_with(".gguf")).collect();
    match ggufs[..] {
        [only] => plan(vec![only.clone()], Some(only.path.clone())),
        [] => Err(Error::new(nothing(name, &all))),
        _ => Err(Error::new(format!("`{name}` has several GGUF files: name one{}", among(&all)))),
    }
}

fn nothing(name: &Name, all: &[RemoteFile]) -> String {
    let has = |test: &dyn Fn(&str) -> bool| all.iter().any(|it| test(&it.path));
    if has(&|it| it == "adapter_config.json") {
        format!("`{name}` is an adapter, not a model: name its base as the model and this as the adapter")
    } else if has(&|it| it.ends_with(".bin") || it.ends_with(".pth") || it.ends_with(".pt")) {
        format!(
            "`{name}` has its weights as a pickle alone, which runs code when it is opened, so it is \
             refused: look for a revision or a copy with model.safetensors"
        )
    } else {
        format!("`{name}` has neither config.json with model.safetensors nor a GGUF file")
    }
}

/// The GGUF files to choose from, as they are to be named.
fn among(all: &[RemoteFile]) -> String {
    let names = all.iter().map(|it| it.path.as_str()).filter(|it| it.to_lowercase().ends_with(".gguf"));
    let names: Vec<&str> = names.take(12).collect();
    if names.is_empty() {
        String::new()
    } else {
        format!(", such as `organisation/model/file`: {}", names.join(", "))
    }
}

fn remote_file(sibling: &Value) -> Option<RemoteFile> {
    let lfs = sibling.get("lfs").filter(|it| it.is_object());
    let size = lfs.and_then(|it| it.get("size")).or(sibling.get("size")).and_then(Value::as_u64);
    let sha256 = lfs.and_then(|it| it.get("sha256").or(it.get("oid")));
    let path = sibling.get("rfilename")?.as_str()?.to_string();
    Some(RemoteFile { path, size, sha256: sha256.and_then(hexadecimal) })
}

/// A SHA-256 as the hub writes it.
pub(crate) fn hexadecimal(text: &Value) -> Option<String> {
    let hex = |it: &&str| it.len() == 64 && it.bytes().all(|it| it.is_ascii_hexdigit());
    text.as_str().filter(hex).map(str::to_lowercase)
}
