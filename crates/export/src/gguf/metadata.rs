//! What a GGUF file says about its model, out of the spec; and which specs llama.cpp doesn't compute as they say.
//! What llama.cpp reads and does is in its `src/models/<architecture>.cpp` and `src/llama-model.cpp`.

use ferrotune_model::source::GgufArchitecture;
use ferrotune_model::spec::{
    Activation, AttentionSpec, LayerSpec, ModelSpec, NormKind, NormPlaces, QkNorm, Residual, Rope,
};

use super::file::{Metadata, Value};

/// What llama.cpp's graph of one architecture can do beyond Llama's plain form.
#[derive(Clone, Copy)]
struct Computes {
    norms: NormPlaces,
    qk_norm: QkNorm,
    activation: Activation,
    /// o, gate, up and down may have biases.
    biases: bool,
    /// Embeddings, scores, sublayers and logits are scaled by numbers in the file.
    scales: bool,
    /// Embeddings are multiplied by √C.
    root_scale: bool,
    /// Rows of the frequencies' divisors are read.
    factors: bool,
    /// A part of a head may be left unturned.
    partial: bool,
    /// Heads have the width that they share of the hidden size.
    plain_heads: bool,
    /// Every so many layers one sees everything, the others a window.
    window_pattern: Option<usize>,
    /// Every so many layers one doesn't know positions.
    unturned_pattern: Option<usize>,
    /// Layers without a window don't know positions.
    windows_turn: bool,
    /// Channels are turned with their neighbours, as they lie.
    interleaved: bool,
    norm: NormKind,
    residual: Residual,
    /// Logits are multiplied by a number in the file.
    logit_scale: bool,
    experts: Experts,
    /// Scores and logits are capped.
    caps: Caps,
    head: Head,
}

#[derive(Clone, Copy, PartialEq)]
enum Experts {
    Never,
    Maybe,
    Always,
}

#[derive(Clone, Copy, PartialEq)]
enum Caps {
    None,
    Logits,
    Both,
}

#[derive(Clone, Copy, PartialEq)]
enum Head {
    Any,
    Own,
    Tied,
}

fn computes(architecture: &str) -> Computes {
    let plain = Computes {
        norms: NormPlaces::Before,
        qk_norm: QkNorm::None,
        activation: Activation::Silu,
        biases: false,
        scales: false,
        root_scale: false,
        factors: false,
        partial: false,
        plain_heads: false,
        window_pattern: None,
        unturned_pattern: None,
        windows_turn: false,
        interleaved: false,
        norm: NormKind::Rms,
        residual: Residual::Sequential,
        logit_scale: false,
        experts: Experts::Never,
        caps: Caps::None,
        head: Head::Any,
    };
    let gemma = Computes { activation: Activation::GeluTanh, root_scale: true, head: Head::Tied, ..plain };
    match architecture {
        "llama" => Computes { biases: true, factors: true, experts: Experts::Maybe, ..plain },
        "granite" => Computes { biases: true, factors: true, scales: true, ..plain },
        "qwen2" => Computes { plain_heads: true, ..plain },
        "qwen3" => Computes { qk_norm: QkNorm::PerHead, ..plain },
        "qwen3moe" => Computes { qk_norm: QkNorm::PerHead, experts: Experts::Always, ..plain },
        "smollm3" => Computes { unturned_pattern: Some(4), ..plain },
        "olmo2" => Computes {
            norms: NormPlaces::After,
            qk_norm: QkNorm::WholeRow,
            plain_heads: true,
            head: Head::Own,
            ..plain
        },
        "gemma" => gemma,
        "gemma2" => {
            Computes { norms: NormPlaces::BothEnds, window_pattern: Some(2), caps: Caps::Both, ..gemma }
        }
        "gemma3" => Computes {
            norms: NormPlaces::BothEnds,
            qk_norm: QkNorm::PerHead,
            window_pattern: Some(6),
            caps: Caps::Logits,
            head: Head::Any,
            ..gemma
        },
        "phi3" => Computes { partial: true, plain_heads: true, ..plain },
        "cohere2" => Computes {
            norms: NormPlaces::Shared,
            norm: NormKind::Layer,
            residual: Residual::Parallel,
            interleaved: true,
            logit_scale: true,
            plain_heads: true,
            window_pattern: Some(4),
            windows_turn: true,
            head: Head::Tied,
            ..plain
        },
        _ => plain,
    }
}

