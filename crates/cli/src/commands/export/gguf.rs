//! GGUF files for llama.cpp and Ollama: the model as one, or the adapter by itself, each with a Modelfile.

use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail};
use ferrotune_data::Tokenizer;
use ferrotune_export::{
    GgufMix, GgufModel, GgufReport, GgufTokenizer, PeftAdapter, is_hub_name, write_gguf, write_gguf_adapter,
    write_whole,
};
use ferrotune_model::source::{FileKind, GgufVocabulary, ModelFiles, RawValue, raw_vocabulary};
use ferrotune_model::spec::ModelSpec;

use super::ollama::Modelfile;
use crate::config::ExportFormat;
use crate::console::{Console, bytes};

/// What a format stores weights as; none where it is no GGUF file of a whole model.
pub fn mix(format: ExportFormat) -> Option<GgufMix> {
    match format {
        ExportFormat::GgufF32 => Some(GgufMix::F32),
        ExportFormat::GgufF16 => Some(GgufMix::F16),
        ExportFormat::GgufBf16 => Some(GgufMix::Bf16),
        ExportFormat::GgufQ8 => Some(GgufMix::Q8_0),
        ExportFormat::GgufQ4 => Some(GgufMix::Q4_0),
        ExportFormat::GgufQ4KM => Some(GgufMix::Q4KM),
        ExportFormat::GgufQ5KM => Some(GgufMix::Q5KM),
        ExportFormat::GgufQ6K => Some(GgufMix::Q6K),
        _ => None,
    }
}

/// Writes a whole model and its Modelfile; returns the model's file.
///
/// # Errors
/// When llama.cpp hasn't such models or tokenizers, or a file can't be written.
pub fn write_model(
    folder: &Path,
    name: &str,
    files: &ModelFiles,
    tokenizer: &Tokenizer,
    mix: GgufMix,
    console: &Console,
) -> anyhow::Result<PathBuf> {
    let (written, notes) = vocabulary(files, tokenizer)?;
    notes.iter().for_each(|note| console.warn(note.clone()));
    let model = GgufModel {
        spec: &files.spec,
        weights: files.source.as_ref(),
        tokenizer: written,
        name: title(folder),
        base_model: Some(name.to_string()).filter(|it| is_hub_name(it)),
    };
    create(folder)?;
    let path = folder.join(format!("{}-{}.gguf", title(folder), mix.name()));
    let report = write_gguf(&path, &model, mix)?;
    let types: Vec<String> = report.types.iter().map(|(kind, count)| format!("{count} of {kind}")).collect();
    report_of(&path, &report, console);
    tracing::info!("tensors: {}", types.join(", "));
    let from = format!("./{}", file_name(&path));
    write_modelfile(folder, &from, None, &files.spec, tokenizer)?;
    Ok(path)
}

/// Writes an adapter by itself and its Modelfile.
///
/// # Errors
/// When llama.cpp hasn't such models or adapters, or a file can't be written.
pub fn write_adapter(
    folder: &Path,
    name: &str,
    files: &ModelFiles,
    tokenizer: &Tokenizer,
    adapter: &PeftAdapter,
    console: &Console,
) -> anyhow::Result<()> {
    if !tokenizer.new_tokens().is_empty() {
        bail!("the adapter has tokens of its own, and llama.cpp's adapters can't; export the merged model");
    }
    create(folder)?;
    let path = folder.join(format!("{}-lora.gguf", title(folder)));
    let report = write_gguf_adapter(&path, &files.spec, adapter, &title(folder))?;
    report_of(&path, &report, console);
    let base = match files.kind {
        FileKind::Gguf => {
            files.path.canonicalize().unwrap_or_else(|_| files.path.clone()).display().to_string()
        }
        FileKind::Folder => {
            let base = name.trim_end_matches('/').rsplit('/').next().unwrap_or("base").to_string();
            console.note(format!(
                "Modelfile: FROM names ./{base}-F16.gguf; write it with `ferrotune export --model {name} --format gguf-f16`"
            ));
            format!("./{base}-F16.gguf")
        }
    };
    write_modelfile(folder, &base, Some(&format!("./{}", file_name(&path))), &files.spec, tokenizer)
}

