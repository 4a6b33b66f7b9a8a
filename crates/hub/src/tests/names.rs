use super::*;
use crate::cache::import_into;
use crate::name::{Name, parse};
use crate::plan::plan;

#[test]
fn names_and_paths() {
    let scratch = Scratch::new();
    let options = HubOptions { offline: true, ..scratch.options("http://127.0.0.1:9") };
    assert_eq!(fetch(scratch.0.to_str().unwrap(), &options).unwrap(), scratch.0);
    assert!(fetch("~", &options).is_ok());
    for (name, part) in [
        ("", "no model is named"),
        ("./nowhere", "no such file or folder"),
        ("/nowhere/x.gguf", "no such file or folder"),
        ("nowhere.gguf", "no such file or folder"),
        ("a/b/c", "no such file or folder"),
        ("a/../b", "no such file or folder"),
        ("a/b?x=1", "no such file or folder"),
        ("org/m", "offline mode"),
        ("m", "offline mode"),
        ("org/m/x.Q4_K_M.gguf", "offline mode"),
    ] {
        refused(name, &options, &[part]);
    }
    let name = parse("org/m/sub/x.gguf").unwrap();
    assert_eq!((name.model.as_str(), name.file.as_deref()), ("org/m", Some("sub/x.gguf")));
}

#[test]
fn caches_are_looked_into() {
    let scratch = Scratch::new();
    let folder = scratch.0.join("org--m");
    fs::create_dir_all(&folder).unwrap();
    let python = scratch.0.join("python");
    let options = HubOptions {
        offline: true,
        python_cache: Some(python.clone()),
        ..scratch.options("http://127.0.0.1:9")
    };
    refused("org/m", &options, &["offline mode"]);
    let snapshot = python.join("models--org--m").join("snapshots").join(COMMIT);
    fs::create_dir_all(&snapshot).unwrap();
    fs::create_dir_all(python.join("models--org--m/refs")).unwrap();
    fs::write(python.join("models--org--m/refs/main"), COMMIT).unwrap();
    fs::write(snapshot.join("config.json"), "{}").unwrap();
    refused("org/m", &options, &["offline mode"]);
    let index = r#"{ "weight_map": { "a": "model-1.safetensors", "b": "model-2.safetensors" } }"#;
    fs::write(snapshot.join("model.safetensors.index.json"), index).unwrap();
    fs::write(snapshot.join("model-1.safetensors"), "").unwrap();
    refused("org/m", &options, &["offline mode"]);
    fs::write(snapshot.join("model-2.safetensors"), "").unwrap();
    assert_eq!(fetch("org/m", &options).unwrap(), snapshot);
    let commit = HubOptions { revision: Some(COMMIT.into()), ..options.clone() };
    assert_eq!(fetch("org/m", &commit).unwrap(), snapshot);
    refused("org/m", &HubOptions { revision: Some("v2".into()), ..options.clone() }, &["org--m@v2"]);
    let gguf = folder.join("m.Q4_1.gguf");
    fs::write(&gguf, "").unwrap();
    assert_eq!(fetch("org/m", &options).unwrap(), gguf);
    assert_eq!(fetch("org/m/m.Q4_1.gguf", &options).unwrap(), gguf);
    let imported = import_into(&scratch.0, "org/n", &gguf).unwrap();
    assert_eq!(fetch("org/n", &options).unwrap(), imported);
    assert!(import_into(&scratch.0, "org/n", &folder.join("none.gguf")).is_err());
    assert!(import_into(&scratch.0, "org/n", &snapshot.join("config.json")).is_err());
}

fn planned(name: &str, files: &[&str]) -> Result<Vec<String>> {
    let siblings: Vec<_> = files.iter().map(|it| json!({ "rfilename": it })).collect();
    let plan = plan(&parse(name)?, &HubOptions::default(), &json!({ "sha": COMMIT, "siblings": siblings }))?;
    Ok(plan.files.into_iter().map(|it| it.path).collect())
}

#[test]
fn files_are_chosen() {
    let index = "model.safetensors.index.json";
    let shards = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"];
    let files = [
        "config.json",
        index,
        shards[0],
        shards[1],
        "x.gguf",
        "original/consolidated.00.pth",
        "tokenizer.json",
    ];
    assert_eq!(
        planned("org/m", &files).unwrap(),
        ["tokenizer.json", index, shards[0], shards[1], "config.json"]
    );
    assert_eq!(planned("org/m/x.gguf", &files).unwrap(), ["x.gguf"]);
    assert_eq!(planned("org/m", &["x.gguf", "README.md"]).unwrap(), ["x.gguf"]);
    for (files, part) in [
        (&["a.gguf", "b.gguf"][..], "a.gguf, b.gguf"),
        (&["config.json", "pytorch_model.bin"][..], "pickle"),
        (&["adapter_config.json", "adapter_model.safetensors"][..], "adapter"),
        (&["README.md"][..], "neither config.json"),
        (&["config.json", "../model.safetensors"][..], "neither config.json"),
    ] {
        let message = planned("org/m", files).unwrap_err().to_string();
        assert!(message.contains(part), "`{message}` lacks `{part}`");
    }
    assert!(planned("org/m/y.gguf", &["x.gguf"]).unwrap_err().to_string().contains("x.gguf"));
    let name = Name { model: "m".into(), file: None };
    let plan = |answer| plan(&name, &HubOptions::default(), &answer);
    assert!(plan(json!({})).unwrap_err().to_string().contains("HF_ENDPOINT"));
    assert!(plan(json!({ "sha": "../x", "siblings": [] })).is_err());
}
