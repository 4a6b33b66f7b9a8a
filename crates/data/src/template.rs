//! Chat templates: a conversation to the text the model sees.
//!
//! Output is byte-equal to transformers' `apply_chat_template`; the settings mirrored are in [`crate::jinja`].

use std::collections::BTreeMap;
use std::ops::Range;

use minijinja::Environment;
use serde_json::{Map, Value};

use crate::error::{Error, Result};
use crate::jinja::{self, GENERATION_END, GENERATION_START, LONGEST_TAG, Now};

/// What transformers puts behind a message that is to be continued, to see where it comes out.
const CONTINUE_TAG: &str = "CONTINUE_FINAL_MESSAGE_TAG ";

/// Longest text, in bytes, that is more than eight times what the template was given; hostile templates make more.
const LONGEST_OF_ITSELF: usize = 1 << 20;

/// A parsed chat template with the special tokens it may name.
#[derive(Debug)]
pub struct Template {
    name: String,
    env: Environment<'static>,
    special_tokens: BTreeMap<String, String>,
    marks_generation: bool,
    has_tool_use: bool,
    source: Value,
}

/// How a rendered conversation ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ending {
    /// After its last turn.
    Complete,
    /// With what opens a turn of the assistant (`add_generation_prompt`).
    GenerationPrompt,
    /// Inside its last turn, which the model goes on with (`continue_final_message`).
    ContinueFinalMessage,
}

/// What a template made of a conversation.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Rendered {
    /// The text.
    pub text: String,
    /// What stood between `{% generation %}` and `{% endgeneration %}`, in Unicode code points of `text`.
    pub generation_spans: Vec<Range<usize>>,
}

impl Template {
    /// Parses `source`. `special_tokens` are `bos_token`, `eos_token` … by the names templates use.
    ///
    /// Fails where the template does not parse, with the line.
    pub fn new(name: &str, source: &str, special_tokens: &BTreeMap<String, String>) -> Result<Template> {
        Template::from_value(name, &Value::from(source), special_tokens)
    }

    /// As [`Template::new`], from the value of `chat_template` in `tokenizer_config.json`: one text, or a list
    /// of `{name, template}` (or a map), of which `tool_use` is taken where there are tools, else `default`.
    pub fn from_value(
        name: &str,
        source: &Value,
        special_tokens: &BTreeMap<String, String>,
    ) -> Result<Template> {
        Template::from_value_at(name, source, special_tokens, Now::system())
    }

    /// As [`Template::from_value`], with the date and time `strftime_now` answers with.
    pub fn from_value_at(
        name: &str,
        source: &Value,
        special_tokens: &BTreeMap<String, String>,
        now: Now,
    ) -> Result<Template> {
        let mut template = Template {
            name: name.to_string(),
            env: jinja::environment(now),
            special_tokens: special_tokens.clone(),
            marks_generation: false,
            has_tool_use: false,
            source: source.clone(),
        };
        for (key, text) in named_texts(name, source)? {
            let rewritten = jinja::rewrite(text);
            if rewritten.longest_tag > LONGEST_TAG {
                let length = rewritten.longest_tag;
                return Err(
                    template.error(&format!("a tag of {length} tokens is too long (at most {LONGEST_TAG})"))
                );
            }
            template.marks_generation |= rewritten.marks_generation;
            template.has_tool_use |= key == "tool_use";
            template
                .env
                .add_template_owned(key.to_string(), rewritten.source)
                .map_err(|error| template_error(name, &error))?;
        }
        Ok(template)
    }

    /// The name given to it: a file, or the model it came with.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The value it was made from: a text, or a list of named texts.
    pub fn source(&self) -> &Value {
        &self.source
    }

    /// Whether it says by `{% generation %}` what the assistant generated.
    pub fn marks_generation(&self) -> bool {
        self.marks_generation
    }

    /// The special tokens it was given.
    pub fn special_tokens(&self) -> &BTreeMap<String, String> {
        &self.special_tokens
    }

