//! `{{name}}` in rows, replaced by what the config gives for it.

use std::collections::BTreeMap;

use serde_json::Value;

use crate::error::{Error, Result};
use crate::formats::Row;

/// Replaces `{{name}}` in every text of the row. A name without a value is a mistake in the config, not in the row.
pub(crate) fn substitute(row: &mut Row, values: &BTreeMap<String, String>) -> Result<()> {
    if values.is_empty() {
        return Ok(());
    }
    let mut fields = std::mem::take(&mut row.fields);
    for value in fields.values_mut() {
        substitute_value(value, values).map_err(|name| {
            let known: Vec<&str> = values.keys().map(String::as_str).collect();
            Error::Broken {
                place: row.place.clone(),
                message: format!(
                    "placeholder `{{{{{name}}}}}` has no value; given are: {}",
                    known.join(", ")
                ),
            }
        })?;
    }
    row.fields = fields;
    Ok(())
}

fn substitute_value(value: &mut Value, values: &BTreeMap<String, String>) -> Result<(), String> {
    match value {
        Value::String(text) if text.contains("{{") => *text = substituted(text, values)?,
        Value::Array(items) => items.iter_mut().try_for_each(|item| substitute_value(item, values))?,
        Value::Object(fields) => fields.values_mut().try_for_each(|item| substitute_value(item, values))?,
        _ => {}
    }
    Ok(())
}

fn substituted(text: &str, values: &BTreeMap<String, String>) -> Result<String, String> {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(open) = rest.find("{{") {
        let inner = &rest[open + 2..];
        let name = inner.find("}}").map(|close| &inner[..close]);
        let identifier = |name: &str| {
            name.starts_with(|c: char| c.is_alphabetic() || c == '_')
                && name.chars().all(|c| c.is_alphanumeric() || c == '_')
        };
        match name.map(|name| (name, name.trim())) {
            Some((whole, name)) if identifier(name) => {
                out.push_str(&rest[..open]);
                out.push_str(values.get(name).ok_or_else(|| name.to_string())?);
                rest = &inner[whole.len() + 2..];
            }
            _ => {
                out.push_str(&rest[..open + 2]);
                rest = inner;
            }
        }
    }
    out.push_str(rest);
    Ok(out)
}
