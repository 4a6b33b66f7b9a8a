//! Hostile templates: whatever the text, rendering ends soon, with a result or an error.
//!
//! The seeds are the templates of the suite and those in `hostile`. Each is run as it is; then `FUZZ_RUNS` (2,000 unless
//! set) mutations of them, the same on every machine.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use ferrotune_data::{
    Added, Conversation, Ending, MarkOptions, Message, Role, Template, Tokenizer, encode_prompt,
    show_conversation,
};
use serde_json::{Map, Value, json};

/// Everything that a template goes through: rendering in each way, turns, tokens and marks.
fn one(source: &str, tokenizer: &Tokenizer, conversation: &Conversation) {
    let special: BTreeMap<String, String> = tokenizer.special_tokens().clone();
    let Ok(template) = Template::new("fuzz", source, &special) else { return };
    let messages = conversation.to_json(None);
    for ending in [Ending::Complete, Ending::GenerationPrompt, Ending::ContinueFinalMessage] {
        if let Ok(rendered) = template.render(&messages, conversation.tools.as_ref(), ending, &Map::new()) {
            let length = rendered.text.chars().count();
            assert!(
                rendered.generation_spans.iter().all(|span| span.start <= span.end && span.end <= length)
            );
        }
    }
    let options = MarkOptions::new(64);
    if let Ok(shown) = show_conversation(conversation, &template, tokenizer, &options) {
        assert_eq!(shown.sample.tokens.len(), shown.sample.trained.len());
        assert!(shown.sample.tokens.len() <= 64);
    }
    let _ = encode_prompt(conversation, &template, tokenizer, &options);
}

fn tokenizer() -> Tokenizer {
    let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures/llama_tiny");
    let mut tokenizer = Tokenizer::from_folder(&folder).unwrap();
    tokenizer.add_tokens(&["<s>".to_string(), "</s>".to_string()], Added::Control).unwrap();
    tokenizer.set_special_token("bos_token", "<s>").unwrap();
    tokenizer.set_special_token("eos_token", "</s>").unwrap();
    tokenizer
}

fn conversation() -> Conversation {
    let mut call = Message::new(Role::Assistant, "");
    call.tool_calls = Some(json!([{"function": {"name": "f", "arguments": {"a": [1, 1.5, null, "é"]}}}]));
    let turns =
        [(Role::System, "s</s>"), (Role::User, " ü<|im_end|> "), (Role::Assistant, "<think>t</think>a")];
    let mut messages: Vec<Message> = turns.map(|(role, text)| Message::new(role, text)).into();
    messages.extend([call, Message::new(Role::Tool, "{}"), Message::new(Role::Assistant, "b")]);
    Conversation { messages, tools: Some(json!([{"function": {"name": "f"}}])), ..Conversation::default() }
}

