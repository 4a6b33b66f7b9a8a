//! The 1,520 renders made with jinja2 and transformers' settings, where they are beside the checkout.

use std::collections::BTreeMap;
use std::path::PathBuf;

use ferrotune_data::{Ending, Now, Template};
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
        let ending = if prompt { Ending::GenerationPrompt } else { Ending::Complete };
        let rendered = match template {
            Ok(template) => template
                .render(messages, case.get("tools"), ending, &Map::new())
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

/// What transformers renders of our own templates, one for each construct, and hashes of what it renders of the
/// public ones: each with every conversation of the suite, and every ending.
mod suite {
    use super::*;

    const ENDINGS: [Ending; 3] = [Ending::Complete, Ending::GenerationPrompt, Ending::ContinueFinalMessage];

    fn fixture(name: &str) -> Value {
        let file =
            PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures/templates").join(name);
        serde_json::from_str(&std::fs::read_to_string(file).unwrap()).unwrap()
    }

    /// Renders a template with the whole suite; `check` says what is wrong with each, if anything.
    fn run(
        golden: &Value,
        name: &str,
        source: &str,
        mut check: impl FnMut(usize, Result<ferrotune_data::Rendered, String>) -> Option<String>,
    ) -> Vec<String> {
        let special = serde_json::from_value(golden["special_tokens"].clone()).unwrap();
        let now = Now::parse("2026-01-01").unwrap();
        let template = Template::from_value_at(name, &Value::from(source), &special, now);
        let mut failures = Vec::new();
        let mut index = 0;
        for (case, conversation) in golden["conversations"].as_object().unwrap() {
            for ending in ENDINGS {
                let messages = conversation["messages"].as_array().unwrap();
                let rendered = match &template {
                    // transformers refuses an empty conversation before it looks at the template.
                    Ok(_) if messages.is_empty() => Err("nothing".to_string()),
                    Ok(template) => template
                        .render(messages, conversation.get("tools"), ending, &Map::new())
                        .map_err(|error| error.to_string()),
                    Err(error) => Err(error.to_string()),
                };
                failures
                    .extend(check(index, rendered).map(|wrong| format!("{name} {case} {ending:?}: {wrong}")));
                index += 1;
            }
        }
        failures
    }

    fn report(failures: &[String], total: usize) {
        for failure in failures.iter().take(if std::env::var_os("SHOW").is_some() { usize::MAX } else { 20 })
        {
            eprintln!("{failure}");
        }
        assert_eq!(failures.len(), 0, "of {total} renders");
        eprintln!("{total} renders equal transformers'");
    }

    #[test]
    fn our_templates_render_as_in_transformers() {
        let golden = fixture("golden.json");
        // Each text is written as what it shares with the one before it (a number of characters), and the rest.
        let mut texts: Vec<String> = Vec::new();
        for text in golden["texts"].as_array().unwrap() {
            let (same, rest): (usize, String) = serde_json::from_str(text.as_str().unwrap()).unwrap();
            let before = texts.last().map_or("", String::as_str);
            texts.push(before.chars().take(same).chain(rest.chars()).collect());
        }
        let (mut failures, mut total) = (Vec::new(), 0);
        for (name, source) in golden["templates"].as_object().unwrap() {
            let rows: Vec<Value> = serde_json::from_str(golden["renders"][name].as_str().unwrap()).unwrap();
            total += rows.len();
            failures.extend(run(&golden, name, source.as_str().unwrap(), |index, rendered| {
                let (text, spans) = match &rows[index] {
                    Value::Array(pair) => (&pair[0], Some(&pair[1])),
                    text => (text, None),
                };
                let expected = text.as_u64().map(|at| &texts[at as usize]);
                let right = match &rendered {
                    Err(_) => expected.is_none(),
                    Ok(rendered) => {
                        let ours = rendered.generation_spans.iter().map(|span| vec![span.start, span.end]);
                        let ours = serde_json::json!(ours.collect::<Vec<_>>());
                        expected.is_some_and(|text| *text == rendered.text)
                            && spans.is_none_or(|spans| *spans == ours)
                    }
                };
                (!right).then(|| format!("\n  ours {rendered:?}\n  want {expected:?}"))
            }));
        }
        report(&failures, total);
    }

    /// 64-bit FNV-1a, the high half folded in.
    fn fnv(text: &str) -> String {
        let hash = text.bytes().fold(0xCBF2_9CE4_8422_2325_u64, |hash, byte| {
            (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01B3)
        });
        format!("{:08x}", (hash ^ hash >> 32) as u32)
    }

    #[test]
    fn public_templates_render_as_in_transformers() {
        let Some(shared) = shared() else { return };
        let (golden, public) = (fixture("golden.json"), fixture("public.json"));
        let (mut failures, mut total) = (Vec::new(), 0);
        for (name, hashes) in public.as_object().unwrap() {
            let hashes = hashes.as_str().unwrap();
            total += hashes.len() / 8;
            let source = std::fs::read_to_string(shared.join(name)).unwrap();
            failures.extend(run(&golden, name, &source, |index, rendered| {
                let expected = &hashes[8 * index..8 * index + 8];
                let ours = rendered.as_ref().map_or_else(|_| "-".repeat(8), |rendered| fnv(&rendered.text));
                (ours != expected).then(|| format!("ours {rendered:?}, want {expected}"))
            }));
        }
        report(&failures, total);
    }
}
