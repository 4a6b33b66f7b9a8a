//! The command line.

use std::path::PathBuf;

use clap::{Args, CommandFactory as _, Parser, Subcommand};

use crate::config::RunConfig;
use crate::console::ColorChoice;

/// Fine-tunes chat models: one program, no Python.
#[derive(Debug, Parser)]
#[command(
    name = "ferrotune",
    version,
    propagate_version = true,
    disable_help_subcommand = true,
    arg_required_else_help = true,
    after_help = "Example:\n  ferrotune train examples/quickstart.yaml learning_rate=2e-4\n\n\
        Exit codes: 0 done, 1 an error, 2 a mistake in what was typed or in the config,\n\
        75 stopped before the end and saved: the run can go on, 130 interrupted at once"
)]
pub struct Program {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,

    /// Print results, warnings and errors only.
    #[arg(short, long, global = true, conflicts_with = "verbose", display_order = 1000)]
    pub quiet: bool,

    /// Say more: -v what is done, -vv details.
    #[arg(short, long, global = true, action = clap::ArgAction::Count, display_order = 1001)]
    pub verbose: u8,

    /// When to use colours; NO_COLOR is honoured.
    #[arg(
        long,
        global = true,
        value_enum,
        value_name = "WHEN",
        default_value = "auto",
        hide_possible_values = false
    )]
    pub color: ColorChoice,
}

/// The verbs.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Fine-tune a model.
    #[command(
        after_help = "Example:\n  ferrotune train examples/quickstart.yaml output_dir=out/mine num_train_epochs=2\n\n\
        `ferrotune train --help` lists all keys"
    )]
    Train(TrainArgs),

    /// Talk to a model.
    #[command(
        after_help = "Examples:\n  ferrotune chat --model HuggingFaceTB/SmolLM2-135M-Instruct --adapter out/quickstart\n  \
        ferrotune chat examples/quickstart.yaml --adapter out/quickstart --prompt 'Who are you?' --greedy\n\n\
        In a chat, `/clear` forgets what was said and `/exit` ends it"
    )]
    Chat(ChatArgs),

    /// Write the model and its adapter as one, for other programs.
    #[command(
        after_help = "Examples:\n  ferrotune export bakery.yaml --adapter out/bakery --output out/bakery-merged\n  \
        ferrotune export bakery.yaml --adapter out/bakery --output out/bakery-gguf --format gguf-q4_k_m\n  \
        ferrotune export merge.yaml export_size=2\n\n\
        Formats: safetensors, bnb-4bit, gguf-f32, gguf-f16, gguf-bf16, gguf-q8_0, gguf-q6_k, gguf-q5_k_m, gguf-q4_k_m, gguf-q4_0, \
        gguf-adapter.\n\
        The file has LLaMA-Factory's keys: model_name_or_path, adapter_name_or_path, export_dir, export_size"
    )]
    Export(ExportArgs),

    /// Send a model or an adapter to the hub.
    #[command(
        after_help = "Examples:\n  ferrotune push out/bakery me/bakery --private\n  ferrotune push out/bakery-gguf bakery-gguf\n\n\
        Sent are config, weights, tokenizer, template and card; logs, answers and checkpoints are not. The token is HF_TOKEN's, or\n\
        the one that `hf auth login` has kept. What the hub has already isn't sent again"
    )]
    Push(PushArgs),

    /// Show what the model will see: text, what is trained on, token counts.
    #[command(after_help = "Example:\n  ferrotune data examples/quickstart.yaml --samples 3")]
    Data(DataArgs),

    /// Show a model's family, parameters and the memory that training it takes.
    #[command(after_help = "Example:\n  ferrotune model HuggingFaceTB/SmolLM2-135M-Instruct")]
    Model(ModelArgs),

    /// JSON for bug reports and comparisons: logits, token ids, rendered conversations.
    #[command(
        after_help = "Example:\n  ferrotune debug tokenize --model HuggingFaceTB/SmolLM2-135M-Instruct 'Hello there'"
    )]
    Debug(DebugArgs),

    /// List runs, the newest first.
    #[command(after_help = "Example:\n  ferrotune runs out")]
    Runs(RunsArgs),

    /// Follow a run's curve on the terminal, also after it ended.
    #[command(after_help = "Example:\n  ferrotune watch out/bakery")]
    Watch(WatchArgs),

    /// Show what this machine has and what will run on it.
    #[command(after_help = "Example:\n  ferrotune doctor")]
    Doctor,
}