/// What a rope is made of: θ, what all frequencies are divided by, and what each is divided by besides.
pub(super) struct RopeParts {
    pub(super) theta: f32,
    linear: f32,
    pub(super) factors: Option<Vec<f32>>,
}

/// Takes a rope's frequencies apart. Two neighbours give θ; where the others don't follow from the first two and a
/// divisor of all, the last two are taken, which ropes for long contexts stretch alike. What is left goes into the
/// factors, so that whatever was taken for θ, all together is right.
pub(super) fn rope_parts(rope: &Rope) -> RopeParts {
    let frequencies = &rope.inverse_frequencies;
    let half = frequencies.len() as f64;
    let theta_of = |pair: &[f64]| rounded((pair[1] / pair[0]).powf(-half)) as f32;
    let (first, last) = match (frequencies.first_chunk::<2>(), frequencies.last_chunk::<2>()) {
        (Some(first), Some(last)) => (theta_of(first), theta_of(last)),
        _ => (10_000.0, 10_000.0),
    };
    let factors = |theta: f32, linear: f32| -> Vec<f64> {
        let base = |i: usize| f64::from(theta).powf(-(i as f64) / half) / f64::from(linear);
        frequencies.iter().enumerate().map(|(i, it)| base(i) / it).collect()
    };
    let linear = rounded(1.0 / frequencies.first().copied().unwrap_or(1.0)) as f32;
    if factors(first, linear).iter().all(|it| (it - 1.0).abs() < 1e-5) {
        return RopeParts { theta: first, linear, factors: None };
    }
    let factors = factors(last, 1.0).into_iter().map(|it| it as f32).collect();
    RopeParts { theta: last, linear: 1.0, factors: Some(factors) }
}

/// Powers leave traces behind the digits that a config has.
fn rounded(value: f64) -> f64 {
    let near = (value * 1e6).round() / 1e6;
    if (near / value - 1.0).abs() < 1e-9 { near } else { value }
}

