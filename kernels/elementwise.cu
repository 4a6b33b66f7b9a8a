// One number in, one out.
//   cast          out = in, rounded
//   scale         a = scale·a
//   add_scaled    a += scale·b
//   add_bias      y += bias                y // (rows, cols) with a stride;  bias // (cols)
//   copy_columns  out = in                 // (rows, cols), each with its stride
//   dropout       out = x/(1 − p) where unit(key, row·width + col) >= p, else 0;   out may be x
//                 // (rows, width), each with its stride; unit is counted (crates/tensor/src/random.rs, crates/lora/src/adapter.rs),
//                 so that the backward is the same function of the same key
//
// Launch: BLOCK threads; grid.x counts 4096 numbers a block for kernels of n, 2048 for kernels of rows (any grid is right); no
// dynamic shared memory.

#include "common.cuh"

constexpr int BLOCK = 256;
constexpr int EACH = 16;  // numbers of a thread whose loads are under way together

// ---- Kernels of n numbers

// out[i] = f(in[i]) for begin <= i < end, in runs.
template <int WIDTH, typename D, typename S, typename F>
__device__ void map_runs(D* out, const S* in, long long begin, long long end, F f) {
    constexpr int RUNS = EACH / WIDTH, STEP = BLOCK * WIDTH;
#pragma unroll 1
    for (long long first = begin + static_cast<long long>(blockIdx.x) * RUNS * STEP + threadIdx.x * WIDTH; first < end;
         first += static_cast<long long>(gridDim.x) * RUNS * STEP) {
        Run<S, WIDTH> runs[RUNS];
#pragma unroll
        for (int k = 0; k < RUNS; k++) {
            if (first + k * STEP < end) runs[k] = load_run<WIDTH>(in + first + k * STEP);
        }
#pragma unroll
        for (int k = 0; k < RUNS; k++) {
            float values[WIDTH];
#pragma unroll
            for (int i = 0; i < WIDTH; i++) values[i] = f(runs[k][i]);
            if (first + k * STEP < end) store_run(out + first + k * STEP, values);
        }
    }
}

template <typename D, typename S, typename F>
__device__ void map(D* out, const S* in, long long n, F f) {
    constexpr int WIDTH = Pack<D>::SIZE < Pack<S>::SIZE ? Pack<D>::SIZE : Pack<S>::SIZE;
    const long long whole = runs_are_aligned<WIDTH>(out) && runs_are_aligned<WIDTH>(in) ? n / WIDTH * WIDTH : 0;
    map_runs<WIDTH>(out, in, 0, whole, f);
    map_runs<1>(out, in, whole, n, f);
}

// Calls body(i) for begin <= i < end in steps of WIDTH.
template <int WIDTH, typename Body>
__device__ void for_range(long long begin, long long end, Body body) {
    const long long step = static_cast<long long>(gridDim.x) * BLOCK * WIDTH;
#pragma unroll 1
    for (long long i = begin + (static_cast<long long>(blockIdx.x) * BLOCK + threadIdx.x) * WIDTH; i < end; i += step) body(i);
}

template <int WIDTH, typename T>
__device__ void add_scaled_runs(T* a, const T* b, float scale, long long begin, long long end) {
    for_range<WIDTH>(begin, end, [&](long long i) {
        const Run<T, WIDTH> a_run = load_run<WIDTH>(a + i), b_run = load_run<WIDTH>(b + i);
        float values[WIDTH];
#pragma unroll
        for (int j = 0; j < WIDTH; j++) values[j] = a_run[j] + scale * b_run[j];
        store_run(a + i, values);
    });
}

template <typename T>
__device__ void add_scaled(T* a, const T* b, float scale, long long n) {
    constexpr int WIDTH = Pack<T>::SIZE;
    const long long whole = is_aligned_16(a) && is_aligned_16(b) ? n / WIDTH * WIDTH : 0;
    add_scaled_runs<WIDTH>(a, b, scale, 0, whole);
    add_scaled_runs<1>(a, b, scale, whole, n);
}

// ---- Kernels of rows

template <int WIDTH, typename T>
__device__ void add_bias(T* y, const float* bias, int rows, int cols, int stride) {
    for_each_run<WIDTH>(rows, cols, [&](int row, int column) {
        T* address = y + static_cast<long long>(row) * stride + column;
        const Run<T, WIDTH> run = load_run<WIDTH>(address);
        float values[WIDTH];
        load_constants(values, bias + column);
#pragma unroll
        for (int i = 0; i < WIDTH; i++) values[i] += run[i];
        store_run(address, values);
    });
}

