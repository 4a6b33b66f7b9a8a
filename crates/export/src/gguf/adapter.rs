//! A LoRA adapter by itself, as llama.cpp's `convert_lora_to_gguf.py` writes it: for each adapted tensor `.lora_a` (R, in)
//! and `.lora_b` (out, R), in f32; of a tensor of all experts, those of all experts. llama.cpp adds adapter.lora.alpha / R · B·A.

use std::collections::BTreeMap;
use std::path::Path;

use ferrotune_model::source::{GgufArchitecture, GgufType};
use ferrotune_model::spec::{FUSED, ModelSpec, names};
use ferrotune_tensor::{Error, Result};

use super::file::{self, Fill, Metadata, Planned, Value};
use super::{GgufReport, architecture, counted, head_width, metadata, weave};
use crate::{LoraTensors, PeftAdapter};

/// A tensor of the file: how many rows, and their numbers.
struct Matrix {
    name: String,
    rows: usize,
    /// Experts that the rows belong to, or 1.
    matrices: usize,
    values: Vec<f32>,
}

/// Writes an adapter; `name` is for people.
///
/// # Errors
/// When the adapter has more than LoRA's matrices, when llama.cpp doesn't have the family, or when the file
/// can't be written.
pub fn write_gguf_adapter(
    path: &Path,
    spec: &ModelSpec,
    adapter: &PeftAdapter,
    name: &str,
) -> Result<GgufReport> {
    let architecture = architecture(path, spec)?;
    let refused = |message: String| Error::file(path, message);
    if let Some(saved) = adapter.saved.keys().next() {
        return Err(refused(format!(
            "the adapter holds the whole tensor `{saved}`, and llama.cpp's adapters can't; export the merged model"
        )));
    }
    if adapter.use_dora {
        return Err(refused(
            "llama.cpp's adapters have no magnitudes (DoRA); export the merged model".to_string(),
        ));
    }
    let notes = metadata::check(spec, architecture).map_err(|what| {
        let kind = architecture.name;
        refused(format!(
            "llama.cpp has no {what} in models of the kind `{kind}`: the adapter has no base there"
        ))
    })?;
    // llama.cpp divides by the rank whatever the adapter's kind.
    let alpha = adapter.scaling() * adapter.r as f64;
    let mut metadata = Metadata::default();
    metadata.text("general.architecture", architecture.name);
    metadata.text("general.type", "adapter");
    metadata.text("general.name", name);
    metadata.text("adapter.type", "lora");
    metadata.set("adapter.lora.alpha", Value::F32(alpha as f32));
    metadata.set("general.file_type", Value::U32(0));
    metadata.set("general.quantization_version", Value::U32(2));
    let matrices = matrices(spec, architecture, adapter).map_err(refused)?;
    let planned: Vec<Planned> = matrices.iter().map(planned).collect();
    let bytes = file::write(path, &metadata, &planned)?;
    Ok(GgufReport { bytes, types: counted(&vec![GgufType::F32; planned.len()]), notes })
}

fn planned(matrix: &Matrix) -> Planned<'_> {
    let cols = matrix.values.len() / matrix.rows;
    let fill: Fill = Box::new(move |rows, out| {
        out.copy_from_slice(&matrix.values[rows.start * cols..rows.end * cols]);
        Ok(())
    });
    Planned {
        name: matrix.name.clone(),
        kind: GgufType::F32,
        rows: Some(matrix.rows),
        matrices: matrix.matrices,
        cols,
        together: 1,
        parts: Vec::new(),
        fill,
    }
}

fn matrices(
    spec: &ModelSpec,
    architecture: &GgufArchitecture,
    adapter: &PeftAdapter,
) -> Result<Vec<Matrix>, String> {
    let mut modules: BTreeMap<&str, &LoraTensors> =
        adapter.tensors.iter().map(|it| (it.module.as_str(), it)).collect();
    let mut all = Vec::new();
    if architecture.fused {
        for layer in 0..spec.layers.len() {
            for (whole, parts) in FUSED {
                let parts: Vec<_> = parts.iter().map(|it| names::module(layer, it)).collect();
                let there: Vec<_> = parts.iter().map(|it| modules.remove(it.as_str())).collect();
                if there.iter().any(Option::is_some) {
                    all.push((names::module(layer, whole), fused(spec, &parts, &there)?));
                }
            }
        }
    }
    all.extend(of_experts(spec, &mut modules)?);
    for (module, tensors) in modules {
        let mut b = numbers(&tensors.b)?;
        let weight = format!("{module}.weight");
        if let Some(width) = head_width(spec, &weight).filter(|_| architecture.pairs_are_neighbours) {
            weave(&mut b, width, tensors.b.cols());
        }
        let (rank, rows) = (tensors.a.rows(), tensors.b.rows());
        all.push((module.to_string(), Pair { rank, a: numbers(&tensors.a)?, rows, b, matrices: 1 }));
    }
    let mut matrices = Vec::new();
    for (module, pair) in all {
        let name = architecture
            .tensor(&format!("{module}.weight"))
            .ok_or_else(|| format!("llama.cpp has no adapter on `{module}`; export the merged model"))?;
        let Pair { rank, a, rows, b, matrices: count } = pair;
        let mut push = |kind: &str, rows: usize, values: Vec<f32>| {
            let name = format!("{name}.lora_{kind}");
            matrices.push(Matrix { name, rows: rows * count, matrices: count, values });
        };
        push("a", rank, a);
        push("b", rows, b);
    }
    Ok(matrices)
}

