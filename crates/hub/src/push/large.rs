//! The store for large files (Git LFS): the hub says for each whether it is wanted and where it goes, whole or in parts.
//! Source: git-lfs docs/api/batch.md; huggingface_hub/lfs.py (multipart).

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};

use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use ureq::http::HeaderMap;

use super::{Outgoing, Pusher};
use crate::http::{Failure, Sent, Verb, text};
use crate::patience::patiently;
use crate::{Error, Progress, Result};

const LFS: &str = "application/vnd.git-lfs+json";

/// A file for the store.
pub(super) struct Large<'a> {
    pub(super) file: &'a Outgoing,
    pub(super) sha256: String,
}

impl<'a> Large<'a> {
    pub(super) fn hash(file: &'a Outgoing) -> Result<Large<'a>> {
        let mut opened = File::open(&file.local).map_err(Error::io(&file.local))?;
        let (mut hash, mut buffer) = (Sha256::new(), vec![0; 256 * 1024]);
        loop {
            let count = opened.read(&mut buffer).map_err(Error::io(&file.local))?;
            if count == 0 {
                let sha256 = hash.finalize().iter().map(|it| format!("{it:02x}")).collect();
                return Ok(Large { file, sha256 });
            }
            hash.update(&buffer[..count]);
        }
    }
}

/// A piece of a file, counted as it is read.
struct Piece<'a> {
    file: io::Take<File>,
    done: u64,
    report: &'a mut dyn FnMut(u64),
}

impl Read for Piece<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.file.read(buffer)?;
        self.done += count as u64;
        (self.report)(self.done);
        Ok(count)
    }
}

