//! The model: its name to files, the files to tokenizer and chat template.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::Context as _;
use ferrotune_data::{Added, GgufVocabulary, Template, Tokenizer, check_template, named_template};
use ferrotune_hub::{HubOptions, resolve};
use ferrotune_model::families;
use ferrotune_model::source::ModelFiles;
use ferrotune_model::spec::ModelSpec;
use serde_json::Value;

use crate::config::{RunConfig, TemplateName};
use crate::console::{Console, Usage};
use crate::run::hub::{download_bar, hub_options};

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
    /// The chat template: the model's own, or the one that was asked for.
    pub template: Template,
}

impl OpenModel {
    /// Opens the model that the config names.
    ///
    /// # Errors
    /// When none is named or found, or a file of it is missing or damaged.
    pub fn open(config: &RunConfig, console: &Console) -> anyhow::Result<OpenModel> {
        let UntemplatedModel { name, files, tokenizer } = UntemplatedModel::open(config, console)?;
        let vocabulary = Arc::new(Vocabulary::new(tokenizer, config)?);
        Ok(OpenModel { name, files, vocabulary })
    }
}

/// A model that need not have a chat template: one that is only converted.
pub struct UntemplatedModel {
    /// As it was typed.
    pub name: String,
    /// Spec and weights; the weights are mapped, not read.
    pub files: ModelFiles,
    /// Its tokenizer, or the one that an adapter came with.
    pub tokenizer: Tokenizer,
}

impl UntemplatedModel {
    /// Opens the model that the config names.
    ///
    /// # Errors
    /// When none is named or found, or a file of it is missing or damaged.
    pub fn open(config: &RunConfig, console: &Console) -> anyhow::Result<UntemplatedModel> {
        let name = name(config)?;
        let path = find(config, &name, console)?;
        tracing::info!("model files: {}", path.display());
        let mut files = ModelFiles::open(&path)?;
        files.spec.settle_rope(config.cutoff_len);
        if files.is_text_part {
            console
                .note(format!("{name}: of this model, the part for text is used; the others are left out"));
        }
        let tokenizer = match saved_tokenizer(config) {
            Some(folder) => Tokenizer::from_folder(folder)?,
            None => tokenizer(&files)?,
        };
        Ok(UntemplatedModel { name, files, tokenizer })
    }

    /// Gives the tokenizer the chat template that the config asks for or the adapter was trained with, to be
    /// saved with it.
    ///
    /// # Errors
    /// When the template can't be read, or needs a token that there isn't.
    pub fn set_template(&mut self, config: &RunConfig) -> anyhow::Result<()> {
        if let Some(TemplateSource { source, eos_token, .. }) = chosen_template(config)? {
            if let Some(token) = eos_token {
                self.tokenizer.set_special_token("eos_token", &token)?;
            }
            self.tokenizer.set_chat_template(source);
        }
        Ok(())
    }
}

impl Vocabulary {
    /// Opens tokenizer and chat template of the model that the config names; a folder needs no weights for that.
    ///
    /// # Errors
    /// When the model, its tokenizer or its chat template is not found, or one of them is damaged.
    pub fn open(config: &RunConfig, console: &Console) -> anyhow::Result<Vocabulary> {
        let path = match saved_tokenizer(config) {
            Some(folder) => folder.to_path_buf(),
            None => find(config, &name(config)?, console)?,
        };
        let tokenizer = match path.join("tokenizer.json").is_file() {
            true => Tokenizer::from_folder(&path)?,
            false => tokenizer(&ModelFiles::open(&path)?)?,
        };
        Vocabulary::new(tokenizer, config)
    }

    /// The tokenizer with the tokens and the template that the config asks for.
    fn new(mut tokenizer: Tokenizer, config: &RunConfig) -> anyhow::Result<Vocabulary> {
        tokenizer.add_tokens(&config.add_tokens, Added::Plain)?;
        tokenizer.add_tokens(&config.add_special_tokens, Added::Control)?;
        let template = match chosen_template(config)? {
            Some(TemplateSource { name, source, eos_token }) => {
                if let Some(token) = eos_token {
                    tokenizer.set_special_token("eos_token", &token)?;
                }
                let mut special = tokenizer.special_tokens().clone();
                // One of ours leaves a BOS out that there is not.
                if matches!(config.template, TemplateName::Named(_)) {
                    special.entry("bos_token".to_string()).or_default();
                }
                let template = Template::from_value(&name, &source, &special)?;
                tokenizer.set_chat_template(source);
                template
            }
            None => tokenizer.template()?,
        };
        check_template(&template, &tokenizer)?;
        Ok(Vocabulary { tokenizer, template })
    }
}

