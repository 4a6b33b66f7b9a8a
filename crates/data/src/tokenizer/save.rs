//! Adding tokens, and writing a tokenizer for others to read.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::OnceLock;

use serde_json::{Map, Value, json};

use super::{Tokenizer, token_text};
use crate::error::{Result, write_file};

/// What an added token is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Added {
    /// A word like others, that text is cut at.
    Plain,
    /// A control token.
    Control,
}

impl Tokenizer {
    /// Adds tokens behind the vocabulary (`add_tokens`, `add_special_tokens`); those that it has already keep their id, and
    /// become control tokens where asked.
    pub fn add_tokens(&mut self, tokens: &[String], kind: Added) -> Result<()> {
        let added: Vec<tokenizers::AddedToken> = tokens
            .iter()
            .map(|token| {
                tokenizers::AddedToken::from(token.clone(), kind == Added::Control).normalized(false)
            })
            .collect();
        let new = tokens.iter().filter(|token| self.inner.token_to_id(token).is_none()).cloned();
        self.new_tokens.extend(new.collect::<Vec<_>>());
        match kind {
            Added::Plain => self.inner.add_tokens(added),
            Added::Control => self.inner.add_special_tokens(added),
        }
        .map_err(|error| self.error(error.to_string()))?;
        (self.plain, self.words, self.control) = (OnceLock::new(), OnceLock::new(), OnceLock::new());
        Ok(())
    }

    /// The tokens that were added and that the vocabulary didn't have.
    pub fn new_tokens(&self) -> &[String] {
        &self.new_tokens
    }

    /// Names a special token (`eos_token` …), as a template that brings its own does. Fails where the vocabulary hasn't it.
    pub fn set_special_token(&mut self, key: &str, token: &str) -> Result<()> {
        if self.inner.token_to_id(token).is_none() {
            return Err(self.error(format!(
                "it has no token `{token}`, which the template takes for `{key}`; use the chat template that comes with \
                 the model, or add the token with `add_special_tokens`"
            )));
        }
        self.special_tokens.insert(key.to_string(), token.to_string());
        Ok(())
    }

    /// Writes `tokenizer.json`, `tokenizer_config.json`, `special_tokens_map.json` and `chat_template.jinja`,
    /// for transformers' `AutoTokenizer` and for [`Tokenizer::from_folder`].
    pub fn save(&self, folder: &Path) -> Result<()> {
        let json_error = |error: serde_json::Error| self.error(error.to_string());
        match &self.original {
            Some(bytes) if self.new_tokens.is_empty() => write_file(&folder.join("tokenizer.json"), bytes)?,
            Some(bytes) => {
                let mut value: Value = serde_json::from_slice(bytes).map_err(json_error)?;
                let text = self.inner.to_string(false).map_err(|error| self.error(error.to_string()))?;
                let added: Value = serde_json::from_str(&text).map_err(json_error)?;
                value["added_tokens"] = added["added_tokens"].clone();
                write_file(&folder.join("tokenizer.json"), &serde_json::to_vec(&value).map_err(json_error)?)?;
            }
            None => {
                let text = self.inner.to_string(false).map_err(|error| self.error(error.to_string()))?;
                let mut value: Value = serde_json::from_str(&text).map_err(json_error)?;
                value["post_processor"] = self.post_processor();
                let bytes = serde_json::to_vec(&value).map_err(json_error)?;
                write_file(&folder.join("tokenizer.json"), &bytes)?;
            }
        }
        let mut config = self.config.clone();
        if self.original.is_none() {
            config.insert("added_tokens_decoder".to_string(), self.added_tokens());
            config.insert("add_bos_token".to_string(), json!(!self.prefix.is_empty()));
            config.insert("clean_up_tokenization_spaces".to_string(), json!(false));
            config.insert("tokenizer_class".to_string(), json!("PreTrainedTokenizerFast"));
        }
        if !self.new_tokens.is_empty() {
            config.insert("added_tokens_decoder".to_string(), self.added_tokens());
        }
        let mut special = Map::new();
        for (key, token) in &self.special_tokens {
            if config.get(key).and_then(token_text).as_ref() != Some(token) {
                config.insert(key.clone(), json!(token));
            }
            special.insert(key.clone(), json!(token));
        }
        if let Some(template) = &self.chat_template {
            config.insert("chat_template".to_string(), template.clone());
            if let Some(text) = template.as_str() {
                write_file(&folder.join("chat_template.jinja"), text.as_bytes())?;
            }
        }
        for (file, value) in [("tokenizer_config.json", config), ("special_tokens_map.json", special)] {
            let mut bytes = serde_json::to_vec_pretty(&value).map_err(json_error)?;
            bytes.push(b'\n');
            write_file(&folder.join(file), &bytes)?;
        }
        Ok(())
    }

    fn post_processor(&self) -> Value {
        let Some((&bos, token)) = self.prefix.first().zip(self.special_tokens.get("bos_token")) else {
            return Value::Null;
        };
        let special = json!({"SpecialToken": {"id": token, "type_id": 0}});
        let (first, second) =
            (json!({"Sequence": {"id": "A", "type_id": 0}}), json!({"Sequence": {"id": "B", "type_id": 1}}));
        let again = json!({"SpecialToken": {"id": token, "type_id": 1}});
        json!({
            "type": "TemplateProcessing",
            "single": [special, first],
            "pair": [special, first, again, second],
            "special_tokens": {token: {"id": token, "ids": [bos], "tokens": [token]}},
        })
    }

    fn added_tokens(&self) -> Value {
        let added = self.inner.get_added_vocabulary().get_added_tokens_decoder();
        let sorted: BTreeMap<u32, &tokenizers::AddedToken> =
            added.iter().map(|(id, token)| (*id, token)).collect();
        let entries = sorted.into_iter().map(|(id, token)| {
            let entry = json!({
                "content": token.content, "lstrip": token.lstrip, "normalized": token.normalized,
                "rstrip": token.rstrip, "single_word": token.single_word, "special": token.special,
            });
            (id.to_string(), entry)
        });
        Value::Object(entries.collect())
    }
}
