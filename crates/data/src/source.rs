//! Files to rows to conversations: JSON arrays, JSON lines, and LLaMA-Factory's `dataset_info.json`.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use crate::conversation::Conversation;
use crate::counts::{Seen, SetCounts};
use crate::error::{Error, Place, Result, read_file};
use crate::formats::{self, Mapping, Row};

/// What to do with a row that cannot be read.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum OnBadRow {
    /// Stop at the first one, with its file and line.
    #[default]
    Stop,
    /// Leave it out, and report it.
    Skip,
}

/// How to read a data set.
#[derive(Clone, Debug, Default)]
pub struct SourceOptions {
    /// Values of `{{name}}` placeholders in the rows; empty leaves all placeholders as they are.
    pub substitute: BTreeMap<String, String>,
    /// At most this many rows, from the first.
    pub max_samples: Option<usize>,
    /// What to do with a row that cannot be read.
    pub on_bad_row: OnBadRow,
}

/// A row that was left out, and why.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Dropped {
    /// File and line.
    pub place: Place,
    /// The reason, as an error message.
    pub reason: String,
}

/// The conversations of one data set.
#[derive(Debug, Default)]
pub struct Loaded {
    /// Name of the format: `alpaca`, `sharegpt`, `openai`, `text`.
    pub format: String,
    /// The conversations with the place of their rows.
    pub conversations: Vec<(Place, Conversation)>,
    /// Rows left out ([`OnBadRow::Skip`]).
    pub dropped: Vec<Dropped>,
    /// Rows, what was left out and why, duplicates.
    pub counts: SetCounts,
}

/// Loads the data set `name`: an entry of `dataset_info.json` in `folder`, or a file (or a folder of files).
///
/// Fails where there is no such set, its form isn't known or isn't there yet, it has no rows, a row is
/// malformed (see [`OnBadRow`]), or a placeholder has no value.
pub fn load(name: &str, folder: &Path, options: &SourceOptions) -> Result<Loaded> {
    let registry = folder.join("dataset_info.json");
    let entries = if registry.is_file() { read_registry(&registry)? } else { Map::new() };
    if let Some(entry) = entries.get(name) {
        let (path, format, mapping) = read_entry(name, entry, folder)?;
        return load_path(&path, Some((&format, &mapping)), options);
    }
    for path in [folder.join(name), PathBuf::from(name)] {
        if path.exists() {
            return load_path(&path, None, options);
        }
    }
    let known: Vec<&str> = entries.keys().map(String::as_str).take(40).collect();
    let known = if known.is_empty() {
        format!("there is no `{}`", registry.display())
    } else {
        format!("`{}` has: {}", registry.display(), known.join(", "))
    };
    let here = std::env::current_dir().map_or(String::new(), |it| format!(" in {}", it.display()));
    Err(Error::Dataset(format!(
        "no data set `{name}`: there is no such file{here} or in `{}`, and it isn't a registered name: {known}",
        folder.display()
    )))
}

/// Loads a file (or a folder of files) in `format`, or in the format its rows look like.
pub fn load_path(path: &Path, format: Option<(&str, &Mapping)>, options: &SourceOptions) -> Result<Loaded> {
    let mut loaded = Loaded::default();
    let mut rows = Vec::new();
    // Names are refused before their files are read.
    let named = format.map(|(name, mapping)| formats::by_name(name, mapping)).transpose()?;
    for file in files(path)? {
        read_rows(&file, options, &mut rows, &mut loaded.dropped)?;
    }
    if rows.is_empty() {
        let all = if loaded.dropped.is_empty() { "" } else { " that can be read" };
        return Err(Error::Dataset(format!("data set `{}` has no rows{all}", path.display())));
    }
    let format = match named {
        Some(format) => format,
        None => formats::recognise(&rows)?,
    };
    loaded.format = format.name().to_string();
    loaded.counts.format = loaded.format.clone();
    let mut seen = Seen::default();
    loaded.dropped.iter().for_each(|it| loaded.counts.skip(&it.place, &it.reason));
    for mut row in rows {
        let conversation = substitute(&mut row, &options.substitute).and_then(|()| format.conversation(&row));
        match conversation {
            Ok(conversation) => {
                loaded.counts.use_row(&row.place, &conversation, &mut seen);
                loaded.conversations.push((row.place, conversation));
            }
            Err(Error::Row { place, message }) if options.on_bad_row == OnBadRow::Skip => {
                loaded.counts.skip(&place, &message);
                loaded.dropped.push(Dropped { place, reason: message });
            }
            Err(error) => return Err(error),
        }
    }
    if loaded.conversations.is_empty() {
        let first = loaded.dropped.first().map_or("", |dropped| dropped.reason.as_str());
        return Err(Error::Dataset(format!(
            "no row of data set `{}` can be used; the first one: {first}",
            path.display()
        )));
    }
    Ok(loaded)
}

