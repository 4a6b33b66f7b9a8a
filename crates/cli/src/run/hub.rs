//! The hub, by the config; and data sets there: which of their files are read.
//!
//! This is chosen as `datasets` does: by the `configs` at the head of README.md, else by names, where `name-00000-of-00002` is a part
//! of split `name`, and words such as `train` and `validation` name splits. Code of a data set is never run.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail};
use ferrotune_data::{HubSet, readers};
use ferrotune_hub::{DataSetFiles, Hub, HubOptions, Progress, data_set};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use crate::config::{Data, HubName, Node, RunConfig, parse_yaml};
use crate::console::Console;

/// Words that name a split, as `datasets` takes them.
const WORDS: [(&str, &[&str]); 3] = [
    ("train", &["train", "training"]),
    ("validation", &["validation", "valid", "val", "dev"]),
    ("test", &["test", "testing", "eval", "evaluation"]),
];

/// Brings the files of a data set.
///
/// # Errors
/// When there is no such data set, subset or split, or a file can't be fetched.
pub fn fetch_data_set(
    config: &RunConfig,
    wanted: &HubSet,
    console: &Console,
) -> anyhow::Result<Vec<PathBuf>> {
    let options = HubOptions { revision: wanted.revision.clone(), ..options_of(config, Hub::HuggingFace) };
    if wanted.split.as_ref().is_some_and(|split| split.contains(['[', '+'])) {
        bail!(
            "data set `{}`: parts of a split are not there yet; name a split, and use `max_samples`",
            wanted.name
        );
    }
    let set = data_set(&wanted.name, &options)?;
    let mut progress = download_bar(console);
    let card = "README.md".to_string();
    let card = match set.paths().contains(&card.as_str()) {
        true => std::fs::read_to_string(&set.fetch(&[card], &options, &mut progress)?[0]).unwrap_or_default(),
        false => String::new(),
    };
    let chosen = choose(&set, wanted, &card).with_context(|| format!("data set `{}`", wanted.name))?;
    Ok(set.fetch(&chosen, &options, &mut progress)?)
}

/// The hub that models are looked for on and sent to, and who asks.
pub fn hub_options(config: &RunConfig) -> HubOptions {
    let hub = match config.hub {
        HubName::Auto => HubOptions::hub_from_env(),
        HubName::HuggingFace => Hub::HuggingFace,
        HubName::ModelScope => Hub::ModelScope,
    };
    options_of(config, hub)
}

fn options_of(config: &RunConfig, hub: Hub) -> HubOptions {
    let from_env = HubOptions::from_env(hub);
    let token = match hub {
        Hub::HuggingFace => &config.hf_hub_token,
        Hub::ModelScope => &config.ms_hub_token,
    };
    HubOptions {
        cache_dir: config.cache_dir.clone(),
        token: token.clone().or(from_env.token.clone()),
        ..from_env
    }
}

/// Shows how far a download is, or what is sent, on a terminal.
pub fn download_bar(console: &Console) -> impl FnMut(&Progress) {
    let bar = ProgressBar::hidden();
    let style = ProgressStyle::with_template(
        "{msg} [{bar:30}] {bytes} of {total_bytes}, {bytes_per_sec}, {eta} left",
    );
    bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()).progress_chars("=> "));
    let shown = console.shows_progress();
    move |progress| {
        if bar.is_hidden() && shown {
            bar.set_draw_target(ProgressDrawTarget::stderr());
        }
        bar.set_length(progress.total);
        bar.set_position(progress.done);
        bar.set_message(progress.file.to_string());
        if progress.done >= progress.total {
            bar.finish_and_clear();
        }
    }
}

/// The paths of the files to read.
fn choose(set: &DataSetFiles, wanted: &HubSet, card: &str) -> anyhow::Result<Vec<String>> {
    choose_of(&set.paths(), wanted, card)
}