template <int WIDTH, typename T>
__device__ void copy_columns(T* out, const T* in, int rows, int cols, int out_stride, int in_stride) {
    for_each_run<WIDTH>(rows, cols, [&](int row, int column) {
        store_run(out + static_cast<long long>(row) * out_stride + column,
                  load_run<WIDTH>(in + static_cast<long long>(row) * in_stride + column));
    });
}

template <int WIDTH, typename T>
__device__ void dropout(T* out, const T* x, int rows, int width, int out_stride, int x_stride, unsigned long long key, float p) {
    const float keep = 1.0f / (1.0f - p);
    for_each_run<WIDTH>(rows, width, [&](int row, int column) {
        const Run<T, WIDTH> run = load_run<WIDTH>(x + static_cast<long long>(row) * x_stride + column);
        const unsigned long long index = static_cast<unsigned long long>(row) * width + column;
        float values[WIDTH];
#pragma unroll
        for (int i = 0; i < WIDTH; i++) values[i] = random_unit(key, index + i) >= p ? run[i] * keep : 0.0f;
        store_run(out + static_cast<long long>(row) * out_stride + column, values);
    });
}

template <typename T>
__device__ bool takes_runs(int cols, const T* out, int out_stride, const T* in, int in_stride) {
    return cols % Pack<T>::SIZE == 0 && rows_are_aligned_16(out, out_stride) && rows_are_aligned_16(in, in_stride);
}

#define DEFINE(NAME, T)                                                                                                              \
    extern "C" __global__ void __launch_bounds__(BLOCK) scale_##NAME(T* a, float scale, long long n) {                               \
        map(a, a, n, [=](float value) { return scale * value; });                                                                    \
    }                                                                                                                                \
    extern "C" __global__ void __launch_bounds__(BLOCK) add_scaled_##NAME(T* a, const T* b, float scale, long long n) {              \
        add_scaled(a, b, scale, n);                                                                                                  \
    }                                                                                                                                \
    extern "C" __global__ void __launch_bounds__(BLOCK) add_bias_##NAME(T* y, const float* bias, int rows, int cols, int stride) {   \
        if (takes_runs(cols, y, stride, y, stride) && is_aligned_16(bias)) add_bias<Pack<T>::SIZE>(y, bias, rows, cols, stride);     \
        else add_bias<1>(y, bias, rows, cols, stride);                                                                               \
    }                                                                                                                                \
    extern "C" __global__ void __launch_bounds__(BLOCK)                                                                              \
    copy_columns_##NAME(T* out, const T* in, int rows, int cols, int out_stride, int in_stride) {                                    \
        if (takes_runs(cols, out, out_stride, in, in_stride)) {                                                                      \
            copy_columns<Pack<T>::SIZE>(out, in, rows, cols, out_stride, in_stride);                                                 \
        } else {                                                                                                                     \
            copy_columns<1>(out, in, rows, cols, out_stride, in_stride);                                                             \
        }                                                                                                                            \
    }                                                                                                                                \
    extern "C" __global__ void __launch_bounds__(BLOCK)                                                                              \
    dropout_##NAME(T* out, const T* x, int rows, int width, int out_stride, int x_stride, unsigned long long key, float p) {         \
        if (takes_runs(width, out, out_stride, x, x_stride)) {                                                                       \
            dropout<Pack<T>::SIZE>(out, x, rows, width, out_stride, x_stride, key, p);                                               \
        } else {                                                                                                                     \
            dropout<1>(out, x, rows, width, out_stride, x_stride, key, p);                                                           \
        }                                                                                                                            \
    }

FOR_NUMBER_TYPES(DEFINE)

#define DEFINE_CAST(FROM, S, TO, D)                                                                                                  \
    extern "C" __global__ void __launch_bounds__(BLOCK) cast_##FROM##_##TO(D* out, const S* in, long long n) {                       \
        map(out, in, n, [](float value) { return value; });                                                                          \
    }

DEFINE_CAST(f32, float, f16, f16)
DEFINE_CAST(f16, f16, f32, float)
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
DEFINE_CAST(f32, float, bf16, bf16)
DEFINE_CAST(bf16, bf16, f32, float)
DEFINE_CAST(f16, f16, bf16, bf16)
DEFINE_CAST(bf16, bf16, f16, f16)
#endif
