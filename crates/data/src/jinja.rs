//! What Python's jinja2, as transformers sets it up, offers to chat templates and minijinja does not.
//!
//! - `{% generation %} … {% endgeneration %}`: minijinja has no custom tags, so the source text is rewritten
//!   before parsing into a filter block (in a `with`, because the original opens a scope). The filter puts two
//!   non-characters around the block's text; [`crate::template`] takes them out and keeps their positions.
//! - `tojson` with the spacing of Python's `json.dumps(ensure_ascii=False)` and no HTML escaping.
//! - `raise_exception(message)`, `strftime_now(format)`, and `'…' % value`.
//! - Python's string methods, dictionary methods (minijinja-contrib), and those it lacks.

mod clock;
mod held;
mod json;
mod methods;
mod rewrite;

use minijinja::syntax::SyntaxConfig;
use minijinja::value::ValueKind;
use minijinja::{Environment, Error, ErrorKind, Value};

pub use clock::Now;
pub(crate) use rewrite::{LONGEST_TAG, rewrite};

/// Opens a generated span in rendered text; a non-character, so no text contains it by accident.
pub(crate) const GENERATION_START: char = '\u{FDD0}';
/// Closes a generated span.
pub(crate) const GENERATION_END: char = '\u{FDD1}';

/// What one render may use, in minijinja's units: an instruction or 64 bytes each. Some seconds of work, 512 MiB at most.
const FUEL: u64 = 1 << 23;

/// An environment as transformers makes it (`trim_blocks`, `lstrip_blocks`, loop controls, the functions above).
pub(crate) fn environment(now: Now) -> Environment<'static> {
    let mut env = Environment::new();
    env.set_debug(false);
    env.set_fuel(Some(FUEL));
    if let Ok(syntax) = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build() {
        env.set_syntax(syntax);
    }
    env.set_unknown_method_callback(methods::python_method);
    env.set_formatter(|out, state, value| match f64::try_from(value.clone()) {
        Ok(number) if value.kind() == ValueKind::Number && !value.is_integer() && number.is_finite() => {
            out.write_str(&json::python_float(number)).map_err(Error::from)
        }
        _ => minijinja::escape_formatter(out, state, value),
    });
    env.add_filter("tojson", json::tojson);
    env.add_filter("center", methods::center);
    env.add_filter("format", methods::format_filter);
    env.add_filter("wordcount", |text: &str| text.split_whitespace().count());
    env.add_function("dict", methods::dict);
    env.add_filter("__generation", |text: &str| format!("{GENERATION_START}{text}{GENERATION_END}"));
    env.add_filter("__iterable", iterable);
    env.add_filter("__add", add_markup);
    env.add_filter("__held", held::held);
    env.add_filter("__kept", held::kept);
    env.add_test("iterable", |value: &Value| is_iterable(value));
    env.add_test("sequence", |value: &Value| {
        matches!(value.kind(), ValueKind::String | ValueKind::Undefined) || value.len().is_some()
    });
    env.add_test("callable", |value: &Value| value.kind() == ValueKind::Plain);
    env.add_function("raise_exception", |message: String| -> Result<Value, Error> {
        Err(Error::new(ErrorKind::InvalidOperation, message))
    });
    env.add_function("strftime_now", move |format: &str| now.format(format));
    env
}

/// minijinja iterates over none as over nothing; Python raises, and templates rely on either.
fn is_iterable(value: &Value) -> bool {
    !matches!(value.kind(), ValueKind::None | ValueKind::Bool | ValueKind::Number)
}

fn iterable(value: Value) -> Result<Value, Error> {
    if is_iterable(&value) {
        return Ok(value);
    }
    Err(Error::new(ErrorKind::InvalidOperation, format!("a value of kind {} is not iterable", value.kind())))
}

/// `+` where one side is marked safe: the other is escaped, as Python's markupsafe does.
fn add_markup(left: &Value, right: &Value) -> Result<Value, Error> {
    let (Some(a), Some(b)) = (left.as_str(), right.as_str()) else {
        let message = format!("can only concatenate str, not {} and {}", left.kind(), right.kind());
        return Err(Error::new(ErrorKind::InvalidOperation, message));
    };
    let escaped = |text: &str| {
        text.replace('&', "&amp;")
            .replace('<', "&lt;")
            .replace('>', "&gt;")
            .replace('\'', "&#39;")
            .replace('"', "&#34;")
    };
    Ok(match (left.is_safe(), right.is_safe()) {
        (false, false) => Value::from(format!("{a}{b}")),
        (true, true) => Value::from_safe_string(format!("{a}{b}")),
        (true, false) => Value::from_safe_string(format!("{a}{}", escaped(b))),
        (false, true) => Value::from_safe_string(format!("{}{b}", escaped(a))),
    })
}

