//! A whole model in 4 bits as bitsandbytes serialises it (`…-bnb-4bit`): NF4 with double quantisation, for
//! transformers' `from_pretrained` and for vLLM. Experts stay in 16 bits: transformers 5 stacks them in tensors of three
//! dimensions, and bitsandbytes quantises linear layers alone; it reads no others in 4 bits.
//! Source: bitsandbytes/functional.py (QuantState.as_dict), transformers/quantizers/quantizer_bnb_4bit.py.

use std::collections::HashSet;
use std::path::Path;

use ferrotune_model::source::ModelFiles;
use ferrotune_model::spec::CheckpointTensor;
use ferrotune_quant::{Absmax, NF4_BLOCK, NF4_GROUP, NF4_LEVELS, Nf4Weight, Scales, dynamic_map};
use ferrotune_tensor::{DType, Error, Precision, Result, Tensor};
use safetensors::Dtype;
use serde_json::{Value, json};

use crate::checkpoint::{CheckpointWriter, Entry};
use crate::model::{
    FolderOptions, ReadRows, config, dtype_name, entry_of, write_configs, write_tensor, written_dtype,
};

/// Longest text of a number in JSON.
const NUMBER: usize = 24;

/// Writes a model with its projections in 4 bits; experts, embedding, head, norms and biases are in 16 bits (or what the
/// options say). Projections are rounded to that type first. `progress` as in [`crate::write_folder`].
///
/// # Errors
/// When a weight isn't finite, or a file can't be read or written.
pub fn write_bnb(
    folder: &Path,
    files: &ModelFiles,
    options: FolderOptions,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<()> {
    let tensors = files.spec.checkpoint_tensors();
    let dtypes = tensors.iter().map(|it| written_dtype(files, options, it)).collect::<Result<Vec<_>>>()?;
    let projections: HashSet<String> = files
        .spec
        .projections()
        .filter(|(module, _)| goes_into_bnb(module))
        .map(|(module, _)| format!("{module}.weight"))
        .collect();
    let is_projection = |tensor: &CheckpointTensor| projections.contains(&tensor.parts[0]);
    let all = || tensors.iter().zip(&dtypes);
    let groups: Vec<Vec<Entry>> = all()
        .map(|(tensor, dtype)| match is_projection(tensor) {
            true => parts(tensor, *dtype),
            false => vec![entry_of(tensor, *dtype)],
        })
        .collect();
    let total = files.spec.parameter_count();
    let mut writer = CheckpointWriter::create(folder, &groups, options.shard_bytes, total)?;
    let read: &ReadRows = &|name, rows, out| files.source.read_rows(name, rows, out);
    let mut done = 0;
    for (tensor, dtype) in all() {
        match is_projection(tensor) {
            true => write_projection(&mut writer, files, tensor, *dtype)?,
            false => write_tensor(&mut writer, files, tensor, *dtype, read)?,
        }
        done += (tensor.rows * tensor.cols) as u64;
        progress(done, total);
    }
    writer.finish()?;
    let one = written_dtype(files, options, &tensors[0])?;
    let mut config = config(files, Some(one))?;
    config["quantization_config"] = quantization_config(one);
    write_configs(folder, files, &config)
}

/// Whether [`write_bnb`] puts a projection of this canonical name into 4 bits: all but those of experts.
pub fn goes_into_bnb(module: &str) -> bool {
    !module.contains(".mlp.experts.")
}

/// What a projection becomes.
fn parts(tensor: &CheckpointTensor, dtype: DType) -> Vec<Entry> {
    let n = tensor.rows * tensor.cols;
    let (blocks, name) = (n.div_ceil(NF4_BLOCK), &tensor.name);
    let entry = |suffix: &str, dtype, shape: &[usize]| Entry {
        name: format!("{name}{suffix}"),
        dtype,
        shape: shape.to_vec(),
    };
    vec![
        entry("", Dtype::U8, &[n.div_ceil(2), 1]),
        entry(".absmax", Dtype::U8, &[blocks]),
        entry(".quant_map", Dtype::F32, &[NF4_LEVELS.len()]),
        entry(".nested_absmax", Dtype::F32, &[blocks.div_ceil(NF4_GROUP)]),
        entry(".nested_quant_map", Dtype::F32, &[dynamic_map().len()]),
        entry(".quant_state.bitsandbytes__nf4", Dtype::U8, &[state(tensor, dtype, 0.0).len()]),
    ]
}

/// The JSON that says how the parts belong together, in bitsandbytes' order of keys. Blanks fill it up, so that its
/// length is known before the offset is.
fn state(tensor: &CheckpointTensor, dtype: DType, offset: f32) -> String {
    let offset = json!(f64::from(offset)).to_string();
    format!(
        "{{\"quant_type\": \"nf4\", \"blocksize\": {NF4_BLOCK}, \"dtype\": \"{}\", \"shape\": [{}, {}], \
         \"nested_blocksize\": {NF4_GROUP}, \"nested_dtype\": \"float32\", \"nested_offset\": {offset}}}{}",
        dtype_name(dtype),
        tensor.rows,
        tensor.cols,
        " ".repeat(NUMBER.saturating_sub(offset.len()))
    )
}

fn write_projection(
    writer: &mut CheckpointWriter,
    files: &ModelFiles,
    tensor: &CheckpointTensor,
    dtype: DType,
) -> Result<()> {
    let mut values = vec![0.0; tensor.rows * tensor.cols];
    let mut rest = values.as_mut_slice();
    for part in &tensor.parts {
        let (rows, cols) = files.source.shape(part)?;
        let (out, more) = rest.split_at_mut(rows * cols);
        files.source.read_rows(part, 0..rows, out)?;
        files.source.forget(part);
        rest = more;
    }
    let value = Tensor::from_vec(tensor.rows, tensor.cols, values)?.cast(dtype)?;
    let weight = Nf4Weight::quantize(&value, Scales::Nested, Precision::Full)
        .map_err(|error| Error::file(&files.path, format!("tensor `{}`: {error}", tensor.name)))?;
    let Absmax::Nested { codes, nested_absmax, offset } = &weight.absmax else {
        return Err(Error::msg("the scales aren't quantised"));
    };
    let name = |suffix: &str| format!("{}{suffix}", tensor.name);
    writer.write(&tensor.name, &weight.codes)?;
    writer.write(&name(".absmax"), codes)?;
    writer.write(&name(".quant_map"), &bytes(&NF4_LEVELS))?;
    writer.write(&name(".nested_absmax"), &bytes(nested_absmax))?;
    writer.write(&name(".nested_quant_map"), &bytes(dynamic_map()))?;
    writer.write(&name(".quant_state.bitsandbytes__nf4"), state(tensor, dtype, *offset).as_bytes())
}

fn bytes(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|it| it.to_le_bytes()).collect()
}

/// All keys that transformers writes.
fn quantization_config(dtype: DType) -> Value {
    json!({
        "_load_in_4bit": true,
        "_load_in_8bit": false,
        "bnb_4bit_compute_dtype": dtype_name(dtype),
        "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": true,
        "llm_int8_enable_fp32_cpu_offload": false,
        "llm_int8_has_fp16_weight": false,
        "llm_int8_skip_modules": ["lm_head"],
        "llm_int8_threshold": 6.0,
        "load_in_4bit": true,
        "load_in_8bit": false,
        "quant_method": "bitsandbytes",
    })
}
