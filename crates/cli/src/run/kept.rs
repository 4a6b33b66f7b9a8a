//! Projections that an earlier run has put into 4 bits, kept beside downloaded models: the next start with the same model
//! reads them instead of four times as many bytes of the checkpoint, and quantises nothing. Bits are those that quantising
//! gives; whatever isn't exactly right is quantised again.

use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::mpsc::{SyncSender, sync_channel};
use std::thread::{self, JoinHandle};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use ferrotune_hub::cache_dir;
use ferrotune_model::BuildOptions;
use ferrotune_model::source::{FourBit, FourBitScales, KeptWeights, KeptWriter, ModelFiles, kept_key};
use ferrotune_quant::{Absmax, NF4_BLOCK, NF4_GROUP, NF4_LEVELS, Nf4Weight, Scales, dynamic_map};

use crate::machine::free_space;

/// `off`, or the folder to keep them in.
const SWITCH: &str = "FERROTUNE_KEPT_WEIGHTS";
/// Parameters of the projections below which quantising takes no time; a folder that is named has all.
const SMALLEST: u64 = 1 << 28;
/// Bytes of all files together: those that were not used for longest go.
const MOST: u64 = 32 << 30;
/// What is still being written is no older.
const LONGEST_WRITE: Duration = Duration::from_secs(3600);

/// Where the weights of a model are kept, and what says that they are its.
pub(super) struct Kept {
    path: PathBuf,
    key: String,
    /// About what it takes.
    bytes: u64,
}

impl Kept {
    /// None where they aren't wanted.
    pub(super) fn of(files: &ModelFiles, computing: &BuildOptions, scales: Scales) -> Option<Kept> {
        let named = env::var_os(SWITCH).filter(|it| !it.is_empty());
        let folder = match &named {
            Some(value) if value == "off" => return None,
            Some(folder) => PathBuf::from(folder),
            None if files.spec.linear_parameter_count() < SMALLEST => return None,
            None => cache_dir().ok()?.join("kept"),
        };
        let kind = match scales {
            Scales::Plain => "plain",
            Scales::Nested => "nested",
        };
        // The last bit of the scales' mean is not the same everywhere.
        let device = if computing.device.gpu().is_some() { "cuda" } else { "cpu" };
        let mut parts = [env!("CARGO_PKG_VERSION"), "nf4", kind, device].map(str::to_string).to_vec();
        parts.push(files.fingerprint());
        for (name, bytes, changed) in weight_files(&files.path)? {
            parts.extend([name, bytes.to_string(), changed.to_string()]);
        }
        let key = kept_key(&parts);
        let bytes = files.spec.linear_parameter_count() / 16 * 9;
        Some(Kept { path: folder.join(format!("{}.kept", &key[..32])), key, bytes })
    }

    /// What an earlier run has left.
    pub(super) fn open(&self) -> Option<KeptWeights> {
        let kept = KeptWeights::open(&self.path, &self.key)?;
        // Its time says when it was used last.
        if let Ok(file) = fs::File::options().append(true).open(&self.path) {
            let _ = file.set_modified(SystemTime::now());
        }
        Some(kept)
    }

    /// Throws away what is damaged: the next run makes it anew.
    pub(super) fn remove(&self) {
        let _ = fs::remove_file(&self.path);
    }

    /// Keeps what is quantised now, in the background. Where the disk can't or would be almost full, nothing is kept.
    pub(super) fn keep(self) -> Keeper {
        if free_space(&self.path).is_some_and(|free| free < 4 * self.bytes) {
            return Keeper(None);
        }
        // Few at a time, so that they don't pile up in memory where the disk is slow.
        let (sender, receiver) = sync_channel::<Message>(4);
        let writer = thread::spawn(move || {
            let folder = self.path.parent().unwrap_or(Path::new("."));
            let written = fs::create_dir_all(folder).and_then(|()| {
                make_room(folder, MOST);
                let mut writer = KeptWriter::create(&self.path, &self.key)?;
                for message in receiver {
                    match message {
                        Message::Add(name, weight) => writer.add(&name, &four_bit(&weight))?,
                        Message::Finish => return writer.finish(),
                    }
                }
                Ok(())
            });
            if let Err(error) = written {
                tracing::info!("weights in 4 bits are not kept: {}: {error}", self.path.display());
            }
        });
        WRITERS.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).push(writer);
        Keeper(Some(sender))
    }
}

/// Threads that may still be writing.
static WRITERS: Mutex<Vec<JoinHandle<()>>> = Mutex::new(Vec::new());

