use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use ferrotune_tensor::{Error, Result};
use serde_json::Value;
use sha2::{Digest, Sha256};

use super::bnb::{BnbSource, FourBitKind};
use super::canonical::CanonicalSource;
use super::gguf::GgufSource;
use super::{Changed, GgufVocabulary, Replacement, SafetensorsSource, WeightSource};
use crate::families;
use crate::spec::{CheckpointForm, ModelSpec, names};

/// A model on disk: what it is made of, and its weights.
pub struct ModelFiles {
    /// What the decoder is made of.
    pub spec: ModelSpec,
    /// Its weights, checked to be there in the shapes of the spec.
    pub source: Box<dyn WeightSource>,
    /// config.json (of a model of more than text, that of its part for text), or what a GGUF file says in its place.
    pub config: Value,
    /// The folder has more than this: it is the part for text of a model that sees or hears as well.
    pub is_text_part: bool,
    /// What the weights are in.
    pub kind: FileKind,
    /// How projections are in 4 bits, where bitsandbytes has put them there.
    pub four_bit: Option<FourBitKind>,
    /// The folder or the file.
    pub path: PathBuf,
    /// The tokenizer and the chat template that a GGUF file carries.
    pub vocabulary: Option<GgufVocabulary>,
}

/// What a model's weights are in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FileKind {
    /// A Hugging Face folder: config.json, safetensors, tokenizer files.
    Folder,
    /// One GGUF file.
    Gguf,
}

impl ModelFiles {
    /// Opens a Hugging Face folder, a GGUF file, or a folder that holds one GGUF file and no config.
    ///
    /// # Errors
    /// When a file is missing or damaged, when the family or the form of the weights isn't there
    /// yet, or when a tensor is missing or of another shape than the config says.
    pub fn open(path: impl AsRef<Path>) -> Result<ModelFiles> {
        let path = path.as_ref();
        let metadata = fs::metadata(path).map_err(|source| Error::io(path, source))?;
        let files = match (metadata.is_dir(), only_gguf(path)) {
            (true, Some(file)) => open_gguf(&file)?,
            (true, None) => open_folder(path)?,
            (false, _) if path.extension().is_some_and(|it| it.eq_ignore_ascii_case("gguf")) => {
                open_gguf(path)?
            }
            (false, _) => {
                let message = "expected a model's folder (config.json, safetensors) or a .gguf file";
                return Err(Error::file(path, message));
            }
        };
        check_tensors(&files.spec, files.source.as_ref())?;
        Ok(files)
    }

    /// Puts other tensors in the places of some, such as a head of its own where the embedding served.
    ///
    /// # Errors
    /// When they don't fit each other.
    pub fn change(self, replacements: BTreeMap<String, Replacement>) -> Result<ModelFiles> {
        let ModelFiles { mut spec, source: base, .. } = self;
        if replacements.contains_key(names::HEAD) {
            spec.tie_word_embeddings = false;
        }
        let source = Box::new(Changed { base, replacements });
        spec.vocab_size = source.shape(names::EMBEDDING)?.0;
        check_tensors(&spec, source.as_ref())?;
        Ok(ModelFiles { spec, source, ..self })
    }

    /// A short text that is another when the model is: config, sizes of the files, their headers.
    pub fn fingerprint(&self) -> String {
        let mut hash = Sha256::new();
        hash.update(self.config.to_string());
        hash.update(self.source.fingerprint());
        super::hex(&hash.finalize())
    }
}

/// The GGUF file of a folder that has one and no config.json.
fn only_gguf(folder: &Path) -> Option<PathBuf> {
    if folder.join("config.json").exists() {
        return None;
    }
    let paths = fs::read_dir(folder).ok()?.flatten().map(|it| it.path());
    let mut ggufs = paths.filter(|it| it.extension().is_some_and(|it| it == "gguf"));
    let first = ggufs.next();
    if ggufs.next().is_some() { None } else { first }
}

fn open_gguf(path: &Path) -> Result<ModelFiles> {
    let source = GgufSource::open(path)?;
    let config = source.config()?;
    let spec = families::spec(&config, path)?;
    let vocabulary = Some(source.vocabulary()?);
    // Norms are whole in GGUF files, whatever a folder's are.
    let source: Box<dyn WeightSource> = match spec.checkpoint {
        CheckpointForm::Fused => Box::new(CanonicalSource::new(&spec, Box::new(source))?),
        _ => Box::new(source),
    };
    let (kind, path) = (FileKind::Gguf, path.into());
    Ok(ModelFiles { spec, source, config, is_text_part: false, kind, four_bit: None, path, vocabulary })
}

