//! What a GGUF file says about its model, in the words of config.json.

use serde_json::{Map, Value as Json, json};

use super::architecture::GgufArchitecture;
use super::header::{Header, Value};
use crate::families::{Llama3, llama3_factors};

/// Metadata of an architecture that changes nothing about what the model computes, or is read below.
const KNOWN: &[&str] = &[
    "vocab_size",
    "context_length",
    "embedding_length",
    "block_count",
    "feed_forward_length",
    "attention.head_count",
    "attention.head_count_kv",
    "attention.key_length",
    "attention.value_length",
    "attention.layer_norm_rms_epsilon",
    "rope.dimension_count",
    "rope.freq_base",
    "rope.scaling.type",
    "rope.scaling.factor",
    "rope.scaling.original_context_length",
    "rope.scaling.finetuned",
    "rope.scale_linear",
    "tensor_data_layout",
    "attention.causal",
];

/// What is read of some architectures beyond that.
const MORE: &[(&str, &[&str])] = &[
    ("llama", &["expert_count", "expert_used_count"]),
    ("qwen3moe", &["expert_count", "expert_used_count", "expert_feed_forward_length"]),
    (
        "cohere2",
        &[
            "attention.layer_norm_epsilon",
            "attention.sliding_window",
            "attention.sliding_window_pattern",
            "logit_scale",
        ],
    ),
    ("granite", &["attention.scale", "embedding_scale", "residual_scale", "logit_scale"]),
    (
        "gemma2",
        &[
            "attention.sliding_window",
            "attention.sliding_window_pattern",
            "attn_logit_softcapping",
            "final_logit_softcapping",
        ],
    ),
    (
        "gemma3",
        &[
            "attention.sliding_window",
            "attention.sliding_window_pattern",
            "final_logit_softcapping",
            "rope.freq_base_swa",
        ],
    ),
    ("phi3", &["attention.sliding_window", "rope.scaling.attn_factor"]),
];

/// More than any model has.
const MOST_LAYERS: u64 = 4096;

/// Reads one architecture's metadata, `{architecture}.{key}`.
struct Metadata<'a> {
    header: &'a Header,
    file: &'a [u8],
    architecture: &'a str,
}

impl Metadata<'_> {
    fn get(&self, key: &str) -> Option<&Value> {
        self.header.values.get(&format!("{}.{key}", self.architecture))
    }

    fn whole(&self, key: &str) -> Result<Option<u64>, String> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::Whole(it)) if *it >= 0 && *it <= i128::from(u32::MAX) => Ok(Some(*it as u64)),
            Some(Value::List(_)) => Err(format!(
                "`{}.{key}` is a list: models whose layers differ are not there yet",
                self.architecture
            )),
            Some(_) => Err(format!("`{}.{key}` is no positive whole number", self.architecture)),
        }
    }

    fn required(&self, key: &str) -> Result<u64, String> {
        self.whole(key)?.ok_or_else(|| format!("`{}.{key}` is missing", self.architecture))
    }

    fn float(&self, key: &str) -> Result<Option<f64>, String> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::Float(it)) if it.is_finite() => Ok(Some(*it)),
            Some(Value::Whole(it)) => Ok(Some(*it as f64)),
            Some(_) => Err(format!("`{}.{key}` is no number", self.architecture)),
        }
    }
}

/// What frequencies are divided by, where the file says it.
pub(super) struct Factors {
    pub(super) all: Option<Vec<f32>>,
    pub(super) short: Option<Vec<f32>>,
    pub(super) long: Option<Vec<f32>>,
}

