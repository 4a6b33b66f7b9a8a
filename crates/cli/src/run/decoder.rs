//! Model files to a decoder in memory: the one place that puts stored weights, NF4 and adapters together.

use std::collections::{BTreeMap, HashMap};
use std::time::Instant;

use ferrotune_export::{LoraTensors, PeftAdapter};
use ferrotune_lora::{
    DoraAdapter, Initial, Iterations, LoraAdapter, LoraConfig, Target, loftq, magnitudes, pissa, residual,
};
use ferrotune_model::source::{FourBit, FourBitScales, ModelFiles, Stored, WeightSource, WithKept};
use ferrotune_model::{BuildOptions, Decoder, PartSpec, build, dense_part};
use ferrotune_nn::{Adapter, LanguageModel, Parameter, Part, Weight};
use ferrotune_quant::{
    Absmax, NF4_BLOCK, NF4_GROUP, NF4_LEVELS, Nf4GpuWeight, Nf4Weight, Scales, dynamic_map,
};
use ferrotune_tensor::{DType, Device, Error, Result, Tensor};

use super::adapters::{OnTop, take_adapters};
use super::kept::Kept;
use super::kernels::{Purpose, load_kernels};
use super::saved::split_pissa;
use super::{OpenModel, is_trained, open_device, set_threads};
use crate::config::{FinetuningType, InitLoraWeights, RunConfig};
use crate::console::Console;

/// The adapters that a decoder is built with.
pub enum Adapters {
    /// None: the base model.
    None,
    /// What a run starts with: this one, else by the config new ones, or none where weights are trained themselves.
    ToTrain(Option<Box<PeftAdapter>>),
    /// New ones of a run that goes on from this checkpoint; what PiSSA took from the base is read there.
    Resumed(Box<PeftAdapter>),
    /// Trained ones, read from a folder; dropout counts where they are trained further.
    Trained(Box<PeftAdapter>),
}

/// A and B that PiSSA took from the base's weights, by module; empty for other adapters.
pub type Subtracted = BTreeMap<String, (Tensor, Tensor)>;

/// Builds the decoder; each projection is quantised as it is read, where the config says so.
///
/// # Errors
/// When a weight is damaged, or an adapter doesn't fit the model.
pub fn build_decoder(
    config: &RunConfig,
    files: &ModelFiles,
    computing: &BuildOptions,
    adapters: Adapters,
) -> anyhow::Result<(Decoder, Subtracted)> {
    build_with(config, files, computing, adapters, &|_| true)
}

/// The same without adapters; only projections of these names are quantised where the config says so.
///
/// # Errors
/// As [`build_decoder`].
pub fn build_quantised(
    config: &RunConfig,
    files: &ModelFiles,
    computing: &BuildOptions,
    quantised: &dyn Fn(&str) -> bool,
) -> anyhow::Result<Decoder> {
    build_with(config, files, computing, Adapters::None, quantised).map(|it| it.0)
}

