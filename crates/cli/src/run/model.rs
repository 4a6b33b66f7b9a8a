//! The model: its name to files, the files to tokenizer and chat template.

use std::path::{Path, PathBuf};

use anyhow::bail;
use ferrotune_data::{GgufVocabulary, Template, Tokenizer, check_template};
use ferrotune_model::source::ModelFiles;

use crate::config::RunConfig;
use crate::console::{Console, Usage};
use crate::machine;

/// A model's files with what turns text into its tokens.
pub struct OpenModel {
    /// As it was typed.
    pub name: String,
    /// Spec and weights; the weights are mapped, not read.
    pub files: ModelFiles,
    /// Tokenizer and chat template.
    pub vocabulary: Vocabulary,
}

/// What turns text into tokens; no weights are needed for it.
pub struct Vocabulary {
    /// The tokenizer.
    pub tokenizer: Tokenizer,
    /// The model's own chat template.
    pub template: Template,
}

impl OpenModel {
    /// Opens the model that the config names.
    ///
    /// # Errors
    /// When none is named or found, or a file of it is missing or damaged.
    pub fn open(config: &RunConfig, _console: &Console) -> anyhow::Result<OpenModel> {
        let name = name(config)?;
        let path = find(config, &name)?;
        tracing::info!("model files: {}", path.display());
        let files = ModelFiles::open(&path)?;
        let vocabulary = Vocabulary::of(&files)?;
        Ok(OpenModel { name, files, vocabulary })
    }
}

impl Vocabulary {
    /// Opens tokenizer and chat template of the model that the config names; a folder needs no weights for that.
    ///
    /// # Errors
    /// When the model, its tokenizer or its chat template is not found, or one of them is damaged.
    pub fn open(config: &RunConfig, _console: &Console) -> anyhow::Result<Vocabulary> {
        let path = find(config, &name(config)?)?;
        if path.join("tokenizer.json").is_file() {
            return Vocabulary::new(Tokenizer::from_folder(&path)?);
        }
        Vocabulary::of(&ModelFiles::open(&path)?)
    }

    /// Tokenizer and chat template of open files.
    fn of(files: &ModelFiles) -> anyhow::Result<Vocabulary> {
        Vocabulary::new(tokenizer(files)?)
    }

    fn new(tokenizer: Tokenizer) -> anyhow::Result<Vocabulary> {
        let template = tokenizer.template()?;
        check_template(&template, &tokenizer)?;
        Ok(Vocabulary { tokenizer, template })
    }
}

/// The tokenizer of open files: its own, or the one inside a GGUF file.
fn tokenizer(files: &ModelFiles) -> anyhow::Result<Tokenizer> {
    let Some(vocabulary) = &files.vocabulary else { return Ok(Tokenizer::from_folder(&files.path)?) };
    let vocabulary = vocabulary.clone();
    Ok(Tokenizer::from_gguf(&GgufVocabulary {
        model: vocabulary.model,
        pre: vocabulary.pre,
        tokens: vocabulary.tokens,
        scores: vocabulary.scores,
        token_types: vocabulary.token_types,
        merges: vocabulary.merges,
        bos: vocabulary.bos_token_id,
        eos: vocabulary.eos_token_id,
        unk: vocabulary.unk_token_id,
        pad: vocabulary.pad_token_id,
        add_bos: vocabulary.add_bos_token,
        add_space_prefix: vocabulary.add_space_prefix,
        chat_template: vocabulary.chat_template,
    })?)
}

fn name(config: &RunConfig) -> anyhow::Result<String> {
    match &config.model_name_or_path {
        Some(name) => Ok(name.clone()),
        None => {
            Err(Usage::one("`model_name_or_path`: no model is named; give a folder, a GGUF file or a name")
                .into())
        }
    }
}

/// A path as it is, or a folder of the model cache: `owner/name`, or the name alone where one owner has it.
fn find(config: &RunConfig, name: &str) -> anyhow::Result<PathBuf> {
    if Path::new(name).exists() {
        return Ok(PathBuf::from(name));
    }
    let cache = config.cache_dir.clone().unwrap_or_else(machine::model_cache);
    let wanted = name.replace('/', "--");
    let entries = std::fs::read_dir(&cache).into_iter().flatten().flatten();
    let mut found: Vec<PathBuf> = entries
        .filter(|entry| {
            let folder = entry.file_name().to_string_lossy().into_owned();
            folder == wanted || folder.ends_with(&format!("--{wanted}"))
        })
        .map(|entry| entry.path())
        .collect();
    found.sort();
    match found.as_slice() {
        [one] => Ok(one.clone()),
        [] => bail!(
            "model `{name}`: neither a path nor in the model cache {}; downloading is not there yet",
            cache.display()
        ),
        _ => bail!(
            "model `{name}`: the model cache {} has several of this name; say whose it is",
            cache.display()
        ),
    }
}
