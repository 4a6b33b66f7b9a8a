//! Keys of LLaMA-Factory, transformers and their neighbours that do nothing here: each says why.

use super::yaml::{Data, Node};

/// What becomes of a known key that is no setting.
#[derive(Clone, Copy, Debug)]
pub enum Fate {
    /// Refused unless its value asks for nothing: the feature is planned.
    Later,
    /// Taken, with a note that gives the reason.
    Ignored(&'static str),
    /// Refused: what to use.
    Instead(&'static str),
}

/// A known key that is no setting.
#[derive(Debug)]
pub struct OtherKey {
    /// Its name.
    pub name: &'static str,
    /// What becomes of it.
    pub fate: Fate,
    /// Values that ask for nothing, beside null, false, 0, no and none.
    pub off: &'static [&'static str],
}

impl OtherKey {
    /// Whether this value asks for nothing, so that the key need not be mentioned.
    pub fn is_off(&self, node: &Node) -> bool {
        let Data::Scalar { text, .. } = &node.data else {
            return matches!(&node.data, Data::List(items) if items.is_empty());
        };
        let text = text.trim().to_ascii_lowercase();
        let number: Option<f64> = text.parse().ok();
        matches!(text.as_str(), "" | "~" | "null" | "none" | "no" | "false" | "off")
            || number == Some(0.0)
            || self.off.iter().any(|off| *off == text || (number.is_some() && off.parse().ok() == number))
    }
}

/// The key of this name.
pub fn other_key(name: &str) -> Option<OtherKey> {
    if LATER.contains(&name) {
        return Some(OtherKey { name: LATER.iter().find(|it| **it == name)?, fate: Fate::Later, off: &[] });
    }
    if let Some((name, off)) = LATER_WITH_DEFAULT.iter().find(|it| it.0 == name) {
        return Some(OtherKey { name, fate: Fate::Later, off });
    }
    if let Some((name, reason)) = IGNORED.iter().find(|it| it.0 == name) {
        return Some(OtherKey { name, fate: Fate::Ignored(reason), off: &[] });
    }
    let (name, remedy) = INSTEAD.iter().find(|it| it.0 == name)?;
    Some(OtherKey { name, fate: Fate::Instead(remedy), off: &[] })
}

/// The names of all these keys.
pub fn other_names() -> impl Iterator<Item = &'static str> {
    let later = LATER.iter().copied().chain(LATER_WITH_DEFAULT.iter().map(|it| it.0));
    later.chain(IGNORED.iter().map(|it| it.0)).chain(INSTEAD.iter().map(|it| it.0))
}

/// Planned, and off unless given.
#[rustfmt::skip]
const LATER: &[&str] = &[
    // Data.
    "media_dir", "eval_on_each_dataset", "tool_format", "preserve_thinking", "eval_num_beams",
    // Adapters and what is trained.
    "module_dropout", "oft_rank",
    "rank_pattern", "alpha_pattern", "use_llama_pro", "new_special_tokens_config", "train_from_scratch", "adapter_folder",
    // Preferences.
    "pref_ftx", "pref_bco_weight", "dpo_label_smoothing", "ref_model", "ref_model_adapters",
    "ref_model_quantization_bit", "reward_model", "reward_model_adapters", "reward_model_quantization_bit",
    "ppo_score_norm", "ppo_whiten_rewards", "ld_alpha",
    // Optimizers and losses.
    "use_galore", "use_apollo", "use_badam", "use_adam_mini", "use_dft_loss", "use_asft_loss",
    "use_eaft_loss", "label_smoothing_factor", "optim_target_modules",
    "data_seed",
    "auto_find_batch_size", "dataloader_drop_last", "ignore_data_skip",
    // Evaluation.
    "eval_delay", "eval_accumulation_steps",
    "batch_eval_metrics", "bf16_full_eval", "fp16_full_eval", "prediction_loss_only",
    // Models.
    "rope_scaling", "shift_attn", "mixture_of_depths", "moe_aux_loss_coef", "upcast_layernorm",
    "upcast_lmhead_output", "pure_bf16", "fp8", "fp8_backend", "offload_folder",
    // Several GPUs and machines.
    "device_map", "quantization_device_map", "deepspeed", "fsdp", "fsdp_config", "fsdp_min_num_params",
    "fsdp_transformer_layer_cls_to_wrap", "parallelism_config", "tensor_parallel", "use_ray", "ray_run_name",
    "ray_num_workers", "ray_storage_path", "tpu_num_cores", "mp_parameters",
    // Hubs, reports and doors out.
    "om_hub_token", "use_swanlab",
    // Generation.
    "num_return_sequences", "no_repeat_ngram_size", "max_length", "stop", "presence_penalty",
    "frequency_penalty",
];

