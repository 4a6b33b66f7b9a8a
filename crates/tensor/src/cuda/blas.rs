//! Products through cuBLASLt, one plan for each kind of product.
//!
//! cuBLASLt's matrices lie column after column: a row-major (r, c) is its (c, r). So the transpose of
//! the product is asked for, Cᵀ = op(B)ᵀ·op(A)ᵀ, and nothing is copied.

use std::collections::HashMap;
use std::ffi::c_void;
use std::sync::Mutex;

use cudarc::cublaslt::{result as lt, sys};
use cudarc::driver::result as driver;

use super::{Gpu, Work, library};
use crate::product::{Layout, Product};
use crate::{DType, Error, Result};

/// Scratch memory that cuBLASLt may use: what NVIDIA advises for Hopper, and older cards take less.
const WORKSPACE_BYTES: usize = 32 << 20;

/// cuBLASLt, opened.
pub(super) struct Blas {
    handle: sys::cublasLtHandle_t,
    workspace: u64,
    plans: Mutex<HashMap<Kind, Plan>>,
}

/// What a plan depends on.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
struct Kind {
    layout: Layout,
    sizes: (usize, usize, usize),
    strides: (usize, usize, usize),
    operands: DType,
    result: DType,
    /// Powers of two that divide the addresses, at most 256.
    alignments: (u32, u32, u32),
}

/// Descriptors, and the algorithm that cuBLASLt chose. Kept for the life of the process.
#[derive(Clone, Copy)]
struct Plan {
    product: sys::cublasLtMatmulDesc_t,
    a: sys::cublasLtMatrixLayout_t,
    b: sys::cublasLtMatrixLayout_t,
    c: sys::cublasLtMatrixLayout_t,
    algorithm: sys::cublasLtMatmulAlgo_t,
}

impl Blas {
    /// None where the library is missing or doesn't start.
    pub(super) fn open(gpu: &Gpu) -> Option<Blas> {
        library::cublas_lt().found.as_ref()?;
        gpu.bind().ok()?;
        let handle = lt::create_handle().ok()?;
        // SAFETY: it is only ever given to cuBLASLt, on the same stream.
        let workspace = unsafe { driver::malloc_async(gpu.raw_stream(), WORKSPACE_BYTES) }.ok()?;
        Some(Blas { handle, workspace, plans: Mutex::default() })
    }

    /// With its version, for people.
    pub(super) fn name(&self) -> String {
        // SAFETY: the library is loaded; the call takes nothing.
        let version = unsafe { sys::cublasLtGetVersion() };
        format!("cuBLASLt {}.{}.{}", version / 10_000, version / 100 % 100, version % 100)
    }

    pub(super) fn multiply(&self, gpu: &Gpu, product: &Product) -> Result<()> {
        let Product { layout, alpha, a, b, beta, c } = product;
        let kind = Kind {
            layout: *layout,
            sizes: (c.rows, c.cols, product.inner()),
            strides: (a.stride, b.stride, c.stride),
            operands: a.dtype,
            result: c.dtype,
            alignments: (alignment(a.address), alignment(b.address), alignment(c.address)),
        };
        gpu.bind()?;
        let mut plans = self.plans.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        let plan = match plans.get(&kind) {
            Some(plan) => *plan,
            None => {
                let plan = self.plan(&kind).map_err(|error| {
                    let ((m, n, k), (ab, c)) = (kind.sizes, (kind.operands, kind.result));
                    Error::Device(format!(
                        "cuBLASLt has no product {layout:?} of {m} × {n} × {k} from {ab:?} to {c:?}: {error}"
                    ))
                })?;
                plans.insert(kind, plan);
                plan
            }
        };
        drop(plans);
        // SAFETY: the addresses hold matrices of the plan's shapes (`Placed` checks), and alpha and
        // beta are read before the call returns.
        let launch = || unsafe {
            lt::matmul(
                self.handle,
                plan.product,
                std::ptr::from_ref(alpha).cast(),
                std::ptr::from_ref(beta).cast(),
                b.address as *const c_void,
                plan.a,
                a.address as *const c_void,
                plan.b,
                c.address as *const c_void,
                plan.c,
                c.address as *mut c_void,
                plan.c,
                &plan.algorithm,
                self.workspace as *mut c_void,
                WORKSPACE_BYTES,
                gpu.raw_stream().cast(),
            )
        };
        let name = || {
            let (m, n, k) = kind.sizes;
            let work = Work { bytes: 0.0, flops: 2.0 * m as f64 * n as f64 * k as f64 };
            let (operands, result) = (kind.operands.as_str(), kind.result.as_str());
            (format!("product {layout:?} {m}×{n}×{k} {operands}→{result}"), work)
        };
        let done = gpu.profile.around(gpu.raw_stream(), name, launch);
        done.map_err(|error| {
            Error::Device(format!("cuda:{}: a product through cuBLASLt: {error}", gpu.ordinal))
        })
    }

