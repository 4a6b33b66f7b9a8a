//! Methods of Python's strings and lists, and filters of jinja2, that minijinja and its contrib lack.

use minijinja::value::{Kwargs, Rest, ValueKind, ValueOrKwargs};
use minijinja::{Error, ErrorKind, State, Value};

pub(super) fn python_method(
    state: &mut State,
    value: &Value,
    method: &str,
    args: &[Value],
) -> Result<Value, Error> {
    if let (Some(text), ValueKind::String) = (value.as_str(), value.kind()) {
        let argument = args.first().and_then(|a| a.as_str().map(str::to_string));
        match (method, argument) {
            ("removeprefix", Some(prefix)) => {
                return Ok(Value::from(text.strip_prefix(prefix.as_str()).unwrap_or(text)));
            }
            ("removesuffix", Some(suffix)) => {
                return Ok(Value::from(text.strip_suffix(suffix.as_str()).unwrap_or(text)));
            }
            ("partition", Some(separator)) => {
                let parts = match text.split_once(separator.as_str()) {
                    Some((before, after)) => vec![before, separator.as_str(), after],
                    None => vec![text, "", ""],
                };
                return Ok(parts.into_iter().map(Value::from).collect());
            }
            ("rpartition", Some(separator)) => {
                let parts = match text.rsplit_once(separator.as_str()) {
                    Some((before, after)) => vec![before, separator.as_str(), after],
                    None => vec!["", "", text],
                };
                return Ok(parts.into_iter().map(Value::from).collect());
            }
            ("rsplit", Some(separator)) if !separator.is_empty() => {
                let limit = args.get(1).and_then(|n| n.as_i64()).filter(|n| *n >= 0);
                let mut parts: Vec<&str> = match limit {
                    Some(limit) => text.rsplitn(limit as usize + 1, separator.as_str()).collect(),
                    None => text.rsplit(separator.as_str()).collect(),
                };
                parts.reverse();
                return Ok(parts.into_iter().map(Value::from).collect());
            }
            ("center" | "ljust" | "rjust" | "zfill", _) => {
                let width = args.first().and_then(Value::as_usize).unwrap_or(0);
                let fill = args.get(1).and_then(|fill| fill.as_str()?.chars().next()).unwrap_or(' ');
                return padded(text, width, method, fill).map(Value::from);
            }
            ("format", _) if widths(text) > WIDEST_FIELD => {
                return Err(Error::new(ErrorKind::InvalidOperation, "format: a field is too wide"));
            }
            ("splitlines", None) if args.is_empty() => {
                return Ok(lines(text).into_iter().map(Value::from).collect());
            }
            ("title", None) => return Ok(Value::from(title(text))),
            ("swapcase", None) => return Ok(text.chars().flat_map(swapped).collect::<String>().into()),
            ("casefold", None) => return Ok(Value::from(text.to_lowercase())),
            ("index" | "rindex", Some(part)) => {
                let at = if method == "index" { text.find(&part) } else { text.rfind(&part) };
                let at = at.ok_or_else(|| Error::new(ErrorKind::InvalidOperation, "substring not found"))?;
                return Ok(Value::from(text[..at].chars().count()));
            }
            _ => {}
        }
    }
    if method == "index" && value.kind() == ValueKind::Seq {
        let wanted = args.first().unwrap_or(&Value::UNDEFINED);
        let at = value.try_iter()?.position(|item| item == *wanted);
        let missing = || Error::new(ErrorKind::InvalidOperation, format!("{wanted} is not in list"));
        return at.map(Value::from).ok_or_else(missing);
    }
    minijinja_contrib::pycompat::unknown_method_callback(state, value, method, args)
}

/// Widest text that is filled up: hostile templates ask for more.
const WIDEST: usize = 1 << 20;
/// Widest field of a format. Rust's `{:.65535e}` panics.
const WIDEST_FIELD: usize = 1 << 15;

/// The sum of all numbers within the fields of a format: widths, precisions and places.
fn widths(format: &str) -> usize {
    // An item's name or a filling may be a brace, and then nothing tells where a field ends.
    if format.contains('[') || format.contains(":}") {
        return sum_of_numbers(format);
    }
    let (mut sum, mut rest) = (0usize, format);
    while let Some(open) = rest.find('{') {
        rest = &rest[open + 1..];
        if let Some(text) = rest.strip_prefix('{') {
            rest = text;
            continue;
        }
        let (field, text) = rest.split_at(rest.find('}').unwrap_or(rest.len()));
        sum = sum.saturating_add(sum_of_numbers(field));
        rest = text;
    }
    sum
}

