//! A PEFT adapter folder: `adapter_model.safetensors`, `adapter_config.json`, `README.md`.

mod config;
#[cfg(test)]
mod tests;

use std::borrow::Cow;
use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::fs;
use std::path::Path;

use ferrotune_model::source::{ModelFiles, SafetensorsSource, WeightSource};
use ferrotune_model::spec::{LinearSpec, ModelSpec, names};
use ferrotune_tensor::{DType, Error, Result, Tensor};
use safetensors::tensor::{Dtype, View};

use crate::{ModelCard, write_whole};

/// What PEFT puts before a module's own name.
const PREFIX: &str = "base_model.model.";
/// Where transformers' classes of models of more than text have the part for text, and where they had it before 4.52.
const LANGUAGE_MODEL: [(&str, &str); 2] =
    [("model.language_model.", "model."), ("language_model.model.", "model.")];
const TENSORS: &str = "adapter_model.safetensors";
const CONFIG: &str = "adapter_config.json";

/// A LoRA adapter as its folder holds it.
#[derive(Debug)]
pub struct PeftAdapter {
    /// The base model, as it was named in training.
    pub base_model_name_or_path: String,
    /// Which module of the base the adapted ones are in.
    pub place: ModulePlace,
    /// The base model's revision.
    pub revision: Option<String>,
    /// The rank.
    pub r: usize,
    /// B·A is multiplied by alpha / r, with rsLoRA by alpha / √r.
    pub lora_alpha: f64,
    /// How many of A's inputs were left out in training.
    pub lora_dropout: f64,
    /// Whether rsLoRA's scaling holds.
    pub use_rslora: bool,
    /// Whether the modules have magnitudes (DoRA).
    pub use_dora: bool,
    /// The modules that were asked for.
    pub target_modules: Modules,
    /// The modules that were left out of these.
    pub exclude_modules: Option<Modules>,
    /// The layers that were asked for; empty: all of them.
    pub layers_to_transform: Vec<usize>,
    /// Weights that were trained themselves and are saved whole, by canonical names such as `lm_head.weight`.
    pub saved: BTreeMap<String, Tensor>,
    /// The modules that have an adapter.
    pub tensors: Vec<LoraTensors>,
}

/// Where a decoder's modules are within transformers' class of the model.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ModulePlace {
    /// `model.layers`: the decoder is the model.
    #[default]
    Model,
    /// `model.language_model.layers`: it is the part for text of a model of more than that.
    LanguageModel,
}

impl ModulePlace {
    /// Where those of a model are.
    pub fn of(files: &ModelFiles) -> ModulePlace {
        if files.is_text_part { ModulePlace::LanguageModel } else { ModulePlace::Model }
    }

    /// A canonical name as transformers has it.
    fn name(self, canonical: &str) -> String {
        match (self, canonical.strip_prefix("model.")) {
            (ModulePlace::LanguageModel, Some(inner)) => format!("{}{inner}", LANGUAGE_MODEL[0].0),
            _ => canonical.to_string(),
        }
    }
}

/// What one module's adapter is made of.
#[derive(Debug)]
pub struct LoraTensors {
    /// Canonical name, such as `model.layers.0.self_attn.q_proj`.
    pub module: String,
    /// `(r, in_features)`
    pub a: Tensor,
    /// `(out_features, r)`
    pub b: Tensor,
    /// DoRA's: `(1, out_features)`
    pub magnitude: Option<Tensor>,
}

/// A choice of modules.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Modules {
    /// Names, or ends of names after a point.
    Names(Vec<String>),
    /// A regular expression for whole names, or `all-linear`.
    Pattern(String),
}

impl fmt::Display for Modules {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Modules::Names(names) => f.write_str(&names.join(", ")),
            Modules::Pattern(pattern) => f.write_str(pattern),
        }
    }
}

impl PeftAdapter {
    /// What B·A is multiplied by.
    pub fn scaling(&self) -> f64 {
        let r = self.r as f64;
        self.lora_alpha / if self.use_rslora { r.sqrt() } else { r }
    }

    /// Writes the folder, which is made where it isn't there. Each file is whole or absent; the
    /// config comes last, so that a folder with a config is a whole adapter.
    ///
    /// # Errors
    /// When a matrix doesn't fit the rank, or the folder can't be written; the message names the file.
    pub fn write(&self, folder: &Path, card: &ModelCard) -> Result<()> {
        self.check(folder)?;
        fs::create_dir_all(folder).map_err(|source| Error::io(folder, source))?;
        write_tensors(&folder.join(TENSORS), self.place, &self.tensors, &self.saved)?;
        write_whole(&folder.join("README.md"), card.markdown(self).as_bytes())?;
        write_whole(&folder.join(CONFIG), config::write(self).as_bytes())
    }