fn files(path: &Path) -> Result<Vec<PathBuf>> {
    if !path.is_dir() {
        return Ok(vec![path.to_path_buf()]);
    }
    let failed = |source| Error::File { action: "read", path: path.to_path_buf(), source };
    let mut files = Vec::new();
    for entry in std::fs::read_dir(path).map_err(failed)? {
        let file = entry.map_err(failed)?.path();
        let json = file.extension().is_some_and(|ending| ending == "json" || ending == "jsonl");
        if json && file.file_name().is_some_and(|name| name != "dataset_info.json") {
            files.push(file);
        }
    }
    files.sort();
    if files.is_empty() {
        return Err(Error::Dataset(format!("folder `{}` has no .json or .jsonl file", path.display())));
    }
    Ok(files)
}

fn read_registry(path: &Path) -> Result<Map<String, Value>> {
    serde_json::from_slice(&read_file(path)?).map_err(|error| Error::Row {
        place: Place::new(path, error.line()),
        message: format!("not a JSON object: {error}"),
    })
}

/// File, format and mapping of an entry of `dataset_info.json`.
fn read_entry(name: &str, entry: &Value, folder: &Path) -> Result<(PathBuf, String, Mapping)> {
    let wrong =
        |message: String| Error::Dataset(format!("data set `{name}` in dataset_info.json: {message}"));
    for key in ["hf_hub_url", "ms_hub_url", "om_hub_url", "script_url", "cloud_file_name"] {
        if entry.get(key).is_some() && entry.get("file_name").is_none() {
            return Err(wrong(format!("`{key}` is not there yet; use `file_name` with a local file")));
        }
    }
    if entry.get("ranking").and_then(Value::as_bool) == Some(true) {
        return Err(wrong("preference data (`ranking: true`) is not there yet".to_string()));
    }
    for key in ["num_samples", "images", "videos", "audios"] {
        let in_columns = entry.get("columns").and_then(|columns| columns.get(key)).is_some();
        if in_columns || entry.get(key).is_some() {
            return Err(wrong(format!("`{key}` is not there yet")));
        }
    }
    let file = entry.get("file_name").and_then(Value::as_str);
    let file = file.ok_or_else(|| wrong("no `file_name`".to_string()))?;
    let texts = |key: &str| -> Result<BTreeMap<String, String>> {
        let Some(map) = entry.get(key) else { return Ok(BTreeMap::new()) };
        let map = map.as_object().ok_or_else(|| wrong(format!("`{key}` is not an object")))?;
        map.iter()
            .filter(|(_, value)| !value.is_null())
            .map(|(ours, theirs)| {
                let theirs = theirs.as_str().ok_or_else(|| wrong(format!("`{key}.{ours}` is not a text")))?;
                Ok((ours.clone(), theirs.to_string()))
            })
            .collect()
    };
    let format = entry.get("formatting").and_then(Value::as_str).unwrap_or("alpaca");
    let mapping = Mapping { columns: texts("columns")?, tags: texts("tags")? };
    Ok((folder.join(file), format.to_string(), mapping))
}

