//! All parameters in one launch: `kernels/optimizer.cu`.

use ferrotune_nn::Parameter;
use ferrotune_tensor::{DType, Device, Gpu, Result, Tensor};
use std::sync::Arc;

use super::adamw::StepNumbers;
use super::adamw_8bit;

/// Elements of one chunk: chunks of a tensor start at multiples of 4096.
const CHUNK: usize = 16 * 1024;
/// Threads of a block of the kernels.
const BLOCK: u32 = 256;

/// A parameter with the moments that move it, where they are wanted.
pub(super) struct Moved<'a> {
    pub(super) parameter: &'a Parameter,
    pub(super) moments: Option<[&'a Tensor; 2]>,
    /// Of moments in 8 bits: one for each block of theirs.
    pub(super) scales: Option<[&'a Tensor; 2]>,
}

/// `struct Chunk` of the kernels, as words: value, grad, m, v, their scales, the copy, n and its type.
pub(super) struct Chunks(Vec<[u64; 8]>);

impl Chunks {
    pub(super) fn new<'a>(parameters: impl Iterator<Item = Moved<'a>>) -> Chunks {
        let mut chunks = Vec::new();
        for Moved { parameter, moments, scales } in parameters {
            let at = |tensor: &Tensor, element: usize| {
                tensor.device_pointer() + (element * tensor.dtype().size_in_bytes()) as u64
            };
            let copy_type: u64 = match parameter.copy.as_ref().map(Tensor::dtype) {
                Some(DType::F16) => 1,
                Some(_) => 2,
                None => 0,
            };
            for start in (0..parameter.value.len()).step_by(CHUNK) {
                let n = CHUNK.min(parameter.value.len() - start) as u64;
                let [m, v] = moments.map_or([0, 0], |both| both.map(|it| at(it, start)));
                let block = start / adamw_8bit::BLOCK;
                let [scale_m, scale_v] = scales.map_or([0, 0], |both| both.map(|it| at(it, block)));
                let copy = parameter.copy.as_ref().map_or(0, |it| at(it, start));
                let (value, grad) = (at(&parameter.value, start), at(&parameter.grad, start));
                chunks.push([value, grad, m, v, scale_m, scale_v, copy, n | copy_type << 32]);
            }
        }
        Chunks(chunks)
    }

    fn upload(&self, gpu: &Arc<Gpu>) -> Result<Tensor> {
        let words = self.0.iter().flatten().flat_map(|word| [*word as u32, (*word >> 32) as u32]);
        Tensor::from_vec(self.0.len(), 16, words.collect())?.to_device(&Device::Cuda(gpu.clone()))
    }

    pub(super) fn step(&self, gpu: &Arc<Gpu>, kernel: &str, maps: &[Tensor], it: &StepNumbers) -> Result<()> {
        let table = self.upload(gpu)?;
        let launch = gpu.plain_kernel("optimizer", kernel)?.grid(self.0.len(), BLOCK).tensor(&table);
        let launch = maps.iter().fold(launch, |launch, map| launch.tensor(map));
        let launch = launch.float(it.decay).float(it.beta1).float(it.beta2).float(it.epsilon);
        // SAFETY: adamw(chunks, maps, decay, beta1, beta2, epsilon, step_size, root, grad_scale); the
        // table's addresses are those of living tensors.
        unsafe { launch.float(it.step_size).float(it.root).float(it.grad_scale).run() }
    }
}

/// Σ grad² of all parameters in f64, in a fixed order.
pub(crate) fn square_sum(parameters: &[&mut Parameter]) -> Result<f64> {
    let Some(gpu) = parameters.first().and_then(|it| it.value.gpu()) else {
        return parameters.iter().map(|it| it.grad.square_sum()).sum();
    };
    let chunks =
        Chunks::new(parameters.iter().map(|it| Moved { parameter: it, moments: None, scales: None }));
    let (table, device) = (chunks.upload(gpu)?, Device::Cuda(gpu.clone()));
    let count = chunks.0.len();
    let (partials, sum) =
        (Tensor::empty(1, count, DType::F64, &device)?, Tensor::empty(1, 1, DType::F64, &device)?);
    let launch = gpu.plain_kernel("optimizer", "square_sum")?.grid(count, BLOCK);
    // SAFETY: square_sum(chunks, partials), one for each block
    unsafe { launch.tensor(&table).tensor(&partials).run() }?;
    let launch = gpu.plain_kernel("optimizer", "sum_partials")?.grid(1, BLOCK);
    // SAFETY: sum_partials(partials, out, n)
    unsafe { launch.tensor(&partials).tensor(&sum).int(count).run() }?;
    Ok(sum.to_cpu()?.values::<f64>()?[0])
}