fn open_folder(path: &Path) -> Result<ModelFiles> {
    let file = path.join("config.json");
    if !file.exists() && path.join("adapter_config.json").exists() {
        let message =
            "holds an adapter, not a model: name its base as the model and this folder as the adapter";
        return Err(Error::file(path, message));
    }
    let whole = read_json(&file)?;
    let text_part = families::text_part(&whole);
    let is_text_part = text_part.is_some();
    let config = text_part.unwrap_or(whole);
    let in_four_bits = in_four_bits(&config, &file)?;
    let mut spec = families::spec(&config, &file)?;
    let generation = path.join("generation_config.json");
    if generation.exists() {
        add_end_tokens(&mut spec, &read_json(&generation)?);
    }
    let stored = SafetensorsSource::open(path)?;
    let (stored, four_bit): (Box<dyn WeightSource>, _) = match BnbSource::is_one(&stored) {
        true => {
            let stored = BnbSource::new(stored)?;
            let kind = stored.kind();
            (Box::new(stored), kind)
        }
        false if in_four_bits => {
            let message = "`quantization_config` says that the weights are in 4 bits, but they aren't: take it out of the \
                           config, and set `quantization_bit: 4` to train with 4 bits";
            return Err(Error::file(file, message));
        }
        false => (Box::new(stored), None),
    };
    let source: Box<dyn WeightSource> = match spec.checkpoint {
        _ if is_text_part => Box::new(CanonicalSource::of_language_model(&spec, stored)?),
        CheckpointForm::Canonical => stored,
        _ => Box::new(CanonicalSource::new(&spec, stored)?),
    };
    let (kind, path) = (FileKind::Folder, path.into());
    Ok(ModelFiles { spec, source, config, is_text_part, kind, four_bit, path, vocabulary: None })
}

fn read_json(file: &Path) -> Result<Value> {
    let text = fs::read_to_string(file).map_err(|source| Error::io(file, source))?;
    serde_json::from_str(&text).map_err(|error| Error::file(file, format!("not JSON: {error}")))
}

/// Chat models list the tokens that end a turn in generation_config.json alone.
fn add_end_tokens(spec: &mut ModelSpec, generation: &Value) {
    let ids = match generation.get("eos_token_id") {
        Some(Value::Array(ids)) => ids.clone(),
        Some(id) => vec![id.clone()],
        None => Vec::new(),
    };
    for id in ids.iter().filter_map(Value::as_u64).filter_map(|id| u32::try_from(id).ok()) {
        if !spec.eos_token_ids.contains(&id) {
            spec.eos_token_ids.push(id);
        }
    }
}

/// Whether the config says that bitsandbytes has put the weights into 4 bits; other ways of few bits are refused.
fn in_four_bits(config: &Value, file: &Path) -> Result<bool> {
    let Some(section) = config.get("quantization_config").filter(|it| !it.is_null()) else {
        return Ok(false);
    };
    let is_set = |key: &str| section.get(key).and_then(Value::as_bool) == Some(true);
    let method = section.get("quant_method").and_then(Value::as_str).unwrap_or("unnamed");
    let what = match method {
        _ if is_set("load_in_8bit") => "bitsandbytes 8-bit",
        "bitsandbytes" | "bitsandbytes_4bit" => return Ok(true),
        "unnamed" if is_set("load_in_4bit") => return Ok(true),
        "gptq" => "GPTQ",
        "awq" => "AWQ",
        other => other,
    };
    let message = format!(
        "`quantization_config`: a checkpoint in {what} form can't be read; take the same model in 16 bits and set \
         `quantization_bit: 4`, or take its `-bnb-4bit` form"
    );
    Err(Error::file(file, message))
}

/// Checks that every tensor of the spec is there in its shape and in a type that can be read, and
/// that none is there which the spec leaves out.
fn check_tensors(spec: &ModelSpec, source: &dyn WeightSource) -> Result<()> {
    let wanted = spec.tensors();
    for tensor in &wanted {
        let got = source.shape(&tensor.name)?;
        if got != (tensor.rows, tensor.cols) {
            let message = format!(
                "tensor `{}`: the config asks for {} x {}, the file has {} x {}",
                tensor.name, tensor.rows, tensor.cols, got.0, got.1
            );
            return Err(Error::file(source.path(), message));
        }
        source.dtype(&tensor.name)?;
    }
    let wanted: std::collections::HashSet<&str> = wanted.iter().map(|it| it.name.as_str()).collect();
    let harmless = |name: &str| {
        name.ends_with("rotary_emb.inv_freq") || (spec.tie_word_embeddings && name == names::HEAD)
    };
    match source.names().into_iter().find(|name| !wanted.contains(name) && !harmless(name)) {
        Some(name) => {
            let message = format!(
                "tensor `{name}` has no place in the model that the config describes (family {}, {} layers): \
                 config and weights don't belong together",
                spec.family,
                spec.layers.len()
            );
            Err(Error::file(source.path(), message))
        }
        None => Ok(()),
    }
}
