//! The 1,520 renders made with jinja2 and transformers' settings, where they are beside the checkout.

use std::collections::BTreeMap;
use std::path::PathBuf;

use ferrotune_data::{Now, Template};
use serde_json::{Map, Value};

fn shared() -> Option<PathBuf> {
    let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../../shared/data");
    let present = folder.join("chat_template_golden").is_dir();
    if !present {
        eprintln!("skipped: {} is not there", folder.display());
    }
    present.then_some(folder)
}

#[test]
fn renders_equal_transformers() {
    let Some(shared) = shared() else { return };
    let golden = std::fs::read_to_string(shared.join("chat_template_golden/golden.jsonl")).unwrap();
    let cases: Value = serde_json::from_str(
        &std::fs::read_to_string(shared.join("chat_template_golden/cases.json")).unwrap(),
    )
    .unwrap();
    let special: BTreeMap<String, String> =
        [("bos_token", "<s>"), ("eos_token", "</s>"), ("unk_token", "<unk>"), ("pad_token", "</s>")]
            .map(|(key, token)| (key.to_string(), token.to_string()))
            .into();
    let mut templates = BTreeMap::new();
    let (mut passed, mut total) = (0, 0);
    let mut failures = Vec::new();
    for line in golden.lines() {
        let expected: Value = serde_json::from_str(line).unwrap();
        let name = expected["template"].as_str().unwrap();
        let template = templates.entry(name.to_string()).or_insert_with(|| {
            let source = std::fs::read_to_string(shared.join(name)).unwrap();
            let now = Now::parse("2026-01-01").unwrap();
            Template::from_value_at(name, &Value::from(source), &special, now)
        });
        let case = &cases["cases"][expected["case"].as_str().unwrap()];
        let messages = case["messages"].as_array().unwrap();
        let prompt = expected["add_generation_prompt"].as_bool().unwrap();
        let rendered = match template {
            Ok(template) => template
                .render(messages, case.get("tools"), prompt, &Map::new())
                .map_err(|error| error.to_string()),
            Err(error) => Err(format!("does not parse: {error}")),
        };
        let right = match (&rendered, expected.get("error")) {
            (Err(message), Some(_)) => !message.contains("does not parse"),
            (Ok(rendered), None) => {
                let spans: Vec<Vec<usize>> = expected
                    .get("generation_spans_chars")
                    .map(|spans| serde_json::from_value(spans.clone()).unwrap())
                    .unwrap_or_default();
                let ours: Vec<Vec<usize>> =
                    rendered.generation_spans.iter().map(|span| vec![span.start, span.end]).collect();
                Some(rendered.text.as_str()) == expected["rendered"].as_str() && spans == ours
            }
            _ => false,
        };
        total += 1;
        passed += usize::from(right);
        if !right {
            failures.push(format!(
                "{name} {} prompt={prompt}\n  ours {rendered:?}\n  want {:?} {:?} {:?}",
                expected["case"],
                expected.get("rendered").map(|t| t.to_string()),
                expected.get("error"),
                expected.get("generation_spans_chars"),
            ));
        }
    }
    if std::env::var_os("SHOW").is_some() {
        for failure in &failures {
            eprintln!("{failure}");
        }
    }
    assert_eq!((passed, total), (1520, 1520));
}
