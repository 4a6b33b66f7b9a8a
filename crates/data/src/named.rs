//! Chat templates by the names that LLaMA-Factory gives them: slots, from which a jinja text is made.
//!
//! The formats are those of LLaMA-Factory's `data/template.py` (at ff6d4d12) and of the models' own templates; tests
//! compare with strings that LLaMA-Factory itself made (`tests/fixtures/make_named.py`). What a template has no form
//! for (tools, other roles) it refuses by raising.

mod table;

use table::{Slots, TABLE, Tools};

/// A chat template that goes by a name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NamedTemplate {
    /// Its jinja text.
    pub source: String,
    /// The token that ends a turn, where the tokenizer's own EOS doesn't.
    pub eos_token: Option<&'static str>,
    /// Whether it knows thoughts, so that `enable_thinking` counts.
    pub thinks: bool,
}

/// The template of this name.
pub fn named_template(name: &str) -> Option<NamedTemplate> {
    let slots = TABLE.iter().find(|slots| slots.name == name)?;
    Some(NamedTemplate { source: source(slots), eos_token: slots.eos, thinks: slots.thoughts.is_some() })
}

/// All names.
pub fn template_names() -> impl Iterator<Item = &'static str> {
    TABLE.iter().map(|slots| slots.name)
}

/// A jinja string literal.
fn literal(text: &str) -> String {
    format!("'{}'", text.replace('\\', "\\\\").replace('\'', "\\'").replace('\n', "\\n"))
}

/// An expression for a slot, with `content` in the place of `{c}`.
fn expression(slot: &str, content: &str) -> String {
    let mut terms = Vec::new();
    let mut rest = slot;
    let marks = [("{c}", content), ("{bos}", "bos_token"), ("{eos}", "eos_token")];
    while let Some((at, mark, value)) =
        marks.iter().filter_map(|(mark, value)| Some((rest.find(mark)?, *mark, *value))).min()
    {
        if at > 0 {
            terms.push(literal(&rest[..at]));
        }
        terms.push(value.to_string());
        rest = &rest[at + mark.len()..];
    }
    if !rest.is_empty() || terms.is_empty() {
        terms.push(literal(rest));
    }
    terms.join(" ~ ")
}

fn print(slot: &str) -> String {
    if slot.is_empty() { String::new() } else { format!("{{{{ {} }}}}", expression(slot, "content")) }
}

/// Takes the first system message off as `system`, and adds tools to it.
fn opening(slots: &Slots) -> String {
    let name = slots.name;
    let tools = match slots.tools {
        Tools::None => format!(
            "{{% if tools %}}{{{{ raise_exception('template `{name}` has no form for tools; use the chat template that \
             comes with the model') }}}}{{% endif %}}"
        ),
        Tools::Hermes => format!(
            "{{% if tools %}}{{% set ns = namespace(tools='') %}}{{% for tool in tools %}}\
             {{% set ns.tools = ns.tools ~ '\\n' ~ (tool | tojson) %}}{{% endfor %}}\
             {{% set system = system ~ {} ~ ns.tools ~ {} %}}{{% endif %}}",
            literal(table::HERMES_TOOLS.0),
            literal(table::HERMES_TOOLS.1)
        ),
    };
    format!(
        "{{% if messages and messages[0].role in ['system', 'developer'] %}}\
         {{% set system = messages[0].content or {default} %}}{{% set turns = messages[1:] %}}\
         {{% else %}}{{% set system = {default} %}}{{% set turns = messages %}}{{% endif %}}{tools}",
        default = literal(slots.default_system)
    )
}

/// What stands before an answer without a thought, and what becomes of thoughts that the data has.
fn thoughts(slots: &Slots) -> String {
    let Some((open, close)) = slots.thoughts else { return String::new() };
    let (open_word, close_word) = (literal(open.trim()), literal(close.trim()));
    let (empty, open, close) = (literal(&format!("{open}{close}")), literal(open), literal(close));
    format!(
        "{{% if (enable_thinking is defined and enable_thinking is false) or (discard_thoughts and not loop.last) %}}\
         {{% if {open} in content and {close} in content %}}\
         {{% set content = (content.split({open})[0] ~ content.split({close}, 1)[1]).lstrip('\\n') %}}{{% endif %}}\
         {{% endif %}}\
         {{% if {open_word} not in content and {close_word} not in content and not (discard_thoughts and not loop.last) %}}\
         {{{{ {empty} }}}}{{% endif %}}"
    )
}

fn source(slots: &Slots) -> String {
    let system = expression(slots.system, "system");
    let (before, fused) = if slots.system_in_first_turn {
        (
            String::new(),
            format!("{{% if loop.first and system %}}{{% set content = {system} ~ content %}}{{% endif %}}"),
        )
    } else {
        (format!("{{% if system %}}{{{{ {system} }}}}{{% endif %}}"), String::new())
    };
    let calls = match slots.tools {
        Tools::None => format!(
            "{{% if message.tool_calls %}}{{{{ raise_exception('template `{}` has no form for tool calls; use the chat \
             template that comes with the model') }}}}{{% endif %}}",
            slots.name
        ),
        Tools::Hermes => "{% if message.tool_calls %}{% set ns = namespace(calls=content) %}\
             {% for call in message.tool_calls %}{% set call = call.function or call %}{% set arguments = \
             call.arguments if call.arguments is string else call.arguments | tojson %}{% set ns.calls = ns.calls ~ \
             ('\\n' if ns.calls else '') ~ '<tool_call>\\n{\"name\": \"' ~ call.name ~ '\", \"arguments\": ' ~ arguments ~ \
             '}\\n</tool_call>' %}{% endfor %}{% set content = ns.calls %}{% endif %}"
            .to_string(),
    };
    let observation = match slots.tools {
        Tools::None => print(slots.observation),
        // Results that follow each other share a turn.
        Tools::Hermes => {
            let (open, close) = slots.observation.split_once("{c}").unwrap_or((slots.observation, ""));
            format!(
                "{{% if loop.first or loop.previtem.role != 'tool' %}}{{{{ {} }}}}{{% else %}}\
                 {{{{ '\\n</tool_response>\\n<tool_response>\\n' }}}}{{% endif %}}{{{{ content }}}}\
                 {{% if loop.last or loop.nextitem.role != 'tool' %}}{{{{ {} }}}}{{% endif %}}",
                literal(open),
                literal(close)
            )
        }
    };
    let last_eos = if slots.eos_at_the_end { "{% if loop.last %}{{ eos_token }}{% endif %}" } else { "" };
    let empty_thought = slots.thoughts.map_or(String::new(), |(open, close)| {
        let empty = literal(&format!("{open}{close}"));
        format!("{{% if enable_thinking is defined and not enable_thinking %}}{{{{ {empty} }}}}{{% endif %}}")
    });
    format!(
        "{opening}{prefix}{before}{{% for message in turns %}}{{% set content = message.content | default('') %}}\
         {{% if message.role == 'user' %}}{fused}{user}\
         {{% elif message.role == 'tool' %}}{observation}\
         {{% elif message.role == 'assistant' %}}{header}{calls}{thoughts}{assistant}{last_eos}\
         {{% else %}}{{{{ raise_exception('template `{name}` has no form for a turn of `' ~ message.role ~ '` here') }}}}\
         {{% endif %}}{{% endfor %}}\
         {{% if add_generation_prompt %}}{header}{empty_thought}{{% endif %}}",
        opening = opening(slots),
        prefix = print(slots.prefix),
        user = print(slots.user),
        header = print(slots.header),
        thoughts = thoughts(slots),
        assistant = print(slots.assistant),
        name = slots.name,
    )
}
