//! The quick start, judged: the new identity is there, and the model hasn't been hurt.
//! Without FERROTUNE_TEST_MODEL this test does nothing and says so.

use std::fs;
use std::path::Path;

use ferrotune_data::Sample;
use ferrotune_export::PeftAdapter;
use ferrotune_lora::LoraAdapter;
use ferrotune_model::source::{ModelFiles, Stored};
use ferrotune_model::{BuildOptions, Decoder, PartSpec, build};
use ferrotune_nn::Part;
use ferrotune_quant::{Nf4Weight, Scales};
use ferrotune_tensor::{DType, Device, Precision};
use ferrotune_trainer::evaluate;
use serde_json::{Value, json};

use crate::util::{Dir, repository, test_model};

/// Of the configuration's own `dataset_values`.
const NAME: &str = "Ferris";
const AUTHOR: &str = "Ferrotune team";

#[test]
fn the_quick_start_gives_an_identity_and_hurts_nothing() {
    let Some(model) = test_model() else { return };
    let dir = Dir::new();
    let config = repository("examples/quickstart.yaml").display().to_string();
    let keys = [
        format!("model_name_or_path={}", model.display()),
        format!("dataset={}", repository("examples/identity.jsonl").display()),
    ];
    let ferrotune = |verb: &str, words: &[&str]| {
        let keys: Vec<&str> = keys.iter().map(String::as_str).collect();
        dir.ferrotune(&[&[verb, &config], &keys[..], words].concat()).succeeds().stdout
    };
    let ask = |file: &Path, words: &[&str]| {
        let file = file.display().to_string();
        let greedy = ["--quiet", "--greedy", "--max-new-tokens", "48", "--prompts", &file];
        answers(file.as_ref(), &ferrotune("chat", &[&greedy, words].concat()))
    };
    let held_back = repository("examples/heldback.jsonl");
    let of_the_set =
        dir.file("chinese.jsonl", "{\"prompt\": \"你是谁？\"}\n{\"prompt\": \"你叫什么名字？\"}\n");
    let unrelated = repository("examples/unrelated.jsonl");

    let known = |answers: &[(String, String)]| {
        answers.iter().filter(|(_, answer)| answer.contains(NAME) && answer.contains(AUTHOR)).count()
    };
    assert_eq!(known(&ask(&held_back, &[])), 0, "the base model knows nothing of it");
    let base_answers = ask(&unrelated, &[]);
    assert_eq!(base_answers.len(), 20);

    ferrotune("train", &["output_dir=out"]);
    let adapter = ["--adapter", "out"];
    let after = ask(&held_back, &adapter);
    assert_eq!((known(&after), after.len()), (3, 3), "{after:#?}");
    let chinese = ask(&of_the_set, &adapter);
    assert_eq!(known(&chinese), 2, "{chinese:#?}");

    let samples: Vec<Sample> = base_answers.iter().map(|it| said(&dir, &model, it)).collect();
    let before = evaluate(&decoder(&model, None), &samples, 1).unwrap().loss;
    let after = evaluate(&decoder(&model, Some(&dir.path().join("out"))), &samples, 1).unwrap().loss;
    let rise = 100.0 * (after / before - 1.0);
    eprintln!("loss of the base model's own answers: {before:.4} before, {after:.4} after ({rise:+.1} %)");
    assert!(rise <= 10.0, "the loss of the base model's own answers rises from {before:.4} to {after:.4}");
}

/// What `chat --prompts` printed, cut at its questions.
fn answers(prompts: &Path, printed: &str) -> Vec<(String, String)> {
    let lines = fs::read_to_string(prompts).unwrap();
    let prompts = lines.lines().map(|line| {
        let row: Value = serde_json::from_str(line).unwrap();
        row["prompt"].as_str().unwrap().to_string()
    });
    let (mut rest, mut answers) = (printed, Vec::<(String, String)>::new());
    for prompt in prompts {
        let (before, after) = rest.split_once(&format!("> {prompt}\n")).expect("every question is printed");
        if let Some(last) = answers.last_mut() {
            last.1 = before.trim_end().to_string();
        }
        answers.push((prompt, String::new()));
        rest = after;
    }
    answers.last_mut().unwrap().1 = rest.trim_end().to_string();
    answers
}

/// An answer as a batch in which its tokens count, but not the end that a limit may have cut off.
fn said(dir: &Dir, model: &Path, (prompt, answer): &(String, String)) -> Sample {
    let messages = json!([{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]);
    let file = dir.file("said.json", messages.to_string()).display().to_string();
    let model = model.display().to_string();
    let printed = dir.ferrotune(&["debug", "render", "--model", &model, &file]).succeeds().stdout;
    let rendered: Value = serde_json::from_str(&printed).unwrap();
    let numbers = |key: &str| -> Vec<u32> {
        rendered[key].as_array().unwrap().iter().map(|it| it.as_u64().unwrap() as u32).collect()
    };
    let mut trained: Vec<bool> = numbers("trained_tokens").iter().map(|it| *it == 1).collect();
    if let Some(last) = trained.iter().rposition(|it| *it) {
        trained[last] = false;
    }
    Sample { tokens: numbers("ids"), trained, ..Sample::default() }
}

/// The model in 4 bits, as the quick start trains it.
fn decoder(model: &Path, adapter: Option<&Path>) -> Decoder {
    let files = ModelFiles::open(model).unwrap();
    let adapter = adapter.map(|folder| PeftAdapter::read(folder).unwrap());
    let mut make = |spec: &PartSpec, stored: Stored| {
        let Stored::Dense(value) = stored else { panic!("{} is in few bits already", spec.name) };
        let weight = Nf4Weight::quantize(&value, Scales::Nested, Precision::Full)?;
        let mut part = Part { name: spec.name.clone(), weight: Box::new(weight), bias: None, adapter: None };
        if let Some(adapter) = &adapter {
            let lora = adapter.tensors.iter().find(|it| it.module == spec.name).expect("its adapter");
            let (a, b, scaling) = (lora.a.try_clone()?, lora.b.try_clone()?, adapter.scaling());
            let lora = LoraAdapter::from_parts(&spec.name, a, b, scaling, 0.0, Precision::Full)?;
            part.adapter = Some(Box::new(lora));
        }
        Ok(part)
    };
    let options = BuildOptions { precision: Precision::Full, dtype: DType::F32, device: Device::Cpu };
    build(&files.spec, files.source.as_ref(), options, &mut make).unwrap()
}
