//! Data sets: names to files, to rows, to conversations.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::conversation::Conversation;
use crate::counts::{Seen, SetCounts};
use crate::error::{Error, Place, Result};
use crate::formats::{self, Answers, Format, Mapping, Row};
use crate::mixing;
use crate::readers::{self, ENDINGS, Rows};
use crate::registry::{self, HubSet, Origin};
use crate::substitute::substitute;

/// What to do with a row that cannot be used.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum OnBadRow {
    /// Leave it out, and count it with its reason, as LLaMA-Factory leaves out abnormal examples.
    #[default]
    Skip,
    /// Stop at the first one, with its file and line.
    Stop,
}

/// How to read a data set.
#[derive(Clone, Debug, Default)]
pub struct SourceOptions {
    /// Values of `{{name}}` placeholders in the rows; empty leaves all placeholders as they are.
    pub substitute: BTreeMap<String, String>,
    /// At most this many rows, from the first; those left out count.
    pub max_samples: Option<usize>,
    /// What to do with a row that cannot be used.
    pub on_bad_row: OnBadRow,
    /// Seed of what is drawn where a set asks for `num_samples`.
    pub seed: u64,
}

/// A row or a sample that was left out, and why.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Dropped {
    /// File and line.
    pub place: Place,
    /// The reason, as an error message.
    pub reason: String,
}

/// Brings the files of a data set that is on a hub; the error says why it can't.
pub type Fetch<'a> = &'a dyn Fn(&HubSet) -> std::result::Result<Vec<PathBuf>, String>;

/// A data set whose files are here, not yet opened.
#[derive(Clone, Debug)]
pub struct DataSet {
    /// As the config names it.
    pub name: String,
    /// Its files, in the order of reading.
    pub files: Vec<PathBuf>,
    /// So many conversations, drawn at random; some repeatedly where there are fewer.
    pub num_samples: Option<usize>,
    /// Format, columns and answers where a registry says them; else the rows do.
    form: Option<(String, Mapping, Answers)>,
}

