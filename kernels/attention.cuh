// What the kernels of attention share: a block's rows, the way through the other rows tile by tile, the two kinds of product.
//
// A block owns BLOCK rows (queries; for dk and dv, keys), a warp 16 of them. It goes through tiles of the other kind's rows in
// shared memory. A warp's part of a product lies in its registers, in columns of 8 ("Fragments" in ptx.cuh): lane 4g + t has rows
// g and g+8, columns 2t and 2t+1 of each. f32 numbers lie there too, so that all else is written once.

#pragma once

#include <type_traits>

#include "common.cuh"
#include "ptx.cuh"

constexpr int D = HEAD_DIM;
static_assert(D % 16 == 0, "products take 16 columns at a time");

constexpr int BLOCK = 64;  // rows that a block owns
constexpr int WARP_ROWS = 16;
constexpr int THREADS = BLOCK / WARP_ROWS * WARP;

// With two, a tile is loaded while the one before is used. compute_75 copies nothing behind the threads' back, and has little
// shared memory: there a second block on the same processor fills the gaps.
#if __CUDA_ARCH__ >= 800
constexpr int STAGES = 2;
#else
constexpr int STAGES = 1;
#endif

constexpr float LOG2_E = 1.44269504f;

// Calls BY_WARPS(name of the type, type) for each type, or BY_GROUPS where the products are those of 4 warps together.
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
#define HOPPER 1
#define FOR_TYPES(BY_WARPS, BY_GROUPS) BY_WARPS(f32, float) BY_GROUPS(f16, f16) BY_GROUPS(bf16, bf16)
#else
#define HOPPER 0
#define FOR_TYPES(BY_WARPS, BY_GROUPS) FOR_NUMBER_TYPES(BY_WARPS)
#endif

// ---- Scores

// Which keys a query sees: itself and those before it, up to a limit.
struct Sight {
    int limit;

    __device__ explicit Sight(int window) : limit(window > 0 ? window : 0x7fffffff) {}

    // Positions in the sequence.
    __device__ bool sees(int query, int key) const {
        return static_cast<unsigned>(query - key) < static_cast<unsigned>(limit);
    }
    // Whether each of the queries sees each of the keys.
    template <int QUERIES, int KEYS>
    __device__ bool sees_all(int first_query, int first_key) const {
        return first_query - (first_key + KEYS - 1) >= 0 && first_query + QUERIES - 1 - first_key < limit;
    }
    // Whether none of the queries sees any of the keys.
    template <int QUERIES, int KEYS>
    __device__ bool sees_none(int first_query, int first_key) const {
        return first_query + QUERIES - 1 - first_key < 0 || first_query - (first_key + KEYS - 1) >= limit;
    }
};

// Raw products become exponents of two: exp(cap·tanh(scale·s/cap)) = 2^(factor·bent), with bent = tanh(inner·s); if not capped,
// bent = s. The scale is positive.
struct Scores {
    float inner;
    float factor;
    bool capped;

    __device__ Scores(float scale, float softcap)
        : inner(softcap > 0 ? scale / softcap : 0), factor((softcap > 0 ? softcap : scale) * LOG2_E), capped(softcap > 0) {}
};

template <typename T>
__device__ __forceinline__ float power_of_two(float x) { return exp2_approximate(x); }
template <>
__device__ __forceinline__ float power_of_two<float>(float x) { return exp2f(x); }

// Right to about 1e-7 of 1, not of the result.
template <typename T>
__device__ __forceinline__ float bend(float x) { return 1 - __fdividef(2, 1 + exp2_approximate(2 * LOG2_E * x)); }
template <>
__device__ __forceinline__ float bend<float>(float x) { return tanhf(x); }

// The softmax of rows whose scores come tile by tile. A thread has parts of two rows: element i of its part of a tile belongs to
// row i % 4 / 2, and four neighbouring lanes share the rows.
struct RunningSoftmax {
    float top[2] = {-INFINITY, -INFINITY};  // the largest exponent so far
    float sum[2] = {0, 0};                  // of the powers in this thread's columns