/// Planned; LLaMA-Factory's defaults and the like ask for nothing.
const LATER_WITH_DEFAULT: &[(&str, &[&str])] = &[
    ("ignore_pad_token_for_loss", &["true"]),
    ("init_special_tokens", &["noise_init"]),
    ("bias", &["none"]),
    ("oft_block_size", &["32"]),
    ("oft_target", &["all"]),
    ("pref_beta", &["0.1"]),
    ("pref_loss", &["sigmoid"]),
    ("kto_chosen_weight", &["1"]),
    ("kto_rejected_weight", &["1"]),
    ("simpo_gamma", &["0.5"]),
    ("ppo_buffer_size", &["1"]),
    ("ppo_epochs", &["4"]),
    ("ppo_target", &["6"]),
    ("reward_model_type", &["lora"]),
    ("infer_backend", &["huggingface", "hf", "ferrotune"]),
    ("export_device", &["cpu", "auto"]),
    ("repetition_penalty", &["1"]),
    ("length_penalty", &["1"]),
    ("num_beams", &["1"]),
];

/// Taken, and of no effect.
const IGNORED: &[(&str, &str)] = &[
    ("pissa_convert", "an adapter that began by PiSSA is always saved for the unchanged base model"),
    ("compute_accuracy", "evaluation always counts the accuracy of tokens"),
    ("loraplus_lr_embedding", "the embedding has no adapter"),
    ("hub_strategy", "what is sent is sent once, when the run has ended"),
    ("hub_always_push", "what is sent is sent once, when the run has ended"),
    ("run_name", "nothing is sent anywhere yet"),
    ("logging_dir", "the log is in output_dir"),
    ("trust_remote_code", "no code of a model is ever run"),
    ("use_fast_tokenizer", "there is one tokenizer, a fast one"),
    ("low_cpu_mem_usage", "weights are always read layer by layer"),
    ("preprocessing_num_workers", "data is prepared on all cores; `num_threads` limits them"),
    ("preprocessing_batch_size", "data is prepared on all cores"),
    ("dataloader_num_workers", "batches are made in the program itself"),
    ("dataloader_pin_memory", "batches are made in the program itself"),
    ("dataloader_persistent_workers", "batches are made in the program itself"),
    ("dataloader_prefetch_factor", "batches are made in the program itself"),
    ("data_shared_file_system", "one machine trains"),
    ("ddp_timeout", "one process trains"),
    ("ddp_find_unused_parameters", "one process trains"),
    ("ddp_backend", "one process trains"),
    ("ddp_bucket_cap_mb", "one process trains"),
    ("ddp_broadcast_buffers", "one process trains"),
    ("local_rank", "one process trains"),
    ("average_tokens_across_devices", "one process trains"),
    ("flash_attn", "attention never stores the whole matrix of scores"),
    ("use_unsloth", "the kernels are our own"),
    ("use_unsloth_gc", "`recompute` says what is kept"),
    ("use_reentrant_gc", "`recompute` says what is kept"),
    ("use_liger_kernel", "the kernels are our own"),
    ("enable_liger_kernel", "the kernels are our own"),
    ("liger_kernel_config", "the kernels are our own"),
    ("use_v1_kernels", "the kernels are our own"),
    ("torch_compile", "the kernels are our own"),
    ("torch_compile_backend", "the kernels are our own"),
    ("torch_compile_mode", "the kernels are our own"),
    ("torch_empty_cache_steps", "there is no PyTorch"),
    ("torchdynamo", "there is no PyTorch"),
    ("tf32", "products in f32 are f32"),
    ("full_determinism", "runs are reproducible as they are"),
    ("use_kv_cache", "chat always keeps keys and values"),
    ("use_cache", "chat always keeps keys and values"),
    ("skip_special_tokens", "chat never shows control tokens"),
    ("eval_do_concat_batches", "sums are kept, not batches"),
    ("include_tokens_per_second", "tokens per second are always shown"),
    ("include_num_input_tokens_seen", "tokens are always counted"),
    ("include_effective_tokens_per_second", "tokens per second are always shown"),
    ("print_param_status", "`ferrotune model NAME` shows the layers"),
    ("disable_tqdm", "`--quiet` hides the progress bar"),
    ("log_level", "`-v` shows more, `--quiet` less"),
    ("log_level_replica", "one process trains"),
    ("log_on_each_node", "one process trains"),
    ("logging_strategy", "`logging_steps` counts"),
    ("logging_first_step", "a line is logged every `logging_steps` steps, and at the end"),
    ("logging_nan_inf_filter", "losses are logged as they are"),
    ("save_safetensors", "adapters are always safetensors"),
    ("save_on_each_node", "one process trains"),
    ("save_only_model", "checkpoints always hold what going on needs"),
    ("restore_callback_states_from_checkpoint", "there are no callbacks"),
    ("remove_unused_columns", "columns without a meaning are never kept"),
    ("label_names", "labels come from the conversation"),
    ("length_column_name", "lengths are counted"),
    ("include_inputs_for_metrics", "metrics take what they need"),
    ("skip_memory_metrics", "peak memory is always shown"),
    ("accelerator_config", "there is no accelerate"),
    ("gradient_checkpointing_kwargs", "`recompute` says what is kept"),
    ("freeze_vision_tower", "models of text only"),
    ("freeze_multi_modal_projector", "models of text only"),
    ("freeze_language_model", "models of text only"),
    ("image_max_pixels", "models of text only"),
    ("image_min_pixels", "models of text only"),
    ("video_max_pixels", "models of text only"),
    ("video_min_pixels", "models of text only"),
];