fn build_with(
    config: &RunConfig,
    files: &ModelFiles,
    computing: &BuildOptions,
    adapters: Adapters,
    quantised: &dyn Fn(&str) -> bool,
) -> anyhow::Result<(Decoder, Subtracted)> {
    let start = Instant::now();
    let training = matches!(adapters, Adapters::ToTrain(_) | Adapters::Resumed(_));
    let purpose = if training { Purpose::Training } else { Purpose::Generation };
    let loading = load_kernels(&files.spec, computing, purpose);
    let mut adapters = Maker::new(config, adapters, files, computing)?;
    // What is in 4 bits already is left as it is, and so is what its maker left out.
    let quantization_bit = config.quantization_bit.filter(|_| files.four_bit.is_none());
    let scales = if config.double_quantization { Scales::Nested } else { Scales::Plain };
    // What adapters begin with a part of is needed whole.
    let kept = quantization_bit.filter(|_| adapters.leaves_weights());
    let kept = kept.filter(|_| files.spec.projections().all(|(name, _)| quantised(&name)));
    let kept = kept.and_then(|_| Kept::of(files, computing, scales));
    let (source, mut keeper, damaged) = match kept.map(|it| (it.open(), it)) {
        Some((Some(kept), file)) => {
            let source = WithKept { base: files.source.as_ref(), kept };
            (Some(source), None, Some(file))
        }
        Some((None, file)) => (None, Some(file.keep()), None),
        None => (None, None, None),
    };
    let source: &dyn WeightSource = source.as_ref().map_or(files.source.as_ref(), |it| it);
    let mut fresh = 0;
    let mut make = |spec: &PartSpec, stored: Stored| -> Result<Part> {
        let Start { stored, before, lora } = adapters.start(spec, stored)?;
        let quantization_bit = quantization_bit.filter(|_| quantised(&spec.name));
        let mut part = match (stored, quantization_bit, &computing.device) {
            (Stored::FourBit(matrix), ..) => four_bit_part(spec, matrix, computing)?,
            (Stored::Dense(value), Some(_), device) => {
                let tensor = format!("{}.weight", spec.name);
                let as_stored = source.is_as_stored(&tensor);
                fresh += usize::from(as_stored);
                let keeper = keeper.as_mut().filter(|it| it.wants() && as_stored);
                match device {
                    Device::Cpu => {
                        let weight = Nf4Weight::quantize(&value, scales, computing.precision)?;
                        if let Some(keeper) = keeper {
                            keeper.add(tensor, weight.clone());
                        }
                        quantised_part(spec, weight)
                    }
                    gpu => {
                        let weight = Nf4GpuWeight::quantize(&value.to_device(gpu)?, scales)?;
                        if let Some(keeper) = keeper {
                            keeper.add(tensor, weight.to_cpu()?);
                        }
                        quantised_part(spec, weight)
                    }
                }
            }
            (stored, ..) => dense_part(spec, stored, computing)?,
        };
        part.adapter = adapters.make(spec, part.weight.as_ref(), before, lora)?;
        Ok(part)
    };
    let mut decoder = build(&files.spec, source, computing.clone(), &mut make)?;
    if let Some(keeper) = keeper {
        keeper.finish();
    }
    // Of what is kept, all is taken.
    if let Some(file) = damaged.filter(|_| fresh > 0) {
        file.remove();
    }
    if training {
        let layers = files.spec.layers.len();
        decoder.train(&files.spec, &|name| is_trained(config, layers, name))?;
    }
    if let Some(gpu) = computing.device.gpu() {
        gpu.synchronize()?;
    }
    drop(loading);
    tracing::info!("weights read in {:.2} s", start.elapsed().as_secs_f64());
    Ok((decoder, adapters.subtracted))
}

/// A projection that bitsandbytes has put into 4 bits: NF4 as it is, bit for bit; codes of another kind are
/// read for what they mean, and not quantised again.
fn four_bit_part(spec: &PartSpec, matrix: FourBit<'static>, computing: &BuildOptions) -> Result<Part> {
    let own_map = |map: &[f32]| map == dynamic_map();
    let nested = match &matrix.scales {
        FourBitScales::Plain(_) => true,
        FourBitScales::Nested { map, group, .. } => own_map(map) && *group == NF4_GROUP,
    };
    if matrix.table != NF4_LEVELS || matrix.block != NF4_BLOCK || !nested {
        return dense_part(spec, Stored::FourBit(matrix), computing);
    }
    let FourBit { rows, cols, codes, scales, dtype, .. } = matrix;
    let absmax = match scales {
        FourBitScales::Plain(values) => Absmax::Plain(values),
        FourBitScales::Nested { codes, nested_absmax, offset, .. } => {
            Absmax::Nested { codes, nested_absmax, offset }
        }
    };
    let weight = Nf4Weight::from_parts((rows, cols), codes.into_owned(), absmax, dtype, computing.precision)?;
    Ok(match computing.device.gpu() {
        Some(gpu) => quantised_part(spec, Nf4GpuWeight::from_cpu(weight, gpu)?),
        None => quantised_part(spec, weight),
    })
}

fn quantised_part(spec: &PartSpec, weight: impl Weight + 'static) -> Part {
    Part { name: spec.name.clone(), weight: Box::new(weight), bias: None, adapter: None }
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
    let (decoder, _) = build_decoder(config, &model.files, &computing, adapters)?;
    Ok((model, decoder))
}

/// What gives each projection its adapter.
struct Maker<'a> {
    kind: Kind,
    computing: &'a BuildOptions,
    subtracted: Subtracted,
}

enum Kind {
    None,
    /// With what PiSSA took when the run began, where it goes on.
    New(LoraConfig, HashMap<String, LoraTensors>),
    Trained {
        tensors: HashMap<String, LoraTensors>,
        scaling: f64,
        dropout: f64,
    },
}

/// A projection before its weight is made.
struct Start {
    stored: Stored,
    /// The weight itself, where the adapter needs it.
    before: Option<Tensor>,
    /// An adapter that the weight has lost something to.
    lora: Option<LoraAdapter>,
}

