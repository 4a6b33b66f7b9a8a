//! LLaMA-Factory's demo folder, where it is beside the checkout: each set loads, or is refused by name.

use std::path::PathBuf;

use ferrotune_data::{SourceOptions, load};

#[test]
fn demo_sets_load_or_are_refused() {
    let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../../shared/data/llamafactory");
    if !folder.is_dir() {
        eprintln!("skipped: {} is not there", folder.display());
        return;
    }
    let check = |name: &str, expected: Result<(&str, usize), &str>| {
        let loaded = load(name, &folder, &SourceOptions::default());
        let loaded = loaded.map(|loaded| (loaded.format, loaded.conversations.len()));
        match (loaded, expected) {
            (Ok((format, count)), Ok(expected)) => assert_eq!((format.as_str(), count), expected, "{name}"),
            (Err(error), Err(expected)) => assert!(error.to_string().contains(expected), "{name}: {error}"),
            (loaded, expected) => panic!("{name}: {loaded:?}, expected {expected:?}"),
        }
    };
    check("identity", Ok(("alpaca", 91)));
    check("alpaca_en_demo", Ok(("alpaca", 999)));
    check("glaive_toolcall_en_demo", Ok(("sharegpt", 300)));
    check("c4_demo", Ok(("text", 300)));
    check("wiki_demo", Err(".txt files are not there yet"));
    check("dpo_en_demo", Err("preference data (`ranking: true`) is not there yet"));
    check("kto_en_demo", Err("KTO data (column `kto_tag`) is not there yet"));
    check("mllm_demo", Err("`images` is not there yet"));
    check("slimorca", Err("`hf_hub_url` is not there yet"));
    check("../fastchat/dummy_conversation.json", Ok(("sharegpt", 500)));
}