/// The same of a format with `%`, where a `*` takes its number from the values.
fn percent_widths(format: &str, values: &[ValueOrKwargs]) -> usize {
    let (mut sum, mut starred, mut rest) = (0usize, false, format);
    while let Some(open) = rest.find('%') {
        rest = &rest[open + 1..];
        if let Some((_, spec)) = rest.strip_prefix('(').and_then(|key| key.split_once(')')) {
            rest = spec;
        }
        let end = rest.find(|c: char| !"#0123456789- +.*".contains(c)).unwrap_or(rest.len());
        let (spec, text) = rest.split_at(end);
        sum = sum.saturating_add(sum_of_numbers(spec));
        starred |= spec.contains('*');
        rest = text.strip_prefix('%').unwrap_or(text);
    }
    let from_values = values.iter().filter(|_| starred).filter_map(|it| it.as_i64()).map(i64::unsigned_abs);
    from_values.fold(sum, |sum, it| sum.saturating_add(it as usize))
}

fn sum_of_numbers(text: &str) -> usize {
    let numbers = text.split(|c: char| !c.is_ascii_digit()).filter(|it| !it.is_empty());
    numbers.fold(0, |sum: usize, it| sum.saturating_add(it.parse().unwrap_or(usize::MAX)))
}

/// jinja2's `format` filter.
pub(super) fn format_filter(
    state: &mut State,
    text: &Value,
    values: Rest<ValueOrKwargs>,
) -> Result<Value, Error> {
    if percent_widths(text.as_str().unwrap_or_default(), &values) > WIDEST_FIELD {
        return Err(Error::new(ErrorKind::InvalidOperation, "format: a field is too wide"));
    }
    minijinja::filters::format(state, text, values)
}

/// `text` filled up to `width` characters, as the Python method of this name does it.
fn padded(text: &str, width: usize, method: &str, fill: char) -> Result<String, Error> {
    if width > WIDEST {
        return Err(Error::new(ErrorKind::InvalidOperation, format!("{method}: {width} is too wide")));
    }
    let missing = width.saturating_sub(text.chars().count());
    let filling = |count: usize| String::from(fill).repeat(count);
    Ok(match method {
        "ljust" => text.to_string() + &filling(missing),
        "rjust" => filling(missing) + text,
        "zfill" => {
            let signed = text.len() - text.trim_start_matches(['-', '+']).len();
            let (sign, digits) = text.split_at(signed.min(1));
            format!("{sign}{}{digits}", "0".repeat(missing))
        }
        // CPython puts the odd character on the left where the width is odd as well.
        _ => {
            let left = missing / 2 + (missing & width & 1);
            filling(left) + text + &filling(missing - left)
        }
    })
}

/// jinja2's `center` filter.
pub(super) fn center(text: &str, width: Option<usize>) -> Result<String, Error> {
    padded(text, width.unwrap_or(80), "center", ' ')
}

/// `str.title`: a letter after something that is no letter is a capital.
fn title(text: &str) -> String {
    let mut inside = false;
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        if inside {
            out.extend(c.to_lowercase());
        } else {
            let mut upper = c.to_uppercase();
            out.extend(upper.next());
            out.extend(upper.flat_map(char::to_lowercase));
        }
        inside = c.is_alphabetic();
    }
    out
}

/// `str.splitlines`, which ends lines at more than line feeds.
fn lines(text: &str) -> Vec<&str> {
    let ends = ['\n', '\r', '\u{b}', '\u{c}', '\u{1c}', '\u{1d}', '\u{1e}', '\u{85}', '\u{2028}', '\u{2029}'];
    let mut lines = Vec::new();
    let mut rest = text;
    while let Some(at) = rest.find(ends) {
        lines.push(&rest[..at]);
        let end = if rest[at..].starts_with("\r\n") {
            2
        } else {
            rest[at..].chars().next().map_or(0, char::len_utf8)
        };
        rest = &rest[at + end..];
    }
    lines.extend((!rest.is_empty()).then_some(rest));
    lines
}

fn swapped(c: char) -> Vec<char> {
    if c.is_uppercase() { c.to_lowercase().collect() } else { c.to_uppercase().collect() }
}

/// `dict(mapping or pairs, key=value …)`.
pub(super) fn dict(value: Option<Value>, more: Kwargs) -> Result<Value, Error> {
    let mut pairs: Vec<(Value, Value)> = Vec::new();
    if let Some(value) = value.filter(|value| !value.is_undefined()) {
        let is_map = value.kind() == ValueKind::Map;
        for item in value.try_iter()? {
            let (key, value) = match is_map {
                true => (item.clone(), value.get_item(&item)?),
                false => (item.get_item_by_index(0)?, item.get_item_by_index(1)?),
            };
            pairs.push((key, value));
        }
    }
    for name in more.args() {
        pairs.push((Value::from(name), more.get(name)?));
    }
    Ok(Value::from_pairs(pairs))
}
