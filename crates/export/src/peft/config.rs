//! adapter_config.json: all keys that PEFT 0.18 writes; older and newer versions take them too.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use ferrotune_tensor::{Error, Result};
use serde_json::{Map, Value, json};

use super::{ModulePlace, Modules, PeftAdapter};

/// Sorted keys, two spaces, no newline at the end: as PEFT writes it.
pub(super) fn write(adapter: &PeftAdapter) -> String {
    let entries = [
        ("alora_invocation_tokens", Value::Null),
        ("alpha_pattern", json!({})),
        ("arrow_config", Value::Null),
        ("auto_mapping", Value::Null),
        ("base_model_name_or_path", json!(adapter.base_model_name_or_path)),
        ("bias", json!("none")),
        ("corda_config", Value::Null),
        ("ensure_weight_tying", json!(false)),
        ("eva_config", Value::Null),
        (
            "exclude_modules",
            adapter.exclude_modules.as_ref().map_or(Value::Null, |it| modules(it, adapter.place)),
        ),
        ("fan_in_fan_out", json!(false)),
        ("inference_mode", json!(true)),
        ("init_lora_weights", json!(true)),
        ("layer_replication", Value::Null),
        ("layers_pattern", Value::Null),
        ("layers_to_transform", numbers(&adapter.layers_to_transform)),
        ("loftq_config", json!({})),
        ("lora_alpha", whole_or_not(adapter.lora_alpha)),
        ("lora_bias", json!(false)),
        ("lora_dropout", json!(adapter.lora_dropout)),
        ("megatron_config", Value::Null),
        ("megatron_core", json!("megatron.core")),
        ("modules_to_save", saved(adapter)),
        ("peft_type", json!("LORA")),
        ("peft_version", json!("0.18.0")),
        ("qalora_group_size", json!(16)),
        ("r", json!(adapter.r)),
        ("rank_pattern", json!({})),
        ("revision", json!(adapter.revision)),
        ("target_modules", modules(&adapter.target_modules, adapter.place)),
        ("target_parameters", Value::Null),
        ("task_type", json!("CAUSAL_LM")),
        ("trainable_token_indices", Value::Null),
        ("use_dora", json!(adapter.use_dora)),
        ("use_qalora", json!(false)),
        ("use_rslora", json!(adapter.use_rslora)),
    ];
    let sorted: BTreeMap<&str, Value> = entries.into_iter().collect();
    serde_json::to_string_pretty(&sorted).unwrap_or_default()
}

/// PEFT's alpha is a whole number where it can be one.
fn whole_or_not(value: f64) -> Value {
    if value.fract() == 0.0 && value.abs() < 1e15 { json!(value as i64) } else { json!(value) }
}

fn numbers(numbers: &[usize]) -> Value {
    if numbers.is_empty() { Value::Null } else { json!(numbers) }
}

/// The last part of each module's path, as LLaMA-Factory names them.
fn saved(adapter: &PeftAdapter) -> Value {
    let modules = adapter.saved.keys().filter_map(|it| it.trim_end_matches(".weight").rsplit('.').next());
    // The embedding comes first, as in the model.
    let modules: Vec<&str> = modules.rev().collect();
    if modules.is_empty() { Value::Null } else { json!(modules) }
}

fn modules(modules: &Modules, place: ModulePlace) -> Value {
    match modules {
        // The other parts have modules of the same names, which are not meant. PEFT compares the pattern with a whole name.
        Modules::Names(names) if place == ModulePlace::LanguageModel => {
            let short = |it: &String| it.strip_prefix("model.").unwrap_or(it).replace('.', "\\.");
            let names: Vec<String> = names.iter().map(short).collect();
            json!(format!("model\\.language_model\\.(.*\\.)?({})", names.join("|")))
        }
        Modules::Names(names) => json!(names),
        Modules::Pattern(pattern) => json!(pattern),
    }
}

/// Keys that are read, say where an adapter came from, or mattered in training alone.
const TAKEN: &[&str] = &[
    "auto_mapping",
    "base_model_name_or_path",
    "corda_config",
    "eva_config",
    "exclude_modules",
    "inference_mode",
    "init_lora_weights",
    "layers_pattern",
    "layers_to_transform",
    "loftq_config",
    "lora_alpha",
    "lora_dropout",
    "lora_ga_config",
    "megatron_core",
    "modules_to_save",
    "peft_type",
    "peft_version",
    "qalora_group_size",
    "r",
    "revision",
    "target_modules",
    "task_type",
    "use_dora",
    "use_rslora",
    "runtime_config",
    "ensure_weight_tying",
];

/// What an unsupported key is about.
const NOT_YET: &[(&str, &str)] = &[
    ("lora_bias", "a bias beside B"),
    ("rank_pattern", "ranks that differ between modules"),
    ("alpha_pattern", "alphas that differ between modules"),
    ("trainable_token_indices", "trained rows of the embedding"),
    ("fan_in_fan_out", "transposed weights"),
];

