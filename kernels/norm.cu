// RMSNorm:   y = x·r·w,             r = 1/√(mean(x²) + ε)
//   backward dx = r·(g − x̂·mean(g·x̂)),  x̂ = x·r,  g = dy·w
// LayerNorm (centered) is the same with x − mean(x) for x, + bias in y, and g − mean(g) for the first g.
//   x, y, dx, dy  // (rows, groups·group), each with its stride; every group of columns is normed by itself
//   weight, bias  // (group), frozen
//   add  // (rows, groups·group), added to dx, or none
// y =, dx =. dx may be dy. A row's statistics are computed again from x in the backward.
// Zhang and Sennrich 2019, "Root Mean Square Layer Normalization"; crates/nn/src/norm.rs.
//
// Launch: BLOCK threads; grid.x counts groups, 8 a block where group ≤ WARP_GROUP, else one a block (any grid is right: blocks
// go on to further groups); no dynamic shared memory.

#include "common.cuh"

constexpr int BLOCK = 256;
constexpr int WARP_GROUP = 1024;      // up to this width a warp does a group,
constexpr int HALF_WARP_GROUP = 128;  // up to this, in runs, half of one
constexpr int KEPT = 2;               // runs of a row that a thread keeps; the rest of a wide row is read again, from the cache

// The threads that do one group together.
template <int THREADS>
struct Team {
    static constexpr int PER_BLOCK = BLOCK / THREADS;

    __device__ static int member() { return threadIdx.x % THREADS; }
    __device__ static float sum(float value) {
        if constexpr (THREADS == BLOCK) return block_sum(value);
        else return warp_sum<THREADS>(value);
    }
};

// A member's share of some rows of the same width.
template <typename T, int WIDTH, int THREADS, int ROWS>
struct Share {
    const T* rows[ROWS];
    unsigned width, first;
    static constexpr unsigned STEP = THREADS * WIDTH;
    Run<T, WIDTH> kept[KEPT][ROWS];

    __device__ Share(const T* const (&from)[ROWS], int group) : width(group), first(Team<THREADS>::member() * WIDTH) {
#pragma unroll
        for (int row = 0; row < ROWS; row++) rows[row] = from[row];
#pragma unroll
        for (int k = 0; k < KEPT; k++) {
            if (first + k * STEP < width) load(first + k * STEP, kept[k]);
        }
    }

    __device__ void load(unsigned column, Run<T, WIDTH> (&runs)[ROWS]) const {
#pragma unroll
        for (int row = 0; row < ROWS; row++) runs[row] = load_run<WIDTH>(rows[row] + column);
    }

    // Calls body(column, a run of each row).
    template <typename Body>
    __device__ void each(Body body) const {
#pragma unroll
        for (int k = 0; k < KEPT; k++) {
            if (first + k * STEP < width) body(first + k * STEP, kept[k]);
        }
#pragma unroll 1
        for (unsigned column = first + KEPT * STEP; column < width; column += STEP) {
            Run<T, WIDTH> runs[ROWS];
            load(column, runs);
            body(column, runs);
        }
    }
};

// mean (0 if not centered) and r of row 0.
template <typename T, int WIDTH, int THREADS, int ROWS>
__device__ void statistics(const Share<T, WIDTH, THREADS, ROWS>& share, int group, float eps, int centered, float& mean, float& r) {
    mean = 0;
    if (centered) {
        float sum = 0;
        share.each([&](unsigned, const Run<T, WIDTH>(&runs)[ROWS]) {
            for (int i = 0; i < WIDTH; i++) sum += runs[0][i];
        });
        mean = Team<THREADS>::sum(sum) / group;
    }
    float squares = 0;
    share.each([&](unsigned, const Run<T, WIDTH>(&runs)[ROWS]) {
        for (int i = 0; i < WIDTH; i++) squares += (runs[0][i] - mean) * (runs[0][i] - mean);
    });
    r = 1.0f / sqrtf(Team<THREADS>::sum(squares) / group + eps);
}

template <typename T>
struct Forward {
    T* y;
    const T* x;
    const float *weight, *bias;
    int y_stride, x_stride;

    template <int WIDTH>
    __device__ bool takes_runs(int group) const {
        return group % WIDTH == 0 && rows_are_aligned_16(y, y_stride) && rows_are_aligned_16(x, x_stride) && is_aligned_16(weight) &&
               is_aligned_16(bias);
    }

    // `width` is `group`, or 0 for a team without one, which takes part in the sums.
    template <int WIDTH, int THREADS>
    __device__ void run(long long row, int column, int width, int group, float eps, int centered) const {
        Share<T, WIDTH, THREADS, 1> share({x + row * x_stride + column}, width);
        float mean, r;
        statistics(share, group, eps, centered, mean, r);
        T* out = y + row * y_stride + column;
        share.each([&](unsigned at, const Run<T, WIDTH>(&runs)[1]) {
            float w[WIDTH], b[WIDTH] = {}, values[WIDTH];
            load_constants(w, weight + at);
            if (bias != nullptr) load_constants(b, bias + at);
            for (int i = 0; i < WIDTH; i++) values[i] = (runs[0][i] - mean) * r * w[i] + b[i];
            store_run(out + at, values);
        });
    }
};

