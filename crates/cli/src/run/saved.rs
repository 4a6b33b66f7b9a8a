//! The trained adapter as PEFT stores it, and back.
//!
//! One that began by PiSSA is for a base that lost s·B₀·A₀; it is stored for the whole one, as PEFT converts it:
//! s·(B·A − B₀·A₀) = s·[B −B₀]·[A; A₀], of twice the rank.

use ferrotune_export::{LoraTensors, ModulePlace, Modules, PeftAdapter};
use ferrotune_model::Decoder;
use ferrotune_nn::LanguageModel as _;
use ferrotune_tensor::{Error, Result, Tensor};

use super::OpenModel;
use super::decoder::{Subtracted, lora_tensors};
use crate::config::RunConfig;

/// The trained adapter as PEFT stores it.
///
/// # Errors
/// When a tensor can't be read.
pub fn peft_adapter(
    config: &RunConfig,
    base: &OpenModel,
    model: &mut Decoder,
    subtracted: &Subtracted,
) -> Result<PeftAdapter> {
    let mut modules = lora_tensors(model, |it| &it.value)?;
    let saved = model.parameters().into_iter().filter(|it| !it.name.contains(".lora_"));
    let saved = saved.map(|it| Ok((it.name.clone(), it.value.to_cpu()?))).collect::<Result<_>>()?;
    // PEFT takes kinds of modules; all of them, where all are meant.
    let mut kinds: Vec<String> =
        modules.iter().filter_map(|it| Some(it.module.rsplit('.').next()?.to_string())).collect();
    kinds.sort_unstable();
    kinds.dedup();
    let target_modules = match config.lora_target.iter().any(|it| it == "all") {
        true => kinds,
        false => config.lora_target.clone(),
    };
    let (mut r, mut lora_alpha) = (config.lora_rank, config.alpha());
    if !subtracted.is_empty() {
        modules = modules.into_iter().map(|it| join_pissa(it, subtracted)).collect::<Result<_>>()?;
        r *= 2;
        lora_alpha *= if config.use_rslora { 2f64.sqrt() } else { 2.0 };
    }
    Ok(PeftAdapter {
        base_model_name_or_path: base.name.clone(),
        place: ModulePlace::of(&base.files),
        revision: None,
        r,
        lora_alpha,
        lora_dropout: config.lora_dropout,
        use_rslora: config.use_rslora,
        use_dora: config.use_dora,
        target_modules: Modules::Names(target_modules),
        exclude_modules: (!config.lora_exclude.is_empty())
            .then(|| Modules::Names(config.lora_exclude.clone())),
        layers_to_transform: config.layers_to_transform.clone(),
        saved,
        tensors: modules,
    })
}

/// [A; A₀] and [B −B₀]
fn join_pissa(module: LoraTensors, subtracted: &Subtracted) -> Result<LoraTensors> {
    let Some((a0, b0)) = subtracted.get(&module.module) else {
        return Err(Error::msg(format!("`{}` has no beginning by PiSSA", module.module)));
    };
    let (r, (rows, cols)) = (module.a.rows(), (module.b.rows(), module.a.cols()));
    let mut a = module.a.zeros_like(2 * r, cols)?;
    a.write_block((0, 0), &module.a, (0..r, 0..cols))?;
    a.write_block((r, 0), a0, (0..r, 0..cols))?;
    let mut less = b0.try_clone()?;
    less.scale(-1.0)?;
    let mut b = module.b.zeros_like(rows, 2 * r)?;
    b.write_block((0, 0), &module.b, (0..rows, 0..r))?;
    b.write_block((0, r), &less, (0..rows, 0..r))?;
    Ok(LoraTensors { a, b, ..module })
}

/// The trained A and B, and A₀ and B₀, of what [`peft_adapter`] joined.
///
/// # Errors
/// When the rank isn't twice `r`.
pub fn split_pissa(module: LoraTensors, r: usize) -> Result<(LoraTensors, LoraTensors)> {
    let LoraTensors { module, a, b, magnitude } = module;
    Error::check_shape(
        &format!("A of `{module}` with its beginning by PiSSA"),
        (2 * r, a.cols()),
        a.shape(),
    )?;
    let part = |first: usize| -> Result<(Tensor, Tensor)> {
        let mut own = (a.zeros_like(r, a.cols())?, b.zeros_like(b.rows(), r)?);
        own.0.write_block((0, 0), &a, (first..first + r, 0..a.cols()))?;
        own.1.write_block((0, 0), &b, (0..b.rows(), first..first + r))?;
        Ok(own)
    };
    let ((trained_a, trained_b), (first_a, mut first_b)) = (part(0)?, part(r)?);
    first_b.scale(-1.0)?;
    let first = LoraTensors { module: module.clone(), a: first_a, b: first_b, magnitude: None };
    Ok((LoraTensors { module, a: trained_a, b: trained_b, magnitude }, first))
}