/// The template that the config asks for, or that the adapter was trained with; none: the model's own.
fn chosen_template(config: &RunConfig) -> anyhow::Result<Option<TemplateSource>> {
    if config.template != TemplateName::Auto {
        return template_source(&config.template).map(Some);
    }
    let trained_with = config.adapter_name_or_path.last().map(|it| it.join("chat_template.jinja"));
    let Some(file) = trained_with.filter(|file| file.is_file()) else { return Ok(None) };
    let eos_token = eos_beside(&file);
    Ok(Some(TemplateSource { eos_token, ..template_source(&TemplateName::File(file))? }))
}

/// The last adapter's folder of those whose embedding is their own, where it has the tokenizer for that.
fn saved_tokenizer(config: &RunConfig) -> Option<&Path> {
    let saves = |folder: &&PathBuf| {
        let text = fs::read_to_string(folder.join("adapter_config.json")).ok();
        let value: Option<Value> = text.and_then(|it| serde_json::from_str(&it).ok());
        value.is_some_and(|it| it["modules_to_save"].as_array().is_some_and(|it| !it.is_empty()))
    };
    let folder = config.adapter_name_or_path.iter().rfind(saves)?;
    folder.join("tokenizer.json").is_file().then_some(folder)
}

/// What the model that the config names is made of; none where there is no config to read it from.
pub fn model_spec(config: &RunConfig, console: &Console) -> Option<ModelSpec> {
    let path = find(config, &name(config).ok()?, console).ok()?;
    let file = path.join("config.json");
    if !file.is_file() {
        return ModelFiles::open(&path).ok().map(|files| files.spec);
    }
    let value = serde_json::from_str(&fs::read_to_string(&file).ok()?).ok()?;
    families::spec(&value, &file).ok()
}

/// A chat template as it was found.
pub struct TemplateSource {
    /// Its name in messages.
    pub name: String,
    /// A text, or a list of named texts.
    pub source: Value,
    /// The EOS token that it brings.
    pub eos_token: Option<String>,
}

/// The EOS token that was saved beside a template.
fn eos_beside(template: &Path) -> Option<String> {
    let text = fs::read_to_string(template.with_file_name("special_tokens_map.json")).ok()?;
    let map: Value = serde_json::from_str(&text).ok()?;
    let token = map.get("eos_token")?;
    Some(token.as_str().or_else(|| token.get("content")?.as_str())?.to_string())
}

/// Reads a template: by name, a file of jinja, or one of JSON with `chat_template` in it.
///
/// # Errors
/// When a file can't be read, or is JSON without a template.
pub fn template_source(template: &TemplateName) -> anyhow::Result<TemplateSource> {
    let path = match template {
        TemplateName::Auto => anyhow::bail!("no template is named"),
        TemplateName::Named(name) => {
            let named = named_template(name).with_context(|| format!("there is no template `{name}`"))?;
            let (source, eos_token) = (Value::from(named.source), named.eos_token.map(str::to_string));
            return Ok(TemplateSource { name: name.clone(), source, eos_token });
        }
        TemplateName::File(path) => path,
    };
    let name = path.display().to_string();
    let text = fs::read_to_string(path).with_context(|| format!("can't read {name}"))?;
    let source = match path.extension().is_some_and(|ending| ending == "json") {
        true => {
            let value: Value = serde_json::from_str(&text).with_context(|| name.clone())?;
            value.get("chat_template").cloned().with_context(|| format!("{name} has no `chat_template`"))?
        }
        false => Value::from(text),
    };
    Ok(TemplateSource { name, source, eos_token: None })
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
        eot: vocabulary.eot_token_id,
        unk: vocabulary.unk_token_id,
        pad: vocabulary.pad_token_id,
        add_bos: vocabulary.add_bos_token,
        add_eos: vocabulary.add_eos_token,
        add_space_prefix: vocabulary.add_space_prefix,
        chat_template: vocabulary.chat_template,
        more_templates: vocabulary.more_templates,
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
    let options = HubOptions {
        revision: Some(config.model_revision.clone()).filter(|it| it != "main"),
        ..hub_options(config)
    };
    Ok(resolve(name, &options, &mut download_bar(console))?)
}
