//! LLaMA-Factory's `dataset_info.json`, read as it is.
//!
//! Keys, defaults and precedence of sources follow `src/llamafactory/data/parser.py` and `data/README.md` there.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use crate::error::{Error, Place, Result, read_file};
use crate::formats::{Answers, Mapping};

/// A data set on a hub.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct HubSet {
    /// `owner/name`.
    pub name: String,
    /// Which of its subsets (configurations); the default one where none is named.
    pub subset: Option<String>,
    /// Which split; `train` where none is named.
    pub split: Option<String>,
    /// Branch, tag or commit.
    pub revision: Option<String>,
    /// Only files under this folder of it.
    pub folder: Option<String>,
}

impl HubSet {
    /// Reads `owner/name`, with `?split=…&subset=…&revision=…&folder=…` behind it or not; none where it is no such
    /// name.
    pub fn parse(text: &str) -> Option<HubSet> {
        let (name, query) = text.split_once('?').map_or((text, None), |(name, query)| (name, Some(query)));
        let plain = |part: &str| {
            let good = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
            !part.is_empty() && !part.starts_with('.') && part.chars().all(good)
        };
        let (owner, rest) = name.split_once('/')?;
        if !plain(owner) || !plain(rest) {
            return None;
        }
        let mut set = HubSet { name: name.to_string(), ..HubSet::default() };
        for pair in query.into_iter().flat_map(|query| query.split('&')) {
            let (key, value) = pair.split_once('=')?;
            let place = match key {
                "split" => &mut set.split,
                "subset" => &mut set.subset,
                "revision" => &mut set.revision,
                "folder" => &mut set.folder,
                _ => return None,
            };
            *place = Some(value.to_string());
        }
        Some(set)
    }
}

/// Where a registered set is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Origin {
    /// A file or a folder.
    Path(PathBuf),
    /// On the hub.
    Hub(HubSet),
}

/// An entry of the registry.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Entry {
    pub(crate) origin: Origin,
    /// Name of the format.
    pub(crate) formatting: String,
    pub(crate) mapping: Mapping,
    pub(crate) answers: Answers,
    /// So many rows, drawn at random; some repeatedly where there are fewer.
    pub(crate) num_samples: Option<usize>,
}

/// Keys of an entry, and those that say nothing to a reader.
const KEYS: [&str; 15] = [
    "hf_hub_url",
    "ms_hub_url",
    "om_hub_url",
    "script_url",
    "cloud_file_name",
    "file_name",
    "formatting",
    "ranking",
    "subset",
    "split",
    "folder",
    "num_samples",
    "columns",
    "tags",
    "revision",
];
const COLUMNS: [&str; 13] = [
    "prompt", "query", "response", "history", "messages", "system", "tools", "images", "videos", "audios",
    "chosen", "rejected", "kto_tag",
];
const TAGS: [&str; 7] =
    ["role_tag", "content_tag", "user_tag", "assistant_tag", "observation_tag", "function_tag", "system_tag"];

/// Reads the registry of a folder; an empty one where there is none.
pub(crate) fn read(path: &Path) -> Result<Map<String, Value>> {
    if !path.is_file() {
        return Ok(Map::new());
    }
    serde_json::from_slice(&read_file(path)?).map_err(|error| Error::Row {
        place: Place::new(path, error.line()),
        message: format!("not a JSON object: {error}"),
    })
}

/// The entry `name`; files are in `folder`.
pub(crate) fn entry(name: &str, value: &Value, folder: &Path) -> Result<Entry> {
    let wrong =
        |message: String| Error::Dataset(format!("data set `{name}` in dataset_info.json: {message}"));
    let fields = value.as_object().ok_or_else(|| wrong("expected an object".to_string()))?;
    check_keys(fields, &KEYS, "").map_err(wrong)?;
    let text = |key: &str| match fields.get(key) {
        None | Some(Value::Null) => Ok(None),
        Some(Value::String(text)) => Ok(Some(text.clone())),
        Some(other) => {
            Err(wrong(format!("expected a text in `{key}`, found {}", crate::formats::kind(other))))
        }
    };
    let origin = if let Some(url) = text("hf_hub_url")? {
        let hub = HubSet {
            name: url,
            subset: text("subset")?,
            split: text("split")?,
            revision: text("revision")?,
            folder: text("folder")?,
        };
        Origin::Hub(hub)
    } else if let Some(key) = ["ms_hub_url", "om_hub_url", "script_url", "cloud_file_name"]
        .into_iter()
        .find(|it| fields.contains_key(*it))
    {
        let message = match key {
            "script_url" => {
                "no code of a data set is ever run; save it as Parquet or JSON and use `file_name`"
            }
            _ => "is not there yet; use `hf_hub_url`, or `file_name` with a local file",
        };
        return Err(wrong(format!("`{key}`: {message}")));
    } else if let Some(file) = text("file_name")? {
        Origin::Path(folder.join(file))
    } else {
        return Err(wrong("it names no source; expected `file_name` or `hf_hub_url`".to_string()));
    };
    let names = |key: &str, known: &[&str]| -> Result<BTreeMap<String, String>> {
        let Some(map) = fields.get(key) else { return Ok(BTreeMap::new()) };
        let map = map.as_object().ok_or_else(|| wrong(format!("`{key}` is not an object")))?;
        check_keys(map, known, &format!("{key}.")).map_err(wrong)?;
        let mut names = BTreeMap::new();
        for (ours, theirs) in map.iter().filter(|(_, value)| !value.is_null()) {
            let theirs = theirs.as_str().ok_or_else(|| wrong(format!("`{key}.{ours}` is not a text")))?;
            names.insert(ours.clone(), theirs.to_string());
        }
        Ok(names)
    };
    let mapping = Mapping { columns: names("columns", &COLUMNS)?, tags: names("tags", &TAGS)? };
    for media in ["images", "videos", "audios"] {
        if mapping.columns.contains_key(media) {
            return Err(wrong(format!("`{media}` is not there yet: only texts are trained on")));
        }
    }
    let answers = match fields.get("ranking") {
        None | Some(Value::Null | Value::Bool(false)) => Answers::One,
        Some(Value::Bool(true)) => Answers::Pair,
        Some(other) => {
            let found = crate::formats::kind(other);
            return Err(wrong(format!("expected true or false in `ranking`, found {found}")));
        }
    };
    let num_samples = match fields.get("num_samples") {
        None | Some(Value::Null) => None,
        Some(number) => match number.as_u64().and_then(|number| usize::try_from(number).ok()) {
            Some(number) if number > 0 => Some(number),
            _ => return Err(wrong("expected a number of rows, 1 or more, in `num_samples`".to_string())),
        },
    };
    let formatting = text("formatting")?.unwrap_or_else(|| "alpaca".to_string());
    Ok(Entry { origin, formatting, mapping, answers, num_samples })
}

/// A key that nobody reads would be a mistake that nobody notices.
fn check_keys(map: &Map<String, Value>, known: &[&str], path: &str) -> Result<(), String> {
    match map.keys().find(|key| !known.contains(&key.as_str())) {
        Some(key) => Err(format!("unknown key `{path}{key}`; expected {}", known.join(", "))),
        None => Ok(()),
    }
}