    /// Our b is cuBLASLt's A, and our a its B.
    fn plan(&self, kind: &Kind) -> Result<Plan, lt::CublasError> {
        use sys::cublasLtMatmulDescAttributes_t as Product;
        use sys::cublasLtMatmulPreferenceAttributes_t as Preference;
        let (m, n, k) = kind.sizes;
        let (lda, ldb, ldc) = kind.strides;
        let operands = data_type(kind.operands);
        let product = lt::create_matmul_desc(
            sys::cublasComputeType_t::CUBLAS_COMPUTE_32F,
            sys::cudaDataType_t::CUDA_R_32F,
        )?;
        let (a_turned, b_turned) = (kind.layout == Layout::Tn, kind.layout == Layout::Nt);
        let shape = |turned: bool, rows: usize, cols: usize| if turned { (cols, rows) } else { (rows, cols) };
        // As stored, column after column: b is (n, k) of them, or (k, n) where our product turns it.
        let ((a_rows, a_cols), (b_rows, b_cols)) = (shape(a_turned, k, m), shape(b_turned, n, k));
        let matrix = |dtype, rows: usize, cols: usize, stride: usize| {
            lt::create_matrix_layout(dtype, rows as u64, cols as u64, stride as i64)
        };
        let (a, b) = (matrix(operands, b_rows, b_cols, ldb)?, matrix(operands, a_rows, a_cols, lda)?);
        let c = matrix(data_type(kind.result), n, m, ldc)?;
        let preference = lt::create_matmul_pref()?;
        let alignments = [
            (Preference::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, kind.alignments.1),
            (Preference::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, kind.alignments.0),
            (Preference::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, kind.alignments.2),
            (Preference::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, kind.alignments.2),
        ];
        // SAFETY: every attribute is given with its own type's size, and all handles are alive.
        unsafe {
            for (attribute, yes) in [
                (Product::CUBLASLT_MATMUL_DESC_TRANSA, b_turned),
                (Product::CUBLASLT_MATMUL_DESC_TRANSB, a_turned),
            ] {
                let operation = i32::from(yes); // CUBLAS_OP_T is 1, CUBLAS_OP_N is 0
                let value = (&raw const operation).cast();
                lt::set_matmul_desc_attribute(product, attribute, value, size_of_val(&operation))?;
            }
            let bytes = WORKSPACE_BYTES;
            let most = Preference::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES;
            lt::set_matmul_pref_attribute(preference, most, (&raw const bytes).cast(), size_of_val(&bytes))?;
            for (attribute, bytes) in alignments {
                lt::set_matmul_pref_attribute(
                    preference,
                    attribute,
                    (&raw const bytes).cast(),
                    size_of_val(&bytes),
                )?;
            }
            let found = lt::get_matmul_algo_heuristic(self.handle, product, a, b, c, c, preference);
            lt::destroy_matmul_pref(preference)?;
            Ok(Plan { product, a, b, c, algorithm: found?.algo })
        }
    }
}

fn data_type(dtype: DType) -> sys::cudaDataType {
    match dtype {
        DType::F16 => sys::cudaDataType_t::CUDA_R_16F,
        DType::BF16 => sys::cudaDataType_t::CUDA_R_16BF,
        _ => sys::cudaDataType_t::CUDA_R_32F,
    }
}

fn alignment(address: u64) -> u32 {
    1 << address.trailing_zeros().min(8)
}
