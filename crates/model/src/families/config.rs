//! Reads config.json key by key and remembers which were read: what is left over and not known to
//! be harmless is refused, because it may change the mathematics.

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::path::Path;

use ferrotune_nn::Activation;
use ferrotune_tensor::{Error, Result};
use serde_json::{Map, Value};

/// Keys that change nothing about the forward pass of a trained model.
const HARMLESS: &[&str] = &[
    // Where it came from, what loads it, in which type.
    "architectures",
    "model_type",
    "_name_or_path",
    "name_or_path",
    "_commit_hash",
    "torch_dtype",
    "dtype",
    "transformers_version",
    "auto_map",
    "unsloth_version",
    "unsloth_fixed",
    "transformers.js_config",
    "is_llama_config",
    "tokenizer_class",
    "model_max_length",
    "quantization_config",
    "torchscript",
    "pretraining_tp",
    "base_model_tp_plan",
    "base_model_pp_plan",
    "_attn_implementation",
    "_attn_implementation_autoset",
    "attn_implementation",
    "_flash_attn_2_enabled",
    "use_flash_attention_2",
    "ai2_pretraining_tp",
    "finetuning_task",
    "license",
    // Training from scratch.
    "initializer_range",
    "initializer_factor",
    "gradient_checkpointing",
    "use_bfloat16",
    // Generation.
    "use_cache",
    "cache_implementation",
    "max_length",
    "max_new_tokens",
    "min_length",
    "do_sample",
    "early_stopping",
    "num_beams",
    "num_beam_groups",
    "diversity_penalty",
    "temperature",
    "top_k",
    "top_p",
    "typical_p",
    "repetition_penalty",
    "length_penalty",
    "no_repeat_ngram_size",
    "encoder_no_repeat_ngram_size",
    "num_return_sequences",
    "bad_words_ids",
    "suppress_tokens",
    "begin_suppress_tokens",
    "forced_bos_token_id",
    "forced_eos_token_id",
    "remove_invalid_values",
    "exponential_decay_length_penalty",
    "output_scores",
    "return_dict_in_generate",
    "prefix",
    "sep_token_id",
    "cls_token_id",
    "decoder_start_token_id",
    // Heads for other tasks, and what is returned.
    "output_attentions",
    "output_hidden_states",
    "return_dict",
    "id2label",
    "label2id",
    "num_labels",
    "problem_type",
    "task_specific_params",
    "classifier_dropout",
    "tf_legacy_loss",
];

/// One level of a config.
pub(super) struct Config<'a> {
    values: &'a Map<String, Value>,
    file: &'a Path,
    /// The family, for messages.
    family: &'a str,
    /// `rope_scaling.` within that section, else nothing.
    prefix: String,
    read: RefCell<BTreeSet<String>>,
}

impl<'a> Config<'a> {
    pub(super) fn new(value: &'a Value, file: &'a Path, family: &'a str) -> Result<Config<'a>> {
        let Some(values) = value.as_object() else {
            return Err(Error::file(file, "expected a JSON object of keys and values"));
        };
        Ok(Config { values, file, family, prefix: String::new(), read: RefCell::default() })
    }

    /// The section's name; nothing at the top.
    pub(super) fn name(&self) -> &str {
        self.prefix.trim_end_matches('.')
    }

    /// An error about this file.
    pub(super) fn error(&self, message: &str) -> Error {
        Error::file(self.file, message)
    }

    fn unexpected(&self, key: &str, expected: &str, got: &Value) -> Error {
        let mut got = got.to_string();
        if got.len() > 60 {
            got = got.chars().take(60).chain("…".chars()).collect();
        }
        self.error(&format!("`{}{key}` is {got}, expected {expected}", self.prefix))
    }

    fn missing(&self, key: &str) -> Error {
        self.error(&format!("`{}{key}` is missing, which a {} config must have", self.prefix, self.family))
    }

    /// The value of a key, unless it's absent or null.
    fn get(&self, key: &str) -> Option<&'a Value> {
        self.read.borrow_mut().insert(key.to_string());
        self.values.get(key).filter(|it| !it.is_null())
    }

