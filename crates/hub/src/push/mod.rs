//! Files to the hub: who asks, the repository, what goes into it by itself and what into the store for large files, and one
//! commit that names them all. What the store has already isn't sent again, so that a push that was cut goes on where it was.
//! Source: huggingface_hub/hf_api.py (create_repo), _commit_api.py.

mod base64;
mod large;

use std::cell::Cell;
use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};
use ureq::http::HeaderMap;
use ureq::{Body, http::Response};

use crate::http::{Client, Failure, Repository, Sent, Verb, escaped, wish};
use crate::name::{self, Name};
use crate::patience::patiently;
use crate::{Error, Hub, HubOptions, Progress, Result};
use large::Large;

/// The longest answer that is read.
const LONGEST_ANSWER: u64 = 64 << 20;
/// Bytes of a file that the hub wants to see before it says where the file goes.
const SAMPLE: u64 = 512;

/// What is to become of files on the hub.
#[derive(Clone, Copy, Debug)]
pub struct Push<'a> {
    /// `owner/name`, or `name` alone for one's own.
    pub name: &'a str,
    /// Who may see a repository: all (false) or its owner; none leaves it to the hub. One that is there stays as it is.
    pub private: Option<bool>,
    /// The commit's first line.
    pub summary: &'a str,
}

/// What was done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pushed {
    /// The model's page.
    pub page: String,
    /// The commit.
    pub commit: String,
    /// Bytes that the store for large files had already.
    pub had: u64,
}

/// A file that is sent: its name in the repository, where it is, and how long.
struct Outgoing {
    path: String,
    local: PathBuf,
    size: u64,
}

/// The files at the top of a folder that make a model or an adapter: config, weights, tokenizer, template, card. A run's logs,
/// answers and checkpoints, and whatever else lies there, are not among them.
///
/// # Errors
/// When the folder can't be read, or has no such files.
pub fn model_files(folder: &Path) -> Result<Vec<PathBuf>> {
    const NAMES: [&str; 16] = [
        "README.md",
        "config.json",
        "generation_config.json",
        "adapter_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "tokenizer.model",
        "special_tokens_map.json",
        "added_tokens.json",
        "vocab.json",
        "merges.txt",
        "chat_template.jinja",
        "chat_template.json",
        "model.safetensors.index.json",
        "training_loss.png",
        "Modelfile",
    ];
    let entries = fs::read_dir(folder).map_err(Error::io(folder))?;
    let ours = |path: &PathBuf| {
        let name = path.file_name().and_then(|it| it.to_str()).unwrap_or("");
        let weights = [".safetensors", ".gguf"].iter().any(|it| name.ends_with(it)) && !name.starts_with('.');
        path.is_file() && (weights || NAMES.contains(&name))
    };
    let mut files: Vec<PathBuf> = entries.flatten().map(|it| it.path()).filter(ours).collect();
    files.sort();
    let weights = |path: &PathBuf| path.extension().is_some_and(|it| it == "safetensors" || it == "gguf");
    if !files.iter().any(weights) {
        let message =
            format!("{}: no adapter and no model is in there (*.safetensors, *.gguf)", folder.display());
        return Err(Error::new(message));
    }
    Ok(files)
}

/// Whether the hub knows the token, and lets it write what [`push`] would; the full name is given back. Nothing is changed.
///
/// # Errors
/// When it doesn't, or nobody can be asked; the message says what to do.
pub fn check_push(push: &Push, options: &HubOptions) -> Result<String> {
    let name = writable(push, options)?;
    Ok(Pusher::new(&name, options)?.full_name()?.model)
}