/// `train`
#[derive(Debug, Args)]
pub struct TrainArgs {
    /// YAML file with the run's keys.
    pub config: PathBuf,
    /// Keys that win over the file.
    #[arg(value_name = "KEY=VALUE")]
    pub overrides: Vec<String>,
}

/// What a verb works on, by a config or by flags.
#[derive(Debug, Args)]
pub struct Chosen {
    /// YAML file, if any, and keys that win over it.
    #[arg(value_name = "CONFIG | KEY=VALUE")]
    pub words: Vec<String>,
    /// The model: a folder, a GGUF file or a name.
    #[arg(long)]
    pub model: Option<String>,
    /// A trained adapter's folder.
    #[arg(long, value_name = "DIR")]
    pub adapter: Option<PathBuf>,
}

/// `chat`
#[derive(Debug, Args)]
pub struct ChatArgs {
    #[command(flatten)]
    pub chosen: Chosen,
    /// Ask this, print the answer and leave.
    #[arg(long, value_name = "TEXT")]
    pub prompt: Option<String>,
    /// Ask each line of this file (`{"prompt": "…"}`), print the answers and leave.
    #[arg(long, value_name = "FILE", conflicts_with = "prompt")]
    pub prompts: Option<PathBuf>,
    /// System message.
    #[arg(long, value_name = "TEXT")]
    pub system: Option<String>,
    /// Take the likeliest token each time.
    #[arg(long)]
    pub greedy: bool,
    /// Evens out (over 1) or sharpens (under 1) the chances.
    #[arg(long, value_name = "NUMBER")]
    pub temperature: Option<f64>,
    /// Sample from the likeliest tokens that together have this chance.
    #[arg(long, value_name = "SHARE")]
    pub top_p: Option<f64>,
    /// Sample from tokens at least this likely, relative to the likeliest.
    #[arg(long, value_name = "SHARE")]
    pub min_p: Option<f64>,
    /// Seed of the sampling.
    #[arg(long, value_name = "NUMBER")]
    pub seed: Option<u64>,
    /// Longest answer in tokens.
    #[arg(long, value_name = "TOKENS")]
    pub max_new_tokens: Option<usize>,
}

/// `export`
#[derive(Debug, Args)]
pub struct ExportArgs {
    #[command(flatten)]
    pub chosen: Chosen,
    /// Where to write (export_dir).
    #[arg(long, value_name = "DIR")]
    pub output: Option<PathBuf>,
    /// What to write (export_format).
    #[arg(long, value_name = "FORMAT")]
    pub format: Option<String>,
    /// Don't compare what was written with the model (export_verify=false).
    #[arg(long)]
    pub no_verify: bool,
    /// Send it to the hub by this name (export_hub_model_id).
    #[arg(long, value_name = "NAME")]
    pub push_to: Option<String>,
}

/// `push`
#[derive(Debug, Args)]
pub struct PushArgs {
    /// The folder of a run or an export.
    #[arg(value_name = "DIR")]
    pub folder: PathBuf,
    /// Its name on the hub: owner/name, or name alone for your own.
    pub name: String,
    /// Only its owner may see it (hub_private_repo=true).
    #[arg(long)]
    pub private: bool,
    /// First line of the commit.
    #[arg(long, value_name = "TEXT", default_value = "Sent with Ferrotune")]
    pub message: String,
    /// Keys such as `hf_hub_token`.
    #[arg(value_name = "KEY=VALUE")]
    pub overrides: Vec<String>,
}

/// `data`
#[derive(Debug, Args)]
pub struct DataArgs {
    /// YAML file with the run's keys.
    pub config: PathBuf,
    /// Keys that win over the file.
    #[arg(value_name = "KEY=VALUE")]
    pub overrides: Vec<String>,
    /// How many samples to show.
    #[arg(long, short = 'n', value_name = "COUNT", default_value_t = 3)]
    pub samples: usize,
    /// Print everything as one line of JSON.
    #[arg(long)]
    pub json: bool,
}

/// `runs`
#[derive(Debug, Args)]
pub struct RunsArgs {
    /// Where runs are looked for, with the folders in it.
    #[arg(value_name = "DIR", default_value = ".")]
    pub folder: PathBuf,
}

