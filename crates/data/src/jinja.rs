//! What Python's jinja2, as transformers sets it up, offers to chat templates and minijinja does not.
//!
//! - `{% generation %} … {% endgeneration %}`: minijinja has no custom tags, so the source text is rewritten
//!   before parsing into a filter block (in a `with`, because the original opens a scope). The filter puts two
//!   non-characters around the block's text; [`crate::template`] takes them out and keeps their positions.
//! - `tojson` with the spacing of Python's `json.dumps(ensure_ascii=False)` and no HTML escaping.
//! - `raise_exception(message)`, `strftime_now(format)`.
//! - Python's string methods, dictionary methods (minijinja-contrib), and a few it lacks.

use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Rest, ValueKind};
use minijinja::{Environment, Error, ErrorKind, State, Value};

/// Opens a generated span in rendered text; a non-character, so no text contains it by accident.
pub(crate) const GENERATION_START: char = '\u{FDD0}';
/// Closes a generated span.
pub(crate) const GENERATION_END: char = '\u{FDD1}';

/// An environment as transformers makes it (`trim_blocks`, `lstrip_blocks`, loop controls, the functions above).
pub(crate) fn environment(now: Now) -> Environment<'static> {
    let mut env = Environment::new();
    env.set_debug(false);
    if let Ok(syntax) = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build() {
        env.set_syntax(syntax);
    }
    env.set_unknown_method_callback(python_method);
    env.add_filter("tojson", tojson);
    env.add_filter("__generation", |text: &str| format!("{GENERATION_START}{text}{GENERATION_END}"));
    env.add_filter("__iterable", iterable);
    env.add_filter("__add", add_markup);
    env.add_test("iterable", |value: &Value| is_iterable(value));
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

fn python_method(state: &mut State, value: &Value, method: &str, args: &[Value]) -> Result<Value, Error> {
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
            _ => {}
        }
    }
    minijinja_contrib::pycompat::unknown_method_callback(state, value, method, args)
}

/// `json.dumps(value, ensure_ascii=False, indent=…, separators=…, sort_keys=…)`.
fn tojson(value: &Value, rest: Rest<Value>, kwargs: Kwargs) -> Result<Value, Error> {
    let ensure_ascii = kwargs.get::<Option<bool>>("ensure_ascii")?.unwrap_or(false);
    let indent = kwargs.get::<Option<Value>>("indent")?.or_else(|| rest.get(1).cloned());
    let separators = kwargs.get::<Option<Vec<String>>>("separators")?;
    let sort_keys = kwargs.get::<Option<bool>>("sort_keys")?.unwrap_or(false);
    kwargs.assert_all_used()?;
    let indent = match indent {
        Some(indent) if !indent.is_none() && !indent.is_undefined() => Some(match indent.as_str() {
            Some(text) => text.to_string(),
            None => " ".repeat(indent.as_usize().unwrap_or(0).min(64)),
        }),
        _ => None,
    };
    let (item, key) = match separators.as_deref() {
        Some([item, key]) => (item.clone(), key.clone()),
        Some(_) => return Err(Error::new(ErrorKind::InvalidOperation, "tojson separators must be a pair")),
        None if indent.is_some() => (",".to_string(), ": ".to_string()),
        None => (", ".to_string(), ": ".to_string()),
    };
    let mut writer = PythonJson { out: String::new(), ensure_ascii, indent, item, key, sort_keys };
    writer.value(value, 0)?;
    Ok(Value::from(writer.out))
}

struct PythonJson {
    out: String,
    ensure_ascii: bool,
    indent: Option<String>,
    item: String,
    key: String,
    sort_keys: bool,
}

