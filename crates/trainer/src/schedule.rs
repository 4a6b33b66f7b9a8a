//! Learning rates by step, as transformers' `get_scheduler` gives them (transformers/optimization.py).

mod plateau;

use std::collections::BTreeMap;
use std::f64::consts::PI;

pub use plateau::Plateau;

/// How the learning rate goes after its warm-up; `w` is where that ends, `n` the run's steps.
#[derive(Clone, Debug, PartialEq)]
pub enum ScheduleKind {
    /// Down to 0 in a straight line.
    Linear,
    /// Along a cosine: half a wave for 0.5 cycles.
    Cosine {
        /// Waves.
        num_cycles: f64,
        /// Where it ends, as a share of the highest rate.
        min_lr_rate: f64,
    },
    /// Half a cosine down to 0, several times.
    CosineWithRestarts {
        /// How many times.
        num_cycles: f64,
    },
    /// (1 − progress)^power, down to `lr_end`.
    Polynomial {
        /// The last rate.
        lr_end: f64,
        /// Of the curve.
        power: f64,
    },
    /// Stays, with no warm-up.
    Constant,
    /// Stays after its warm-up.
    ConstantWithWarmup,
    /// 1/√(1 + (step − w)/timescale)
    InverseSqrt {
        /// w where none is given, or 10000 without a warm-up.
        timescale: Option<f64>,
    },
    /// Up, level, down.
    WarmupStableDecay {
        /// Steps down.
        num_decay_steps: usize,
        /// Level steps; what is left of the run where none are given.
        num_stable_steps: Option<usize>,
        /// The way up.
        warmup_type: Ramp,
        /// The way down.
        decay_type: Ramp,
        /// Where it begins and ends, as a share of the highest rate.
        min_lr_ratio: f64,
        /// Waves of a cosine's way down.
        num_cycles: f64,
    },
    /// Level after the warm-up until an evaluation brings no progress: [`Plateau`].
    ReduceLrOnPlateau(Plateau),
}

/// The way from one level to another.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ramp {
    /// A straight line.
    Linear,
    /// Half a cosine.
    Cosine,
    /// 1 − √progress down, 1 − √(1 − progress) up.
    OneMinusSqrt,
}

/// `lr_scheduler_kwargs`, of which each entry has to be taken.
struct Arguments<'a>(BTreeMap<&'a str, &'a str>);

impl Arguments<'_> {
    fn number(&mut self, name: &str) -> Result<Option<f64>, String> {
        let read = |text: &str| match text.parse::<f64>() {
            Ok(number) if number.is_finite() && number >= 0.0 => Ok(number),
            _ => Err(format!("`{name}`: expected a number, 0 or more, found {text}")),
        };
        self.0.remove(name).map(read).transpose()
    }

    fn count(&mut self, name: &str) -> Result<Option<usize>, String> {
        match self.number(name)? {
            Some(number) if number.fract() != 0.0 => {
                Err(format!("`{name}`: expected a whole number, found {number}"))
            }
            number => Ok(number.map(|it| it as usize)),
        }
    }

    fn ramp(&mut self, name: &str, default: Ramp) -> Result<Ramp, String> {
        match self.0.remove(name) {
            None => Ok(default),
            Some("linear") => Ok(Ramp::Linear),
            Some("cosine") => Ok(Ramp::Cosine),
            Some("1-sqrt") => Ok(Ramp::OneMinusSqrt),
            Some(other) => Err(format!("`{name}`: expected linear, cosine or 1-sqrt, found {other}")),
        }
    }

    /// One of two words; whether it is the second.
    fn choice(&mut self, name: &str, [first, second]: [&str; 2]) -> Result<bool, String> {
        match self.0.remove(name) {
            Some(it) if it == second => Ok(true),
            Some(it) if it != first => Err(format!("`{name}`: expected {first} or {second}, found {it}")),
            _ => Ok(false),
        }
    }
}

