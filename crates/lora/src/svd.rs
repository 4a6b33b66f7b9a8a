//! The leading singular vectors of a matrix, by randomised subspace iteration (Halko, Martinsson and Tropp 2011):
//!   Qᵀ = orth(Ωᵀ·Wᵀ);  Qᵀ = orth(orth(Qᵀ·W)·Wᵀ), again and again;  then the eigenvectors of (Qᵀ·W)·(Qᵀ·W)ᵀ, which is small.
//! Products are the CPU's in f32, everything small is in f64. What is random is counted: the same seed, the same vectors.

use ferrotune_tensor::{Counter, Error, Operand, Precision, Result, Tensor, multiply};
use rayon::prelude::*;

/// Directions beyond those asked for, so that these are found soon.
const SPARE: usize = 8;
/// An exact decomposition is one whose singular values no longer change by more, relative to the largest.
const SETTLED: f64 = 1e-7;
/// The most rounds of an exact decomposition; noise, whose singular values lie close together, takes many.
const ROUNDS: usize = 1000;

/// How long to iterate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Iterations {
    /// So many rounds.
    Count(usize),
    /// Until nothing changes.
    Exact,
}

/// W ≈ Uᵀᵀ·diag(s)·Vᵀ
#[derive(Debug)]
pub(crate) struct Svd {
    /// Left vectors as rows, (rank, rows of W).
    pub(crate) u: Vec<Vec<f64>>,
    /// Singular values, falling.
    pub(crate) s: Vec<f64>,
    /// Right vectors as rows, (rank, columns of W).
    pub(crate) v: Vec<Vec<f64>>,
}

/// The `rank` leading ones of W, f32 on the CPU.
pub(crate) fn leading(w: &Tensor, rank: usize, iterations: Iterations, random: Counter) -> Result<Svd> {
    let (rows, cols) = w.shape();
    if rank > rows.min(cols) {
        return Err(Error::msg(format!("a weight of {rows} x {cols} has no {rank} singular values")));
    }
    let width = (rank + SPARE).min(rows.min(cols));
    let omega = (0..(width * cols) as u64).map(|i| random.normal(i) as f32).collect();
    let mut left = orthonormal(&through(&Tensor::from_vec(width, cols, omega)?, w, Side::Right)?)?;
    let (most, mut before) = match iterations {
        Iterations::Count(count) => (count, None),
        Iterations::Exact => (ROUNDS, Some(Vec::new())),
    };
    for _ in 0..most {
        let right = orthonormal(&through(&left, w, Side::Left)?)?;
        let longer = through(&right, w, Side::Right)?;
        if let Some(before) = &mut before {
            // Lengths of what the orthonormal rows became: they settle as the singular values do.
            let (values, _) = eigen(gram(&longer)?);
            let now: Vec<f64> = values.into_iter().take(rank).map(|it| it.max(0.0).sqrt()).collect();
            let near = |(a, b): (&f64, &f64)| (a - b).abs() <= SETTLED * now[0];
            let settled = before.len() == now.len() && now.iter().zip(before.iter()).all(near);
            *before = now;
            if settled {
                break;
            }
        }
        left = orthonormal(&longer)?;
    }
    // Qᵀ·W = E·diag(s)·Vᵀ
    let small = through(&left, w, Side::Left)?;
    let (values, vectors) = eigen(gram(&small)?);
    let s: Vec<f64> = values.into_iter().take(rank).map(|it| it.max(0.0).sqrt()).collect();
    let u = vectors.iter().take(rank).map(|vector| combined(&left, vector)).collect::<Result<_>>()?;
    let v = vectors.iter().zip(&s).map(|(vector, s)| {
        let mut row = combined(&small, vector)?;
        row.iter_mut().for_each(|it| *it = if *s > 0.0 { *it / s } else { 0.0 });
        Ok(row)
    });
    Ok(Svd { u, v: v.collect::<Result<_>>()?, s })
}