/// Whether llama.cpp computes what the spec says.
///
/// # Errors
/// Names what it doesn't. Otherwise what differs in rare cases, for the user to know.
pub(super) fn check(spec: &ModelSpec, architecture: &GgufArchitecture) -> Result<Vec<String>, String> {
    let can = computes(architecture.name);
    let is = |holds: bool, what: &str| if holds { Ok(()) } else { Err(what.to_string()) };
    let root = (spec.hidden_size as f64).sqrt();
    let scaled = if can.root_scale { root } else { 1.0 };
    is(can.scales || near(spec.embedding_scale, scaled), "a scale of the embeddings")?;
    is(can.scales || can.logit_scale || near(spec.logit_scale, 1.0), "a scale of the logits")?;
    is(spec.norm.kind == can.norm && !spec.norm.bias, "norms of this kind")?;
    is(
        can.caps == Caps::None || can.caps == Caps::Logits || spec.logit_softcap.is_some(),
        "logits that aren't capped",
    )?;
    is(can.caps != Caps::None || spec.logit_softcap.is_none(), "capped logits")?;
    is(can.head != Head::Tied || spec.tie_word_embeddings, "a head of its own")?;
    // llama.cpp takes one by the length of its own context.
    let two_ropes = spec.long_rope.is_some();
    is(architecture.fused || !two_ropes, "second rope for long contexts")?;
    let first = &spec.layers[0];
    for (index, layer) in spec.layers.iter().enumerate() {
        let attention = &layer.attention;
        is(layer.norms == can.norms && attention.qk_norm == can.qk_norm, "norms in these places")?;
        is(layer.residual == can.residual, "sublayers joined this way")?;
        is(can.scales || near(layer.residual_scale, 1.0), "a scale of the sublayers")?;
        match layer.mlp.experts {
            None => is(can.experts != Experts::Always, "layers without experts")?,
            Some(experts) => {
                is(can.experts != Experts::Never && !layer.mlp.bias, "such experts")?;
                is(experts.normalised, "experts whose weights don't add up to 1 (`norm_topk_prob`)")?;
            }
        }
        is(layer.mlp.gated && layer.mlp.activation == can.activation, "this activation")?;
        is(
            can.biases || !(attention.out_bias || layer.mlp.bias),
            "biases of o_proj, gate_proj, up_proj or down_proj",
        )?;
        is(attention.softcap.is_some() == (can.caps == Caps::Both), "capped or uncapped scores")?;
        let scale = if can.scales { attention.scale } else { score_scale(spec, architecture.name) };
        is(near(attention.scale, scale), "a scale of the scores")?;
        let shared = attention.num_attention_heads * attention.head_dim == spec.hidden_size;
        is(!can.plain_heads || shared, "heads of another width than they share of `hidden_size`")?;
        let turned = match can.windows_turn {
            true => attention.window.is_some(),
            false => can.unturned_pattern.is_none_or(|every| (index + 1) % every != 0),
        };
        is(attention.rope.is_some() == turned, "positions in these layers")?;
        if let Some(rope) = &attention.rope {
            let whole = 2 * rope.inverse_frequencies.len() == attention.head_dim;
            is(
                rope.interleaved == can.interleaved && (two_ropes || near(rope.attention_factor, 1.0)),
                "this kind of rope",
            )?;
            is(can.partial || whole, "heads turned in a part of their width")?;
            let factors = !two_ropes && rope_parts(rope).factors.is_some();
            is(can.factors || !factors, "a rope scaled this way")?;
        }
        // Without a window of its own, a layer may only differ by its window and positions.
        let plain = |it: &LayerSpec| LayerSpec {
            attention: AttentionSpec { window: None, rope: None, ..it.attention.clone() },
            ..it.clone()
        };
        is(plain(layer) == plain(first), "layers that differ")?;
    }
    let mut notes = Vec::new();
    let windows: Vec<Option<usize>> = spec.layers.iter().map(|it| it.attention.window).collect();
    let window = windows.iter().flatten().next().copied();
    is(windows.iter().flatten().all(|it| Some(*it) == window), "windows of several widths")?;
    if let (None, Some(window)) = (can.window_pattern, window) {
        notes.push(format!(
            "llama.cpp knows no sliding window in models of the kind `{}`: beyond {window} tokens its answers differ from the \
             model's",
            architecture.name
        ));
    }
    ropes(spec, &can, is)?;
    Ok(notes)
}

/// Layers without a window must have one rope, and so must those with one, where these may differ.
fn ropes(
    spec: &ModelSpec,
    can: &Computes,
    is: impl Fn(bool, &str) -> Result<(), String>,
) -> Result<(), String> {
    let local_differs = can.window_pattern == Some(6);
    for windowed in [false, true] {
        let of = |it: &&LayerSpec| !local_differs || it.attention.window.is_some() == windowed;
        let mut ropes = spec.layers.iter().filter(of).filter_map(|it| it.attention.rope.as_ref());
        let first = ropes.next();
        is(ropes.all(|it| Some(it) == first), "ropes that differ from layer to layer")?;
    }
    Ok(())
}

/// What llama.cpp multiplies scores by where the file doesn't say.
fn score_scale(spec: &ModelSpec, architecture: &str) -> f64 {
    let attention = &spec.layers[0].attention;
    let largest = (architecture == "gemma2" && spec.layers.len() == 46)
        || (architecture == "gemma3" && spec.layers.len() == 62);
    let width = if largest { spec.hidden_size / attention.num_attention_heads } else { attention.head_dim };
    1.0 / (width as f64).sqrt()
}

fn near(a: f64, b: f64) -> bool {
    (a - b).abs() <= 1e-6 * b.abs()
}