/// `watch`
#[derive(Debug, Args)]
pub struct WatchArgs {
    /// The run's output_dir.
    #[arg(value_name = "DIR")]
    pub folder: PathBuf,
}

/// `model`
#[derive(Debug, Args)]
pub struct ModelArgs {
    /// The model: a folder, a GGUF file or a name.
    pub name: String,
    /// Keys that change the estimate, such as `lora_rank=64` or `cutoff_len=4096`.
    #[arg(value_name = "KEY=VALUE")]
    pub overrides: Vec<String>,
}

/// `debug`
#[derive(Debug, Args)]
pub struct DebugArgs {
    /// What to print.
    #[command(subcommand)]
    pub command: DebugCommand,
}

/// The verbs of `debug`.
#[derive(Debug, Subcommand)]
pub enum DebugCommand {
    /// Logits of given token ids.
    #[command(
        after_help = "Example:\n  ferrotune debug logits --model HuggingFaceTB/SmolLM2-135M-Instruct --ids 1,4093,198"
    )]
    Logits(LogitsArgs),
    /// The loss of given token ids, and the gradient of every adapter matrix.
    #[command(
        after_help = "Example:\n  echo '{\"sequences\": [{\"ids\": [1, 4093, 198], \"labels\": [-100, 4093, 198]}]}' |\n    \
        ferrotune debug gradients --model HuggingFaceTB/SmolLM2-135M-Instruct --adapter out/quickstart \\\n    \
        --output gradients.safetensors\n\n\
        A label of -100 is not trained on; others are the ids"
    )]
    Gradients(GradientsArgs),
    /// Token ids of a text.
    #[command(
        after_help = "Example:\n  ferrotune debug tokenize --model HuggingFaceTB/SmolLM2-135M-Instruct 'Hello there'\n\n\
        Without TEXT, standard input is read"
    )]
    Tokenize(TokenizeArgs),
    /// A conversation as the model sees it, with the spans that are trained on.
    #[command(
        after_help = "Example:\n  echo '{\"messages\": [{\"role\": \"user\", \"content\": \"Hi\"}]}' |\n    \
        ferrotune debug render --model HuggingFaceTB/SmolLM2-135M-Instruct\n  \
        ferrotune debug render --template chat_template.jinja --conversation chat.json --special 'bos_token=<s>'\n\n\
        Spans are in Unicode code points"
    )]
    Render(RenderArgs),
}

/// `debug logits`
#[derive(Debug, Args)]
pub struct LogitsArgs {
    /// The model: a folder, a GGUF file or a name.
    #[arg(long)]
    pub model: String,
    /// A trained adapter's folder.
    #[arg(long, value_name = "DIR")]
    pub adapter: Option<PathBuf>,
    /// Token ids, separated by commas.
    #[arg(long, value_delimiter = ',', required = true, value_name = "IDS")]
    pub ids: Vec<u32>,
    /// Print only the likeliest tokens of each position.
    #[arg(long, value_name = "COUNT")]
    pub top: Option<usize>,
    /// Keys such as `quantization_bit=4` or `bf16=true`.
    #[arg(value_name = "KEY=VALUE")]
    pub overrides: Vec<String>,
}

/// `debug gradients`
#[derive(Debug, Args)]
pub struct GradientsArgs {
    /// The model: a folder, a GGUF file or a name.
    #[arg(long)]
    pub model: String,
    /// A trained adapter's folder.
    #[arg(long, value_name = "DIR")]
    pub adapter: PathBuf,
    /// Where the gradients go: safetensors, under PEFT's names.
    #[arg(long, value_name = "FILE")]
    pub output: PathBuf,
    /// JSON: `{"sequences": [{"ids": […], "labels": […]}, …]}`; standard input when left out.
    #[arg(long, value_name = "FILE")]
    pub sequences: Option<PathBuf>,
    /// Keys such as `quantization_bit=4` or `device=cpu`.
    #[arg(value_name = "KEY=VALUE")]
    pub overrides: Vec<String>,
}

/// `debug tokenize`
#[derive(Debug, Args)]
pub struct TokenizeArgs {
    /// The model: a folder, a GGUF file or a name.
    #[arg(long)]
    pub model: String,
    /// The text; standard input when left out.
    pub text: Option<String>,
    /// Read control tokens in the text as control tokens.
    #[arg(long)]
    pub control_tokens: bool,
}

