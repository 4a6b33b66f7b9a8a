//! Parameter groups, as transformers' trainer and LLaMA-Factory's LoRA+ make them: which weights decay,
//! and which learn faster.

use ferrotune_nn::Parameter;

/// What differs between parameters.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct ParameterGroups {
    /// Decay of all parameters but biases and norms.
    pub weight_decay: f64,
    /// LoRA+ (Hayou et al. 2024): what the learning rate of B is multiplied by.
    pub loraplus_lr_ratio: Option<f64>,
}

/// The group of one parameter.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Group {
    /// What the learning rate is multiplied by.
    pub(crate) lr_ratio: f64,
    pub(crate) weight_decay: f64,
}

impl ParameterGroups {
    /// All alike but for biases and norms, which don't decay.
    pub fn with_decay(weight_decay: f64) -> ParameterGroups {
        ParameterGroups { weight_decay, loraplus_lr_ratio: None }
    }

    pub(crate) fn of(&self, parameter: &Parameter) -> Group {
        let name = &parameter.name;
        // LLaMA-Factory: B, and whatever is a vector.
        let faster = name.contains("lora_B") || name.contains("lora_magnitude_vector") || is_plain(name);
        Group {
            lr_ratio: self.loraplus_lr_ratio.filter(|_| faster).unwrap_or(1.0),
            weight_decay: if is_plain(name) { 0.0 } else { self.weight_decay },
        }
    }

    /// The distinct groups of some parameters, in the order of their first.
    pub(crate) fn among<'a>(&self, parameters: impl Iterator<Item = &'a Parameter>) -> Vec<Group> {
        let mut groups = Vec::new();
        for group in parameters.map(|it| self.of(it)) {
            if !groups.contains(&group) {
                groups.push(group);
            }
        }
        groups
    }
}

/// The parameter is a bias or belongs to a norm (`get_decay_parameter_names` of transformers/trainer.py).
fn is_plain(name: &str) -> bool {
    let name = name.to_lowercase();
    let norm = |part: &str| part == "norm" || part.ends_with("_norm");
    ["bias", "layernorm", "rmsnorm"].iter().any(|it| name.contains(it)) || name.split('.').any(norm)
}

#[cfg(test)]
mod tests {
    use super::*;
    use ferrotune_tensor::Tensor;

    fn check(groups: ParameterGroups, name: &str, lr_ratio: f64, weight_decay: f64) {
        let parameter = Parameter::new(name, Tensor::from_vec(1, 1, vec![0.0f32]).unwrap()).unwrap();
        assert_eq!(groups.of(&parameter), Group { lr_ratio, weight_decay }, "{name}");
    }

    #[test]
    fn biases_and_norms_do_not_decay_and_b_learns_faster() {
        let groups = ParameterGroups { weight_decay: 0.1, loraplus_lr_ratio: Some(16.0) };
        check(groups, "model.layers.0.mlp.up_proj.lora_A.weight", 1.0, 0.1);
        check(groups, "model.layers.0.mlp.up_proj.lora_B.weight", 16.0, 0.1);
        check(groups, "model.layers.0.mlp.up_proj.lora_magnitude_vector", 16.0, 0.1);
        let groups = ParameterGroups::with_decay(0.1);
        check(groups, "model.layers.0.mlp.up_proj.lora_B.weight", 1.0, 0.1);
        check(groups, "model.embed_tokens.weight", 1.0, 0.1);
        for name in ["model.norm.weight", "l.0.input_layernorm.weight", "a.q_norm.weight", "a.q_proj.bias"] {
            check(groups, name, 1.0, 0.0);
        }
    }
}
