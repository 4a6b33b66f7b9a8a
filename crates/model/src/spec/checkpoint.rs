//! Canonical tensors to those of a checkpoint in the family's own form, for whoever writes one.

use super::{CheckpointForm, ModelSpec, names};

/// Projections that [`CheckpointForm::Fused`] puts one above the other: the name of the whole, its parts.
pub const FUSED: [(&str, &[&str]); 2] = [
    ("self_attn.qkv_proj", &[names::Q, names::K, names::V]),
    ("mlp.gate_up_proj", &[names::GATE, names::UP]),
];

/// A tensor as a checkpoint in the family's own form holds it.
#[derive(Clone, Debug, PartialEq)]
pub struct CheckpointTensor {
    /// Its name there.
    pub name: String,
    /// The canonical tensors that it is made of, one above the other.
    pub parts: Vec<String>,
    /// Rows; 1 for a vector.
    pub rows: usize,
    /// Columns; the length of a vector.
    pub cols: usize,
    /// What is taken off each number.
    pub less: f32,
}

impl CheckpointTensor {
    /// Its shape as Hugging Face's files have it: a vector has one dimension.
    pub fn shape(&self) -> Vec<usize> {
        let vector = self.rows == 1 && (self.name.ends_with("norm.weight") || self.name.ends_with(".bias"));
        if vector { vec![self.cols] } else { vec![self.rows, self.cols] }
    }
}

impl ModelSpec {
    /// Every tensor of a checkpoint in the family's own form, in the order of the model.
    pub fn checkpoint_tensors(&self) -> Vec<CheckpointTensor> {
        let mut all: Vec<CheckpointTensor> = Vec::new();
        for it in self.tensors() {
            let less_one =
                self.checkpoint == CheckpointForm::NormsLessOne && it.name.ends_with("norm.weight");
            let fused = match self.checkpoint {
                CheckpointForm::Fused => fused_name(&it.name),
                _ => None,
            };
            if let Some(name) = &fused
                && let Some(whole) = all.iter_mut().rev().take(4).find(|whole| whole.name == *name)
            {
                whole.parts.push(it.name);
                whole.rows += it.rows;
                continue;
            }
            all.push(CheckpointTensor {
                name: fused.unwrap_or_else(|| match self.checkpoint {
                    CheckpointForm::Mixtral => to_mixtral(&it.name),
                    _ => it.name.clone(),
                }),
                parts: vec![it.name],
                rows: it.rows,
                cols: it.cols,
                less: if less_one { 1.0 } else { 0.0 },
            });
        }
        all
    }
}

/// `model.layers.0.self_attn.q_proj.weight` → `model.layers.0.self_attn.qkv_proj.weight`
fn fused_name(name: &str) -> Option<String> {
    let stem = name.strip_suffix(".weight")?;
    FUSED.iter().find_map(|(fused, parts)| {
        let layer = parts.iter().find_map(|part| stem.strip_suffix(part))?;
        Some(format!("{layer}{fused}.weight"))
    })
}

/// The canonical name of a tensor of the part for text, in a checkpoint of more than text, as hubs have it or as transformers 5 names
/// it; none for the other parts' tensors.
pub(crate) fn from_language_model(name: &str) -> Option<String> {
    let hubs = name.strip_prefix("language_model.");
    match (hubs, name.strip_prefix("model.language_model.")) {
        (Some(inner), _) => Some(inner.to_string()),
        (None, Some(inner)) => Some(format!("model.{inner}")),
        (None, None) => name.starts_with("lm_head.").then(|| name.to_string()),
    }
}

/// Mixtral's names of an expert's projections.
const MIXTRAL: [(&str, &str); 3] = [(".w1.", ".gate_proj."), (".w3.", ".up_proj."), (".w2.", ".down_proj.")];

/// `model.layers.0.mlp.experts.1.gate_proj.weight` → `model.layers.0.block_sparse_moe.experts.1.w1.weight`
fn to_mixtral(name: &str) -> String {
    let renamed = name.replace(".mlp.", ".block_sparse_moe.");
    MIXTRAL.iter().fold(renamed, |name, (theirs, ours)| name.replace(ours, theirs))
}

/// The other way round.
pub(crate) fn from_mixtral(name: &str) -> String {
    let renamed = name.replace(".block_sparse_moe.", ".mlp.");
    MIXTRAL.iter().fold(renamed, |name, (theirs, ours)| name.replace(theirs, ours))
}
