//! Dynamic loss scaling for f16 (Micikevicius et al. 2018, "Mixed Precision Training"), with the
//! numbers of PyTorch's `GradScaler`.

use serde::{Deserialize, Serialize};

/// Good steps after which the scale is doubled.
const GROWTH_INTERVAL: u32 = 2000;
/// Where it starts.
const FIRST: f64 = 65536.0;

/// What the loss is multiplied by before the backward pass.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct LossScale {
    /// The factor.
    pub value: f64,
    good_steps: u32,
    dynamic: bool,
}

impl LossScale {
    /// Always 1.
    pub fn none() -> LossScale {
        LossScale { value: 1.0, good_steps: 0, dynamic: false }
    }

    /// For f16.
    pub fn dynamic() -> LossScale {
        LossScale { value: FIRST, good_steps: 0, dynamic: true }
    }

    /// The scale to go on with from a saved one: this one, where that is of another kind because the run
    /// moved to a device that computes in another type.
    pub(crate) fn resumed_from(self, saved: Option<LossScale>) -> LossScale {
        saved.filter(|saved| saved.dynamic == self.dynamic).unwrap_or(self)
    }

    /// Halved after an overflow, doubled after many steps without one.
    ///
    /// # Errors
    /// When it has fallen so far that the gradients themselves must be infinite.
    pub(crate) fn update(&mut self, overflowed: bool) -> ferrotune_tensor::Result<()> {
        if !self.dynamic {
            return Ok(());
        }
        if overflowed {
            (self.value, self.good_steps) = (self.value / 2.0, 0);
            if self.value < 1.0 {
                let message = "gradients stay infinite in f16 however small the loss is scaled; lower learning_rate, or look for damaged samples with `ferrotune data`";
                return Err(ferrotune_tensor::Error::msg(message));
            }
        } else {
            self.good_steps += 1;
            if self.good_steps == GROWTH_INTERVAL {
                (self.value, self.good_steps) = (self.value * 2.0, 0);
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_halves_at_once_and_doubles_late() {
        let mut scale = LossScale::dynamic();
        scale.update(true).unwrap();
        assert_eq!(scale.value, FIRST / 2.0);
        (0..GROWTH_INTERVAL).for_each(|_| scale.update(false).unwrap());
        assert_eq!(scale.value, FIRST);
        let mut scale = LossScale { value: 1.0, ..LossScale::dynamic() };
        assert!(scale.update(true).is_err());
        let halved = LossScale { value: 32768.0, ..LossScale::dynamic() };
        assert_eq!(LossScale::dynamic().resumed_from(Some(halved)), halved);
        assert_eq!(LossScale::dynamic().resumed_from(Some(LossScale::none())), LossScale::dynamic());
        assert_eq!(LossScale::none().resumed_from(Some(halved)), LossScale::none());
        let mut fixed = LossScale::none();
        fixed.update(true).unwrap();
        assert_eq!(fixed.value, 1.0);
    }
}
