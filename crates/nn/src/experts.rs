//! A mixture of experts: y = Σ pₑ·mlpₑ(x) over the k experts with the largest pₑ, p = softmax(x·Wᵀ).
//! Where it is normalised, p is made to add up to 1 over those k, which is the softmax of their scores alone.
//!   backward, g = dy·mlpₑ(x) for the k and 0 for others:  ds = p·(g − Σ p·g),  dx = Σ dmlpₑ(pₑ·dy) + ds·W
//! Shazeer et al. 2017, "Outrageously Large Neural Networks"; Jiang et al. 2024, "Mixtral of Experts".

mod gpu;

use ferrotune_tensor::{Real, Result, Tensor, for_real};

use crate::head::gather;
use crate::mlp::{Mlp, MlpSaved};
use crate::{Context, DenseWeight, Layer, Parameter, SavedTensors, Weight};

/// Mlps of which each token uses some.
pub struct Experts {
    /// (E, C): scores of the experts.
    pub router: DenseWeight,
    /// E
    pub experts: Vec<Mlp>,
    /// k
    pub num_experts_per_tok: usize,
    /// What the k are weighted by adds up to 1.
    pub normalised: bool,
}

/// What [`Experts`]' backward reads.
pub struct ExpertsSaved(Saved);

enum Saved {
    Host(HostSaved),
    Gpu(Box<gpu::GpuSaved>),
}

/// On the CPU each expert keeps its own.
struct HostSaved {
    /// (N, E): p; where it is normalised, 0 but for the k.
    probabilities: Tensor,
    /// Of each expert: the rows that use it, in order, and what it kept of them.
    experts: Vec<(Vec<usize>, Option<ExpertSaved>)>,
}

struct ExpertSaved {
    mlp: MlpSaved,
    /// (rows, C): what it gave.
    out: Tensor,
}

impl SavedTensors for ExpertsSaved {
    fn tensors(&mut self) -> Vec<&mut Tensor> {
        let host = match &mut self.0 {
            Saved::Host(host) => host,
            Saved::Gpu(gpu) => return gpu.tensors(),
        };
        let mut all = vec![&mut host.probabilities];
        for ExpertSaved { mlp, out } in host.experts.iter_mut().filter_map(|(_, saved)| saved.as_mut()) {
            all.extend(mlp.tensors());
            all.push(out);
        }
        all
    }
}

impl Experts {
    /// p (N, E), and the rows of each expert.
    fn route(&self, x: &Tensor) -> Result<(Tensor, Vec<Vec<usize>>)> {
        let count = self.experts.len();
        let mut scores = x.empty_like(x.rows(), count)?;
        self.router.forward(x, &mut scores, 0)?;
        let mut rows = vec![Vec::new(); count];
        for_real!("experts", x.dtype(), T => {
            for (row, p) in scores.values_mut::<T>()?.chunks_mut(count).enumerate() {
                for expert in choose::<T>(p, self.num_experts_per_tok, self.normalised) {
                    rows[expert].push(row);
                }
            }
            Ok(())
        })?;
        Ok((scores, rows))
    }
}

/// Scores to what experts are weighted by; the k largest, the earlier of equals.
fn choose<T: Real>(scores: &mut [T], k: usize, normalised: bool) -> Vec<usize> {
    let mut order: Vec<usize> = (0..scores.len()).collect();
    let falling =
        |a: &usize, b: &usize| scores[*b].partial_cmp(&scores[*a]).unwrap_or(std::cmp::Ordering::Equal);
    order.sort_by(falling);
    let largest = scores[order[0]];
    let taken = &order[..k];
    for (expert, score) in scores.iter_mut().enumerate() {
        let counts = !normalised || taken.contains(&expert);
        *score = if counts { (*score - largest).exp() } else { T::zero() };
    }
    let sum = scores.iter().fold(T::zero(), |sum, it| sum + *it);
    scores.iter_mut().for_each(|it| *it /= sum);
    order.truncate(k);
    order
}

/// y[rows] += weight·out for each row's own weight, which is in a column of p.
fn add_weighted<T: Real>(
    y: &mut Tensor,
    rows: &[usize],
    out: &Tensor,
    p: &Tensor,
    expert: usize,
) -> Result<()> {
    let (width, count, p) = (out.cols(), p.cols(), p.values::<T>()?);
    let y = y.values_mut::<T>()?;
    for (row, out) in rows.iter().zip(out.values::<T>()?.chunks(width)) {
        let weight = p[row * count + expert];
        y[row * width..][..width].iter_mut().zip(out).for_each(|(y, out)| *y += weight * *out);
    }
    Ok(())
}