/// What asks for more time, memory or stack than there is.
fn hostile() -> Vec<String> {
    let deep =
        |open: &str, close: &str| format!("{{{{ {}1{} }}}}", open.repeat(20_000), close.repeat(20_000));
    [
        "{% for i in range(100000) %}{% for j in range(100000) %}{% for k in range(100000) %}{{ i }}{% endfor %}{% endfor %}{% endfor %}",
        "{% set ns = namespace(x='ab') %}{% for i in range(64) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}{{ ns.x }}",
        "{% set ns = namespace(x='ab') %}{% for i in range(64) %}{% set ns.x = ns.x + ns.x %}{% endfor %}{{ ns.x | length }}",
        "{% macro m(n) %}{{ m(n + 1) }}{% endmacro %}{{ m(0) }}",
        "{% for m in messages recursive %}{{ loop(messages) }}{% endfor %}",
        "{{ 'a' * 1000000000000 }}",
        "{{ 'a'.center(1000000000000) }}",
        "{{ 'a' | center(1000000000000) }}",
        "{{ 'a'.ljust(100000000) }}",
        "{{ 2 ** 10000000 }}",
        "{{ 10 ** 400 }}",
        "{{ range(1000000000000) | list | length }}",
        "{{ ['a'] * 10000000 }}",
        "{% set x %}{{ 'abc' * 1000000 }}{% endset %}{{ x.replace('', x) | length }}",
        "{% set x = 'abc' * 100000 %}{{ x.split('') }}{{ x.replace('a', x) | length }}",
        "{% set x = 'a ' * 100000 %}{{ x.split() | map('upper') | join(x) | length }}",
        "{{ messages | tojson(indent='x' * 1000000) | length }}",
        "{{ messages | tojson(indent=100000000) | length }}",
        "{{ '%9999999999d' | format(1) }}",
        "{{ '{:9999999999}'.format(1) }}",
        "{{ ('{0:999999}' * 100000).format(1) }}",
        "{{ '{:.9999999999f}'.format(1.5) }}",
        "{{ '%9999999999d' % 1 }}",
        "{{ '{:.99999e}'.format(1.5) }}",
        "{{ '%.99999e' | format(1.5) }}",
        "{{ '%.99999e' % 1.5 }}",
        "{{ '%.*e' % (99999, 1.5) }}",
        "{% ('a')call turn('x') %}",
        "{{ '%99999999s' % 'a' }}",
        "{{ 'a' | indent(1000000000) }}",
        "{{ 'a\nb' | indent(1000000000) }}",
        "{{ strftime_now('%Y' * 1000000) | length }}",
        "{{ messages | batch(1000000000000) | list }}",
        "{{ messages | batch(1000000000000, 'x') | list }}",
        "{{ messages | slice(1000000000000) | list | length }}",
        "{% generation %}{% generation %}{{ messages[0].content }}{% endgeneration %}",
        "{% generation %}{% endgeneration %}{% endgeneration %}",
        "\u{FDD1}\u{FDD0}{{ '\u{FDD0}' }}{% generation %}\u{FDD1}{% endgeneration %}\u{FDD3}\u{FDD2}",
        "{% include 'default' %}{% extends 'default' %}",
        "{% set ns = namespace() %}{% set ns.n = ns %}{{ ns }}",
        "{% set ns = namespace() %}{% set ns.n = [{'a': ns}] %}{{ ns }}",
        "{% set ns = namespace(a=1) %}{% set ns = namespace(n=ns) %}{{ ns }}",
        "{% macro m() %}{{ ns }}{% endmacro %}{% set ns = namespace() %}{% set ns.m = m %}{{ ns }}",
        "{% set ns = namespace(x=[]) %}{% for i in range(100000) %}{% set ns.x = [ns.x] %}{% endfor %}{{ ns.x }}",
        "{% set ns = namespace(x=[]) %}{% for i in range(100000) %}{% set ns.x = {'a': ns.x} %}{% endfor %}{{ ns.x }}",
        "{% set ns = namespace(x=[1]) %}{% for i in range(100000) %}{% set ns.x = ns.x[0:] %}{% endfor %}{{ ns.x | list }}",
        "{% set ns = namespace(x=[1]) %}{% for i in range(100000) %}{% set ns.x = [ns.x[0][0:]] %}{% endfor %}{{ ns.x | list }}",
        "{% set ns = namespace(x=[1]) %}{% for i in range(100000) %}{% set ns.x = ns.x + [i] %}{% endfor %}{{ ns.x }}",
        "{% set ns = namespace(x=[1]) %}{% for i in range(33) %}{% set ns.x = ns.x + ns.x %}{% endfor %}{{ ns.x | length }}{{ ns.x }}",
        "{% set ns = namespace(x=[1]) %}{% for i in range(64) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}{{ ns.x == [ns.x, ns.x] }}",
        "{% set ns = namespace(x=[1]) %}{% for i in range(64) %}{% set ns.x = ns.x * 1000 %}{% endfor %}{{ ns.x }}",
        "{% set x = [1] * 200000 %}{{ (x + x + x + x + x + x + x + x) * 1000 == x * 8000 }}{{ (x * 8000) | length }}",
        "{% macro m(n, x) %}{{ m(n, [[[[[[[[[[[[[[[[x]]]]]]]]]]]]]]]]) }}{% endmacro %}{{ m(0, 1) }}",
        "{% macro m(x) %}{{ m([x, x]) }}{{ x == [x] }}{% endmacro %}{{ m(1) }}",
        "{% macro m(x) %}{{ m(x[0:]) }}{{ x | list }}{% endmacro %}{{ m([1]) }}",
        "{% for x in [[1]] recursive %}{{ loop([[x, x]]) }}{% endfor %}",
        "{% for x in [[1]] recursive %}{{ loop([x[0:]]) }}{% endfor %}",
        "{% macro m() %}{{ caller([[1]]) }}{% endmacro %}{% call(x) m() %}{{ x }}{% endcall %}",
        // What hides a binding from the rewriting, or would get around it.
        "{{ {'a': {}} ~ '{# ' }}{% set x = [x] %}{{ '#}' }}",
        "{#}{% set x = [x]) , (1 %}{% set x = [x) , (1] %}#}",
    ]
    .map(str::to_string)
    .into_iter()
    .chain([
        format!("{{{{ {}1 }}}}", "-".repeat(1_900)),
        format!("{{{{ {}1 }}}}", "not ".repeat(1_900)),
        format!("{{{{ 1{} }}}}", " + 1".repeat(900)),
        format!("{{{{ x{} }}}}", "|trim".repeat(900)),
        format!("{{{{ x{} }}}}", "['a']".repeat(600)),
        deep("(", ")"),
        deep("[", "]"),
        deep("-", ""),
        deep("not ", ""),
        deep("{'a':", "}"),
        "{% if true %}".repeat(20_000),
        "{% for x in messages %}".repeat(20_000),
        "{% set x = [x] %}".repeat(60_000) + "{{ x }}",
        "{% set x = {'a': x} %}".repeat(60_000) + "{{ x }}",
        "{% with x = [x] %}".repeat(140) + "{{ x }}" + &"{% endwith %}".repeat(140),
        "{% macro m() %}{{ n() }}{% endmacro %}{% set n = m %}".repeat(20_000),
        format!("{{{{ {}1{} }}}}", "[".repeat(900), "]".repeat(900)),
        format!("{{{{ {}1{} }}}}", "{'a':".repeat(480), "}".repeat(480)),
        format!("{{{{ [1]{} }}}}", "|batch(1)".repeat(300)),
        format!("{{% set x = [1] %}}{{{{ x{} }}}}", "[0:]".repeat(400)),
        "{% raw %}".to_string() + &"{% ".repeat(20_000),
        "{{ 'a".repeat(20_000),
        "{#".repeat(20_000),
        "{{ x".to_string() + &".a".repeat(20_000) + " }}",
        "{{ x".to_string() + &"|trim".repeat(20_000) + " }}",
        "{{ 1".to_string() + &" + 1".repeat(20_000) + " }}",
    ])
    .collect()
}

