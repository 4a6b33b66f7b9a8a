use super::*;
use crate::random::{Counter, uniform};

/// A matrix of its own in 4 bits or so: exactly representable, written out piece by piece.
struct Grid {
    rows: usize,
    cols: usize,
    values: Vec<f32>,
}

impl Grid {
    fn new(rows: usize, cols: usize) -> Grid {
        Grid { rows, cols, values: numbers(&[rows as u64, cols as u64], rows * cols) }
    }
}

impl Tiles for Grid {
    fn rows(&self) -> usize {
        self.rows
    }
    fn cols(&self) -> usize {
        self.cols
    }
    fn read(&self, rows: Range<usize>, cols: Range<usize>, out: &mut [f32]) {
        assert_eq!(out.len(), rows.len() * cols.len());
        assert!(rows.end <= self.rows && cols.end <= self.cols);
        for (out, row) in out.chunks_mut(cols.len()).zip(rows) {
            out.copy_from_slice(&self.values[row * self.cols..][cols.clone()]);
        }
    }
}

fn numbers(key: &[u64], count: usize) -> Vec<f32> {
    uniform(Counter::new(key), 1.0, count)
}

/// How the operands lie.
#[derive(Clone, Copy, Debug)]
enum Lie {
    Rows,
    Columns,
    Strided,
}

fn lay(lie: Lie, data: &mut Vec<f32>, rows: usize, cols: usize) -> Matrix<'_, f32> {
    let (row_stride, col_stride) = match lie {
        Lie::Rows => (cols + 3, 1),
        Lie::Columns => (1, rows + 5),
        Lie::Strided => (2 * cols + 1, 2),
    };
    *data = numbers(&[7, rows as u64, cols as u64], reach(rows, cols, row_stride, col_stride));
    Matrix { data, rows, cols, row_stride, col_stride }
}

fn get(matrix: &Matrix<'_, f32>, row: usize, col: usize) -> f64 {
    f64::from(matrix.data[row * matrix.row_stride + col * matrix.col_stride])
}