impl ScheduleKind {
    /// By transformers' names of `lr_scheduler_type` and of `lr_scheduler_kwargs`.
    ///
    /// # Errors
    /// Naming what is unknown, missing or out of range.
    pub fn named(
        name: &str,
        arguments: &BTreeMap<String, String>,
        learning_rate: f64,
    ) -> Result<ScheduleKind, String> {
        let mut it = Arguments(arguments.iter().map(|(key, value)| (key.as_str(), value.as_str())).collect());
        let kind = match name {
            "linear" => ScheduleKind::Linear,
            "constant" => ScheduleKind::Constant,
            "constant_with_warmup" => ScheduleKind::ConstantWithWarmup,
            "cosine" => {
                ScheduleKind::Cosine { num_cycles: it.number("num_cycles")?.unwrap_or(0.5), min_lr_rate: 0.0 }
            }
            "cosine_with_min_lr" => {
                let num_cycles = it.number("num_cycles")?.unwrap_or(0.5);
                let min_lr_rate = match (it.number("min_lr")?, it.number("min_lr_rate")?) {
                    (Some(rate), None) => rate / learning_rate,
                    (None, Some(share)) => share,
                    _ => return Err(format!("{name} needs `min_lr` or `min_lr_rate`, one of them")),
                };
                ScheduleKind::Cosine { num_cycles, min_lr_rate }
            }
            "cosine_with_restarts" => {
                ScheduleKind::CosineWithRestarts { num_cycles: it.count("num_cycles")?.unwrap_or(1) as f64 }
            }
            "polynomial" => {
                let (lr_end, power) = (it.number("lr_end")?, it.number("power")?);
                let (lr_end, power) = (lr_end.unwrap_or(1e-7), power.unwrap_or(1.0));
                if lr_end >= learning_rate {
                    return Err(format!("`lr_end` is {lr_end}, expected less than `learning_rate`"));
                }
                ScheduleKind::Polynomial { lr_end, power }
            }
            "inverse_sqrt" => ScheduleKind::InverseSqrt { timescale: it.number("timescale")? },
            "warmup_stable_decay" => ScheduleKind::WarmupStableDecay {
                num_decay_steps: it
                    .count("num_decay_steps")?
                    .ok_or_else(|| format!("{name} needs `num_decay_steps`"))?,
                num_stable_steps: it.count("num_stable_steps")?,
                warmup_type: it.ramp("warmup_type", Ramp::Linear)?,
                decay_type: it.ramp("decay_type", Ramp::Cosine)?,
                min_lr_ratio: it.number("min_lr_ratio")?.unwrap_or(0.0),
                num_cycles: it.number("num_cycles")?.unwrap_or(0.5),
            },
            "reduce_lr_on_plateau" => {
                let defaults = Plateau::default();
                let factor = it.number("factor")?.unwrap_or(defaults.factor);
                if factor >= 1.0 {
                    return Err(format!("`factor` is {factor}, expected less than 1"));
                }
                ScheduleKind::ReduceLrOnPlateau(Plateau {
                    factor,
                    patience: it.count("patience")?.unwrap_or(defaults.patience),
                    cooldown: it.count("cooldown")?.unwrap_or(defaults.cooldown),
                    threshold: it.number("threshold")?.unwrap_or(defaults.threshold),
                    min_lr: it.number("min_lr")?.unwrap_or(defaults.min_lr),
                    eps: it.number("eps")?.unwrap_or(defaults.eps),
                    absolute: it.choice("threshold_mode", ["rel", "abs"])?,
                    greater_is_better: it.choice("mode", ["min", "max"])?,
                    ..defaults
                })
            }
            _ => return Err(format!("{name} is no schedule")),
        };
        match it.0.keys().next() {
            None => Ok(kind),
            Some(key) => Err(format!("`{key}` is nothing that {name} takes")),
        }
    }
}

/// A learning rate for each step of a run.
#[derive(Clone, Debug, PartialEq)]
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
        self.learning_rate * self.share(step)
    }

    fn share(&self, step: usize) -> f64 {
        let warmup = match self.kind {
            ScheduleKind::Constant | ScheduleKind::ReduceLrOnPlateau(_) => 0,
            _ => self.warmup_steps,
        };
        if step < warmup {
            let progress = step as f64 / warmup as f64;
            return match self.kind {
                ScheduleKind::WarmupStableDecay { warmup_type, min_lr_ratio, .. } => {
                    warmup_type.left(1.0 - progress, 0.5) * (1.0 - min_lr_ratio) + min_lr_ratio
                }
                _ => progress,
            };
        }
        let after = self.total_steps.saturating_sub(warmup).max(1) as f64;
        let since = (step - warmup) as f64;
        let progress = since / after;
        match self.kind {
            ScheduleKind::Linear => (self.total_steps as f64 - step as f64).max(0.0) / after,
            ScheduleKind::Cosine { num_cycles, min_lr_rate } => {
                let factor = 0.5 * (1.0 + (PI * num_cycles * 2.0 * progress).cos());
                (factor * (1.0 - min_lr_rate) + min_lr_rate).max(0.0)
            }
            ScheduleKind::CosineWithRestarts { .. } if progress >= 1.0 => 0.0,
            ScheduleKind::CosineWithRestarts { num_cycles } => {
                0.5 * (1.0 + (PI * (num_cycles * progress).fract()).cos())
            }
            ScheduleKind::Polynomial { lr_end, power } => {
                let end = lr_end / self.learning_rate;
                match step > self.total_steps {
                    true => end,
                    false => (1.0 - end) * (1.0 - progress).max(0.0).powf(power) + end,
                }
            }
            ScheduleKind::Constant | ScheduleKind::ConstantWithWarmup => 1.0,
            // What evaluations made of it is multiplied in by who runs them.
            ScheduleKind::ReduceLrOnPlateau(_) => 1.0,
            ScheduleKind::InverseSqrt { timescale } => {
                let default = if warmup > 0 { warmup as f64 } else { 10_000.0 };
                1.0 / (1.0 + since / timescale.unwrap_or(default)).sqrt()
            }
            ScheduleKind::WarmupStableDecay {
                num_decay_steps,
                num_stable_steps,
                decay_type,
                min_lr_ratio,
                num_cycles,
                ..
            } => {
                let rest = self.total_steps.saturating_sub(warmup + num_decay_steps);
                let level = num_stable_steps.unwrap_or(rest) as f64;
                let progress = (since - level) / num_decay_steps.max(1) as f64;
                match progress {
                    it if it < 0.0 => 1.0,
                    it if it < 1.0 => {
                        let left = decay_type.left(it, num_cycles);
                        (left * (1.0 - min_lr_ratio) + min_lr_ratio).max(0.0)
                    }
                    _ => min_lr_ratio,
                }
            }
        }
    }
}

