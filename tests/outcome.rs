//! What leaves by each door is what the peers last read. `cargo xtask peers outcome` has these files made, lets transformers, PEFT and
//! llama.cpp compute with them (`peers_outcome.py`), and keeps digests of what they agreed with in `fixtures/outcome.json`. Here the
//! files are made again: whoever changes one of them is told to ask the peers again.
//!
//! `FERROTUNE_OUTCOME` names a folder that the files are written into, with their digests; nothing is compared then.

mod hashed;

use std::collections::{BTreeMap, BTreeSet};
use std::env;
use std::fs;
use std::path::{Path, PathBuf};

use ferrotune_export::{
    FolderOptions, GgufMix, GgufModel, GgufTokenizer, ModelCard, ModulePlace, Modules, merge, write_folder,
    write_gguf,
};
use ferrotune_model::source::{GgufVocabulary, ModelFiles, SafetensorsSource, Stored, WeightSource};
use ferrotune_model::{BuildOptions, PartSpec, build, dense_part, families};
use ferrotune_nn::{Context, LanguageModel as _};
use ferrotune_tensor::{DType, Device, Precision};
use serde_json::{Map, Value, json};

use hashed::{Checkpoint, LENGTHS, adapter, numbers};

const RANK: usize = 2;
const TOKENS: [u32; 12] = [1, 17, 4, 33, 9, 0, 21, 5, 38, 2, 11, 7];
/// How far apart sums of a merged model may be on two machines, by their sizes: products are summed in another order.
const APART: f64 = 1e-5;

fn fixture(name: &str) -> Value {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures").join(name);
    serde_json::from_str(&fs::read_to_string(&path).expect(name)).expect("JSON")
}

fn fnv(hash: u64, bytes: &[u8]) -> u64 {
    bytes.iter().fold(hash, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3))
}

/// What peers read: not the card.
fn files(folder: &Path) -> Vec<PathBuf> {
    let paths = fs::read_dir(folder).unwrap().map(|it| it.unwrap().path());
    let mut files: Vec<PathBuf> = paths.filter(|it| it.is_file() && !it.ends_with("README.md")).collect();
    files.sort();
    files
}

/// The names and bytes of a folder's files.
fn exactly(folder: &Path) -> Value {
    let all = files(folder).into_iter().fold(0xcbf2_9ce4_8422_2325, |hash, path| {
        let name = path.file_name().unwrap().to_string_lossy().into_owned();
        fnv(fnv(hash, name.as_bytes()), &fs::read(&path).unwrap())
    });
    format!("{all:016x}").into()
}

/// The same of all but numbers: of these there are two sums.
fn nearly(folder: &Path) -> Value {
    let (mut form, mut sums) = (0xcbf2_9ce4_8422_2325, [0.0, 0.0]);
    for path in files(folder) {
        form = fnv(form, path.file_name().unwrap().to_string_lossy().as_bytes());
        if path.extension().is_none_or(|it| it != "safetensors") {
            form = fnv(form, &fs::read(&path).unwrap());
            continue;
        }
        let source = SafetensorsSource::open_file(&path).unwrap();
        for name in source.names() {
            let what = format!("{name} {:?} {:?}", source.shape(name).unwrap(), source.dtype(name).unwrap());
            form = fnv(form, what.as_bytes());
            let values = source.get_f32(name).unwrap().to_f32().unwrap().to_vec();
            for (value, other) in values.iter().zip(numbers(name, values.len())) {
                sums[0] += f64::from(*value) * f64::from(other);
                sums[1] += f64::from(*value).powi(2);
            }
        }
    }
    json!([format!("{form:016x}"), sums[0], sums[1]])
}

fn same(recorded: &Value, made: &Value) -> bool {
    let size = |it: &Value| it[2].as_f64().map(f64::sqrt);
    match (size(recorded), size(made)) {
        (Some(a), Some(b)) => {
            let sum = (recorded[1].as_f64().unwrap() - made[1].as_f64().unwrap()).abs();
            recorded[0] == made[0] && (a - b).abs() <= APART * a && sum <= APART * a
        }
        _ => recorded == made,
    }
}

/// A folder of the doors' own, or one that is kept.
struct Out {
    folder: PathBuf,
    kept: bool,
}

impl Out {
    fn new() -> Out {
        match env::var_os("FERROTUNE_OUTCOME") {
            Some(folder) => Out { folder: folder.into(), kept: true },
            None => {
                let name = format!("ferrotune-outcome-{}", std::process::id());
                Out { folder: env::temp_dir().join(name), kept: false }
            }
        }
    }

    fn path(&self, name: &str, door: &str) -> PathBuf {
        let path = self.folder.join(name).join(door);
        fs::create_dir_all(&path).unwrap();
        path
    }
}

impl Drop for Out {
    fn drop(&mut self) {
        if !self.kept {
            let _ = fs::remove_dir_all(&self.folder);
        }
    }
}

