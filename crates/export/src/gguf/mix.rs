//! Which tensor gets which type: the mixes of llama.cpp's `llama-quant.cpp`, without an importance matrix.

use ferrotune_model::source::GgufType;

/// What a GGUF file's weights are stored as.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum GgufMix {
    F32,
    F16,
    Bf16,
    Q8_0,
    Q4_0,
    Q4KM,
    Q5KM,
    Q6K,
}

/// Each mix: its name, its number in `general.file_type`, what most tensors get.
const MIXES: &[(GgufMix, &str, u32, GgufType)] = &[
    (GgufMix::F32, "F32", 0, GgufType::F32),
    (GgufMix::F16, "F16", 1, GgufType::F16),
    (GgufMix::Bf16, "BF16", 32, GgufType::Bf16),
    (GgufMix::Q8_0, "Q8_0", 7, GgufType::Q8_0),
    (GgufMix::Q4_0, "Q4_0", 2, GgufType::Q4_0),
    (GgufMix::Q4KM, "Q4_K_M", 15, GgufType::Q4K),
    (GgufMix::Q5KM, "Q5_K_M", 17, GgufType::Q5K),
    (GgufMix::Q6K, "Q6_K", 18, GgufType::Q6K),
];

impl GgufMix {
    /// All names, for messages.
    pub fn names() -> Vec<&'static str> {
        MIXES.iter().map(|it| it.1).collect()
    }

    /// By name, in capitals or not.
    pub fn named(name: &str) -> Option<GgufMix> {
        MIXES.iter().find(|it| it.1.eq_ignore_ascii_case(name)).map(|it| it.0)
    }

    /// As llama.cpp writes it.
    pub fn name(self) -> &'static str {
        MIXES[self as usize].1
    }

    /// `general.file_type`.
    pub(super) fn file_type(self) -> u32 {
        MIXES[self as usize].2
    }

    fn most(self) -> GgufType {
        MIXES[self as usize].3
    }
}

/// The name of a tensor in the file, its rows (none for a vector), its columns.
pub(super) struct Shape<'a> {
    pub(super) name: &'a str,
    pub(super) rows: Option<usize>,
    pub(super) cols: usize,
}

/// The sizes that llama.cpp treats apart.
#[derive(Clone, Copy, PartialEq)]
pub(super) enum Size {
    Usual,
    /// Its eight heads share keys and values.
    SeventyBillion,
    /// Attention is small beside eight experts.
    EightExperts,
}

/// The type of each tensor; layers must be in their order.
pub(super) fn types(mix: GgufMix, tensors: &[Shape], layers: usize, size: Size) -> Vec<GgufType> {
    let tied = !tensors.iter().any(|it| it.name == "output.weight");
    let ends = |it: &Shape, name: &str| it.name.ends_with(&format!("{name}.weight"));
    let is_value = |it: &Shape| ends(it, "attn_v") || ends(it, "attn_qkv");
    let values = tensors.iter().filter(|it| is_value(it)).count();
    let (mut value, mut down) = (0, 0);
    let one = |it: &Shape| {
        let most = mix.most();
        if it.rows.is_none() || ends(it, "ffn_gate_inp") {
            return GgufType::F32; // a token's experts hang on the latter
        }
        if most.block() == 1 {
            return most;
        }
        let mixed = mix == GgufMix::Q4KM || mix == GgufMix::Q5KM;
        let mut chosen = most;
        if it.name == "output.weight" || (tied && it.name == "token_embd.weight") {
            if !it.cols.is_multiple_of(most.block()) {
                chosen = GgufType::Q8_0;
            } else if most != GgufType::Q8_0 {
                chosen = GgufType::Q6K;
            }
        } else if is_value(it) {
            if mixed && more_bits(value, values) {
                chosen = GgufType::Q6K;
            }
            if size == Size::SeventyBillion && chosen == GgufType::Q4K {
                chosen = GgufType::Q5K;
            }
            if size == Size::EightExperts {
                chosen = GgufType::Q8_0;
            }
            value += 1;
        } else if size == Size::EightExperts && ends(it, "attn_k") {
            chosen = GgufType::Q8_0;
        } else if size == Size::EightExperts && ends(it, "attn_output") && mix == GgufMix::Q4KM {
            chosen = GgufType::Q5K;
        } else if ends(it, "ffn_down") || ends(it, "ffn_down_exps") {
            if mixed && more_bits(down, layers) {
                chosen = GgufType::Q6K;
            }
            down += 1;
        }
        fitting(chosen, it.cols)
    };
    tensors.iter().map(one).collect()
}

/// The first and last eighth of the layers, and every third between them.
fn more_bits(layer: usize, layers: usize) -> bool {
    let eighth = layers / 8;
    layer < eighth || layer >= 7 * layers / 8 || (layer - eighth) % 3 == 2
}

/// The type where rows are whole blocks of it, else one that they are whole blocks of.
fn fitting(kind: GgufType, cols: usize) -> GgufType {
    if cols.is_multiple_of(kind.block()) {
        return kind;
    }
    let smaller = match kind {
        GgufType::Q4K => GgufType::Q5_0,
        GgufType::Q5K => GgufType::Q5_1,
        GgufType::Q6K => GgufType::Q8_0,
        other => other,
    };
    if cols.is_multiple_of(smaller.block()) { smaller } else { GgufType::F16 }
}
