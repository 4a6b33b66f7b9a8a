//! What llama.cpp calls the families, and what it calls their tensors: for reading GGUF files and for writing them.
//! The facts are those of llama.cpp's `gguf-py/gguf/constants.py`, `tensor_mapping.py` and `conversion/`.

use crate::spec::{FUSED, ModelSpec, NormPlaces, names};

/// An architecture that GGUF files name.
#[derive(Debug, PartialEq)]
pub struct GgufArchitecture {
    /// `general.architecture`, and what the keys of its metadata begin with.
    pub name: &'static str,
    /// The family that reads it, a `model_type`.
    pub(super) family: &'static str,
    /// Families that are this architecture too.
    also: &'static [&'static str],
    /// Rows of q and k are kept in the order (2i, 2i+1), not (i, i + width/2).
    pub pairs_are_neighbours: bool,
    /// q, k and v are one tensor, and so are gate and up.
    pub fused: bool,
    norms: NormPlaces,
}

const fn plain(name: &'static str) -> GgufArchitecture {
    let (pairs_are_neighbours, fused) = (false, false);
    GgufArchitecture { name, family: name, also: &[], pairs_are_neighbours, fused, norms: NormPlaces::Before }
}

/// All that can be read and written.
pub(super) const ARCHITECTURES: &[GgufArchitecture] = &[
    GgufArchitecture { pairs_are_neighbours: true, also: &["mistral", "mixtral"], ..plain("llama") },
    plain("qwen2"),
    plain("qwen3"),
    GgufArchitecture { family: "qwen3_moe", ..plain("qwen3moe") },
    GgufArchitecture { pairs_are_neighbours: true, ..plain("smollm3") },
    GgufArchitecture { norms: NormPlaces::After, ..plain("olmo2") },
    GgufArchitecture { pairs_are_neighbours: true, ..plain("granite") },
    plain("gemma"),
    GgufArchitecture { norms: NormPlaces::BothEnds, ..plain("gemma2") },
    GgufArchitecture { family: "gemma3_text", norms: NormPlaces::BothEnds, ..plain("gemma3") },
    GgufArchitecture { fused: true, ..plain("phi3") },
    GgufArchitecture { norms: NormPlaces::Shared, ..plain("cohere2") },
];

/// The modules of a layer, ours and GGUF's.
const MODULES: &[(&str, &str)] = &[
    ("input_layernorm", "attn_norm"),
    (names::Q, "attn_q"),
    (names::K, "attn_k"),
    (names::V, "attn_v"),
    ("self_attn.qkv_proj", "attn_qkv"),
    (names::O, "attn_output"),
    (names::Q_NORM, "attn_q_norm"),
    (names::K_NORM, "attn_k_norm"),
    (names::GATE, "ffn_gate"),
    (names::UP, "ffn_up"),
    ("mlp.gate_up_proj", "ffn_up"),
    (names::DOWN, "ffn_down"),
    (names::ROUTER, "ffn_gate_inp"),
    ("post_attention_layernorm", "ffn_norm"),
];

/// Where a norm of that name stands elsewhere.
const OUTER_NORMS: &[(&str, &str)] = &[
    ("post_attention_layernorm", "post_attention_norm"),
    ("pre_feedforward_layernorm", "ffn_norm"),
    ("post_feedforward_layernorm", "post_ffw_norm"),
];

/// Behind the name of a projection that is one tensor of all experts'.
const EXPERTS: &str = "_exps";

const TOP: &[(&str, &str)] =
    &[("model.embed_tokens", "token_embd"), ("model.norm", "output_norm"), ("lm_head", "output")];

