//! The mean as PyTorch takes it in f32 on the CPU: a stored offset depends on its last bit.
//! Source: aten/src/ATen/native/cpu/SumKernel.cpp, eight lanes wide, four rows at a time.

const LANES: usize = 8;
const ROWS: usize = 4;
const LEVELS: usize = 4;

type Lanes = [f32; LANES];

/// The mean of some numbers, 0 for none.
pub(crate) fn mean(values: &[f32]) -> f32 {
    if values.is_empty() {
        return 0.0;
    }
    let (rows, rest) = values.as_chunks::<LANES>();
    let (groups, more) = rows.as_chunks::<ROWS>();
    let mut sums = cascade(groups);
    more.iter().for_each(|row| add(&mut sums[0], row));
    let [mut first, others @ ..] = sums;
    others.iter().for_each(|row| add(&mut first, row));
    let sum = rest.iter().chain(&first).fold(0.0, |sum, it| sum + it);
    sum / values.len() as f32
}

/// Sums of the groups' rows, carried from level to level so that small numbers aren't lost.
fn cascade(groups: &[[Lanes; ROWS]]) -> [Lanes; ROWS] {
    let power =
        (usize::BITS - groups.len().saturating_sub(1).leading_zeros()).div_euclid(LEVELS as u32).max(4);
    let step = 1usize << power;
    let mut levels = [[[0.0; LANES]; ROWS]; LEVELS];
    let add_group = |sums: &mut [Lanes; ROWS], group: &[Lanes; ROWS]| {
        sums.iter_mut().zip(group).for_each(|(sum, row)| add(sum, row));
    };
    for (done, group) in groups.iter().enumerate() {
        add_group(&mut levels[0], group);
        let done = done + 1;
        for level in 1..LEVELS {
            if done % (step.pow(level as u32)) != 0 {
                break;
            }
            let below = std::mem::replace(&mut levels[level - 1], [[0.0; LANES]; ROWS]);
            add_group(&mut levels[level], &below);
        }
    }
    let [mut lowest, above @ ..] = levels;
    above.iter().for_each(|level| add_group(&mut lowest, level));
    lowest
}

fn add(sum: &mut Lanes, row: &Lanes) {
    sum.iter_mut().zip(row).for_each(|(sum, it)| *sum += it);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_number_counts_once() {
        for n in [1, 7, 8, 33, 64, 258, 5000, 70_000] {
            let values: Vec<f32> = (0..n).map(|i| (i % 16) as f32).collect();
            let exact = values.iter().map(|it| f64::from(*it)).sum::<f64>() / n as f64;
            assert!((f64::from(mean(&values)) - exact).abs() < 1e-5, "{n}");
        }
    }
}