impl Layer for Experts {
    type Saved = ExpertsSaved;

    fn forward(&self, ctx: &Context, x: &Tensor) -> Result<(Tensor, ExpertsSaved)> {
        if let Some(gpu) = x.gpu() {
            let (y, saved) = self.forward_on_gpu(gpu, ctx, x)?;
            return Ok((y, ExpertsSaved(Saved::Gpu(Box::new(saved)))));
        }
        let (probabilities, rows) = self.route(x)?;
        let mut y = x.zeros_like(x.rows(), x.cols())?;
        let mut experts = Vec::with_capacity(rows.len());
        for (expert, rows) in rows.into_iter().enumerate() {
            let mut saved = None;
            if !rows.is_empty() {
                for_real!("experts", x.dtype(), T => {
                    let (out, mlp) = self.experts[expert].forward(ctx, &gather::<T>(x, &rows)?)?;
                    add_weighted::<T>(&mut y, &rows, &out, &probabilities, expert)?;
                    saved = Some(ExpertSaved { mlp, out });
                    Ok(())
                })?;
            }
            experts.push((rows, saved));
        }
        Ok((y, ExpertsSaved(Saved::Host(HostSaved { probabilities, experts }))))
    }

    fn recompute(&self, ctx: &Context, x: &Tensor) -> Result<ExpertsSaved> {
        match x.gpu() {
            Some(gpu) => Ok(ExpertsSaved(Saved::Gpu(Box::new(self.recompute_on_gpu(gpu, ctx, x)?)))),
            None => Ok(self.forward(ctx, x)?.1),
        }
    }

    fn backward(&mut self, ctx: &Context, x: &Tensor, saved: ExpertsSaved, dy: Tensor) -> Result<Tensor> {
        let HostSaved { probabilities: mut p, experts } = match saved.0 {
            Saved::Host(saved) => saved,
            Saved::Gpu(saved) => return self.backward_on_gpu(ctx, x, *saved, dy),
        };
        let (count, width) = (p.cols(), x.cols());
        let mut dx = x.zeros_like(x.rows(), width)?;
        for_real!("experts", x.dtype(), T => {
            let mut g = vec![T::of(0.0); p.rows() * count];
            for (expert, (rows, saved)) in experts.into_iter().enumerate() {
                let Some(ExpertSaved { mlp, out }) = saved else { continue };
                let mut dout = gather::<T>(&dy, &rows)?;
                let pairs = dout.values_mut::<T>()?.chunks_mut(width).zip(out.values::<T>()?.chunks(width));
                for (row, (dout, out)) in rows.iter().zip(pairs) {
                    let at = row * count + expert;
                    g[at] = dout.iter().zip(out).fold(T::of(0.0), |sum, (a, b)| sum + *a * *b);
                    let weight = p.values::<T>()?[at];
                    dout.iter_mut().for_each(|it| *it *= weight);
                }
                let dx_rows = self.experts[expert].backward(ctx, &gather::<T>(x, &rows)?, mlp, dout)?;
                let all = dx.values_mut::<T>()?;
                for (row, one) in rows.iter().zip(dx_rows.values::<T>()?.chunks(width)) {
                    all[row * width..][..width].iter_mut().zip(one).for_each(|(sum, it)| *sum += *it);
                }
            }
            for (p, g) in p.values_mut::<T>()?.chunks_mut(count).zip(g.chunks(count)) {
                let mean = p.iter().zip(g).fold(T::of(0.0), |sum, (p, g)| sum + *p * *g);
                p.iter_mut().zip(g).for_each(|(p, g)| *p *= *g - mean);
            }
            Ok(())
        })?;
        let dscores = p;
        self.router.accumulate_grad(x, &dscores, 0)?;
        self.router.backward(&dscores, 0, 1.0, &mut dx)?;
        Ok(dx)
    }

    fn parameters(&mut self) -> Vec<&mut Parameter> {
        self.router
            .parameters()
            .into_iter()
            .chain(self.experts.iter_mut().flat_map(Mlp::parameters))
            .collect()
    }
}
