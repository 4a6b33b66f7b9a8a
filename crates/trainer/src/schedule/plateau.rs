use serde::{Deserialize, Serialize};

/// Lowers the learning rate when a metric stops getting better, as torch's `ReduceLROnPlateau`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Plateau {
    /// What the rate is multiplied by.
    pub factor: f64,
    /// Evaluations without progress that are borne.
    pub patience: usize,
    /// Evaluations after a lowering in which none is counted.
    pub cooldown: usize,
    /// What counts as progress.
    pub threshold: f64,
    /// The threshold is a difference, not a share.
    pub absolute: bool,
    /// A larger metric is better.
    pub greater_is_better: bool,
    /// The lowest rate.
    pub min_lr: f64,
    /// A smaller change of the rate is left.
    pub eps: f64,
    /// The best metric so far.
    pub best: Option<f64>,
    /// Evaluations without progress.
    pub num_bad_epochs: usize,
    /// Evaluations until counting begins again.
    pub cooldown_counter: usize,
}

impl Default for Plateau {
    fn default() -> Plateau {
        Plateau {
            factor: 0.1,
            patience: 10,
            cooldown: 0,
            threshold: 1e-4,
            absolute: false,
            greater_is_better: false,
            min_lr: 0.0,
            eps: 1e-8,
            best: None,
            num_bad_epochs: 0,
            cooldown_counter: 0,
        }
    }
}

impl Plateau {
    /// The rate after an evaluation that gave this metric.
    pub fn after(&mut self, metric: f64, rate: f64) -> f64 {
        let better = self.best.is_none_or(|best| match (self.greater_is_better, self.absolute) {
            (false, false) => metric < best * (1.0 - self.threshold),
            (false, true) => metric < best - self.threshold,
            (true, false) => metric > best * (1.0 + self.threshold),
            (true, true) => metric > best + self.threshold,
        });
        if better {
            self.best = Some(metric);
            self.num_bad_epochs = 0;
        } else {
            self.num_bad_epochs += 1;
        }
        if self.cooldown_counter > 0 {
            self.cooldown_counter -= 1;
            self.num_bad_epochs = 0;
        }
        if self.num_bad_epochs <= self.patience {
            return rate;
        }
        (self.cooldown_counter, self.num_bad_epochs) = (self.cooldown, 0);
        let lower = (rate * self.factor).max(self.min_lr);
        if rate - lower > self.eps { lower } else { rate }
    }
}