impl GgufArchitecture {
    /// What llama.cpp calls the family of a spec, where it has it.
    pub fn of(spec: &ModelSpec) -> Option<&'static GgufArchitecture> {
        ARCHITECTURES.iter().find(|it| it.family == spec.family || it.also.contains(&spec.family))
    }

    pub(in crate::source) fn named(name: &str) -> Option<&'static GgufArchitecture> {
        ARCHITECTURES.iter().find(|it| it.name == name)
    }

    /// `blk.0.attn_q.weight` of `model.layers.0.self_attn.q_proj.weight`; one name for all experts.
    pub fn tensor(&self, canonical: &str) -> Option<String> {
        let (module, suffix) = canonical.rsplit_once('.')?;
        if let Some((_, theirs)) = TOP.iter().find(|it| it.0 == module) {
            return Some(format!("{theirs}.{suffix}"));
        }
        let (layer, module) = module.strip_prefix("model.layers.")?.split_once('.')?;
        let theirs = |module: &str| self.modules().find(|it| it.0 == module).map(|it| it.1);
        if let Some((_, part)) = names::expert_of(module) {
            return Some(format!("blk.{layer}.{}{EXPERTS}.{suffix}", theirs(&part)?));
        }
        Some(format!("blk.{layer}.{}.{suffix}", theirs(module)?))
    }

    /// A tensor's canonical name, and the module's name in the file; of a tensor of all experts, that of one mlp.
    pub(in crate::source) fn canonical<'a>(&self, name: &'a str) -> Option<(String, &'a str)> {
        let (module, suffix) = name.rsplit_once('.')?;
        if let Some((ours, _)) = TOP.iter().find(|it| it.1 == module) {
            return Some((format!("{ours}.{suffix}"), module));
        }
        let (layer, module) = module.strip_prefix("blk.")?.split_once('.')?;
        let one = module.strip_suffix(EXPERTS).unwrap_or(module);
        let (ours, _) = self.modules().find(|it| it.1 == one)?;
        Some((format!("model.layers.{layer}.{ours}.{suffix}"), module))
    }

    /// The modules of a layer, ours and GGUF's.
    fn modules(&self) -> impl Iterator<Item = &'static (&'static str, &'static str)> {
        let inner = matches!(self.norms, NormPlaces::Before | NormPlaces::Shared);
        let outer = if inner { &[] } else { OUTER_NORMS };
        let fused = self.fused;
        let elsewhere = move |name: &str| {
            FUSED.iter().any(|(whole, parts)| if fused { parts.contains(&name) } else { *whole == name })
        };
        outer.iter().chain(MODULES.iter().filter(move |it| !elsewhere(it.0)))
    }
}

impl GgufArchitecture {
    /// The canonical name of one expert's tensor, of what [`GgufArchitecture::canonical`] says for all; none for what
    /// isn't one of all experts.
    pub(super) fn of_expert(canonical: &str, module: &str, expert: usize) -> Option<String> {
        module.strip_suffix(EXPERTS)?;
        let (layer, part) = canonical.split_once(".mlp.")?;
        let (part, suffix) = part.rsplit_once('.')?;
        Some(format!("{layer}.{}.{suffix}", names::of_expert(expert, part)))
    }
}

/// Where our row of a q or k projection is in a file whose pairs are neighbours. With `half` pairs to a head,
/// ours (i, i + half) is theirs (2i, 2i+1).
pub fn file_row(row: usize, head_width: usize) -> usize {
    let (head, within) = (row / head_width, row % head_width);
    let (pair, second) = (within % (head_width / 2), within / (head_width / 2));
    head * head_width + 2 * pair + second
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_name_leads_back() {
        let parts = ["self_attn.q_proj.bias", "self_attn.o_proj.weight", "mlp.down_proj.weight"];
        for architecture in ARCHITECTURES.iter().filter(|it| !it.fused) {
            let names = architecture.norms.names();
            let norms = [names.attention_in, names.attention_out, names.mlp_in, names.mlp_out];
            let norms = norms.into_iter().flatten().map(|it| format!("model.layers.3.{it}.weight"));
            let parts = parts.iter().map(|it| format!("model.layers.3.{it}"));
            for name in norms.chain(parts).chain(["model.norm.weight".into()]) {
                let theirs = architecture.tensor(&name).unwrap();
                assert_eq!(architecture.canonical(&theirs).unwrap().0, name, "{}", architecture.name);
            }
        }
        let check = |architecture: &str, ours: &str, theirs: Option<&str>| {
            let name = format!("model.layers.7.{ours}.weight");
            let found = GgufArchitecture::named(architecture).unwrap().tensor(&name);
            assert_eq!(found, theirs.map(|it| format!("blk.7.{it}.weight")), "{architecture} {ours}");
        };
        check("llama", "post_attention_layernorm", Some("ffn_norm"));
        check("olmo2", "post_attention_layernorm", Some("post_attention_norm"));
        check("gemma2", "pre_feedforward_layernorm", Some("ffn_norm"));
        check("gemma3", "post_feedforward_layernorm", Some("post_ffw_norm"));
        check("phi3", "mlp.gate_up_proj", Some("ffn_up"));
        check("phi3", "mlp.up_proj", None);
        check("qwen3", "self_attn.q_norm", Some("attn_q_norm"));
        check("llama", "self_attn.qkv_proj", None);
        check("llama", "mlp.experts.5.gate_proj", Some("ffn_gate_exps"));
        check("qwen3moe", "mlp.gate", Some("ffn_gate_inp"));
        check("cohere2", "input_layernorm", Some("attn_norm"));
    }

    #[test]
    fn rows_of_a_head_are_woven() {
        assert_eq!((0..8).map(|row| file_row(row, 4)).collect::<Vec<_>>(), [0, 2, 1, 3, 4, 6, 5, 7]);
    }
}
