//! What a decoder is made of. A family fills this in; nothing else asks which family it is.

pub use ferrotune_nn::{Activation, NormKind, Rope};
use ferrotune_tensor::{Error, Result};

mod checkpoint;
mod long_rope;
mod memory;

pub use checkpoint::{CheckpointTensor, FUSED};
pub(crate) use checkpoint::{from_language_model, from_mixtral};
pub use long_rope::LongRope;
pub use memory::{BaseWeights, MemoryEstimate, MemoryPlan};

/// Experts of a layer, at most: far above any model.
const MOST_EXPERTS: usize = 4096;

/// A whole decoder: sizes, the layers one by one, and what stands before and after them.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelSpec {
    /// The family's name, for reports only.
    pub family: &'static str,
    /// Tokens that the embedding has a row for.
    pub vocab_size: usize,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Every norm of the model.
    pub norm: NormSpec,
    /// Embeddings are multiplied by this.
    pub embedding_scale: f64,
    /// Logits are multiplied by this.
    pub logit_scale: f64,
    /// Logits become cap·tanh(logit / cap).
    pub logit_softcap: Option<f64>,
    /// The head is the embedding.
    pub tie_word_embeddings: bool,
    /// The longest sequence the model was made for.
    pub max_position_embeddings: usize,
    /// The token that a sequence begins with.
    pub bos_token_id: Option<u32>,
    /// The tokens that end a sequence or a turn.
    pub eos_token_ids: Vec<u32>,
    /// The token that fills up rows elsewhere; nothing is padded here.
    pub pad_token_id: Option<u32>,
    /// One each, so that patterns such as "every sixth is global" end here.
    pub layers: Vec<LayerSpec>,
    /// Another rope for long sequences, where there is one.
    pub long_rope: Option<LongRope>,
    /// How a Hugging Face folder holds the weights.
    pub checkpoint: CheckpointForm,
}

/// What a checkpoint's tensors are, next to the canonical ones.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CheckpointForm {
    /// The same.
    Canonical,
    /// Norms' weights less one: Gemma.
    NormsLessOne,
    /// `qkv_proj` is q, k and v, `gate_up_proj` gate and up, one above the other: Phi 3.
    Fused,
    /// Experts are under `block_sparse_moe`, their projections w1, w3 and w2: Mixtral.
    Mixtral,
}

/// One layer.
#[derive(Clone, Debug, PartialEq)]
pub struct LayerSpec {
    /// Its first sublayer.
    pub attention: AttentionSpec,
    /// Its second sublayer.
    pub mlp: MlpSpec,
    /// Where its norms stand.
    pub norms: NormPlaces,
    /// How its sublayers join the residual stream.
    pub residual: Residual,
    /// What a sublayer adds is multiplied by this.
    pub residual_scale: f64,
}

/// The attention of one layer.
#[derive(Clone, Debug, PartialEq)]
pub struct AttentionSpec {
    /// Query heads.
    pub num_attention_heads: usize,
    /// Key and value heads: a divisor of the query heads.
    pub num_key_value_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// Scores are multiplied by this.
    pub scale: f64,
    /// Positions; none where a layer has none.
    pub rope: Option<Rope>,
    /// Norms of queries and keys.
    pub qk_norm: QkNorm,
    /// q, k and v add a bias.
    pub qkv_bias: bool,
    /// The output projection adds a bias.
    pub out_bias: bool,
    /// How many positions back a token sees, itself included.
    pub window: Option<usize>,
    /// Scores become cap·tanh(score / cap).
    pub softcap: Option<f64>,
}

/// The feed-forward part of one layer.
#[derive(Clone, Debug, PartialEq)]
pub struct MlpSpec {
    /// Its inner width.
    pub intermediate_size: usize,
    /// down(act(gate(x)) · up(x)), not down(act(up(x))).
    pub gated: bool,
    /// The activation.
    pub activation: Activation,
    /// Its projections add a bias.
    pub bias: bool,
    /// There are many of it, of which a token uses some.
    pub experts: Option<ExpertsSpec>,
}

/// How a token uses some of many mlps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ExpertsSpec {
    /// How many there are.
    pub num_experts: usize,
    /// How many a token uses.
    pub num_experts_per_tok: usize,
    /// What those are weighted by adds up to 1.
    pub normalised: bool,
}

/// A norm: which statistics, and what is added to the variance.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct NormSpec {
    /// Which statistics are taken out.
    pub kind: NormKind,
    /// Added under the root.
    pub eps: f64,
    /// It adds a bias.
    pub bias: bool,
}

