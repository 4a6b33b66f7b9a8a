// What the adapters' first halves make of an input (crates/nn/src/linear/fused.rs):
//   low = scaling·x·Aᵀ
//   x    // (N, inputs), rows x_stride apart
//   a    // (room, inputs), rows a_stride apart: those of all parts one below the other, as low_rank.cu writes them below W
//   low  // (N, room), rows low_stride apart: may be the columns beside x
// low =. The product does next to nothing with what it reads, so all processors have to ask for x at once: a block takes few tokens and
// all of their columns, its warps share the columns out, and add up at the end. A is read again for every block, from the L2 cache.
// Strides, inputs and room are multiples of 8, room ≤ RANK (16 or 32: with 64, cuBLASLt is faster), and all addresses are of 16 bytes. compute_75 has too little
// shared memory.
//
// Launch: THREADS threads, grid.x = N / TOKENS, rounded up
//
// archs: 80

#include "common.cuh"
#include "tile.cuh"

constexpr int THREADS = 256, WARPS = THREADS / WARP;
constexpr int COLUMNS = 256;  // of a step
constexpr int ROW_BYTES = COLUMNS * 2;
constexpr int STAGES = 4;     // so that a processor has more in flight than a card's latency asks for
template <int RANK, int TOKENS>
constexpr int SHARED_BYTES = STAGES * (TOKENS + RANK) * ROW_BYTES;

// `rows` rows of COLUMNS columns, 0 where there is nothing to copy.
template <typename T>
__device__ __forceinline__ void load_tile(unsigned tile, int rows, const T* from, int stride, int valid_rows, int valid_columns) {
#pragma unroll
    for (int i = threadIdx.x; i < rows * COLUMNS / 8; i += THREADS) {
        const int row = i / (COLUMNS / 8), column = i % (COLUMNS / 8) * 8;
        cp_async_16(in_tile<ROW_BYTES>(tile, row, column), from + static_cast<long long>(row) * stride + column, row < valid_rows && column < valid_columns);
    }
}

template <int RANK, int TOKENS, typename T>
__device__ void low_rank_forward(T* low, const T* x, const T* a, int n, int inputs, int room, int x_stride, int a_stride, int low_stride,
                                 float scaling) {
    constexpr int TOKEN_TILES = TOKENS / 16, RANK_TILES = RANK / 8, STAGE_BYTES = (TOKENS + RANK) * ROW_BYTES;
    static_assert(WARPS * TOKENS * RANK * 4 <= SHARED_BYTES<RANK, TOKENS>, "the sums of all warps take the tiles' place");
    DYNAMIC_SHARED(unsigned char, shared);
    const unsigned tiles = shared_address(shared);
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    const int first = blockIdx.x * TOKENS, steps = (inputs + COLUMNS - 1) / COLUMNS;
    x += static_cast<long long>(first) * x_stride;

    const auto load = [&](int step) {
        if (step < steps) {
            const unsigned tile = tiles + step % STAGES * STAGE_BYTES;
            const int column = step * COLUMNS;
            load_tile(tile, TOKENS, x + column, x_stride, n - first, inputs - column);
            load_tile(tile + TOKENS * ROW_BYTES, RANK, a + column, a_stride, room, inputs - column);
        }
        cp_async_commit();
    };
#pragma unroll
    for (int step = 0; step < STAGES - 1; step++) load(step);

    float sums[TOKEN_TILES][RANK_TILES][4] = {};
#pragma unroll 1
    for (int step = 0; step < steps; step++) {
        cp_async_wait<STAGES - 2>();
        __syncthreads();  // and all are done with the stage that is loaded next, which is the last step's
        load(step + STAGES - 1);
        const unsigned x_tile = tiles + step % STAGES * STAGE_BYTES, a_tile = x_tile + TOKENS * ROW_BYTES;
#pragma unroll
        for (int k = 0; k < COLUMNS / 16 / WARPS; k++) {
            const int column = (k * WARPS + warp) * 16;
            unsigned x_own[TOKEN_TILES][4];
#pragma unroll
            for (int i = 0; i < TOKEN_TILES; i++) ldmatrix_x4(x_own[i], in_tile<ROW_BYTES>(x_tile, i * 16 + lane % 16, column + lane / 16 * 8));
#pragma unroll
            for (int j = 0; j < RANK_TILES; j += 2) {
                unsigned four[4];
                ldmatrix_x4(four, in_tile<ROW_BYTES>(a_tile, j * 8 + lane / 16 * 8 + lane % 8, column + lane / 8 % 2 * 8));
                const unsigned b[2][2] = {{four[0], four[1]}, {four[2], four[3]}};
#pragma unroll
                for (int i = 0; i < TOKEN_TILES; i++) {
                    mma_m16n8k16<T>(sums[i][j], x_own[i], b[0]);
                    mma_m16n8k16<T>(sums[i][j + 1], x_own[i], b[1]);
                }
            }
        }
    }
    cp_async_wait_all();
    __syncthreads();
    float* shares = reinterpret_cast<float*>(shared);  // (WARPS, TOKENS, RANK)
#pragma unroll
    for (int i = 0; i < TOKEN_TILES; i++) {
#pragma unroll
        for (int j = 0; j < RANK_TILES; j++) {
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const int row = i * 16 + half * 8 + lane / 4, column = j * 8 + lane % 4 * 2;
                *reinterpret_cast<float2*>(shares + (warp * TOKENS + row) * RANK + column) =
                    make_float2(sums[i][j][half * 2], sums[i][j][half * 2 + 1]);
            }
        }
    }
    __syncthreads();
    for (int i = threadIdx.x; i < TOKENS * RANK / 8; i += THREADS) {
        const int row = i / (RANK / 8), column = i % (RANK / 8) * 8;
        if (first + row >= n || column >= room) continue;
        float eight[8] = {};
#pragma unroll
        for (int share = 0; share < WARPS; share++) {
#pragma unroll
            for (int k = 0; k < 8; k++) eight[k] += shares[(share * TOKENS + row) * RANK + column + k];
        }
        Run<T, 8> run;
#pragma unroll
        for (int k = 0; k < 8; k++) run.values[k] = from_f32<T>(scaling * eight[k]);
        store_run(low + static_cast<long long>(first + row) * low_stride + column, run);
    }
}

#define DEFINE(NAME, T, RANK, TOKENS)                                                                                                       \
    extern "C" __device__ int low_rank_forward_##RANK##_##TOKENS##_##NAME##_launch[3] = {TOKENS, THREADS, SHARED_BYTES<RANK, TOKENS>};       \
    extern "C" __global__ void __launch_bounds__(THREADS)                                                                                   \
    low_rank_forward_##RANK##_##TOKENS##_##NAME(T* low, const T* x, const T* a, int n, int inputs, int room, int x_stride, int a_stride,     \
                                                int low_stride, float scaling) {                                                            \
        low_rank_forward<RANK, TOKENS, T>(low, x, a, n, inputs, room, x_stride, a_stride, low_stride, scaling);                              \
    }
#define DEFINE_ALL(NAME, T)                                     \
    DEFINE(NAME, T, 16, 16)                                     \
    DEFINE(NAME, T, 16, 32)                                     \
    DEFINE(NAME, T, 32, 16)                                     \
    DEFINE(NAME, T, 32, 32)

DEFINE_ALL(f16, f16)
DEFINE_ALL(bf16, bf16)
