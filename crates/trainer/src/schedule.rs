//! Learning rates by step, as transformers' `get_scheduler` gives them (transformers/optimization.py).

use std::str::FromStr;

/// How the learning rate goes after its warm-up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ScheduleKind {
    /// Down to 0 in a straight line.
    Linear,
    /// Down to 0 along half a cosine.
    Cosine,
    /// Stays, with no warm-up.
    Constant,
    /// Stays after its warm-up.
    ConstantWithWarmup,
}

impl FromStr for ScheduleKind {
    type Err = String;

    /// By transformers' names of `lr_scheduler_type`.
    fn from_str(name: &str) -> Result<ScheduleKind, String> {
        match name {
            "linear" => Ok(ScheduleKind::Linear),
            "cosine" => Ok(ScheduleKind::Cosine),
            "constant" => Ok(ScheduleKind::Constant),
            "constant_with_warmup" => Ok(ScheduleKind::ConstantWithWarmup),
            _ => Err(format!(
                "lr_scheduler_type `{name}` is not there yet; expected linear, cosine, constant or constant_with_warmup"
            )),
        }
    }
}

/// A learning rate for each step of a run.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Schedule {
    /// How it goes after the warm-up.
    pub kind: ScheduleKind,
    /// The highest rate.
    pub learning_rate: f64,
    /// Steps over which the rate rises from 0.
    pub warmup_steps: usize,
    /// Steps of the run.
    pub total_steps: usize,
}

impl Schedule {
    /// The rate of a step, counted from 0: with a warm-up the first step's is 0.
    pub fn at(&self, step: usize) -> f64 {
        let warmup = match self.kind {
            ScheduleKind::Constant => 0,
            _ => self.warmup_steps,
        };
        if step < warmup {
            return self.learning_rate * step as f64 / warmup.max(1) as f64;
        }
        let after = self.total_steps.saturating_sub(warmup).max(1) as f64;
        let share = match self.kind {
            ScheduleKind::Linear => (self.total_steps as f64 - step as f64).max(0.0) / after,
            ScheduleKind::Cosine => {
                let progress = (step - warmup) as f64 / after;
                (0.5 * (1.0 + (std::f64::consts::PI * progress).cos())).max(0.0)
            }
            ScheduleKind::Constant | ScheduleKind::ConstantWithWarmup => 1.0,
        };
        self.learning_rate * share
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(kind: &str, warmup_steps: usize, total_steps: usize, expected: &[f64]) {
        let schedule =
            Schedule { kind: kind.parse().unwrap(), learning_rate: 2e-3, warmup_steps, total_steps };
        for (step, expected) in expected.iter().enumerate() {
            let got = schedule.at(step);
            assert!((got - expected).abs() < 1e-12, "{kind}, step {step}: {got}, not {expected}");
        }
    }

    #[test]
    fn rates_are_those_of_transformers() {
        // transformers 5.23.0, LambdaLR: golden_train's log and get_scheduler by hand.
        check("linear", 5, 20, &[0.0, 0.0004, 0.0008, 0.0012, 0.0016, 0.002, 0.0018666666666666666]);
        check("linear", 0, 4, &[0.002, 0.0015, 0.001, 0.0005]);
        check("constant", 5, 20, &[0.002, 0.002]);
        check("constant_with_warmup", 2, 20, &[0.0, 0.001, 0.002, 0.002]);
        check("cosine", 1, 5, &[0.0, 0.002, 0.0017071067811865474, 0.001, 0.00029289321881345254]);
    }

    #[test]
    fn an_unknown_name_is_answered_with_the_known_ones() {
        assert!("polynomial".parse::<ScheduleKind>().unwrap_err().contains("linear, cosine"));
    }
}
