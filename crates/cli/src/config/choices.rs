//! Keys whose value is one of some names.

use std::path::PathBuf;

use ferrotune_data::{named_template, template_names};

use super::kinds::{Setting, mismatch, scalar};
use super::yaml::Node;

/// An enum of names, some of which are not there yet and some of which have a better one.
macro_rules! choice {
    ($(#[$doc:meta])* $name:ident { $($(#[$variant_doc:meta])* $variant:ident = $text:literal $(| $alias:literal)*),* $(,)? }
        later { $($later:literal),* $(,)? } wrong { $($wrong:literal => $instead:literal),* $(,)? }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum $name { $($(#[$variant_doc])* $variant),* }

        impl Setting for $name {
            fn expected() -> String {
                [$($text),*].join(", ")
            }
            fn read(node: &Node) -> Result<$name, String> {
                match scalar::<$name>(node)?.to_ascii_lowercase().as_str() {
                    $($text $(| $alias)* => Ok($name::$variant),)*
                    $($later => Err(format!("{} is not there yet; there is {}", node.shown(), Self::expected())),)*
                    $($wrong => Err(format!("{} is not supported; {}", node.shown(), $instead)),)*
                    _ => Err(mismatch::<$name>(node)),
                }
            }
            fn shown(&self) -> String {
                match self { $($name::$variant => $text.to_string()),* }
            }
        }
    };
}

choice! {
    /// `stage`
    Stage {
        /// Supervised: answers to prompts.
        Sft = "sft",
        /// Pretraining: plain texts.
        Pt = "pt",
    }
    later { "dpo", "kto", "orpo", "simpo", "rm", "ppo" } wrong {}
}

choice! {
    /// `finetuning_type`
    FinetuningType {
        /// Low-rank adapters on frozen weights.
        Lora = "lora",
        /// All weights.
        Full = "full",
        /// Some layers' weights.
        Freeze = "freeze",
    }
    later { "oft" } wrong {}
}

/// `template`
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TemplateName {
    /// The one that came with the model.
    Auto,
    /// One of ours, by LLaMA-Factory's name for it.
    Named(String),
    /// The one in this file.
    File(PathBuf),
}

impl TemplateName {
    /// A name or a path, as it was typed; `Err` lists the names that are near.
    pub fn from_text(text: &str) -> Result<TemplateName, String> {
        if named_template(text).is_some() {
            return Ok(TemplateName::Named(text.to_string()));
        }
        if text.contains(['/', '\\', '.']) {
            return Ok(TemplateName::File(PathBuf::from(text)));
        }
        let near = template_names().max_by(|a, b| {
            let likeness = |name: &str| strsim::jaro_winkler(name, text);
            likeness(a).total_cmp(&likeness(b))
        });
        Err(format!(
            "there is no template `{text}`{}; there are {}, and files that end in .jinja",
            near.map(|near| format!(" (nearest: {near})")).unwrap_or_default(),
            template_names().collect::<Vec<_>>().join(", ")
        ))
    }
}

impl Setting for TemplateName {
    fn expected() -> String {
        "auto, the name of a template or a file".to_string()
    }
    fn read(node: &Node) -> Result<TemplateName, String> {
        match scalar::<TemplateName>(node)? {
            _ if node.is_null() => Ok(TemplateName::Auto),
            "auto" | "none" | "None" => Ok(TemplateName::Auto),
            name => TemplateName::from_text(name),
        }
    }
    fn shown(&self) -> String {
        match self {
            TemplateName::Auto => "auto".to_string(),
            TemplateName::Named(name) => name.clone(),
            TemplateName::File(path) => path.display().to_string(),
        }
    }
}

choice! {
    /// `quantization_bit`
    QuantizationBit {
        /// Four bits a weight.
        Four = "4",
    }
    later { "8", "3", "2", "1" } wrong {}
}

choice! {
    /// `quantization_type`
    QuantizationType {
        /// Sixteen codes that fit a normal distribution.
        Nf4 = "nf4",
    }
    later { "fp4" } wrong {}
}

choice! {
    /// `quantization_method`
    QuantizationMethod {
        /// As bitsandbytes lays it out.
        Bnb = "bnb" | "bitsandbytes",
    }
    later { "hqq", "gptq", "awq", "aqlm", "quanto", "eetq", "mxfp4", "fp8" } wrong {}
}

choice! {
    /// `lr_scheduler_type`
    Schedule {
        /// Down to zero in a straight line.
        Linear = "linear",
        /// Down to zero along half a cosine.
        Cosine = "cosine",
        /// Several half cosines.
        CosineWithRestarts = "cosine_with_restarts",
        /// Along a cosine to a lowest rate.
        CosineWithMinLr = "cosine_with_min_lr",
        /// Down along a power of what is left.
        Polynomial = "polynomial",
        /// Always the same, without warm-up.
        Constant = "constant",
        /// Always the same after the warm-up.
        ConstantWithWarmup = "constant_with_warmup",
        /// Down with the square root of the step.
        InverseSqrt = "inverse_sqrt",
        /// Up, level, down.
        WarmupStableDecay = "warmup_stable_decay",
        /// Lower when evaluations get no better.
        ReduceLrOnPlateau = "reduce_lr_on_plateau",
    }
    later { "cosine_warmup_with_min_lr", "greedy" } wrong {}
}

choice! {
    /// `optim`
    Optimizer {
        /// AdamW with 32-bit states.
        AdamW = "adamw_torch" | "adamw_torch_fused" | "adamw_hf",
        /// AdamW with 8-bit states in blocks of 256, as bitsandbytes keeps them.
        AdamW8bit = "adamw_8bit" | "adamw_bnb_8bit",
        /// AdamW with 32-bit states in the host's memory.
        PagedAdamW = "paged_adamw_32bit" | "paged_adamw",
        /// AdamW with 8-bit states in the host's memory.
        PagedAdamW8bit = "paged_adamw_8bit",
        /// Stochastic gradient descent.
        Sgd = "sgd",
        /// Lion with 32-bit momentum.
        Lion = "lion_32bit" | "lion",
        /// Adafactor by the schedule's learning rate.
        Adafactor = "adafactor",
        /// Muon for matrices, AdamW for the others.
        Muon = "muon",
    }
    later { "lion_8bit", "paged_lion_32bit", "paged_lion_8bit", "adagrad", "rmsprop" } wrong {}
}

choice! {
    /// `init_lora_weights`
    InitLoraWeights {
        /// A random, B zero.
        Default = "true",
        /// What quantising takes from the base.
        Loftq = "loftq",
    }
    later { "gaussian", "eva", "olora", "corda", "orthogonal", "lora_ga" } wrong {
        "pissa" => "use `pissa_init: true`",
    }
}

choice! {
    /// `recompute`
    Recompute {
        /// Keeps as many blocks' activations as memory allows.
        Auto = "auto",
        /// Keeps every block's activations: fastest.
        Keep = "keep",
        /// Computes every block's activations again in the backward pass: leanest.
        All = "all",
        /// The same, and what each block begins with waits in the host's memory (on a GPU): a little leaner still.
        Lean = "lean",
        /// Keeps every block's activations in the host's memory (on a GPU).
        Offload = "offload",
    }
    later {} wrong {}
}

choice! {
    /// `eval_strategy`
    EvalStrategy {
        /// Every `eval_steps` steps.
        Steps = "steps",
        /// At the end of each epoch.
        Epoch = "epoch",
        /// Not during the run.
        No = "no" | "false" | "off",
    }
    later { "best" } wrong {}
}

choice! {
    /// `metric_for_best_model`
    BestMetric {
        /// Of the tokens.
        Loss = "loss" | "eval_loss",
        /// Of the tokens.
        Accuracy = "accuracy" | "eval_accuracy",
        /// exp(loss)
        Perplexity = "perplexity" | "eval_perplexity",
    }
    later { "rouge-1", "rouge-2", "rouge-l", "bleu-4" } wrong {}
}

choice! {
    /// `save_strategy`
    SaveStrategy {
        /// Every `save_steps` steps.
        Steps = "steps",
        /// At the end of each epoch.
        Epoch = "epoch",
        /// Only at the end.
        No = "no" | "false" | "off",
    }
    later { "best" } wrong {}
}

choice! {
    /// `hub`
    HubName {
        /// What `USE_MODELSCOPE_HUB` says, as in LLaMA-Factory; else Hugging Face's.
        Auto = "auto",
        /// Hugging Face's, or a mirror of it.
        HuggingFace = "huggingface" | "hf",
        /// ModelScope's.
        ModelScope = "modelscope" | "ms",
    }
    later { "openmind", "om" } wrong {}
}

choice! {
    /// `on_bad_row`
    OnBadRow {
        /// Left out, and counted with its reason.
        Skip = "skip",
        /// The run stops at the first one.
        Stop = "stop",
    }
    later {} wrong {}
}

choice! {
    /// `mix_strategy`
    MixStrategy {
        /// One set after another.
        Concat = "concat",
        /// In turns until the first is used up.
        InterleaveUnder = "interleave_under",
        /// In turns until all are used up; shorter ones begin again.
        InterleaveOver = "interleave_over",
        /// In turns until all are used up, each row once.
        InterleaveOnce = "interleave_once",
    }
    later {} wrong {}
}

choice! {
    /// `export_format`
    ExportFormat {
        /// A Hugging Face folder in 16 bits (or in f32).
        Safetensors = "safetensors",
        /// The same with projections in 4 bits, as bitsandbytes serialises them.
        BnbFourBit = "bnb-4bit",
        /// GGUF files for llama.cpp and Ollama.
        GgufF32 = "gguf-f32",
        /// In f16.
        GgufF16 = "gguf-f16" | "gguf",
        /// In bf16.
        GgufBf16 = "gguf-bf16",
        /// In 8 bits.
        GgufQ8 = "gguf-q8_0",
        /// In 4 bits, the plain way.
        GgufQ4 = "gguf-q4_0",
        /// In 4 to 6 bits.
        GgufQ4KM = "gguf-q4_k_m",
        /// In 5 to 6 bits.
        GgufQ5KM = "gguf-q5_k_m",
        /// In 6 bits.
        GgufQ6K = "gguf-q6_k",
        /// The adapter by itself, for llama.cpp.
        GgufAdapter = "gguf-adapter",
    }
    later {} wrong {}
}

choice! {
    /// `infer_dtype`
    InferDtype {
        /// That of the base model's files.
        Auto = "auto",
        /// bfloat16
        Bf16 = "bfloat16" | "bf16",
        /// float16
        F16 = "float16" | "fp16",
        /// float32
        F32 = "float32" | "fp32",
    }
    later {} wrong {}
}