/// Which sides of a sublayer carry a norm.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NormPlaces {
    /// Llama, Qwen, Mistral, Phi.
    Before,
    /// OLMo 2.
    After,
    /// Gemma 2 and 3, GLM 4.
    BothEnds,
    /// One before both, of a parallel layer: Cohere.
    Shared,
}

/// Norms of queries and keys before they are turned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum QkNorm {
    /// None.
    None,
    /// Each head by itself: Qwen 3, Gemma 3.
    PerHead,
    /// All heads of a token together: OLMo 2.
    WholeRow,
}

/// How sublayers join the residual stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Residual {
    /// The mlp reads what attention has added to.
    Sequential,
    /// Both read the same x: Phi 1 and 2, Cohere, GPT-NeoX.
    Parallel,
}

/// Canonical names of modules and tensors: those of Hugging Face's Llama.
pub mod names {
    /// `(vocab_size, hidden_size)`
    pub const EMBEDDING: &str = "model.embed_tokens.weight";
    /// `(1, hidden_size)`, before the head.
    pub const FINAL_NORM: &str = "model.norm.weight";
    /// `(vocab_size, hidden_size)`, absent where the embedding serves.
    pub const HEAD: &str = "lm_head.weight";
    /// Queries.
    pub const Q: &str = "self_attn.q_proj";
    /// Keys.
    pub const K: &str = "self_attn.k_proj";
    /// Values.
    pub const V: &str = "self_attn.v_proj";
    /// Attention's output.
    pub const O: &str = "self_attn.o_proj";
    /// What the activation is applied to.
    pub const GATE: &str = "mlp.gate_proj";
    /// Into the inner width.
    pub const UP: &str = "mlp.up_proj";
    /// Back to the residual stream.
    pub const DOWN: &str = "mlp.down_proj";
    /// Norm of queries.
    pub const Q_NORM: &str = "self_attn.q_norm";
    /// Norm of keys.
    pub const K_NORM: &str = "self_attn.k_norm";
    /// Scores of experts.
    pub const ROUTER: &str = "mlp.gate";

    /// `mlp.experts.{expert}.up_proj` for `mlp.up_proj`
    pub fn of_expert(expert: usize, part: &str) -> String {
        format!("mlp.experts.{expert}.{}", part.trim_start_matches("mlp."))
    }

    /// `(7, "mlp.up_proj")` for `mlp.experts.7.up_proj`
    pub fn expert_of(part: &str) -> Option<(usize, String)> {
        let (expert, part) = part.strip_prefix("mlp.experts.")?.split_once('.')?;
        Some((expert.parse().ok()?, format!("mlp.{part}")))
    }

    /// `model.layers.{layer}.{part}`: the module's name, as adapters and checkpoints use it.
    pub fn module(layer: usize, part: &str) -> String {
        format!("model.layers.{layer}.{part}")
    }

    /// `model.layers.{layer}.{part}.weight`
    pub fn weight(layer: usize, part: &str) -> String {
        format!("model.layers.{layer}.{part}.weight")
    }

    /// `model.layers.{layer}.{part}.bias`
    pub fn bias(layer: usize, part: &str) -> String {
        format!("model.layers.{layer}.{part}.bias")
    }
}

/// The modules that hold a layer's norms, where it has them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NormNames {
    /// Before attention.
    pub attention_in: Option<&'static str>,
    /// After attention.
    pub attention_out: Option<&'static str>,
    /// Before the mlp.
    pub mlp_in: Option<&'static str>,
    /// After the mlp.
    pub mlp_out: Option<&'static str>,
}

impl NormPlaces {
    /// The canonical names of the norms. The same name stands for another place where a family has
    /// norms on other sides: that is Hugging Face's habit.
    pub fn names(self) -> NormNames {
        let (attention_in, attention_out, mlp_in, mlp_out) = match self {
            NormPlaces::Before => (Some("input_layernorm"), None, Some("post_attention_layernorm"), None),
            NormPlaces::After => {
                (None, Some("post_attention_layernorm"), None, Some("post_feedforward_layernorm"))
            }
            NormPlaces::Shared => (Some("input_layernorm"), None, None, None),
            NormPlaces::BothEnds => (
                Some("input_layernorm"),
                Some("post_attention_layernorm"),
                Some("pre_feedforward_layernorm"),
                Some("post_feedforward_layernorm"),
            ),
        };
        NormNames { attention_in, attention_out, mlp_in, mlp_out }
    }
}