#[test]
fn hostile_templates_end_soon() {
    let (tokenizer, conversation) = (tokenizer(), conversation());
    for source in hostile() {
        let head: String = source.chars().take(120).collect();
        if std::env::var_os("SHOW").is_some() {
            eprintln!("{head}");
        }
        let start = Instant::now();
        one(&source, &tokenizer, &conversation);
        let took = start.elapsed();
        assert!(took < Duration::from_secs(120), "{took:?}: {head}");
        if took > Duration::from_secs(1) {
            eprintln!("{took:?}: {head}");
        }
    }
}

/// splitmix64, so that a run can be repeated.
struct Draws(u64);

impl Draws {
    fn below(&mut self, limit: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        ((z ^ (z >> 31)) % limit.max(1) as u64) as usize
    }
}

/// Changes a text in a few places: pieces are taken away, doubled, brought in from another text, or replaced by words of
/// the language.
fn mutated(seeds: &[String], draws: &mut Draws) -> String {
    const WORDS: [&str; 34] = [
        "{%",
        "%}",
        "{{",
        "}}",
        "{#",
        "#}",
        "-",
        "|",
        "'",
        "\"",
        "(",
        ")",
        "[",
        "]",
        "for",
        "in",
        "if",
        "else",
        "endfor",
        "endif",
        "set",
        "generation",
        "endgeneration",
        "messages",
        "loop",
        "safe",
        "\u{FDD0}",
        "99999999999999999999",
        "namespace(x=[ns, x])",
        "{% set ns.x = [ns.x, ns.x[0:]] %}",
        "{% set x = x + x %}",
        "{% macro m(x) %}",
        "m([x, ns])",
        "recursive",
    ];
    let boundary = |text: &str, at: usize| {
        (0..=at.min(text.len())).rev().find(|at| text.is_char_boundary(*at)).unwrap_or(0)
    };
    let mut text = seeds[draws.below(seeds.len())].clone();
    for _ in 0..1 + draws.below(6) {
        let from = boundary(&text, draws.below(text.len() + 1));
        let to = boundary(&text, from + draws.below(24));
        let piece = match draws.below(4) {
            0 => String::new(),
            1 => text[from..to].repeat(2 + draws.below(3)),
            2 => {
                let other = &seeds[draws.below(seeds.len())];
                let start = boundary(other, draws.below(other.len() + 1));
                other[start..boundary(other, start + draws.below(60))].to_string()
            }
            _ => WORDS[draws.below(WORDS.len())].to_string(),
        };
        text.replace_range(from..to.max(from), &piece);
        let most = boundary(&text, 4096);
        text.truncate(most);
    }
    text
}

#[test]
fn mutated_templates_never_panic() {
    let golden = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures/templates/golden.json");
    let golden: Value = serde_json::from_str(&std::fs::read_to_string(golden).unwrap()).unwrap();
    let mut seeds: Vec<String> = golden["templates"]
        .as_object()
        .unwrap()
        .values()
        .map(|it| it.as_str().unwrap().to_string())
        .collect();
    seeds.extend(
        ferrotune_data::template_names().map(|name| ferrotune_data::named_template(name).unwrap().source),
    );
    // With small numbers, so that a run takes no second.
    seeds.extend(hostile().into_iter().filter(|seed| seed.len() < 400).map(|seed| seed.replace("00000", "")));
    let (tokenizer, conversation) = (tokenizer(), conversation());
    seeds.iter().for_each(|seed| one(seed, &tokenizer, &conversation));
    let runs: usize = std::env::var("FUZZ_RUNS").ok().and_then(|runs| runs.parse().ok()).unwrap_or(2_000);
    let mut draws = Draws(std::env::var("FUZZ_SEED").ok().and_then(|seed| seed.parse().ok()).unwrap_or(42));
    let mut slowest = (Duration::ZERO, String::new());
    for _ in 0..runs {
        let source = mutated(&seeds, &mut draws);
        // A stack that overflows says nothing; the text is then in this file.
        if let Some(last) = std::env::var_os("FUZZ_LAST") {
            std::fs::write(last, &source).unwrap();
        }
        let start = Instant::now();
        one(&source, &tokenizer, &conversation);
        if start.elapsed() > slowest.0 {
            slowest = (start.elapsed(), source);
        }
    }
    eprintln!(
        "{runs} runs; the slowest took {:?}: {}",
        slowest.0,
        slowest.1.chars().take(200).collect::<String>()
    );
}
