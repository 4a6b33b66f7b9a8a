// Turns pairs (a, b) of a head's channels by the angle position · inverse frequency:
//   a = a·cos − sign·b·sin,  b = b·cos + sign·a·sin;   sign 1 is the forward, −1 the backward
// Pairs are (i, i + half), or (2i, 2i + 1) where interleaved; channels from 2·half on pass unturned.
//   table                // (N, 2·half): cosines, then sines, times factor
//   inverse_frequencies  // (half);  positions  // (N)
//   x                    // (N, heads·head_dim) with a stride, the heads side by side
// table =, x in place. Angles are rounded to f32 before their cosine is taken, as transformers does.
// Su et al. 2021, "RoFormer"; crates/nn/src/rope.rs.
//
// Launch: BLOCK threads; grid.x counts 256 numbers of the table, or 8192 turned channels (N·heads·2·half in all) a block (any
// grid is right); no dynamic shared memory.

#include "common.cuh"

constexpr int BLOCK = 256;

extern "C" __global__ void __launch_bounds__(BLOCK)
rope_table(float* table, const float* inverse_frequencies, const int* positions, int rows, int half, float factor) {
    for_each_run<1>(rows, half, [&](int row, int i) {
        float sine, cosine;
        sincosf(__fmul_rn(static_cast<float>(positions[row]), inverse_frequencies[i]), &sine, &cosine);
        float* angles = table + static_cast<long long>(row) * 2 * half;
        angles[i] = cosine * factor;
        angles[half + i] = sine * factor;
    });
}

// WIDTH pairs at a time: two runs, which hold first and second channels, or neighbours. A thread turns the same channels of
// some heads, by the same angles.
constexpr int HEADS = 4;

template <int WIDTH, bool INTERLEAVED, typename T>
__device__ void turn(T* x, const float* table, int rows, int stride, int heads, int head_dim, int half, float sign) {
    for_each_run<WIDTH>(rows, (heads + HEADS - 1) / HEADS * half, [&](int row, int pair) {
        const int group = pair / half, i = pair - group * half;
        const float* angles = table + static_cast<long long>(row) * 2 * half;
        float cosines[WIDTH], sines[WIDTH];
        load_constants(cosines, angles + i);
        load_constants(sines, angles + half + i);
        T* first = x + static_cast<long long>(row) * stride + static_cast<long long>(group) * HEADS * head_dim + (INTERLEAVED ? 2 * i : i);
        const int apart = INTERLEAVED ? WIDTH : half, here = min(HEADS, heads - group * HEADS);
        Run<T, WIDTH> low[HEADS], high[HEADS];
#pragma unroll
        for (int head = 0; head < HEADS; head++) {
            if (head >= here) break;
            low[head] = load_run<WIDTH>(first + head * head_dim);
            high[head] = load_run<WIDTH>(first + head * head_dim + apart);
        }
#pragma unroll
        for (int head = 0; head < HEADS; head++) {
            if (head >= here) break;
            float values[2][WIDTH];
#pragma unroll
            for (int j = 0; j < WIDTH; j++) {
                values[0][j] = low[head][j];
                values[1][j] = high[head][j];
            }
#pragma unroll
            for (int j = 0; j < WIDTH; j++) {
                float& a = INTERLEAVED ? values[2 * j / WIDTH][2 * j % WIDTH] : values[0][j];
                float& b = INTERLEAVED ? values[(2 * j + 1) / WIDTH][(2 * j + 1) % WIDTH] : values[1][j];
                const float before = a, sine = sign * sines[j];
                a = before * cosines[j] - b * sine;
                b = b * cosines[j] + before * sine;
            }
            store_run(first + head * head_dim, values[0]);
            store_run(first + head * head_dim + apart, values[1]);
        }
    });
}

template <typename T>
__device__ void rope(T* x, const float* table, int rows, int stride, int heads, int head_dim, int half, int interleaved, float sign) {
    constexpr int WIDTH = Pack<T>::SIZE;
    const bool runs = half % WIDTH == 0 && head_dim % WIDTH == 0 && rows_are_aligned_16(x, stride) && is_aligned_16(table);
    if (interleaved) {
        if (runs) turn<WIDTH, true>(x, table, rows, stride, heads, head_dim, half, sign);
        else turn<1, true>(x, table, rows, stride, heads, head_dim, half, sign);
    } else {
        if (runs) turn<WIDTH, false>(x, table, rows, stride, heads, head_dim, half, sign);
        else turn<1, false>(x, table, rows, stride, heads, head_dim, half, sign);
    }
}

#define DEFINE(NAME, T)                                                                                                              \
    extern "C" __global__ void __launch_bounds__(BLOCK)                                                                              \
    rope_##NAME(T* x, const float* table, int rows, int stride, int heads, int head_dim, int half, int interleaved, float sign) {    \
        rope(x, table, rows, stride, heads, head_dim, half, interleaved, sign);                                                      \
    }

FOR_NUMBER_TYPES(DEFINE)