/// First halves of initialisations that change the base's weights, which the adapter then needs.
const CHANGE_THE_BASE: &[&str] = &["pissa", "olora", "corda", "loftq", "lora_ga"];

/// Reads a config; the tensors are still missing.
pub(super) fn read(path: &Path) -> Result<PeftAdapter> {
    let text = fs::read_to_string(path).map_err(|source| Error::io(path, source))?;
    let json: Value =
        serde_json::from_str(&text).map_err(|error| Error::file(path, format!("not JSON: {error}")))?;
    let Some(map) = json.as_object() else {
        return Err(Error::file(path, "expected a JSON object of keys and values"));
    };
    parse(map).map_err(|message| Error::file(path, message))
}

fn parse(map: &Map<String, Value>) -> Result<PeftAdapter, String> {
    let get = |key: &str| map.get(key).filter(|it| !it.is_null());
    match get("peft_type").and_then(Value::as_str) {
        Some("LORA") => {}
        Some(other) => return Err(format!("`peft_type` is {other}, which is not there yet, only: LORA")),
        None => return Err("`peft_type` is missing: this is no config of a PEFT adapter".into()),
    }
    for (key, value) in map {
        if TAKEN.contains(&key.as_str()) || is_off(key, value) {
            continue;
        }
        let what = NOT_YET.iter().find(|(it, _)| it == key).map_or("a kind of adapter", |(_, what)| what);
        return Err(format!("`{key}` is {value}: {what} that isn't there yet"));
    }
    if let Some(how) = get("init_lora_weights").and_then(Value::as_str)
        && CHANGE_THE_BASE.iter().any(|it| how.to_lowercase().starts_with(it))
    {
        return Err(format!(
            "`init_lora_weights` is {how}, which changes the base model: save the adapter with PEFT's \
             `path_initial_model_for_weight_conversion` to get one for the unchanged base"
        ));
    }
    let number = |key: &str, default: Option<f64>| match (get(key), default) {
        (Some(value), _) => {
            let good = value.as_f64().filter(|it| it.is_finite());
            good.ok_or_else(|| format!("`{key}` is {value}, expected a number"))
        }
        (None, Some(default)) => Ok(default),
        (None, None) => Err(format!("`{key}` is missing")),
    };
    let r = number("r", None)?;
    if r < 1.0 || r.fract() != 0.0 || r > 1e6 {
        return Err(format!("`r` is {r}, expected a positive whole number"));
    }
    let text = |key: &str| get(key).and_then(Value::as_str).map(str::to_string);
    let modules = |key: &str| match get(key) {
        None => Ok(None),
        Some(Value::String(pattern)) => Ok(Some(Modules::Pattern(pattern.clone()))),
        Some(Value::Array(names)) => {
            let names: Option<Vec<String>> = names.iter().map(|it| it.as_str().map(str::to_string)).collect();
            names.map(|it| Some(Modules::Names(it))).ok_or_else(|| format!("`{key}` is no list of names"))
        }
        Some(value) => Err(format!("`{key}` is {value}, expected a list of names or a pattern")),
    };
    Ok(PeftAdapter {
        base_model_name_or_path: text("base_model_name_or_path").unwrap_or_default(),
        place: ModulePlace::Model,
        revision: text("revision"),
        r: r as usize,
        lora_alpha: number("lora_alpha", Some(8.0))?,
        lora_dropout: number("lora_dropout", Some(0.0))?,
        use_rslora: get("use_rslora").and_then(Value::as_bool).unwrap_or(false),
        use_dora: get("use_dora").and_then(Value::as_bool).unwrap_or(false),
        target_modules: modules("target_modules")?.unwrap_or(Modules::Names(Vec::new())),
        exclude_modules: modules("exclude_modules")?,
        layers_to_transform: layers(get("layers_to_transform"))?,
        saved: BTreeMap::new(),
        tensors: Vec::new(),
    })
}

/// A number or a list of them.
fn layers(value: Option<&Value>) -> Result<Vec<usize>, String> {
    let wrong = |value: &Value| format!("`layers_to_transform` is {value}, expected layer numbers");
    let number = |it: &Value| it.as_u64().map(|it| it as usize).ok_or_else(|| wrong(it));
    match value {
        None => Ok(Vec::new()),
        Some(Value::Array(list)) => list.iter().map(number).collect(),
        Some(value) => number(value).map(|it| vec![it]),
    }
}

/// Whether a value says that a feature is not used.
fn is_off(key: &str, value: &Value) -> bool {
    match value {
        Value::Null | Value::Bool(false) => true,
        Value::String(text) => text.is_empty() || (key == "bias" && text == "none"),
        Value::Array(list) => list.is_empty(),
        Value::Object(map) => map.is_empty(),
        Value::Bool(true) | Value::Number(_) => false,
    }
}
