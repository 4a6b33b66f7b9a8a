use ferrotune_tensor::{Error, Result};

use crate::Initial;

/// Which projections get an adapter.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Target {
    /// Every projection except the output head.
    All,
    /// Those whose name is one of these, or ends with `.` and one of these.
    Names(Vec<String>),
}

/// The settings of the adapters of a run, by PEFT's names.
#[derive(Clone, Debug, PartialEq)]
pub struct LoraConfig {
    /// Rank.
    pub r: usize,
    /// Numerator of the scaling.
    pub lora_alpha: f64,
    /// Share of an adapter's inputs that is dropped in training.
    pub lora_dropout: f64,
    /// Scaling alpha/√r instead of alpha/r.
    pub use_rslora: bool,
    /// DoRA: a trained magnitude for each output.
    pub use_dora: bool,
    /// Which projections get an adapter.
    pub target_modules: Target,
    /// Projections that don't, by the same rule of names.
    pub exclude_modules: Vec<String>,
    /// Layers whose projections get an adapter; empty: all of them.
    pub layers_to_transform: Vec<usize>,
    /// What A and B begin as.
    pub initial: Initial,
    /// Seed of the initialisation and of dropout.
    pub seed: u64,
}

impl Default for LoraConfig {
    /// As PEFT's: rank and alpha 8, on every projection.
    fn default() -> LoraConfig {
        LoraConfig {
            r: 8,
            lora_alpha: 8.0,
            lora_dropout: 0.0,
            use_rslora: false,
            use_dora: false,
            target_modules: Target::All,
            exclude_modules: Vec::new(),
            layers_to_transform: Vec::new(),
            initial: Initial::Zero,
            seed: 0,
        }
    }
}

impl LoraConfig {
    /// What the low-rank product is multiplied by.
    pub fn scaling(&self) -> f64 {
        if self.use_rslora {
            self.lora_alpha / (self.r as f64).sqrt()
        } else {
            self.lora_alpha / self.r as f64
        }
    }

    /// Whether the projection of this canonical name gets an adapter.
    pub fn adapts(&self, name: &str) -> bool {
        let wanted = match &self.target_modules {
            Target::All => true,
            Target::Names(names) => names.iter().any(|it| is_or_ends(name, it)),
        };
        let layer = || name.split('.').find_map(|part| part.parse::<usize>().ok());
        let layers = &self.layers_to_transform;
        let wanted = wanted && (layers.is_empty() || layer().is_some_and(|layer| layers.contains(&layer)));
        wanted && !self.exclude_modules.iter().any(|it| is_or_ends(name, it))
    }

    /// Checks the numbers, and that every named target meets one of the model's projections.
    ///
    /// # Errors
    /// Naming the key, what it is and what was expected.
    pub fn check(&self, projections: &[String]) -> Result<()> {
        if self.r == 0 {
            return Err(Error::msg("lora_rank is 0; expected at least 1"));
        }
        if !(0.0..1.0).contains(&self.lora_dropout) {
            return Err(Error::msg(format!(
                "lora_dropout is {}; expected 0 up to below 1",
                self.lora_dropout
            )));
        }
        if let Target::Names(names) = &self.target_modules {
            for name in names {
                if !projections.iter().any(|it| is_or_ends(it, name)) {
                    let mut kinds: Vec<&str> =
                        projections.iter().filter_map(|it| it.rsplit('.').next()).collect();
                    kinds.sort_unstable();
                    kinds.dedup();
                    return Err(Error::msg(format!(
                        "lora_target `{name}` is no projection of this model; it has {}",
                        kinds.join(", ")
                    )));
                }
            }
        }
        let inside = |layer: &usize| {
            let part = format!(".{layer}.");
            projections.iter().any(|it| it.contains(&part))
        };
        if let Some(layer) = self.layers_to_transform.iter().find(|it| !inside(it)) {
            return Err(Error::msg(format!(
                "layers_to_transform: the model has no layer {layer}; they count from 0"
            )));
        }
        if !projections.iter().any(|it| self.adapts(it)) {
            return Err(Error::msg("no projection is left to adapt; check lora_target and the exclusions"));
        }
        Ok(())
    }
}

fn is_or_ends(name: &str, target: &str) -> bool {
    name == target || name.strip_suffix(target).is_some_and(|rest| rest.ends_with('.'))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(target_modules: Target, exclude: &[&str]) -> LoraConfig {
        let exclude_modules = exclude.iter().map(|it| it.to_string()).collect();
        LoraConfig { r: 16, lora_alpha: 32.0, target_modules, exclude_modules, ..LoraConfig::default() }
    }

    #[test]
    fn names_are_met_whole_or_by_their_end() {
        let some = config(Target::Names(vec!["q_proj".into(), "layers.1.mlp.up_proj".into()]), &[]);
        assert!(some.adapts("model.layers.0.self_attn.q_proj"));
        assert!(!some.adapts("model.layers.0.self_attn.xq_proj"));
        assert!(some.adapts("model.layers.1.mlp.up_proj") && !some.adapts("model.layers.11.mlp.up_proj"));
        let all = config(Target::All, &["k_proj"]);
        assert!(all.adapts("a.v_proj") && !all.adapts("a.k_proj"));
    }

    #[test]
    fn some_layers_alone_are_adapted() {
        let some = LoraConfig { layers_to_transform: vec![1, 11], ..config(Target::All, &["k_proj"]) };
        for (name, adapted) in
            [("layers.1.q_proj", true), ("layers.1.k_proj", false), ("layers.2.q_proj", false)]
        {
            assert_eq!(some.adapts(&format!("model.{name}")), adapted, "{name}");
        }
        assert!(some.adapts("model.layers.11.mlp.up_proj"));
        let projections = ["model.layers.1.q_proj".to_string()];
        let error = some.check(&projections).unwrap_err().to_string();
        assert_eq!(error, "layers_to_transform: the model has no layer 11; they count from 0");
    }

    #[test]
    fn scaling_follows_the_kind() {
        assert_eq!(config(Target::All, &[]).scaling(), 2.0);
        assert_eq!(LoraConfig { use_rslora: true, ..config(Target::All, &[]) }.scaling(), 8.0);
    }

    #[test]
    fn a_target_that_meets_nothing_is_named() {
        let projections = ["m.q_proj".to_string(), "m.up_proj".to_string()];
        let error =
            config(Target::Names(vec!["W_pack".into()]), &[]).check(&projections).unwrap_err().to_string();
        assert_eq!(error, "lora_target `W_pack` is no projection of this model; it has q_proj, up_proj");
        assert!(config(Target::All, &["q_proj", "up_proj"]).check(&projections).is_err());
    }
}
