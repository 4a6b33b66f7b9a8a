use super::ModelSpec;

/// How the base model's weights are kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BaseWeights {
    /// Projections in NF4 with double quantisation; embedding, head and norms not quantised.
    FourBit,
    /// Nothing is quantised.
    Whole,
}

/// What a memory estimate is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemoryPlan {
    /// How the base model is kept.
    pub base: BaseWeights,
    /// Bytes of a weight that isn't quantised: 4 in f32, as on the CPU without bf16, else 2.
    pub weight_bytes: usize,
    /// Rank of the adapters, on all projections.
    pub lora_rank: usize,
    /// Weights that are trained themselves.
    pub trained_weights: u64,
    /// Tokens in one micro-batch, all sequences together.
    pub tokens: usize,
    /// Bytes of one activation: 4 on the CPU, 2 in 16-bit training on a GPU.
    pub activation_bytes: usize,
    /// Blocks keep only their input and compute the rest again in the backward pass.
    pub recompute: bool,
    /// Then an embedding that isn't the head's too is on the host: on a GPU, unless it is trained.
    pub host_embedding: bool,
}

/// Bytes that training takes, part by part. An estimate: buffers of kernels come on top.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemoryEstimate {
    /// The layers' projections.
    pub linears: u64,
    /// Embedding, head, norms, biases.
    pub others: u64,
    /// Adapters and other trained weights, their gradients and the two moments of AdamW, all in f32.
    pub adapters: u64,
    /// What the blocks keep for the backward pass.
    pub activations: u64,
    /// One chunk of logits and its gradient.
    pub logits: u64,
}

impl MemoryEstimate {
    /// All parts together.
    pub fn total(&self) -> u64 {
        self.linears + self.others + self.adapters + self.activations + self.logits
    }
}

/// Bits of one NF4 weight: 4, a byte for 64 of them, an f32 for 256 such bytes.
const NF4_BITS: f64 = 4.0 + 8.0 / 64.0 + 32.0 / (64.0 * 256.0);

/// Tokens whose logits exist at the same time.
const LOGIT_CHUNK: u64 = 512;

impl ModelSpec {
    /// What training with adapters takes, by the plan.
    pub fn memory(&self, plan: &MemoryPlan) -> MemoryEstimate {
        let linears = self.linear_parameter_count();
        let tokens = plan.tokens as u64;
        let kept: Vec<u64> = (0..self.layers.len()).map(|i| self.kept_per_token(i, plan)).collect();
        let activations = if plan.recompute {
            let inputs = (self.layers.len() * self.hidden_size * plan.activation_bytes) as u64;
            inputs + kept.iter().copied().max().unwrap_or(0)
        } else {
            kept.iter().sum()
        };
        let away = plan.recompute && plan.host_embedding && !self.tie_word_embeddings;
        let embedding = if away { (self.vocab_size * self.hidden_size) as u64 } else { 0 };
        MemoryEstimate {
            linears: match plan.base {
                BaseWeights::FourBit => (linears as f64 * NF4_BITS / 8.0).ceil() as u64,
                BaseWeights::Whole => linears * plan.weight_bytes as u64,
            },
            others: (self.parameter_count() - linears - embedding) * plan.weight_bytes as u64,
            adapters: (self.adapter_parameter_count(plan.lora_rank) + plan.trained_weights) * 16,
            activations: activations * tokens,
            logits: tokens.min(LOGIT_CHUNK) * self.vocab_size as u64 * 4,
        }
    }

    /// Multiplications and additions for one token of a step of training with adapters on frozen weights, nothing being
    /// computed twice: products with the weights forward and for dx, those of the adapters also for their gradients,
    /// causal attention in sequences of this many tokens forward and back.
    pub fn flops_of_a_token(&self, lora_rank: usize, sequence: f64) -> f64 {
        let weights = self.linear_parameters_of_a_token() + (self.vocab_size * self.hidden_size) as u64;
        let adapters = self.adapter_parameter_count(lora_rank);
        let attention: f64 =
            self.layers.iter().map(|it| 6.0 * sequence * it.attention.q_width() as f64).sum();
        4.0 * weights as f64 + 6.0 * adapters as f64 + attention
    }

    /// Blocks that can keep all that their backward reads when so many bytes are free once the weights
    /// are in memory; the others keep their input.
    pub fn blocks_kept(&self, plan: &MemoryPlan, available: u64) -> usize {
        let blocks = self.layers.len();
        let mut free = available.saturating_sub(self.beside_kept(plan));
        let fits = |layer: &usize| {
            let whole = self.kept_per_token(*layer, plan) * plan.tokens as u64;
            let left = free.checked_sub(whole);
            free = left.unwrap_or(0);
            left.is_some()
        };
        (0..blocks).take_while(fits).count()
    }

    /// Bytes that are left where all blocks keep all, when so many are free once the weights are in memory.
    pub fn left_beside(&self, plan: &MemoryPlan, available: u64) -> u64 {
        let kept = self.memory(&MemoryPlan { recompute: false, ..*plan }).activations;
        available.saturating_sub(self.beside_kept(plan)).saturating_sub(kept)
    }

    /// Bytes that training takes beside the weights and what blocks keep: moments come with the first step, and
    /// gradients of a block's insides with its backward.
    fn beside_kept(&self, plan: &MemoryPlan) -> u64 {
        let leanest = self.memory(&MemoryPlan { recompute: true, ..*plan });
        leanest.adapters / 2 + 2 * leanest.logits + 2 * leanest.activations
    }

    /// Bytes that a block keeps of one token: x, q, k, v, out, mid, gate, up, of experts what these two became (on a
    /// GPU), what the adapters' first halves gave and the columns that outputs and gradients have to spare for it, and in f32 the two norms' reciprocals and one sum for each head.
    fn kept_per_token(&self, layer: usize, plan: &MemoryPlan) -> u64 {
        let layer = &self.layers[layer];
        let (attention, experts) = (&layer.attention, layer.mlp.experts);
        let inner = layer.mlp.intermediate_size * experts.map_or(1, |it| it.num_experts_per_tok);
        let expert_rows =
            experts.map_or(0, |it| 2 * it.num_experts_per_tok * self.hidden_size + it.num_experts);
        let streams = 2 * self.hidden_size + 2 * attention.q_width() + 2 * attention.kv_width();
        let inner = inner * (1 + usize::from(layer.mlp.gated) + usize::from(experts.is_some()));
        // Beside out and kept of it, beside gate and up as their gradient, and kept of the others' inputs.
        let adapters = (layer.linears_of_a_token(self.hidden_size).count() + 2) * plan.lora_rank;
        let f32s = 2 + attention.num_attention_heads;
        ((streams + inner + expert_rows + adapters) * plan.activation_bytes + f32s * 4) as u64
    }
}
