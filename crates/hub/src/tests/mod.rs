mod data_sets;
mod modelscope;
mod names;
mod pushed;
mod server;

use std::fs;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use serde_json::json;
use sha2::{Digest, Sha256};

use crate::{HubOptions, Progress, Result, resolve};
use server::{Answer, Request, Server};

const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

/// A folder of its own, taken away at the end.
struct Scratch(PathBuf);

impl Scratch {
    fn new() -> Scratch {
        static COUNT: AtomicUsize = AtomicUsize::new(0);
        let name = format!("ferrotune-hub-{}-{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
        let folder = std::env::temp_dir().join(name);
        fs::create_dir_all(&folder).unwrap();
        Scratch(folder)
    }

    fn options(&self, endpoint: &str) -> HubOptions {
        HubOptions {
            cache_dir: Some(self.0.clone()),
            endpoint: endpoint.into(),
            retries: 2,
            retry_wait: Duration::from_millis(1),
            ..HubOptions::default()
        }
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// The weights of the model that is served: long enough to come in several pieces.
fn weights() -> Vec<u8> {
    (0..1_000_000u32).map(|it| (it.wrapping_mul(2_654_435_761) >> 24) as u8).collect()
}

fn listing(files: &[(&str, &[u8])]) -> Answer {
    let sibling = |(path, bytes): &(&str, &[u8])| {
        let sha256: String = Sha256::digest(bytes).iter().map(|it| format!("{it:02x}")).collect();
        match path.ends_with(".json") {
            true => json!({ "rfilename": path, "size": bytes.len(), "blobId": "…" }),
            false => {
                let lfs = json!({ "sha256": sha256, "size": bytes.len() });
                json!({ "rfilename": path, "lfs": lfs })
            }
        }
    };
    let siblings: Vec<_> = files.iter().map(sibling).collect();
    Answer::ok(json!({ "sha": COMMIT, "siblings": siblings }).to_string())
}

/// A small hub with one model.
fn hub(request: &Request) -> Answer {
    let weights = weights();
    let files: [(&str, &[u8]); 5] = [
        ("config.json", b"{}"),
        ("tokenizer.json", b"{ }"),
        ("README.md", b"#"),
        ("model.safetensors", &weights),
        ("../outside.json", b"!"),
    ];
    if request.path == "/api/models/org/m/revision/main?blobs=true" {
        return listing(&files);
    }
    let path = request.path.strip_prefix(&format!("/org/m/resolve/{COMMIT}/"));
    match files.iter().find(|(name, _)| Some(*name) == path) {
        Some((_, bytes)) => ranged(request, bytes),
        None => Answer::status(404),
    }
}

/// The whole, or what was asked for.
fn ranged(request: &Request, bytes: &[u8]) -> Answer {
    let Some(range) = request.headers.get("range") else { return Answer::ok(bytes) };
    let from: usize = range.trim_start_matches("bytes=").trim_end_matches('-').parse().unwrap();
    let content_range = format!("bytes {from}-{}/{}", bytes.len() - 1, bytes.len());
    Answer { status: 206, ..Answer::ok(&bytes[from..]) }.header("Content-Range", content_range)
}

fn fetch(name: &str, options: &HubOptions) -> Result<PathBuf> {
    resolve(name, options, &mut |_| {})
}

#[track_caller]
fn refused(name: &str, options: &HubOptions, parts: &[&str]) {
    let message = fetch(name, options).unwrap_err().to_string();
    for part in parts {
        assert!(message.contains(part), "`{message}` lacks `{part}`");
    }
}

#[test]
fn a_model_is_fetched_once() {
    let (server, scratch) = (Server::new(hub), Scratch::new());
    let options = scratch.options(&server.endpoint);
    let mut seen = Vec::new();
    let folder = resolve("org/m", &options, &mut |it: &Progress| seen.push((it.done, it.total))).unwrap();
    assert_eq!(folder, scratch.0.join("org--m"));
    let mut names: Vec<_> = fs::read_dir(&folder).unwrap().flatten().map(|it| it.file_name()).collect();
    names.sort();
    assert_eq!(names, ["config.json", "model.safetensors", "tokenizer.json"]);
    assert!(fs::read(folder.join("model.safetensors")).unwrap() == weights());
    assert!(seen.is_sorted() && seen.last() == Some(&(1_000_005, 1_000_005)), "{:?}", seen.last());
    assert_eq!(server.asked().last().unwrap().path, format!("/org/m/resolve/{COMMIT}/config.json"));
    let asked = server.asked().len();
    assert_eq!(fetch("org/m", &HubOptions { offline: true, ..options }).unwrap(), folder);
    assert_eq!(server.asked().len(), asked);
}

/// A model in shards, and how many of them were asked for at once.
#[test]
fn shards_come_side_by_side() {
    static NOW: AtomicUsize = AtomicUsize::new(0);
    static MOST: AtomicUsize = AtomicUsize::new(0);
    let names: Vec<String> = (1..=6).map(|it| format!("model-{it:05}-of-00006.safetensors")).collect();
    let of_server = names.clone();
    let server = Server::new(move |request| {
        let index = json!({ "weight_map": of_server.iter().map(|it| (it.clone(), it.clone())).collect::<std::collections::BTreeMap<_, _>>() });
        let index = index.to_string();
        let mut files: Vec<(&str, &[u8])> =
            vec![("config.json", b"{}"), ("model.safetensors.index.json", index.as_bytes())];
        files.extend(of_server.iter().map(|it| (it.as_str(), it.as_bytes())));
        if request.path.starts_with("/api/") {
            return listing(&files);
        }
        let path = request.path.rsplit('/').next().unwrap();
        if path.starts_with("model-") {
            MOST.fetch_max(NOW.fetch_add(1, Ordering::SeqCst) + 1, Ordering::SeqCst);
            // Until others have had time to come.
            for _ in 0..500 {
                if MOST.load(Ordering::SeqCst) > 1 {
                    break;
                }
                std::thread::sleep(Duration::from_millis(10));
            }
            NOW.fetch_sub(1, Ordering::SeqCst);
        }
        if path == "config.json" {
            assert_eq!(NOW.load(Ordering::SeqCst), 0);
        }
        ranged(request, files.iter().find(|it| it.0 == path).unwrap().1)
    });
    let scratch = Scratch::new();
    let folder = fetch("org/m", &scratch.options(&server.endpoint)).unwrap();
    assert!((2..=4).contains(&MOST.load(Ordering::SeqCst)));
    assert_eq!(server.asked().last().unwrap().path, format!("/org/m/resolve/{COMMIT}/config.json"));
    for name in names {
        assert_eq!(fs::read_to_string(folder.join(&name)).unwrap(), name);
    }
}

#[test]
fn a_cut_connection_is_taken_up_again() {
    let server = Server::new(|request| {
        let answer = hub(request);
        let cut = (answer.body.len() > 1000).then_some(answer.body.len().div_ceil(2).max(300_000));
        Answer { cut, ..answer }
    });
    let scratch = Scratch::new();
    let folder = fetch("org/m", &scratch.options(&server.endpoint)).unwrap();
    assert!(fs::read(folder.join("model.safetensors")).unwrap() == weights());
    let ranges: Vec<_> = server.asked().iter().filter_map(|it| it.headers.get("range").cloned()).collect();
    assert_eq!(ranges.len(), 2, "{ranges:?}");
}

#[test]
fn a_later_run_goes_on_where_the_first_ended() {
    static BROKEN: AtomicBool = AtomicBool::new(true);
    let server = Server::new(|request| {
        let answer = hub(request);
        let large = answer.body.len() > 1000 && BROKEN.load(Ordering::Relaxed);
        match (large, request.headers.contains_key("range")) {
            (true, true) => Answer::status(503),
            (true, false) => Answer { cut: Some(400_000), ..answer },
            (false, _) => answer,
        }
    });
    let scratch = Scratch::new();
    let options = scratch.options(&server.endpoint);
    refused("org/m", &options, &["503", "try again later"]);
    assert!(!scratch.0.join("org--m/config.json").exists());
    BROKEN.store(false, Ordering::Relaxed);
    let folder = fetch("org/m", &options).unwrap();
    assert!(fs::read(folder.join("model.safetensors")).unwrap() == weights());
    let last = server.asked().iter().filter_map(|it| it.headers.get("range").cloned()).next_back();
    assert!(last.unwrap().starts_with("bytes="));
    assert!(
        fs::read_dir(&folder).unwrap().flatten().all(|it| !it.path().to_string_lossy().contains(".part"))
    );
}

#[test]
fn a_server_without_ranges_starts_again() {
    static FIRST: AtomicBool = AtomicBool::new(true);
    let server = Server::new(|request| {
        let mut request = request.clone();
        request.headers.remove("range");
        let answer = hub(&request);
        let cut = answer.body.len() > 1000 && FIRST.swap(false, Ordering::Relaxed);
        Answer { cut: cut.then_some(500_000), ..answer }
    });
    let scratch = Scratch::new();
    let folder = fetch("org/m", &scratch.options(&server.endpoint)).unwrap();
    assert!(fs::read(folder.join("model.safetensors")).unwrap() == weights());
}

#[test]
fn what_came_wrong_is_thrown_away() {
    let changed = |change: fn(&mut Vec<u8>)| {
        Server::new(move |request| {
            let mut answer = hub(request);
            if answer.body.len() > 1000 {
                change(&mut answer.body);
            }
            answer
        })
    };
    let scratch = Scratch::new();
    let empty = || {
        let mut names = fs::read_dir(scratch.0.join("org--m")).unwrap().flatten().map(|it| it.file_name());
        // What came beside it may be there, whole or in part.
        names.all(|it| it.to_string_lossy().starts_with("tokenizer.json"))
    };
    let longer = changed(|body| body.push(0));
    refused("org/m", &scratch.options(&longer.endpoint), &["model.safetensors", "1000000 bytes", "1000001"]);
    assert!(empty());
    let other = changed(|body| body[7] ^= 1);
    refused("org/m", &scratch.options(&other.endpoint), &["model.safetensors", "SHA-256"]);
    assert!(empty());
}

#[test]
fn refusals_say_what_to_do() {
    let cases: [(Answer, bool, &[&str]); 9] = [
        (Answer::status(401), false, &["(401)", "HF_TOKEN", "check the name"]),
        (Answer::status(401), true, &["(401)", "check HF_TOKEN"]),
        (Answer::status(403), true, &["(403)", "ask for access", "/org/m"]),
        (Answer::status(403).header("X-Error-Code", "GatedRepo"), false, &["licence", "/org/m", "HF_TOKEN"]),
        (Answer::status(404), false, &["(404)", "`org/m`", "HF_ENDPOINT"]),
        (Answer::status(404).header("X-Error-Code", "RevisionNotFound"), false, &["no revision `main`"]),
        (Answer::status(429).header("Retry-After", "0"), false, &["(429)", "HF_TOKEN"]),
        (Answer::status(500), false, &["(500)", "try again later"]),
        (Answer::status(418), false, &["418", "isn't understood"]),
    ];
    for (answer, token, parts) in cases {
        let server = Server::new(move |_| answer.clone());
        let scratch = Scratch::new();
        let options = HubOptions { token: token.then(|| "hf_x".into()), ..scratch.options(&server.endpoint) };
        refused("org/m", &options, parts);
        assert_eq!(fs::read_dir(&scratch.0).unwrap().count(), 0);
    }
    let scratch = Scratch::new();
    refused(
        "org/m",
        &scratch.options("http://127.0.0.1:9"),
        &["can't reach", "HF_ENDPOINT", "path of a folder"],
    );
    refused("org/m", &scratch.options("ftp://x"), &["HF_ENDPOINT", "ftp://x"]);
    let page = Server::new(|_| Answer::ok("<html>log in</html>"));
    refused("org/m", &scratch.options(&page.endpoint), &["no JSON"]);
}

#[test]
fn the_token_stays_with_its_host() {
    let store = Server::new(|request| ranged(request, &weights()));
    let elsewhere = store.endpoint.clone();
    let server = Server::new(move |request| {
        if request.path.ends_with("model.safetensors") {
            return Answer::status(302).header("Location", format!("{elsewhere}/blob"));
        }
        if request.path.starts_with("/org/old") || request.path.starts_with("/api/models/org/old") {
            return Answer::status(307).header("Location", request.path.replace("old", "m"));
        }
        hub(request)
    });
    let scratch = Scratch::new();
    let options = HubOptions { token: Some("hf_secret".into()), ..scratch.options(&server.endpoint) };
    fetch("org/old", &options).unwrap();
    assert!(server.asked().iter().all(|it| it.headers["authorization"] == "Bearer hf_secret"));
    assert_eq!(store.asked().len(), 1);
    assert!(!store.asked()[0].headers.contains_key("authorization"));
    let endless = Server::new(|request| Answer::status(302).header("Location", request.path.clone()));
    refused("org/n", &scratch.options(&endless.endpoint), &["redirected without end"]);
    let odd = Server::new(|_| Answer::status(302).header("Location", "file:///etc/passwd"));
    refused("org/n", &scratch.options(&odd.endpoint), &["file:///etc/passwd", "isn't followed"]);
}
