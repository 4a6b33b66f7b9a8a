//! Trained numbers to files and back.

use std::collections::HashMap;
use std::path::Path;

use ferrotune_export::PeftAdapter;
use ferrotune_model::Decoder;
use ferrotune_nn::{LanguageModel as _, Parameter};
use ferrotune_tensor::{DType, Error, Result, Tensor};

/// Puts the numbers of a folder that a run wrote into the model's parameters.
///
/// # Errors
/// When a file is damaged, or holds other parameters than the model has.
pub fn load_trained(model: &mut Decoder, folder: &Path) -> Result<()> {
    let adapter = PeftAdapter::read(folder)?;
    let tensors = adapter.tensors.into_iter().flat_map(|it| {
        [(format!("{}.lora_A.weight", it.module), it.a), (format!("{}.lora_B.weight", it.module), it.b)]
    });
    let mut tensors: HashMap<String, Tensor> = tensors.collect();
    for parameter in model.parameters() {
        let Some(tensor) = tensors.remove(&parameter.name) else {
            return Err(Error::file(folder, format!("has no `{}`, which is trained", parameter.name)));
        };
        set(parameter, tensor).map_err(|error| Error::file(folder, error.to_string()))?;
    }
    match tensors.keys().next() {
        None => Ok(()),
        Some(name) => Err(Error::file(folder, format!("has `{name}`, which is not trained"))),
    }
}

fn set(parameter: &mut Parameter, tensor: Tensor) -> Result<()> {
    let tensor = tensor.cast(DType::F32)?.to_device(&parameter.value.device())?;
    parameter.value.copy_from(&tensor)?;
    match &mut parameter.copy {
        Some(copy) => parameter.value.cast_into(copy),
        None => Ok(()),
    }
}