template <typename T>
struct Backward {
    T* dx;
    const T *dy, *x, *add;
    const float* weight;
    int dx_stride, dy_stride, x_stride, add_stride;

    template <int WIDTH>
    __device__ bool takes_runs(int group) const {
        return group % WIDTH == 0 && rows_are_aligned_16(dx, dx_stride) && rows_are_aligned_16(dy, dy_stride) &&
               rows_are_aligned_16(x, x_stride) && rows_are_aligned_16(add, add_stride) && is_aligned_16(weight);
    }

    template <int WIDTH, int THREADS>
    __device__ void run(long long row, int column, int width, int group, float eps, int centered) const {
        Share<T, WIDTH, THREADS, 2> share({x + row * x_stride + column, dy + row * dy_stride + column}, width);
        float mean, r;
        statistics(share, group, eps, centered, mean, r);
        float dot = 0, g_mean = 0;
        share.each([&](unsigned at, const Run<T, WIDTH>(&runs)[2]) {
            float w[WIDTH];
            load_constants(w, weight + at);
            for (int i = 0; i < WIDTH; i++) {
                float g = runs[1][i] * w[i];
                dot += g * (runs[0][i] - mean);
                g_mean += g;
            }
        });
        dot = Team<THREADS>::sum(dot) * r / group;
        g_mean = centered ? Team<THREADS>::sum(g_mean) / group : 0;
        T* out = dx + row * dx_stride + column;
        share.each([&](unsigned at, const Run<T, WIDTH>(&runs)[2]) {
            float w[WIDTH], values[WIDTH];
            load_constants(w, weight + at);
            for (int i = 0; i < WIDTH; i++) values[i] = r * (runs[1][i] * w[i] - g_mean - (runs[0][i] - mean) * r * dot);
            if (add != nullptr) {
                const Run<T, WIDTH> more = load_run<WIDTH>(add + row * add_stride + column + at);
                for (int i = 0; i < WIDTH; i++) values[i] += more[i];
            }
            store_run(out + at, values);
        });
    }
};

template <int WIDTH, int THREADS, typename Pass>
__device__ void for_teams(const Pass& pass, int rows, int groups, int group, float eps, int centered) {
    constexpr int TEAMS = Team<THREADS>::PER_BLOCK;
    const long long all = static_cast<long long>(rows) * groups;
#pragma unroll 1
    for (long long first = static_cast<long long>(blockIdx.x) * TEAMS; first < all; first += static_cast<long long>(gridDim.x) * TEAMS) {
        const long long mine = first + threadIdx.x / THREADS, at = mine < all ? mine : 0;
        const long long row = at / groups;
        const int column = static_cast<int>(at - row * groups) * group;
        pass.template run<WIDTH, THREADS>(row, column, mine < all ? group : 0, group, eps, centered);
    }
}

template <int WIDTH, typename Pass>
__device__ void for_groups(const Pass& pass, int rows, int groups, int group, float eps, int centered) {
    if (WIDTH > 1 && group <= HALF_WARP_GROUP) for_teams<WIDTH, WARP / 2>(pass, rows, groups, group, eps, centered);
    else if (group <= WARP_GROUP) for_teams<WIDTH, WARP>(pass, rows, groups, group, eps, centered);
    else for_teams<WIDTH, BLOCK>(pass, rows, groups, group, eps, centered);
}

template <typename T, typename Pass>
__device__ void norm(const Pass& pass, int rows, int groups, int group, float eps, int centered) {
    constexpr int WIDTH = Pack<T>::SIZE;
    if (pass.template takes_runs<WIDTH>(group)) for_groups<WIDTH>(pass, rows, groups, group, eps, centered);
    else for_groups<1>(pass, rows, groups, group, eps, centered);
}

#define DEFINE(NAME, T)                                                                                                              \
    extern "C" __global__ void __launch_bounds__(BLOCK, 4)                                                                             \
    norm_forward_##NAME(T* y, const T* x, const float* weight, const float* bias, int rows, int groups, int group, int y_stride,     \
                        int x_stride, float eps, int centered) {                                                                     \
        norm<T>(Forward<T>{y, x, weight, bias, y_stride, x_stride}, rows, groups, group, eps, centered);                             \
    }                                                                                                                                \
    extern "C" __global__ void __launch_bounds__(BLOCK, 4)                                                                             \
    norm_backward_##NAME(T* dx, const T* dy, const T* x, const T* add, const float* weight, int rows, int groups, int group,         \
                         int dx_stride, int dy_stride, int x_stride, int add_stride, float eps, int centered) {                      \
        norm<T>(Backward<T>{dx, dy, x, add, weight, dx_stride, dy_stride, x_stride, add_stride}, rows, groups, group, eps, centered); \
    }

FOR_NUMBER_TYPES(DEFINE)
