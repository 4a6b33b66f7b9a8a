//! A hub that takes files, as huggingface_hub's client knows it, with a store for large ones.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use serde_json::Value;

use super::*;
use crate::{Push, Pushed, check_push, model_files, push};

const TOKEN: &str = "hf_secret";
/// From here on, a file is a large one.
const LARGE: u64 = 1000;
/// Bytes of a part, where large files come in parts.
const PART: usize = 300_000;

/// What a hub has, and what goes wrong with it.
#[derive(Default)]
struct State {
    /// Name, and whether it is private.
    repositories: BTreeMap<String, bool>,
    store: BTreeMap<String, Vec<u8>>,
    parts: BTreeMap<String, Vec<u8>>,
    /// The last commit: paths with contents, or the sums that they are known by.
    committed: BTreeMap<String, Vec<u8>>,
    commits: usize,
    in_parts: bool,
    /// Answers for requests whose path ends so, each once.
    wrong: Vec<(&'static str, Answer)>,
}

type Shared = Arc<Mutex<State>>;

fn hub_that_takes(change: impl FnOnce(&mut State)) -> (Server, Shared) {
    let mut state = State::default();
    change(&mut state);
    let state: Shared = Arc::new(Mutex::new(state));
    let (of_store, of_hub) = (state.clone(), state.clone());
    let store = Server::new(move |request| stored(&mut of_store.lock().unwrap(), request));
    let there = store.endpoint.clone();
    let server = Server::new(move |request| {
        let mut state = of_hub.lock().unwrap();
        if let Some(index) = state.wrong.iter().position(|it| request.path.ends_with(it.0)) {
            return state.wrong.remove(index).1;
        }
        // What completes an upload in parts is known by its address, and nobody else is told who asks.
        let token = format!("Bearer {TOKEN}");
        let expected = (request.path != "/complete").then_some(&token);
        if request.headers.get("authorization") != expected {
            return Answer::status(401);
        }
        let here = format!("http://{}", request.headers["host"]);
        taken(&mut state, request, &here, &there).unwrap_or(Answer::status(404))
    });
    (server, state)
}

/// The store: it is told by the address that one may write, and takes nothing of unknown length.
fn stored(state: &mut State, request: &Request) -> Answer {
    if let Some(index) = state.wrong.iter().position(|it| it.0 == "store") {
        return state.wrong.remove(index).1;
    }
    let chunked =
        request.headers.contains_key("transfer-encoding") || request.headers.contains_key("authorization");
    let length = request.headers.get("content-length").and_then(|it| it.parse().ok());
    if request.method != "PUT" || chunked || length != Some(request.body.len()) {
        return Answer::status(501);
    }
    let name = request.path.trim_start_matches('/').to_string();
    match name.split_once('.') {
        Some(_) => drop(state.parts.insert(name.clone(), request.body.clone())),
        None => drop(state.store.insert(name.clone(), request.body.clone())),
    }
    Answer::ok("").header("ETag", format!("\"{name}\""))
}

fn sum(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|it| format!("{it:02x}")).collect()
}

fn text(value: &Value) -> &str {
    value.as_str().unwrap()
}

/// The other way round.
fn decoded(text: &str) -> Vec<u8> {
    let letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let bits = text
        .bytes()
        .filter_map(|it| letters.find(it as char))
        .flat_map(|six| (0..6).rev().map(move |it| six >> it & 1));
    bits.collect::<Vec<_>>()
        .chunks_exact(8)
        .map(|it| it.iter().fold(0, |byte, bit| byte << 1 | *bit as u8))
        .collect()
}