    /// Renders `messages` (objects with `role`, `content` …) and `tools`, as transformers' `apply_chat_template` does:
    /// keys that are null are left out, and a thought is there under each of its three names.
    ///
    /// `extra` are further variables (`enable_thinking` …); they win over everything else. Fails with the
    /// template's own message where it raises, and where it would take too long or too much memory.
    pub fn render(
        &self,
        messages: &[Value],
        tools: Option<&Value>,
        ending: Ending,
        extra: &Map<String, Value>,
    ) -> Result<Rendered> {
        let mut messages: Vec<Value> = messages.iter().map(normalized).collect();
        if ending != Ending::ContinueFinalMessage {
            let marked = self.render_marked(&messages, tools, ending, extra)?;
            return Ok(take_marks(&marked));
        }
        let content = self.tag_final(&mut messages)?;
        let text = take_marks(&self.render_marked(&messages, tools, Ending::Complete, extra)?).text;
        let at = text.rfind(CONTINUE_TAG.trim_end()).filter(|_| text.contains(python_strip(&content)));
        let Some(at) = at else {
            return Err(self.error(
                "continue_final_message: the final message does not appear in what the template renders",
            ));
        };
        // Where the template trims the message, the space of the tag is gone, and so is any before it.
        let kept = &text[..at];
        let kept = if text[at..].starts_with(CONTINUE_TAG) { kept } else { python_strip_end(kept) };
        Ok(Rendered { text: kept.to_string(), generation_spans: Vec::new() })
    }

    /// Puts [`CONTINUE_TAG`] behind the text of the last message, and returns that text.
    fn tag_final(&self, messages: &mut [Value]) -> Result<String> {
        let last = messages.last_mut().and_then(|message| message.get_mut("content"));
        let text = match last {
            Some(Value::Array(parts)) => parts.iter_mut().rev().find_map(|part| part.get_mut("text")),
            content => content,
        };
        match text {
            Some(Value::String(text)) if self.source.to_string().contains("content") => {
                let content = text.clone();
                text.push_str(CONTINUE_TAG);
                Ok(content)
            }
            _ => Err(self.error("continue_final_message: the final message has no content to continue")),
        }
    }

    fn error(&self, message: &str) -> Error {
        Error::Template { name: self.name.clone(), message: message.to_string() }
    }

    fn render_marked(
        &self,
        messages: &[Value],
        tools: Option<&Value>,
        ending: Ending,
        extra: &Map<String, Value>,
    ) -> Result<String> {
        let mut variables: BTreeMap<&str, minijinja::Value> = BTreeMap::new();
        for (key, token) in &self.special_tokens {
            variables.insert(key, minijinja::Value::from(token.as_str()));
        }
        variables.insert("messages", messages.iter().map(jinja::from_json).collect());
        variables.insert("tools", tools.map_or_else(|| minijinja::Value::from(()), jinja::from_json));
        variables.insert("documents", minijinja::Value::from(()));
        variables.insert("add_generation_prompt", minijinja::Value::from(ending == Ending::GenerationPrompt));
        for (key, value) in extra {
            variables.insert(key, jinja::from_json(value));
        }
        let has_tools = tools.is_some_and(|tools| !tools.is_null());
        let key = if has_tools && self.has_tool_use { "tool_use" } else { "default" };
        let template = self.env.get_template(key).map_err(|error| template_error(&self.name, &error))?;
        let text = template.render(variables).map_err(|error| template_error(&self.name, &error))?;
        // Tokens take many times the memory of their text.
        if text.len() > LONGEST_OF_ITSELF {
            let given = Value::from(messages).to_string().len() + tools.map_or(0, |it| it.to_string().len());
            if text.len() > LONGEST_OF_ITSELF.max(given.saturating_mul(8)) {
                return Err(self.error(&format!("it makes {} bytes of {given}", text.len())));
            }
        }
        Ok(text)
    }
}

/// A message without keys that are null, and with its thought under every name that templates read.
fn normalized(message: &Value) -> Value {
    let Some(fields) = message.as_object() else { return message.clone() };
    let fields = fields.iter().filter(|(_, value)| !value.is_null());
    let mut fields: Map<String, Value> = fields.map(|(key, value)| (key.clone(), value.clone())).collect();
    let thought =
        ["reasoning_content", "thinking", "reasoning"].iter().find_map(|key| fields.get(*key)).cloned();
    if let Some(thought) = thought {
        // Its place is the first, whatever its value: as in Python's `{"thinking": …, **message}`.
        let alias = fields.shift_remove("thinking").unwrap_or_else(|| thought.clone());
        fields.shift_insert(0, "thinking".to_string(), alias);
        fields.insert("reasoning_content".to_string(), thought);
    }
    Value::Object(fields)
}