/// Adds the rows of `path`, until `options.max_samples` of them are there.
pub fn read_rows(
    path: &Path,
    options: &SourceOptions,
    rows: &mut Vec<Row>,
    dropped: &mut Vec<Dropped>,
) -> Result<()> {
    let ending = path.extension().and_then(|ending| ending.to_str()).unwrap_or("").to_lowercase();
    match ending.as_str() {
        "json" | "jsonl" => {}
        "csv" | "tsv" | "parquet" | "arrow" | "txt" | "gz" | "zst" => {
            return Err(Error::Dataset(format!(
                "`{}`: .{ending} files are not there yet; use .json or .jsonl",
                path.display()
            )));
        }
        _ => {
            return Err(Error::Dataset(format!(
                "`{}`: cannot tell the kind of file from its name; expected .json or .jsonl",
                path.display()
            )));
        }
    }
    let bytes = read_file(path)?;
    let bytes = bytes.strip_prefix(b"\xEF\xBB\xBF").unwrap_or(&bytes);
    let text = std::str::from_utf8(bytes).map_err(|error| {
        let line = 1 + bytes[..error.valid_up_to()].iter().filter(|byte| **byte == b'\n').count();
        Error::Row { place: Place::new(path, line), message: "not UTF-8 text".to_string() }
    })?;
    let place = Place::new(path, 1);
    let at = |line: usize| Place { line, ..place.clone() };
    let full = |rows: &Vec<Row>| options.max_samples.is_some_and(|limit| rows.len() >= limit);
    let mut take = |line: usize, value: Result<Value, String>, rows: &mut Vec<Row>| -> Result<()> {
        let message = match value {
            Ok(Value::Object(fields)) => {
                rows.push(Row { place: at(line), fields });
                return Ok(());
            }
            Ok(other) => format!("expected an object, found {}", formats::kind(&other)),
            Err(message) => message,
        };
        match options.on_bad_row {
            OnBadRow::Stop => Err(Error::Row { place: at(line), message }),
            OnBadRow::Skip => {
                dropped.push(Dropped { place: at(line), reason: message });
                Ok(())
            }
        }
    };
    if !text.trim_start().starts_with('[') {
        // JSON lines; also a .json file that holds them, or a single object over several lines.
        if ending == "json"
            && let Ok(value @ Value::Object(_)) = serde_json::from_str::<Value>(text)
        {
            return take(1, Ok(value), rows);
        }
        for (index, line) in text.lines().enumerate() {
            if full(rows) {
                break;
            }
            if !line.trim().is_empty() {
                let value = serde_json::from_str(line)
                    .map_err(|error| format!("not a JSON object on one line: {}", without_line(&error)));
                take(index + 1, value, rows)?;
            }
        }
        return Ok(());
    }
    let mut rest = Cursor { text, at: 0, line: 1 };
    rest.skip_to('[');
    let mut first = true;
    while !full(rows) {
        rest.skip_space();
        if rest.text[rest.at..].starts_with(']') {
            break;
        }
        if !first {
            if !rest.skip_to(',') {
                let message = "expected `,` or `]` after a row of the list".to_string();
                return Err(Error::Row { place: at(rest.line), message });
            }
            rest.skip_space();
        }
        first = false;
        let mut stream = serde_json::Deserializer::from_str(&rest.text[rest.at..]).into_iter::<Value>();
        match stream.next() {
            Some(Ok(value)) => {
                let (line, length) = (rest.line, stream.byte_offset());
                rest.advance(length);
                take(line, Ok(value), rows)?;
            }
            // After a row that isn't JSON there is no telling where the next one starts.
            Some(Err(error)) => {
                let message = format!("not JSON: {}", without_line(&error));
                return Err(Error::Row { place: at(rest.line + error.line() - 1), message });
            }
            None => {
                let message = "the list of rows is not closed with `]`".to_string();
                return Err(Error::Row { place: at(rest.line), message });
            }
        }
    }
    Ok(())
}