/// A projection of a layer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LinearSpec {
    /// Its name within the layer, such as [`names::Q`].
    pub part: String,
    /// Which expert it belongs to.
    pub expert: Option<usize>,
    /// Rows of its weight.
    pub out_features: usize,
    /// Columns of its weight.
    pub in_features: usize,
    /// It adds a bias.
    pub bias: bool,
}

/// A tensor that a checkpoint must hold.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorSpec {
    /// Its canonical name.
    pub name: String,
    /// Rows; 1 for a vector.
    pub rows: usize,
    /// Columns; the length of a vector.
    pub cols: usize,
}

impl AttentionSpec {
    /// Columns of the queries of one token.
    pub fn q_width(&self) -> usize {
        self.num_attention_heads * self.head_dim
    }

    /// Columns of the keys, or of the values, of one token.
    pub fn kv_width(&self) -> usize {
        self.num_key_value_heads * self.head_dim
    }
}

impl LayerSpec {
    /// All of attention's projections add a bias, and all of the mlp's.
    pub(crate) fn biases(&mut self, attention: bool, mlp: bool) {
        self.attention.qkv_bias = attention;
        self.attention.out_bias = attention;
        self.mlp.bias = mlp;
    }

    /// The projections of this layer in the order in which they are applied.
    pub fn linears(&self, hidden_size: usize) -> Vec<LinearSpec> {
        let (attention, mlp) = (&self.attention, &self.mlp);
        let linear = |part: &str, out_features, in_features, bias| LinearSpec {
            part: part.to_string(),
            expert: None,
            out_features,
            in_features,
            bias,
        };
        let (q, kv, inner) = (attention.q_width(), attention.kv_width(), mlp.intermediate_size);
        let mut all = vec![
            linear(names::Q, q, hidden_size, attention.qkv_bias),
            linear(names::K, kv, hidden_size, attention.qkv_bias),
            linear(names::V, kv, hidden_size, attention.qkv_bias),
            linear(names::O, hidden_size, q, attention.out_bias),
        ];
        let gate = mlp.gated.then(|| linear(names::GATE, inner, hidden_size, mlp.bias));
        let up = linear(names::UP, inner, hidden_size, mlp.bias);
        let mlp_parts = gate.into_iter().chain([up, linear(names::DOWN, hidden_size, inner, mlp.bias)]);
        match mlp.experts {
            None => all.extend(mlp_parts),
            Some(experts) => {
                let parts: Vec<LinearSpec> = mlp_parts.collect();
                let of = |expert: usize, it: &LinearSpec| LinearSpec {
                    part: names::of_expert(expert, &it.part),
                    expert: Some(expert),
                    ..it.clone()
                };
                all.extend(
                    (0..experts.num_experts).flat_map(|expert| parts.iter().map(move |it| of(expert, it))),
                );
            }
        }
        all
    }

    /// The projections that one token goes through.
    pub fn linears_of_a_token(&self, hidden_size: usize) -> impl Iterator<Item = LinearSpec> + use<> {
        let used = self.mlp.experts.map_or(0, |it| it.num_experts_per_tok);
        self.linears(hidden_size).into_iter().filter(move |it| it.expert.is_none_or(|expert| expert < used))
    }

    /// The norms of this layer: name within the layer, and length.
    fn norms(&self, hidden_size: usize) -> Vec<(&'static str, usize)> {
        let places = self.norms.names();
        let places = [places.attention_in, places.attention_out, places.mlp_in, places.mlp_out];
        let mut all: Vec<_> = places.into_iter().flatten().map(|name| (name, hidden_size)).collect();
        let attention = &self.attention;
        match attention.qk_norm {
            QkNorm::None => {}
            QkNorm::PerHead => {
                all.extend([(names::Q_NORM, attention.head_dim), (names::K_NORM, attention.head_dim)])
            }
            QkNorm::WholeRow => {
                all.extend([(names::Q_NORM, attention.q_width()), (names::K_NORM, attention.kv_width())])
            }
        }
        all
    }
}