/// A JSON value as templates see it; the order of keys stays.
pub(crate) fn from_json(value: &serde_json::Value) -> Value {
    match value {
        serde_json::Value::Null => Value::from(()),
        serde_json::Value::Bool(flag) => Value::from(*flag),
        serde_json::Value::Number(number) => match (number.as_i64(), number.as_u64()) {
            (Some(n), _) => Value::from(n),
            (None, Some(n)) => Value::from(n),
            (None, None) => Value::from(number.as_f64().unwrap_or(f64::NAN)),
        },
        serde_json::Value::String(text) => Value::from(text.as_str()),
        serde_json::Value::Array(items) => items.iter().map(from_json).collect(),
        serde_json::Value::Object(fields) => {
            Value::from_pairs(fields.iter().map(|(key, value)| (key.as_str(), from_json(value))))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(source: &str, expected: &str) {
        let mut env = environment(Now::parse("2026-02-03T04:05:06").unwrap());
        let source = rewrite(source).source;
        if let Err(error) = env.add_template_owned("test", source) {
            assert_eq!(error.detail(), Some(expected));
            return;
        }
        let value =
            serde_json::json!({"b": [1, 2.0, "é<\"'"], "a": {"x": null, "y": true}, "e": [], "n": null});
        let rendered =
            env.get_template("test").unwrap().render(minijinja::context! { v => from_json(&value) });
        let rendered = rendered.unwrap_or_else(|error| error.detail().unwrap_or("error").to_string());
        assert_eq!(rendered, expected);
    }

    #[test]
    fn tojson_is_json_dumps() {
        check(
            "{{ v | tojson }}",
            r#"{"b": [1, 2.0, "é<\"'"], "a": {"x": null, "y": true}, "e": [], "n": null}"#,
        );
        check("{{ v.b | tojson(indent=2) }}", "[\n  1,\n  2.0,\n  \"é<\\\"'\"\n]");
        check("{{ v.e | tojson(indent=4) }}", "[]");
        check("{{ v.a | tojson(separators=(',', ':')) }}", r#"{"x":null,"y":true}"#);
        check("{{ v.b[2] | tojson(ensure_ascii=True) }}", r#""\u00e9<\"'""#);
        check(
            "{{ [1e20, 0.00001, 0.1, 12345678901234567890] | tojson }}",
            "[1e+20, 1e-05, 0.1, 12345678901234567890]",
        );
    }

    #[test]
    fn functions_and_methods() {
        check("{{ strftime_now('%d %b %Y %H:%M:%S %A %j %-d') }}", "03 Feb 2026 04:05:06 Tuesday 034 3");
        check("{{ raise_exception('no ' ~ 'way') }}", "no way");
        check("{{ 'a</think>b'.split('</think>')[-1].lstrip('\n') }}", "b");
        check("{{ 'a-b-c'.rsplit('-', 1) | join('|') }}", "a-b|c");
        check("{{ 'a-b'.partition('-') | join('|') }}{{ 'x'.removeprefix('x') }}", "a|-|b");
        check(
            "{% set ns = namespace(i=0) %}{% for x in [1, 2, 3] %}{% if x == 2 %}{% continue %}{% endif %}\
               {% set ns.i = ns.i + x %}{% endfor %}{{ ns.i }}",
            "4",
        );
        check("{{ dict(a=1).items() | list | length }}", "1");
        check("{% for x in v.n %}{% endfor %}", "a value of kind none is not iterable");
        check("{{ 'a' if v.n is iterable else 'b' }}", "b");
        check("{{ '<'|safe + '<' + v.b[2] }}", "<&lt;é&lt;&#34;&#39;");
    }

    #[test]
    fn percent_formats_as_in_python() {
        check(
            "{{ '%s' % v.a.y }}{{ '%d%%' % 3 }}{% set x = \"[%s]\" % 'a'|upper ~ 'b' %}{{ x }}",
            "True3%[A]b",
        );
        check("{{ '%s|%5.2f|%03d|%-3s|%x' % ('a', 1.5, 7, 'b', 255) }}", "a| 1.50|007|b  |ff");
        check("{{ '%s %s' % (v.b[0], ['x'][0].upper()) + '%' }}{{ 7 % 4 }}{{ v.b[0] % 2 }}", "1 X%31");
        check("{{ '%s' % ('%s' % (1)) }}{{ '%s' % v.n }}{{ '%.1f' % 2 }}", "1None2.0");
    }

    #[test]
    fn fields_of_formats_are_bounded_and_text_is_not() {
        let wide = "format: a field is too wide";
        let refused = |source: &str| {
            let env = environment(Now::parse("2026-02-03T04:05:06").unwrap());
            let error = env.render_str(&rewrite(source).source, ()).unwrap_err();
            assert_eq!(error.detail(), Some(wide), "{source}");
        };
        for source in [
            "{{ '{:.99999e}'.format(1.5) }}",
            "{{ '{0[}]:.99999e}'.format({'}': 1.5}) }}",
            "{{ '{:}<.99999e}'.format(1.5) }}",
            "{{ '%.99999e' | format(1.5) }}",
            "{{ '%.99999e' % 1.5 }}",
            "{{ '%.*e' % (99999, 1.5) }}",
            "{{ '%(a).99999e' | format(a=1.5) }}",
            "{{ '%%%.99999e' | format(1.5) }}",
        ] {
            refused(source);
        }
        check("{{ 'of 99999 {{99999}} {:.1f}'.format(1.5) }}", "of 99999 {99999} 1.5");
        check("{{ '%d%% 99999' | format(5) }}{{ '%s' | format(99999) }}", "5% 9999999999");
    }

    #[test]
    fn names_hold_what_is_finite() {
        let loops = |start: &str, step: &str| {
            format!(
                "{{% set ns = namespace(x={start}) %}}{{% for i in range(1000) %}}{{% set ns.x = {step} %}}{{% endfor %}}"
            )
        };
        let within = "a namespace, a loop or a macro can't be within another value";
        check("{% set ns = namespace() %}{% set ns.n = ns %}", within);
        check("{% set ns = namespace() %}{% set ns.n = [{'a': ns}] %}", within);
        check("{% set ns = namespace() %}{% set a = namespace(b=ns) %}", within);
        check("{% macro m() %}{% endmacro %}{% set a = [m] %}", within);
        check(&loops("1", "[ns.x]"), "a value nests too deep");
        check(&loops("1", "{'a': ns.x}"), "a value nests too deep");
        check(&loops("[1]", "ns.x + ns.x"), "a value is too large");
        check(&loops("1", "[ns.x, ns.x]"), "a value is too large");
        check("{% macro m(x, y=1) %}{{ m([[[[x]]]]) }}{% endmacro %}{{ m(1) }}", "a value nests too deep");
        check("{% for x in [[1]] recursive %}{{ loop([[x, x]]) }}{% endfor %}", "a value is too large");
        check("{% with x = [1] * 1000000 %}{% endwith %}", "a value is too large");
        check("{{ {'a': {}} ~ '{# ' }}{% set x = [1] * 1000000 %}{{ '#}' }}", "a value is too large");
        check("{% set x = [1]) , (1 %}", "unexpected `)`, expected end of block");
    }

    #[test]
    fn names_hold_everything_else() {
        check("{% set ns = namespace(a=1) %}{% set n = ns %}{% set n.a = 2 %}{{ ns.a }}", "2");
        check(
            "{% macro m(ns, k='b') -%}\n{% set ns.a = k %}{% endmacro %}{% set n = namespace() %}{{ m(n) }}{{ n.a }}",
            "b",
        );
        check(
            "{% for i in [1] %}{% set outer = loop %}{% for j in [1, 2] %}{{ outer.index }}{{ loop.index }}{% endfor %}{% endfor %}",
            "1112",
        );
        check("{% set x = [1, 2, 3][1:] + [4] %}{{ x }}{{ x[0] }}{{ [x[1:]] | length }}", "[2, 3, 4]21");
        check("{% set a, b = 1, [2] %}{{ a }}{{ b }}{% set c %}x{% endset %}{{ c }}", "1[2]x");
        check("{% with a = 1, b = [2] -%}\n {{ a }}{{ b }}{% endwith %}{{ a is defined }}", "1[2]False");
        check(
            "{% macro m() %}{{ caller('x', 2) }}{% endmacro %}{% call(a, b) m() %}{{ a }}{{ b }}{% endcall %}",
            "x2",
        );
        check("{% for a, b in {'x': [[1, []]]}.x recursive %}{{ a }}{{ loop(b) }}{% endfor %}", "1");
        check(
            "{% set a = {'b': (1, 'c')} %}{{ a }}{% set u = undefined_name %}{{ u is defined }}",
            "{'b': (1, 'c')}False",
        );
    }

    #[test]
    fn generation_becomes_marks() {
        check("a{% generation %}b{% endgeneration %}c", "a\u{FDD0}b\u{FDD1}c");
        check("a \n  {%- generation -%} \n b{%+ endgeneration -%} c", "a\u{FDD0}b\u{FDD1}c");
        check("{# {% generation %} #}{{ '{% generation %}' }}\r\n", "{% generation %}");
    }
}