/// The config of a model.
pub(super) fn read(
    header: &Header,
    file: &[u8],
    architecture: &GgufArchitecture,
    factors: Factors,
) -> Result<Json, String> {
    let metadata = Metadata { header, file, architecture: architecture.name };
    let (architecture, family) = (architecture.name, architecture.family);
    refuse_unknown(&metadata)?;
    let hidden_size = metadata.required("embedding_length")?;
    let heads = metadata.required("attention.head_count")?.max(1);
    let head_dim = metadata.whole("attention.key_length")?.unwrap_or(hidden_size / heads);
    let turned = metadata.whole("rope.dimension_count")?.unwrap_or(head_dim);
    let partly = architecture == "phi3";
    for (key, other) in [
        ("attention.value_length", metadata.whole("attention.value_length")?.unwrap_or(head_dim)),
        ("rope.dimension_count", if partly { head_dim } else { turned }),
    ] {
        if other != head_dim {
            return Err(format!(
                "`{architecture}.{key}` is {other}, expected the width of a head, {head_dim}"
            ));
        }
    }
    let embedding = header.tensors.get("token_embd.weight");
    let rows =
        embedding.and_then(|it| it.shape.first().copied()).ok_or("tensor `token_embd.weight` is missing")?;
    let has = |name: &str| header.tensors.contains_key(name);
    let theta = metadata.float("rope.freq_base")?.unwrap_or(10_000.0);
    let mut config = Map::new();
    let mut set = |key: &str, value: Json| config.insert(key.into(), value);
    set("model_type", family.into());
    set("vocab_size", rows.into());
    set("hidden_size", hidden_size.into());
    set("intermediate_size", metadata.required("feed_forward_length")?.into());
    set("num_hidden_layers", metadata.required("block_count")?.into());
    set("num_attention_heads", heads.into());
    set("num_key_value_heads", metadata.whole("attention.head_count_kv")?.unwrap_or(heads).into());
    set("head_dim", head_dim.into());
    let act = if architecture.starts_with("gemma") { "gelu_pytorch_tanh" } else { "silu" };
    set("hidden_act", act.into());
    set("max_position_embeddings", metadata.required("context_length")?.into());
    let (ours, theirs) = match architecture {
        "cohere2" => ("layer_norm_eps", "attention.layer_norm_epsilon"),
        _ => ("rms_norm_eps", "attention.layer_norm_rms_epsilon"),
    };
    let eps = metadata.float(theirs)?.ok_or(format!("`{architecture}.{theirs}` is missing"))?;
    set(ours, eps.into());
    set("rope_theta", theta.into());
    if let (true, Some(original)) =
        (factors.long.is_some(), metadata.whole("rope.scaling.original_context_length")?)
    {
        set("original_max_position_embeddings", original.into());
    }
    set("rope_scaling", scaling(&metadata, factors, theta, turned as usize)?);
    set("tie_word_embeddings", (!has("output.weight")).into());
    if architecture != "qwen2" && !partly {
        set("attention_bias", has("blk.0.attn_q.bias").into());
        set("mlp_bias", has("blk.0.ffn_up.bias").into());
    }
    let ids: Vec<Json> = ["eos", "eot"].iter().filter_map(|it| token(header, it)).collect();
    set("bos_token_id", token(header, "bos").unwrap_or(Json::Null));
    set("eos_token_id", if ids.len() == 2 && ids[0] == ids[1] { json!([ids[0]]) } else { ids.into() });
    set("pad_token_id", token(header, "padding").unwrap_or(Json::Null));
    let head = Head { width: head_dim, turned, share: hidden_size / heads };
    match architecture {
        "granite" => scales(&metadata, &mut set)?,
        "gemma2" | "gemma3" => gemma(&metadata, &head, &mut set)?,
        "cohere2" => cohere(&metadata, &mut set)?,
        "llama" | "qwen3moe" => experts(&metadata, &mut set)?,
        "phi3" => {
            set("partial_rotary_factor", json!(head.turned as f64 / head.width as f64));
            set("sliding_window", metadata.whole("attention.sliding_window")?.filter(|it| *it > 0).into());
        }
        _ => {}
    }
    Ok(config.into())
}

/// The width of a head, how much of it is turned, and what the heads share of the hidden size.
struct Head {
    width: u64,
    turned: u64,
    share: u64,
}

type Set<'a> = dyn FnMut(&str, Json) -> Option<Json> + 'a;

fn scales(metadata: &Metadata, set: &mut Set) -> Result<(), String> {
    for (ours, theirs) in [
        ("attention_multiplier", "attention.scale"),
        ("embedding_multiplier", "embedding_scale"),
        ("residual_multiplier", "residual_scale"),
        ("logits_scaling", "logit_scale"),
    ] {
        if let Some(value) = metadata.float(theirs)? {
            set(ours, value.into());
        }
    }
    Ok(())
}

/// How many experts there are. llama.cpp weights those of a token so that they add up to 1.
fn experts(metadata: &Metadata, set: &mut Set) -> Result<(), String> {
    let count = metadata.whole("expert_count")?.unwrap_or(0);
    if metadata.architecture == "llama" {
        if count == 0 {
            return Ok(());
        }
        set("model_type", "mixtral".into());
        set("num_local_experts", count.into());
    } else {
        let used = metadata.required("expert_used_count")?.max(1);
        let inner = match metadata.whole("expert_feed_forward_length")? {
            Some(inner) => inner,
            None => metadata.required("feed_forward_length")? / used,
        };
        set("num_experts", count.into());
        set("moe_intermediate_size", inner.into());
        set("norm_topk_prob", true.into());
    }
    set("num_experts_per_tok", metadata.required("expert_used_count")?.into());
    Ok(())
}