/// As Python's `str.strip`.
fn python_strip(text: &str) -> &str {
    python_strip_end(text).trim_start_matches(is_python_space)
}

fn python_strip_end(text: &str) -> &str {
    text.trim_end_matches(is_python_space)
}

/// Python's `str.isspace`, which also counts the four information separators.
pub(crate) fn is_python_space(c: char) -> bool {
    c.is_whitespace() || ('\u{1c}'..='\u{1f}').contains(&c)
}

/// The named texts of a `chat_template` value; a `default` among them.
fn named_texts<'a>(name: &str, source: &'a Value) -> Result<Vec<(&'a str, &'a str)>> {
    let wrong = |message: &str| Error::Template { name: name.to_string(), message: message.to_string() };
    let texts: Vec<(&str, &str)> = match source {
        Value::String(text) => vec![("default", text)],
        Value::Object(map) => {
            map.iter().filter_map(|(key, text)| Some((key.as_str(), text.as_str()?))).collect()
        }
        Value::Array(list) => list
            .iter()
            .filter_map(|entry| Some((entry.get("name")?.as_str()?, entry.get("template")?.as_str()?)))
            .collect(),
        _ => return Err(wrong("expected a text or a list of {name, template}")),
    };
    match texts.as_slice() {
        // A single named template is the default, whatever its name.
        [(_, text)] => Ok(vec![("default", text)]),
        _ if texts.iter().any(|(key, _)| *key == "default") => Ok(texts),
        _ => Err(wrong("none of its named templates is called `default`")),
    }
}

fn template_error(name: &str, error: &minijinja::Error) -> Error {
    let mut message = error.detail().map_or_else(|| error.kind().to_string(), str::to_string);
    let raised = error.kind() == minijinja::ErrorKind::InvalidOperation;
    if let (Some(line), false) = (error.line(), raised) {
        message = format!("{message} (line {line})");
    }
    Error::Template { name: name.to_string(), message }
}

/// Takes the generation marks out of a rendered text.
fn take_marks(marked: &str) -> Rendered {
    let mut text = String::with_capacity(marked.len());
    let mut spans = Vec::new();
    let mut start = None;
    let mut length = 0;
    for c in marked.chars() {
        match c {
            GENERATION_START => start = Some(length),
            GENERATION_END => spans.extend(start.take().map(|start| start..length)),
            c => {
                text.push(c);
                length += 1;
            }
        }
    }
    Rendered { text, generation_spans: spans }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn named_templates_are_chosen_by_tools() {
        let source = json!([
            {"name": "default", "template": "plain {{ messages[0].content }}"},
            {"name": "tool_use", "template": "tools {{ tools | length }}"},
        ]);
        let template = Template::from_value("t", &source, &BTreeMap::new()).unwrap();
        let messages = [json!({"role": "user", "content": "hi"})];
        let check = |tools: Option<Value>, expected: &str| {
            let rendered = template.render(&messages, tools.as_ref(), Ending::Complete, &Map::new()).unwrap();
            assert_eq!(rendered.text, expected);
        };
        check(None, "plain hi");
        check(Some(Value::Null), "plain hi");
        check(Some(json!([{}])), "tools 1");
    }

    #[test]
    fn errors_say_what_and_where() {
        let check = |source: &str, expected: &str| {
            let error = Template::new("t", source, &BTreeMap::new())
                .and_then(|template| template.render(&[], None, Ending::Complete, &Map::new()))
                .unwrap_err();
            assert_eq!(error.to_string(), expected);
        };
        check("\n{% if %}", "chat template `t`: unexpected end of block (line 2)");
        check("{{ raise_exception('roles must alternate') }}", "chat template `t`: roles must alternate");
        let error = Template::from_value("t", &json!([{"name": "a"}]), &BTreeMap::new()).unwrap_err();
        assert_eq!(error.to_string(), "chat template `t`: none of its named templates is called `default`");
    }

    #[test]
    fn spans_count_code_points() {
        let source = "é{% generation %}ü😀{% endgeneration %}{{ x }}";
        let template = Template::new("t", source, &BTreeMap::new()).unwrap();
        let extra = Map::from_iter([("x".to_string(), json!("z"))]);
        let rendered = template.render(&[], None, Ending::Complete, &extra).unwrap();
        assert_eq!(
            (rendered.text.as_str(), rendered.generation_spans.as_slice()),
            ("éü😀z", Some(1..3).as_slice())
        );
    }
}