fn create(folder: &Path) -> anyhow::Result<()> {
    std::fs::create_dir_all(folder).with_context(|| folder.display().to_string())
}

fn report_of(path: &Path, report: &GgufReport, console: &Console) {
    report.notes.iter().for_each(|note| console.warn(note.clone()));
    console.plain(format!("wrote {} ({})", path.display(), bytes(report.bytes)));
}

/// The folder's name.
fn title(folder: &Path) -> String {
    let name = folder
        .canonicalize()
        .ok()
        .as_deref()
        .unwrap_or(folder)
        .file_name()
        .map(|it| it.to_string_lossy().into_owned());
    name.unwrap_or_else(|| "model".to_string())
}

fn file_name(path: &Path) -> String {
    path.file_name().map(|it| it.to_string_lossy().into_owned()).unwrap_or_default()
}

/// What the file says of the tokenizer: what the base's GGUF file says, or what the tokenizer comes to.
fn vocabulary(files: &ModelFiles, tokenizer: &Tokenizer) -> anyhow::Result<(GgufTokenizer, Vec<String>)> {
    let spec = &files.spec;
    if let Some(base) = &files.vocabulary
        && base.tokens.len() == spec.vocab_size
        && tokenizer.vocabulary_size() <= spec.vocab_size
        && tokenizer.new_tokens().is_empty()
    {
        let mut entries = raw_vocabulary(&files.path)?;
        let mut replace = |key: &str, value: RawValue| match entries.iter_mut().find(|it| it.0 == key) {
            Some(entry) => entry.1 = value,
            None => entries.push((key.to_string(), value)),
        };
        if let Some(template) = tokenizer.chat_template().and_then(|it| it.as_str())
            && base.chat_template.as_deref() != Some(template)
        {
            replace("tokenizer.chat_template", RawValue::text(template));
        }
        if let Some(eos) = tokenizer.eos().filter(|it| base.eos_token_id != Some(*it)) {
            replace("tokenizer.ggml.eos_token_id", RawValue::whole(eos));
        }
        return Ok((GgufTokenizer::Kept(entries), Vec::new()));
    }
    let (made, notes) = tokenizer.gguf_vocabulary()?;
    let eos = made.eos.or(spec.eos_token_ids.first().copied());
    let vocabulary = GgufVocabulary {
        model: made.model,
        pre: made.pre,
        tokens: made.tokens,
        scores: made.scores,
        token_types: made.token_types,
        merges: made.merges,
        bos_token_id: made.bos.or(spec.bos_token_id),
        eos_token_id: eos,
        eot_token_id: spec.eos_token_ids.iter().copied().find(|it| Some(*it) != eos),
        unk_token_id: made.unk,
        pad_token_id: made.pad.or(spec.pad_token_id),
        add_bos_token: made.add_bos,
        add_eos_token: made.add_eos,
        add_space_prefix: made.add_space_prefix,
        chat_template: made.chat_template,
        more_templates: made.more_templates,
    };
    Ok((GgufTokenizer::Made(Box::new(vocabulary)), notes))
}

fn write_modelfile(
    folder: &Path,
    from: &str,
    adapter: Option<&str>,
    spec: &ModelSpec,
    tokenizer: &Tokenizer,
) -> anyhow::Result<()> {
    let ids = tokenizer.eos().into_iter().chain(spec.eos_token_ids.iter().copied());
    let mut stops: Vec<String> = Vec::new();
    for stop in ids.filter_map(|id| tokenizer.piece(id)) {
        if !stops.contains(&stop) {
            stops.push(stop);
        }
    }
    let template = tokenizer.template().ok();
    let begin = tokenizer.special_tokens().get("bos_token").filter(|_| tokenizer.adds_bos());
    let modelfile = Modelfile {
        from,
        adapter,
        stops: &stops,
        template: template.as_ref(),
        begin: begin.map_or("", String::as_str),
    };
    Ok(write_whole(&folder.join("Modelfile"), modelfile.text().as_bytes())?)
}