impl Ramp {
    /// What is left of 1 on the way to 0.
    fn left(self, progress: f64, num_cycles: f64) -> f64 {
        match self {
            Ramp::Linear => 1.0 - progress,
            Ramp::Cosine => 0.5 * (1.0 + (PI * num_cycles * 2.0 * progress).cos()),
            Ramp::OneMinusSqrt => 1.0 - progress.sqrt(),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use serde_json::Value;

    use super::*;

    fn fixture(name: &str) -> Vec<Value> {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures/schedules.json");
        let all: Value = serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap();
        all[name].as_array().unwrap().clone()
    }

    fn arguments(it: &Value) -> BTreeMap<String, String> {
        let text = |value: &Value| value.as_str().map_or_else(|| value.to_string(), str::to_string);
        it["kwargs"].as_object().unwrap().iter().map(|(key, value)| (key.clone(), text(value))).collect()
    }

    fn numbers(it: &Value) -> Vec<f64> {
        it.as_array().unwrap().iter().map(|it| it.as_f64().unwrap()).collect()
    }

    #[test]
    fn rates_are_those_of_transformers() {
        let all = fixture("schedules");
        assert_eq!(all.len(), 32);
        for it in all {
            let kind = it["kind"].as_str().unwrap();
            let schedule = Schedule {
                kind: ScheduleKind::named(kind, &arguments(&it), 2e-3).unwrap(),
                learning_rate: 2e-3,
                warmup_steps: it["warmup_steps"].as_u64().unwrap() as usize,
                total_steps: it["total_steps"].as_u64().unwrap() as usize,
            };
            for (step, expected) in numbers(&it["rates"]).into_iter().enumerate() {
                let got = schedule.at(step);
                assert!((got - expected).abs() < 1e-6 * 2e-3, "{it}, step {step}: {got}, not {expected}");
            }
        }
    }

    #[test]
    fn plateaus_are_those_of_pytorch() {
        let all = fixture("plateaus");
        assert_eq!(all.len(), 3);
        for it in all {
            let kind = ScheduleKind::named("reduce_lr_on_plateau", &arguments(&it), 2e-3).unwrap();
            let ScheduleKind::ReduceLrOnPlateau(mut plateau) = kind else { panic!("another kind") };
            let mut rate = 2e-3;
            for (metric, expected) in numbers(&it["metrics"]).into_iter().zip(numbers(&it["rates"])) {
                rate = plateau.after(metric, rate);
                assert!((rate - expected).abs() < 1e-12, "{it}: {rate}, not {expected}");
                // What a checkpoint keeps goes on alike.
                let text = serde_json::to_string(&plateau).unwrap();
                assert_eq!(plateau, serde_json::from_str::<Plateau>(&text).unwrap());
            }
        }
    }

    #[test]
    fn arguments_that_are_wrong() {
        let check = |name: &str, key: &str, value: &str, said: &str| {
            let arguments = BTreeMap::from([(key.to_string(), value.to_string())]);
            let error = ScheduleKind::named(name, &arguments, 1e-3).unwrap_err();
            assert!(error.contains(said), "{error}");
        };
        check("linear", "num_cycles", "1", "`num_cycles` is nothing that linear takes");
        check("cosine", "num_cycles", "many", "`num_cycles`: expected a number");
        check("cosine_with_restarts", "num_cycles", "1.5", "expected a whole number");
        check("warmup_stable_decay", "min_lr_ratio", "0.1", "needs `num_decay_steps`");
        check("cosine_with_min_lr", "num_cycles", "1", "needs `min_lr` or `min_lr_rate`");
        check("polynomial", "lr_end", "0.1", "expected less than `learning_rate`");
        check("reduce_lr_on_plateau", "mode", "best", "expected min or max");
        check("reduce_lr_on_plateau", "factor", "1", "expected less than 1");
    }
}