impl DataSet {
    /// Finds the set `name`: an entry of `dataset_info.json` in `folder`, a file, a folder or a pattern such as
    /// `data/*.jsonl` (there or here), or a name on the hub ([`HubSet::parse`]). A `folder` called `ONLINE` stands
    /// for the hub alone.
    ///
    /// # Errors
    /// When there is no such set, its entry is wrong, its form isn't known, or it can't be fetched.
    pub fn find(name: &str, folder: &Path, fetch: Fetch) -> Result<DataSet> {
        let set = |files, form, num_samples| DataSet { name: name.to_string(), files, num_samples, form };
        let fetched = |hub: &HubSet| fetch(hub).map_err(Error::Dataset);
        let online = folder == Path::new("ONLINE");
        if !online && folder.to_string_lossy().starts_with("REMOTE:") {
            let folder = folder.display();
            return Err(Error::Dataset(format!(
                "`dataset_dir: {folder}` is not there yet; fetch its dataset_info.json into a folder"
            )));
        }
        let registry = folder.join("dataset_info.json");
        let entries = if online { Default::default() } else { registry::read(&registry)? };
        if let Some(value) = entries.get(name) {
            let entry = registry::entry(name, value, folder)?;
            // What can't be read is said before it is fetched.
            formats::by_name(&entry.formatting, &entry.mapping, entry.answers).map_err(|error| {
                Error::Dataset(format!("data set `{name}` in dataset_info.json: {error}"))
            })?;
            let files = match &entry.origin {
                Origin::Path(path) => files(path)?.ok_or_else(|| {
                    Error::Dataset(format!(
                        "data set `{name}` in dataset_info.json: there is no file `{}`",
                        path.display()
                    ))
                })?,
                Origin::Hub(hub) => fetched(hub)?,
            };
            let form = (entry.formatting, entry.mapping, entry.answers);
            return Ok(set(files, Some(form), entry.num_samples));
        }
        if !online {
            for path in [folder.join(name), PathBuf::from(name)] {
                if let Some(files) = files(&path)? {
                    return Ok(set(files, None, None));
                }
            }
        }
        if let Some(hub) = HubSet::parse(name).filter(|_| !readers::is_data_file(Path::new(name))) {
            return Ok(set(fetched(&hub)?, None, None));
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

    /// What its conversations depend on, beside the files and the options.
    pub fn form(&self) -> String {
        format!("{:?} {:?}", self.form, self.num_samples)
    }

    /// Starts reading.
    ///
    /// # Errors
    /// When the form isn't known.
    pub fn reader(&self, options: &SourceOptions) -> Result<SetReader> {
        let format = match &self.form {
            Some((name, mapping, answers)) => Some(formats::by_name(name, mapping, *answers)?),
            None => None,
        };
        let mut counts = SetCounts { name: self.name.clone(), ..SetCounts::default() };
        if let Some(format) = &format {
            counts.format = format.name().to_string();
            counts.purpose = format.purpose();
        }
        Ok(SetReader {
            files: self.files.clone().into_iter(),
            rows: None,
            format,
            options: options.clone(),
            counts,
            seen: Some(Seen::default()),
        })
    }

    /// Reads the whole set.
    ///
    /// # Errors
    /// When a file can't be read, no row can be used, a placeholder has no value, or one row is wrong and
    /// [`OnBadRow::Stop`].
    pub fn load(&self, options: &SourceOptions) -> Result<Loaded> {
        let mut reader = self.reader(options)?;
        let mut conversations = Vec::new();
        while let Some(row) = reader.next_conversation()? {
            conversations.push(row);
        }
        reader.check_used()?;
        if let Some(count) = self.num_samples {
            let chosen = mixing::drawn(conversations.len(), count, options.seed);
            conversations = chosen.into_iter().map(|index| conversations[index].clone()).collect();
        }
        Ok(Loaded { conversations, counts: reader.counts })
    }
}

/// The conversations of one data set.
#[derive(Debug, Default)]
pub struct Loaded {
    /// The conversations with the place of their rows.
    pub conversations: Vec<(Place, Conversation)>,
    /// Rows, what was left out and why, duplicates.
    pub counts: SetCounts,
}

/// Reads a set row by row; only one row is in memory.
pub struct SetReader {
    files: std::vec::IntoIter<PathBuf>,
    rows: Option<Rows>,
    /// None until a row was recognised.
    format: Option<Box<dyn Format>>,
    options: SourceOptions,
    counts: SetCounts,
    seen: Option<Seen>,
}

impl SetReader {
    /// The same without looking for duplicates, which takes some bytes for each row.
    pub fn without_duplicates(mut self) -> SetReader {
        self.seen = None;
        self
    }

    /// What was read so far.
    pub fn counts(&self) -> &SetCounts {
        &self.counts
    }

    /// The next conversation with its place; none at the end.
    ///
    /// # Errors
    /// As [`DataSet::load`].
    pub fn next_conversation(&mut self) -> Result<Option<(Place, Conversation)>> {
        while self.options.max_samples.is_none_or(|limit| self.counts.rows < limit) {
            let Some(row) = self.next_row()? else { break };
            match row.and_then(|row| self.conversation(row)) {
                Ok((place, conversation)) => {
                    self.counts.use_row(&place, &conversation, self.seen.as_mut());
                    return Ok(Some((place, conversation)));
                }
                Err(Error::Row { place, message }) if self.options.on_bad_row == OnBadRow::Skip => {
                    self.counts.skip(&place, &message);
                }
                Err(error) => return Err(error),
            }
        }
        Ok(None)
    }

    /// The next row, or what is wrong with it; none at the end of the last file.
    fn next_row(&mut self) -> Result<Option<Result<Row>>> {
        loop {
            if let Some(row) = self.rows.as_mut().and_then(Iterator::next) {
                return Ok(Some(row));
            }
            let Some(file) = self.files.next() else { return Ok(None) };
            self.rows = Some(readers::open(&file)?);
            self.counts.files += 1;
        }
    }

    fn conversation(&mut self, mut row: Row) -> Result<(Place, Conversation)> {
        if self.format.is_none() {
            let format = formats::recognise(&row)?;
            self.counts.format = format.name().to_string();
            self.counts.purpose = format.purpose();
            self.format = Some(format);
        }
        substitute(&mut row, &self.options.substitute)?;
        let format = self.format.as_ref().ok_or_else(|| row.error("its format is not known"))?;
        let conversation = format.conversation(&row)?;
        Ok((row.place, conversation))
    }

    /// Counts a conversation that was given out and turned out to give nothing.
    pub(crate) fn leave_out(&mut self, place: &Place, reason: &str) {
        self.counts.leave_out(place, reason);
    }

    /// An error unless a row could be used.
    ///
    /// # Errors
    /// When there are no rows, or all were left out.
    pub fn check_used(&self) -> Result<()> {
        if self.counts.used > 0 {
            return Ok(());
        }
        let name = &self.counts.name;
        Err(Error::Dataset(match self.counts.skipped.first() {
            None => format!("data set `{name}` has no rows"),
            Some(first) => {
                let place = first.first.first().map_or(String::new(), |place| format!("{place}: "));
                format!("no row of data set `{name}` can be used; the first one: {place}{}", first.reason)
            }
        }))
    }
}

/// The files that a path stands for: a file, those of a folder, or those that fit a pattern; none where there is
/// nothing.
fn files(path: &Path) -> Result<Option<Vec<PathBuf>>> {
    if path.is_file() {
        return Ok(Some(vec![path.to_path_buf()]));
    }
    let mut found = Vec::new();
    if path.is_dir() {
        files_under(path, 0, &mut found)?;
        if found.is_empty() {
            let path = path.display();
            return Err(Error::Dataset(format!("folder `{path}` has no file of rows; expected {ENDINGS}")));
        }
    } else {
        let pattern = path.to_string_lossy();
        if !pattern.contains(['*', '[', '?']) {
            return Ok(None);
        }
        // A name that is no pattern either is told as a name that is not there.
        let Ok(paths) = glob::glob(&pattern) else { return Ok(None) };
        found.extend(paths.flatten().filter(|path| path.is_file()));
        if found.is_empty() {
            return Ok(None);
        }
    }
    found.sort();
    Ok(Some(found))
}

/// How deep folders are looked into.
const DEEPEST: usize = 16;

fn files_under(folder: &Path, depth: usize, found: &mut Vec<PathBuf>) -> Result<()> {
    let failed = |source| Error::File { action: "read", path: folder.to_path_buf(), source };
    for entry in std::fs::read_dir(folder).map_err(failed)? {
        let path = entry.map_err(failed)?.path();
        let hidden = path.file_name().is_none_or(|name| name.to_string_lossy().starts_with(['.', '_']));
        // What `datasets` and registries write beside the rows.
        let beside = path.file_name().is_some_and(|name| {
            ["dataset_info.json", "state.json", "dataset_dict.json"].iter().any(|it| name == *it)
        });
        if hidden || beside {
            continue;
        }
        if path.is_dir() {
            if depth < DEEPEST {
                files_under(&path, depth + 1, found)?;
            }
        } else if readers::is_data_file(&path) {
            found.push(path);
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests;