impl Maker<'_> {
    fn new<'a>(
        config: &RunConfig,
        adapters: Adapters,
        files: &ModelFiles,
        computing: &'a BuildOptions,
    ) -> anyhow::Result<Maker<'a>> {
        let by_module = |adapter: PeftAdapter| -> HashMap<String, LoraTensors> {
            adapter.tensors.into_iter().map(|it| (it.module.clone(), it)).collect()
        };
        let lora = config.finetuning_type == FinetuningType::Lora;
        let kind = match adapters {
            Adapters::ToTrain(None) if lora => Kind::New(lora_config(config), HashMap::new()),
            Adapters::None | Adapters::ToTrain(None) => Kind::None,
            Adapters::Resumed(adapter) => Kind::New(lora_config(config), by_module(*adapter)),
            Adapters::Trained(adapter) | Adapters::ToTrain(Some(adapter)) => {
                adapter.check_fits(&files.spec)?;
                let (scaling, dropout) = (adapter.scaling(), adapter.lora_dropout);
                Kind::Trained { tensors: by_module(*adapter), scaling, dropout }
            }
        };
        if let Kind::New(config, _) = &kind {
            config.check(&projections(files))?;
        }
        Ok(Maker { kind, computing, subtracted: Subtracted::new() })
    }

    /// Adapters begin beside the weights as they are.
    fn leaves_weights(&self) -> bool {
        !matches!(&self.kind, Kind::New(config, _) if config.initial != Initial::Zero)
    }

    fn start(&mut self, spec: &PartSpec, stored: Stored) -> Result<Start> {
        let (config, resumed) = match &mut self.kind {
            Kind::New(config, resumed) if config.initial != Initial::Zero && config.adapts(&spec.name) => {
                (config, resumed)
            }
            _ => return Ok(Start { stored, before: None, lora: None }),
        };
        let Stored::Dense(value) = &stored else {
            let message =
                "is in few bits already, and adapters are to begin with a part of the whole numbers";
            return Err(Error::msg(format!("`{}` {message}", spec.name)));
        };
        match config.initial {
            Initial::Loftq => {
                let before = value.try_clone()?.cast(DType::F32)?;
                Ok(Start { stored, before: Some(before), lora: None })
            }
            Initial::Pissa(iterations) => {
                let precision = self.computing.precision;
                let (lora, rest) = match resumed.remove(&spec.name) {
                    None => pissa(&spec.name, value, config, iterations, precision)?,
                    Some(tensors) => {
                        let LoraTensors { a, b, .. } = split_pissa(tensors, config.r)?.1;
                        let rest = residual(value.try_clone()?, &a, &b, config.scaling())?;
                        let dropout = config.lora_dropout;
                        let lora =
                            LoraAdapter::from_parts(&spec.name, a, b, config.scaling(), dropout, precision)?;
                        (lora, rest)
                    }
                };
                let taken = (lora.a.value.try_clone()?, lora.b.value.try_clone()?);
                self.subtracted.insert(spec.name.clone(), taken);
                Ok(Start { stored: Stored::Dense(rest), before: None, lora: Some(lora) })
            }
            Initial::Zero => Ok(Start { stored, before: None, lora: None }),
        }
    }

    fn make(
        &mut self,
        spec: &PartSpec,
        weight: &dyn Weight,
        before: Option<Tensor>,
        lora: Option<LoraAdapter>,
    ) -> Result<Option<Box<dyn Adapter>>> {
        let (name, output, input) = (&spec.name, spec.out_features, spec.in_features);
        let BuildOptions { precision, device, dtype } = self.computing;
        let (lora, magnitude) = match &mut self.kind {
            Kind::None => return Ok(None),
            Kind::New(config, _) if !config.adapts(name) => return Ok(None),
            Kind::New(config, _) => {
                let lora = match (lora, before) {
                    (Some(lora), _) => lora,
                    (None, Some(before)) => loftq(name, before, &weight.to_dense()?, config, *precision)?,
                    (None, None) => LoraAdapter::new(name, output, input, config, *precision)?,
                };
                let magnitude = config.use_dora.then(|| magnitudes(&lora, weight)).transpose()?;
                (lora, magnitude)
            }
            Kind::Trained { tensors, scaling, dropout } => {
                let Some(LoraTensors { a, b, magnitude, .. }) = tensors.remove(name) else {
                    return Ok(None);
                };
                let (a, b) = (a.cast(DType::F32)?, b.cast(DType::F32)?);
                let magnitude = magnitude.map(|it| it.cast(DType::F32)).transpose()?;
                (LoraAdapter::from_parts(name, a, b, *scaling, *dropout, *precision)?, magnitude)
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
    files.spec.projections().map(|(name, _)| name).collect()
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
        initial: match (config.pissa_init, config.init_lora_weights) {
            (true, _) => Initial::Pissa(match usize::try_from(config.pissa_iter) {
                Ok(count) => Iterations::Count(count),
                Err(_) => Iterations::Exact,
            }),
            (false, InitLoraWeights::Loftq) => Initial::Loftq,
            (false, InitLoraWeights::Default) => Initial::Zero,
        },
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
