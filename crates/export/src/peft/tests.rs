use std::path::PathBuf;

use ferrotune_model::source::ModelFiles;
use serde_json::{Value, json};

use super::*;
use crate::scratch::Scratch;

fn fixture() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures/lora_tiny")
}

/// Real folders that PEFT wrote, where they are at hand.
fn golden(name: &str) -> Option<PathBuf> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../../shared/data/golden_bnb_peft").join(name);
    if !path.exists() {
        eprintln!("skipped: {} is not there", path.display());
    }
    path.exists().then_some(path)
}

fn config(folder: &Path) -> Value {
    serde_json::from_str(&fs::read_to_string(folder.join(CONFIG)).unwrap()).unwrap()
}

/// Reads, writes, and compares with what was read: the tensors byte for byte, the config key by key.
fn round_trip(folder: &Path) -> PeftAdapter {
    let adapter = PeftAdapter::read(folder).unwrap();
    let scratch = Scratch::new();
    let out = scratch.0.join("made/on/the/way");
    adapter.write(&out, &ModelCard::default()).unwrap();
    assert!(fs::read(folder.join(TENSORS)).unwrap() == fs::read(out.join(TENSORS)).unwrap());
    let (theirs, ours) = (config(folder), config(&out));
    let later =
        ["kasa_config", "lora_ga_config", "monteclora_config", "use_bdlora", "velora_config", "peft_version"];
    for (key, value) in theirs.as_object().unwrap().iter().filter(|(key, _)| !later.contains(&key.as_str())) {
        assert_eq!(ours.get(key), Some(value), "{key}");
    }
    assert!(ours.as_object().unwrap().keys().all(|key| theirs.get(key).is_some()));
    let text = fs::read_to_string(out.join(CONFIG)).unwrap();
    assert!(text.starts_with("{\n  \"alora_invocation_tokens\": null,\n") && text.ends_with("\n}"));
    let mut names: Vec<_> = fs::read_dir(&out).unwrap().flatten().map(|it| it.file_name()).collect();
    names.sort();
    assert_eq!(names, ["README.md", CONFIG, TENSORS]);
    adapter
}

#[test]
fn the_fixture_comes_back_as_it_was() {
    let adapter = round_trip(&fixture());
    assert_eq!((adapter.r, adapter.lora_alpha, adapter.scaling(), adapter.tensors.len()), (4, 8.0, 2.0, 21));
    assert_eq!(adapter.tensors[0].module, "model.layers.0.mlp.down_proj");
    assert_eq!((adapter.tensors[0].a.shape(), adapter.tensors[0].b.shape()), ((4, 100), (64, 4)));
}

#[test]
fn what_peft_wrote_comes_back_as_it_was() {
    if let Some(folder) = golden("peft_lora_r8") {
        assert_eq!(round_trip(&folder).tensors.len(), 35);
    }
    if let Some(folder) = golden("peft_rslora_r16") {
        let adapter = round_trip(&folder);
        assert!(adapter.use_rslora && adapter.scaling() == adapter.lora_alpha / 4.0);
    }
    if let Some(folder) = golden("peft_dora_r4") {
        let adapter = round_trip(&folder);
        let first = &adapter.tensors[0];
        assert_eq!(first.magnitude.as_ref().unwrap().shape(), (1, first.b.rows()));
    }
}

#[test]
fn sixteen_bit_tensors_stay_so() {
    for dtype in [DType::F16, DType::BF16] {
        let mut adapter = PeftAdapter::read(&fixture()).unwrap();
        for it in &mut adapter.tensors {
            it.a = it.a.try_clone().unwrap().cast(dtype).unwrap();
            it.b = it.b.try_clone().unwrap().cast(dtype).unwrap();
        }
        let scratch = Scratch::new();
        adapter.write(&scratch.0, &ModelCard::default()).unwrap();
        let again = PeftAdapter::read(&scratch.0).unwrap();
        assert_eq!(again.tensors[3].a.dtype(), dtype);
        assert_eq!(again.tensors[3].a.to_f32().unwrap(), adapter.tensors[3].a.to_f32().unwrap());
    }
}

#[test]
fn a_part_for_text_has_its_modules_where_transformers_has_them() {
    let mut adapter = PeftAdapter::read(&fixture()).unwrap();
    let names = ["q_proj", "layers.0.mlp.up_proj"].map(str::to_string);
    (adapter.place, adapter.target_modules) = (ModulePlace::LanguageModel, Modules::Names(names.into()));
    let modules = |it: &PeftAdapter| it.tensors.iter().map(|it| it.module.clone()).collect::<Vec<_>>();
    for theirs in ["model.language_model.", "language_model.model."] {
        let scratch = Scratch::new();
        adapter.write(&scratch.0, &ModelCard::default()).unwrap();
        let source = SafetensorsSource::open_file(&scratch.0.join(TENSORS)).unwrap();
        let inner = "base_model.model.model.language_model.layers.";
        assert!(source.names().iter().all(|it| it.starts_with(inner)), "{:?}", source.names());
        assert_eq!(
            config(&scratch.0)["target_modules"],
            r"model\.language_model\.(.*\.)?(q_proj|layers\.0\.mlp\.up_proj)"
        );
        // transformers before 4.52 had the names the other way round; they are of one length.
        let mut bytes = fs::read(scratch.0.join(TENSORS)).unwrap();
        let ours = b"model.language_model.";
        for at in 0..bytes.len() - ours.len() {
            // Behind PEFT's own `base_model.model.`.
            if bytes[at..].starts_with(ours) {
                bytes[at..][..ours.len()].copy_from_slice(theirs.as_bytes());
            }
        }
        fs::write(scratch.0.join(TENSORS), bytes).unwrap();
        let again = PeftAdapter::read(&scratch.0).unwrap();
        assert_eq!((again.place, modules(&again)), (ModulePlace::LanguageModel, modules(&adapter)));
    }
    assert_eq!(PeftAdapter::read(&fixture()).unwrap().place, ModulePlace::Model);
}