/// Puts files into a repository, which is made where there is none, in one commit on `main`.
///
/// # Errors
/// When the hub doesn't take them, or can't be reached; the message says what to do.
pub fn push(
    files: &[PathBuf],
    push: &Push,
    options: &HubOptions,
    progress: &mut dyn FnMut(&Progress),
) -> Result<Pushed> {
    let short = writable(push, options)?;
    let name = Pusher::new(&short, options)?.full_name()?;
    let pusher = Pusher::new(&name, options)?;
    let files = files.iter().map(|it| outgoing(it)).collect::<Result<Vec<_>>>()?;
    pusher.make(push.private)?;
    let is_large = pusher.choose(&files)?;
    let large = files.iter().zip(&is_large).filter(|it| *it.1).map(|it| it.0);
    let large = large.map(Large::hash).collect::<Result<Vec<_>>>()?;
    let had = pusher.send_large(&large, progress)?;
    let small = files.iter().zip(&is_large).filter(|it| !*it.1).map(|it| it.0);
    let commit = pusher.commit(push.summary, small, &large)?;
    Ok(Pushed { page: format!("{}/{}", pusher.client.endpoint, name.model), commit, had })
}

fn outgoing(local: &Path) -> Result<Outgoing> {
    let size = fs::metadata(local).map_err(Error::io(local))?.len();
    let name = local.file_name().map(|it| it.to_string_lossy().into_owned());
    let path = name.ok_or_else(|| Error::new(format!("{}: expected a file", local.display())))?;
    Ok(Outgoing { path, local: local.to_path_buf(), size })
}

/// The name, where one can be written to.
fn writable(push: &Push, options: &HubOptions) -> Result<Name> {
    let name = name::parse(push.name).ok().filter(|it| it.file.is_none()).ok_or_else(|| {
        Error::new(format!("`{}` is no name on a hub, expected `owner/name` or `name`", push.name))
    })?;
    if options.hub == Hub::ModelScope {
        return Err(Error::new(format!(
            "`{name}`: files can't be sent to ModelScope; use its own program for that, or another hub"
        )));
    }
    if options.offline {
        return Err(Error::new(format!("`{name}`: nothing is sent in offline mode: unset HF_HUB_OFFLINE")));
    }
    if options.token.is_none() {
        let (endpoint, page) = (options.endpoint.trim_end_matches('/'), options.hub.token_page());
        return Err(Error::new(format!(
            "`{name}`: nobody may write without a token: set HF_TOKEN to one that may write, from {endpoint}/{page}"
        )));
    }
    Ok(name)
}

/// What became of a question.
enum Posted {
    Taken(Value),
    Refused(u16, Error),
}

/// Talks about one repository.
struct Pusher<'a> {
    client: Client<'a>,
    name: &'a Name,
    options: &'a HubOptions,
}

