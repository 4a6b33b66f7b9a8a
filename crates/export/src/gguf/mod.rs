//! GGUF files, as llama.cpp and what is made of it read them: a whole model in one of llama.cpp's mixes
//! ([`write_gguf`]), or a LoRA adapter by itself ([`write_gguf_adapter`]).

mod adapter;
mod blocks;
mod file;
mod k_quants;
mod metadata;
mod mix;
mod rounded;
#[cfg(test)]
mod tests;
mod vocabulary;

use std::ops::Range;
use std::path::Path;

use ferrotune_model::source::{GgufArchitecture, GgufType, GgufVocabulary, RawValue, WeightSource, file_row};
use ferrotune_model::spec::{CheckpointTensor, ModelSpec, names};
use ferrotune_tensor::{Error, Result};

pub use adapter::write_gguf_adapter;
use file::{Fill, Metadata, Planned, Value};
pub use mix::GgufMix;
use mix::{Shape, Size};
pub use rounded::rounded_as_gguf;

/// A model to be written, whatever its weights come from.
pub struct GgufModel<'a> {
    /// What it is made of.
    pub spec: &'a ModelSpec,
    /// Its weights by canonical names, adapters applied.
    pub weights: &'a dyn WeightSource,
    /// What turns text into tokens.
    pub tokenizer: GgufTokenizer,
    /// A name for people.
    pub name: String,
    /// The base model's name on the hub, where it has one.
    pub base_model: Option<String>,
}

/// A tokenizer as a GGUF file says it.
#[derive(Clone, Debug)]
pub enum GgufTokenizer {
    /// In parts.
    Made(Box<GgufVocabulary>),
    /// As another GGUF file said it.
    Kept(Vec<(String, RawValue)>),
}

/// What was written.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct GgufReport {
    /// Bytes of the file.
    pub bytes: u64,
    /// How many tensors have each type, by its name.
    pub types: Vec<(&'static str, usize)>,
    /// Where llama.cpp computes something else than the model.
    pub notes: Vec<String>,
}

/// Writes a model. Tensors are read, put into their types and written piece by piece.
///
/// # Errors
/// When llama.cpp doesn't have the family, or computes something else than the spec says; when a weight can't be
/// read or isn't a number; when the file can't be written. Nothing is left of it then.
pub fn write_gguf(path: &Path, model: &GgufModel, mix: GgufMix) -> Result<GgufReport> {
    let architecture = architecture(path, model.spec)?;
    let refused = |what: String| {
        let message = format!(
            "llama.cpp has no {what} in models of the kind `{}`: it can't be written as GGUF",
            architecture.name
        );
        Error::file(path, message)
    };
    let notes = metadata::check(model.spec, architecture).map_err(refused)?;
    let mut metadata = Metadata::default();
    metadata.text("general.architecture", architecture.name);
    metadata.text("general.type", "model");
    general(model, &mut metadata);
    metadata::model(model.spec, architecture, &mut metadata);
    metadata.set("general.file_type", Value::U32(mix.file_type()));
    metadata.set("general.quantization_version", Value::U32(2));
    let wrong = |message| Error::file(path, message);
    vocabulary::write(&model.tokenizer, model.spec.vocab_size, &mut metadata).map_err(wrong)?;
    let mut tensors = tensors(path, model.spec, model.weights, architecture)?;
    let kinds = kinds(mix, model.spec, architecture, &tensors);
    tensors.iter_mut().zip(&kinds).for_each(|(tensor, kind)| tensor.kind = *kind);
    let bytes = file::write(path, &metadata, &tensors)?;
    Ok(GgufReport { bytes, types: counted(&kinds), notes })
}

/// The type of each tensor.
fn kinds(
    mix: GgufMix,
    spec: &ModelSpec,
    architecture: &GgufArchitecture,
    tensors: &[Planned],
) -> Vec<GgufType> {
    let shapes: Vec<Shape> =
        tensors.iter().map(|it| Shape { name: &it.name, rows: it.rows, cols: it.cols }).collect();
    mix::types(mix, &shapes, spec.layers.len(), size(spec, architecture))
}