/// Another program's name for something there is, or something that will not come.
const INSTEAD: &[(&str, &str)] = &[
    ("evaluation_strategy", "use `eval_strategy`"),
    (
        "split_special_tokens",
        "control tokens inside a message are text already; `allow_control_tokens: true` changes that",
    ),
    ("gradient_checkpointing", "use `recompute: all` (true) or `recompute: keep` (false)"),
    ("use_gradient_checkpointing", "use `recompute: all` (true) or `recompute: keep` (false)"),
    ("use_cpu", "use `device: cpu`"),
    ("no_cuda", "use `device: cpu`"),
    ("use_mps_device", "Apple's GPUs are not supported; use `device: cpu`"),
    ("use_ipex", "use `bf16: true` for the cpu's own bf16 products"),
    ("adafactor", "use `optim`"),
    ("fp16_backend", "use `fp16: true`"),
    ("half_precision_backend", "use `bf16: true` or `fp16: true`"),
    ("fp16_opt_level", "use `fp16: true`"),
    ("per_gpu_train_batch_size", "use `per_device_train_batch_size`"),
    ("batch_size", "use `per_device_train_batch_size`"),
    ("micro_batch_size", "use `per_device_train_batch_size`"),
    ("epochs", "use `num_train_epochs`"),
    ("num_epochs", "use `num_train_epochs`"),
    ("lr", "use `learning_rate`"),
    ("lr_scheduler", "use `lr_scheduler_type`"),
    ("optimizer", "use `optim`"),
    ("model_name", "use `model_name_or_path`"),
    ("model", "use `model_name_or_path`"),
    ("base_model", "use `model_name_or_path`"),
    ("adapter", "use `adapter_name_or_path`, or `finetuning_type: lora`"),
    ("revision", "use `model_revision`"),
    ("token", "use `hf_hub_token`"),
    ("hub_token", "use `hf_hub_token`"),
    ("push_to_hub_token", "use `hf_hub_token`"),
    ("push_to_hub_model_id", "use `hub_model_id`"),
    ("max_seq_length", "use `cutoff_len`"),
    ("max_seq_len", "use `cutoff_len`"),
    ("sequence_len", "use `cutoff_len`"),
    ("load_in_4bit", "use `quantization_bit: 4`"),
    ("load_in_8bit", "use `quantization_bit`"),
    ("bnb_4bit_quant_type", "use `quantization_type`"),
    ("bnb_4bit_use_double_quant", "use `double_quantization`"),
    ("r", "use `lora_rank`"),
    ("lora_r", "use `lora_rank`"),
    ("target_modules", "use `lora_target`"),
    ("lora_target_modules", "use `lora_target`"),
    ("exclude_modules", "use `lora_exclude`"),
    ("modules_to_save", "use `additional_target`"),
    ("datasets", "use `dataset`"),
    ("train_on_inputs", "use `train_on_prompt`"),
    ("system_prompt", "use `default_system`"),
    ("export_quantization_bit", "GPTQ will not come; `export_format` names the formats in few bits"),
    ("export_quantization_dataset", "GPTQ will not come; `export_format` names the formats in few bits"),
    ("export_legacy_format", "models are written as safetensors; a pickle runs code when it is opened"),
    ("use_mca", "several GPUs by Megatron will not come"),
    ("use_megatron_bridge", "several GPUs by Megatron will not come"),
    ("use_hyper_parallel", "several GPUs by HyperParallel will not come"),
    ("use_kt", "offloading by KTransformers will not come"),
    ("vllm_maxlen", "there is no vLLM here; load the exported model there"),
    ("vllm_gpu_util", "there is no vLLM here; load the exported model there"),
    ("vllm_enforce_eager", "there is no vLLM here; load the exported model there"),
    ("vllm_max_lora_rank", "there is no vLLM here; load the exported model there"),
    ("vllm_config", "there is no vLLM here; load the exported model there"),
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_name_stands_once() {
        let mut names: Vec<_> = other_names().collect();
        names.extend(super::super::RunConfig::keys().iter().map(|key| key.name));
        names.sort_unstable();
        let twice: Vec<_> = names.windows(2).filter(|pair| pair[0] == pair[1]).collect();
        assert!(twice.is_empty(), "{twice:?}");
        assert!(names.len() > 250, "{}", names.len());
    }

    #[test]
    fn values_that_ask_for_nothing() {
        let off = |name: &str, value: &str| other_key(name).expect(name).is_off(&Node::plain(1, value));
        assert!(off("ppo_epochs", "4"));
        assert!(!off("ppo_epochs", "8"));
        assert!(off("bias", "none"));
        assert!(!off("bias", "all"));
        assert!(off("repetition_penalty", "1.0"));
        assert!(off("ppo_target", "6.0"));
    }
}