fn choose_of(paths: &[&str], wanted: &HubSet, card: &str) -> anyhow::Result<Vec<String>> {
    let folder = wanted.folder.as_deref().map(|it| format!("{}/", it.trim_matches('/'))).unwrap_or_default();
    let data: Vec<&str> = paths
        .iter()
        .copied()
        .filter(|it| it.starts_with(&folder) && readers::is_data_file(Path::new(it)))
        .collect();
    if data.is_empty() {
        let script = paths.iter().find(|it| it.ends_with(".py"));
        match script {
            Some(script) => {
                bail!("it has no files of rows, only `{script}`, and no code of a data set is ever run")
            }
            None => bail!("it has no file of rows{}", if folder.is_empty() { "" } else { " in that folder" }),
        }
    }
    let split = wanted.split.as_deref().unwrap_or("train");
    if let Some(files) = by_card(card, &data, wanted.subset.as_deref(), split)? {
        return Ok(files);
    }
    let data = match wanted.subset.as_deref().filter(|it| *it != "default") {
        None => data,
        Some(subset) => {
            let of_subset = |path: &&str| {
                let (folders, name) = path.rsplit_once('/').unwrap_or(("", path));
                folders.split('/').any(|it| it == subset)
                    || name.strip_prefix(subset).is_some_and(|it| it.starts_with(['.', '-', '_']))
            };
            let chosen: Vec<&str> = data.iter().copied().filter(of_subset).collect();
            if chosen.is_empty() {
                bail!("it has no subset `{subset}`; its files are {}", some(&data));
            }
            chosen
        }
    };
    by_names(&data, split)
}

/// By the parts of the names.
fn by_names(data: &[&str], split: &str) -> anyhow::Result<Vec<String>> {
    let mut splits: BTreeMap<String, Vec<&str>> = BTreeMap::new();
    let sharded = data.iter().any(|path| shard_of(path).is_some());
    for path in data {
        let name = match sharded {
            true => shard_of(path).map(str::to_string),
            false => word_of(path).map(str::to_string),
        };
        // Files that name no split belong to train where none does.
        splits.entry(name.unwrap_or_default()).or_default().push(path);
    }
    if splits.len() == 1
        && let Some(all) = splits.remove("")
    {
        splits.insert("train".to_string(), all);
    }
    let word = WORDS.iter().find(|(_, words)| words.contains(&split)).map_or(split, |it| it.0);
    match splits.get(split).or_else(|| splits.get(word)) {
        Some(files) => Ok(one_kind(files)),
        None => {
            let names: Vec<&str> = splits.keys().map(String::as_str).filter(|it| !it.is_empty()).collect();
            bail!("it has no split `{split}`; it has {}: add `?split=…` to its name", names.join(", "))
        }
    }
}

/// `data/train_sft-00000-of-00003.parquet` → `train_sft`
fn shard_of(path: &str) -> Option<&str> {
    let name = path.rsplit_once('/').map_or(path, |it| it.1);
    let (start, _) = name.rsplit_once("-of-")?;
    let (split, number) = start.rsplit_once('-')?;
    (number.len() == 5 && number.bytes().all(|it| it.is_ascii_digit())).then_some(split)
}

/// The split that a word of the path names; the file's own words count more than its folders'.
fn word_of(path: &str) -> Option<&'static str> {
    path.rsplit('/').find_map(|part| {
        let words: Vec<String> =
            part.split(|c: char| !c.is_ascii_alphabetic()).map(str::to_ascii_lowercase).collect();
        let named = |(_, names): &&(&str, &[&str])| words.iter().any(|word| names.contains(&word.as_str()));
        WORDS.iter().find(named).map(|it| it.0)
    })
}

/// The files of the kind that most are of: the same rows may be there in several.
fn one_kind(files: &[&str]) -> Vec<String> {
    let ending = |path: &str| path.rsplit_once('.').map_or("", |it| it.1).to_string();
    let mut kinds: BTreeMap<String, usize> = BTreeMap::new();
    files.iter().for_each(|path| *kinds.entry(ending(path)).or_default() += 1);
    let most =
        kinds.iter().max_by_key(|it| (*it.1, it.0 == "parquet")).map(|it| it.0.clone()).unwrap_or_default();
    let mut chosen: Vec<String> =
        files.iter().filter(|path| ending(path) == most).map(|path| path.to_string()).collect();
    chosen.sort();
    chosen
}

