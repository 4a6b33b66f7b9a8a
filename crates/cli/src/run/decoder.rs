//! Model files to a decoder in memory: the one place that puts stored weights, NF4 and adapters together.

use std::collections::HashMap;
use std::time::Instant;

use ferrotune_export::{LoraTensors, Modules, PeftAdapter};
use ferrotune_lora::{DoraAdapter, LoraAdapter, LoraConfig, Target, magnitudes};
use ferrotune_model::source::{ModelFiles, Stored};
use ferrotune_model::{BuildOptions, Decoder, PartSpec, build, dense_part};
use ferrotune_nn::{Adapter, LanguageModel, Parameter, Part, Weight};
use ferrotune_quant::{Nf4GpuWeight, Nf4Weight, Scales};
use ferrotune_tensor::{DType, Device, Result, Tensor};

use super::adapters::{OnTop, take_adapters};
use super::{OpenModel, is_trained, open_device, set_threads};
use crate::config::{FinetuningType, RunConfig};
use crate::console::Console;

/// The adapters that a decoder is built with.
pub enum Adapters {
    /// None: the base model.
    None,
    /// What a run starts with: this one, else by the config new ones, or none where weights are trained themselves.
    ToTrain(Option<Box<PeftAdapter>>),
    /// New ones.
    New(LoraConfig),
    /// Trained ones, read from a folder; dropout counts where they are trained further.
    Trained(Box<PeftAdapter>),
}

/// Builds the decoder; each projection is quantised as it is read, where the config says so.
///
/// # Errors
/// When a weight is damaged, or an adapter doesn't fit the model.
pub fn build_decoder(
    config: &RunConfig,
    files: &ModelFiles,
    computing: &BuildOptions,
    adapters: Adapters,
) -> anyhow::Result<Decoder> {
    let start = Instant::now();
    let training = matches!(adapters, Adapters::ToTrain(_));
    let adapters = match (adapters, config.finetuning_type) {
        (Adapters::ToTrain(Some(adapter)), _) => Adapters::Trained(adapter),
        (Adapters::ToTrain(None), FinetuningType::Lora) => Adapters::New(lora_config(config)),
        (Adapters::ToTrain(None), _) => Adapters::None,
        (other, _) => other,
    };
    let mut adapters = Maker::new(adapters, files, computing)?;
    let scales = if config.double_quantization { Scales::Nested } else { Scales::Plain };
    let mut make = |spec: &PartSpec, stored: Stored| -> Result<Part> {
        let mut part = match (config.quantization_bit, stored) {
            (Some(_), Stored::Dense(value)) => {
                let weight: Box<dyn Weight> = match &computing.device {
                    Device::Cpu => Box::new(Nf4Weight::quantize(&value, scales, computing.precision)?),
                    gpu => Box::new(Nf4GpuWeight::quantize(&value.to_device(gpu)?, scales)?),
                };
                Part { name: spec.name.clone(), weight, bias: None, adapter: None }
            }
            (_, stored) => dense_part(spec, stored, computing)?,
        };
        part.adapter = adapters.make(spec, part.weight.as_ref())?;
        Ok(part)
    };
    let mut decoder = build(&files.spec, files.source.as_ref(), computing.clone(), &mut make)?;
    if training {
        let layers = files.spec.layers.len();
        decoder.train(&files.spec, &|name| is_trained(config, layers, name))?;
    }
    if let Some(gpu) = computing.device.gpu() {
        gpu.synchronize()?;
    }
    tracing::info!("weights read in {:.2} s", start.elapsed().as_secs_f64());
    Ok(decoder)
}

/// Opens the model that the config names and builds it, with the trained adapter it names.
///
/// # Errors
/// When the model or the adapter is missing, damaged or of another model.
pub fn open_decoder(config: &RunConfig, console: &Console) -> anyhow::Result<(OpenModel, Decoder)> {
    set_threads(config);
    let computing = open_device(config, console)?;
    let taken = take_adapters(config, OpenModel::open(config, console)?, OnTop::Last)?;
    let model = taken.model;
    let adapters = match taken.adapter {
        Some(adapter) => Adapters::Trained(Box::new(adapter)),
        None => Adapters::None,
    };
    let decoder = build_decoder(config, &model.files, &computing, adapters)?;
    Ok((model, decoder))
}

/// What gives each projection its adapter.
struct Maker<'a> {
    kind: Kind,
    computing: &'a BuildOptions,
}

enum Kind {
    None,
    New(LoraConfig),
    Trained { tensors: HashMap<String, LoraTensors>, scaling: f64, dropout: f64 },
}

