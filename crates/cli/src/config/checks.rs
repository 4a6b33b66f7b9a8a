//! Values that are wrong in themselves, or don't go together.

use super::choices::*;
use super::kinds::Steps;
use super::settings::RunConfig;

/// More threads than any machine has use for: they would spend their time looking for work.
const MOST_THREADS: usize = 1024;

impl RunConfig {
    /// What no single key shows: values out of range and keys that contradict each other.
    pub(super) fn contradictions(&self) -> Vec<(&'static str, String)> {
        let mut wrong = Vec::new();
        let mut check = |fine: bool, key: &'static str, message: &str| {
            if !fine {
                wrong.push((key, message.to_string()));
            }
        };
        let share = 0.0..1.0;
        check(self.lora_rank > 0, "lora_rank", "expected 1 or more");
        check(self.lora_alpha.is_none_or(|alpha| alpha > 0.0), "lora_alpha", "expected a number over 0");
        check(share.contains(&self.lora_dropout), "lora_dropout", "expected a share, from 0 to under 1");
        let other = self.report_to.iter().find(|it| !["none", "tensorboard", "all"].contains(&it.as_str()));
        let message = format!("expected none or tensorboard, found `{}`", other.map_or("", |it| it));
        check(other.is_none(), "report_to", &message);
        let alpha = self.neftune_noise_alpha.is_none_or(|alpha| alpha >= 0.0);
        check(alpha, "neftune_noise_alpha", "expected 0 or more");
        check(self.freeze_trainable_layers != 0, "freeze_trainable_layers", "expected a number other than 0");
        check(
            self.finetuning_type == FinetuningType::Lora || self.quantization_bit.is_none(),
            "quantization_bit",
            "quantised weights can't be trained; use `finetuning_type: lora`, or leave it out",
        );
        let other =
            self.additional_target.iter().find(|it| !["embed_tokens", "lm_head"].contains(&it.as_str()));
        let message = format!("expected embed_tokens or lm_head, found `{}`", other.map_or("", |it| it));
        check(other.is_none(), "additional_target", &message);
        check(!self.lora_target.is_empty(), "lora_target", "expected `all` or names of linear layers");
        check(
            !(self.mask_history && self.train_on_prompt),
            "mask_history",
            "`mask_history` and `train_on_prompt` exclude each other; choose one",
        );
        check(self.cutoff_len > 1, "cutoff_len", "expected 2 or more tokens");
        check(self.max_samples != Some(0), "max_samples", "expected 1 or more");
        check(
            self.val_size >= 0.0 && (self.val_size < 1.0 || self.val_size.fract() == 0.0),
            "val_size",
            "expected a share under 1, or a whole number of samples",
        );
        check(
            self.val_size == 0.0 || self.eval_dataset.is_empty(),
            "val_size",
            "`val_size` and `eval_dataset` exclude each other; choose one",
        );
        let chances = &self.interleave_probs.0;
        check(
            chances.is_empty() || chances.len() == self.dataset.len(),
            "interleave_probs",
            "expected one chance for each data set",
        );
        check(chances.iter().all(|chance| *chance > 0.0), "interleave_probs", "expected chances over 0");
        check(
            chances.is_empty() || self.mix_strategy != MixStrategy::Concat,
            "interleave_probs",
            "it has no meaning with `mix_strategy: concat`; name one that interleaves",
        );
        check(
            !self.streaming || self.max_steps.0.is_some(),
            "streaming",
            "nobody knows how long a stream is; set `max_steps`",
        );
        check(
            !self.streaming || self.val_size == 0.0 || self.val_size >= 1.0,
            "val_size",
            "a stream has no share; give a number of samples",
        );
        check(
            !self.streaming || !self.group_by_length,
            "group_by_length",
            "`streaming` doesn't know all lengths; leave one of them out",
        );
        check(
            !self.streaming || self.tokenized_path.is_none(),
            "tokenized_path",
            "a stream is never kept; leave out one of the two",
        );
        check(self.buffer_size > 0, "buffer_size", "expected 1 or more");
        check(self.save_total_limit != Some(0), "save_total_limit", "expected 1 or more");
        check(self.logging_steps != Steps::Count(0), "logging_steps", "expected 1 or more");
        check(
            self.save_steps != Steps::Count(0),
            "save_steps",
            "expected 1 or more (`save_strategy: no` writes none)",
        );
        check(self.per_device_train_batch_size > 0, "per_device_train_batch_size", "expected 1 or more");
        check(self.gradient_accumulation_steps > 0, "gradient_accumulation_steps", "expected 1 or more");
        check(self.learning_rate >= 0.0, "learning_rate", "expected 0 or more");
        check(
            self.num_train_epochs > 0.0 || self.max_steps.0.is_some(),
            "num_train_epochs",
            "expected more than 0",
        );
        check((0.0..=1.0).contains(&self.warmup_ratio), "warmup_ratio", "expected a share, from 0 to 1");
        if let Err(message) = self.schedule_kind() {
            check(false, "lr_scheduler_kwargs", &message);
        }
        let momentum = matches!(self.optimizer(), Optimizer::Sgd | Optimizer::Muon);
        check(
            momentum || self.optim_args.momentum.is_none(),
            "optim_args",
            "`momentum` is for sgd and muon; leave it out",
        );
        let ratio = self.loraplus_lr_ratio.is_none_or(|ratio| ratio > 0.0);
        check(ratio, "loraplus_lr_ratio", "expected a number over 0");
        let evaluates = self.eval_strategy != EvalStrategy::No;
        let has_samples = !self.eval_dataset.is_empty() || self.val_size > 0.0;
        let samples = "there is nothing to evaluate on; name an `eval_dataset`, or set `val_size`";
        check(has_samples || !evaluates, "eval_strategy", samples);
        check(has_samples || !self.do_eval, "do_eval", samples);
        let asked = !self.eval_dataset.is_empty() || !self.do_predict;
        check(asked, "do_predict", "there is nothing to answer; name an `eval_dataset`");
        check(
            self.predict_with_generate || !self.do_predict,
            "do_predict",
            "set `predict_with_generate: true` as well; without answers, `do_eval` gives the loss",
        );
        check(has_samples || !self.eval_on_start, "eval_on_start", samples);
        let strategy = "needs evaluations during the run; set `eval_strategy: steps` or `epoch`";
        check(evaluates || !self.load_best_model_at_end, "load_best_model_at_end", strategy);
        check(evaluates || self.early_stopping_steps.is_none(), "early_stopping_steps", strategy);
        let plateau = self.lr_scheduler_type == Schedule::ReduceLrOnPlateau;
        check(
            evaluates || !plateau,
            "lr_scheduler_type",
            "reduce_lr_on_plateau needs evaluations during the run; set `eval_strategy: steps` or `epoch`",
        );
        check(self.early_stopping_steps != Some(0), "early_stopping_steps", "expected 1 or more");
        check(self.eval_steps != Some(Steps::Count(0)), "eval_steps", "expected 1 or more");
        check(self.per_device_eval_batch_size > 0, "per_device_eval_batch_size", "expected 1 or more");
        check(self.weight_decay >= 0.0, "weight_decay", "expected 0 or more");
        check(share.contains(&self.adam_beta1), "adam_beta1", "expected a number from 0 to under 1");
        check(share.contains(&self.adam_beta2), "adam_beta2", "expected a number from 0 to under 1");
        check(self.adam_epsilon > 0.0, "adam_epsilon", "expected a number over 0");
        check(self.max_grad_norm >= 0.0, "max_grad_norm", "expected 0 or more");
        check(!(self.bf16 && self.fp16), "fp16", "`bf16` and `fp16` exclude each other; choose one");
        check(
            !(self.fp16 && self.device == "cpu"),
            "fp16",
            "training in f16 needs a GPU (a cpu gains nothing from it); use `bf16: true`, or leave both out",
        );
        let four = self.quantization_bit.is_some();
        check(
            !(self.pissa_init && four),
            "pissa_init",
            "PiSSA changes the base's weights, which are in 4 bits; leave `quantization_bit` out, or use `init_lora_weights: loftq`",
        );
        check(self.pissa_iter >= -1, "pissa_iter", "expected 0 or more, or -1");
        let loftq = self.init_lora_weights == InitLoraWeights::Loftq;
        check(
            !loftq || four,
            "init_lora_weights",
            "loftq makes up for what 4 bits lose; set `quantization_bit: 4`",
        );
        check(!(loftq && self.pissa_init), "init_lora_weights", "loftq and `pissa_init` exclude each other");
        let threads = self.num_threads.is_none_or(|it| (1..=MOST_THREADS).contains(&it));
        check(threads, "num_threads", &format!("expected 1 to {MOST_THREADS}"));
        check(self.export_size > 0.0, "export_size", "expected more than 0");
        check(self.max_new_tokens > 0, "max_new_tokens", "expected 1 or more");
        check(self.temperature >= 0.0, "temperature", "expected 0 or more");
        check(self.top_p > 0.0 && self.top_p <= 1.0, "top_p", "expected a share, over 0 and up to 1");
        check((0.0..=1.0).contains(&self.min_p), "min_p", "expected a share, from 0 to 1");
        check(
            !(self.disable_gradient_checkpointing
                && matches!(self.recompute, Recompute::All | Recompute::Lean)),
            "recompute",
            "`recompute: all` or `lean` and `disable_gradient_checkpointing: true` exclude each other; choose one",
        );
        let cache = self.weight_cache_gib.is_none_or(|gib| (0.0..1e6).contains(&gib));
        check(cache, "weight_cache_gib", "expected GiB, from 0 to a million");
        let one_device = matches!(self.device.as_str(), "auto" | "cpu" | "cuda")
            || self.device.strip_prefix("cuda:").is_some_and(|ordinal| ordinal.parse::<usize>().is_ok());
        let several = self.device.contains(',') || self.device == "balanced";
        check(!several, "device", "several GPUs are not there yet; name one, as in `cuda:0`");
        check(one_device || several, "device", "expected auto, cpu, cuda or cuda:N");
        wrong
    }
}
