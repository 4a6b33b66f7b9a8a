//! What was written, read again and compared with base and adapter side by side.

use std::path::Path;

use anyhow::bail;
use ferrotune_data::Tokenizer;
use ferrotune_export::{goes_into_bnb, with_saved};
use ferrotune_model::source::ModelFiles;
use ferrotune_model::spec::{CheckpointForm, names};
use ferrotune_model::{BuildOptions, Decoder};
use ferrotune_nn::{Context, LanguageModel as _};
use ferrotune_tensor::{DType, Precision};

use crate::config::{QuantizationBit, RunConfig};
use crate::console::Console;
use crate::run::{Adapters, build_decoder, build_quantised, merge_all, open_device, read_adapter};

/// Any text would do; tokens that models know are nearer to their use than random ones.
const TEXT: &str = "The quick brown fox jumps over the lazy dog. 1 + 2 = 3; 你好，世界!";
const TOKENS: usize = 32;

/// Logits of some tokens, and what they were computed with.
pub struct Logits {
    ids: Vec<u32>,
    /// (T, V), row after row.
    values: Vec<f32>,
    computing: BuildOptions,
    /// Those of the model before its weights were put into few bits, and how far these may be apart.
    few_bits: Option<(Vec<f32>, f64)>,
}

impl Logits {
    /// Those of the base model with the adapter beside its weights; hands back the base model alone.
    ///
    /// # Errors
    /// When a weight is damaged, or the adapter is another model's.
    pub fn of_live(
        config: &RunConfig,
        files: ModelFiles,
        tokenizer: &Tokenizer,
        console: &Console,
    ) -> anyhow::Result<(ModelFiles, Logits)> {
        let computing = open_device(config, console)?;
        let ids = ids(tokenizer, files.spec.vocab_size)?;
        let again = files.path.clone();
        let (files, adapters) = match config.adapter_name_or_path.split_last() {
            None => (files, Adapters::None),
            Some((last, beneath)) => {
                let files = merge_all(files, beneath)?;
                let mut adapter = read_adapter(last, &files.spec)?;
                let files = with_saved(files, std::mem::take(&mut adapter.saved))?;
                (files, Adapters::Trained(Box::new(adapter)))
            }
        };
        let (decoder, _) = build_decoder(config, &files, &computing, adapters)?;
        let values = logits(&decoder, &ids)?;
        Ok((open(config, &again)?, Logits { ids, values, computing, few_bits: None }))
    }

    /// Those of the merged model with its projections put into 4 bits in memory.
    ///
    /// # Errors
    /// When a weight is damaged.
    pub fn in_four_bits(self, config: &RunConfig, merged: &ModelFiles) -> anyhow::Result<Logits> {
        let config = RunConfig {
            quantization_bit: Some(QuantizationBit::Four),
            double_quantization: true,
            ..config.clone()
        };
        let decoder = build_quantised(&config, merged, &self.computing, &goes_into_bnb)?;
        let values = logits(&decoder, &self.ids)?;
        // Where a checkpoint fuses projections, scales are quantised for all of them together; a GPU sums scales in
        // another order.
        let same = merged.spec.checkpoint != CheckpointForm::Fused && self.computing.device.gpu().is_none();
        let allowed = if same { 1e-6 } else { 5e-2 };
        Ok(Logits { few_bits: Some((self.values, allowed)), values, ..self })
    }

    /// Those of the merged model with its weights rounded as another format rounds them.
    ///
    /// # Errors
    /// When a weight is damaged.
    pub fn rounded_as(self, rounded: &ModelFiles, config: &RunConfig) -> anyhow::Result<Logits> {
        let (decoder, _) = build_decoder(config, rounded, &self.computing, Adapters::None)?;
        let values = logits(&decoder, &self.ids)?;
        let few_bits = Some((self.values.clone(), self.allowed(DType::F32)));
        Ok(Logits { few_bits, values, ..self })
    }

