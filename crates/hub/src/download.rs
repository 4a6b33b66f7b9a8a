//! Fetches a model's files: to a `.part` beside, resumed where it was cut, checked, then renamed.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc;
use std::thread;

use serde_json::Value;
use sha2::{Digest, Sha256};
use ureq::http::HeaderMap;

use crate::http::{Client, Failure, Repository, text};
use crate::name::Name;
use crate::patience::Patience;
use crate::plan::{RemoteFile, plan};
use crate::{Error, HubOptions, Progress, Result, cache};

/// Files that are fetched at once.
const AT_ONCE: usize = 4;
/// The longest answer about a model that is read.
const LONGEST_LISTING: u64 = 64 << 20;

/// Fetches a model into its folder and gives what [`crate::resolve`] does.
pub(crate) fn model(
    name: &Name,
    folder: &Path,
    options: &HubOptions,
    progress: &mut dyn FnMut(&Progress),
) -> Result<PathBuf> {
    let client = Client::new(Repository::Model, name, options)?;
    let plan = plan(name, options, &listing(&client, name, options)?)?;
    files(&client, &plan.commit, &plan.files, folder, options, progress)?;
    let there = cache::found(folder, plan.gguf.as_deref());
    there.ok_or_else(|| {
        Error::new(format!("`{name}` is not whole on the hub: its index names weights that aren't there"))
    })
}

/// Fetches those of `files` into `folder` that aren't there, several at once. The last one comes when all others are there: it may
/// stand for them.
pub(crate) fn files(
    client: &Client,
    commit: &str,
    files: &[RemoteFile],
    folder: &Path,
    options: &HubOptions,
    progress: &mut dyn FnMut(&Progress),
) -> Result<()> {
    let (there, missing): (Vec<&RemoteFile>, Vec<&RemoteFile>) =
        files.iter().partition(|it| it.is_in(folder));
    let Some((last, others)) = missing.split_last() else { return Ok(()) };
    let total = files.iter().filter_map(|it| it.size).sum();
    let mut done: u64 = there.iter().filter_map(|it| it.size).sum();
    let stopped = AtomicBool::new(false);
    for group in [others, &[last]] {
        let fetch = |file: &RemoteFile, report: &mut dyn FnMut(u64)| {
            let url = client.file(commit, &file.path);
            let id = file.sha256.as_deref().unwrap_or(commit);
            let fetch = Fetch { client, url, file, options, stopped: &stopped };
            fetch.run(&folder.join(&file.path), &id[..id.len().min(16)], report)
        };
        let mut came = vec![0; group.len()];
        side_by_side(group, &stopped, &fetch, &mut |index, bytes| {
            came[index] = bytes;
            let done = done + came.iter().sum::<u64>();
            progress(&Progress { file: &group[index].path, done, total });
        })?;
        done += came.iter().sum::<u64>();
    }
    Ok(())
}

/// Fetches a file, telling how much of it has come; gives its length.
type FetchOne<'a> = dyn Fn(&RemoteFile, &mut dyn FnMut(u64)) -> Result<u64> + Sync + 'a;

/// Fetches files on several threads, and tells on this one how much of each has come. After an error, the others stop.
fn side_by_side(
    files: &[&RemoteFile],
    stopped: &AtomicBool,
    fetch: &FetchOne,
    report: &mut dyn FnMut(usize, u64),
) -> Result<()> {
    let (next, (sender, receiver)) = (AtomicUsize::new(0), mpsc::channel());
    thread::scope(|scope| {
        for _ in 0..files.len().min(AT_ONCE) {
            let (sender, next) = (sender.clone(), &next);
            scope.spawn(move || {
                loop {
                    let index = next.fetch_add(1, Ordering::Relaxed);
                    let Some(file) = files.get(index).filter(|_| !stopped.load(Ordering::Relaxed)) else {
                        break;
                    };
                    // Who listens does so until all senders are gone.
                    let fetched = fetch(file, &mut |bytes| drop(sender.send((index, Ok(bytes)))));
                    let _ = sender.send((index, fetched));
                }
            });
        }
        drop(sender);
        let mut failed = None;
        for (index, came) in receiver {
            match came {
                Ok(bytes) => report(index, bytes),
                Err(error) => {
                    stopped.store(true, Ordering::Relaxed);
                    failed.get_or_insert(error);
                }
            }
        }
        failed.map_or(Ok(()), Err)
    })
}