/// On which side of W rows are multiplied.
#[derive(Clone, Copy)]
enum Side {
    /// rows·W
    Left,
    /// rows·Wᵀ
    Right,
}

fn through(x: &Tensor, w: &Tensor, side: Side) -> Result<Tensor> {
    let (w, width) = match side {
        Side::Left => (Operand::new(w), w.cols()),
        Side::Right => (Operand::new(w).transposed(), w.rows()),
    };
    let mut out = x.empty_like(x.rows(), width)?;
    multiply(Precision::Full, 1.0, Operand::new(x), w, 0.0, &mut out, 0..width)?;
    Ok(out)
}

/// Rows that span the same, by Gram and Schmidt, each row twice. One that is within the others becomes 0.
fn orthonormal(x: &Tensor) -> Result<Tensor> {
    let cols = x.cols();
    let mut rows: Vec<Vec<f64>> = Vec::with_capacity(x.rows());
    for row in x.values::<f32>()?.chunks(cols) {
        let mut row: Vec<f64> = row.iter().map(|it| f64::from(*it)).collect();
        let length = dot(&row, &row).sqrt();
        for _ in 0..2 {
            let within: Vec<f64> = rows.par_iter().map(|it| dot(it, &row)).collect();
            for (other, within) in rows.iter().zip(within) {
                row.iter_mut().zip(other).for_each(|(it, other)| *it -= within * other);
            }
        }
        let left = dot(&row, &row).sqrt();
        let scale = if left > 1e-7 * length { 1.0 / left } else { 0.0 };
        row.iter_mut().for_each(|it| *it *= scale);
        rows.push(row);
    }
    Tensor::from_vec(x.rows(), cols, rows.into_iter().flatten().map(|it| it as f32).collect())
}

/// x·xᵀ
fn gram(x: &Tensor) -> Result<Vec<Vec<f64>>> {
    let rows: Vec<Vec<f64>> = x
        .values::<f32>()?
        .chunks(x.cols())
        .map(|row| row.iter().map(|it| f64::from(*it)).collect())
        .collect();
    Ok(rows.par_iter().map(|a| rows.iter().map(|b| dot(a, b)).collect()).collect())
}