impl PythonJson {
    fn value(&mut self, value: &Value, depth: usize) -> Result<(), Error> {
        match value.kind() {
            ValueKind::None => self.out.push_str("null"),
            ValueKind::Bool => self.out.push_str(if value.is_true() { "true" } else { "false" }),
            ValueKind::Number => {
                let text = if value.is_integer() {
                    value.to_string()
                } else {
                    let number = f64::try_from(value.clone())?;
                    python_float(number)
                };
                self.out.push_str(&text);
            }
            ValueKind::String => self.string(value.as_str().unwrap_or_default()),
            ValueKind::Seq | ValueKind::Iterable => {
                let mut first = true;
                self.out.push('[');
                for item in value.try_iter()? {
                    self.separate(&mut first, depth + 1);
                    self.value(&item, depth + 1)?;
                }
                self.close(first, depth, ']');
            }
            ValueKind::Map => {
                let mut keys: Vec<Value> = value.try_iter()?.collect();
                if self.sort_keys {
                    keys.sort();
                }
                let mut first = true;
                self.out.push('{');
                for key in keys {
                    self.separate(&mut first, depth + 1);
                    match key.kind() {
                        ValueKind::String => self.string(key.as_str().unwrap_or_default()),
                        ValueKind::None => self.out.push_str("\"null\""),
                        ValueKind::Bool => {
                            self.out.push_str(if key.is_true() { "\"true\"" } else { "\"false\"" });
                        }
                        ValueKind::Number => self.string(&key.to_string()),
                        other => {
                            return Err(Error::new(
                                ErrorKind::BadSerialization,
                                format!("a key of kind {other} has no JSON form"),
                            ));
                        }
                    }
                    let separator = self.key.clone();
                    self.out.push_str(&separator);
                    self.value(&value.get_item(&key)?, depth + 1)?;
                }
                self.close(first, depth, '}');
            }
            other => {
                return Err(Error::new(
                    ErrorKind::BadSerialization,
                    format!("a value of kind {other} has no JSON form"),
                ));
            }
        }
        Ok(())
    }

    fn separate(&mut self, first: &mut bool, depth: usize) {
        if !*first {
            self.out.push_str(&self.item);
        }
        *first = false;
        self.line(depth);
    }

    fn close(&mut self, empty: bool, depth: usize, bracket: char) {
        if !empty {
            self.line(depth);
        }
        self.out.push(bracket);
    }

    fn line(&mut self, depth: usize) {
        if let Some(indent) = &self.indent {
            self.out.push('\n');
            for _ in 0..depth {
                self.out.push_str(indent);
            }
        }
    }

    fn string(&mut self, text: &str) {
        self.out.push('"');
        for c in text.chars() {
            match c {
                '"' => self.out.push_str("\\\""),
                '\\' => self.out.push_str("\\\\"),
                '\n' => self.out.push_str("\\n"),
                '\r' => self.out.push_str("\\r"),
                '\t' => self.out.push_str("\\t"),
                '\u{8}' => self.out.push_str("\\b"),
                '\u{c}' => self.out.push_str("\\f"),
                c if (c as u32) < 0x20 || (self.ensure_ascii && !c.is_ascii()) => {
                    for unit in c.encode_utf16(&mut [0; 2]) {
                        self.out.push_str(&format!("\\u{unit:04x}"));
                    }
                }
                c => self.out.push(c),
            }
        }
        self.out.push('"');
    }
}

/// A float as Python's `repr` writes it.
fn python_float(number: f64) -> String {
    if number.is_nan() {
        return "NaN".to_string();
    }
    if number.is_infinite() {
        return if number > 0.0 { "Infinity".to_string() } else { "-Infinity".to_string() };
    }
    let magnitude = number.abs();
    if magnitude != 0.0 && !(1e-4..1e16).contains(&magnitude) {
        let text = format!("{number:e}");
        let (mantissa, exponent) = text.split_once('e').unwrap_or((&text, "0"));
        let (sign, digits) = match exponent.strip_prefix('-') {
            Some(digits) => ('-', digits),
            None => ('+', exponent),
        };
        return format!("{mantissa}e{sign}{digits:0>2}");
    }
    let text = number.to_string();
    if text.contains('.') { text } else { format!("{text}.0") }
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

/// The date and time that `strftime_now` answers with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Now {
    /// Year of the common era.
    pub year: i64,
    /// Month, 1 to 12.
    pub month: u32,
    /// Day of the month, 1 to 31.
    pub day: u32,
    /// Hour, 0 to 23.
    pub hour: u32,
    /// Minute, 0 to 59.
    pub minute: u32,
    /// Second, 0 to 59.
    pub second: u32,
}