/// For transformers and PEFT: a family's base, an adapter, both as one, and the base in 16 bits.
fn of_family(family: &str, golden: &Value, out: &Out) -> Value {
    let checkpoint = Checkpoint::new(&format!("{family}-outcome"), &golden["config"], &golden["tensors"]);
    let open = || {
        let mut files = ModelFiles::open(&checkpoint.0).unwrap();
        files.spec.settle_rope(LENGTHS[1]);
        files
    };
    if out.kept {
        for file in files(&checkpoint.0) {
            fs::copy(&file, out.path(family, "base").join(file.file_name().unwrap())).unwrap();
        }
    }
    let base = open();
    let path = |door: &str| out.path(family, door);
    let mut lora = adapter(&base.spec, RANK, 2.0 * RANK as f64);
    lora.place = ModulePlace::of(&base);
    let kinds = lora.tensors.iter().filter_map(|it| it.module.rsplit('.').next().map(str::to_string));
    lora.target_modules = Modules::Names(kinds.collect::<BTreeSet<_>>().into_iter().collect());
    lora.write(&path("adapter"), &ModelCard::default()).unwrap();
    let options = FolderOptions { dtype: Some(DType::BF16), shard_bytes: u64::MAX };
    write_folder(&path("bf16"), &base, options, &mut |_, _| {}).unwrap();
    let options = FolderOptions { dtype: None, shard_bytes: 50_000 };
    write_folder(&path("merged"), &merge(open(), lora).unwrap(), options, &mut |_, _| {}).unwrap();
    json!({ "adapter": exactly(&path("adapter")), "bf16": exactly(&path("bf16")), "merged": nearly(&path("merged")) })
}

/// For llama.cpp: a model of what it computes of an architecture, and the logits that it should find. Types in few bits have hashes
/// of their own (`export/src/gguf/tests.rs`).
fn of_architecture(name: &str, config: &Value, out: &Out) -> Value {
    let spec = families::spec(config, Path::new("config.json")).unwrap();
    let shapes: Map<String, Value> =
        spec.checkpoint_tensors().into_iter().map(|it| (it.name.clone(), json!(it.shape()))).collect();
    let checkpoint = Checkpoint::new(&format!("{}-outcome", name.replace(' ', "-")), config, &shapes.into());
    let open = |path: &Path| {
        let mut files = ModelFiles::open(path).unwrap();
        // llama.cpp takes the longer one by its context, which has 256 tokens in peers_llama_cpp.py.
        files.spec.settle_rope(256);
        files
    };
    let files = open(&checkpoint.0);
    let mut digests = Map::new();
    for mix in [GgufMix::F32, GgufMix::F16] {
        let vocabulary = GgufVocabulary {
            model: "gpt2".into(),
            pre: "qwen2".into(),
            tokens: (0..spec.vocab_size).map(|id| format!("<{id}>")).collect(),
            merges: vec!["< 0".into()],
            bos_token_id: spec.bos_token_id,
            eos_token_id: Some(2),
            add_bos_token: Some(false),
            ..GgufVocabulary::default()
        };
        let (weights, tokenizer) = (files.source.as_ref(), GgufTokenizer::Made(Box::new(vocabulary)));
        let model = GgufModel { spec: &spec, weights, tokenizer, name: "Tiny".into(), base_model: None };
        let folder = out.path(name, mix.name());
        let path = folder.join("model.gguf");
        write_gguf(&path, &model, mix).unwrap();
        digests.insert(mix.name().to_string(), exactly(&folder));
        if out.kept {
            let logits = json!({ "ids": TOKENS, "logits": logits(&open(&path)) });
            fs::write(folder.join("logits.json"), logits.to_string()).unwrap();
        }
    }
    digests.into()
}

fn logits(files: &ModelFiles) -> Vec<f32> {
    let options = BuildOptions { precision: Precision::Full, dtype: DType::F32, device: Device::Cpu };
    let mut make = |spec: &PartSpec, stored: Stored| dense_part(spec, stored, &options);
    let model = build(&files.spec, files.source.as_ref(), options.clone(), &mut make).unwrap();
    let hidden = model.hidden(&Context::new(vec![0, TOKENS.len()]), &TOKENS).unwrap();
    model.logits(&hidden).unwrap().to_f32().unwrap().to_vec()
}

#[test]
fn what_leaves_is_what_the_peers_read() {
    let out = Out::new();
    let mut made: BTreeMap<String, Value> = BTreeMap::new();
    for (family, golden) in fixture("families.json").as_object().unwrap() {
        made.insert(family.clone(), of_family(family, golden, &out));
    }
    for (name, config) in hashed::llama_cpp_configs() {
        let name = format!("gguf {name}");
        made.insert(name.clone(), of_architecture(&name, &config, &out));
    }
    if out.kept {
        let text = serde_json::to_string_pretty(&made).unwrap();
        fs::write(out.folder.join("outcome.json"), text).unwrap();
        return;
    }
    let recorded = fixture("outcome.json");
    let mut changed = Vec::new();
    for (name, doors) in &made {
        for (door, digest) in doors.as_object().unwrap() {
            // What no peer reads is null.
            match recorded.get(name).and_then(|it| it.get(door)) {
                Some(it) if it.is_null() || same(it, digest) => {}
                Some(it) => changed.push(format!("{name}, {door}: {digest}, recorded {it}")),
                None => changed.push(format!("{name}, {door}: not recorded")),
            }
        }
    }
    assert!(
        changed.is_empty(),
        "other files leave than those that the peers have read:\n  {}\nRun `cargo xtask peers outcome`, which asks them again, \
         and commit tests/fixtures/outcome.json with the change",
        changed.join("\n  ")
    );
    let compared = recorded.as_object().unwrap().values().flat_map(|it| it.as_object().unwrap().values());
    assert!(compared.filter(|it| !it.is_null()).count() > 60, "most doors are compared");
}
