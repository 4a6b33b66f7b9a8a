// What attention's kernels for compute capability 9.0 share. There, products of 4 warps at a time ("wgmma") have about 1.6 times
// the speed of a warp's own.
//
// A block owns 128 rows. Two groups of 4 warps have 64 of them each and multiply; the warps of a third load tiles of the other
// kind's rows into a ring in shared memory. Barriers say which stage is full and which is empty, so that the groups need not go in
// step: while one makes probabilities, the products of the other go on. Asynchronous copies and roles as in Shah et al.,
// "FlashAttention-3" (2024).

#pragma once

#include "attention.cuh"

namespace hopper {

constexpr int GROUP = 4 * WARP;      // threads that multiply together
constexpr int GROUPS = 2;            // of those that multiply
constexpr int GROUP_ROWS = 64;
constexpr int OWN = GROUPS * GROUP_ROWS;
constexpr int THREADS = (GROUPS + 1) * GROUP;
constexpr int LOADER_REGISTERS = 40, PRODUCT_REGISTERS = 232;  // of 65536 / THREADS = 168 at the start

// Threads of the third group load, the others multiply.
__device__ __forceinline__ bool is_loader() { return threadIdx.x >= GROUPS * GROUP; }
// The first of a group's rows in its block.
__device__ __forceinline__ int group_row() { return threadIdx.x / GROUP * GROUP_ROWS; }

// ---- Tiles: panels of 64 columns, in which a row has the 128 bytes of all banks and its packs change places with the row, as the
// tensor cores want it (128-byte swizzle). Panels begin at multiples of 1024 bytes.

constexpr int PANEL = 64;
constexpr int PANELS = D / PANEL;
constexpr int ROW_BYTES = PANEL * 2;
constexpr int EIGHT_ROWS_BYTES = 8 * ROW_BYTES;

template <int ROWS>
constexpr int TILE_BYTES = ROWS * D * 2;

__device__ __forceinline__ unsigned aligned_1024(unsigned address) { return (address + 1023) & ~1023u; }

// Begins to copy ROWS rows to the tile at an address, by a group; those from `count` on become zeros. Aligned: rows begin at
// multiples of 16 bytes.
template <int ROWS, typename T>
__device__ __forceinline__ void load_tile(unsigned tile, const T* source, int count, int stride, bool aligned) {
    constexpr int PACKS = D / 8, AT_ONCE = GROUP / PACKS;
    static_assert(ROWS % AT_ONCE == 0 && AT_ONCE % 8 == 0, "a thread's rows are swizzled alike");
    const int first = threadIdx.x % GROUP / PACKS, pack = threadIdx.x % PACKS;
    const T* from = source + static_cast<long long>(first) * stride + pack * 8;
    unsigned to = tile + pack / 8 * (ROWS * ROW_BYTES) + first * ROW_BYTES + (pack % 8 ^ first % 8) * 16;
#pragma unroll
    for (int row = 0; row < ROWS; row += AT_ONCE) {
        if (aligned) {
            cp_async_16(to, from, first + row < count);
        } else {
            for (int i = 0; i < 8; i++) store_shared(to + i * 2, first + row < count ? bits_16(from[i]) : 0);
        }
        from += static_cast<long long>(AT_ONCE) * stride;
        to += AT_ONCE * ROW_BYTES;
    }
}

// How the tensor cores are told of a tile, or of whole groups of 8 rows of one with ROWS rows.
template <int ROWS>
struct Tile {
    unsigned long long descriptor;

    __device__ explicit Tile(unsigned address)
        : descriptor((address & 0x3ffff) >> 4 | static_cast<unsigned long long>(ROWS * ROW_BYTES >> 4) << 16 |
                     static_cast<unsigned long long>(EIGHT_ROWS_BYTES >> 4) << 32 | 1ull << 62) {}
    // Columns 16·step to 16·step + 15.
    __device__ unsigned long long columns(int step) const {
        return descriptor + (step / 4 * (ROWS * ROW_BYTES) + step % 4 * 32 >> 4);
    }
    // Rows 16·step to 16·step + 15.
    __device__ unsigned long long rows(int step) const { return descriptor + (step * 2 * EIGHT_ROWS_BYTES >> 4); }
};

// The first of a thread's two rows of a fragment of 64; the other is 8 below.
__device__ __forceinline__ int row_of_thread() { return threadIdx.x % GROUP / WARP * 16 + threadIdx.x % WARP / 4; }

// A group's own rows, as fragments in registers. Read where they are; those from `count` on become zeros.
template <typename T>
struct OwnFragments {
    unsigned fragments[D / 16][4];

    __device__ OwnFragments(const T* source, int count, int stride) {
        const bool aligned = rows_are_aligned_16(source, stride);
        const int row = row_of_thread(), column = threadIdx.x % 4 * 2;
#pragma unroll
        for (int step = 0; step < D / 16; step++) {
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const int at = row + i % 2 * 8;
                const T* from = source + static_cast<long long>(at) * stride + step * 16 + i / 2 * 8 + column;
                fragments[step][i] = 0;
                if (at >= count) continue;
                fragments[step][i] = aligned ? *reinterpret_cast<const unsigned*>(from) : pair_of(from[0], from[1]);
            }
        }
    }
};

// ---- Products. They are begun, not waited for.

