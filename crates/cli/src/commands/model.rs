//! `ferrotune model`: family, parameters, and the memory that training takes in each mode.

use std::io::Write as _;

use ferrotune_model::source::FileKind;
use ferrotune_model::spec::{BaseWeights, MemoryPlan};
use ferrotune_tensor::cuda_status;

use crate::Outcome;
use crate::args::ModelArgs;
use crate::config::RunConfig;
use crate::console::{Color, Console, bytes, thousands};
use crate::machine;
use crate::run::OpenModel;

/// Prints what the model is made of, and a table of memory.
pub fn run(args: &ModelArgs, console: &Console) -> anyhow::Result<Outcome> {
    let mut config = RunConfig::load(None, &args.overrides)?;
    config.model_name_or_path = Some(args.name.clone());
    let model = OpenModel::open(&config, console)?;
    let (files, spec) = (&model.files, &model.files.spec);
    let mut out = console.out();
    let mut line = |name: &str, value: String| {
        let name = Color::Bold.paint(console.color_out, &format!("{name:<11}"));
        writeln!(out, "{name} {value}")
    };

    let kind = match files.kind {
        FileKind::Folder => "folder",
        FileKind::Gguf => "GGUF",
    };
    line("model", model.name.clone())?;
    line("files", format!("{} ({kind})", files.path.display()))?;
    if let Some(kind) = &files.four_bit {
        let scales = if kind.double_quantized { ", double-quantised" } else { "" };
        let how = format!(
            "4 bits by bitsandbytes ({}{scales}): {} of {} linear layers",
            kind.quant_type,
            kind.count,
            spec.projections().count()
        );
        line("weights", how)?;
    }
    line("family", spec.family.to_string())?;
    if let Some(layer) = spec.layers.first() {
        let attention = &layer.attention;
        let shape = format!(
            "{} of width {}; {} heads of {}, {} of keys and values; mlp {}",
            spec.layers.len(),
            thousands(spec.hidden_size as u64),
            attention.num_attention_heads,
            attention.head_dim,
            attention.num_key_value_heads,
            thousands(layer.mlp.intermediate_size as u64),
        );
        line("layers", shape)?;
    }
    line("vocabulary", format!("{} tokens", thousands(spec.vocab_size as u64)))?;
    line("positions", thousands(spec.max_position_embeddings as u64))?;
    let (all, linears) = (spec.parameter_count(), spec.linear_parameter_count());
    line("parameters", format!("{}; {} in linear layers", thousands(all), thousands(linears)))?;
    let adapters = spec.adapter_parameter_count(config.lora_rank);
    let share = 100.0 * adapters as f64 / (all + adapters) as f64;
    line(
        "adapters",
        format!("{} at rank {} on all linear layers ({share:.2} %)", thousands(adapters), config.lora_rank),
    )?;

    let tokens = config.per_device_train_batch_size * config.cutoff_len;
    let card = cuda_status().cards.into_iter().next().filter(|_| config.device != "cpu");
    let (device, activation_bytes, weight_bytes) = match &card {
        Some(card) => (format!("{} in 16 bits", card.name), 2, 2),
        // With bf16 products, weights are kept in it.
        None => ("the cpu".to_string(), 4, if config.bf16 { 2 } else { 4 }),
    };
    let memory =
        format!("of training on {device}, with micro-batches of {} tokens", thousands(tokens as u64));
    line("memory", memory)?;
    let header = ["weights", "adapters", "activations", "logits", "together"];
    writeln!(out, "  {:<24}{}", "mode", header.map(|name| format!("{name:>13}")).concat())?;
    let modes = [(4, BaseWeights::FourBit), (8 * weight_bytes, BaseWeights::Whole)];
    // What is in 4 bits stays so, where it can.
    let possible = |base: &BaseWeights| match &files.four_bit {
        Some(kind) => (*base == BaseWeights::FourBit) == kind.is_nf4(),
        None => true,
    };
    let modes = modes.into_iter().filter(|(_, base)| possible(base));
    for (bits, base, recompute) in modes.flat_map(|(bits, base)| [(bits, base, false), (bits, base, true)]) {
        let name = format!("{bits} bit{}", if recompute { ", recompute: all" } else { "" });
        let plan = MemoryPlan {
            base,
            weight_bytes,
            lora_rank: config.lora_rank,
            trained_weights: 0,
            tokens,
            activation_bytes,
            recompute,
            host_embedding: card.is_some(),
        };
        let estimate = spec.memory(&plan);
        let columns = [
            estimate.linears + estimate.others,
            estimate.adapters,
            estimate.activations,
            estimate.logits,
            estimate.total(),
        ];
        writeln!(out, "  {name:<24}{}", columns.map(|count| format!("{:>13}", bytes(count))).concat())?;
    }
    match card {
        Some(card) => writeln!(out, "  {} is what the card has", bytes(card.memory))?,
        None => {
            if let Some(available) = machine::available_memory() {
                writeln!(out, "  {} are available on this machine", bytes(available))?;
            }
        }
    }
    out.flush()?;
    Ok(Outcome::Done)
}
