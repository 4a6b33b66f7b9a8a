//! What is sent to the hub, by the program: what and when, and that nobody reads the token. How it is sent is the hub crate's.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Mutex};
use std::thread;

use serde_json::{Value, json};

use crate::train::with_config;
use crate::util::{Dir, Ran};

const TOKEN: &str = "hf_nobody_reads_this";

/// A hub that takes all files within the commit: each request's path, and the paths of the last commit.
struct Hub {
    endpoint: String,
    asked: Arc<Mutex<Vec<String>>>,
    committed: Arc<Mutex<Vec<String>>>,
}

impl Hub {
    fn new() -> Hub {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let endpoint = format!("http://{}", listener.local_addr().expect("an address"));
        let (asked, committed) = (Arc::new(Mutex::new(Vec::new())), Arc::new(Mutex::new(Vec::new())));
        let (paths, files) = (asked.clone(), committed.clone());
        thread::spawn(move || {
            for mut stream in listener.incoming().flatten() {
                let Some((path, token, body)) = request(&stream) else { continue };
                let answer = match path.as_str() {
                    _ if token != format!("Bearer {TOKEN}") => None,
                    "/api/whoami-v2" => Some(json!({ "name": "ada", "orgs": [] })),
                    "/api/repos/create" => Some(json!({ "url": "…" })),
                    path if path.contains("/preupload/") => {
                        let asked: Value = serde_json::from_slice(&body).expect("JSON");
                        let regular = |it: &Value| json!({ "path": it["path"], "uploadMode": "regular", "shouldIgnore": false });
                        let all = asked["files"].as_array().expect("files").iter().map(regular);
                        Some(json!({ "files": all.collect::<Vec<_>>() }))
                    }
                    _ => {
                        let lines = body.split(|it| *it == b'\n').filter(|it| !it.is_empty());
                        let lines = lines.map(|it| serde_json::from_slice::<Value>(it).expect("JSON"));
                        let path = |line: Value| line["value"]["path"].as_str().map(str::to_string);
                        *files.lock().unwrap() = lines.filter_map(path).collect();
                        Some(json!({ "commitOid": "0123", "commitUrl": "…" }))
                    }
                };
                paths.lock().unwrap().push(path);
                let (status, body) = answer.map_or((401, String::new()), |it| (200, it.to_string()));
                let head = format!(
                    "HTTP/1.1 {status} X\r\nConnection: close\r\nContent-Length: {}\r\n\r\n",
                    body.len()
                );
                let _ = stream.write_all((head + &body).as_bytes());
            }
        });
        Hub { endpoint, asked, committed }
    }

    fn run(&self, dir: &Dir, words: &[&str]) -> Ran {
        let run = dir.ferrotune(words).env("HF_HUB_OFFLINE", "0").env("HF_ENDPOINT", &self.endpoint);
        let ran = run.env("HF_TOKEN", TOKEN).succeeds();
        assert!(!ran.stdout.contains(TOKEN) && !ran.stderr.contains(TOKEN));
        ran
    }
}

/// Path, token and body.
fn request(stream: &TcpStream) -> Option<(String, String, Vec<u8>)> {
    let mut reader = BufReader::new(stream);
    let mut line = || {
        let mut line = String::new();
        reader.read_line(&mut line).ok().map(|_| line.trim_end().to_string())
    };
    let path = line()?.split(' ').nth(1)?.to_string();
    let (mut token, mut length) = (String::new(), 0);
    while let Some((name, value)) = line()?.split_once(':') {
        match name.to_ascii_lowercase().as_str() {
            "authorization" => token = value.trim().to_string(),
            "content-length" => length = value.trim().parse().ok()?,
            _ => {}
        }
    }
    let mut body = Vec::new();
    reader.take(length).read_to_end(&mut body).ok()?;
    Some((path, token, body))
}

#[test]
fn what_was_trained_and_exported_is_sent() {
    let hub = Hub::new();
    let dir = with_config("max_steps: 2\npush_to_hub: true\nhub_private_repo: true\n");
    let page = format!("{}/ada/", hub.endpoint);
    hub.run(&dir, &["train", "c.yaml"]).says(&format!("to {page}out"));
    let sent = hub.committed.lock().unwrap().clone();
    for name in ["README.md", "adapter_config.json", "adapter_model.safetensors", "tokenizer.json"] {
        assert!(sent.iter().any(|it| it == name), "{name} of {sent:?}");
    }
    assert!(sent.iter().all(|it| !it.contains("log") && !it.contains("results")), "{sent:?}");
    // Whether it may be is asked before the first step.
    assert_eq!(hub.asked.lock().unwrap().first().map(String::as_str), Some("/api/whoami-v2"));

    let words = ["export", "c.yaml", "--adapter", "out", "--output", "merged", "--push-to", "ada/merged"];
    hub.run(&dir, &words).says(&format!("to {page}merged"));
    assert!(hub.committed.lock().unwrap().contains(&"model.safetensors".to_string()));
    // The token that `hf auth login` keeps.
    dir.file("hf/token", format!("{TOKEN}\n"));
    let run = dir.ferrotune(&["push", "out", "again", "--private"]).env("HF_HUB_OFFLINE", "0");
    run.env("HF_ENDPOINT", &hub.endpoint).succeeds().says(&format!("to {page}again"));
    assert_eq!(*hub.committed.lock().unwrap(), sent);
}

#[test]
fn what_can_not_be_sent_is_said_before_it_is_made() {
    let dir = with_config("max_steps: 2\npush_to_hub: true\n");
    let refused = |words: &[&str], said: &str| {
        let run = dir.ferrotune(words).env("HF_HUB_OFFLINE", "0").env("HF_ENDPOINT", "http://127.0.0.1:9");
        run.fails(1).says(said);
        assert!(!dir.path().join("out").exists() && !dir.path().join("merged").exists());
    };
    refused(&["train", "c.yaml"], "`out`: nobody may write without a token: set HF_TOKEN");
    refused(&["train", "c.yaml", "hub_model_id=eve/x/y"], "`eve/x/y` is no name on a hub");
    refused(&["train", "c.yaml", "hub=modelscope"], "can't be sent to ModelScope");
    let merge = ["export", "c.yaml", "--output", "merged", "--push-to", "ada/m"];
    refused(&merge, "`ada/m`: nobody may write without a token");
    dir.ferrotune(&["push", ".", "m"]).fails(1).says("nothing is sent in offline mode");
}
