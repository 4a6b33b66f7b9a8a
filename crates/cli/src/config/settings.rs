//! The keys that work: one line each gives name, type, default and help.

use std::collections::BTreeMap;
use std::path::PathBuf;

use ferrotune_trainer::ScheduleKind;

use super::choices::*;
use super::kinds::*;
use super::yaml::Node;

/// What help says about a key.
#[derive(Debug)]
pub struct KeyHelp {
    /// Its heading in the help.
    pub group: &'static str,
    /// Its name.
    pub name: &'static str,
    /// Its default, as one would type it.
    pub default: String,
    /// What it does.
    pub help: &'static str,
}

macro_rules! settings {
    ($($group:literal { $(#[doc = $help:literal] $name:ident : $type:ty = $default:expr,)* })*) => {
        /// Exactly what was typed: the file, then the command line, over the defaults. Nothing has been opened.
        #[derive(Clone, Debug)]
        pub struct RunConfig {
            $($(#[doc = $help] pub $name: $type,)*)*
            /// Where each key that was given stands, as messages name it.
            pub places: BTreeMap<&'static str, String>,
            /// What the person should know about keys that were taken but do nothing.
            pub notes: Vec<String>,
        }

        impl Default for RunConfig {
            fn default() -> RunConfig {
                RunConfig { $($($name: $default,)*)* places: BTreeMap::new(), notes: Vec::new() }
            }
        }

        impl RunConfig {
            /// Sets one key; `None` when there is no such key.
            pub(super) fn set(&mut self, name: &str, node: &Node) -> Option<Result<&'static str, String>> {
                match name {
                    $($(stringify!($name) => {
                        Some(<$type>::read(node).map(|value| { self.$name = value; stringify!($name) }))
                    })*)*
                    _ => None,
                }
            }

            /// Every key that works, in the order of help.
            pub fn keys() -> Vec<KeyHelp> {
                let defaults = RunConfig::default();
                vec![$($(KeyHelp {
                    group: $group,
                    name: stringify!($name),
                    default: defaults.$name.shown(),
                    help: $help.trim_ascii(),
                },)*)*]
            }

            /// Every key with its value, as one would type it; secrets are left out.
            pub fn values(&self) -> Vec<(&'static str, String)> {
                let values = vec![$($((stringify!($name), self.$name.shown()),)*)*];
                values.into_iter().filter(|(name, _)| !name.ends_with("_token")).collect()
            }
        }
    };
}

settings! {
    "Model" {
        /// The base model: a folder, a GGUF file or a model's name on the hub.
        model_name_or_path: Option<String> = None,
        /// Trained adapters on the model: train goes on with the last one, and merges those before it into the base.
        adapter_name_or_path: Vec<PathBuf> = Vec::new(),
        /// train: merge all of adapter_name_or_path into the base, and train a new one on top.
        create_new_adapter: bool = false,
        /// Where downloaded models are kept instead of the model cache.
        cache_dir: Option<PathBuf> = None,
        /// Branch, tag or commit of the model on the hub.
        model_revision: String = "main".to_string(),
        /// Where models are looked for by name: huggingface, modelscope, or auto (USE_MODELSCOPE_HUB=1 says modelscope).
        hub: HubName = HubName::Auto,
        /// Token for models that need one, and for what is sent; HF_TOKEN else.
        hf_hub_token: Option<String> = None,
        /// The same for ModelScope; MODELSCOPE_API_TOKEN else.
        ms_hub_token: Option<String> = None,
        /// Chat template: auto (the model's own), a name such as llama3, qwen or chatml, or a file.
        template: TemplateName = TemplateName::Auto,
        /// Tokens to add to the vocabulary, unless it has them.
        add_tokens: Vec<String> = Vec::new(),
        /// Control tokens to add to the vocabulary, unless it has them.
        add_special_tokens: Vec<String> = Vec::new(),
        /// Give added tokens rows of the embedding.
        resize_vocab: bool = false,
    }
    "Method" {
        /// What is trained for: sft (answers) or pt (plain texts, as a whole).
        stage: Stage = Stage::Sft,
        /// Whether to train; without (or without a dataset), there is `do_eval` and `do_predict`.
        do_train: bool = true,
        /// What is trained: lora (adapters), full (all weights) or freeze (some layers' weights).
        finetuning_type: FinetuningType = FinetuningType::Lora,
        /// Rank of the adapters.
        lora_rank: usize = 8,
        /// Scale of the adapters, divided by the rank; twice the rank when null.
        lora_alpha: Option<f64> = None,
        /// Share of an adapter's inputs dropped in training.
        lora_dropout: f64 = 0.0,
        /// Linear layers that get an adapter: `all` or names such as q_proj,v_proj.
        lora_target: Vec<String> = vec!["all".to_string()],
        /// Linear layers that get none, by name or part of the path.
        lora_exclude: Vec<String> = Vec::new(),
        /// Layers that get adapters, by their numbers from 0; none: all of them.
        layers_to_transform: Vec<usize> = Vec::new(),
        /// Modules trained and saved whole beside the adapters: embed_tokens, lm_head.
        additional_target: Vec<String> = Vec::new(),
        /// Divide the scale by the square root of the rank instead.
        use_rslora: bool = false,
        /// DoRA: train a magnitude of each output beside the adapters' direction.
        use_dora: bool = false,
        /// PiSSA: adapters begin as the leading directions of the base's weights, which lose them (not in 4 bits).
        pissa_init: bool = false,
        /// PiSSA: rounds of the search for these; -1 until nothing changes.
        pissa_iter: i64 = 16,
        /// What adapters begin as: true (A random, B zero), or loftq (what 4 bits take from the base).
        init_lora_weights: InitLoraWeights = InitLoraWeights::Default,
        /// freeze: how many of the last layers are trained; of the first ones, where it is negative.
        freeze_trainable_layers: i64 = 2,
        /// freeze: which of their modules: all, or names such as mlp,self_attn.
        freeze_trainable_modules: Vec<String> = vec!["all".to_string()],
        /// freeze: modules beside the layers that are trained too: embed_tokens, norm, lm_head.
        freeze_extra_modules: Vec<String> = Vec::new(),
        /// Bits of a frozen weight: 4, or null for the model's own type.
        quantization_bit: Option<QuantizationBit> = None,
        /// The 4-bit code: nf4.
        quantization_type: QuantizationType = QuantizationType::Nf4,
        /// Quantise the scales as well.
        double_quantization: bool = true,
        /// Layout of the 4-bit weights: bnb (bitsandbytes).
        quantization_method: QuantizationMethod = QuantizationMethod::Bnb,
    }
    "Data" {
        /// Data sets: paths, or names in dataset_info.json.
        dataset: Vec<String> = Vec::new(),
        /// Folder of dataset_info.json and of the files it names.
        dataset_dir: PathBuf = PathBuf::from("data"),
        /// Data sets to evaluate on.
        eval_dataset: Vec<String> = Vec::new(),
        /// Set apart for evaluation: a share of the samples under 1, or so many.
        val_size: f64 = 0.0,
        /// What becomes of a row that can't be used: skip (it is counted, with its reason) or stop.
        on_bad_row: OnBadRow = OnBadRow::Skip,
        /// How several data sets become one: concat, interleave_under, interleave_over or interleave_once.
        mix_strategy: MixStrategy = MixStrategy::Concat,
        /// Chances of the data sets when they are interleaved, in their order.
        interleave_probs: Numbers = Numbers(Vec::new()),
        /// Read data as it is needed, for files larger than memory; needs max_steps.
        streaming: bool = false,
        /// Samples among which a stream is shuffled.
        buffer_size: usize = 16384,
        /// Where tokens are kept for the next start, instead of the model cache's folder.
        tokenized_path: Option<PathBuf> = None,
        /// Make tokens anew even where they are kept.
        overwrite_cache: bool = false,
        /// Keep the order of the data in every epoch.
        disable_shuffling: bool = false,
        /// Text that replaces `{{name}}` in the data set, by name.
        dataset_values: BTreeMap<String, String> = BTreeMap::new(),
        /// Longest sample in tokens; what is over it is cut.
        cutoff_len: usize = 2048,
        /// Train on prompts as well as on answers.
        train_on_prompt: bool = false,
        /// Train on the last answer of a conversation only.
        mask_history: bool = false,
        /// Whether a template with thoughts is to think: true, false, or null to leave it open.
        enable_thinking: Option<bool> = None,
        /// System message where the data has none.
        default_system: Option<String> = None,
        /// Use only this many rows of each data set.
        max_samples: Option<usize> = None,
        /// Fill rows of cutoff_len with several samples, which do not see each other.
        packing: bool = false,
        /// The same as packing: samples never see each other here.
        neat_packing: bool = false,
        /// Encode control tokens typed inside a message as control tokens, not as text.
        allow_control_tokens: bool = false,
    }
    "Output" {
        /// Where the run is written.
        output_dir: Option<PathBuf> = None,
        /// Write into a folder that is not empty.
        overwrite_output_dir: bool = false,
        /// Go on from a checkpoint: true (the newest), auto (the newest, if any) or a path.
        resume_from_checkpoint: Resume = Resume::No,
        /// Draw the losses when the run has ended: training_loss.svg and .png, training_eval_loss likewise.
        plot_loss: bool = false,
        /// Who is told of the curves: none, tensorboard (event files in output_dir/runs).
        report_to: Vec<String> = Vec::new(),
        /// Steps between two entries of the log.
        logging_steps: Steps = Steps::Count(10),
        /// When checkpoints are written: steps, epoch or no.
        save_strategy: SaveStrategy = SaveStrategy::Steps,
        /// Steps between two checkpoints.
        save_steps: Steps = Steps::Count(500),
        /// Keep only so many checkpoints.
        save_total_limit: Option<usize> = None,
        /// Send what was trained to the hub when the run has ended.
        push_to_hub: bool = false,
        /// Its name there: owner/name, or name alone for one's own; output_dir's name when null.
        hub_model_id: Option<String> = None,
        /// Who may see it there: true (its owner) or false (all); null leaves it to the hub.
        hub_private_repo: Option<bool> = None,
    }
    "Training" {
        /// Samples (packed: rows) of a micro-batch.
        per_device_train_batch_size: usize = 1,
        /// Micro-batches of a step.
        gradient_accumulation_steps: usize = 1,
        /// Highest learning rate.
        learning_rate: f64 = 5e-5,
        /// Passes over the data.
        num_train_epochs: f64 = 3.0,
        /// Steps, whatever num_train_epochs says; null or -1 for no limit.
        max_steps: MaxSteps = MaxSteps(None),
        /// Save and stop before this time is over, loading included: seconds, or such as 90m, 11.5h, 1:30:00; null for no limit.
        max_time: Option<Time> = None,
        /// Curve of the learning rate: linear, cosine, cosine_with_restarts, cosine_with_min_lr, polynomial, constant, constant_with_warmup, inverse_sqrt, warmup_stable_decay, reduce_lr_on_plateau.
        lr_scheduler_type: Schedule = Schedule::Linear,
        /// What that curve takes, by transformers' names, such as {num_cycles: 2}.
        lr_scheduler_kwargs: BTreeMap<String, String> = BTreeMap::new(),
        /// Steps until the learning rate is at its highest.
        warmup_steps: Steps = Steps::Count(0),
        /// The same as a share of all steps.
        warmup_ratio: f64 = 0.0,
        /// Decay of trained weights except biases and norms, apart from the gradient.
        weight_decay: f64 = 0.0,
        /// AdamW's decay of the mean.
        adam_beta1: f64 = 0.9,
        /// AdamW's decay of the mean square.
        adam_beta2: f64 = 0.999,
        /// AdamW's smallest divisor.
        adam_epsilon: f64 = 1e-8,
        /// Longest gradient, all weights together; 0 for no limit.
        max_grad_norm: f64 = 1.0,
        /// Optimizer: adamw_torch, adamw_8bit, paged_adamw_32bit, paged_adamw_8bit (states in the host's memory), sgd, lion_32bit, adafactor, muon.
        optim: Optimizer = Optimizer::AdamW,
        /// More for the optimizer: momentum=0.9 (sgd: 0 unless given, muon: 0.95).
        optim_args: OptimArgs = OptimArgs::default(),
        /// LoRA+: what the learning rate of B is multiplied by.
        loraplus_lr_ratio: Option<f64> = None,
        /// The same as `optim: muon`.
        use_muon: bool = false,
        /// NEFTune: noise on embedded tokens in training, such as 5; null for none.
        neftune_noise_alpha: Option<f64> = None,
        /// Put samples of like lengths into the same step.
        group_by_length: bool = false,
        /// Seed of everything random.
        seed: u64 = 42,
    }
    "Evaluation" {
        /// Evaluate after training; so it is wherever there is something to evaluate on.
        do_eval: bool = false,
        /// After training, or without any (`do_train: false`), answer the questions of eval_dataset; with predict_with_generate.
        do_predict: bool = false,
        /// Write the answers and how like the expected ones they are: BLEU-4, ROUGE-1, 2 and L.
        predict_with_generate: bool = false,
        /// When to evaluate: steps, epoch or no (at the end only).
        eval_strategy: EvalStrategy = EvalStrategy::No,
        /// Steps between two evaluations; null for logging_steps.
        eval_steps: Option<Steps> = None,
        /// Evaluate before the first step as well.
        eval_on_start: bool = false,
        /// Samples of a batch in evaluation; fewer where memory runs out.
        per_device_eval_batch_size: usize = 8,
        /// What says how good the model is: loss, accuracy or perplexity.
        metric_for_best_model: BestMetric = BestMetric::Loss,
        /// Whether more of it is better; null for what fits the metric.
        greater_is_better: Option<bool> = None,
        /// End with the best model that was evaluated, of which a checkpoint is kept.
        load_best_model_at_end: bool = false,
        /// Stop after so many evaluations in a row without a better one.
        early_stopping_steps: Option<usize> = None,
    }
    "Device" {
        /// auto, cpu, cuda or cuda:N.
        device: String = "auto".to_string(),
        /// Compute in bf16; weights that are trained stay in f32. A GPU that has bf16 does so by itself, unless this is false.
        bf16: bool = false,
        /// Compute in f16 with loss scaling, on a GPU. One without bf16 does so by itself, unless this is false.
        fp16: bool = false,
        /// Activations in the backward pass: keep, all (computed again), lean (the same, inputs on the host), offload (to the host) or auto.
        recompute: Recompute = Recompute::Auto,
        /// GiB of a GPU's memory in which adapted weights stay as products read them: 4-bit ones needn't be dequantised for each pass then, others not copied; null: half of what `recompute: auto` leaves.
        weight_cache_gib: Option<f64> = None,
        /// The same as `recompute: keep`.
        disable_gradient_checkpointing: bool = false,
        /// Threads on the CPU; null for all cores.
        num_threads: Option<usize> = None,
    }
    "Generation" {
        /// Longest answer in tokens.
        max_new_tokens: usize = 1024,
        /// Sample; false takes the likeliest token each time.
        do_sample: bool = true,
        /// Evens out (over 1) or sharpens (under 1) the chances.
        temperature: f64 = 0.95,
        /// Sample from the likeliest tokens that together have this chance.
        top_p: f64 = 0.7,
        /// Sample from this many of the likeliest tokens; 0 for all.
        top_k: usize = 50,
        /// Sample from tokens at least this likely, relative to the likeliest.
        min_p: f64 = 0.0,
    }
    "Export" {
        /// Where `ferrotune export` writes.
        export_dir: Option<PathBuf> = None,
        /// What it writes: safetensors (all in 16 bits, adapter merged), bnb-4bit (4 bits, as bitsandbytes has it), gguf-f16, gguf-q4_k_m … (llama.cpp, Ollama).
        export_format: ExportFormat = ExportFormat::Safetensors,
        /// Longest file of a model in GB (10^9 bytes).
        export_size: f64 = 5.0,
        /// Type of merged weights: auto (the base model's own), bfloat16, float16 or float32.
        infer_dtype: InferDtype = InferDtype::Auto,
        /// Read what was written and compare its logits with those of base and adapter.
        export_verify: bool = true,
        /// Send it to the hub by this name.
        export_hub_model_id: Option<String> = None,
    }
}

impl RunConfig {
    /// The adapters that become part of the base in training.
    pub fn merged_adapters(&self) -> &[PathBuf] {
        match (self.adapter_name_or_path.as_slice(), self.create_new_adapter) {
            ([beneath @ .., _], false) => beneath,
            (all, _) => all,
        }
    }

    /// Where a key was given (`config.yaml:12: ` or `command line: `), or nothing for a default; a message starts with it.
    pub fn place(&self, key: &str) -> &str {
        self.places.get(key).map_or("", String::as_str)
    }

    /// Whether several samples share a row: pretraining packs unless it is told not to.
    pub fn packs(&self) -> bool {
        self.packing || self.neat_packing || (self.stage == Stage::Pt && !self.places.contains_key("packing"))
    }

    /// What `lora_alpha` comes to.
    pub fn alpha(&self) -> f64 {
        self.lora_alpha.unwrap_or(2.0 * self.lora_rank as f64)
    }

    /// What `recompute` and LLaMA-Factory's `disable_gradient_checkpointing` come to.
    pub fn recompute_policy(&self) -> Recompute {
        if self.disable_gradient_checkpointing { Recompute::Keep } else { self.recompute }
    }

    /// The curve of the learning rate.
    ///
    /// # Errors
    /// Saying what is wrong with `lr_scheduler_kwargs`.
    pub fn schedule_kind(&self) -> Result<ScheduleKind, String> {
        ScheduleKind::named(&self.lr_scheduler_type.shown(), &self.lr_scheduler_kwargs, self.learning_rate)
    }

    /// Whether event files are written for TensorBoard.
    pub fn reports_to_tensorboard(&self) -> bool {
        self.report_to.iter().any(|it| it == "tensorboard" || it == "all")
    }

    /// Whether to train. LLaMA-Factory's configs that only predict or evaluate don't say that they don't.
    pub fn trains(&self) -> bool {
        let judges = (self.do_predict || self.do_eval) && self.dataset.is_empty();
        self.do_train && (self.places.contains_key("do_train") || !judges)
    }

    /// What `optim` and LLaMA-Factory's `use_muon` come to.
    pub fn optimizer(&self) -> Optimizer {
        if self.use_muon { Optimizer::Muon } else { self.optim }
    }

    /// Steps of warm-up in a run of `total`; as in transformers, `warmup_steps` wins.
    pub fn warmup(&self, total: u64) -> u64 {
        match self.warmup_steps.of(total) {
            0 => (self.warmup_ratio * total as f64).ceil() as u64,
            steps => steps,
        }
    }

    /// Steps of the whole run, by `max_steps` or by `num_train_epochs`.
    pub fn total_steps(&self, steps_per_epoch: usize) -> u64 {
        let all = (self.num_train_epochs * steps_per_epoch as f64).ceil() as u64;
        self.max_steps.0.unwrap_or(all)
    }
}
