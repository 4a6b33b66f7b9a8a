//! Products by our own kernels (`kernels/matmul.cu`), where cuBLASLt isn't there.

use super::{Gpu, suffix};
use crate::product::{Layout, Placed, Product};
use crate::{DType, Result};

/// A kernel's share of the result, and what a block of it takes.
struct Tile {
    rows: usize,
    cols: usize,
    threads: u32,
    /// Bytes of shared memory: of the kernels for sm_80 and of those for sm_75.
    shared: (usize, usize),
    ending: &'static str,
}

const LARGE: Tile = Tile { rows: 128, cols: 256, threads: 256, shared: (98304, 49152), ending: "" };
const THIN: Tile = Tile { rows: 64, cols: 64, threads: 128, shared: (49152, 32768), ending: "_thin" };
const F32: Tile = Tile { rows: 64, cols: 64, threads: 256, shared: (0, 0), ending: "" };

impl Tile {
    fn count(&self, c: &Placed) -> usize {
        c.rows.div_ceil(self.rows) * c.cols.div_ceil(self.cols)
    }

    /// Small tiles where large ones would be mostly empty, or too few to go round.
    fn of(gpu: &Gpu, c: &Placed, operands: DType) -> Tile {
        let few = LARGE.count(c) * 2 < gpu.multiprocessors;
        match operands {
            DType::F32 => F32,
            _ if few || c.rows.min(c.cols) <= THIN.rows => THIN,
            _ => LARGE,
        }
    }
}

/// The result isn't empty.
pub(super) fn multiply(gpu: &Gpu, product: &Product) -> Result<()> {
    let Product { layout, alpha, a, b, beta, c } = product;
    let tile = Tile::of(gpu, c, a.dtype);
    let layout = match layout {
        Layout::Nn => "nn",
        Layout::Nt => "nt",
        Layout::Tn => "tn",
    };
    let kernel = format!("matmul_{layout}_{}_{}{}", suffix(a.dtype)?, suffix(c.dtype)?, tile.ending);
    let shared = if gpu.architecture >= 80 { tile.shared.0 } else { tile.shared.1 };
    let launch = gpu.plain_kernel("matmul", &kernel)?.grid(tile.count(c), tile.threads).shared(shared);
    let launch = launch.word(c.address).word(a.address).word(b.address);
    let launch =
        launch.int(c.rows).int(c.cols).int(product.inner()).int(a.stride).int(b.stride).int(c.stride);
    // SAFETY: matmul(c, a, b, m, n, k, lda, ldb, ldc, alpha, beta); `Placed` holds what `multiply_on_gpu` checked.
    unsafe { launch.float((*alpha).into()).float((*beta).into()).run() }
}
