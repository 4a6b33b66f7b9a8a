//! Optimizers: from gradients to new parameters.

mod adafactor;
mod adamw;
mod adamw_8bit;
mod gpu;
mod groups;
mod lion;
mod muon;
mod on_host;
mod sgd;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;

use ferrotune_nn::Parameter;
use ferrotune_tensor::{Device, Element, Error, Result, Tensor};

pub use adafactor::Adafactor;
pub use adamw::AdamW;
pub use adamw_8bit::AdamW8bit;
pub(crate) use gpu::square_sum;
pub use groups::ParameterGroups;
pub use lion::Lion;
pub use muon::Muon;
use on_host::in_host_memory;
pub use on_host::{Move, OnHost, Rule};
pub use sgd::Sgd;

/// Named tensors that an optimizer continues from.
pub type State = BTreeMap<String, Tensor>;

/// Takes steps. Parameters come in the same order every time.
pub trait Optimizer {
    /// One step down the gradients times `grad_scale` (clipping, loss scaling). Copies for products
    /// follow the parameters.
    ///
    /// # Errors
    /// When the parameters' types aren't taken.
    fn step(&mut self, parameters: &mut [&mut Parameter], learning_rate: f64, grad_scale: f64) -> Result<()>;

    /// All that a resumed run needs.
    ///
    /// # Errors
    /// When the device can't be read.
    fn state(&self) -> Result<State>;

    /// Goes on from a saved state.
    ///
    /// # Errors
    /// When the state isn't that of these parameters.
    fn restore(&mut self, state: State, parameters: &[&mut Parameter]) -> Result<()>;
}

/// Where an optimizer keeps its state.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum StateMemory {
    /// Beside the parameters.
    #[default]
    Device,
    /// In the host's memory, where the steps are then taken too (bitsandbytes' paged optimizers let the
    /// driver move pages instead): a card keeps its memory, and pays with copies of gradients and
    /// parameters. On the CPU it is the same.
    Host,
}

impl StateMemory {
    fn of(self, parameter: &Parameter) -> Device {
        match self {
            StateMemory::Device => parameter.value.device(),
            StateMemory::Host => Device::Cpu,
        }
    }
}

/// The count of steps in a saved state.
fn take_steps(state: &mut State) -> Result<u64> {
    let steps = take::<u32>(state, "step", (1, 1), &Device::Cpu)?;
    Ok(u64::from(steps.values::<u32>()?[0]))
}

/// Refuses a saved state of which something was not taken.
fn nothing_left(state: &State) -> Result<()> {
    match state.keys().next() {
        None => Ok(()),
        Some(name) => Err(Error::msg(format!(
            "optimizer state: `{name}` belongs to no trained parameter; was lora_target changed?"
        ))),
    }
}

/// Moves a tensor out of a saved state onto a device.
fn take<T: Element>(state: &mut State, name: &str, shape: (usize, usize), device: &Device) -> Result<Tensor> {
    let what = format!("optimizer state `{name}`");
    let tensor = state.remove(name).ok_or_else(|| Error::msg(format!("{what} is missing")))?;
    Error::check_shape(&what, shape, tensor.shape())?;
    if tensor.dtype() != T::DTYPE {
        return Err(Error::DType { what, expected: T::DTYPE.as_str(), got: tensor.dtype() });
    }
    tensor.to_device(device)
}
