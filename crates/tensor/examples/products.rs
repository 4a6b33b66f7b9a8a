//! Speed of the CPU's matrix products, in GFLOP/s (the best and the middle of several runs), beside
//! what the CPU could do: its fused multiply-adds, and its memory.
//!
//! `cargo run --release -p ferrotune-tensor --example products [part of a name]`
#![allow(clippy::print_stdout)]

use std::hint::black_box;
use std::ops::Range;
use std::time::{Duration, Instant};

use ferrotune_tensor::product::{matmul, matmul_serial, matmul_tiles};
use ferrotune_tensor::{Counter, Matrix, MatrixMut, Precision, Tiles, uniform};
use rayon::prelude::*;

/// A stand-in for a quantised weight: 4 bits each, and a scale for 64 of them.
struct FourBits {
    rows: usize,
    cols: usize,
    codes: Vec<u8>,
    scales: Vec<f32>,
}

impl FourBits {
    fn new(rows: usize, cols: usize) -> FourBits {
        let codes = (0..rows * cols / 2).map(|it| (it * 37 + it / 191) as u8).collect();
        FourBits { rows, cols, codes, scales: vec![0.01; (rows * cols).div_ceil(64)] }
    }
}

impl Tiles for FourBits {
    fn rows(&self) -> usize {
        self.rows
    }
    fn cols(&self) -> usize {
        self.cols
    }
    fn read(&self, rows: Range<usize>, cols: Range<usize>, out: &mut [f32]) {
        for (row, out) in rows.zip(out.chunks_mut(cols.len())) {
            let mut at = row * self.cols + cols.start;
            let mut out = out;
            while !out.is_empty() {
                let count = (64 - at % 64).min(out.len());
                let (block, rest) = out.split_at_mut(count);
                decode(&self.codes[at / 2..][..count / 2], self.scales[at / 64], block);
                (at, out) = (at + count, rest);
            }
        }
    }
}

fn decode(codes: &[u8], scale: f32, out: &mut [f32]) {
    #[cfg(target_arch = "x86_64")]
    if is_x86_feature_detected!("avx512f") && out.len() == 64 {
        // SAFETY: the feature is there; 32 bytes are read and 64 numbers written, as asserted.
        unsafe {
            use std::arch::x86_64::*;
            assert_eq!((codes.len(), out.len()), (32, 64));
            let table: [f32; 16] = std::array::from_fn(|it| it as f32 - 8.0);
            let table = _mm512_mul_ps(_mm512_loadu_ps(table.as_ptr()), _mm512_set1_ps(scale));
            lookup(codes, table, out);
        }
        return;
    }
    for (code, pair) in codes.iter().zip(out.chunks_exact_mut(2)) {
        pair[0] = (f32::from(code >> 4) - 8.0) * scale;
        pair[1] = (f32::from(code & 15) - 8.0) * scale;
    }
}

/// # Safety
/// 32 codes, 64 numbers.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f")]
unsafe fn lookup(codes: &[u8], table: std::arch::x86_64::__m512, out: &mut [f32]) {
    use std::arch::x86_64::*;
    for part in 0..4 {
        // SAFETY: the caller's.
        unsafe {
            let bytes = _mm_loadl_epi64(codes.as_ptr().add(8 * part).cast());
            let pairs = _mm_unpacklo_epi8(_mm_srli_epi16::<4>(bytes), bytes);
            let numbers = _mm512_permutexvar_ps(_mm512_cvtepu8_epi32(pairs), table);
            _mm512_storeu_ps(out.as_mut_ptr().add(16 * part), numbers);
        }
    }
}

/// Best and middle time.
fn time(mut work: impl FnMut()) -> (f64, f64) {
    work();
    let begun = Instant::now();
    let mut times = Vec::new();
    while times.len() < 5 || (begun.elapsed() < Duration::from_millis(300) && times.len() < 2000) {
        let start = Instant::now();
        work();
        times.push(start.elapsed().as_secs_f64());
    }
    times.sort_by(f64::total_cmp);
    (times[0], times[times.len() / 2])
}

fn line(name: &str, flops: usize, work: impl FnMut()) {
    if std::env::args().nth(1).is_none_or(|part| name.contains(&part)) {
        let (best, middle) = time(work);
        let speed = |time: f64| flops as f64 / time / 1e9;
        println!("{name:58} {:8.1} {:8.1}   {:9.1} us", speed(best), speed(middle), best * 1e6);
    }
}

/// Through the `gemm` crate, as candle does it.
fn gemm_crate(a: Matrix<'_, f32>, b: Matrix<'_, f32>, beta: f32, c: MatrixMut<'_, f32>, serial: bool) {
    let parallelism = if serial { gemm::Parallelism::None } else { gemm::Parallelism::Rayon(0) };
    // SAFETY: the matrices below are as large as they say.
    unsafe {
        gemm::gemm(
            a.rows,
            b.cols,
            a.cols,
            c.data.as_mut_ptr(),
            1,
            c.row_stride as isize,
            beta != 0.0,
            a.data.as_ptr(),
            a.col_stride as isize,
            a.row_stride as isize,
            b.data.as_ptr(),
            b.col_stride as isize,
            b.row_stride as isize,
            beta,
            1.0,
            false,
            false,
            false,
            parallelism,
        );
    }
}