/// The keys under the architecture's name.
pub(super) fn model(spec: &ModelSpec, architecture: &GgufArchitecture, metadata: &mut Metadata) {
    let can = computes(architecture.name);
    let key = |name: &str| format!("{}.{name}", architecture.name);
    let layer = &spec.layers[0];
    let attention = &layer.attention;
    let size = |value: usize| Value::U32(u32::try_from(value).unwrap_or(u32::MAX));
    let number = |value: f64| Value::F32(value as f32);
    metadata.set(key("block_count"), size(spec.layers.len()));
    metadata.set(key("context_length"), size(spec.max_position_embeddings));
    metadata.set(key("embedding_length"), size(spec.hidden_size));
    metadata.set(key("feed_forward_length"), size(layer.mlp.intermediate_size));
    metadata.set(key("attention.head_count"), size(attention.num_attention_heads));
    metadata.set(key("attention.head_count_kv"), size(attention.num_key_value_heads));
    metadata.set(key("attention.key_length"), size(attention.head_dim));
    metadata.set(key("attention.value_length"), size(attention.head_dim));
    let kind = if can.norm == NormKind::Layer { "layer_norm" } else { "layer_norm_rms" };
    metadata.set(key(&format!("attention.{kind}_epsilon")), number(spec.norm.eps));
    metadata.set(key("vocab_size"), size(spec.vocab_size));
    let rope_of = |windowed: bool| {
        let mut layers = spec.layers.iter().filter(|it| it.attention.window.is_some() == windowed);
        layers.find_map(|it| it.attention.rope.as_ref())
    };
    if let Some(two) = &spec.long_rope {
        metadata.set(key("rope.dimension_count"), size(2 * two.short.inverse_frequencies.len()));
        metadata.set(key("rope.freq_base"), number(two.theta));
        metadata.set(key("rope.scaling.attn_factor"), number(two.short.attention_factor));
    } else if let Some(rope) = rope_of(false).or(rope_of(true)) {
        let parts = rope_parts(rope);
        metadata.set(key("rope.dimension_count"), size(2 * rope.inverse_frequencies.len()));
        metadata.set(key("rope.freq_base"), Value::F32(parts.theta));
        if parts.linear != 1.0 {
            metadata.text(key("rope.scaling.type"), "linear");
            metadata.set(key("rope.scaling.factor"), Value::F32(parts.linear));
        }
    }
    if architecture.fused {
        let original = spec.long_rope.as_ref().map_or(spec.max_position_embeddings, |it| it.original_context);
        metadata.set(key("rope.scaling.original_context_length"), size(original));
        // Written and not used.
        let window = spec.layers.iter().find_map(|it| it.attention.window);
        metadata.set(key("attention.sliding_window"), size(window.unwrap_or(0)));
    }
    if let Some(experts) = layer.mlp.experts {
        metadata.set(key("expert_count"), size(experts.num_experts));
        metadata.set(key("expert_used_count"), size(experts.num_experts_per_tok));
        if can.experts == Experts::Always {
            metadata.set(key("expert_feed_forward_length"), size(layer.mlp.intermediate_size));
        }
    }
    windows(spec, &can, &key, rope_of(true), metadata);
    if can.caps == Caps::Both {
        metadata.set(key("attn_logit_softcapping"), number(attention.softcap.unwrap_or(0.0)));
    }
    if let Some(cap) = spec.logit_softcap {
        metadata.set(key("final_logit_softcapping"), number(cap));
    }
    if can.scales {
        metadata.set(key("attention.scale"), number(attention.scale));
        metadata.set(key("embedding_scale"), number(spec.embedding_scale));
        metadata.set(key("residual_scale"), number(layer.residual_scale));
        metadata.set(key("logit_scale"), number(1.0 / spec.logit_scale));
    } else if can.logit_scale {
        metadata.set(key("logit_scale"), number(spec.logit_scale));
    }
}

fn windows(
    spec: &ModelSpec,
    can: &Computes,
    key: &dyn Fn(&str) -> String,
    local: Option<&Rope>,
    metadata: &mut Metadata,
) {
    let slides: Vec<bool> = spec.layers.iter().map(|it| it.attention.window.is_some()).collect();
    let window = spec.layers.iter().find_map(|it| it.attention.window);
    let Some(pattern) = can.window_pattern else { return };
    // What no layer uses must not be zero.
    let width = window.unwrap_or(spec.max_position_embeddings);
    metadata.set(key("attention.sliding_window"), Value::U32(width as u32));
    let usual = slides.iter().enumerate().all(|(index, it)| *it == ((index + 1) % pattern != 0));
    if !usual {
        metadata.set(key("attention.sliding_window_pattern"), Value::Bools(slides));
    }
    if let Some(rope) = local.filter(|_| pattern == 6) {
        metadata.set(key("rope.freq_base_swa"), Value::F32(rope_parts(rope).theta));
    }
}