/// What the hub tells of a model or a data set.
pub(crate) fn listing(client: &Client, name: &Name, options: &HubOptions) -> Result<Value> {
    let mut patience = Patience::new(options);
    let mut response = loop {
        match client.get(&client.listing(), 0) {
            Ok(response) => break response,
            // Who can't be reached at all is told so at once.
            Err(Failure { error, again: None | Some(None) }) => return Err(error),
            Err(failure) => patience.wait(failure)?,
        }
    };
    let text = response.body_mut().with_config().limit(LONGEST_LISTING).read_to_vec();
    let text = text
        .map_err(|error| Error::new(format!("`{name}`: the hub's answer broke off ({error}): try again")))?;
    serde_json::from_slice(&text).map_err(|_| {
        Error::new(format!(
            "`{name}`: the hub's answer is no JSON: is {} a model hub and no login page?",
            options.hub.endpoint_variable()
        ))
    })
}

/// One file on its way.
struct Fetch<'a> {
    client: &'a Client<'a>,
    url: String,
    file: &'a RemoteFile,
    options: &'a HubOptions,
    /// Another file couldn't be fetched.
    stopped: &'a AtomicBool,
}

impl Fetch<'_> {
    /// Brings the file; gives its length. `id` keeps parts of different contents apart.
    fn run(&self, target: &Path, id: &str, report: &mut dyn FnMut(u64)) -> Result<u64> {
        let mut name = target.file_name().unwrap_or_default().to_os_string();
        name.push(format!(".{id}.part"));
        let path = target.with_file_name(name);
        let folder = target.parent().unwrap_or(Path::new("."));
        fs::create_dir_all(folder).map_err(Error::io(folder))?;
        let mut part = Part::open(&path)?;
        let mut patience = Patience::new(self.options);
        loop {
            let before = part.length;
            match self.attempt(&mut part, report)? {
                None => break,
                Some(failure) => {
                    if part.length > before {
                        patience.tried = 0;
                    }
                    patience.wait(failure)?;
                }
            }
        }
        self.check(&part)?;
        part.file.sync_all().map_err(Error::io(&path))?;
        fs::rename(&path, target).map_err(Error::io(target))?;
        Ok(part.length)
    }

    /// One request, from where the part ends. None when the file is whole.
    fn attempt(&self, part: &mut Part, report: &mut dyn FnMut(u64)) -> Result<Option<Failure>> {
        let size = self.file.size;
        if size.is_some_and(|size| part.length > size) {
            part.restart()?;
        }
        if part.length > 0 && size == Some(part.length) {
            return Ok(None);
        }
        let response = match self.client.get(&self.url, part.length) {
            Ok(response) => response,
            Err(failure) => return Ok(Some(failure)),
        };
        let total = match response.status().as_u16() {
            206 => match content_range(response.headers()) {
                Some((from, total)) if from == part.length => total,
                _ => {
                    return self
                        .again(part, "the server sends another part of the file than it was asked for");
                }
            },
            416 => return self.again(part, "the server has no more of the file"),
            _ => {
                part.restart()?;
                text(response.headers(), "content-length").and_then(|it| it.parse().ok())
            }
        };
        if let (Some(size), Some(total)) = (size, total)
            && size != total
        {
            return Err(self.wrong(part, format!("has {size} bytes by the hub's list, but {total} are sent")));
        }
        let total = size.or(total);
        let mut body = response.into_body().into_reader();
        let mut buffer = vec![0; 256 * 1024];
        loop {
            if self.stopped.load(Ordering::Relaxed) {
                return Err(Error::new(format!("{}: another file can't be fetched", self.url)));
            }
            match body.read(&mut buffer) {
                Ok(0) => break,
                Ok(count) => part.append(&buffer[..count])?,
                Err(error) => return Ok(Some(self.cut(&error.to_string()))),
            }
            if let Some(total) = total.filter(|total| part.length > *total) {
                return Err(self.wrong(part, format!("has {total} bytes, but more are sent")));
            }
            report(part.length);
        }
        match total {
            Some(total) if part.length < total => Ok(Some(self.cut("it ended early"))),
            _ => Ok(None),
        }
    }

    /// Throws the part away and asks for all of it.
    fn again(&self, part: &mut Part, why: &str) -> Result<Option<Failure>> {
        part.restart()?;
        let error =
            Error::new(format!("{}: {why}: try again later or set {} to a mirror", self.url, self.mirror()));
        Ok(Some(Failure { error, again: Some(None) }))
    }

    fn cut(&self, why: &str) -> Failure {
        let message =
            format!("{}: the connection broke off ({why}): run again, and it goes on from there", self.url);
        Failure { error: Error::new(message), again: Some(None) }
    }

    /// What came is not what the hub's list says. The part is of no use.
    fn wrong(&self, part: &Part, what: String) -> Error {
        let _ = fs::remove_file(&part.path);
        Error::new(format!(
            "{}: the file {what}: try again, or set {} to another mirror",
            self.url,
            self.mirror()
        ))
    }

    fn mirror(&self) -> &'static str {
        self.options.hub.endpoint_variable()
    }

    fn check(&self, part: &Part) -> Result<()> {
        let Some(expected) = &self.file.sha256 else { return Ok(()) };
        let got: String = part.hash.clone().finalize().iter().map(|it| format!("{it:02x}")).collect();
        if got != *expected {
            return Err(self.wrong(part, format!("has the SHA-256 {got}, expected {expected}")));
        }
        Ok(())
    }
}