/// Σ vector[i]·row i
fn combined(x: &Tensor, vector: &[f64]) -> Result<Vec<f64>> {
    let mut sum = vec![0.0; x.cols()];
    for (row, factor) in x.values::<f32>()?.chunks(x.cols()).zip(vector) {
        sum.iter_mut().zip(row).for_each(|(sum, it)| *sum += factor * f64::from(*it));
    }
    Ok(sum)
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

/// Eigenvalues of a symmetric matrix, falling, and their vectors, by Jacobi's rotations.
fn eigen(mut a: Vec<Vec<f64>>) -> (Vec<f64>, Vec<Vec<f64>>) {
    let n = a.len();
    // Row i belongs to the value that ends up at (i, i).
    let mut vectors: Vec<Vec<f64>> =
        (0..n).map(|i| (0..n).map(|j| f64::from(u8::from(i == j))).collect()).collect();
    let all: f64 = a.iter().map(|row| dot(row, row)).sum();
    for _ in 0..60 {
        let off: f64 =
            (0..n).map(|i| (0..n).filter(|j| *j != i).map(|j| a[i][j] * a[i][j]).sum::<f64>()).sum();
        if off <= 1e-30 * all {
            break;
        }
        for (p, q) in (0..n).flat_map(|p| (p + 1..n).map(move |q| (p, q))) {
            if a[p][q] == 0.0 {
                continue;
            }
            let theta = (a[q][q] - a[p][p]) / (2.0 * a[p][q]);
            let t = theta.signum() / (theta.abs() + (theta * theta + 1.0).sqrt());
            let c = 1.0 / (t * t + 1.0).sqrt();
            let s = t * c;
            rotate(&mut vectors, p, q, c, s);
            rotate(&mut a, p, q, c, s);
            for row in &mut a {
                (row[p], row[q]) = (c * row[p] - s * row[q], s * row[p] + c * row[q]);
            }
        }
    }
    let mut order: Vec<usize> = (0..n).collect();
    order.sort_by(|i, j| a[*j][*j].total_cmp(&a[*i][*i]));
    (order.iter().map(|i| a[*i][*i]).collect(), order.iter().map(|i| vectors[*i].clone()).collect())
}

/// Rows p and q turned into each other.
fn rotate(rows: &mut [Vec<f64>], p: usize, q: usize, c: f64, s: f64) {
    let (before, after) = rows.split_at_mut(q);
    for (x, y) in before[p].iter_mut().zip(&mut after[0]) {
        (*x, *y) = (c * *x - s * *y, s * *x + c * *y);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ferrotune_nn::check::seeded;
    use ferrotune_tensor::DType;

    /// Orthonormal rows with these singular values between them.
    fn matrix(rows: usize, cols: usize, values: &[f64]) -> Tensor {
        let part = |width: usize, seed: u64| {
            let it = seeded(values.len(), width, seed).cast(DType::F32).unwrap();
            orthonormal(&it).unwrap()
        };
        let (mut u, v) = (part(rows, 1), part(cols, 2));
        for (row, value) in u.values_mut::<f32>().unwrap().chunks_mut(rows).zip(values) {
            row.iter_mut().for_each(|it| *it *= *value as f32);
        }
        let mut w = u.zeros_like(rows, cols).unwrap();
        multiply(Precision::Full, 1.0, Operand::new(&u).transposed(), Operand::new(&v), 0.0, &mut w, 0..cols)
            .unwrap();
        w
    }

    #[test]
    fn singular_values_and_vectors_are_found() {
        let values = [9.0, 5.0, 4.9, 2.0, 1.0, 0.5, 0.1];
        let w = matrix(40, 25, &values);
        for iterations in [Iterations::Count(16), Iterations::Exact] {
            let svd = leading(&w, 4, iterations, Counter::new(&[3])).unwrap();
            for (got, expected) in svd.s.iter().zip(values) {
                assert!((got / expected - 1.0).abs() < 1e-5, "{:?}", svd.s);
            }
            let close = |got: f64, expected: f64| assert!((got - expected).abs() < 1e-5, "{got} {expected}");
            for (i, j) in (0..4).flat_map(|i| (0..4).map(move |j| (i, j))) {
                let same = f64::from(u8::from(i == j));
                close(dot(&svd.u[i], &svd.u[j]), same);
                close(dot(&svd.v[i], &svd.v[j]), same);
            }
            // Uᵀ·W·V is diagonal: each pair belongs together.
            let values = w.values::<f32>().unwrap();
            let image: Vec<f64> = values
                .chunks(25)
                .map(|row| row.iter().zip(&svd.v[1]).map(|(a, b)| f64::from(*a) * b).sum())
                .collect();
            close(dot(&image, &svd.u[1]), svd.s[1]);
            close(dot(&image, &svd.u[0]), 0.0);
        }
    }

    #[test]
    fn a_matrix_of_lower_rank_and_one_of_zeros() {
        let svd = leading(&matrix(20, 30, &[3.0, 1.0]), 4, Iterations::Exact, Counter::new(&[3])).unwrap();
        assert!((svd.s[1] - 1.0).abs() < 1e-5 && svd.s[2] < 1e-5, "{:?}", svd.s);
        let zeros = Tensor::from_vec(6, 5, vec![0.0f32; 30]).unwrap();
        let svd = leading(&zeros, 2, Iterations::Count(2), Counter::new(&[3])).unwrap();
        assert!(svd.s == [0.0, 0.0] && svd.v.iter().flatten().all(|it| *it == 0.0));
        let error = leading(&zeros, 6, Iterations::Exact, Counter::new(&[3])).unwrap_err().to_string();
        assert_eq!(error, "a weight of 6 x 5 has no 6 singular values");
    }
}