fn numbers(count: usize) -> Vec<f32> {
    uniform(Counter::new(&[count as u64]), 1.0, count)
}

fn main() {
    println!("{} threads; GFLOP/s at best and in the middle, best time", rayon::current_num_threads());
    peak();
    copy();
    for (m, k, n) in [
        (512, 576, 192),
        (512, 576, 576),
        (512, 576, 960),
        (512, 576, 1536),
        (512, 576, 3072),
        (512, 1536, 576),
        (64, 576, 3072),
        (2048, 2048, 2048),
        (128, 576, 49152),
    ] {
        let (a, mut c) = (numbers(m * k), vec![0.0; m * n]);
        let (a, flops) = (Matrix::new(&a, m, k), 2 * m * k * n);
        let dense = numbers(n * k);
        let b = Matrix::new(&dense, n, k).transposed();
        let name = |what: &str| format!("{m}x{k}x{n} {what}");
        line(&name("gemm crate, b transposed"), flops, || {
            gemm_crate(a, b, 0.0, MatrixMut::new(&mut c, m, n), false);
        });
        for precision in [Precision::Full, Precision::Bf16] {
            line(&name(&format!("{precision:?}, b transposed")), flops, || {
                matmul(precision, 1.0, a, b, 0.0, MatrixMut::new(&mut c, m, n));
            });
            let plain = Matrix::new(&dense, k, n);
            line(&name(&format!("{precision:?}, b plain")), flops, || {
                matmul(precision, 1.0, a, plain, 0.0, MatrixMut::new(&mut c, m, n));
            });
            for transposed in [true, false] {
                let w = if transposed { FourBits::new(n, k) } else { FourBits::new(k, n) };
                line(&name(&format!("{precision:?}, 4 bits, transposed: {transposed}")), flops, || {
                    matmul_tiles(precision, 1.0, a, &w, transposed, 0.0, MatrixMut::new(&mut c, m, n));
                });
            }
        }
    }
    thin();
    decode_one();
    attention();
}

/// LoRA's products: tokens t, rank r, width.
fn thin() {
    let (t, r) = (512, 16);
    for width in [576, 1536, 3072] {
        let (x, low, w) = (numbers(t * width), numbers(t * r), numbers(r * width));
        let flops = 2 * t * r * width;
        let x = Matrix::new(&x, t, width);
        let low = Matrix::new(&low, t, r);
        let both = |name: &str, a: Matrix<'_, f32>, b: Matrix<'_, f32>, beta: f32| {
            let (m, n) = (a.rows, b.cols);
            let mut c = numbers(m * n);
            line(&format!("thin {name}, gemm crate"), flops, || {
                gemm_crate(a, b, beta, MatrixMut::new(&mut c, m, n), false);
            });
            for precision in [Precision::Full, Precision::Bf16] {
                line(&format!("thin {name}, {precision:?}"), flops, || {
                    matmul(precision, 1.0, a, b, beta, MatrixMut::new(&mut c, m, n));
                });
            }
        };
        let plain = Matrix::new(&w, r, width);
        let tall = Matrix::new(&w, width, r);
        both(&format!("low = x·Aᵀ {width}"), x, plain.transposed(), 0.0);
        both(&format!("y += low·Bᵀ {width}"), low, tall.transposed(), 1.0);
        both(&format!("dlow = dy·B {width}"), x, tall, 0.0);
        both(&format!("dx += dlow·A {width}"), low, plain, 1.0);
        both(&format!("dA += dlowᵀ·x {width}"), low.transposed(), x, 1.0);
        both(&format!("dB += dyᵀ·low {width}"), x.transposed(), low, 1.0);
    }
}

/// One token.
fn decode_one() {
    for (k, n) in [(576, 1536), (1536, 576), (576, 49152), (4096, 4096)] {
        let (x, mut y, dense, w) = (numbers(k), vec![0.0; n], numbers(n * k), FourBits::new(n, k));
        let x = Matrix::new(&x, 1, k);
        let b = Matrix::new(&dense, n, k).transposed();
        line(&format!("one row {k}x{n}, gemm crate"), 2 * k * n, || {
            gemm_crate(x, b, 0.0, MatrixMut::new(&mut y, 1, n), false);
        });
        line(&format!("one row {k}x{n}, dense"), 2 * k * n, || {
            matmul(Precision::Full, 1.0, x, b, 0.0, MatrixMut::new(&mut y, 1, n));
        });
        line(&format!("one row {k}x{n}, 4 bits"), 2 * k * n, || {
            matmul_tiles(Precision::Full, 1.0, x, &w, true, 0.0, MatrixMut::new(&mut y, 1, n));
        });
    }
}