    // Raw products of a tile become powers relative to the new top; what the rows had so far is to be rescaled. seen(i) is asked
    // unless all are.
    template <typename T, int TILES, typename Seen>
    __device__ __forceinline__ void take(const Scores& scores, float (&s)[TILES][4], bool all, float (&rescale)[2], Seen seen) {
        if (scores.capped) {
#pragma unroll
            for (int i = 0; i < TILES * 4; i++) s[i / 4][i % 4] = bend<T>(s[i / 4][i % 4] * scores.inner);
        }
        if (!all) {
#pragma unroll
            for (int i = 0; i < TILES * 4; i++) {
                if (!seen(i)) s[i / 4][i % 4] = -INFINITY;
            }
        }
        float tile_top[2] = {-INFINITY, -INFINITY};
#pragma unroll
        for (int i = 0; i < TILES * 4; i++) tile_top[i % 4 / 2] = fmaxf(tile_top[i % 4 / 2], s[i / 4][i % 4]);
        float shift[2];
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const float new_top = fmaxf(top[half], warp_max<4>(tile_top[half]) * scores.factor);
            shift[half] = new_top == -INFINITY ? 0 : new_top;  // nothing seen yet: −∞ − 0, not −∞ − −∞
            rescale[half] = power_of_two<T>(top[half] - shift[half]);
            top[half] = new_top;
            sum[half] *= rescale[half];
        }
#pragma unroll
        for (int i = 0; i < TILES * 4; i++) {
            float& p = s[i / 4][i % 4];
            p = power_of_two<T>(p * scores.factor - shift[i % 4 / 2]);
            sum[i % 4 / 2] += p;
        }
    }
    // What the rows are to be multiplied by, and log Σ exp.
    __device__ __forceinline__ void finish(float (&inverse)[2], float (&lse)[2]) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            sum[half] = warp_sum<4>(sum[half]);
            inverse[half] = 1 / sum[half];
            lse[half] = (top[half] + log2f(sum[half])) / LOG2_E;
        }
    }
};

// ---- Tiles in shared memory

// Packs of 16 bytes in a row, and how many of them change places within a row so that those of 8 rows in one column lie in
// different banks, in whatever eighth of the 128 bytes of all banks their rows begin.
template <typename T>
constexpr int PACKS = D / Pack<T>::SIZE;
template <typename T>
constexpr int SPREAD = PACKS<T> % 8 == 0 ? 8 : PACKS<T> % 4 == 0 ? 4 : 2;

// Where a pack of a tile (rows, D) lies, in elements.
template <typename T>
__device__ __forceinline__ int place(int row, int pack) {
    return row * D + (pack ^ row / (8 / SPREAD<T>) % SPREAD<T>) * Pack<T>::SIZE;
}

// Begins to copy ROWS rows to a tile; those from `count` on become zeros. Aligned: rows begin at multiples of 16 bytes.
template <int ROWS, int THREADS = ::THREADS, typename T>
__device__ __forceinline__ void load_rows(T* tile, const T* source, int count, int stride, bool aligned) {
    if (aligned) {
        constexpr int WIDTH = PACKS<T> <= 8 ? 8 : PACKS<T> <= 16 ? 16 : PACKS<T> <= 32 ? 32 : 64;  // some idle, none divides
        constexpr int AT_ONCE = THREADS / WIDTH;
        const int first = threadIdx.x / WIDTH, pack = threadIdx.x % WIDTH;
        if (pack >= PACKS<T>) return;
        const T* from = source + static_cast<long long>(first) * stride + pack * Pack<T>::SIZE;
#pragma unroll
        for (int i = 0; i < ROWS; i += AT_ONCE) {
            const int row = first + i;
            if (ROWS % AT_ONCE != 0 && row >= ROWS) return;
            cp_async_16(shared_address(tile + place<T>(row, pack)), from, row < count);
            from += static_cast<long long>(AT_ONCE) * stride;
        }
    } else {
#pragma unroll 1
        for (int i = threadIdx.x; i < ROWS * D; i += THREADS) {
            const int row = i / D, column = i % D;
            T value = from_f32<T>(0);
            if (row < count) value = source[static_cast<long long>(row) * stride + column];
            tile[place<T>(row, column / Pack<T>::SIZE) + column % Pack<T>::SIZE] = value;
        }
    }
}

// Calls use(i, stage) for tiles 0 … n-1, each after load(i, stage), and the load of the next goes on meanwhile if there are two
// stages. All threads must come along.
template <typename Load, typename Use>
__device__ __forceinline__ void for_tiles(int n, Load load, Use use) {
    if (STAGES == 2 && n > 0) {
        load(0, 0);
        cp_async_commit();
    }
    for (int i = 0; i < n; i++) {
        const int stage = i % STAGES;
        if (STAGES == 1) {
            __syncthreads();  // the tile before may still be read
            load(i, 0);
            cp_async_commit();
        }
        cp_async_wait<0>();
        __syncthreads();
        if (STAGES == 2 && i + 1 < n) {
            load(i + 1, 1 - stage);
            cp_async_commit();
        }
        use(i, stage);
    }
}

// Where the rows of 16 bytes begin that a lane names for ldmatrix: 16 rows of a tile by packs 2·step and 2·step + 1. Products
// add only constants to what is kept here.
template <typename T>
struct MatrixRows {
    static constexpr int VARIANTS = SPREAD<T> / 2;
    unsigned bytes[VARIANTS];