impl<'a> Pusher<'a> {
    fn new(name: &'a Name, options: &'a HubOptions) -> Result<Pusher<'a>> {
        Ok(Pusher { client: Client::new(Repository::Model, name, options)?, name, options })
    }

    /// `owner/name`: where no owner is given, it is whom the token belongs to.
    fn full_name(&self) -> Result<Name> {
        let endpoint = &self.client.endpoint;
        let me = self.get(&format!("{endpoint}/api/whoami-v2"))?;
        let own = me.get("name").and_then(Value::as_str).unwrap_or("");
        let role = me.pointer("/auth/accessToken/role").and_then(Value::as_str);
        if role == Some("read") {
            return Err(Error::new(format!(
                "`{}`: the token of `{own}` may only read: set HF_TOKEN to one that may write, from {endpoint}/{}",
                self.name,
                self.options.hub.token_page()
            )));
        }
        let Some((owner, _)) = self.name.model.split_once('/') else {
            return name::parse(&format!("{own}/{}", self.name.model));
        };
        let groups = me.get("orgs").and_then(Value::as_array).map(Vec::as_slice).unwrap_or_default();
        let groups: Vec<&str> = groups.iter().filter_map(|it| it.get("name")?.as_str()).collect();
        if owner != own && !groups.contains(&owner) {
            let all = [&[own], &groups[..]].concat().join(", ");
            return Err(Error::new(format!(
                "`{}`: the token doesn't belong to `{owner}` or to a member of it, but to: {all}",
                self.name
            )));
        }
        Ok(self.name.clone())
    }

    /// Makes the repository, unless it is there.
    fn make(&self, private: Option<bool>) -> Result<()> {
        let (owner, short) = self.name.model.split_once('/').unwrap_or(("", &self.name.model));
        let mut asked = json!({ "type": "model", "name": short, "organization": owner });
        if let Some(private) = private {
            asked["private"] = private.into();
        }
        let url = format!("{}/api/repos/create", self.client.endpoint);
        // 409: it is there. Who may not make one may still be allowed to write into one that is there.
        let Posted::Refused(status, refusal) = self.post(&url, &asked, &[409, 401, 403])? else {
            return Ok(());
        };
        if status == 409 && private != Some(true) {
            return Ok(());
        }
        let there = format!("{}/api/models/{}", self.client.endpoint, escaped(&self.name.model, true));
        let there = self.get(&there).map_err(|error| if status == 409 { error } else { refusal })?;
        if private == Some(true) && there.get("private").and_then(Value::as_bool) == Some(false) {
            return Err(Error::new(format!(
                "`{}` is there already, and everyone may see it: make it private at {}/{}/settings, or choose another name",
                self.name, self.client.endpoint, self.name.model
            )));
        }
        Ok(())
    }

    /// Which files go into the store for large ones.
    fn choose(&self, files: &[Outgoing]) -> Result<Vec<bool>> {
        let listed = files.iter().map(|file| {
            let mut sample = Vec::new();
            let opened = File::open(&file.local).and_then(|it| it.take(SAMPLE).read_to_end(&mut sample));
            opened.map_err(Error::io(&file.local))?;
            Ok(json!({ "path": file.path, "size": file.size, "sample": base64::encode(&sample) }))
        });
        let asked = json!({ "files": listed.collect::<Result<Vec<_>>>()? });
        let answer = self.asked(&self.api("preupload"), &asked)?;
        let answers = answer.get("files").and_then(Value::as_array).map(Vec::as_slice).unwrap_or_default();
        files
            .iter()
            .map(|file| {
                let of_file = |it: &&Value| it.get("path").and_then(Value::as_str) == Some(&file.path);
                let mode = answers.iter().find(of_file).and_then(|it| it.get("uploadMode")?.as_str());
                match mode {
                    // The store doesn't take what is empty.
                    Some("lfs") => Ok(file.size > 0),
                    Some("regular") => Ok(false),
                    _ => Err(self.odd(&format!("doesn't say how `{}` is to be sent", file.path))),
                }
            })
            .collect()
    }

    /// Names all files in one commit; small ones are in it.
    fn commit<'f>(
        &self,
        summary: &str,
        small: impl Iterator<Item = &'f Outgoing>,
        large: &[Large],
    ) -> Result<String> {
        let mut lines = vec![json!({ "key": "header", "value": { "summary": summary, "description": "" } })];
        for file in small {
            let bytes = fs::read(&file.local).map_err(Error::io(&file.local))?;
            let content = base64::encode(&bytes);
            let value = json!({ "path": file.path, "encoding": "base64", "content": content });
            lines.push(json!({ "key": "file", "value": value }));
        }
        lines.extend(large.iter().map(|it| {
            let value =
                json!({ "path": it.file.path, "algo": "sha256", "oid": it.sha256, "size": it.file.size });
            json!({ "key": "lfsFile", "value": value })
        }));
        let body: String = lines.iter().map(|it| format!("{it}\n")).collect();
        let url = self.api("commit");
        let mut response = patiently(self.options, || {
            let headers = [("Content-Type", "application/x-ndjson")];
            self.client.send(
                Verb::Post,
                &url,
                &headers,
                Sent::Bytes(body.as_bytes()),
                &|status, headers, said| self.refused(status, headers, said),
            )
        })?;
        let answer = self.json(&mut response)?;
        let commit = answer.get("commitOid").and_then(Value::as_str);
        commit.map(str::to_string).ok_or_else(|| self.odd("names no commit"))
    }

    fn api(&self, what: &str) -> String {
        format!("{}/api/models/{}/{what}/main", self.client.endpoint, escaped(&self.name.model, true))
    }

    /// Asks with JSON.
    fn asked(&self, url: &str, body: &Value) -> Result<Value> {
        match self.post(url, body, &[])? {
            Posted::Taken(answer) => Ok(answer),
            Posted::Refused(_, error) => Err(error),
        }
    }

    /// Asks with JSON. A refusal with a status of `known` is an answer too.
    fn post(&self, url: &str, body: &Value, known: &[u16]) -> Result<Posted> {
        let body = body.to_string();
        let headers = [("Content-Type", "application/json")];
        let answer = patiently(self.options, || {
            let told = Cell::new(None);
            let refused = |status: u16, headers: &HeaderMap, said: String| {
                // The hub makes one repository at a time for each user; that passes.
                let passes = said.contains("conflicting operation");
                told.set(Some(status).filter(|it| known.contains(it) && !passes));
                self.refused(status, headers, said)
            };
            match self.client.send(Verb::Post, url, &headers, Sent::Bytes(body.as_bytes()), &refused) {
                Ok(response) => Ok(Ok(response)),
                Err(failure) => match told.get() {
                    Some(status) => Ok(Err((status, failure.error))),
                    None => Err(failure),
                },
            }
        })?;
        match answer {
            Ok(mut response) => Ok(Posted::Taken(self.json(&mut response)?)),
            Err((status, error)) => Ok(Posted::Refused(status, error)),
        }
    }

    fn get(&self, url: &str) -> Result<Value> {
        let mut response = patiently(self.options, || self.client.get(url, 0))?;
        self.json(&mut response)
    }

    fn json(&self, response: &mut Response<Body>) -> Result<Value> {
        let text = response.body_mut().with_config().limit(LONGEST_ANSWER).read_to_vec();
        let text = text.map_err(|error| self.odd(&format!("broke off ({error})")))?;
        serde_json::from_slice(&text).map_err(|_| self.odd("is no JSON"))
    }

    fn odd(&self, what: &str) -> Error {
        let (name, endpoint) = (self.name, &self.client.endpoint);
        Error::new(format!(
            "`{name}`: the answer of {endpoint} {what}: is HF_ENDPOINT a model hub that files may be sent to?"
        ))
    }

    /// What a refusal to take something means.
    fn refused(&self, status: u16, headers: &HeaderMap, said: String) -> Failure {
        let (name, endpoint) = (self.name, &self.client.endpoint);
        let said = if said.is_empty() { said } else { format!(": \"{said}\"") };
        let page = format!("{endpoint}/{}", self.options.hub.token_page());
        let again = Some(wish(headers));
        match status {
            401 => Failure::last(format!(
                "{endpoint} doesn't accept the token for `{name}` (401){said}: check HF_TOKEN, or make a new one at {page}"
            )),
            403 => Failure::last(format!(
                "{endpoint} forbids this token to write `{name}` (403){said}: set HF_TOKEN to one that may write there, \
                 from {page}"
            )),
            404 => {
                Failure::last(format!("{endpoint} has no `{name}` to write into (404){said}: check the name"))
            }
            409 | 412 => Failure {
                error: Error::new(format!(
                    "somebody else writes into `{name}` at the same time ({status}){said}: run again"
                )),
                again,
            },
            413 => Failure::last(format!("{endpoint} takes no files of this size for `{name}` (413){said}")),
            429 => Failure {
                error: Error::new(format!(
                    "{endpoint} is asked too much for now (429){said}: try again in some minutes"
                )),
                again,
            },
            500.. => Failure {
                error: Error::new(format!(
                    "{endpoint} has trouble of its own ({status}) with `{name}`{said}: run again later, what was sent is kept"
                )),
                again,
            },
            _ => Failure::last(format!("{endpoint} doesn't take `{name}` ({status}){said}")),
        }
    }
}