fn architecture(path: &Path, spec: &ModelSpec) -> Result<&'static GgufArchitecture> {
    GgufArchitecture::of(spec).ok_or_else(|| {
        Error::file(path, format!("models of the family `{}` can't be written as GGUF yet", spec.family))
    })
}

fn size(spec: &ModelSpec, architecture: &GgufArchitecture) -> Size {
    let attention = &spec.layers[0].attention;
    let shared = attention.num_attention_heads != attention.num_key_value_heads;
    let large = (architecture.name == "llama" && shared) || architecture.name == "qwen2";
    if spec.layers[0].mlp.experts.is_some_and(|it| it.num_experts == 8) {
        return Size::EightExperts;
    }
    if spec.layers.len() == 80 && large { Size::SeventyBillion } else { Size::Usual }
}

fn counted(kinds: &[GgufType]) -> Vec<(&'static str, usize)> {
    let mut counts: Vec<(&'static str, usize)> = Vec::new();
    for kind in kinds {
        match counts.iter_mut().find(|it| it.0 == kind.name()) {
            Some(count) => count.1 += 1,
            None => counts.push((kind.name(), 1)),
        }
    }
    counts
}

/// What it is called and where it comes from.
fn general(model: &GgufModel, metadata: &mut Metadata) {
    metadata.text("general.name", &model.name);
    metadata.text("general.size_label", size_label(model.spec.parameter_count()));
    let hub = model.base_model.as_deref().and_then(|it| it.split_once('/'));
    if let Some((organization, name)) = hub {
        metadata.set("general.base_model.count", Value::U32(1));
        metadata.text("general.base_model.0.name", name.replace('-', " "));
        metadata.text("general.base_model.0.organization", organization);
        metadata
            .text("general.base_model.0.repo_url", format!("https://huggingface.co/{organization}/{name}"));
    }
}

/// Two digits and a letter: `135M`, `1.5B`.
fn size_label(parameters: u64) -> String {
    let units = [(1e12, 'T'), (1e9, 'B'), (1e6, 'M')];
    let (unit, letter) = units.into_iter().find(|it| parameters as f64 > it.0).unwrap_or((1e3, 'K'));
    let scaled = parameters as f64 / unit;
    if scaled.round() >= 10.0 { format!("{scaled:.0}{letter}") } else { format!("{scaled:.1}{letter}") }
}

/// What frequencies are divided by, where that is no scaling of all alike.
fn rope_factors(spec: &ModelSpec) -> Vec<(&'static str, Vec<f32>)> {
    if let Some(two) = &spec.long_rope {
        let (long, short) = (two.factors(&two.long), two.factors(&two.short));
        return vec![("rope_factors_long.weight", long), ("rope_factors_short.weight", short)];
    }
    let factors = spec.layers[0].attention.rope.as_ref().and_then(|rope| metadata::rope_parts(rope).factors);
    factors.map(|it| ("rope_freqs.weight", it)).into_iter().collect()
}

/// All tensors of the file, the layers in their order.
fn tensors<'a>(
    path: &Path,
    spec: &ModelSpec,
    weights: &'a dyn WeightSource,
    architecture: &GgufArchitecture,
) -> Result<Vec<Planned<'a>>> {
    let mut planned = Vec::new();
    for (name, factors) in rope_factors(spec) {
        let cols = factors.len();
        let fill: Fill = Box::new(move |_, out| {
            out.copy_from_slice(&factors);
            Ok(())
        });
        planned.push(Planned {
            name: name.to_string(),
            kind: GgufType::F32,
            rows: None,
            matrices: 1,
            cols,
            together: 1,
            parts: Vec::new(),
            fill,
        });
    }
    let mut wanted = stacked(spec.checkpoint_tensors());
    if spec.tie_word_embeddings && architecture.name == "olmo2" {
        // llama.cpp wants the head by itself.
        let head = wanted.iter().find(|it| it.name == names::EMBEDDING).cloned();
        wanted.extend(head.map(|it| CheckpointTensor { name: names::HEAD.into(), ..it }));
    }
    for tensor in wanted {
        // Fused parts have a name of their own, others are called as they are canonically.
        let canonical = if architecture.fused { &tensor.name } else { &tensor.parts[0] };
        let canonical = if tensor.name == names::HEAD { &tensor.name } else { canonical };
        let Some(name) = architecture.tensor(canonical) else {
            let message = format!("llama.cpp has no place for the tensor `{}`", tensor.name);
            return Err(Error::file(path, message));
        };
        let rows = (tensor.shape().len() == 2).then_some(tensor.rows);
        let width = architecture.pairs_are_neighbours.then(|| head_width(spec, &tensor.name)).flatten();
        let (cols, is_vector, from) = (tensor.cols, rows.is_none(), tensor.parts.clone());
        let fill: Fill<'a> = Box::new(move |rows, out| {
            let last = rows.end == tensor.rows;
            read_stacked(weights, &from, rows, out)?;
            if last {
                from.iter().for_each(|part| weights.forget(part));
            }
            if let Some(width) = width {
                weave(out, width, if is_vector { 1 } else { cols });
            }
            Ok(())
        });
        let together = width.filter(|_| rows.is_some()).unwrap_or(1);
        let (kind, parts) = (GgufType::F32, tensor.parts);
        let matrices = if name.ends_with("_exps.weight") { parts.len() } else { 1 };
        planned.push(Planned { name, kind, rows, matrices, cols, together, parts, fill });
    }
    Ok(planned)
}