/// `debug render`
#[derive(Debug, Args)]
pub struct RenderArgs {
    /// The model whose chat template and tokenizer are used.
    #[arg(long, required_unless_present = "template")]
    pub model: Option<String>,
    /// A chat template: a file (jinja, or JSON with `chat_template`) or a name such as chatml; without a model, no tokens are printed.
    #[arg(long, value_name = "FILE")]
    pub template: Option<String>,
    /// The same as --conversation.
    #[arg(conflicts_with = "conversation")]
    pub file: Option<PathBuf>,
    /// JSON: `{"messages": […]}` or a list of messages; standard input when left out, or `-`.
    #[arg(long, value_name = "FILE")]
    pub conversation: Option<PathBuf>,
    /// End with what opens the assistant's turn.
    #[arg(long, alias = "generation-prompt")]
    pub add_generation_prompt: bool,
    /// End inside the last turn, for the model to go on with it.
    #[arg(long, conflicts_with = "add_generation_prompt")]
    pub continue_final_message: bool,
    /// The date that `strftime_now` answers, such as 2026-01-31 or 2026-01-31T12:30:00.
    #[arg(long, value_name = "DATE")]
    pub now: Option<String>,
    /// A special token that the template may name, such as `bos_token=<s>`; may be repeated.
    #[arg(long, value_name = "NAME=TOKEN")]
    pub special: Vec<String>,
    /// A variable of the template, such as `enable_thinking=false` (JSON, else text); may be repeated.
    #[arg(long, value_name = "NAME=VALUE")]
    pub set: Vec<String>,
}

impl Program {
    /// Reads the command line; help, version and mistakes end the program here.
    pub fn read() -> Program {
        // `train --help` (not `-h`) lists the keys, which come from the table of keys.
        let command = Program::command().mut_subcommand("train", |train| {
            let example = train.get_after_help().map(ToString::to_string).unwrap_or_default();
            let example = example.split("\n\n").next().unwrap_or_default().to_string();
            train.after_long_help(format!("{example}\n\n{}", RunConfig::help()))
        });
        let matches = command.try_get_matches().unwrap_or_else(|error| with_key_hint(error).exit());
        <Program as clap::FromArgMatches>::from_arg_matches(&matches).unwrap_or_else(|error| error.exit())
    }
}

/// A key of the config that was typed as a flag is answered with how keys are typed.
fn with_key_hint(mut error: clap::Error) -> clap::Error {
    use clap::error::{ContextKind, ContextValue};
    let flag = match error.get(ContextKind::InvalidArg) {
        Some(ContextValue::String(flag)) => flag.trim_start_matches('-').replace('-', "_"),
        _ => return error,
    };
    if RunConfig::keys().iter().any(|key| key.name == flag) {
        let hint = format!("keys of the config are typed without dashes: {flag}=VALUE");
        error.remove(ContextKind::SuggestedArg);
        error.insert(ContextKind::Suggested, ContextValue::StyledStrs(vec![hint.into()]));
    }
    error
}

impl Chosen {
    /// The config with the flags over it: these, and others by their keys.
    ///
    /// # Errors
    /// When a word, a flag or the file is wrong.
    pub fn config<const N: usize>(&self, flags: [(&str, Option<String>); N]) -> anyhow::Result<RunConfig> {
        let (file, mut words) = split_words(&self.words)?;
        let adapter = self.adapter.as_ref().map(|path| path.display().to_string());
        let own = [("model_name_or_path", self.model.clone()), ("adapter_name_or_path", adapter)];
        let given = |(key, value): (&str, Option<String>)| value.map(|value| format!("{key}={value}"));
        words.extend(own.into_iter().chain(flags).filter_map(given));
        RunConfig::load(file.as_deref(), &words)
    }
}

/// Words: the first that is no `key=value` is the config.
fn split_words(words: &[String]) -> anyhow::Result<(Option<PathBuf>, Vec<String>)> {
    let (overrides, mut configs): (Vec<String>, Vec<String>) =
        words.iter().cloned().partition(|word| word.contains('='));
    if configs.len() > 1 {
        let message = format!("`{}` is a second config; other words are `key=value`", configs[1]);
        return Err(crate::console::Usage::one(message).into());
    }
    Ok((configs.pop().map(PathBuf::from), overrides))
}
