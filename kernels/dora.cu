// DoRA: y = g⊙(W·x + s·B·A·x), g = m/norm, norm = ‖W + s·B·A‖ of each output row (crates/lora/src/dora.rs).
//   dora_norm      norm = √(squares + Σ_k b[k]·(2s·p[k] + s²·Σ_l gram[k, l]·b[l])),  gain = m/norm
//                  // squares, m, norm, gain (cols);  p = A·Wᵀ (R, cols);  b = B (cols, R);  gram = A·Aᵀ (R, R)
//   dora_scale     out = gain⊙z + keep·out       // (rows, cols), each with its stride; z may be out
//   dora_dots      partials = Σ a·b over a part's rows        // (parts, cols);  a, b (rows, cols), each with its stride
//   dora_gradient  grad += Σ partials / norm      // over the parts, in their order
// norm, gain, out, partials =; grad +=. Sums are in f32, in a fixed order.
//
// Launch: BLOCK threads; grid.x counts BLOCK columns a block (dora_scale: 1024 numbers, any grid is right); grid.y of dora_dots
// is the number of parts; no dynamic shared memory.

#include "common.cuh"

constexpr int BLOCK = 256;
constexpr float SMALLEST = 1e-30f;  // of a squared norm

template <typename T>
__device__ void dora_norm(float* norm, float* gain, const float* m, const float* squares, const T* p, const float* b,
                          const float* gram, float s, int cols, int rank) {
    const int j = blockIdx.x * BLOCK + threadIdx.x;
    if (j >= cols) return;
    const float* own = b + static_cast<long long>(j) * rank;
    float sum = 0;
    for (int k = 0; k < rank; k++) {
        float inner = 0;
        for (int l = 0; l < rank; l++) inner += gram[k * rank + l] * own[l];
        sum += own[k] * (2.0f * s * to_f32(p[static_cast<long long>(k) * cols + j]) + s * s * inner);
    }
    const float length = sqrtf(fmaxf(squares[j] + sum, SMALLEST));
    norm[j] = length;
    gain[j] = m[j] / length;
}

template <typename T>
__device__ void dora_scale(T* out, const T* z, const float* gain, float keep, int rows, int cols, int out_stride, int z_stride) {
    for_each_run<1>(rows, cols, [&](int row, int column) {
        T* address = out + static_cast<long long>(row) * out_stride + column;
        float value = gain[column] * to_f32(z[static_cast<long long>(row) * z_stride + column]);
        if (keep != 0.0f) value += keep * to_f32(*address);
        *address = from_f32<T>(value);
    });
}

template <typename T>
__device__ void dora_dots(float* partials, const T* a, const T* b, int rows, int cols, int a_stride, int b_stride) {
    const int column = blockIdx.x * BLOCK + threadIdx.x;
    if (column >= cols) return;
    const int each = (rows + gridDim.y - 1) / gridDim.y, first = blockIdx.y * each;
    float sum = 0;
    for (int row = first; row < min(first + each, rows); row++) {
        sum += to_f32(a[static_cast<long long>(row) * a_stride + column]) * to_f32(b[static_cast<long long>(row) * b_stride + column]);
    }
    partials[static_cast<long long>(blockIdx.y) * cols + column] = sum;
}

extern "C" __global__ void __launch_bounds__(BLOCK)
dora_gradient(float* grad, const float* partials, const float* norm, int parts, int cols) {
    const int column = blockIdx.x * BLOCK + threadIdx.x;
    if (column >= cols) return;
    float sum = 0;
    for (int part = 0; part < parts; part++) sum += partials[static_cast<long long>(part) * cols + column];
    grad[column] += sum / norm[column];
}

#define DEFINE(NAME, T)                                                                                                              \
    extern "C" __global__ void __launch_bounds__(BLOCK)                                                                              \
    dora_norm_##NAME(float* norm, float* gain, const float* m, const float* squares, const T* p, const float* b, const float* gram,  \
                     float s, int cols, int rank) {                                                                                  \
        dora_norm(norm, gain, m, squares, p, b, gram, s, cols, rank);                                                                \
    }                                                                                                                                \
    extern "C" __global__ void __launch_bounds__(BLOCK)                                                                              \
    dora_scale_##NAME(T* out, const T* z, const float* gain, float keep, int rows, int cols, int out_stride, int z_stride) {         \
        dora_scale(out, z, gain, keep, rows, cols, out_stride, z_stride);                                                            \
    }                                                                                                                                \
    extern "C" __global__ void __launch_bounds__(BLOCK)                                                                              \
    dora_dots_##NAME(float* partials, const T* a, const T* b, int rows, int cols, int a_stride, int b_stride) {                      \
        dora_dots(partials, a, b, rows, cols, a_stride, b_stride);                                                                   \
    }

FOR_NUMBER_TYPES(DEFINE)
