//! LLaMA-Factory's demo folder, where it is beside the checkout: each set loads, or is refused by name.

use std::path::PathBuf;

use ferrotune_data::{DataSet, Loaded, Purpose, Result, SourceOptions};

fn folder() -> Option<PathBuf> {
    let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../../shared/data/llamafactory");
    if !folder.is_dir() {
        eprintln!("skipped: {} is not there", folder.display());
        return None;
    }
    Some(folder)
}

fn load(name: &str, folder: &std::path::Path) -> Result<Loaded> {
    let fetch = |hub: &ferrotune_data::HubSet| Err(format!("asked the hub for {}", hub.name));
    DataSet::find(name, folder, &fetch)?.load(&SourceOptions::default())
}

#[test]
fn demo_sets_load_or_are_refused() {
    let Some(folder) = folder() else { return };
    let check = |name: &str, expected: Result<(&str, Purpose, usize, usize), &str>| {
        let loaded = load(name, &folder);
        let loaded = loaded.map(|it| {
            assert_eq!(it.conversations.len(), it.counts.used, "{name}");
            (it.counts.format, it.counts.purpose, it.counts.rows, it.counts.used)
        });
        match (loaded, expected) {
            (Ok((format, purpose, rows, used)), Ok(expected)) => {
                assert_eq!((format.as_str(), purpose, rows, used), expected, "{name}");
            }
            (Err(error), Err(expected)) => assert!(error.to_string().contains(expected), "{name}: {error}"),
            (loaded, expected) => panic!("{name}: {loaded:?}, expected {expected:?}"),
        }
    };
    use Purpose::*;
    check("identity", Ok(("alpaca", Supervised, 91, 91)));
    check("alpaca_en_demo", Ok(("alpaca", Supervised, 999, 999)));
    check("glaive_toolcall_en_demo", Ok(("sharegpt", Supervised, 300, 300)));
    check("c4_demo", Ok(("text", Text, 300, 300)));
    check("wiki_demo", Ok(("text", Text, 30, 30)));
    check("dpo_en_demo", Ok(("sharegpt", Preference, 300, 300)));
    check("kto_en_demo", Ok(("sharegpt", Labelled, 300, 300)));
    check("mllm_demo", Err("`images` is not there yet"));
    check("mllm_audio_demo", Err("`audios` is not there yet"));
    check("alpaca_zh_demo", Err("there is no file"));
    check("slimorca", Err("asked the hub for Open-Orca/SlimOrca"));
    check("deepctrl", Err("`ms_hub_url`: is not there yet"));
    // Without the registry, by looking.
    check("alpaca_en_demo.json", Ok(("alpaca", Supervised, 999, 999)));
    check("dpo_en_demo.json", Ok(("sharegpt", Preference, 300, 300)));
    check("kto_en_demo.json", Ok(("openai", Labelled, 300, 300)));
    check("wiki_demo.txt", Ok(("text", Text, 30, 30)));
    check("v1_sft_demo.jsonl", Ok(("openai", Supervised, 500, 500)));
    check("v1_dpo_demo.jsonl", Ok(("openai", Preference, 10, 10)));
    check("../fastchat/dummy_conversation.json", Ok(("sharegpt", Supervised, 500, 500)));
}

#[test]
fn every_set_of_the_registry_loads_or_says_why_not() {
    let Some(folder) = folder() else { return };
    let registry = std::fs::read(folder.join("dataset_info.json")).unwrap();
    let registry: serde_json::Value = serde_json::from_slice(&registry).unwrap();
    let (mut loaded, mut hub, mut refused) = (0, 0, 0);
    for name in registry.as_object().unwrap().keys() {
        match load(name, &folder) {
            Ok(_) => loaded += 1,
            Err(error) if error.to_string().starts_with("asked the hub for ") => hub += 1,
            Err(error) => {
                assert!(error.to_string().contains(&format!("data set `{name}`")), "{error}");
                refused += 1;
            }
        }
    }
    assert_eq!((loaded, hub, refused), (7, 80, 17));
}