// c (64, 8·TILES) = own (64, D) · rows (8·TILES, D)ᵀ
template <typename T, int TILES, int OWN_ROWS, int ROWS>
__device__ __forceinline__ void begin_transposed(float (&c)[TILES][4], Tile<OWN_ROWS> own, Tile<ROWS> rows) {
#pragma unroll
    for (int step = 0; step < D / 16; step++) group_mma<T, false>(c, own.columns(step), rows.columns(step), step > 0);
}
template <typename T, int TILES, int ROWS>
__device__ __forceinline__ void begin_transposed(float (&c)[TILES][4], const OwnFragments<T>& own, Tile<ROWS> rows) {
#pragma unroll
    for (int step = 0; step < D / 16; step++) group_mma<T, false>(c, own.fragments[step], rows.columns(step), step > 0);
}

// p (64, 8·TILES), rounded to T.
template <typename T, int TILES>
__device__ __forceinline__ void round_to_fragments(unsigned (&fragments)[TILES / 2][4], const float (&p)[TILES][4]) {
#pragma unroll
    for (int n = 0; n < TILES; n += 2) {
        fragments[n / 2][0] = pair_from_f32<T>(p[n][0], p[n][1]);
        fragments[n / 2][1] = pair_from_f32<T>(p[n][2], p[n][3]);
        fragments[n / 2][2] = pair_from_f32<T>(p[n + 1][0], p[n + 1][1]);
        fragments[n / 2][3] = pair_from_f32<T>(p[n + 1][2], p[n + 1][3]);
    }
}

// c (64, D) += p (64, 16·STEPS) · rows (16·STEPS, D)
template <typename T, int STEPS, int ROWS>
__device__ __forceinline__ void begin_product(float (&c)[D / 8][4], const unsigned (&p)[STEPS][4], Tile<ROWS> rows) {
#pragma unroll
    for (int step = 0; step < STEPS; step++) group_mma<T, true>(c, p[step], rows.rows(step), true);
}

// ---- The ring of tiles

// Barriers of 8 bytes: a stage is full once all loaders' copies are there, and empty once every warp that multiplies has left it.
template <int STAGES>
struct Ring {
    unsigned barriers;

    static constexpr int BYTES = 2 * STAGES * 8;
    __device__ unsigned full(int stage) const { return barriers + stage * 8; }
    __device__ unsigned empty(int stage) const { return barriers + (STAGES + stage) * 8; }

    // All threads must come along.
    __device__ explicit Ring(unsigned barriers) : barriers(barriers) {
        if (threadIdx.x == 0) {
            for (int stage = 0; stage < STAGES; stage++) {
                barrier_init(full(stage), GROUP);
                barrier_init(empty(stage), GROUPS * GROUP / WARP);
            }
        }
        __syncthreads();
    }
    // Calls load(i, stage) for tiles 0 … n-1, each as soon as its stage is empty. Aligned: only by asynchronous copies.
    template <typename Load>
    __device__ void fill(int n, bool aligned, Load load) const {
        for (int i = 0; i < n; i++) {
            const int stage = i % STAGES, round = i / STAGES;
            if (round > 0) barrier_wait(empty(stage), (round - 1) & 1);
            load(i, stage);
            if (aligned) {
                barrier_arrive_after_copies(full(stage));
            } else {
                cp_async_wait_all();
                barrier_arrive(full(stage));
            }
        }
        cp_async_wait_all();  // a thread must not end before its copies
    }
    // The same tiles, for those that multiply: waits for one; leaves one, when none of its products is under way any more.
    __device__ void wait(int i) const {
        barrier_wait(full(i % STAGES), i / STAGES & 1);
        fence_for_tensor_cores();
    }
    __device__ void release(int i) const {
        if (threadIdx.x % WARP == 0) barrier_arrive(empty(i % STAGES));
    }
    // Calls use(i, stage) for each; no product may be under way when it returns.
    template <typename Use>
    __device__ void drain(int n, Use use) const {
        for (int i = 0; i < n; i++) {
            wait(i);
            use(i, i % STAGES);
            release(i);
        }
    }
};

// Element i of a thread's part of a product: i % 4 / 2 says which of its rows, and this is its column.
__device__ __forceinline__ int column_of(int i) { return i / 4 * 8 + threadIdx.x % 4 * 2 + i % 2; }

// ---- Results

// out (count, D) = c·factor, with a factor for each of a thread's two rows.
template <typename T>
__device__ __forceinline__ void store_group(T* out, int stride, int count, const float (&c)[D / 8][4], const float (&factor)[2]) {
    const bool aligned = rows_are_aligned_16(out, stride);
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const int row = row_of_thread() + 8 * half;
        if (row >= count) return;
        T* to = out + static_cast<long long>(row) * stride + threadIdx.x % 4 * 2;
#pragma unroll
        for (int n = 0; n < D / 8; n++) {
            const float low = c[n][2 * half] * factor[half], high = c[n][2 * half + 1] * factor[half];
            if (aligned) {
                *reinterpret_cast<unsigned*>(to + n * 8) = pair_from_f32<T>(low, high);
            } else {
                to[n * 8] = from_f32<T>(low), to[n * 8 + 1] = from_f32<T>(high);
            }
        }
    }
}

}  // namespace hopper
