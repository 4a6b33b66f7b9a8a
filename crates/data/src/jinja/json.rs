//! JSON as Python writes it.

use minijinja::value::{Kwargs, Rest, ValueKind};
use minijinja::{Error, ErrorKind, Value};

/// `json.dumps(value, ensure_ascii=False, indent=…, separators=…, sort_keys=…)`.
pub(super) fn tojson(value: &Value, rest: Rest<Value>, kwargs: Kwargs) -> Result<Value, Error> {
    let ensure_ascii = kwargs.get::<Option<bool>>("ensure_ascii")?.unwrap_or(false);
    let indent = kwargs.get::<Option<Value>>("indent")?.or_else(|| rest.get(1).cloned());
    let separators = kwargs.get::<Option<Vec<String>>>("separators")?;
    let sort_keys = kwargs.get::<Option<bool>>("sort_keys")?.unwrap_or(false);
    kwargs.assert_all_used()?;
    let indent = match indent {
        Some(indent) if !indent.is_none() && !indent.is_undefined() => Some(match indent.as_str() {
            Some(text) => text.chars().take(64).collect(),
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

/// Values nested deeper are refused, as in Python, where recursion ends.
const DEEPEST: usize = 500;
/// Longest text, in bytes; hostile templates ask for more.
const LONGEST: usize = 1 << 27;

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
        if depth > DEEPEST || self.out.len() > LONGEST {
            let what = if depth > DEEPEST { "deep" } else { "long" };
            return Err(Error::new(ErrorKind::BadSerialization, format!("a value too {what} for JSON")));
        }
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
pub(super) fn python_float(number: f64) -> String {
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