fn cohere(metadata: &Metadata, set: &mut Set) -> Result<(), String> {
    let slides = slides(metadata, 4)?;
    let window = metadata.required("attention.sliding_window")?;
    set("sliding_window", window.into());
    set("layer_types", layer_types(&slides));
    let scale = metadata.float("logit_scale")?.ok_or("`cohere2.logit_scale` is missing")?;
    // llama.cpp scales by nothing where it is 0.
    set("logit_scale", if scale == 0.0 { 1.0 } else { scale }.into());
    Ok(())
}

fn layer_types(slides: &[bool]) -> Json {
    let kind = |slides: &bool| if *slides { "sliding_attention" } else { "full_attention" };
    slides.iter().map(kind).collect::<Vec<_>>().into()
}

/// Which layers have a window: as the file lists them, or all but every so many.
fn slides(metadata: &Metadata, usual: u64) -> Result<Vec<bool>, String> {
    let key = "attention.sliding_window_pattern";
    let count = metadata.required("block_count")?;
    if count > MOST_LAYERS {
        return Err(format!("`{}.block_count` is {count}: the file is damaged", metadata.architecture));
    }
    if let Some(Value::List(list)) = metadata.get(key) {
        let listed = list.numbers(metadata.file).filter(|it| it.len() as u64 == count);
        let listed = listed
            .ok_or_else(|| format!("`{}.{key}` is no list of {count} numbers", metadata.architecture))?;
        return Ok(listed.iter().map(|it| *it != 0.0).collect());
    }
    let every = metadata.whole(key)?.unwrap_or(usual);
    Ok((0..count).map(|index| every == 0 || !(index + 1).is_multiple_of(every)).collect())
}

/// Windows, scores and caps of Gemma 2 and 3. What llama.cpp takes where a file doesn't say is said here.
fn gemma(metadata: &Metadata, head: &Head, set: &mut Set) -> Result<(), String> {
    let third = metadata.architecture == "gemma3";
    let count = metadata.required("block_count")?;
    let largest = count == if third { 62 } else { 46 };
    set("query_pre_attn_scalar", if largest { head.share } else { head.width }.into());
    let window = metadata.whole("attention.sliding_window")?.filter(|it| *it > 0);
    let context = metadata.required("context_length")?;
    set("sliding_window", window.unwrap_or(if third { context } else { 4096 }).into());
    let mut slides = slides(metadata, if third { 6 } else { 2 })?;
    if third && window.is_none() {
        slides.fill(false); // without a width, Gemma 3 has no windows
    }
    set("layer_types", layer_types(&slides));
    if third {
        set("rope_local_base_freq", metadata.float("rope.freq_base_swa")?.unwrap_or(10_000.0).into());
        set("final_logit_softcapping", metadata.float("final_logit_softcapping")?.into());
    } else {
        set("attn_logit_softcapping", metadata.float("attn_logit_softcapping")?.unwrap_or(50.0).into());
        set("final_logit_softcapping", metadata.float("final_logit_softcapping")?.unwrap_or(30.0).into());
    }
    Ok(())
}

fn token(header: &Header, name: &str) -> Option<Json> {
    match header.values.get(&format!("tokenizer.ggml.{name}_token_id")) {
        Some(Value::Whole(id)) => u32::try_from(*id).ok().map(Json::from),
        _ => None,
    }
}

/// Metadata under the architecture's name that isn't known may change what the model computes.
fn refuse_unknown(metadata: &Metadata) -> Result<(), String> {
    let prefix = format!("{}.", metadata.architecture);
    for (key, value) in &metadata.header.values {
        let Some(rest) = key.strip_prefix(&prefix) else { continue };
        let off = match value {
            Value::Whole(it) => *it == 0,
            Value::Float(it) => *it == 0.0,
            Value::Bool(it) => !it,
            Value::Text(it) => it.is_empty(),
            Value::List(it) => it.len() == 0,
        };
        let more = MORE.iter().find(|it| it.0 == metadata.architecture).map_or(&[][..], |it| it.1);
        if !KNOWN.contains(&rest) && !more.contains(&rest) && !off {
            return Err(format!(
                "`{key}` isn't known for the architecture {} and may change what the model computes",
                metadata.architecture
            ));
        }
    }
    Ok(())
}