const MONTHS: [&str; 12] = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
];
const WEEKDAYS: [&str; 7] = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"];

impl Now {
    /// The clock of this machine, in UTC.
    pub fn system() -> Now {
        let seconds = std::time::SystemTime::now()
            .duration_since(std::time::UNIX_EPOCH)
            .map_or(0, |since| since.as_secs() as i64);
        Now::from_unix(seconds)
    }

    /// The moment `seconds` after 1970-01-01 00:00 UTC.
    pub fn from_unix(seconds: i64) -> Now {
        // Days to a civil date: Howard Hinnant's algorithm, eras of 400 years that start in March.
        let days = seconds.div_euclid(86_400);
        let rest = seconds.rem_euclid(86_400) as u32;
        let shifted = days + 719_468;
        let era = shifted.div_euclid(146_097);
        let day_of_era = shifted.rem_euclid(146_097);
        let year_of_era =
            (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
        let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
        let month_from_march = (5 * day_of_year + 2) / 153;
        let day = (day_of_year - (153 * month_from_march + 2) / 5 + 1) as u32;
        let month = if month_from_march < 10 { month_from_march + 3 } else { month_from_march - 9 } as u32;
        let year = year_of_era + era * 400 + i64::from(month <= 2);
        Now { year, month, day, hour: rest / 3600, minute: rest / 60 % 60, second: rest % 60 }
    }

    /// Reads `2026-01-31` or `2026-01-31T12:30:00` (a space instead of the `T`, and missing seconds, are fine).
    pub fn parse(text: &str) -> Option<Now> {
        let (date, time) = text.split_once(['T', ' ']).unwrap_or((text, "0:0:0"));
        let mut date = date.splitn(3, '-').map(|part| part.parse::<i64>().ok());
        let (year, month, day) = (date.next()??, date.next()??, date.next()??);
        let mut time = time.trim_end_matches('Z').splitn(3, ':').map(|part| part.parse::<u32>().ok());
        let (hour, minute) = (time.next()??, time.next()??);
        let second = time.next().unwrap_or(Some(0))?;
        let valid = (1..=9999).contains(&year)
            && (1..=12).contains(&month)
            && (1..=31).contains(&day)
            && hour < 24
            && minute < 60
            && second < 60;
        valid.then_some(Now { year, month: month as u32, day: day as u32, hour, minute, second })
    }

    fn days_from_epoch(self) -> i64 {
        let year = self.year - i64::from(self.month <= 2);
        let era = year.div_euclid(400);
        let year_of_era = year.rem_euclid(400);
        let month_from_march = (i64::from(self.month) + 9) % 12;
        let day_of_year = (153 * month_from_march + 2) / 5 + i64::from(self.day) - 1;
        era * 146_097 + year_of_era * 365 + year_of_era / 4 - year_of_era / 100 + day_of_year - 719_468
    }

    /// As C's `strftime` in the C locale; an unknown directive stays as it is.
    fn format(self, format: &str) -> String {
        let weekday = WEEKDAYS[(self.days_from_epoch() + 3).rem_euclid(7) as usize];
        let month = MONTHS[(self.month as usize - 1).min(11)];
        let hour_of_12 = (self.hour + 11) % 12 + 1;
        let half = if self.hour < 12 { "AM" } else { "PM" };
        let day_of_year = self.days_from_epoch() - Now { month: 1, day: 1, ..self }.days_from_epoch() + 1;
        let mut out = String::new();
        let mut chars = format.chars();
        while let Some(c) = chars.next() {
            if c != '%' {
                out.push(c);
                continue;
            }
            let (unpadded, directive) = match chars.next() {
                Some('-') => (true, chars.next()),
                other => (false, other),
            };
            let two = |n: u32| if unpadded { n.to_string() } else { format!("{n:02}") };
            match directive {
                Some('Y') => out.push_str(&self.year.to_string()),
                Some('y') => out.push_str(&two(self.year.rem_euclid(100) as u32)),
                Some('m') => out.push_str(&two(self.month)),
                Some('d') => out.push_str(&two(self.day)),
                Some('e') => out.push_str(&format!("{:2}", self.day)),
                Some('j') => out.push_str(&format!("{day_of_year:03}")),
                Some('B') => out.push_str(month),
                Some('b' | 'h') => out.push_str(&month[..3]),
                Some('A') => out.push_str(weekday),
                Some('a') => out.push_str(&weekday[..3]),
                Some('H') => out.push_str(&two(self.hour)),
                Some('I') => out.push_str(&two(hour_of_12)),
                Some('M') => out.push_str(&two(self.minute)),
                Some('S') => out.push_str(&two(self.second)),
                Some('p') => out.push_str(half),
                Some('F') => out.push_str(&self.format("%Y-%m-%d")),
                Some('T') => out.push_str(&self.format("%H:%M:%S")),
                Some('Z') => out.push_str("UTC"),
                Some('%') => out.push('%'),
                Some(other) => out.extend(['%', other]),
                None => out.push('%'),
            }
        }
        out
    }
}

/// Rewrites `{% generation %}` tags, what `for` goes over, and sums with `|safe` in them; says whether there
/// were any of the first. Line ends become `\n`, as in Python.
///
/// Comments, and tags inside string literals, are left alone.
pub(crate) fn rewrite(source: &str) -> (String, bool) {
    let source = source.replace("\r\n", "\n").replace('\r', "\n");
    let mut out = String::with_capacity(source.len() + 64);
    let mut found = false;
    let mut rest = source.as_str();
    while let Some(open) = rest.find('{') {
        out.push_str(&rest[..open]);
        rest = &rest[open..];
        let length = match rest.as_bytes().get(1) {
            Some(b'#') => rest.find("#}").map_or(rest.len(), |end| end + 2),
            Some(b'{') => tag_length(rest, "}}"),
            Some(b'%') => tag_length(rest, "%}"),
            _ => 1,
        };
        let (tag, after) = rest.split_at(length);
        match generation_tag(tag) {
            Some((left, "generation", right)) => {
                found = true;
                out.push_str(&format!("{{%{left} with %}}{{% filter __generation {right}%}}"));
            }
            Some((left, _, right)) => {
                out.push_str(&format!("{{%{left} endfilter %}}{{% endwith {right}%}}"));
            }
            None => match (for_iterable(tag), safe_sum(tag)) {
                (Some(range), _) => {
                    out.push_str(&tag[..range.start]);
                    out.push_str(&format!("({})|__iterable", &tag[range.clone()]));
                    out.push_str(&tag[range.end..]);
                }
                (None, Some(sum)) => out.push_str(&sum),
                (None, None) => out.push_str(tag),
            },
        }
        rest = after;
    }
    out.push_str(rest);
    (out, found)
}

/// The whitespace marks around, and the name of, a generation tag.
fn generation_tag(tag: &str) -> Option<(&str, &str, &str)> {
    let body = tag.strip_prefix("{%")?.strip_suffix("%}")?;
    let (left, body) = body.split_at(usize::from(body.starts_with(['-', '+'])));
    let (body, right) = body.split_at(body.len() - usize::from(body.ends_with(['-', '+'])));
    let name = body.trim();
    matches!(name, "generation" | "endgeneration").then_some((left, name, right))
}

/// Where in a `for` tag the expression stands that it goes over.
fn for_iterable(tag: &str) -> Option<std::ops::Range<usize>> {
    let body = tag.strip_prefix("{%")?.strip_suffix("%}")?;
    let body = body.trim_end_matches(['-', '+']);
    let head = body.trim_start_matches(['-', '+']).trim_start();
    head.strip_prefix("for").filter(|rest| rest.starts_with(char::is_whitespace))?;
    let mut words = top_level_words(body).into_iter();
    let start = words.by_ref().find(|(_, word)| *word == "in").map(|(at, _)| at + "in".len())?;
    let end = words.find(|(_, word)| matches!(*word, "if" | "recursive")).map_or(body.len(), |(at, _)| at);
    let blank = body[start..end].trim().is_empty();
    let end = start + body[start..end].trim_end().len();
    (!blank).then_some(start + 2..end + 2)
}

/// A printed sum with `|safe` in it, and nothing that binds less, as a chain of `__add`.
fn safe_sum(tag: &str) -> Option<String> {
    let body = tag.strip_prefix("{{")?.strip_suffix("}}")?;
    let (left, body) = body.split_at(usize::from(body.starts_with(['-', '+'])));
    let (body, right) = body.split_at(body.len() - usize::from(body.ends_with(['-', '+'])));
    let words = top_level_words(body);
    let has = |wanted: &[&str]| words.iter().any(|(_, word)| wanted.contains(word));
    let other = ["if", "else", "and", "or", "not", "in", "is", "~", "<", ">", "=", "!", "-", "*", "/", "%"];
    if !has(&["safe"]) || !has(&["+"]) || has(&other) {
        return None;
    }
    let mut terms = Vec::new();
    let mut start = 0;
    for (at, _) in words.iter().filter(|(_, word)| *word == "+") {
        terms.push(&body[start..*at]);
        start = at + 1;
    }
    terms.push(&body[start..]);
    let (first, others) = terms.split_first()?;
    let chain: String = others.iter().map(|term| format!("|__add({term})")).collect();
    Some(format!("{{{{{left} ({first}){chain} {right}}}}}"))
}

/// The words and operators of an expression outside brackets and string literals, with their byte positions.
fn top_level_words(text: &str) -> Vec<(usize, &str)> {
    let bytes = text.as_bytes();
    let (mut at, mut depth, mut words) = (0, 0usize, Vec::new());
    while at < bytes.len() {
        match bytes[at] {
            quote @ (b'"' | b'\'') => {
                at += 1;
                while at < bytes.len() && bytes[at] != quote {
                    at += 1 + usize::from(bytes[at] == b'\\');
                }
            }
            b'(' | b'[' | b'{' => depth += 1,
            b')' | b']' | b'}' => depth = depth.saturating_sub(1),
            c if c.is_ascii_alphanumeric() || c == b'_' => {
                let start = at;
                while at < bytes.len() && (bytes[at].is_ascii_alphanumeric() || bytes[at] == b'_') {
                    at += 1;
                }
                if depth == 0 {
                    words.push((start, &text[start..at]));
                }
                continue;
            }
            c if c.is_ascii_punctuation() && depth == 0 => words.push((at, &text[at..at + 1])),
            _ => {}
        }
        at += 1;
    }
    words
}

/// The byte length of the tag at the start of `text`, quotes respected; everything when it isn't closed.
fn tag_length(text: &str, close: &str) -> usize {
    let bytes = text.as_bytes();
    let mut at = 2;
    let mut quote = None;
    while at < bytes.len() {
        match (quote, bytes[at]) {
            (Some(_), b'\\') => at += 1,
            (Some(open), c) if c == open => quote = None,
            (Some(_), _) => {}
            (None, c @ (b'"' | b'\'')) => quote = Some(c),
            (None, _) if bytes[at..].starts_with(close.as_bytes()) => return at + close.len(),
            (None, _) => {}
        }
        at += 1;
    }
    text.len()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(source: &str, expected: &str) {
        let mut env = environment(Now::parse("2026-02-03T04:05:06").unwrap());
        let (source, _) = rewrite(source);
        env.add_template_owned("test", source).unwrap();
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
    fn generation_becomes_marks() {
        check("a{% generation %}b{% endgeneration %}c", "a\u{FDD0}b\u{FDD1}c");
        check("a \n  {%- generation -%} \n b{%+ endgeneration -%} c", "a\u{FDD0}b\u{FDD1}c");
        check("{# {% generation %} #}{{ '{% generation %}' }}\r\n", "{% generation %}");
    }

    #[test]
    fn days_are_right() {
        let check = |seconds: i64, expected: &str| {
            assert_eq!(Now::from_unix(seconds).format("%Y-%m-%d %H:%M:%S %a"), expected);
        };
        check(0, "1970-01-01 00:00:00 Thu");
        check(951_782_400, "2000-02-29 00:00:00 Tue");
        check(1_767_225_599, "2025-12-31 23:59:59 Wed");
        assert_eq!(Now::parse("2026-13-01"), None);
    }
}