    /// A nested object.
    pub(super) fn section(&self, key: &str) -> Result<Option<Config<'a>>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        let Some(values) = value.as_object() else {
            return Err(self.unexpected(key, "an object or null", value));
        };
        let prefix = format!("{}{key}.", self.prefix);
        Ok(Some(Config { values, file: self.file, family: self.family, prefix, read: RefCell::default() }))
    }

    pub(super) fn size(&self, key: &str) -> Result<usize> {
        self.optional_size(key)?.ok_or_else(|| self.missing(key))
    }

    pub(super) fn size_or(&self, key: &str, default: usize) -> Result<usize> {
        Ok(self.optional_size(key)?.unwrap_or(default))
    }

    pub(super) fn optional_size(&self, key: &str) -> Result<Option<usize>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        match value.as_u64() {
            Some(size) if size > 0 && size < 1 << 31 => Ok(Some(size as usize)),
            _ => Err(self.unexpected(key, "a positive whole number", value)),
        }
    }

    /// `num_hidden_layers`, within reason: a list that long is made of it.
    pub(super) fn layer_count(&self) -> Result<usize> {
        let count = self.size("num_hidden_layers")?;
        if count > 4096 {
            return Err(self.unexpected("num_hidden_layers", "at most 4096", &Value::from(count)));
        }
        Ok(count)
    }

    /// `head_dim`, or what the heads share of the hidden size.
    pub(super) fn head_dim(&self, hidden_size: usize, heads: usize) -> Result<usize> {
        // Each layer has a list of half as many frequencies.
        if let Some(head_dim) = self.optional_size("head_dim")? {
            let large = || self.unexpected("head_dim", "at most 8192", &head_dim.into());
            return if head_dim <= 8192 { Ok(head_dim) } else { Err(large()) };
        }
        if !hidden_size.is_multiple_of(heads) {
            let message =
                format!("`hidden_size` is {hidden_size}, which `num_attention_heads` {heads} doesn't divide");
            return Err(self.error(&message));
        }
        let head_dim = hidden_size / heads;
        let large = || self.unexpected("hidden_size", "at most 8192 for each head", &hidden_size.into());
        if head_dim <= 8192 { Ok(head_dim) } else { Err(large()) }
    }

    pub(super) fn optional_number(&self, key: &str) -> Result<Option<f64>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        match value.as_f64() {
            Some(number) if number.is_finite() => Ok(Some(number)),
            _ => Err(self.unexpected(key, "a number", value)),
        }
    }

    pub(super) fn number_or(&self, key: &str, default: f64) -> Result<f64> {
        Ok(self.optional_number(key)?.unwrap_or(default))
    }

    pub(super) fn positive(&self, key: &str) -> Result<f64> {
        let number = self.optional_number(key)?.ok_or_else(|| self.missing(key))?;
        if number > 0.0 { Ok(number) } else { Err(self.unexpected(key, "a positive number", &number.into())) }
    }

    pub(super) fn positive_or(&self, key: &str, default: f64) -> Result<f64> {
        if self.get(key).is_none() { Ok(default) } else { self.positive(key) }
    }

    /// A list of `count` positive numbers.
    pub(super) fn numbers(&self, key: &str, count: usize) -> Result<Vec<f64>> {
        let positive = |it: &Value| it.as_f64().filter(|it| *it > 0.0);
        self.list(key, count, "a positive number", positive)?.ok_or_else(|| self.missing(key))
    }

    /// A list of `count` entries, where it is there.
    fn list<T>(
        &self,
        key: &str,
        count: usize,
        expected: &str,
        entry: impl Fn(&Value) -> Option<T>,
    ) -> Result<Option<Vec<T>>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        match value.as_array().and_then(|list| list.iter().map(entry).collect::<Option<Vec<T>>>()) {
            Some(list) if list.len() == count => Ok(Some(list)),
            _ => Err(self.unexpected(key, &format!("{count} times {expected}"), value)),
        }
    }

    /// `layer_types`: whether each layer sees a window alone.
    pub(super) fn layer_types(&self, count: usize) -> Result<Option<Vec<bool>>> {
        self.list("layer_types", count, "full_attention or sliding_attention", |it| match it.as_str() {
            Some("full_attention") => Some(false),
            Some("sliding_attention") => Some(true),
            _ => None,
        })
    }

    /// A list of positions, of any length.
    pub(super) fn indices(&self, key: &str) -> Result<Vec<usize>> {
        let Some(value) = self.get(key) else { return Ok(Vec::new()) };
        let one = |it: &Value| it.as_u64().and_then(|it| usize::try_from(it).ok());
        let list = value.as_array().and_then(|list| list.iter().map(one).collect());
        list.ok_or_else(|| self.unexpected(key, "a list of whole numbers", value))
    }

    /// A list of zeros and ones.
    pub(super) fn switches(&self, key: &str, count: usize) -> Result<Option<Vec<bool>>> {
        self.list(key, count, "0 or 1", |it| it.as_u64().filter(|it| *it < 2).map(|it| it == 1))
    }

    pub(super) fn flag(&self, key: &str, default: bool) -> Result<bool> {
        let Some(value) = self.get(key) else { return Ok(default) };
        value.as_bool().ok_or_else(|| self.unexpected(key, "true or false", value))
    }

    pub(super) fn optional_text(&self, key: &str) -> Result<Option<String>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        let text = value.as_str().ok_or_else(|| self.unexpected(key, "a string", value))?;
        Ok(Some(text.to_string()))
    }

    pub(super) fn activation(&self, key: &str) -> Result<Activation> {
        let name = self.optional_text(key)?.unwrap_or("silu".into());
        match name.as_str() {
            "silu" | "swish" => Ok(Activation::Silu),
            "gelu_pytorch_tanh" | "gelu_new" => Ok(Activation::GeluTanh),
            _ => Err(self.unexpected(key, "silu or gelu_pytorch_tanh", &name.into())),
        }
    }

    /// Token ids: none, one, or a list.
    pub(super) fn tokens(&self, key: &str) -> Result<Vec<u32>> {
        let Some(value) = self.get(key) else { return Ok(Vec::new()) };
        let one = |value: &Value| value.as_u64().and_then(|id| u32::try_from(id).ok());
        // −1 is what some configs write for "none".
        if value.as_i64() == Some(-1) {
            return Ok(Vec::new());
        }
        let ids = match value {
            Value::Array(list) => list.iter().map(one).collect(),
            _ => one(value).map(|id| vec![id]),
        };
        ids.ok_or_else(|| self.unexpected(key, "a token id or a list of them", value))
    }

    /// Takes a key that this family knows with one value alone.
    pub(super) fn only(&self, key: &str, expected: Value) -> Result<()> {
        let Some(value) = self.get(key) else { return Ok(()) };
        let same_number = value.as_f64().is_some() && value.as_f64() == expected.as_f64();
        if *value == expected || same_number {
            return Ok(());
        }
        Err(self.unexpected(key, &format!("{expected}: models with another value are not there yet"), value))
    }

    /// Refuses a key that was neither read nor is harmless, unless its value switches it off.
    pub(super) fn refuse_unread(&self) -> Result<()> {
        let read = self.read.borrow();
        let off = |value: &Value| match value {
            Value::Null | Value::Bool(false) => true,
            Value::Number(number) => number.as_f64() == Some(0.0),
            Value::String(text) => text.is_empty(),
            Value::Array(list) => list.is_empty(),
            Value::Object(map) => map.is_empty(),
            Value::Bool(true) => false,
        };
        for (key, value) in self.values {
            // Keys with an underscore are transformers' notes to itself.
            let harmless = key.starts_with('_') || HARMLESS.contains(&key.as_str());
            let known = read.contains(key) || (self.prefix.is_empty() && harmless);
            if !known && !off(value) {
                let expected = format!(
                    "null or absent: it isn't known for the family {} and may change what the model computes",
                    self.family
                );
                return Err(self.unexpected(key, &expected, value));
            }
        }
        Ok(())
    }
}