/// Runs a product into strided, partly uninitialised memory and compares it with plain loops in f64.
fn check_product(
    what: &str,
    precision: Precision,
    a: Matrix<'_, f32>,
    b: &dyn Fn(usize, usize) -> f64,
    n: usize,
    run: impl Fn(f32, f32, MatrixMut<'_, f32>),
) {
    let (m, k, gap) = (a.rows, a.cols, 3);
    let tolerance = match precision {
        Precision::Full => 1e-6 * (k as f64).sqrt() + 1e-6,
        Precision::Bf16 => 4e-3 * (k as f64).sqrt() + 1e-6,
    };
    for (alpha, beta) in [(1.0, 0.0), (0.5, 1.0), (-2.0, 0.25)] {
        let before = if beta == 0.0 { vec![f32::NAN; m * (n + gap)] } else { numbers(&[3], m * (n + gap)) };
        let mut c = before.clone();
        run(alpha, beta, MatrixMut::new(&mut c, m, n + gap).columns(1..n + 1));
        for i in 0..m {
            for j in 0..n + gap {
                let (got, was) = (c[i * (n + gap) + j], before[i * (n + gap) + j]);
                if !(1..=n).contains(&j) {
                    assert_eq!(got.to_bits(), was.to_bits(), "{what}: written beside c at {i}, {j}");
                    continue;
                }
                let sum: f64 = (0..k).map(|p| get(&a, i, p) * b(p, j - 1)).sum();
                let kept = if beta == 0.0 { 0.0 } else { f64::from(beta) * f64::from(was) };
                let expected = f64::from(alpha) * sum + kept;
                let error = (f64::from(got) - expected).abs();
                assert!(
                    error <= tolerance * (1.0 + f64::from(alpha).abs()),
                    "{what} {m}×{k}×{n} α {alpha} β {beta} at {i}, {j}: {got}, not {expected}"
                );
            }
        }
    }
}

const SHAPES: [(usize, usize, usize); 18] = [
    (1, 1, 1),
    (1, 70, 40),
    (3, 65, 33),
    (4, 300, 17),
    (5, 2, 16),
    (7, 33, 19),
    (13, 64, 31),
    (14, 128, 32),
    (15, 31, 48),
    (16, 512, 96),
    (29, 577, 47),
    (33, 16, 130),
    (64, 40, 200),
    (65, 192, 64),
    (100, 16, 300),
    (31, 1601, 65),
    (45, 800, 129),
    (200, 64, 16),
];

#[test]
fn products_equal_plain_loops() {
    for precision in [Precision::Full, Precision::Bf16] {
        for (m, k, n) in SHAPES {
            for left in [Lie::Rows, Lie::Columns, Lie::Strided] {
                for right in [Lie::Rows, Lie::Columns, Lie::Strided] {
                    let (mut a, mut b) = (Vec::new(), Vec::new());
                    let (a, b) = (lay(left, &mut a, m, k), lay(right, &mut b, k, n));
                    let what = format!("{precision:?} {left:?} {right:?}");
                    let b_at = |p, j| get(&b, p, j);
                    check_product(&what, precision, a, &b_at, n, |alpha, beta, c| {
                        matmul(precision, alpha, a, b, beta, c);
                    });
                    check_product(&what, precision, a, &b_at, n, |alpha, beta, c| {
                        matmul_serial(precision, alpha, a, b, beta, c);
                    });
                }
            }
        }
    }
}

#[test]
fn products_with_tiles_equal_plain_loops() {
    for precision in [Precision::Full, Precision::Bf16] {
        for (m, k, n) in SHAPES {
            let mut a = Vec::new();
            let a = lay(Lie::Rows, &mut a, m, k);
            let w = Grid::new(n, k);
            let b = |p: usize, j: usize| f64::from(w.values[j * k + p]);
            check_product("transposed tiles", precision, a, &b, n, |alpha, beta, c| {
                matmul_tiles(precision, alpha, a, &w, true, beta, c);
            });
            let w = Grid::new(k, n);
            let b = |p: usize, j: usize| f64::from(w.values[p * n + j]);
            check_product("tiles", precision, a, &b, n, |alpha, beta, c| {
                matmul_tiles(precision, alpha, a, &w, false, beta, c);
            });
        }
    }
}

#[test]
fn products_without_our_kernels_equal_plain_loops() {
    let (m, k, n) = (33, 1100, 1000);
    let mut a = Vec::new();
    let a = lay(Lie::Rows, &mut a, m, k);
    let w = Grid::new(n, k);
    let b = |p: usize, j: usize| f64::from(w.values[j * k + p]);
    check_product("portable, transposed", Precision::Full, a, &b, n, |alpha, beta, c| {
        portable::product_tiles(alpha, a, &w, true, beta, c, 2);
    });
    let w = Grid::new(k, n);
    let b = |p: usize, j: usize| f64::from(w.values[p * n + j]);
    check_product("portable", Precision::Full, a, &b, n, |alpha, beta, c| {
        portable::product_tiles(alpha, a, &w, false, beta, c, 2);
    });
}

#[test]
fn products_in_f64_equal_plain_loops() {
    let (m, k, n) = (5, 40, 9);
    let wide = |count| numbers(&[1], count).into_iter().map(f64::from).collect::<Vec<_>>();
    let (a, b, mut c) = (wide(m * k), wide(n * k), vec![f64::NAN; m * n]);
    let (a, b) = (Matrix::new(&a, m, k), Matrix::new(&b, n, k).transposed());
    matmul(Precision::Full, 2.0, a, b, 0.0, MatrixMut::new(&mut c, m, n));
    for i in 0..m {
        for j in 0..n {
            let sum: f64 = (0..k).map(|p| a.data[i * k + p] * b.data[j * k + p]).sum();
            assert!((c[i * n + j] - 2.0 * sum).abs() < 1e-12);
        }
    }
}

#[test]
fn nothing_to_add_up_leaves_scaled_values() {
    let mut c = vec![2.0f32, 4.0];
    let (a, b) = (Matrix::new(&[], 1, 0), Matrix::new(&[], 0, 2));
    matmul(Precision::Full, 1.0, a, b, 0.5, MatrixMut::new(&mut c, 1, 2));
    assert_eq!(c, [1.0, 2.0]);
    matmul(Precision::Full, 1.0, a, b, 0.0, MatrixMut::new(&mut c, 1, 2));
    assert_eq!(c, [0.0, 0.0]);
}

#[test]
fn results_do_not_depend_on_the_number_of_threads() {
    for precision in [Precision::Full, Precision::Bf16] {
        for (m, k, n) in
            [(100, 900, 300), (1, 900, 300), (16, 512, 576), (64, 192, 40), (300, 700, 16), (256, 9000, 128)]
        {
            let (a, w) = (numbers(&[1], m * k), Grid::new(n, k));
            let run = |threads| {
                let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
                let (mut c, mut d) = (vec![0.0; m * n], vec![0.0; m * n]);
                pool.install(|| {
                    let b = Matrix::new(&w.values, n, k).transposed();
                    let a = Matrix::new(&a, m, k);
                    matmul_tiles(precision, 1.0, a, &w, true, 0.0, MatrixMut::new(&mut c, m, n));
                    matmul(precision, 1.0, a, b, 0.0, MatrixMut::new(&mut d, m, n));
                });
                assert_eq!(c, d);
                c
            };
            let one = run(1);
            assert!(one == run(2) && one == run(3));
        }
    }
}

#[test]
#[should_panic(expected = "left operand is short")]
fn short_operands_are_refused() {
    let a = Matrix { data: &[0.0f32; 5], rows: 2, cols: 3, row_stride: 3, col_stride: 1 };
    matmul(Precision::Full, 1.0, a, Matrix::new(&[0.0; 3], 3, 1), 0.0, MatrixMut::new(&mut [0.0; 2], 2, 1));
}

/// Whether operands can be packed for AMX.
#[cfg(target_arch = "x86_64")]
fn packs_for_amx() -> bool {
    is_x86_feature_detected!("avx512bf16")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512dq")
}

#[cfg(target_arch = "x86_64")]
const SPLIT: engine::Engine = engine::Engine::Split(kernel_split::Right::Three);

/// On a CPU without AMX this checks the packed layout through a model of the instructions.
#[cfg(target_arch = "x86_64")]
#[test]
fn amx_products_equal_plain_loops() {
    use blocked::{Right, product};
    if !packs_for_amx() {
        return;
    }
    for (precision, engine) in [(Precision::Bf16, engine::Engine::Amx), (Precision::Full, SPLIT)] {
        for (m, k, n) in SHAPES {
            for left in [Lie::Rows, Lie::Columns, Lie::Strided] {
                let mut a = Vec::new();
                let a = lay(left, &mut a, m, k);
                for right in [Lie::Rows, Lie::Columns, Lie::Strided] {
                    let mut b = Vec::new();
                    let b = lay(right, &mut b, k, n);
                    let at = |p, j| get(&b, p, j);
                    check_product("AMX", precision, a, &at, n, |alpha, beta, c| {
                        product(engine, alpha, a, Right::Dense(b), beta, c, 2);
                    });
                }
                let w = Grid::new(n, k);
                let b = |p: usize, j: usize| f64::from(w.values[j * k + p]);
                check_product("AMX, transposed tiles", precision, a, &b, n, |alpha, beta, c| {
                    let b = Right::Tiles { w: &w, transposed: true };
                    product(engine, alpha, a, b, beta, c, 2);
                });
                let w = Grid::new(k, n);
                let b = |p: usize, j: usize| f64::from(w.values[p * n + j]);
                check_product("AMX, tiles", precision, a, &b, n, |alpha, beta, c| {
                    let b = Right::Tiles { w: &w, transposed: false };
                    product(engine, alpha, a, b, beta, c, 2);
                });
            }
        }
    }
}

/// Numbers that are normally distributed, times powers of two up to so high and down to so low.
#[cfg(target_arch = "x86_64")]
fn normal(key: u64, count: usize, powers: f64) -> Vec<f32> {
    let parts = numbers(&[key], 3 * count);
    let unit = |it: f32| (f64::from(it) + 1.0) / 2.0;
    let number = |it: &[f32]| {
        let radius = (-2.0 * unit(it[0]).max(1e-12).ln()).sqrt();
        (radius * (std::f64::consts::TAU * unit(it[1])).cos() * (powers * f64::from(it[2])).exp2()) as f32
    };
    parts.chunks_exact(3).map(number).collect()
}

#[cfg(target_arch = "x86_64")]
#[test]
fn split_products_are_as_exact_as_those_of_f32() {
    use blocked::{Right, product};
    if !packs_for_amx() {
        return;
    }
    let (m, n) = (40, 40);
    for (k, powers) in [64, 576, 1536, 8192].into_iter().flat_map(|k| [0.0, 10.0, 30.0].map(|it| (k, it))) {
        let (a, b) = (normal(1, m * k, powers), normal(2, k * n, powers));
        let exact: Vec<f64> = (0..m * n)
            .map(|at| (0..k).map(|p| f64::from(a[at / n * k + p]) * f64::from(b[p * n + at % n])).sum())
            .collect();
        let norm = |it: &mut dyn Iterator<Item = f64>| it.map(|it| it * it).sum::<f64>().sqrt();
        let size = norm(&mut exact.iter().copied());
        let [plain, split] = [engine::Engine::F32, SPLIT].map(|engine| {
            let mut c = vec![f32::NAN; m * n];
            let (a, b) = (Matrix::new(&a, m, k), Right::Dense(Matrix::new(&b, k, n)));
            product(engine, 1.0, a, b, 0.0, MatrixMut::new(&mut c, m, n), 2);
            let errors = || c.iter().zip(&exact).map(|(c, exact)| f64::from(*c) - exact);
            (norm(&mut errors()) / size, errors().fold(0.0, |max: f64, it| max.max(it.abs())) / size)
        });
        assert!(
            split.0 <= 2.0 * plain.0 && split.1 <= 4.0 * plain.1,
            "{k} {powers}: {split:?}, f32 {plain:?}"
        );
    }
}

#[cfg(target_arch = "x86_64")]
#[test]
fn split_products_keep_infinities_nans_and_the_largest_numbers() {
    use blocked::{Right, product};
    if !packs_for_amx() {
        return;
    }
    let (m, k, n) = (40, 700, 70);
    let special = [f32::INFINITY, f32::NEG_INFINITY, f32::NAN, f32::MAX, -f32::MAX, 3.3961776e38, 1e-42];
    let special = special.into_iter().chain([f32::from_bits(0x7f80_0001), f32::from_bits(0xffff_ffff)]);
    for (it, beta) in special.flat_map(|it| [(it, 0.0), (it, 1.0)]) {
        // In a and in b; times 1, whose lower parts are 0, times less than 1, and times 0.
        for (in_a, others) in [(true, 1.0), (true, 0.3), (true, 0.0), (false, 1.0), (false, -0.3)] {
            let (mut a, mut b) = (numbers(&[1], m * k), vec![others; k * n]);
            b.iter_mut().skip(1).step_by(5).for_each(|it| *it *= 0.1);
            if in_a {
                a[7 * k + 650] = it
            } else {
                b[650 * n + 7] = it
            }
            let [plain, split] = [engine::Engine::F32, SPLIT].map(|engine| {
                let mut c = vec![0.5; m * n];
                let (a, b) = (Matrix::new(&a, m, k), Right::Dense(Matrix::new(&b, k, n)));
                product(engine, 1.0, a, b, beta, MatrixMut::new(&mut c, m, n), 2);
                c
            });
            for (at, (plain, split)) in plain.iter().zip(&split).enumerate() {
                let same = plain == split || plain.is_nan() && split.is_nan();
                let near = (plain - split).abs() <= 1e-4 + 1e-5 * plain.abs();
                assert!(same || near, "{it} in a: {in_a}, times {others}, at {at}: {split}, not {plain}");
            }
        }
    }
}

/// A weight that is there in bf16.
#[cfg(target_arch = "x86_64")]
struct Halves(Grid, Vec<half::bf16>);

#[cfg(target_arch = "x86_64")]
impl Tiles for Halves {
    fn rows(&self) -> usize {
        self.0.rows
    }
    fn cols(&self) -> usize {
        self.0.cols
    }
    fn read(&self, rows: Range<usize>, cols: Range<usize>, out: &mut [f32]) {
        self.0.read(rows, cols, out);
    }
    fn as_bf16(&self) -> Option<&[half::bf16]> {
        Some(&self.1)
    }
}

#[cfg(target_arch = "x86_64")]
#[test]
fn weights_in_bf16_give_the_bits_of_rounded_ones() {
    use blocked::{Right, product};
    if !packs_for_amx() {
        return;
    }
    let rounded = |it: f32| half::bf16::from_f32(it).to_f32();
    for (m, k, n) in SHAPES {
        for transposed in [true, false] {
            let (rows, cols) = if transposed { (n, k) } else { (k, n) };
            let grid = Grid::new(rows, cols);
            let halves = grid.values.iter().map(|it| half::bf16::from_f32(*it)).collect();
            let halves = Halves(Grid::new(rows, cols), halves);
            let a = numbers(&[5], m * k);
            let multiply = |engine: engine::Engine, w: &dyn Tiles| {
                let mut c = vec![f32::NAN; m * n];
                let b = Right::Tiles { w, transposed };
                let c_of = MatrixMut::new(&mut c, m, n);
                product(engine, 1.0, Matrix::new(&a, m, k), b, 0.0, c_of, 2);
                c
            };
            let what = format!("{m}×{k}×{n}, transposed {transposed}");
            let amx = engine::Engine::Amx;
            assert_eq!(multiply(amx, &grid), multiply(amx, &halves), "{what}");
            let grid = Grid { rows, cols, values: grid.values.iter().copied().map(rounded).collect() };
            let with_halves = multiply(SPLIT.with_right_in_bf16(), &halves);
            assert_eq!(multiply(SPLIT, &grid), with_halves, "{what}, f32");
        }
    }
}

#[test]
fn bf16_products_round_each_operand_once() {
    // Products of numbers that bf16 holds are exact; what it doesn't hold is rounded, if at all.
    let (m, k, n) = (64, 64, 64);
    let a: Vec<f32> = (0..m * k).map(|it| (it % 17) as f32 - 8.0).collect();
    let b: Vec<f32> = (0..k * n).map(|it| (it % 13) as f32 / 4.0).collect();
    let (mut full, mut half) = (vec![0.0; m * n], vec![0.0; m * n]);
    let product = |precision, c: &mut [f32]| {
        matmul(precision, 1.0, Matrix::new(&a, m, k), Matrix::new(&b, k, n), 0.0, MatrixMut::new(c, m, n));
    };
    product(Precision::Full, &mut full);
    product(Precision::Bf16, &mut half);
    assert_eq!(full, half);
    eprintln!("{}", cpu_products());
}
