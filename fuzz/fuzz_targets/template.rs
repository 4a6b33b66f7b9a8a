#![no_main]

use std::collections::BTreeMap;

use ferrotune_data::{Ending, Template, assistant_spans};
use serde_json::{Map, json};

libfuzzer_sys::fuzz_target!(|source: &str| {
    let Ok(template) = Template::new("fuzz", source, &BTreeMap::new()) else { return };
    let messages = [
        json!({"role": "system", "content": "s"}),
        json!({"role": "user", "content": " u "}),
        json!({"role": "assistant", "content": "<think>t</think>a", "tool_calls": [{"function": {"name": "f", "arguments": {"a": 1}}}]}),
        json!({"role": "tool", "content": "{}"}),
        json!({"role": "assistant", "content": "b"}),
    ];
    for ending in [Ending::GenerationPrompt, Ending::ContinueFinalMessage] {
        let _ = template.render(&messages, None, ending, &Map::new());
    }
    let _ = assistant_spans(&template, &messages, None, &Map::new());
});
