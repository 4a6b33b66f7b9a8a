use super::*;
use crate::Hub;

fn options(scratch: &Scratch, endpoint: &str) -> HubOptions {
    HubOptions { hub: Hub::ModelScope, ..scratch.options(endpoint) }
}

/// A small ModelScope with one model.
fn modelscope(request: &Request) -> Answer {
    let weights = weights();
    let files: [(&str, &[u8]); 4] = [
        ("config.json", b"{}"),
        ("README.md", b"#"),
        ("model.safetensors", &weights),
        ("../outside.json", b"!"),
    ];
    if request.path == "/api/v1/models/org/m.5/repo/files?Revision=master&Recursive=True" {
        let file = |(path, bytes): &(&str, &[u8])| {
            let sha256: String = Sha256::digest(bytes).iter().map(|it| format!("{it:02x}")).collect();
            json!({ "Path": path, "Name": path, "Type": "blob", "Size": bytes.len(), "Sha256": sha256 })
        };
        let mut all: Vec<_> = files.iter().map(file).collect();
        all.push(json!({ "Path": "figures", "Type": "tree", "Size": 0 }));
        return Answer::ok(json!({ "Code": 200, "Data": { "Files": all }, "Success": true }).to_string());
    }
    let path = request.path.strip_prefix("/api/v1/models/org/m.5/repo?Revision=master&FilePath=");
    match files.iter().find(|(name, _)| Some(*name) == path) {
        Some((_, bytes)) => ranged(request, bytes),
        None => Answer::status(404),
    }
}

#[test]
fn a_model_of_modelscope_is_fetched_apart_from_others() {
    let server = Server::new(|request| {
        let answer = modelscope(request);
        let cut = (answer.body.len() > 1000).then_some(answer.body.len().div_ceil(2).max(300_000));
        Answer { cut, ..answer }
    });
    let scratch = Scratch::new();
    let options = HubOptions { token: Some("ms-x".into()), ..options(&scratch, &server.endpoint) };
    let folder = fetch("org/m.5", &options).unwrap();
    assert_eq!(folder, scratch.0.join("modelscope/org--m.5"));
    assert!(fs::read(folder.join("model.safetensors")).unwrap() == weights());
    let asked = server.asked();
    assert!(asked.iter().any(|it| it.headers.contains_key("range")));
    assert!(asked.iter().all(|it| it.headers["authorization"] == "Bearer ms-x"));
    assert!(asked.iter().all(|it| it.headers["cookie"] == "m_session_id=ms-x"));
    assert_eq!(fetch("org/m.5", &HubOptions { offline: true, ..options }).unwrap(), folder);
    assert_eq!(server.asked().len(), asked.len());
}

#[test]
fn a_wrong_sum_of_modelscope_is_thrown_away() {
    let server = Server::new(|request| {
        let mut answer = modelscope(request);
        if answer.body.len() > 1000 {
            answer.body[7] ^= 1;
        }
        answer
    });
    let scratch = Scratch::new();
    let options = options(&scratch, &server.endpoint);
    refused("org/m.5", &options, &["SHA-256", "MODELSCOPE_ENDPOINT"]);
    assert!(!scratch.0.join("modelscope/org--m.5/config.json").exists());
}

#[test]
fn refusals_of_modelscope_name_its_own_words() {
    let said =
        json!({ "Code": 10_010_205_001_u64, "Message": "Record not found", "Success": false }).to_string();
    let cases: [(Answer, &[&str]); 5] = [
        (Answer::status(401), &["(401)", "MODELSCOPE_API_TOKEN", "/my/myaccesstoken"]),
        (Answer::status(404), &["(404)", "`org/m` at revision `master`", "MODELSCOPE_ENDPOINT"]),
        (Answer::status(429).header("Retry-After", "0"), &["(429)", "MODELSCOPE_API_TOKEN"]),
        (Answer::ok(said), &["the hub says \"Record not found\""]),
        (Answer::ok("{}"), &["lists no files", "MODELSCOPE_ENDPOINT"]),
    ];
    for (answer, parts) in cases {
        let server = Server::new(move |_| answer.clone());
        let scratch = Scratch::new();
        refused("org/m", &options(&scratch, &server.endpoint), parts);
    }
    let scratch = Scratch::new();
    refused("org/m", &options(&scratch, "x"), &["MODELSCOPE_ENDPOINT is `x`", "https://www.modelscope.cn"]);
    let set = crate::data_set("org/d", &options(&scratch, "http://127.0.0.1:9")).unwrap_err().to_string();
    assert!(set.contains("data sets of ModelScope"), "{set}");
}

#[test]
fn the_cache_of_modelscopes_library_is_read() {
    for (folder, revision) in [
        ("models/org--m.5/snapshots/master", None),
        ("models/org/m___5", None),
        ("hub/models/org/m___5", None),
        ("models/org--m.5/snapshots/v2", Some("v2")),
    ] {
        let scratch = Scratch::new();
        let python = scratch.0.join("python");
        let options = HubOptions {
            offline: true,
            python_cache: Some(python.clone()),
            revision: revision.map(str::to_string),
            ..options(&scratch, "http://127.0.0.1:9")
        };
        refused("org/m.5", &options, &["offline mode"]);
        let folder = python.join(folder);
        fs::create_dir_all(&folder).unwrap();
        fs::write(folder.join("config.json"), "{}").unwrap();
        refused("org/m.5", &options, &["offline mode"]);
        fs::write(folder.join("model.safetensors"), "").unwrap();
        assert_eq!(fetch("org/m.5", &options).unwrap(), folder);
        // It is no model of another hub.
        refused("org/m.5", &HubOptions { hub: Hub::HuggingFace, ..options }, &["offline mode"]);
    }
}