/// `rope_scaling` of config.json.
fn scaling(metadata: &Metadata, factors: Factors, theta: f64, head_dim: usize) -> Result<Json, String> {
    let kind = match metadata.get("rope.scaling.type") {
        Some(Value::Text(kind)) => kind.as_str(),
        _ => "none",
    };
    let factor = metadata.float("rope.scaling.factor")?.or(metadata.float("rope.scale_linear")?);
    let original = metadata.whole("rope.scaling.original_context_length")?;
    if factors.short.is_some() || factors.long.is_some() {
        let attention_factor = metadata.float("rope.scaling.attn_factor")?.unwrap_or(1.0);
        return Ok(json!({
            "rope_type": "longrope", "short_factor": factors.short, "long_factor": factors.long,
            "original_max_position_embeddings": original, "attention_factor": attention_factor,
        }));
    }
    if let Some(factors) = factors.all {
        if kind != "none" {
            return Err(format!("rope scaling of type `{kind}` beside `rope_freqs.weight` is not there yet"));
        }
        return frequency_factors(&factors, theta, head_dim);
    }
    Ok(match (kind, factor) {
        ("none", None) => Json::Null,
        ("none", Some(factor)) if factor == 1.0 || factor == 0.0 => Json::Null,
        ("none" | "linear", _) => json!({ "rope_type": "linear", "factor": factor }),
        // Other kinds are named, and refused, where config.json's are.
        (kind, _) => {
            json!({ "rope_type": kind, "factor": factor, "original_max_position_embeddings": original })
        }
    })
}

/// llama.cpp keeps Llama 3.1's scaling as a list of divisors. The four numbers behind it are found
/// again where they are the usual ones, so that what is exported says what the original said.
fn frequency_factors(factors: &[f32], theta: f64, head_dim: usize) -> Result<Json, String> {
    if factors.len() != head_dim / 2 {
        let expected = head_dim / 2;
        return Err(format!("tensor `rope_freqs.weight` has {} numbers, expected {expected}", factors.len()));
    }
    let factor = f64::from(factors.iter().copied().fold(1.0, f32::max));
    let usual = Llama3 { factor, low_freq_factor: 1.0, high_freq_factor: 4.0, original_context: 8192.0 };
    let base: Vec<f64> = (0..head_dim / 2).map(|i| theta.powf(-2.0 * i as f64 / head_dim as f64)).collect();
    let expected = llama3_factors(&base, &usual);
    if expected.iter().zip(factors).all(|(a, b)| (a - f64::from(*b)).abs() <= 1e-4 * a) {
        return Ok(json!({
            "rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        }));
    }
    Ok(json!({ "rope_type": "frequency_factors", "factors": factors }))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn llama_3_2(factors: &[f32]) -> Json {
        frequency_factors(factors, 500_000.0, 64).unwrap()
    }

    #[test]
    fn the_usual_factors_are_known_again() {
        let base: Vec<f64> = (0..32).map(|i| 500_000f64.powf(-2.0 * f64::from(i) / 64.0)).collect();
        let scaling =
            Llama3 { factor: 32.0, low_freq_factor: 1.0, high_freq_factor: 4.0, original_context: 8192.0 };
        let mut factors: Vec<f32> = llama3_factors(&base, &scaling).iter().map(|it| *it as f32).collect();
        assert_eq!((factors[0], factors[31]), (1.0, 32.0));
        let json = llama_3_2(&factors);
        assert_eq!((&json["rope_type"], &json["factor"]), (&"llama3".into(), &32.0.into()));
        factors[16] *= 1.01;
        let json = llama_3_2(&factors);
        assert_eq!((&json["rope_type"], &json["factors"]), (&"frequency_factors".into(), &json!(factors)));
        assert!(frequency_factors(&factors, 500_000.0, 128).unwrap_err().contains("32 numbers, expected 64"));
    }

    #[test]
    fn other_factors_divide_the_frequencies() {
        let config = json!({
            "model_type": "llama", "vocab_size": 8, "hidden_size": 8, "intermediate_size": 8,
            "num_hidden_layers": 1, "num_attention_heads": 2, "rope_theta": 100.0,
            "rope_scaling": { "rope_type": "frequency_factors", "factors": [2.0, 5.0] },
        });
        let spec = crate::families::spec(&config, std::path::Path::new("x.gguf")).unwrap();
        let rope = spec.layers[0].attention.rope.as_ref().unwrap();
        assert!((rope.inverse_frequencies[0] - 0.5).abs() < 1e-12);
        assert!((rope.inverse_frequencies[1] - 0.1 / 5.0).abs() < 1e-12);
    }
}