/// By `configs` at the head of the card; none where it has none that name files.
fn by_card(
    card: &str,
    data: &[&str],
    subset: Option<&str>,
    split: &str,
) -> anyhow::Result<Option<Vec<String>>> {
    let head = card.strip_prefix("---\n").and_then(|rest| rest.split_once("\n---").map(|it| it.0));
    // A card that is no YAML says nothing about files.
    let Some(Ok(head)) = head.map(parse_yaml) else { return Ok(None) };
    let Some(Data::List(configs)) = get(&head, "configs").map(|it| &it.data) else { return Ok(None) };
    let name = |config: &Node| get(config, "config_name").and_then(text).unwrap_or("default").to_string();
    let is_default = |config: &&Node| {
        name(config) == "default" || get(config, "default").and_then(text).is_some_and(|it| it == "true")
    };
    let config = match subset {
        Some(subset) => configs.iter().find(|it| name(it) == subset),
        None => configs.iter().find(is_default).or(configs.first().filter(|_| configs.len() == 1)),
    };
    let Some(config) = config else {
        let names: Vec<String> = configs.iter().map(name).collect();
        let names = names.join(", ");
        match subset {
            Some(subset) => bail!("it has no subset `{subset}`; it has {names}"),
            None => bail!("it has several subsets, {names}: add `?subset=…` to its name"),
        }
    };
    let Some(files) = get(config, "data_files") else { return Ok(None) };
    let mut splits: Vec<(String, Vec<String>)> = Vec::new();
    match &files.data {
        Data::List(items) if items.iter().any(|it| get(it, "split").is_some()) => {
            for item in items {
                let split = get(item, "split").and_then(text).unwrap_or("train").to_string();
                splits.push((split, get(item, "path").map(texts).unwrap_or_default()));
            }
        }
        Data::Map(entries) => {
            splits.extend(entries.iter().map(|(split, paths)| (split.clone(), texts(paths))));
        }
        _ => splits.push(("train".to_string(), texts(files))),
    }
    let Some((_, patterns)) = splits.iter().find(|it| it.0 == split) else {
        let names: Vec<&str> = splits.iter().map(|it| it.0.as_str()).collect();
        bail!("it has no split `{split}`; it has {}: add `?split=…` to its name", names.join(", "));
    };
    let parent = get(config, "data_dir").and_then(text).map(|it| format!("{}/", it.trim_matches('/')));
    let mut chosen: Vec<String> = Vec::new();
    for pattern in patterns {
        let pattern = format!("{}{}", parent.as_deref().unwrap_or(""), pattern.trim_start_matches("./"));
        let pattern = glob::Pattern::new(&pattern).with_context(|| format!("`{pattern}` in its card"))?;
        let mut fits: Vec<String> =
            data.iter().filter(|it| pattern.matches(it)).map(|it| it.to_string()).collect();
        fits.sort();
        chosen.extend(fits);
    }
    chosen.dedup();
    if chosen.is_empty() {
        bail!("no file fits {} of its card; its files are {}", patterns.join(", "), some(data));
    }
    Ok(Some(chosen))
}

fn get<'a>(node: &'a Node, key: &str) -> Option<&'a Node> {
    match &node.data {
        Data::Map(entries) => entries.iter().find(|it| it.0 == key).map(|it| &it.1),
        _ => None,
    }
}

fn text(node: &Node) -> Option<&str> {
    match &node.data {
        Data::Scalar { text, .. } => Some(text),
        _ => None,
    }
}

fn texts(node: &Node) -> Vec<String> {
    match &node.data {
        Data::List(items) => items.iter().filter_map(text).map(str::to_string).collect(),
        _ => text(node).map(str::to_string).into_iter().collect(),
    }
}