/// serde_json's message without its own line number, which counts from the start of the row.
fn without_line(error: &serde_json::Error) -> String {
    let text = error.to_string();
    text.split(" at line ").next().unwrap_or(&text).to_string()
}

struct Cursor<'a> {
    text: &'a str,
    at: usize,
    line: usize,
}

impl Cursor<'_> {
    fn advance(&mut self, length: usize) {
        let passed = &self.text.as_bytes()[self.at..self.at + length];
        self.line += passed.iter().filter(|byte| **byte == b'\n').count();
        self.at += length;
    }

    fn skip_space(&mut self) {
        let rest = &self.text[self.at..];
        self.advance(rest.len() - rest.trim_start().len());
    }

    fn skip_to(&mut self, c: char) -> bool {
        self.skip_space();
        let found = self.text[self.at..].starts_with(c);
        if found {
            self.advance(c.len_utf8());
        }
        found
    }
}

/// Replaces `{{name}}` in every text of the row.
fn substitute(row: &mut Row, values: &BTreeMap<String, String>) -> Result<()> {
    if values.is_empty() {
        return Ok(());
    }
    let mut fields = std::mem::take(&mut row.fields);
    for value in fields.values_mut() {
        substitute_value(value, values).map_err(|name| {
            let known: Vec<&str> = values.keys().map(String::as_str).collect();
            row.error(format!("placeholder `{{{{{name}}}}}` has no value; given are: {}", known.join(", ")))
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

#[cfg(test)]
mod tests {
    use super::*;

    fn folder(name: &str) -> PathBuf {
        let folder = std::env::temp_dir().join(format!("ferrotune-data-{}-{name}", std::process::id()));
        std::fs::create_dir_all(&folder).unwrap();
        folder
    }

    /// Loads a file with this content; `line: first content` of each conversation, or the error after the file.
    fn check_with(file: &str, content: &[u8], options: &SourceOptions, expected: &str) {
        let folder = folder(&format!("{:x}", content.len() * 31 + file.len() + expected.len() * 7919));
        std::fs::write(folder.join(file), content).unwrap();
        let shown = match load(file, &folder, options) {
            Ok(loaded) => {
                let shown = |(place, conversation): &(Place, Conversation)| {
                    format!("{}: {}", place.line, conversation.messages[0].content)
                };
                let mut lines: Vec<String> = loaded.conversations.iter().map(shown).collect();
                lines
                    .extend(loaded.dropped.iter().map(|d| format!("{} dropped: {}", d.place.line, d.reason)));
                lines.join(", ")
            }
            Err(error) => error.to_string().replace(&folder.join(file).display().to_string(), "F"),
        };
        std::fs::remove_dir_all(&folder).unwrap();
        assert_eq!(shown, expected);
    }

    fn check(file: &str, content: &str, expected: &str) {
        check_with(file, content.as_bytes(), &SourceOptions::default(), expected);
    }

    #[test]
    fn files_and_lines() {
        check("a.jsonl", "{\"text\": \"x\"}\n\n{\"text\": \"y\"}\n", "1: x, 3: y");
        check(
            "a.json",
            "[\n {\"text\": \"x\"},\n\n {\"text\":\n \"y\"}, {\"text\": \"z\"}\n]",
            "2: x, 4: y, 5: z",
        );
        check("a.json", "{\"text\": \"x\"}\n{\"text\": \"y\"}\n", "1: x, 2: y");
        check("a.json", "{\n\"text\": \"x\"\n}", "1: x");
        check("a.json", "\u{FEFF}[{\"text\": \"x\"}]", "1: x");
    }

    #[test]
    fn malformed_rows_are_named() {
        let one_line = "not a JSON object on one line";
        check(
            "a.jsonl",
            "{\"text\": \"x\"}\n{\"text\": \n",
            &format!("F:2: {one_line}: EOF while parsing a value"),
        );
        check("a.jsonl", "{\"text\": \"x\"}\n5\n", "F:2: expected an object, found a number");
        check("a.json", "[\n{\"text\": \"x\"},\n{\"text\": }]", "F:3: not JSON: expected value");
        check(
            "a.json",
            "[\n{\"text\": \"x\"}\n{\"text\": \"y\"}]",
            "F:3: expected `,` or `]` after a row of the list",
        );
        check("a.json", "[\n{\"text\": \"x\"},\n", "F:3: the list of rows is not closed with `]`");
        check("a.jsonl", "{\"text\": \"x\"}\n{\"tex\": \"y\"}\n", "F:2: no column `text`; the row has: tex");
        check_with("a.jsonl", b"{}\n\xff\xfe", &SourceOptions::default(), "F:2: not UTF-8 text");
        let skip = SourceOptions { on_bad_row: OnBadRow::Skip, ..SourceOptions::default() };
        check_with(
            "a.jsonl",
            b"{\"text\": \"x\"}\n7\n{\"text\": 1}\n",
            &skip,
            "1: x, 2 dropped: expected an object, found a number, 3 dropped: expected a text in column `text`, found a number",
        );
    }

    #[test]
    fn empty_and_unknown_files() {
        check("a.json", "[]", "data set `F` has no rows");
        check("a.jsonl", "\n\n", "data set `F` has no rows");
        check("a.csv", "a,b", "`F`: .csv files are not there yet; use .json or .jsonl");
        check("a.doc", "", "`F`: cannot tell the kind of file from its name; expected .json or .jsonl");
    }

    #[test]
    fn placeholders() {
        let values = [("name", "Fe"), ("author", "{{name}}")].map(|(a, b)| (a.to_string(), b.to_string()));
        let options = SourceOptions { substitute: values.into(), ..SourceOptions::default() };
        let check = |text: &str, expected: &str| {
            let line = serde_json::json!({ "text": text }).to_string();
            check_with("a.jsonl", line.as_bytes(), &options, expected);
        };
        check("I am {{name}}, by {{ author }}.", "1: I am Fe, by {{name}}.");
        check("{{ 1 + 1 }} {{x", "1: {{ 1 + 1 }} {{x");
        check("{{nam}}", "F:1: placeholder `{{nam}}` has no value; given are: author, name");
        check_with("a.jsonl", b"{\"text\": \"{{nam}}\"}", &SourceOptions::default(), "1: {{nam}}");
    }

    #[test]
    fn registry() {
        let folder = folder("registry");
        let info = serde_json::json!({
            "mine": {"file_name": "a.json", "formatting": "sharegpt", "columns": {"messages": "m"},
                     "tags": {"user_tag": "u", "assistant_tag": "a"}},
            "hub": {"hf_hub_url": "x/y"},
            "pairs": {"file_name": "a.json", "ranking": true},
        });
        std::fs::write(folder.join("dataset_info.json"), info.to_string()).unwrap();
        let rows = r#"[{"m": [{"from": "u", "value": "1"}, {"from": "a", "value": "2"}]},
                       {"m": [{"from": "u", "value": "3"}, {"from": "a", "value": "4"}]}]"#;
        std::fs::write(folder.join("a.json"), rows).unwrap();
        let options = SourceOptions { max_samples: Some(1), ..SourceOptions::default() };
        let loaded = load("mine", &folder, &options).unwrap();
        assert_eq!((loaded.format.as_str(), loaded.conversations.len()), ("sharegpt", 1));
        let check = |name: &str, expected: &str| {
            let error = load(name, &folder, &options).unwrap_err().to_string();
            assert!(error.starts_with(expected), "{error}");
        };
        check("hub", "data set `hub` in dataset_info.json: `hf_hub_url` is not there yet; use `file_name`");
        check(
            "pairs",
            "data set `pairs` in dataset_info.json: preference data (`ranking: true`) is not there yet",
        );
        check("nobody", "no data set `nobody`: there is no such file");
        std::fs::remove_dir_all(&folder).unwrap();
    }
}
