// embedding:     out[i] = scale·table[tokens[i]]     table  // (V, C)
// gather_rows:   out[i] = x[rows[i]]
// scatter_rows:  out[rows[i]] = x[i]                 other rows of out stay; rows are all different
//   out, x  // (n, C) on the side of i
// Indices are the caller's to check. crates/nn/src/embedding.rs, head.rs.
//
// Launch: BLOCK threads; grid.x counts 2048 numbers of the n·C moved a block (any grid is right); no dynamic shared memory.

#include "common.cuh"

constexpr int BLOCK = 256;

template <int WIDTH, typename T>
__device__ void scale_run(T* out, const T* in, float scale) {
    const Run<T, WIDTH> run = load_run<WIDTH>(in);
    float values[WIDTH];
#pragma unroll
    for (int i = 0; i < WIDTH; i++) values[i] = run[i] * scale;
    store_run(out, values);
}

template <int WIDTH, typename T>
__device__ void embedding(T* out, const T* table, const unsigned* tokens, int rows, int width, float scale) {
    for_each_run<WIDTH>(rows, width, [&](int row, int column) {
        scale_run<WIDTH>(out + static_cast<long long>(row) * width + column, table + static_cast<long long>(tokens[row]) * width + column,
                         scale);
    });
}

template <int WIDTH, typename T>
__device__ void gather_rows(T* out, const T* x, const unsigned* rows, int n, int width) {
    for_each_run<WIDTH>(n, width, [&](int i, int column) {
        store_run(out + static_cast<long long>(i) * width + column,
                  load_run<WIDTH>(x + static_cast<long long>(rows[i]) * width + column));
    });
}

template <int WIDTH, typename T>
__device__ void scatter_rows(T* out, const T* x, const unsigned* rows, int n, int width) {
    for_each_run<WIDTH>(n, width, [&](int i, int column) {
        store_run(out + static_cast<long long>(rows[i]) * width + column,
                  load_run<WIDTH>(x + static_cast<long long>(i) * width + column));
    });
}

template <typename T>
__device__ bool takes_runs(const T* out, const T* in, int width) {
    return rows_are_aligned_16(out, width) && rows_are_aligned_16(in, width);
}

#define DEFINE(NAME, T)                                                                                                              \
    extern "C" __global__ void __launch_bounds__(BLOCK)                                                                              \
    embedding_##NAME(T* out, const T* table, const unsigned* tokens, int rows, int width, float scale) {                             \
        if (takes_runs(out, table, width)) embedding<Pack<T>::SIZE>(out, table, tokens, rows, width, scale);                         \
        else embedding<1>(out, table, tokens, rows, width, scale);                                                                   \
    }                                                                                                                                \
    extern "C" __global__ void __launch_bounds__(BLOCK)                                                                              \
    gather_rows_##NAME(T* out, const T* x, const unsigned* rows, int n, int width) {                                                 \
        if (takes_runs(out, x, width)) gather_rows<Pack<T>::SIZE>(out, x, rows, n, width);                                           \
        else gather_rows<1>(out, x, rows, n, width);                                                                                 \
    }                                                                                                                                \
    extern "C" __global__ void __launch_bounds__(BLOCK)                                                                              \
    scatter_rows_##NAME(T* out, const T* x, const unsigned* rows, int n, int width) {                                                \
        if (takes_runs(out, x, width)) scatter_rows<Pack<T>::SIZE>(out, x, rows, n, width);                                          \
        else scatter_rows<1>(out, x, rows, n, width);                                                                                \
    }

FOR_NUMBER_TYPES(DEFINE)