/// Some of the paths, for a message.
fn some(paths: &[&str]) -> String {
    let more = if paths.len() > 12 { " …" } else { "" };
    format!("{}{more}", paths.iter().take(12).copied().collect::<Vec<_>>().join(", "))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(paths: &[&str], query: &str, card: &str, expected: &str) {
        let wanted = HubSet::parse(&format!("org/d{query}")).unwrap();
        let chosen = match choose_of(paths, &wanted, card) {
            Ok(chosen) => chosen.join(" "),
            Err(error) => format!("{error:#}"),
        };
        assert_eq!(chosen, expected);
    }

    #[test]
    fn by_the_names_of_files() {
        check(&["README.md", "rows.jsonl"], "", "", "rows.jsonl");
        check(&["a.json", "b.json"], "", "", "a.json b.json");
        check(&["data/train.csv", "data/test.csv"], "", "", "data/train.csv");
        check(&["data/train.csv", "data/val.csv"], "?split=validation", "", "data/val.csv");
        check(&["train/x.parquet", "dev/x.parquet"], "?split=dev", "", "dev/x.parquet");
        let shards = [
            "data/train_sft-00000-of-00002.parquet",
            "data/train_sft-00001-of-00002.parquet",
            "data/test_sft-00000-of-00001.parquet",
        ];
        check(&shards, "?split=train_sft", "", &shards[..2].join(" "));
        check(
            &shards,
            "",
            "",
            "it has no split `train`; it has test_sft, train_sft: add `?split=…` to its name",
        );
        check(&["en/train.json", "zh/train.json"], "?subset=zh", "", "zh/train.json");
        check(&["dpo_en.json", "dpo_zh.json"], "?subset=dpo_en", "", "dpo_en.json");
        check(&["en/a.json"], "?subset=fr", "", "it has no subset `fr`; its files are en/a.json");
        check(&["python/a.parquet", "rust/a.parquet"], "?folder=rust", "", "rust/a.parquet");
        check(&["a.json", "b.parquet", "c.parquet"], "", "", "b.parquet c.parquet");
        check(
            &["d.py", "README.md"],
            "",
            "",
            "it has no files of rows, only `d.py`, and no code of a data set is ever run",
        );
        check(&["README.md"], "", "", "it has no file of rows");
    }

    #[test]
    fn by_the_card() {
        let card = "---\nlicense: mit\nconfigs:\n- config_name: en\n  default: true\n  data_files:\n  - split: train\n    path: dpo_en*\n\
            - config_name: zh\n  data_files:\n  - split: train\n    path:\n    - zh/a.json\n    - zh/b.json\n  - split: test\n    path: zh/t.json\n---\n# A set\n";
        let paths = ["dpo_en.json", "zh/a.json", "zh/b.json", "zh/t.json"];
        check(&paths, "", card, "dpo_en.json");
        check(&paths, "?subset=zh", card, "zh/a.json zh/b.json");
        check(&paths, "?subset=zh&split=test", card, "zh/t.json");
        check(&paths, "?subset=fr", card, "it has no subset `fr`; it has en, zh");
        check(
            &paths,
            "?split=test",
            card,
            "it has no split `test`; it has train: add `?split=…` to its name",
        );
        check(
            &paths[1..],
            "",
            card,
            "no file fits dpo_en* of its card; its files are zh/a.json, zh/b.json, zh/t.json",
        );
        check(
            &["a.json"],
            "",
            "---\nconfigs:\n- config_name: default\n  data_files: a.json\n---\n",
            "a.json",
        );
        check(&["a.json"], "", "---\n: : [\n---\n", "a.json");
        let two = "---\nconfigs:\n- config_name: a\n  data_files: a.json\n- config_name: b\n  data_files: b.json\n---\n";
        check(&["a.json", "b.json"], "", two, "it has several subsets, a, b: add `?subset=…` to its name");
    }
}