/// Waits until what is kept is written: before the process ends.
pub fn wait_for_writers() {
    let writers = std::mem::take(&mut *WRITERS.lock().unwrap_or_else(|poisoned| poisoned.into_inner()));
    for writer in writers {
        // A writer that panicked has left nothing under the file's name.
        let _ = writer.join();
    }
}

enum Message {
    Add(String, Nf4Weight),
    Finish,
}

/// Takes weights that are to be kept. Dropped before [`Keeper::finish`], it keeps none.
pub(super) struct Keeper(Option<SyncSender<Message>>);

impl Keeper {
    pub(super) fn wants(&self) -> bool {
        self.0.is_some()
    }

    pub(super) fn add(&mut self, tensor: String, weight: Nf4Weight) {
        self.send(Message::Add(tensor, weight));
    }

    pub(super) fn finish(mut self) {
        self.send(Message::Finish);
    }

    fn send(&mut self, message: Message) {
        // Whoever can't write has stopped listening.
        if self.0.as_ref().is_some_and(|it| it.send(message).is_err()) {
            self.0 = None;
        }
    }
}

fn four_bit(weight: &Nf4Weight) -> FourBit<'_> {
    use ferrotune_nn::Weight as _;
    FourBit {
        rows: weight.rows(),
        cols: weight.cols(),
        codes: weight.codes.as_slice().into(),
        table: NF4_LEVELS,
        block: NF4_BLOCK,
        scales: match &weight.absmax {
            Absmax::Plain(values) => FourBitScales::Plain(values.clone()),
            Absmax::Nested { codes, nested_absmax, offset } => FourBitScales::Nested {
                codes: codes.clone(),
                map: dynamic_map().to_vec(),
                group: NF4_GROUP,
                nested_absmax: nested_absmax.clone(),
                offset: *offset,
            },
        },
        dtype: weight.dtype,
    }
}

/// Name, length and time of the files that hold weights, sorted; none where they can't be asked for.
fn weight_files(path: &Path) -> Option<Vec<(String, u64, u128)>> {
    let paths: Vec<PathBuf> = match path.is_dir() {
        true => fs::read_dir(path).ok()?.flatten().map(|it| it.path()).collect(),
        false => vec![path.to_path_buf()],
    };
    let holds = |it: &PathBuf| it.extension().is_some_and(|it| it == "safetensors" || it == "gguf");
    let mut files = Vec::new();
    for path in paths.into_iter().filter(holds) {
        let metadata = fs::metadata(&path).ok()?;
        let changed = metadata.modified().ok()?.duration_since(UNIX_EPOCH).ok()?.as_nanos();
        files.push((path.to_string_lossy().into_owned(), metadata.len(), changed));
    }
    files.sort();
    Some(files)
}

/// Removes what was not used for longest, until the others are small enough, and what nobody will finish.
fn make_room(folder: &Path, most: u64) {
    let mut kept = Vec::new();
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        let Ok(metadata) = entry.metadata() else { continue };
        let (path, used) = (entry.path(), metadata.modified().unwrap_or(UNIX_EPOCH));
        match path.extension().and_then(|it| it.to_str()) {
            Some("kept") => kept.push((used, metadata.len(), path)),
            Some("part") if used.elapsed().is_ok_and(|age| age > LONGEST_WRITE) => _ = fs::remove_file(path),
            _ => {}
        }
    }
    kept.sort();
    let mut all: u64 = kept.iter().map(|it| it.1).sum();
    for (_, bytes, path) in kept {
        if all <= most {
            break;
        }
        if fs::remove_file(path).is_ok() {
            all -= bytes;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_not_used_for_longest_makes_room() {
        let folder = env::temp_dir().join(format!("ferrotune-kept-room-{}", std::process::id()));
        fs::create_dir_all(&folder).unwrap();
        for (age, name) in
            [(30, "old.kept"), (20, "older.part"), (10, "new.kept"), (5000, "left.part"), (9999, "a.txt")]
        {
            fs::write(folder.join(name), [0; 100]).unwrap();
            let file = fs::File::options().append(true).open(folder.join(name)).unwrap();
            file.set_modified(SystemTime::now() - Duration::from_secs(age)).unwrap();
        }
        let names = || {
            let mut names: Vec<_> = fs::read_dir(&folder)
                .unwrap()
                .flatten()
                .map(|it| it.file_name().into_string().unwrap())
                .collect();
            names.sort();
            names
        };
        make_room(&folder, 200);
        assert_eq!(names(), ["a.txt", "new.kept", "old.kept", "older.part"]);
        make_room(&folder, 199);
        assert_eq!(names(), ["a.txt", "new.kept", "older.part"]);
        fs::remove_dir_all(folder).unwrap();
    }
}