/// The beginning of a file, held by this process alone.
struct Part {
    path: PathBuf,
    file: File,
    length: u64,
    /// Of what is there.
    hash: Sha256,
}

impl Part {
    fn open(path: &Path) -> Result<Part> {
        let mut options = OpenOptions::new();
        let mut file = options
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(path)
            .map_err(Error::io(path))?;
        match file.try_lock() {
            Err(TryLockError::WouldBlock) => {
                return Err(Error::new(format!(
                    "{}: another process is fetching it: wait for that one",
                    path.display()
                )));
            }
            // Where the disk can't lock files, nobody is kept out.
            Ok(()) | Err(TryLockError::Error(_)) => {}
        }
        let (mut hash, mut length, mut buffer) = (Sha256::new(), 0, vec![0; 256 * 1024]);
        loop {
            let count = file.read(&mut buffer).map_err(Error::io(path))?;
            if count == 0 {
                return Ok(Part { path: path.to_path_buf(), file, length, hash });
            }
            hash.update(&buffer[..count]);
            length += count as u64;
        }
    }

    fn restart(&mut self) -> Result<()> {
        (self.length, self.hash) = (0, Sha256::new());
        let emptied = self.file.set_len(0).and_then(|()| self.file.seek(SeekFrom::Start(0)));
        emptied.map(drop).map_err(Error::io(&self.path))
    }

    fn append(&mut self, bytes: &[u8]) -> Result<()> {
        self.file.write_all(bytes).map_err(Error::io(&self.path))?;
        self.hash.update(bytes);
        self.length += bytes.len() as u64;
        Ok(())
    }
}

/// `bytes 100-199/200`: the first byte, and how many there are where that is said.
fn content_range(headers: &HeaderMap) -> Option<(u64, Option<u64>)> {
    let range = text(headers, "content-range")?.strip_prefix("bytes ")?;
    let (range, total) = range.split_once('/')?;
    Some((range.split_once('-')?.0.parse().ok()?, total.parse().ok()))
}