/// Puts the projections of a layer's experts one above the other: each becomes one tensor, called as the first expert's.
fn stacked(tensors: Vec<CheckpointTensor>) -> Vec<CheckpointTensor> {
    let mut all: Vec<CheckpointTensor> = Vec::new();
    for it in tensors {
        // A layer's experts follow each other, and have three projections at most.
        if let Some(first) = of_first_expert(&it.parts[0])
            && let Some(whole) = all.iter_mut().rev().take(3).find(|whole| whole.parts[0] == first)
        {
            whole.rows += it.rows;
            whole.parts.extend(it.parts);
            continue;
        }
        all.push(it);
    }
    all
}

/// `model.layers.3.mlp.experts.0.up_proj.weight` of the same of another expert.
fn of_first_expert(name: &str) -> Option<String> {
    let (layer, part) = name.split_once(".mlp.experts.")?;
    let (_, rest) = part.split_once('.')?;
    Some(format!("{layer}.mlp.experts.0.{rest}"))
}

/// The width of the heads whose rows are woven: those of q and k.
fn head_width(spec: &ModelSpec, name: &str) -> Option<usize> {
    let (module, _) = name.rsplit_once('.')?;
    (module.ends_with(names::Q) || module.ends_with(names::K)).then(|| spec.layers[0].attention.head_dim)
}

/// Rows of several tensors one above the other.
fn read_stacked(
    weights: &dyn WeightSource,
    from: &[String],
    rows: Range<usize>,
    out: &mut [f32],
) -> Result<()> {
    let cols = out.len() / rows.len().max(1);
    let mut first = 0;
    for name in from {
        let count = weights.shape(name)?.0;
        let (start, end) = (rows.start.max(first), rows.end.min(first + count));
        if start < end {
            let place = (start - rows.start) * cols..(end - rows.start) * cols;
            weights.read_rows(name, start - first..end - first, &mut out[place])?;
        }
        first += count;
    }
    Ok(())
}

/// Brings whole heads of `width` rows into llama.cpp's order.
fn weave(values: &mut [f32], width: usize, cols: usize) {
    for head in values.chunks_mut(width * cols) {
        let ours = head.to_vec();
        for (row, values) in ours.chunks(cols).enumerate() {
            let theirs = file_row(row, width);
            head[theirs * cols..][..cols].copy_from_slice(values);
        }
    }
}