impl Maker<'_> {
    fn new<'a>(
        adapters: Adapters,
        files: &ModelFiles,
        computing: &'a BuildOptions,
    ) -> anyhow::Result<Maker<'a>> {
        let kind = match adapters {
            Adapters::None | Adapters::ToTrain(_) => Kind::None,
            Adapters::New(config) => {
                config.check(&projections(files))?;
                Kind::New(config)
            }
            Adapters::Trained(adapter) => {
                adapter.check_fits(&files.spec)?;
                let (scaling, dropout) = (adapter.scaling(), adapter.lora_dropout);
                let tensors = adapter.tensors.into_iter().map(|it| (it.module.clone(), it)).collect();
                Kind::Trained { tensors, scaling, dropout }
            }
        };
        Ok(Maker { kind, computing })
    }

    fn make(&mut self, spec: &PartSpec, weight: &dyn Weight) -> Result<Option<Box<dyn Adapter>>> {
        let (output, input) = (spec.out_features, spec.in_features);
        let BuildOptions { precision, device, dtype } = self.computing;
        let (lora, magnitude) = match &mut self.kind {
            Kind::None => return Ok(None),
            Kind::New(config) if !config.adapts(&spec.name) => return Ok(None),
            Kind::New(config) => {
                let lora = LoraAdapter::new(&spec.name, output, input, config, *precision)?;
                let magnitude = config.use_dora.then(|| magnitudes(&lora, weight)).transpose()?;
                (lora, magnitude)
            }
            Kind::Trained { tensors, scaling, dropout } => {
                let Some(LoraTensors { a, b, magnitude, .. }) = tensors.remove(&spec.name) else {
                    return Ok(None);
                };
                let (a, b) = (a.cast(DType::F32)?, b.cast(DType::F32)?);
                let magnitude = magnitude.map(|it| it.cast(DType::F32)).transpose()?;
                (LoraAdapter::from_parts(&spec.name, a, b, *scaling, *dropout, *precision)?, magnitude)
            }
        };
        let adapter: Box<dyn Adapter> = match magnitude {
            None => Box::new(lora.to_device(device, *dtype)?),
            Some(magnitude) => {
                Box::new(DoraAdapter::from_parts(lora, magnitude, weight)?.to_device(device, *dtype)?)
            }
        };
        Ok(Some(adapter))
    }
}

/// The canonical names of all projections.
pub fn projections(files: &ModelFiles) -> Vec<String> {
    let spec = &files.spec;
    let layers = spec.layers.iter().enumerate();
    layers
        .flat_map(|(i, layer)| {
            let linears = layer.linears(spec.hidden_size).into_iter();
            linears.map(move |it| ferrotune_model::spec::names::module(i, it.part))
        })
        .collect()
}

/// The settings of new adapters, by the config.
pub fn lora_config(config: &RunConfig) -> LoraConfig {
    let all = config.lora_target.iter().any(|it| it == "all");
    LoraConfig {
        r: config.lora_rank,
        lora_alpha: config.alpha(),
        lora_dropout: config.lora_dropout,
        use_rslora: config.use_rslora,
        use_dora: config.use_dora,
        target_modules: if all { Target::All } else { Target::Names(config.lora_target.clone()) },
        exclude_modules: config.lora_exclude.clone(),
        layers_to_transform: config.layers_to_transform.clone(),
        seed: config.seed,
    }
}

/// One tensor of each part of the adapters, by module.
///
/// # Errors
/// When a tensor can't be read.
pub fn lora_tensors(model: &mut Decoder, tensor: fn(&Parameter) -> &Tensor) -> Result<Vec<LoraTensors>> {
    let mut modules: Vec<LoraTensors> = Vec::new();
    let mut parameters = model.parameters().into_iter().filter(|it| it.name.contains(".lora_")).peekable();
    while let (Some(a), Some(b)) = (parameters.next(), parameters.next()) {
        let module = a.name.trim_end_matches(".lora_A.weight").to_string();
        let magnitude = parameters.next_if(|it| it.name.ends_with(".lora_magnitude_vector"));
        let magnitude = magnitude.map(|it| tensor(it).to_cpu()).transpose()?;
        modules.push(LoraTensors { module, a: tensor(a).to_cpu()?, b: tensor(b).to_cpu()?, magnitude });
    }
    Ok(modules)
}

/// The trained adapter as PEFT stores it.
///
/// # Errors
/// When a tensor can't be read.
pub fn peft_adapter(config: &RunConfig, base: &str, model: &mut Decoder) -> anyhow::Result<PeftAdapter> {
    let pairs = lora_tensors(model, |it| &it.value)?;
    let saved = model.parameters().into_iter().filter(|it| !it.name.contains(".lora_"));
    let saved = saved.map(|it| Ok((it.name.clone(), it.value.to_cpu()?))).collect::<Result<_>>()?;
    // PEFT takes kinds of modules; all of them, where all are meant.
    let mut kinds: Vec<String> =
        pairs.iter().filter_map(|it| Some(it.module.rsplit('.').next()?.to_string())).collect();
    kinds.sort_unstable();
    kinds.dedup();
    let target_modules = match config.lora_target.iter().any(|it| it == "all") {
        true => kinds,
        false => config.lora_target.clone(),
    };
    Ok(PeftAdapter {
        base_model_name_or_path: base.to_string(),
        revision: None,
        r: config.lora_rank,
        lora_alpha: config.alpha(),
        lora_dropout: config.lora_dropout,
        use_rslora: config.use_rslora,
        use_dora: config.use_dora,
        target_modules: Modules::Names(target_modules),
        exclude_modules: (!config.lora_exclude.is_empty())
            .then(|| Modules::Names(config.lora_exclude.clone())),
        layers_to_transform: config.layers_to_transform.clone(),
        saved,
        tensors: pairs,
    })
}
