//! Adapters that begin with a part of the weight.
//!   PiSSA (Meng et al. 2024): W ≈ U·diag(σ)·Vᵀ;  B = U·√(σ/s), A = √(σ/s)·Vᵀ;  the frozen weight is W − s·B·A
//!   LoftQ (Li et al. 2023), one round: the same of W − Q, Q the quantised weight, which stays as it is
//! PEFT's LoftQ leaves s out, and is right for alpha = r alone.

use ferrotune_tensor::{Counter, DType, Operand, Precision, Result, Tensor, multiply, stream_of};

use crate::svd::{Iterations, leading};
use crate::{LoraAdapter, LoraConfig};

/// What A and B begin as.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Initial {
    /// A random, B zero.
    Zero,
    /// The weight's leading directions.
    Pissa(Iterations),
    /// What quantising takes from the weight.
    Loftq,
}

/// Rounds for LoftQ: what quantising leaves has no directions that stand out.
const LOFTQ_ROUNDS: usize = 12;

/// An adapter of the leading directions of a weight (output, input) on the CPU, and what is left of the weight, in its type.
///
/// # Errors
/// When the weight has fewer directions than the rank.
pub fn pissa(
    name: &str,
    weight: &Tensor,
    config: &LoraConfig,
    iterations: Iterations,
    precision: Precision,
) -> Result<(LoraAdapter, Tensor)> {
    let wide = weight.try_clone()?.cast(DType::F32)?;
    let adapter = of_directions(name, &wide, config, iterations, precision)?;
    let rest = residual(wide, &adapter.a.value, &adapter.b.value, adapter.scaling)?;
    Ok((adapter, rest.cast(weight.dtype())?))
}

/// What is left of a weight (output, input) beside A and B on the CPU: W − s·B·A, in W's type.
///
/// # Errors
/// When the shapes don't fit.
pub fn residual(weight: Tensor, a: &Tensor, b: &Tensor, scaling: f64) -> Result<Tensor> {
    let dtype = weight.dtype();
    let (mut rest, all) = (weight.cast(DType::F32)?, 0..a.cols());
    multiply(Precision::Full, -scaling, Operand::new(b), Operand::new(a), 1.0, &mut rest, all)?;
    rest.cast(dtype)
}

/// An adapter of what quantising took from a weight, both (output, input) and f32 on the CPU.
///
/// # Errors
/// When the weight has fewer directions than the rank.
pub fn loftq(
    name: &str,
    mut weight: Tensor,
    quantised: &Tensor,
    config: &LoraConfig,
    precision: Precision,
) -> Result<LoraAdapter> {
    weight.add_scaled(-1.0, quantised)?;
    of_directions(name, &weight, config, Iterations::Count(LOFTQ_ROUNDS), precision)
}

fn of_directions(
    name: &str,
    weight: &Tensor,
    config: &LoraConfig,
    iterations: Iterations,
    precision: Precision,
) -> Result<LoraAdapter> {
    let (output, input) = weight.shape();
    let scaling = config.scaling();
    let svd = leading(weight, config.r, iterations, Counter::new(&[config.seed, stream_of(name)]))?;
    let roots: Vec<f64> = svd.s.iter().map(|it| (it / scaling).sqrt()).collect();
    let a = svd.v.iter().zip(&roots).flat_map(|(row, root)| row.iter().map(move |it| (it * root) as f32));
    let b = (0..output)
        .flat_map(|i| svd.u.iter().zip(&roots).map(move |(column, root)| (column[i] * root) as f32));
    let (a, b) = (a.collect(), b.collect());
    let (a, b) = (Tensor::from_vec(config.r, input, a)?, Tensor::from_vec(output, config.r, b)?);
    LoraAdapter::from_parts(name, a, b, scaling, config.lora_dropout, precision)
}

#[cfg(test)]
mod tests {
    use super::*;
    use ferrotune_nn::check::seeded;

    fn config(r: usize, use_rslora: bool) -> LoraConfig {
        LoraConfig { r, lora_alpha: 5.0, use_rslora, seed: 9, ..LoraConfig::default() }
    }

    fn off(a: &Tensor, b: &Tensor) -> f32 {
        let (a, b) = (a.to_f32().unwrap(), b.to_f32().unwrap());
        a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
    }

    #[test]
    fn residual_and_adapter_are_the_weight() {
        for (dtype, rslora, tolerance) in [(DType::F32, false, 1e-6), (DType::BF16, true, 2e-3)] {
            let weight = seeded(20, 14, 3).cast(DType::F32).unwrap().cast(dtype).unwrap();
            let config = config(3, rslora);
            let (adapter, rest) =
                pissa("q", &weight, &config, Iterations::Count(16), Precision::Full).unwrap();
            assert_eq!(rest.dtype(), dtype);
            let (a, b) = (&adapter.a.value, &adapter.b.value);
            let again = residual(rest.try_clone().unwrap(), a, b, -adapter.scaling).unwrap();
            assert!(off(&again, &weight) < tolerance, "{}", off(&again, &weight));
            // Going on from A and B leaves the same bits.
            assert_eq!(
                residual(weight, a, b, adapter.scaling).unwrap().to_f32().unwrap(),
                rest.to_f32().unwrap()
            );
        }
    }

    #[test]
    fn what_quantising_took_is_given_back_along_its_leading_directions() {
        let weight = || seeded(20, 14, 3).cast(DType::F32).unwrap();
        let mut coarse = weight();
        coarse.values_mut::<f32>().unwrap().iter_mut().for_each(|it| *it = (*it * 4.0).round() / 4.0);
        let errors = [2, 7, 14].map(|r| {
            let adapter = loftq("q", weight(), &coarse, &config(r, false), Precision::Full).unwrap();
            let near =
                residual(coarse.try_clone().unwrap(), &adapter.a.value, &adapter.b.value, -adapter.scaling);
            let mut near = near.unwrap();
            near.add_scaled(-1.0, &weight()).unwrap();
            near.square_sum().unwrap().sqrt()
        });
        assert!(errors[0] > errors[1] && errors[1] > errors[2] && errors[2] < 1e-5, "{errors:?}");
    }
}
