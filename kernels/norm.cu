// RMSNorm:   y = x·r·w,             r = 1/√(mean(x²) + ε)
//   backward dx = r·(g − x̂·mean(g·x̂)),  x̂ = x·r,  g = dy·w
// LayerNorm (centered) is the same with x − mean(x) for x, + bias in y, and g − mean(g) for the first g.
//   x, y, dx, dy  // (rows, groups·group), each with its stride; every group of columns is normed by itself
//   weight, bias  // (group), frozen
//   add  // (rows, groups·group), added to dx, or none
// y =, dx =. dx may be dy. A row's statistics are computed again from x in the backward.
// Zhang and Sennrich 2019, "Root Mean Square Layer Normalization"; crates/nn/src/norm.rs.
//
// Launch: BLOCK threads; grid.x counts groups, 4 a block where group ≤ WARP_GROUP, else one a block (any grid is right: blocks
// go on to further groups); no dynamic shared memory.

#include "common.cuh"

constexpr int BLOCK = 128;
constexpr int WARP_GROUP = 1024;      // up to this width a warp does a group,
constexpr int HALF_WARP_GROUP = 128;  // up to this, in runs, half of one
constexpr int KEPT = 4;               // runs of a row that a thread keeps; the rest of a wide row is read again, from the cache

// The threads that do one group together.
template <int THREADS>
struct Team {
    static constexpr int PER_BLOCK = BLOCK / THREADS;

    __device__ static int member() { return threadIdx.x % THREADS; }
    template <int COUNT>
    __device__ static void sum(float (&values)[COUNT]) {
        if constexpr (THREADS == BLOCK) {
            block_sums(values);
        } else {
#pragma unroll
            for (int i = 0; i < COUNT; i++) values[i] = warp_sum<THREADS>(values[i]);
        }
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

// The mean of row 0.
template <typename T, int WIDTH, int THREADS, int ROWS>
__device__ float mean_of(const Share<T, WIDTH, THREADS, ROWS>& share, int group) {
    float sums[1] = {};
    share.each([&](unsigned, const Run<T, WIDTH>(&runs)[ROWS]) {
        for (int i = 0; i < WIDTH; i++) sums[0] += runs[0][i];
    });
    Team<THREADS>::sum(sums);
    return sums[0] / group;
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
        const float mean = centered ? mean_of(share, group) : 0;
        float squares[1] = {};
        share.each([&](unsigned, const Run<T, WIDTH>(&runs)[1]) {
            for (int i = 0; i < WIDTH; i++) squares[0] += (runs[0][i] - mean) * (runs[0][i] - mean);
        });
        Team<THREADS>::sum(squares);
        const float r = 1.0f / sqrtf(squares[0] / group + eps);
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

template <typename T, bool ADD>
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
        if constexpr (ADD) {
            const T* const rows[] = {x + row * x_stride + column, dy + row * dy_stride + column, add + row * add_stride + column};
            run(Share<T, WIDTH, THREADS, 3>(rows, width), row, column, group, eps, centered);
        } else {
            const T* const rows[] = {x + row * x_stride + column, dy + row * dy_stride + column};
            run(Share<T, WIDTH, THREADS, 2>(rows, width), row, column, group, eps, centered);
        }
    }

    template <int WIDTH, int THREADS, int ROWS>
    __device__ void run(const Share<T, WIDTH, THREADS, ROWS>& share, long long row, int column, int group, float eps, int centered) const {
        const float mean = centered ? mean_of(share, group) : 0;
        float sums[3] = {};  // of (x − mean)², of g·(x − mean) and of g
        share.each([&](unsigned at, const Run<T, WIDTH>(&runs)[ROWS]) {
            float w[WIDTH];
            load_constants(w, weight + at);
            for (int i = 0; i < WIDTH; i++) {
                const float g = runs[1][i] * w[i], away = runs[0][i] - mean;
                sums[0] += away * away;
                sums[1] += g * away;
                sums[2] += g;
            }
        });
        Team<THREADS>::sum(sums);
        const float r = 1.0f / sqrtf(sums[0] / group + eps), dot = sums[1] * r / group, g_mean = centered ? sums[2] / group : 0;
        T* out = dx + row * dx_stride + column;
        share.each([&](unsigned at, const Run<T, WIDTH>(&runs)[ROWS]) {
            float w[WIDTH], values[WIDTH];
            load_constants(w, weight + at);
            for (int i = 0; i < WIDTH; i++) {
                values[i] = r * (runs[1][i] * w[i] - g_mean - (runs[0][i] - mean) * r * dot);
                if constexpr (ADD) values[i] += runs[2][i];
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
    extern "C" __global__ void __launch_bounds__(BLOCK, 8)                                                                           \
    norm_forward_##NAME(T* y, const T* x, const float* weight, const float* bias, int rows, int groups, int group, int y_stride,     \
                        int x_stride, float eps, int centered) {                                                                     \
        norm<T>(Forward<T>{y, x, weight, bias, y_stride, x_stride}, rows, groups, group, eps, centered);                             \
    }                                                                                                                                \
    extern "C" __global__ void __launch_bounds__(BLOCK, 4)                                                                           \
    norm_backward_##NAME(T* dx, const T* dy, const T* x, const T* add, const float* weight, int rows, int groups, int group,         \
                         int dx_stride, int dy_stride, int x_stride, int add_stride, float eps, int centered) {                      \
        if (add != nullptr) {                                                                                                        \
            norm<T>(Backward<T, true>{dx, dy, x, add, weight, dx_stride, dy_stride, x_stride, add_stride}, rows, groups, group, eps, \
                    centered);                                                                                                       \
        } else {                                                                                                                     \
            norm<T>(Backward<T, false>{dx, dy, x, dy, weight, dx_stride, dy_stride, x_stride, dy_stride}, rows, groups, group, eps,  \
                    centered);                                                                                                       \
        }                                                                                                                            \
    }

FOR_NUMBER_TYPES(DEFINE)
