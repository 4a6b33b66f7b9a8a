//! Named templates against what LLaMA-Factory makes of the same conversations (`tests/fixtures/make_named.py`).

use std::collections::BTreeMap;
use std::path::PathBuf;

use ferrotune_data::{Template, assistant_spans, named_template, template_names};
use serde_json::{Map, Value, json};

/// A conversation of the fixture as messages, and the template's variables.
fn conversation(case: &Value) -> (Vec<Value>, Map<String, Value>) {
    let mut messages = Vec::new();
    if let Some(system) = case.get("system") {
        messages.push(json!({"role": "system", "content": system}));
    }
    for (index, turn) in case["messages"].as_array().unwrap().iter().enumerate() {
        messages.push(match turn {
            Value::String(text) => {
                json!({"role": if index % 2 == 0 { "user" } else { "assistant" }, "content": text})
            }
            Value::Array(turn) if turn[0] == "tool" => json!({"role": "tool", "content": turn[1]}),
            Value::Array(calls) => {
                let calls: Vec<Value> =
                    calls.iter().map(|call| json!({"type": "function", "function": call})).collect();
                json!({"role": "assistant", "content": "", "tool_calls": calls})
            }
            other => panic!("{other}"),
        });
    }
    let mut variables = Map::new();
    variables
        .insert("enable_thinking".to_string(), case.get("enable_thinking").cloned().unwrap_or(json!(true)));
    variables
        .insert("discard_thoughts".to_string(), case.get("mask_history").cloned().unwrap_or(json!(false)));
    (messages, variables)
}

#[test]
fn as_llama_factory_makes_them() {
    let file = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures/templates/named.json");
    let golden: Value = serde_json::from_str(&std::fs::read_to_string(file).unwrap()).unwrap();
    let all_pairs: Vec<(String, String)> = serde_json::from_value(golden["pairs"].clone()).unwrap();
    let special: BTreeMap<String, String> = [("bos_token", "<s>"), ("eos_token", "</s>")]
        .map(|(key, token)| (key.to_string(), token.to_string()))
        .into();
    let mut failures = Vec::new();
    let (mut same, mut without_tools) = (0, 0);
    for name in template_names() {
        let named = named_template(name).unwrap();
        let template = Template::new(name, &named.source, &special).unwrap();
        let results = golden["results"][name].as_str().unwrap_or_else(|| panic!("no {name}"));
        let results: BTreeMap<String, Vec<usize>> = serde_json::from_str(results).unwrap();
        for (case, value) in golden["cases"].as_object().unwrap() {
            let pairs: Vec<&(String, String)> =
                results[case].iter().map(|number| &all_pairs[*number]).collect();
            let (messages, variables) = conversation(value);
            let found = assistant_spans(&template, &messages, value.get("tools"), &variables);
            let spans = match found {
                Ok(spans) => spans,
                Err(error)
                    if value.get("tools").is_some()
                        && error.to_string().contains("has no form for tools") =>
                {
                    without_tools += 1;
                    continue;
                }
                Err(error) => {
                    failures.push(format!("{name}, {case}: {error}"));
                    continue;
                }
            };
            let expected: String = pairs.iter().map(|(read, said)| format!("{read}{said}")).collect();
            let trained: Vec<&str> = spans.turns.iter().map(|turn| &spans.text[turn.range.clone()]).collect();
            // The line break after an end-of-turn token is the template's, not the model's.
            let said: Vec<&str> = pairs.iter().map(|(_, said)| said.trim_end()).collect();
            // GLM ends a turn with the next one's token: LLaMA-Factory trains EOS in its place, we train that token.
            let fits = |(ours, theirs): (&&str, &&str)| {
                ours.trim_end() == *theirs
                    || ours.strip_suffix("<|user|>").is_some_and(|ours| ours.trim_end() == *theirs)
            };
            if spans.text != expected || said.len() != trained.len() || !trained.iter().zip(&said).all(fits) {
                failures.push(format!(
                    "{name}, {case}:\n  ours {:?} {trained:?}\n  want {expected:?} {said:?}",
                    spans.text
                ));
                continue;
            }
            same += 1;
        }
    }
    for failure in &failures {
        eprintln!("{failure}");
    }
    assert_eq!(failures.len(), 0);
    eprintln!("{same} as LLaMA-Factory's, {without_tools} refused because of tools");
}

#[test]
fn what_has_no_form_is_refused_by_name() {
    let template = Template::new("yi", &named_template("yi").unwrap().source, &BTreeMap::new()).unwrap();
    let check = |messages: Value, tools: Option<&Value>, expected: &str| {
        let error = assistant_spans(&template, messages.as_array().unwrap(), tools, &Map::new()).unwrap_err();
        assert_eq!(error.to_string(), format!("chat template `yi`: {expected}"));
    };
    let question = json!([{"role": "user", "content": "a"}]);
    check(
        question,
        Some(&json!([{}])),
        "template `yi` has no form for tools; use the chat template that comes with the model",
    );
    check(
        json!([{"role": "user", "content": "a"}, {"role": "system", "content": "b"}]),
        None,
        "template `yi` has no form for a turn of `system` here",
    );
    assert!(named_template("nobody").is_none());
}