    __device__ MatrixRows(int row, int right) {
#pragma unroll
        for (int i = 0; i < VARIANTS; i++) bytes[i] = place<T>(row, 2 * i + right) * sizeof(T);
    }
    __device__ unsigned address(const T* rows, int step) const {
        return shared_address(rows) + bytes[step % VARIANTS] + step / VARIANTS * (SPREAD<T> * 16);
    }
};

// By columns, ldmatrix's four matrices are the upper left, lower left, upper right, lower right; by rows, the upper left, upper
// right, lower left, lower right.
template <typename T>
struct LanePlaces {
    MatrixRows<T> by_columns{static_cast<int>(threadIdx.x % 16), static_cast<int>(threadIdx.x / 16 % 2)};
    MatrixRows<T> by_rows{static_cast<int>(threadIdx.x / 16 % 2 * 8 + threadIdx.x % 8), static_cast<int>(threadIdx.x / 8 % 2)};
};
template <>
struct LanePlaces<float> {};

// ---- A warp's own rows, the left side of products with whole tiles

// The first of the warp's rows within its block. Warps beyond the last row begin with the first again.
__device__ __forceinline__ int first_row_of_warp() { return threadIdx.x / WARP * WARP_ROWS % BLOCK; }

// Kept in shared memory.
template <typename T>
struct SharedRows {
    static constexpr int HOME = BLOCK;  // rows of shared memory that stay theirs
    const T* rows;

    // `home` is a place for BLOCK rows in shared memory, theirs from now on. All threads must come along.
    template <int THREADS = ::THREADS>
    __device__ void take(T* home, const T* source, int count, int stride, const LanePlaces<T>&) {
        load_rows<BLOCK, THREADS>(home, source, count, stride, rows_are_aligned_16(source, stride));
        cp_async_commit();
        cp_async_wait<0>();
        __syncthreads();
        rows = home + first_row_of_warp() * D;
    }
    __device__ void fragment(unsigned (&a)[4], int step, const LanePlaces<T>& places) const {
        ldmatrix_x4(a, places.by_columns.address(rows, step));
    }
};

// Kept in registers, as fragments.
template <typename T>
struct RegisterRows {
    static constexpr int HOME = 0;
    unsigned fragments[D / 16][4];

    // `passage` is a place for BLOCK rows in shared memory, free again afterwards. All threads must come along.
    template <int THREADS = ::THREADS>
    __device__ void take(T* passage, const T* source, int count, int stride, const LanePlaces<T>& places) {
        SharedRows<T> shared;
        shared.template take<THREADS>(passage, source, count, stride, places);
#pragma unroll
        for (int step = 0; step < D / 16; step++) shared.fragment(fragments[step], step, places);
        __syncthreads();
    }
    __device__ void fragment(unsigned (&a)[4], int step, const LanePlaces<T>&) const {
#pragma unroll
        for (int i = 0; i < 4; i++) a[i] = fragments[step][i];
    }
};

// f32 is read where it is. Rows that don't exist are replaced by the last one; nobody reads what becomes of them.
struct DirectRows {
    static constexpr int HOME = 0;
    const float* rows[2];

    template <int THREADS = ::THREADS>
    __device__ void take(float*, const float* source, int count, int stride, const LanePlaces<float>&) {
        const int row = first_row_of_warp() + threadIdx.x % WARP / 4;
        for (int i = 0; i < 2; i++) rows[i] = source + static_cast<long long>(min(row + 8 * i, count - 1)) * stride;
    }
};
template <>
struct RegisterRows<float> : DirectRows {};
template <>
struct SharedRows<float> : DirectRows {};

// ---- Products

// c (16, 8·TILES) += own (16, D) · rows (8·TILES, D)ᵀ
template <int TILES, typename T, template <typename> class Own>
__device__ __forceinline__ void add_product_transposed(float (&c)[TILES][4], const Own<T>& own, const T* rows,
                                                       const LanePlaces<T>& places) {
#pragma unroll
    for (int step = 0; step < D / 16; step++) {
        unsigned a[4];
        own.fragment(a, step, places);
#pragma unroll
        for (int n = 0; n < TILES; n += 2) {
            unsigned b[4];
            ldmatrix_x4(b, places.by_rows.address(rows + n * 8 * D, step));
            mma_m16n8k16<T>(c[n], a, {b[0], b[1]});
            mma_m16n8k16<T>(c[n + 1], a, {b[2], b[3]});
        }
    }
}

template <int TILES, template <typename> class Own>
__device__ __forceinline__ void add_product_transposed(float (&c)[TILES][4], const Own<float>& own, const float* rows,
                                                       const LanePlaces<float>&) {
    const int t = threadIdx.x % 4;
#pragma unroll 1
    for (int column = 0; column < D; column += 4) {
        float a[2][4];
#pragma unroll
        for (int i = 0; i < 8; i++) a[i / 4][i % 4] = own.rows[i / 4][column + i % 4];
#pragma unroll
        for (int n = 0; n < TILES; n++) {
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const Pack<float> b = load_pack(rows + n * 8 * D + place<float>(2 * t + i % 2, column / 4));
#pragma unroll
                for (int j = 0; j < 4; j++) c[n][i] += a[i / 2][j] * b[j];
            }
        }
    }
}

