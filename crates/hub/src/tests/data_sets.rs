use super::*;
use crate::data_set;

const ROWS: &[u8] = b"{\"text\": \"a\"}\n";

/// A small hub with one data set.
fn hub(request: &Request) -> Answer {
    let files: [(&str, &[u8]); 4] = [
        ("README.md", b"---\n---\n"),
        ("data/train.jsonl", ROWS),
        ("data/test.jsonl", b"{}\n"),
        ("../outside.jsonl", b"!"),
    ];
    if request.path == "/api/datasets/org/d/revision/main?blobs=true" {
        return listing(&files);
    }
    let path = request.path.strip_prefix(&format!("/datasets/org/d/resolve/{COMMIT}/"));
    match files.iter().find(|(name, _)| Some(*name) == path) {
        Some((_, bytes)) => ranged(request, bytes),
        None => Answer::status(404),
    }
}

#[test]
fn only_what_is_wanted_is_fetched_and_once() {
    let (server, scratch) = (Server::new(hub), Scratch::new());
    let options = scratch.options(&server.endpoint);
    let train = ["data/train.jsonl".to_string()];
    let fetch = |options: &HubOptions, paths: &[String]| {
        data_set("org/d", options).and_then(|set| set.fetch(paths, options, &mut |_| {}))
    };
    let set = data_set("org/d", &options).unwrap();
    assert_eq!(set.paths(), ["README.md", "data/train.jsonl", "data/test.jsonl"]);
    let paths = set.fetch(&train, &options, &mut |_| {}).unwrap();
    assert_eq!(paths, [scratch.0.join("datasets/org--d/data/train.jsonl")]);
    assert_eq!(fs::read(&paths[0]).unwrap(), ROWS);
    assert!(!scratch.0.join("datasets/org--d/data/test.jsonl").exists());
    // A second start asks nobody, and one without a network doesn't either.
    let asked = server.asked().len();
    let offline = HubOptions { offline: true, ..options.clone() };
    assert_eq!(fetch(&options, &train).unwrap(), paths);
    assert_eq!(fetch(&offline, &train).unwrap(), paths);
    assert_eq!(server.asked().len(), asked);
    let error = fetch(&offline, &["data/test.jsonl".to_string()]).unwrap_err().to_string();
    assert!(error.contains("`data/test.jsonl`") && error.contains("HF_HUB_OFFLINE"), "{error}");
    let error = fetch(&options, &["../outside.jsonl".to_string()]).unwrap_err().to_string();
    assert!(error.contains("has no file `../outside.jsonl`"), "{error}");
}

#[test]
fn refusals_are_those_of_models() {
    let scratch = Scratch::new();
    let refused = |options: &HubOptions, parts: &[&str]| {
        let message = data_set("org/d", options).unwrap_err().to_string();
        parts.iter().for_each(|part| assert!(message.contains(part), "`{message}` lacks `{part}`"));
    };
    let gated = Server::new(|_| Answer::status(403).header("X-Error-Code", "GatedRepo"));
    refused(&scratch.options(&gated.endpoint), &["licence", "/datasets/org/d", "HF_TOKEN"]);
    let gone = Server::new(|_| Answer::status(404));
    refused(&scratch.options(&gone.endpoint), &["(404)", "`org/d`"]);
    refused(&scratch.options("http://127.0.0.1:9"), &["can't reach", "a file or folder that holds the rows"]);
    let offline = HubOptions { offline: true, ..scratch.options("http://127.0.0.1:9") };
    refused(&offline, &["data set `org/d` is not in the cache", "HF_HUB_OFFLINE"]);
}

#[test]
fn pythons_cache_is_read() {
    let scratch = Scratch::new();
    let snapshot = scratch.0.join("python/datasets--org--d/snapshots/abc/data");
    fs::create_dir_all(&snapshot).unwrap();
    fs::create_dir_all(scratch.0.join("python/datasets--org--d/refs")).unwrap();
    fs::write(scratch.0.join("python/datasets--org--d/refs/main"), "abc\n").unwrap();
    fs::write(snapshot.join("train.jsonl"), ROWS).unwrap();
    let options = HubOptions {
        offline: true,
        python_cache: Some(scratch.0.join("python")),
        ..scratch.options("http://127.0.0.1:9")
    };
    let set = data_set("org/d", &options).unwrap();
    assert_eq!(set.paths(), ["data/train.jsonl"]);
    let paths = set.fetch(&["data/train.jsonl".to_string()], &options, &mut |_| {}).unwrap();
    assert_eq!(paths, [snapshot.join("train.jsonl")]);
}