#[test]
fn configs_that_are_not_there_yet() {
    let scratch = Scratch::new();
    fs::copy(fixture().join(TENSORS), scratch.0.join(TENSORS)).unwrap();
    let refused = |key: &str, value: Value, part: &str| {
        let mut config = config(&fixture());
        config[key] = value;
        fs::write(scratch.0.join(CONFIG), config.to_string()).unwrap();
        let message = PeftAdapter::read(&scratch.0).unwrap_err().to_string();
        assert!(message.contains(part), "`{message}` lacks `{part}`");
        assert!(message.contains("adapter_config.json") || message.contains(TENSORS), "{message}");
    };
    refused("peft_type", json!("IA3"), "IA3");
    refused("use_dora", json!(true), "expected magnitudes of DoRA: 64, got none");
    refused("lora_bias", json!(true), "lora_bias");
    refused("bias", json!("all"), "bias");
    refused("layers_to_transform", json!("last"), "layer numbers");
    refused("rank_pattern", json!({ "q_proj": 2 }), "ranks that differ");
    refused("init_lora_weights", json!("pissa_niter_4"), "changes the base model");
    refused("use_telepathy", json!(true), "use_telepathy");
    refused("r", json!(8), "`r` is 8");
    refused("r", json!(0), "positive whole number");
    refused("target_modules", json!(7), "list of names");
    refused("peft_type", Value::Null, "peft_type");
}

#[test]
fn files_that_are_missing_or_damaged() {
    let scratch = Scratch::new();
    let message = || PeftAdapter::read(&scratch.0).unwrap_err().to_string();
    assert!(message().contains(CONFIG));
    fs::copy(fixture().join(CONFIG), scratch.0.join(CONFIG)).unwrap();
    assert!(message().contains(TENSORS));
    fs::write(scratch.0.join("adapter_model.bin"), "").unwrap();
    assert!(message().contains("pickle"));
    let bytes = fs::read(fixture().join(TENSORS)).unwrap();
    fs::write(scratch.0.join(TENSORS), &bytes[..bytes.len() - 1]).unwrap();
    assert!(message().contains("download it again"));
    let mut odd = bytes.clone();
    let at = bytes.windows(20).position(|it| it == b"q_proj.lora_B.weight").unwrap();
    odd[at + 12] = b'C';
    fs::write(scratch.0.join(TENSORS), odd).unwrap();
    assert!(message().contains("lora_C"));
}

#[test]
fn what_can_not_be_written() {
    let mut adapter = PeftAdapter::read(&fixture()).unwrap();
    let scratch = Scratch::new();
    fs::write(scratch.0.join("file"), "").unwrap();
    let message = adapter.write(&scratch.0.join("file"), &ModelCard::default()).unwrap_err().to_string();
    assert!(message.contains("file"), "{message}");
    if cfg!(target_os = "linux") {
        let message = write_whole(Path::new("/proc/nothing/x"), b"x").unwrap_err().to_string();
        assert!(message.contains("/proc/nothing/x"), "{message}");
    }
    adapter.r = 5;
    let message = adapter.write(&scratch.0.join("out"), &ModelCard::default()).unwrap_err().to_string();
    assert!(message.contains("`r` is 5") && !scratch.0.join("out").exists(), "{message}");
}

#[test]
fn the_card_names_what_was_done() {
    let mut adapter = PeftAdapter::read(&fixture()).unwrap();
    adapter.base_model_name_or_path = "org/Base-1B".into();
    let card = ModelCard {
        title: "Me".into(),
        datasets: vec!["identity.jsonl".into()],
        training: vec![("Steps".into(), "60 | 61".into())],
        ..ModelCard::default()
    };
    let text = card.markdown(&adapter);
    assert!(text.starts_with("---\nbase_model: org/Base-1B\nlibrary_name: peft\n"), "{text}");
    assert!(
        text.contains("| Steps | 60 \\| 61 |")
            && text.contains("| Data | identity.jsonl |")
            && text.contains("# Me\n")
    );
    adapter.base_model_name_or_path = "/models/x".into();
    assert!(!card.markdown(&adapter).contains("base_model:"));
}

#[test]
fn adapters_of_other_models() {
    let folder = fixture().with_file_name("llama_tiny");
    let files = ModelFiles::open(folder).unwrap();
    let mut adapter = PeftAdapter::read(&fixture()).unwrap();
    adapter.check_fits(&files.spec).unwrap();
    let tied = ModelFiles::open(fixture().with_file_name("llama_tiny_tied")).unwrap();
    let message = adapter.check_fits(&tied.spec).unwrap_err().to_string();
    assert!(
        message.contains("model.layers.0.mlp.down_proj") && message.contains("another model"),
        "{message}"
    );
    adapter.tensors[0].module = "model.layers.7.mlp.down_proj".into();
    let message = adapter.check_fits(&files.spec).unwrap_err().to_string();
    assert!(message.contains("model.layers.7") && message.contains("another model"), "{message}");
}
