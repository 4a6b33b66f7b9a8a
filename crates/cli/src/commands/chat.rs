//! `ferrotune chat`

use std::fs;
use std::io::{self, BufRead as _, IsTerminal as _, Write as _};
use std::ops::ControlFlow;
use std::path::Path;
use std::time::Instant;

use anyhow::Context as _;
use ferrotune_data::{Conversation, Message, Role, encode_prompt};
use ferrotune_generate::{GenerateOptions, Sampler, Sampling, generate};
use ferrotune_model::{Decoder, KvCache};
use serde_json::Value;

use crate::Outcome;
use crate::args::ChatArgs;
use crate::config::RunConfig;
use crate::console::{Color, Console, Usage};
use crate::machine::write_kernel_times;
use crate::run::{OpenModel, mark_options, open_decoder};

/// Talks, or answers one prompt, or those of a file.
pub fn run(args: &ChatArgs, console: &Console) -> anyhow::Result<Outcome> {
    let config = config(args)?;
    config.notes.iter().for_each(|note| console.note(note));
    let prompts = args.prompts.as_deref().map(read_prompts).transpose()?;
    let (model, decoder) = open_decoder(&config, console)?;
    let mut chat = Chat {
        config: &config,
        model: &model,
        decoder: &decoder,
        said: Vec::new(),
        cache: Cached { cache: decoder.cache(), tokens: Vec::new() },
    };
    match (&args.prompt, prompts) {
        (Some(prompt), _) => chat.answer(prompt, console)?,
        (None, Some(prompts)) => {
            for prompt in prompts {
                let mut out = console.out();
                writeln!(out, "{}", Color::Bold.paint(console.color_out, &format!("> {prompt}")))?;
                out.flush()?;
                drop(out);
                chat.forget();
                chat.answer(&prompt, console)?;
            }
        }
        (None, None) => chat.talk(console)?,
    }
    if let Some(gpu) = decoder.norm.weight.gpu() {
        write_kernel_times(gpu, decoder.dtype, &mut console.out())?;
    }
    Ok(Outcome::Done)
}

/// The config with the flags over it.
fn config(args: &ChatArgs) -> anyhow::Result<RunConfig> {
    let shown = |value: Option<f64>| value.map(|it| it.to_string());
    args.chosen.config([
        ("default_system", args.system.clone()),
        ("do_sample", args.greedy.then(|| "false".to_string())),
        ("temperature", shown(args.temperature)),
        ("top_p", shown(args.top_p)),
        ("min_p", shown(args.min_p)),
        ("seed", args.seed.map(|it| it.to_string())),
        ("max_new_tokens", args.max_new_tokens.map(|it| it.to_string())),
    ])
}

/// The `prompt` of each line of a file.
fn read_prompts(path: &Path) -> anyhow::Result<Vec<String>> {
    let text = fs::read_to_string(path).with_context(|| format!("can't read {}", path.display()))?;
    let lines = text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty());
    let prompts = lines.map(|(number, line)| {
        let row: Option<Value> = serde_json::from_str(line).ok();
        let prompt = row.as_ref().and_then(|row| row.get("prompt")?.as_str());
        let expected =
            || Usage::one(format!("{}:{}: expected {{\"prompt\": \"…\"}}", path.display(), number + 1));
        Ok(prompt.ok_or_else(expected)?.to_string())
    });
    prompts.collect()
}

/// A conversation that goes on.
struct Chat<'a> {
    config: &'a RunConfig,
    model: &'a OpenModel,
    decoder: &'a Decoder,
    said: Vec<Message>,
    cache: Cached,
}