    /// Reads a folder that PEFT or [`PeftAdapter::write`] wrote.
    ///
    /// # Errors
    /// When a file is missing or damaged, or the adapter is of a kind that isn't there yet.
    pub fn read(folder: &Path) -> Result<PeftAdapter> {
        if !folder.is_dir() {
            return Err(Error::file(
                folder,
                "no such folder; name the output_dir of a run, or a checkpoint in it",
            ));
        }
        if !folder.join(CONFIG).is_file() {
            let message = format!(
                "holds no adapter, which has an {CONFIG}; name the output_dir of a run, or a checkpoint in it"
            );
            return Err(Error::file(folder, message));
        }
        let mut adapter = config::read(&folder.join(CONFIG))?;
        let path = folder.join(TENSORS);
        if !path.exists() && folder.join("adapter_model.bin").exists() {
            let message = "holds adapter_model.bin but no adapter_model.safetensors: a pickle runs code \
                           when opened, so it is refused; save the adapter again with a PEFT of 0.5 or newer";
            return Err(Error::file(folder, message));
        }
        let source = SafetensorsSource::open_file(&path)?;
        let mut modules: BTreeMap<String, [Option<Tensor>; 3]> = BTreeMap::new();
        for name in source.names() {
            source.shape(name)?;
            let tensor = source.get(name)?.into_dense()?;
            let short = name.strip_prefix(PREFIX).unwrap_or(name);
            let inner = LANGUAGE_MODEL
                .iter()
                .find_map(|(theirs, ours)| Some(format!("{ours}{}", short.strip_prefix(theirs)?)));
            if inner.is_some() {
                adapter.place = ModulePlace::LanguageModel;
            }
            let short = inner.as_deref().unwrap_or(short);
            if [names::EMBEDDING, names::HEAD].contains(&short) {
                adapter.saved.insert(short.to_string(), tensor);
                continue;
            }
            let (module, part) = split(short).map_err(|message| Error::file(&path, message))?;
            modules.entry(module.to_string()).or_default()[part] = Some(tensor);
        }
        for (module, parts) in modules {
            let [Some(a), Some(b), magnitude] = parts else {
                let message = format!("module `{module}` lacks lora_A or lora_B: the file is damaged");
                return Err(Error::file(&path, message));
            };
            adapter.tensors.push(LoraTensors { module, a, b, magnitude });
        }
        adapter.check(&path)?;
        Ok(adapter)
    }

    /// Checks that every module of the adapter is a projection of the model, of the same sizes.
    ///
    /// # Errors
    /// Names the first module that isn't.
    pub fn check_fits(&self, spec: &ModelSpec) -> Result<()> {
        let linears: HashMap<String, LinearSpec> = spec.projections().collect();
        let other = "the adapter belongs to another model";
        for it in &self.tensors {
            let Some(linear) = linears.get(&it.module) else {
                return Err(Error::msg(format!("the model has no module `{}`: {other}", it.module)));
            };
            let (got, expected) = ((it.b.rows(), it.a.cols()), (linear.out_features, linear.in_features));
            if got != expected {
                let message = format!(
                    "module `{}`: the adapter is for {} x {}, the model has {} x {}: {other}",
                    it.module, got.0, got.1, expected.0, expected.1
                );
                return Err(Error::msg(message));
            }
        }
        let rows = |name: &str| self.saved.get(name).map(Tensor::rows);
        let grown =
            rows(names::EMBEDDING).filter(|it| *it > spec.vocab_size && rows(names::HEAD) == Some(*it));
        let expected = (grown.unwrap_or(spec.vocab_size), spec.hidden_size);
        for (name, tensor) in &self.saved {
            let got = tensor.shape();
            if got != expected {
                let message = format!(
                    "`{name}`: the adapter has {} x {}, the model {} x {}: {other}",
                    got.0, got.1, expected.0, expected.1
                );
                return Err(Error::msg(message));
            }
        }
        Ok(())
    }

