use std::ops::Deref;

use ferrotune_tensor::{DType, Result, Tensor};

use crate::Parameter;

/// A weight's numbers, frozen or trained. Whoever computes with them reads what products read.
#[derive(Debug)]
pub enum Numbers {
    /// As they were stored.
    Frozen(Tensor),
    /// With a gradient.
    Trained(Parameter),
}

impl Numbers {
    /// Makes them trained: f32 numbers, with a copy in the type that they had where a GPU's products take
    /// that.
    ///
    /// # Errors
    /// When the device has no room.
    pub fn train(&mut self, name: &str) -> Result<()> {
        let Numbers::Frozen(value) = self else { return Ok(()) };
        let (dtype, on_gpu) = (value.dtype(), value.gpu().is_some());
        // f64 is for checks.
        let wanted = if dtype == DType::F64 { DType::F64 } else { DType::F32 };
        let mut parameter = Parameter::new(name, value.try_clone()?.cast(wanted)?)?;
        if on_gpu {
            parameter = parameter.with_copy(dtype)?;
        }
        *self = Numbers::Trained(parameter);
        Ok(())
    }

    /// The gradient, where they are trained.
    pub fn grad_mut(&mut self) -> Option<&mut Tensor> {
        match self {
            Numbers::Frozen(_) => None,
            Numbers::Trained(parameter) => Some(&mut parameter.grad),
        }
    }

    /// Whether they have a gradient.
    pub fn is_trained(&self) -> bool {
        matches!(self, Numbers::Trained(_))
    }

    /// The trained tensor, if they are.
    pub fn parameter(&mut self) -> Option<&mut Parameter> {
        match self {
            Numbers::Frozen(_) => None,
            Numbers::Trained(parameter) => Some(parameter),
        }
    }
}

impl Deref for Numbers {
    type Target = Tensor;

    fn deref(&self) -> &Tensor {
        match self {
            Numbers::Frozen(value) => value,
            Numbers::Trained(parameter) => parameter.operand(),
        }
    }
}

impl From<Tensor> for Numbers {
    fn from(value: Tensor) -> Numbers {
        Numbers::Frozen(value)
    }
}

/// grad[0, columns] += the sum over rows of some columns of x, each row being `row(i, out)`. Rows are
/// added up in f64 in a fixed order, whatever the number of threads.
pub(crate) fn add_column_sums(
    grad: &mut Tensor,
    rows: usize,
    add_row: impl Fn(usize, &mut [f64]) + Sync,
) -> Result<()> {
    use rayon::prelude::*;
    /// Rows of one partial sum.
    const ROWS: usize = 128;
    let cols = grad.cols();
    let partials: Vec<Vec<f64>> = (0..rows.div_ceil(ROWS))
        .into_par_iter()
        .map(|part| {
            let mut sum = vec![0.0; cols];
            (part * ROWS..rows.min((part + 1) * ROWS)).for_each(|row| add_row(row, &mut sum));
            sum
        })
        .collect();
    let mut sum = vec![0.0; cols];
    for partial in partials {
        sum.iter_mut().zip(partial).for_each(|(sum, it)| *sum += it);
    }
    if grad.gpu().is_some() {
        let sum = Tensor::from_vec(1, cols, sum.iter().map(|it| *it as f32).collect())?;
        return grad.add_scaled(1.0, &sum.to_device(&grad.device())?);
    }
    match grad.dtype() {
        DType::F64 => grad.values_mut::<f64>()?.iter_mut().zip(sum).for_each(|(g, s)| *g += s),
        _ => grad.values_mut::<f32>()?.iter_mut().zip(sum).for_each(|(g, s)| *g += s as f32),
    }
    Ok(())
}

/// The numbers in f64 on the host, for what no kernel does yet.
pub(crate) fn on_host(x: &Tensor) -> Result<Vec<f64>> {
    Ok(match x.dtype() {
        DType::F64 => x.values::<f64>()?.to_vec(),
        _ => x.to_f32()?.into_iter().map(f64::from).collect(),
    })
}