/// A and B of a tensor of the file: of one matrix, or of one for each expert.
struct Pair {
    rank: usize,
    a: Vec<f32>,
    rows: usize,
    b: Vec<f32>,
    matrices: usize,
}

/// Adapters of a projection of all experts, expert after expert; an expert without one has zeros. They are called as the
/// first expert's.
fn of_experts(
    spec: &ModelSpec,
    modules: &mut BTreeMap<&str, &LoraTensors>,
) -> Result<Vec<(String, Pair)>, String> {
    let mut all = Vec::new();
    for (index, layer) in spec.layers.iter().enumerate() {
        let Some(experts) = layer.mlp.experts else { continue };
        let linears = layer.linears(spec.hidden_size);
        for first in linears.iter().filter(|it| it.expert == Some(0)) {
            let Some((_, part)) = names::expert_of(&first.part) else { continue };
            let module = |expert: usize| names::module(index, &names::of_expert(expert, &part));
            let there: Vec<_> =
                (0..experts.num_experts).map(|expert| modules.remove(module(expert).as_str())).collect();
            let Some(rank) = there.iter().flatten().map(|it| it.a.rows()).next() else { continue };
            if there.iter().flatten().any(|it| it.a.rows() != rank) {
                return Err(format!(
                    "the experts' adapters on `{part}` have several ranks, and llama.cpp has one; export the merged model"
                ));
            }
            let (rows, matrices) = (first.out_features, there.len());
            let mut pair = Pair { rank, a: Vec::new(), rows, b: Vec::new(), matrices };
            for tensors in there {
                let Some(tensors) = tensors else {
                    pair.a.resize(pair.a.len() + rank * first.in_features, 0.0);
                    pair.b.resize(pair.b.len() + rows * rank, 0.0);
                    continue;
                };
                pair.a.extend(numbers(&tensors.a)?);
                pair.b.extend(numbers(&tensors.b)?);
            }
            all.push((module(0), pair));
        }
    }
    Ok(all)
}

/// Adapters of projections that are one in the file: their A stand one above the other, their B along a diagonal. The
/// rank grows with them, and llama.cpp divides by it, so B is multiplied by as much.
fn fused(spec: &ModelSpec, parts: &[String], there: &[Option<&LoraTensors>]) -> Result<Pair, String> {
    let present = there.iter().flatten().count();
    let rank = there.iter().flatten().map(|it| it.a.rows()).sum::<usize>();
    let own = rank / present;
    let linears = spec.layers[0].linears(spec.hidden_size);
    let rows_of =
        |part: &String| linears.iter().find(|it| part.ends_with(&it.part)).map_or(0, |it| it.out_features);
    let rows: usize = parts.iter().map(rows_of).sum();
    let mut pair = Pair { rank, a: Vec::new(), rows, b: vec![0.0; rows * rank], matrices: 1 };
    let (mut row, mut col) = (0, 0);
    for (part, tensors) in parts.iter().zip(there) {
        let count = rows_of(part);
        if let Some(tensors) = tensors {
            pair.a.extend(numbers(&tensors.a)?);
            let larger = rank as f32 / own as f32;
            for (i, values) in numbers(&tensors.b)?.chunks(own).enumerate() {
                let out = &mut pair.b[(row + i) * rank + col..][..own];
                out.iter_mut().zip(values).for_each(|(out, value)| *out = value * larger);
            }
            col += own;
        }
        row += count;
    }
    Ok(pair)
}

fn numbers(tensor: &ferrotune_tensor::Tensor) -> Result<Vec<f32>, String> {
    Ok(tensor.to_f32().map_err(|error| error.to_string())?.to_vec())
}