// c (16, D) += p (16, 8·TILES) · rows (8·TILES, D), with p rounded to T
template <int TILES, typename T>
__device__ __forceinline__ void add_product(float (&c)[D / 8][4], const float (&p)[TILES][4], const T* rows,
                                            const LanePlaces<T>& places) {
#pragma unroll
    for (int n = 0; n < TILES; n += 2) {
        const unsigned a[4] = {pair_from_f32<T>(p[n][0], p[n][1]), pair_from_f32<T>(p[n][2], p[n][3]),
                               pair_from_f32<T>(p[n + 1][0], p[n + 1][1]), pair_from_f32<T>(p[n + 1][2], p[n + 1][3])};
#pragma unroll
        for (int step = 0; step < D / 16; step++) {
            unsigned b[4];
            ldmatrix_x4_transposed(b, places.by_columns.address(rows + n * 8 * D, step));
            mma_m16n8k16<T>(c[2 * step], a, {b[0], b[1]});
            mma_m16n8k16<T>(c[2 * step + 1], a, {b[2], b[3]});
        }
    }
}

template <int TILES>
__device__ __forceinline__ void add_product(float (&c)[D / 8][4], const float (&p)[TILES][4], const float* rows,
                                            const LanePlaces<float>&) {
    const int lane = threadIdx.x % WARP, t = lane % 4;
#pragma unroll
    for (int tile = 0; tile < TILES; tile++) {
#pragma unroll 1
        for (int pair = 0; pair < 4; pair++) {
#pragma unroll
            for (int j = 0; j < 2; j++) {
                float a[2];  // of column 2·pair + j, which one lane of the four has
#pragma unroll
                for (int i = 0; i < 2; i++) a[i] = __shfl_sync(FULL_WARP, p[tile][2 * i + j], lane - t + pair);
#pragma unroll
                for (int n = 0; n < D / 8; n++) {
                    const float* b = rows + tile * 8 * D + place<float>(2 * pair + j, 2 * n + t / 2) + t % 2 * 2;
#pragma unroll
                    for (int i = 0; i < 4; i++) c[n][i] += a[i / 2] * b[i % 2];
                }
            }
        }
    }
}

// ---- Results

// out (count, D) = c·factor, with a factor for each of a lane's two rows. Through shared memory, so that whole packs are written.
// All threads must come along.
template <typename T>
__device__ __forceinline__ void store_rows(T* passage, T* out, int stride, int count, const float (&c)[D / 8][4],
                                           const float (&factor)[2]) {
    const int lane = threadIdx.x % WARP;
    T* rows = passage + threadIdx.x / WARP * 8 * D;
    __syncthreads();  // the last tile may still be read
#pragma unroll
    for (int half = 0; half < 2; half++) {
#pragma unroll
        for (int n = 0; n < D / 8; n++) {
            unsigned* to = reinterpret_cast<unsigned*>(rows + place<T>(lane / 4, n)) + lane % 4;
            *to = pair_from_f32<T>(c[n][2 * half] * factor[half], c[n][2 * half + 1] * factor[half]);
        }
        __syncwarp();
        const int first = first_row_of_warp() + 8 * half, valid = min(8, count - first);
        T* to = out + static_cast<long long>(first) * stride;
        if (rows_are_aligned_16(out, stride)) {
            for (int i = lane; i < valid * PACKS<T>; i += WARP) {
                const int row = i / PACKS<T>, pack = i % PACKS<T>;
                store_pack(to + static_cast<long long>(row) * stride + pack * Pack<T>::SIZE, load_pack(rows + place<T>(row, pack)));
            }
        } else {
            for (int i = lane; i < valid * D; i += WARP) {
                const int row = i / D, column = i % D;
                to[static_cast<long long>(row) * stride + column] =
                    rows[place<T>(row, column / Pack<T>::SIZE) + column % Pack<T>::SIZE];
            }
        }
        __syncwarp();
    }
}

__device__ __forceinline__ void store_rows(float*, float* out, int stride, int count, const float (&c)[D / 8][4],
                                           const float (&factor)[2]) {
    const int lane = threadIdx.x % WARP;
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const int row = first_row_of_warp() + lane / 4 + 8 * half;
        if (row >= count) break;
        float* to = out + static_cast<long long>(row) * stride + lane % 4 * 2;
#pragma unroll
        for (int n = 0; n < D / 8; n++) {
#pragma unroll
            for (int i = 0; i < 2; i++) to[8 * n + i] = c[n][2 * half + i] * factor[half];
        }
    }
}