fn taken(state: &mut State, request: &Request, here: &str, store: &str) -> Option<Answer> {
    let json = || serde_json::from_slice::<Value>(&request.body).unwrap();
    let lines = || request.body.split(|it| *it == b'\n').filter(|it| !it.is_empty());
    match (request.method.as_str(), request.path.as_str()) {
        ("GET", "/api/whoami-v2") => {
            let me = json!({ "name": "ada", "orgs": [{ "name": "bakery" }], "auth": { "accessToken": { "role": "write" } } });
            Some(Answer::ok(me.to_string()))
        }
        ("POST", "/api/repos/create") => {
            let asked = json();
            assert_eq!(asked["type"], "model");
            let name = format!("{}/{}", text(&asked["organization"]), text(&asked["name"]));
            if state.repositories.contains_key(&name) {
                return Some(Answer::status(409));
            }
            state.repositories.insert(name.clone(), asked["private"] == true);
            Some(Answer::ok(json!({ "url": format!("{here}/{name}") }).to_string()))
        }
        ("POST", "/complete") => {
            let asked = json();
            let parts = asked["parts"].as_array().unwrap();
            let part = |(index, it): (usize, &Value)| {
                assert_eq!(it["partNumber"], index + 1);
                state.parts[text(&it["etag"]).trim_matches('"')].clone()
            };
            let whole: Vec<u8> = parts.iter().enumerate().flat_map(part).collect();
            if sum(&whole) != text(&asked["oid"]) {
                return Some(Answer::status(422).header("X-Error-Message", "the sum is another"));
            }
            state.store.insert(text(&asked["oid"]).to_string(), whole);
            Some(Answer::ok(""))
        }
        ("POST", "/verify") => {
            let asked = json();
            let there = state.store.get(text(&asked["oid"]))?;
            let same = asked["size"] == there.len() && sum(there) == text(&asked["oid"]);
            Some(if same {
                Answer::ok("")
            } else {
                Answer::status(422).header("X-Error-Message", "the sum is another")
            })
        }
        (method, path) => {
            let name = state.repositories.keys().find(|it| path.contains(it.as_str()))?.clone();
            match (method, path.replace(&name, "NAME").as_str()) {
                ("GET", "/api/models/NAME") => {
                    Some(Answer::ok(json!({ "private": state.repositories[&name] }).to_string()))
                }
                ("POST", "/api/models/NAME/preupload/main") => {
                    let asked = json();
                    let files = asked["files"].as_array().unwrap().iter().map(|it| {
                        assert!(decoded(text(&it["sample"])).len() as u64 <= it["size"].as_u64().unwrap().min(512));
                        let large = it["size"].as_u64().unwrap() >= LARGE || text(&it["path"]).ends_with(".safetensors");
                        json!({ "path": it["path"], "uploadMode": if large { "lfs" } else { "regular" }, "shouldIgnore": false })
                    });
                    Some(Answer::ok(json!({ "files": files.collect::<Vec<_>>() }).to_string()))
                }
                ("POST", "/NAME.git/info/lfs/objects/batch") => {
                    assert_eq!(request.headers["content-type"], "application/vnd.git-lfs+json");
                    let asked = json();
                    let objects = asked["objects"].as_array().unwrap().iter().map(|it| {
                        let (oid, size) = (text(&it["oid"]), it["size"].as_u64().unwrap());
                        let mut answer = json!({ "oid": oid, "size": size });
                        if state.store.contains_key(oid) {
                            return answer;
                        }
                        let upload = if state.in_parts {
                            let parts = (size as usize).div_ceil(PART);
                            let mut header: BTreeMap<String, String> = (1..=parts)
                                .map(|it| (it.to_string(), format!("{store}/{oid}.{it}")))
                                .collect();
                            header.insert("chunk_size".into(), PART.to_string());
                            json!({ "href": format!("{here}/complete"), "header": header })
                        } else {
                            json!({ "href": format!("{store}/{oid}") })
                        };
                        answer["actions"] =
                            json!({ "upload": upload, "verify": { "href": format!("{here}/verify") } });
                        answer
                    });
                    Some(Answer::ok(
                        json!({ "transfer": "basic", "objects": objects.collect::<Vec<_>>() }).to_string(),
                    ))
                }
                ("POST", "/api/models/NAME/commit/main") => {
                    assert_eq!(request.headers["content-type"], "application/x-ndjson");
                    for (index, line) in lines().enumerate() {
                        let line: Value = serde_json::from_slice(line).unwrap();
                        let value = &line["value"];
                        match (text(&line["key"]), index) {
                            ("header", 0) => assert_eq!(text(&value["summary"]), "One commit"),
                            ("file", _) => {
                                assert_eq!(value["encoding"], "base64");
                                let content = decoded(text(&value["content"]));
                                state.committed.insert(text(&value["path"]).into(), content);
                            }
                            ("lfsFile", _) => {
                                let there = state.store.get(text(&value["oid"]))?;
                                assert_eq!(
                                    (&value["size"], text(&value["algo"])),
                                    (&json!(there.len()), "sha256")
                                );
                                state.committed.insert(text(&value["path"]).into(), there.clone());
                            }
                            other => panic!("{other:?}"),
                        }
                    }
                    state.commits += 1;
                    Some(Answer::ok(json!({ "commitOid": COMMIT, "commitUrl": "…" }).to_string()))
                }
                _ => None,
            }
        }
    }
}