    /// Compares them with those of a folder, and says how far they are apart.
    ///
    /// # Errors
    /// When they are farther apart than rounding explains, or the folder can't be read.
    pub fn compare(&self, config: &RunConfig, folder: &Path, console: &Console) -> anyhow::Result<()> {
        let files = open(config, folder)?;
        let stored = files.source.dtype(&names::weight(0, names::O))?;
        let (decoder, _) = build_decoder(config, &files, &self.computing, Adapters::None)?;
        let got = logits(&decoder, &self.ids)?;
        let off = difference(&self.values, &got);
        let (of, allowed) = match &self.few_bits {
            None => ("base and adapter", self.allowed(stored)),
            Some((_, allowed)) => ("the merged model in few bits", *allowed),
        };
        if off.is_nan() || off > allowed {
            bail!(
                "{}: its logits differ by {off:.1e} of the largest from those of {of}, expected {allowed:.0e} or less: \
                 what was written is wrong; please report this",
                folder.display()
            );
        }
        console.plain(match &self.few_bits {
            None => format!(
                "verified: logits differ by {off:.1e} of the largest (up to {allowed:.0e} is rounding)"
            ),
            Some((whole, _)) => format!(
                "verified: logits are those of the merged model in few bits (they differ by {off:.1e} of the largest), \
                 which differ by {:.1e} from those of base and adapter",
                difference(whole, &got)
            ),
        });
        Ok(())
    }

    /// What rounding of weights and activations may come to.
    fn allowed(&self, stored: DType) -> f64 {
        let of = |dtype: DType| match dtype {
            DType::BF16 => 5e-2,
            DType::F16 => 1e-2,
            _ => 1e-4,
        };
        let computed = match self.computing.precision {
            Precision::Bf16 => DType::BF16,
            Precision::Full => self.computing.dtype,
        };
        f64::max(of(stored), of(computed))
    }
}

/// Tokens of a text; where the tokenizer hasn't enough for it, numbers over the whole vocabulary.
fn ids(tokenizer: &Tokenizer, vocab_size: usize) -> anyhow::Result<Vec<u32>> {
    let mut ids = tokenizer.encode_plain(TEXT)?;
    ids.retain(|it| (*it as usize) < vocab_size);
    ids.truncate(TOKENS);
    let more = (0..TOKENS / 2).map(|it| (it * vocab_size / (TOKENS / 2)) as u32);
    if ids.len() < TOKENS / 2 {
        ids.extend(more);
    }
    Ok(ids)
}

fn logits(decoder: &Decoder, ids: &[u32]) -> anyhow::Result<Vec<f32>> {
    let hidden = decoder.hidden(&Context::new(vec![0, ids.len()]), ids)?;
    Ok(decoder.logits(&hidden)?.to_f32()?)
}

/// A model with the rope that the config asks for.
fn open(config: &RunConfig, path: &Path) -> anyhow::Result<ModelFiles> {
    let mut files = ModelFiles::open(path)?;
    files.spec.settle_rope(config.cutoff_len);
    Ok(files)
}

/// The largest difference by the largest number; not a number where one isn't.
fn difference(expected: &[f32], got: &[f32]) -> f64 {
    let not_less = |most: f64, it: f64| if it.is_nan() || it > most { it } else { most };
    let off = expected.iter().zip(got).map(|(a, b)| f64::from(a - b).abs()).fold(0.0, not_less);
    let largest = expected.iter().map(|it| f64::from(it.abs())).fold(0.0, not_less);
    if expected.len() == got.len() && largest > 0.0 { off / largest } else { f64::NAN }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn differences_are_relative_and_what_is_no_number_counts() {
        assert_eq!(difference(&[1.0, -4.0], &[1.5, -4.0]), 0.125);
        assert!(difference(&[1.0, 2.0], &[1.0, f32::NAN]).is_nan());
        assert!(difference(&[1.0, f32::NAN], &[1.0, 2.0]).is_nan());
        assert!(difference(&[1.0, 2.0], &[1.0]).is_nan());
    }
    #[test]
    fn a_folder_that_computes_something_else_is_an_error() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures/llama_tiny");
        let (config, console) = (RunConfig { device: "cpu".into(), ..RunConfig::default() }, quiet());
        let tokenizer = Tokenizer::from_folder(&folder).unwrap();
        let files = ModelFiles::open(&folder).unwrap();
        let (_, mut logits) = Logits::of_live(&config, files, &tokenizer, &console).unwrap();
        assert_eq!(logits.ids.len(), TOKENS);
        logits.compare(&config, &folder, &console).unwrap();
        logits.values[7] += 0.1;
        let error = logits.compare(&config, &folder, &console).unwrap_err().to_string();
        assert!(error.contains("what was written is wrong"), "{error}");
    }

    fn quiet() -> Console {
        Console::new(true, crate::console::ColorChoice::Never)
    }
}