impl ModelSpec {
    /// Every tensor that a checkpoint of this model must hold.
    pub fn tensors(&self) -> Vec<TensorSpec> {
        let tensor = |name: String, rows, cols| TensorSpec { name, rows, cols };
        let mut all = vec![tensor(names::EMBEDDING.into(), self.vocab_size, self.hidden_size)];
        for (i, layer) in self.layers.iter().enumerate() {
            for it in layer.linears(self.hidden_size) {
                all.push(tensor(names::weight(i, &it.part), it.out_features, it.in_features));
                if it.bias {
                    all.push(tensor(names::bias(i, &it.part), 1, it.out_features));
                }
            }
            if let Some(experts) = layer.mlp.experts {
                all.push(tensor(names::weight(i, names::ROUTER), experts.num_experts, self.hidden_size));
            }
            for (part, length) in layer.norms(self.hidden_size) {
                all.push(tensor(names::weight(i, part), 1, length));
                if self.norm.bias {
                    all.push(tensor(names::bias(i, part), 1, length));
                }
            }
        }
        all.push(tensor(names::FINAL_NORM.into(), 1, self.hidden_size));
        if self.norm.bias {
            all.push(tensor("model.norm.bias".into(), 1, self.hidden_size));
        }
        if !self.tie_word_embeddings {
            all.push(tensor(names::HEAD.into(), self.vocab_size, self.hidden_size));
        }
        all
    }

    /// Numbers that the model is made of; a tied head counts once.
    pub fn parameter_count(&self) -> u64 {
        self.tensors().iter().map(|it| it.rows as u64 * it.cols as u64).sum()
    }

    /// Numbers in the weights of the layers' projections: what 4-bit storage applies to.
    pub fn linear_parameter_count(&self) -> u64 {
        self.projections().map(|(_, it)| it.out_features as u64 * it.in_features as u64).sum()
    }

    /// Numbers in those of them that one token is multiplied by.
    pub fn linear_parameters_of_a_token(&self) -> u64 {
        let layers = self.layers.iter().flat_map(|layer| layer.linears_of_a_token(self.hidden_size));
        layers.map(|it| it.out_features as u64 * it.in_features as u64).sum()
    }

    /// Numbers in LoRA adapters of this rank on all projections of the layers.
    pub fn adapter_parameter_count(&self, rank: usize) -> u64 {
        self.projections().map(|(_, it)| (it.out_features + it.in_features) as u64 * rank as u64).sum()
    }

    /// The projections of all layers, each with its canonical name; one that a checkpoint holds within another counts too.
    pub fn projections(&self) -> impl Iterator<Item = (String, LinearSpec)> + '_ {
        let of_layer = |(index, layer): (usize, &LayerSpec)| {
            let linears = layer.linears(self.hidden_size).into_iter();
            linears.map(move |it| (names::module(index, &it.part), it))
        };
        self.layers.iter().enumerate().flat_map(of_layer)
    }

    /// Checks what no decoder can be built without: nothing empty, heads that divide, sizes whose
    /// products can be counted.
    ///
    /// # Errors
    /// Names the first size that can't be.
    pub fn check(&self) -> Result<()> {
        let mut sizes = vec![("vocab_size", self.vocab_size), ("hidden_size", self.hidden_size)];
        sizes.push(("num_hidden_layers", self.layers.len()));
        for layer in &self.layers {
            let attention = &layer.attention;
            sizes.push(("num_attention_heads", attention.num_attention_heads));
            sizes.push(("num_key_value_heads", attention.num_key_value_heads));
            sizes.push(("head_dim", attention.head_dim));
            sizes.push(("intermediate_size", layer.mlp.intermediate_size));
            if let Some(experts) = layer.mlp.experts {
                sizes.push(("num_experts", experts.num_experts));
                sizes.push(("num_experts_per_tok", experts.num_experts_per_tok));
            }
        }
        // Far above any model and far below overflow when three are multiplied.
        if let Some((name, size)) = sizes.iter().find(|(_, size)| *size == 0 || *size > 1 << 21) {
            return Err(Error::msg(format!("`{name}` is {size}, expected 1 to {}", 1 << 21)));
        }
        for layer in &self.layers {
            let (heads, kv) = (layer.attention.num_attention_heads, layer.attention.num_key_value_heads);
            if heads % kv != 0 {
                let message = format!(
                    "`num_attention_heads` is {heads}, which `num_key_value_heads` {kv} doesn't divide"
                );
                return Err(Error::msg(message));
            }
            if let Some(it) = layer.mlp.experts
                && (it.num_experts > MOST_EXPERTS || it.num_experts_per_tok > it.num_experts)
            {
                let message = format!(
                    "`num_experts` is {}, `num_experts_per_tok` {}: expected at most {MOST_EXPERTS}, and no more for \
                     a token than there are",
                    it.num_experts, it.num_experts_per_tok
                );
                return Err(Error::msg(message));
            }
            if layer.attention.rope.is_some() && layer.attention.head_dim % 2 != 0 {
                let message = format!(
                    "`head_dim` is {}: positions turn pairs of channels, so it must be even",
                    layer.attention.head_dim
                );
                return Err(Error::msg(message));
            }
        }
        Ok(())
    }
}