/// A head's products, on one thread, out of rows of 9 heads.
fn attention() {
    let (d, row) = (64, 576);
    for t in [64, 256, 512] {
        let (q, k) = (numbers(t * row), numbers(512 * row));
        let (q, k) = (Matrix::new(&q, t, row).columns(64..128), Matrix::new(&k, 512, row).columns(64..128));
        let (p, mut scores, mut out) = (numbers(t * 512), vec![0.0; t * 512], numbers(512 * row));
        let p = Matrix::new(&p, t, 512);
        let flops = 2 * t * d * 512;
        line(&format!("serial {t} q·kᵀ, gemm crate"), flops, || {
            gemm_crate(q, k.transposed(), 0.0, MatrixMut::new(&mut scores, t, 512), true);
        });
        for precision in [Precision::Full, Precision::Bf16] {
            line(&format!("serial {t} q·kᵀ, {precision:?}"), flops, || {
                matmul_serial(precision, 0.1, q, k.transposed(), 0.0, MatrixMut::new(&mut scores, t, 512));
            });
        }
        line(&format!("serial {t} p·v, gemm crate"), flops, || {
            let c = MatrixMut::new(&mut out, t, row).columns(64..128);
            gemm_crate(p, k, 0.0, c, true);
        });
        for precision in [Precision::Full, Precision::Bf16] {
            line(&format!("serial {t} p·v, {precision:?}"), flops, || {
                let c = MatrixMut::new(&mut out, t, row).columns(64..128);
                matmul_serial(precision, 1.0, p, k, 0.0, c);
            });
        }
        line(&format!("serial {t} pᵀ·do, gemm crate"), flops, || {
            let c = MatrixMut::new(&mut out, 512, row).columns(64..128);
            gemm_crate(p.transposed(), q, 1.0, c, true);
        });
        for precision in [Precision::Full, Precision::Bf16] {
            line(&format!("serial {t} pᵀ·do, {precision:?}"), flops, || {
                let c = MatrixMut::new(&mut out, 512, row).columns(64..128);
                matmul_serial(precision, 1.0, p.transposed(), q, 1.0, c);
            });
        }
    }
}

/// What the vector units do when nothing else is to be done.
fn peak() {
    #[cfg(target_arch = "x86_64")]
    if is_x86_feature_detected!("avx512f") {
        let (turns, threads) = (100_000, rayon::current_num_threads());
        line("peak f32, all threads", turns * 28 * 32 * threads, || {
            (0..threads).into_par_iter().for_each(|_| {
                // SAFETY: the feature is there.
                black_box(unsafe { peak_f32(turns) });
            });
        });
        line("peak f32, one thread", turns * 28 * 32, || {
            // SAFETY: the feature is there.
            black_box(unsafe { peak_f32(turns) });
        });
        if is_x86_feature_detected!("avx512bf16") {
            line("peak avx512_bf16, one thread", turns * 28 * 64, || {
                // SAFETY: the feature is there.
                black_box(unsafe { peak_bf16(turns) });
            });
        }
    }
}

/// # Safety
/// AVX-512F.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f")]
unsafe fn peak_f32(turns: usize) -> f32 {
    use std::arch::x86_64::*;
    let mut acc = [_mm512_set1_ps(black_box(0.0)); 28];
    let (x, y) = (_mm512_set1_ps(black_box(1e-9)), _mm512_set1_ps(black_box(1e-9)));
    for _ in 0..turns {
        for acc in &mut acc {
            *acc = _mm512_fmadd_ps(x, y, *acc);
        }
        // SAFETY: nothing is done; the loop stays as it is written.
        unsafe { std::arch::asm!("/* {0} */", in(zmm_reg) acc[0], options(nomem, nostack)) };
    }
    acc.iter().map(|it| _mm512_reduce_add_ps(*it)).sum()
}

/// # Safety
/// AVX512_BF16.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bf16")]
unsafe fn peak_bf16(turns: usize) -> f32 {
    use std::arch::x86_64::*;
    let mut acc = [_mm512_set1_ps(black_box(0.0)); 28];
    let x = _mm512_cvtne2ps_pbh(_mm512_set1_ps(black_box(1e-9)), _mm512_set1_ps(black_box(1e-9)));
    for _ in 0..turns {
        for acc in &mut acc {
            *acc = _mm512_dpbf16_ps(*acc, x, x);
        }
    }
    acc.iter().map(|it| _mm512_reduce_add_ps(*it)).sum()
}

/// Memory, all threads: bytes read and written, as GB/s in the place of GFLOP/s.
fn copy() {
    let (from, mut to) = (vec![1u8; 256 << 20], vec![0u8; 256 << 20]);
    let part = from.len() / rayon::current_num_threads();
    line("copy of 256 MiB, GB/s read and written", 2 * from.len(), || {
        to.par_chunks_mut(part).zip(from.par_chunks(part)).for_each(|(to, from)| to.copy_from_slice(from));
    });
}