    /// Checks that there are matrices, and that all have the rank.
    fn check(&self, path: &Path) -> Result<()> {
        if self.tensors.is_empty() {
            return Err(Error::file(path, "the adapter has no module"));
        }
        for it in &self.tensors {
            let (a, b) = (it.a.shape(), it.b.shape());
            if a.0 != self.r || b.1 != self.r {
                let message = format!(
                    "module `{}`: A of {} x {} and B of {} x {} don't fit the rank, `r` is {}",
                    it.module, a.0, a.1, b.0, b.1, self.r
                );
                return Err(Error::file(path, message));
            }
            let expected = self.use_dora.then_some((1, b.0));
            let got = it.magnitude.as_ref().map(Tensor::shape);
            if got != expected {
                let shown = |it: Option<(usize, usize)>| it.map_or("none".into(), |it| it.1.to_string());
                let (expected, got) = (shown(expected), shown(got));
                let message =
                    format!("module `{}`: expected magnitudes of DoRA: {expected}, got {got}", it.module);
                return Err(Error::file(path, message));
            }
        }
        let all = self.tensors.iter().flat_map(|it| {
            [Some(&it.a), Some(&it.b), it.magnitude.as_ref()].into_iter().flatten().map(|x| (&it.module, x))
        });
        for (what, tensor) in all.chain(&self.saved) {
            if !matches!(tensor.dtype(), DType::F32 | DType::F16 | DType::BF16) {
                let expected = "f32, f16 or bf16";
                return Err(Error::DType { what: what.clone(), expected, got: tensor.dtype() });
            }
        }
        Ok(())
    }
}

/// Writes matrices and whole weights under PEFT's names; the file is whole or absent.
///
/// # Errors
/// When the file can't be written.
pub fn write_tensors(
    path: &Path,
    place: ModulePlace,
    modules: &[LoraTensors],
    saved: &BTreeMap<String, Tensor>,
) -> Result<()> {
    let named = modules.iter().flat_map(|it| {
        let module = place.name(&it.module);
        let name = |part| format!("{PREFIX}{module}.lora_{part}.weight");
        let magnitude = it
            .magnitude
            .as_ref()
            .map(|magnitude| (format!("{PREFIX}{module}.lora_magnitude_vector"), Stacked::vector(magnitude)));
        let matrices = [(name("A"), Stacked::new(&it.a)), (name("B"), Stacked::new(&it.b))];
        matrices.into_iter().chain(magnitude)
    });
    let saved = saved.iter().map(|(name, it)| (format!("{PREFIX}{}", place.name(name)), Stacked::new(it)));
    let metadata = HashMap::from([("format".to_string(), "pt".to_string())]);
    let bytes = safetensors::serialize(named.chain(saved), Some(metadata))
        .map_err(|error| Error::file(path, format!("can't be put together: {error}")))?;
    write_whole(path, &bytes)
}

/// The module that a tensor's name means, and whether it is A (0), B (1) or a magnitude (2).
fn split(module: &str) -> Result<(&str, usize), String> {
    let magnitude = ".lora_magnitude_vector";
    let named = module.strip_suffix(".weight").filter(|it| it.ends_with(magnitude)).unwrap_or(module);
    for (part, suffix) in [".lora_A.weight", ".lora_B.weight", magnitude].into_iter().enumerate() {
        if let Some(module) = named.strip_suffix(suffix) {
            return Ok((module, part));
        }
    }
    let what = match module {
        _ if module.ends_with("lora_B.bias") => "a bias beside B",
        _ if module.contains("lora_embedding_") => "an adapter on the embedding",
        _ if module.contains("lora_") => "another kind of adapter",
        _ => "a whole module saved beside the adapter",
    };
    Err(format!("tensor `{module}` is {what}, which is not there yet"))
}

/// A tensor as safetensors takes it.
struct Stacked<'a> {
    tensor: &'a Tensor,
    shape: Vec<usize>,
}

impl<'a> Stacked<'a> {
    fn new(tensor: &'a Tensor) -> Stacked<'a> {
        Stacked { tensor, shape: vec![tensor.rows(), tensor.cols()] }
    }

    fn vector(tensor: &'a Tensor) -> Stacked<'a> {
        Stacked { tensor, shape: vec![tensor.len()] }
    }
}

impl View for Stacked<'_> {
    fn dtype(&self) -> Dtype {
        match self.tensor.dtype() {
            DType::F16 => Dtype::F16,
            DType::BF16 => Dtype::BF16,
            _ => Dtype::F32,
        }
    }

    fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// Little-endian, whatever the machine.
    fn data(&self) -> Cow<'_, [u8]> {
        let bytes: Result<Vec<u8>> = match self.tensor.dtype() {
            DType::F16 => self.tensor.values().map(bytes_of(|it: &ferrotune_tensor::f16| it.to_le_bytes())),
            DType::BF16 => self.tensor.values().map(bytes_of(|it: &ferrotune_tensor::bf16| it.to_le_bytes())),
            _ => self.tensor.values().map(bytes_of(|it: &f32| it.to_le_bytes())),
        };
        // Bytes of another type are none, which safetensors refuses; `check` lets these three through.
        Cow::Owned(bytes.unwrap_or_default())
    }

    fn data_len(&self) -> usize {
        self.tensor.bytes()
    }
}

fn bytes_of<T, const N: usize>(bytes: impl Fn(&T) -> [u8; N]) -> impl Fn(&[T]) -> Vec<u8> {
    move |values| values.iter().flat_map(&bytes).collect()
}