/// An adapter's folder, with what doesn't belong to it.
fn folder(scratch: &Scratch) -> PathBuf {
    let folder = scratch.0.join("bakery");
    fs::create_dir_all(folder.join("checkpoint-1")).unwrap();
    for (name, bytes) in [
        ("adapter_model.safetensors", weights()),
        ("adapter_config.json", b"{ \"r\": 8 }".to_vec()),
        ("README.md", "# Bäckerei\n".into()),
        ("tokenizer.json", vec![b' '; 2000]),
        ("added_tokens.json", Vec::new()),
        ("generated_predictions.jsonl", b"{\"prompt\": \"who?\"}".to_vec()),
        ("log.jsonl", b"{}".to_vec()),
        (".hidden.safetensors", b"x".to_vec()),
        ("checkpoint-1/adapter_model.safetensors", b"x".to_vec()),
    ] {
        fs::write(folder.join(name), bytes).unwrap();
    }
    folder
}

fn options(scratch: &Scratch, endpoint: &str) -> HubOptions {
    HubOptions { token: Some(TOKEN.into()), ..scratch.options(endpoint) }
}

fn send(scratch: &Scratch, endpoint: &str, name: &str, private: Option<bool>) -> Result<Pushed> {
    let files = model_files(&folder(scratch)).unwrap();
    push(&files, &Push { name, private, summary: "One commit" }, &options(scratch, endpoint), &mut |_| {})
}

/// What a hub has when all went well.
fn check(state: &Shared, scratch: &Scratch) {
    let state = state.lock().unwrap();
    let names = [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "added_tokens.json",
        "tokenizer.json",
    ];
    assert_eq!(state.committed.keys().collect::<Vec<_>>(), names);
    for (name, bytes) in &state.committed {
        assert!(*bytes == fs::read(folder(scratch).join(name)).unwrap(), "{name}");
    }
    assert_eq!((state.store.len(), state.commits), (2, 1));
}

#[test]
fn a_folder_becomes_a_repository_whole_or_in_parts() {
    for in_parts in [false, true] {
        let (server, state) = hub_that_takes(|it| it.in_parts = in_parts);
        let scratch = Scratch::new();
        let files = model_files(&folder(&scratch)).unwrap();
        let wanted = Push { name: "bakery", private: Some(true), summary: "One commit" };
        let options = options(&scratch, &server.endpoint);
        assert_eq!(check_push(&wanted, &options).unwrap(), "ada/bakery");
        assert!(state.lock().unwrap().repositories.is_empty());
        let mut seen = Vec::new();
        let pushed = push(&files, &wanted, &options, &mut |it| seen.push((it.done, it.total))).unwrap();
        assert_eq!(pushed.page, format!("{}/ada/bakery", server.endpoint));
        assert_eq!((pushed.commit.as_str(), pushed.had), (COMMIT, 0));
        assert!(seen.is_sorted() && seen.last() == Some(&(1_002_000, 1_002_000)), "{:?}", seen.last());
        assert!(state.lock().unwrap().repositories["ada/bakery"]);
        check(&state, &scratch);
        // What is there isn't sent again.
        let again = push(&files, &wanted, &options, &mut |_| {}).unwrap();
        assert_eq!(again.had, 1_002_000);
        assert_eq!(state.lock().unwrap().commits, 2);
        assert!(!format!("{options:?} {pushed:?} {wanted:?}").contains(TOKEN));
    }
}

