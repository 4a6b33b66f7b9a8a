//! The model: its name to files, the files to tokenizer and chat template.

use std::path::PathBuf;
use std::sync::Arc;

use ferrotune_data::{GgufVocabulary, Template, Tokenizer, check_template};
use ferrotune_hub::{HubOptions, resolve};
use ferrotune_model::source::ModelFiles;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use crate::config::RunConfig;
use crate::console::{Console, Usage};

/// A model's files with what turns text into its tokens.
pub struct OpenModel {
    /// As it was typed.
    pub name: String,
    /// Spec and weights; the weights are mapped, not read.
    pub files: ModelFiles,
    /// Tokenizer and chat template.
    pub vocabulary: Arc<Vocabulary>,
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
    pub fn open(config: &RunConfig, console: &Console) -> anyhow::Result<OpenModel> {
        let name = name(config)?;
        let path = find(config, &name, console)?;
        tracing::info!("model files: {}", path.display());
        let files = ModelFiles::open(&path)?;
        let vocabulary = Arc::new(Vocabulary::of(&files)?);
        Ok(OpenModel { name, files, vocabulary })
    }
}

impl Vocabulary {
    /// Opens tokenizer and chat template of the model that the config names; a folder needs no weights for that.
    ///
    /// # Errors
    /// When the model, its tokenizer or its chat template is not found, or one of them is damaged.
    pub fn open(config: &RunConfig, console: &Console) -> anyhow::Result<Vocabulary> {
        let path = find(config, &name(config)?, console)?;
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

/// The local folder or file of a model; one that is not here yet is fetched.
fn find(config: &RunConfig, name: &str, console: &Console) -> anyhow::Result<PathBuf> {
    let from_env = HubOptions::from_env();
    let options = HubOptions {
        cache_dir: config.cache_dir.clone(),
        revision: Some(config.model_revision.clone()).filter(|it| it != "main"),
        token: config.hf_hub_token.clone().or(from_env.token.clone()),
        ..from_env
    };
    let bar = ProgressBar::hidden();
    let style = ProgressStyle::with_template(
        "{msg} [{bar:30}] {bytes} of {total_bytes}, {bytes_per_sec}, {eta} left",
    );
    bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()).progress_chars("=> "));
    let path = resolve(name, &options, &mut |progress| {
        if bar.is_hidden() && console.shows_progress() {
            bar.set_draw_target(ProgressDrawTarget::stderr());
        }
        bar.set_length(progress.total);
        bar.set_position(progress.done);
        bar.set_message(progress.file.to_string());
    });
    bar.finish_and_clear();
    Ok(path?)
}