impl Pusher<'_> {
    /// Sends what the store lacks; gives how many bytes it had.
    pub(super) fn send_large(&self, files: &[Large], progress: &mut dyn FnMut(&Progress)) -> Result<u64> {
        if files.is_empty() {
            return Ok(0);
        }
        let objects: Vec<Value> =
            files.iter().map(|it| json!({ "oid": it.sha256, "size": it.file.size })).collect();
        let asked = json!({
            "operation": "upload", "transfers": ["basic", "multipart"], "hash_algo": "sha256",
            "ref": { "name": "main" }, "objects": objects,
        });
        let url = format!("{}/{}.git/info/lfs/objects/batch", self.client.endpoint, self.name.model);
        let answer = self.tell(Verb::Post, LFS, &url, &asked)?;
        let answers = answer.get("objects").and_then(Value::as_array).map(Vec::as_slice).unwrap_or_default();
        let total = files.iter().map(|it| it.file.size).sum();
        let (mut done, mut had) = (0, 0);
        for large in files {
            let of_file = |it: &&Value| it.get("oid").and_then(Value::as_str) == Some(&large.sha256);
            let path = &large.file.path;
            let object =
                answers.iter().find(of_file).ok_or_else(|| self.odd(&format!("leaves out `{path}`")))?;
            if let Some(error) = object.get("error") {
                let said = error.get("message").and_then(Value::as_str).unwrap_or("no reason is given");
                return Err(Error::new(format!(
                    "`{}`: the hub doesn't take `{path}`: \"{said}\"",
                    self.name
                )));
            }
            let mut report = |sent| progress(&Progress { file: path, done: done + sent, total });
            match object.pointer("/actions/upload") {
                None => {
                    had += large.file.size;
                    report(large.file.size);
                }
                Some(upload) => {
                    self.upload(large, upload, &mut report)?;
                    if let Some(verify) = object.pointer("/actions/verify") {
                        let sent = json!({ "oid": large.sha256, "size": large.file.size });
                        self.tell(Verb::Post, "application/json", self.href(verify)?, &sent)?;
                    }
                }
            }
            done += large.file.size;
        }
        Ok(had)
    }

    fn upload(&self, large: &Large, action: &Value, report: &mut dyn FnMut(u64)) -> Result<()> {
        let href = self.href(action)?;
        let header = action.get("header").and_then(Value::as_object);
        let header = |key: &str| header.and_then(|it| it.get(key));
        let Some(chunk) = header("chunk_size") else {
            let all = action.get("header").and_then(Value::as_object).into_iter().flatten();
            let headers: Vec<(&str, &str)> =
                all.filter_map(|(name, value)| Some((name.as_str(), value.as_str()?))).collect();
            return self.send_piece(large, href, &headers, (0, large.file.size), report).map(drop);
        };
        let chunk = chunk.as_u64().or(chunk.as_str().and_then(|it| it.parse().ok())).filter(|it| *it > 0);
        let chunk = chunk.ok_or_else(|| self.odd("names no size of parts"))?;
        let mut etags = BTreeMap::new();
        for (number, first) in
            (1..).zip((0..large.file.size).step_by(usize::try_from(chunk).unwrap_or(usize::MAX)))
        {
            let url = header(&number.to_string()).and_then(Value::as_str);
            let url = url.ok_or_else(|| self.odd(&format!("doesn't say where part {number} goes")))?;
            let length = chunk.min(large.file.size - first);
            let etag = self.send_piece(large, url, &[], (first, length), report)?;
            etags.insert(number, etag.ok_or_else(|| self.odd("doesn't acknowledge a part"))?);
        }
        let parts: Vec<Value> =
            etags.into_iter().map(|(number, etag)| json!({ "partNumber": number, "etag": etag })).collect();
        self.tell(Verb::PostSigned, LFS, href, &json!({ "oid": large.sha256, "parts": parts })).map(drop)
    }

    /// Sends bytes of a file, as often as it takes; gives what they are known by.
    fn send_piece(
        &self,
        large: &Large,
        url: &str,
        headers: &[(&str, &str)],
        (first, length): (u64, u64),
        report: &mut dyn FnMut(u64),
    ) -> Result<Option<String>> {
        let path = &large.file.local;
        let refused = |status: u16, _: &HeaderMap, said: String| {
            let error = Error::new(format!(
                "the store of `{}` doesn't take `{}` ({status}){}: run again, what was sent is kept",
                self.name,
                large.file.path,
                if said.is_empty() { said } else { format!(": \"{said}\"") }
            ));
            // An address that has expired is refused for good.
            Failure { error, again: (status >= 500 || status == 429).then_some(None) }
        };
        let response = patiently(self.options, || {
            let opened = File::open(path).and_then(|mut file| {
                file.seek(SeekFrom::Start(first))?;
                Ok(file.take(length))
            });
            let file = opened.map_err(|source| Failure { error: Error::io(path)(source), again: None })?;
            let mut piece = Piece { file, done: first, report };
            self.client.send(Verb::PutSigned, url, headers, Sent::Read(&mut piece, length), &refused)
        })?;
        Ok(text(response.headers(), "etag").map(str::to_string))
    }

    /// Sends JSON of a kind. An answer that is none stands for nothing.
    fn tell(&self, verb: Verb, kind: &str, url: &str, body: &Value) -> Result<Value> {
        let body = body.to_string();
        let headers = [("Content-Type", kind), ("Accept", kind)];
        let mut response = patiently(self.options, || {
            let body = Sent::Bytes(body.as_bytes());
            self.client
                .send(verb, url, &headers, body, &|status, headers, said| self.refused(status, headers, said))
        })?;
        let text = response.body_mut().with_config().limit(super::LONGEST_ANSWER).read_to_vec();
        let text = text.map_err(|error| self.odd(&format!("broke off ({error})")))?;
        Ok(serde_json::from_slice(&text).unwrap_or_default())
    }

    fn href<'v>(&self, action: &'v Value) -> Result<&'v str> {
        let href = action.get("href").and_then(Value::as_str);
        href.ok_or_else(|| self.odd("doesn't say where a file goes"))
    }
}