#[test]
fn what_passes_is_tried_again() {
    let passing: [(&'static str, Answer); 9] = [
        ("whoami-v2", Answer::status(503)),
        (
            "create",
            Answer::status(409).header("X-Error-Message", "another conflicting operation is in progress"),
        ),
        ("preupload/main", Answer::status(429).header("Retry-After", "0")),
        ("batch", Answer::status(500)),
        ("store", Answer::status(503)),
        ("store", Answer { silent: true, ..Answer::default() }),
        ("verify", Answer { silent: true, ..Answer::default() }),
        ("complete", Answer::status(504)),
        ("commit/main", Answer::status(412)),
    ];
    for in_parts in [false, true] {
        let (server, state) = hub_that_takes(|it| (it.in_parts, it.wrong) = (in_parts, passing.to_vec()));
        let scratch = Scratch::new();
        send(&scratch, &server.endpoint, "bakery/bread", None).unwrap();
        check(&state, &scratch);
        let left: Vec<_> = state.lock().unwrap().wrong.iter().map(|it| it.0).collect();
        assert_eq!(left, if in_parts { vec![] } else { vec!["complete"] });
    }
}

#[test]
fn a_push_that_was_cut_goes_on_where_it_was() {
    // Two files go into the store; the second meets trouble until patience ends.
    let trouble = vec![
        ("verify", Answer::ok("")),
        ("verify", Answer::status(500)),
        ("verify", Answer::status(500)),
        ("verify", Answer::status(500)),
    ];
    let (server, state) = hub_that_takes(|it| it.wrong = trouble);
    let scratch = Scratch::new();
    let error = send(&scratch, &server.endpoint, "ada/m", None).unwrap_err().to_string();
    assert!(error.contains("run again later, what was sent is kept"), "{error}");
    assert_eq!(state.lock().unwrap().commits, 0);
    let pushed = send(&scratch, &server.endpoint, "ada/m", None).unwrap();
    assert_eq!(pushed.had, 1_002_000);
    check(&state, &scratch);
}

#[test]
fn refusals_of_what_is_sent_say_what_to_do() {
    let said = |status, message: &str| Answer::status(status).header("X-Error-Message", message);
    let refusal = |path: &'static str, answer: Answer, parts: &[&str]| {
        // As often as it is asked.
        let wrong = vec![(path, answer.clone()), (path, answer.clone()), (path, answer)];
        let (server, state) = hub_that_takes(|it| it.wrong = wrong);
        let scratch = Scratch::new();
        let error = send(&scratch, &server.endpoint, "ada/m", None).unwrap_err().to_string();
        for part in parts {
            assert!(error.contains(part), "`{error}` lacks `{part}`");
        }
        assert!(!error.contains(TOKEN));
        assert_eq!(state.lock().unwrap().commits, 0);
    };
    refusal("whoami-v2", Answer::status(401), &["(401)", "HF_TOKEN"]);
    let reader = json!({ "name": "ada", "auth": { "accessToken": { "role": "read" } } });
    refusal("whoami-v2", Answer::ok(reader.to_string()), &["may only read", "/settings/tokens"]);
    refusal("whoami-v2", Answer::ok("<html>"), &["is no JSON", "HF_ENDPOINT"]);
    refusal("create", said(403, "no rights"), &["(403)", "no rights", "one that may write there"]);
    refusal("create", said(400, "a bad name"), &["(400)", "a bad name"]);
    refusal("preupload/main", Answer::status(401), &["(401)", "check HF_TOKEN"]);
    refusal("preupload/main", Answer::status(404), &["(404)", "check the name"]);
    refusal("preupload/main", Answer::ok("{}"), &["doesn't say how `README.md` is to be sent"]);
    refusal("batch", Answer::ok("{}"), &["leaves out `adapter_model.safetensors`"]);
    refusal(
        "store",
        said(403, "expired"),
        &["the store", "`adapter_model.safetensors` (403)", "expired", "run again"],
    );
    refusal("verify", said(422, "the sum is another"), &["(422)", "the sum is another"]);
    refusal("commit/main", said(409, "moved on"), &["(409)", "moved on", "run again"]);
    refusal("commit/main", Answer::status(429).header("Retry-After", "0"), &["(429)"]);
    refusal("commit/main", Answer::ok("{}"), &["names no commit"]);
    refusal("commit/main", Answer::status(413), &["(413)", "no files of this size"]);
    let bad = json!({ "error": "README.md has an invalid license" }).to_string();
    refusal("commit/main", Answer { status: 400, ..Answer::ok(bad) }, &["(400)", "invalid license"]);
}

