use std::fmt::Write;

use crate::PeftAdapter;

/// What a model card says beyond the adapter's own settings.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ModelCard {
    /// The headline; the base model's name serves where it is empty.
    pub title: String,
    /// Data sets, as hubs or files name them.
    pub datasets: Vec<String>,
    /// Rows of the embedding, where they are more than the base model has.
    pub vocab_size: Option<usize>,
    /// Rows of the table of training: `Learning rate`, `2e-4`.
    pub training: Vec<(String, String)>,
}

impl ModelCard {
    /// README.md, with the head that hubs read.
    pub(crate) fn markdown(&self, adapter: &PeftAdapter) -> String {
        let base = &adapter.base_model_name_or_path;
        let mut text = String::from("---\n");
        if is_hub_name(base) {
            let _ = writeln!(text, "base_model: {base}");
        }
        text += "library_name: peft\npipeline_tag: text-generation\ntags:\n";
        if is_hub_name(base) {
            let _ = writeln!(text, "- base_model:adapter:{base}");
        }
        text += "- lora\n- ferrotune\n---\n\n";
        let title = match self.title.is_empty() {
            true => format!("LoRA adapter of {}", base.rsplit('/').next().unwrap_or(base)),
            false => self.title.clone(),
        };
        let _ = writeln!(text, "# {}\n", one_line(&title));
        let _ = writeln!(text, "An adapter for `{}`, trained with Ferrotune.\n", one_line(base));
        text += &match self.vocab_size {
            None => "```python\nfrom peft import AutoPeftModelForCausalLM\n\n\
                     model = AutoPeftModelForCausalLM.from_pretrained(\"path/to/this/folder\")\n```\n\n"
                .to_string(),
            Some(rows) => format!(
                "Tokens were added: the base model is resized before the adapter is put on it.\n\n\
                 ```python\nfrom peft import PeftModel\nfrom transformers import AutoModelForCausalLM\n\n\
                 model = AutoModelForCausalLM.from_pretrained(\"{}\")\n\
                 model.resize_token_embeddings({rows})\n\
                 model = PeftModel.from_pretrained(model, \"path/to/this/folder\")\n```\n\n",
                one_line(base)
            ),
        };
        text += "| | |\n|---|---|\n";
        let mut row = |name: &str, value: &str| {
            let value = one_line(value).replace('|', "\\|");
            let _ = writeln!(text, "| {} | {value} |", one_line(name).replace('|', "\\|"));
        };
        row("Rank", &adapter.r.to_string());
        row("Alpha", &adapter.lora_alpha.to_string());
        row("Dropout", &adapter.lora_dropout.to_string());
        row("rsLoRA", if adapter.use_rslora { "yes" } else { "no" });
        row("DoRA", if adapter.use_dora { "yes" } else { "no" });
        row("Modules", &adapter.target_modules.to_string());
        if !self.datasets.is_empty() {
            row("Data", &self.datasets.join(", "));
        }
        self.training.iter().for_each(|(name, value)| row(name, value));
        text
    }
}

/// README.md of a whole model that a base and an adapter were merged into.
pub fn merged_card(base: &str, adapter: Option<&PeftAdapter>) -> String {
    let mut text = String::from("---\n");
    if is_hub_name(base) {
        let _ = writeln!(text, "base_model: {base}\nbase_model_relation: finetune");
    }
    text += "library_name: transformers\npipeline_tag: text-generation\ntags:\n- ferrotune\n---\n\n";
    let base = one_line(base);
    let _ = writeln!(text, "# {}, fine-tuned\n", base.rsplit('/').next().unwrap_or(&base));
    let _ = match adapter {
        None => writeln!(text, "The weights of `{base}`, written by Ferrotune."),
        Some(adapter) => writeln!(
            text,
            "`{base}` with a LoRA adapter (rank {}, alpha {}, on {}) merged into its weights by Ferrotune.",
            adapter.r,
            adapter.lora_alpha,
            one_line(&adapter.target_modules.to_string())
        ),
    };
    text
}

/// `organisation/name`, not a path: hubs refuse cards that name anything else as the base.
pub fn is_hub_name(name: &str) -> bool {
    let good = |it: &str| {
        let mut chars = it.chars();
        chars.next().is_some_and(|it| it.is_ascii_alphanumeric())
            && chars.all(|it| it.is_ascii_alphanumeric() || "-_.".contains(it))
    };
    let parts = name.split_once('/').is_some_and(|(organisation, model)| good(organisation) && good(model));
    parts && !std::path::Path::new(name).exists()
}

fn one_line(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}