impl Chat<'_> {
    fn talk(&mut self, console: &Console) -> anyhow::Result<()> {
        let terminal = io::stdin().is_terminal();
        if terminal {
            console.note("/clear forgets what was said, /exit ends the chat");
        }
        let mut lines = io::stdin().lock().lines();
        loop {
            if terminal {
                let mut out = console.out();
                write!(out, "{} ", Color::Bold.paint(console.color_out, ">"))?;
                out.flush()?;
            }
            let Some(line) = lines.next() else { return Ok(()) };
            match line.context("can't read standard input")?.trim() {
                "" => {}
                "/exit" | "exit" => return Ok(()),
                "/clear" | "clear" => self.forget(),
                word if terminal && word.starts_with('/') && !word.contains(' ') => {
                    console.note(format!("`{word}` is no command; there are /clear and /exit"));
                }
                prompt => self.answer(prompt, console)?,
            }
        }
    }

    fn forget(&mut self) {
        self.said.clear();
    }

    /// Answers on standard output, as the tokens come.
    fn answer(&mut self, prompt: &str, console: &Console) -> anyhow::Result<()> {
        self.said.push(Message::new(Role::User, prompt));
        let vocabulary = &self.model.vocabulary;
        let conversation = Conversation { messages: self.said.clone(), ..Conversation::default() };
        let options = mark_options(self.config);
        let ids = encode_prompt(&conversation, &vocabulary.template, &vocabulary.tokenizer, &options)?;
        let mut stop_tokens = self.model.files.spec.eos_token_ids.clone();
        stop_tokens.extend(vocabulary.tokenizer.eos());
        let options =
            GenerateOptions { max_new_tokens: self.config.max_new_tokens, stop_tokens, adapters: true };
        let mut sampler = Sampler::new(sampling(self.config));
        let mut stream = vocabulary.tokenizer.stream(true);
        let (mut out, mut answer, mut failed) = (console.out(), String::new(), None);
        let new = self.cache.go_to(&ids);
        let Cached { cache, tokens } = &mut self.cache;
        let mut pace = Pace::default();
        generate(self.decoder, cache, &ids[new..], &options, &mut sampler, |token| {
            pace.token();
            tokens.push(token);
            let text = stream.push(token).map_err(anyhow::Error::from);
            let written = text.and_then(|text| {
                answer.push_str(&text);
                out.write_all(text.as_bytes())?;
                Ok(out.flush()?)
            });
            match written {
                Ok(()) => ControlFlow::Continue(()),
                Err(error) => {
                    failed = Some(error);
                    ControlFlow::Break(())
                }
            }
        })?;
        if let Some(error) = failed {
            return Err(error);
        }
        let rest = stream.finish()?;
        answer.push_str(&rest);
        writeln!(out, "{rest}")?;
        out.flush()?;
        pace.tell();
        self.said.push(Message::new(Role::Assistant, answer));
        Ok(())
    }
}

/// When the first and the last token came, and how many.
#[derive(Default)]
struct Pace(Option<(Instant, Instant, usize)>);

impl Pace {
    fn token(&mut self) {
        let now = Instant::now();
        let (_, last, count) = self.0.get_or_insert((now, now, 0));
        (*last, *count) = (now, *count + 1);
    }

    /// Tokens a second after the first, which waits for the prompt to be read.
    fn tell(&self) {
        if let Some((first, last, count @ 2..)) = self.0 {
            let seconds = (last - first).as_secs_f64();
            tracing::info!("{count} tokens, {:.1} a second after the first", (count - 1) as f64 / seconds);
        }
    }
}

/// How the config says that tokens are chosen.
pub fn sampling(config: &RunConfig) -> Sampling {
    match config.do_sample {
        false => Sampling::Greedy,
        true => Sampling::Random {
            temperature: config.temperature,
            top_k: config.top_k,
            top_p: config.top_p,
            min_p: config.min_p,
            seed: config.seed,
        },
    }
}

/// Keys and values of what has been read and said, and its tokens.
struct Cached {
    cache: KvCache,
    tokens: Vec<u32>,
}

impl Cached {
    /// Keeps what `ids` begin with; returns how many that are. At least one token is left to be read.
    fn go_to(&mut self, ids: &[u32]) -> usize {
        let known = self.tokens.iter().zip(ids).take_while(|(a, b)| a == b).count();
        let kept = known.min(self.cache.len()).min(ids.len() - 1);
        self.cache.truncate(kept);
        self.tokens = ids.to_vec();
        kept
    }
}