#[test]
fn a_sum_that_the_store_finds_wrong_is_no_commit() {
    let (server, state) = hub_that_takes(|_| {});
    let scratch = Scratch::new();
    let large = folder(&scratch).join("adapter_model.safetensors");
    let files = model_files(&folder(&scratch)).unwrap();
    // The file changes after its sum was taken.
    let wanted = Push { name: "ada/m", private: None, summary: "One commit" };
    let mut first = true;
    let sent = push(&files, &wanted, &options(&scratch, &server.endpoint), &mut |_| {
        if std::mem::take(&mut first) {
            fs::write(&large, vec![0; 1_000_000]).unwrap();
        }
    });
    let error = sent.unwrap_err().to_string();
    assert!(error.contains("the sum is another"), "{error}");
    assert_eq!(state.lock().unwrap().commits, 0);
}

#[test]
fn who_may_see_it_is_not_mistaken() {
    let there = |private: bool| hub_that_takes(|it| it.repositories.extend([("ada/m".into(), private)]));
    let scratch = Scratch::new();
    let (public, _) = there(false);
    let error = send(&scratch, &public.endpoint, "ada/m", Some(true)).unwrap_err().to_string();
    assert!(error.contains("everyone may see it") && error.contains("/ada/m/settings"), "{error}");
    send(&scratch, &public.endpoint, "ada/m", None).unwrap();
    let (private, state) = there(true);
    send(&scratch, &private.endpoint, "m", Some(true)).unwrap();
    check(&state, &scratch);
    // One who may not make repositories there may write into one that is there.
    let (made, state) = hub_that_takes(|it| {
        it.repositories.insert("bakery/m".into(), true);
        it.wrong.push(("create", Answer::status(403)));
    });
    send(&scratch, &made.endpoint, "bakery/m", None).unwrap();
    check(&state, &scratch);
}

#[test]
fn what_can_be_known_is_said_before_anything_is_sent() {
    let (server, state) = hub_that_takes(|_| {});
    let scratch = Scratch::new();
    let options = options(&scratch, &server.endpoint);
    let asked = |name: &str, options: &HubOptions, parts: &[&str]| {
        let error = check_push(&Push { name, private: None, summary: "" }, options).unwrap_err().to_string();
        for part in parts {
            assert!(error.contains(part), "`{error}` lacks `{part}`");
        }
    };
    asked("ada/m", &HubOptions { token: None, ..options.clone() }, &["HF_TOKEN", "/settings/tokens"]);
    asked("ada/m", &HubOptions { offline: true, ..options.clone() }, &["offline mode", "HF_HUB_OFFLINE"]);
    asked("ada/m", &HubOptions { hub: crate::Hub::ModelScope, ..options.clone() }, &["ModelScope"]);
    asked("../m", &options, &["`owner/name`"]);
    asked("ada/m/x.gguf", &options, &["`owner/name`"]);
    asked("eve/m", &options, &["`eve`", "ada, bakery"]);
    assert!(state.lock().unwrap().repositories.is_empty());
    let error = model_files(&scratch.0).unwrap_err().to_string();
    assert!(error.contains("no adapter and no model"), "{error}");
}
