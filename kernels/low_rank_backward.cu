// The thin products in the backward of W + scaling·B·A that read dy (crates/nn/src/linear/fused.rs), in one pass over it:
//   dlow = scaling·dy·B,   dB += dyᵀ·low
//   dy     // (N, outputs), the columns of all parts side by side
//   b      // (outputs, R): a part's B on its own rows and ranks, as low_rank.cu writes it beside W
//   low    // (N, R) and dlow // (N, room), the ranks of all parts side by side; dlow is 0 from R on;  db // (rows, rank) of each part
// A block has COLUMNS columns of dy, of one part, and some tokens: it keeps its share of dB in registers, and gives away its share of
// dlow after each STEP tokens. Shares are added up in a fixed order:
//   dlow_shares  // (column blocks, N, RANK)
//   db_shares    // (token blocks, column blocks·COLUMNS, RANK), RANK being 16 or 32, as large as the largest rank asks for
// shares =, dlow =, db +=. All strides, rows of parts and ranks are multiples of 8, and all addresses of 16 bytes.
//
// Launch: low_rank_backward_RANK_STAGES: THREADS threads, grid.x = column blocks (of each part with an adapter by itself), grid.y = token blocks of
// `tokens`, a multiple of STEP;  low_rank_backward_sum: THREADS threads, which take RUN neighbouring numbers each of all db and of dlow
// (any grid is right)

#include "common.cuh"
#include "tile.cuh"

constexpr int PARTS = 3;
constexpr int COLUMNS = 512;
constexpr int THREADS = 256;

// compute_75 has too little shared memory for the pass itself.
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
constexpr int STEP = 32;
constexpr int WARPS = THREADS / WARP;
constexpr int QUARTERS = 4;  // of the columns: dlow's products are shared out by 16 tokens and these

constexpr int ROW_BYTES = COLUMNS * 2, TILE_BYTES = STEP * ROW_BYTES;
template <int RANK>
constexpr int LOW_BYTES = STEP * RANK * 2;
template <int RANK, int STAGES>
constexpr int SHARED_BYTES = STAGES * (TILE_BYTES + LOW_BYTES<RANK>) + QUARTERS * STEP * RANK * 4;

// A block of columns: the part that it is of, and where that stands.
struct Place {
    int rank, first_rank;       // of the part
    int first_column, columns;  // of the block

    __device__ Place(int block, const int (&rows)[PARTS], const int (&ranks)[PARTS]) : rank(0), first_rank(0), first_column(0), columns(0) {
#pragma unroll
        for (int part = 0; part < PARTS; part++) {
            const int blocks = ranks[part] > 0 ? (rows[part] + COLUMNS - 1) / COLUMNS : 0;
            if (block >= 0 && block < blocks) {
                rank = ranks[part];
                first_column += block * COLUMNS;
                columns = min(COLUMNS, rows[part] - block * COLUMNS);
                return;
            }
            block -= blocks;
            first_rank += ranks[part];
            first_column += rows[part];
        }
    }
};

template <int RANK, int STAGES, typename T>
__device__ void low_rank_backward(float* dlow_shares, float* db_shares, const T* dy, const T* b, const T* low, const int (&rows)[PARTS],
                                  const int (&ranks)[PARTS], int n, int dy_stride, int b_stride, int low_stride, int tokens) {
    constexpr int TILES = RANK / 8;  // of ranks, as products take them
    constexpr int DEPTH = COLUMNS / QUARTERS / 16, OWN = COLUMNS / WARPS / 16;
    DYNAMIC_SHARED(unsigned char, shared);
    const unsigned tiles = shared_address(shared), lows = tiles + STAGES * TILE_BYTES;
    float* quarters = reinterpret_cast<float*>(shared + STAGES * (TILE_BYTES + LOW_BYTES<RANK>));  // (QUARTERS, STEP, RANK)
    const int thread = threadIdx.x, warp = thread / WARP, lane = thread % WARP;
    const Place place(blockIdx.x, rows, ranks);
    const int first = blockIdx.y * tokens, end = min(n, first + tokens), steps = (end - first + STEP - 1) / STEP;
    dy += place.first_column;
    b += static_cast<long long>(place.first_column) * b_stride + place.first_rank;
    low += place.first_rank;

    const auto load = [&](int step) {
        const int stage = step % STAGES, token = first + step * STEP;
#pragma unroll
        for (int i = thread; i < STEP * COLUMNS / 8; i += THREADS) {
            const int row = i / (COLUMNS / 8), column = i % (COLUMNS / 8) * 8;
            cp_async_16(in_tile<ROW_BYTES>(tiles + stage * TILE_BYTES, row, column), dy + static_cast<long long>(token + row) * dy_stride + column,
                        token + row < end && column < place.columns);
        }
        if (thread < STEP * TILES) {
            const int row = thread / TILES, column = thread % TILES * 8;
            cp_async_16(lows + stage * LOW_BYTES<RANK> + thread * 16, low + static_cast<long long>(token + row) * low_stride + column,
                        token + row < end && column < place.rank);
        }
        cp_async_commit();
    };

    // The block's rows of B come through the last stage into registers, as the fragments that all steps multiply by.
    const unsigned b_tile = tiles + (STAGES - 1) * TILE_BYTES;
    for (int i = thread; i < COLUMNS * TILES; i += THREADS) {
        const int row = i / TILES, column = i % TILES * 8;
        cp_async_16(b_tile + i * 16, b + static_cast<long long>(row) * b_stride + column, row < place.columns && column < place.rank);
    }
    cp_async_commit();
#pragma unroll
    for (int step = 0; step < STAGES - 1; step++) {
        if (step < steps) load(step);
        else cp_async_commit();
    }
    cp_async_wait<STAGES - 1>();
    __syncthreads();
    const int quarter = warp / 2, token_tile = warp % 2 * 16;
    unsigned b_own[DEPTH][TILES][2];
#pragma unroll
    for (int k = 0; k < DEPTH; k++) {
#pragma unroll
        for (int tile = 0; tile < TILES; tile += 2) {
            const int row = (quarter * DEPTH + k) * 16 + lane % 16;
            unsigned four[4];
            ldmatrix_x4_transposed(four, b_tile + (row * TILES + tile + lane / 16) * 16);
            b_own[k][tile][0] = four[0], b_own[k][tile][1] = four[1];
            b_own[k][tile + 1][0] = four[2], b_own[k][tile + 1][1] = four[3];
        }
    }

    float db[OWN][TILES][4] = {};  // (the warp's columns, ranks)
#pragma unroll 1
    for (int step = 0; step < steps; step++) {
        cp_async_wait<STAGES - 2>();
        __syncthreads();  // and all are done with the stage that is loaded next, which is the last step's
        if (step + STAGES - 1 < steps) load(step + STAGES - 1);
        else cp_async_commit();
        const unsigned tile = tiles + step % STAGES * TILE_BYTES, low_tile = lows + step % STAGES * LOW_BYTES<RANK>;

        float dlow[TILES][4] = {};  // (16 tokens, ranks), over a quarter of the columns
#pragma unroll
        for (int k = 0; k < DEPTH; k++) {
            unsigned a[4];
            ldmatrix_x4(a, in_tile<ROW_BYTES>(tile, token_tile + lane % 16, (quarter * DEPTH + k) * 16 + lane / 16 * 8));
#pragma unroll
            for (int i = 0; i < TILES; i++) mma_m16n8k16<T>(dlow[i], a, b_own[k][i]);
        }
#pragma unroll
        for (int i = 0; i < TILES * 4; i++) {
            const int row = token_tile + lane / 4 + i % 4 / 2 * 8, column = i / 4 * 8 + lane % 4 * 2 + i % 2;
            quarters[(quarter * STEP + row) * RANK + column] = dlow[i / 4][i % 4];
        }

#pragma unroll
        for (int k = 0; k < STEP / 16; k++) {
            unsigned low_own[TILES][2];
#pragma unroll
            for (int i = 0; i < TILES; i += 2) {
                unsigned four[4];
                ldmatrix_x4_transposed(four, low_tile + ((k * 16 + lane % 16) * TILES + i + lane / 16) * 16);
                low_own[i][0] = four[0], low_own[i][1] = four[1];
                low_own[i + 1][0] = four[2], low_own[i + 1][1] = four[3];
            }
#pragma unroll
            for (int own = 0; own < OWN; own++) {
                unsigned a[4];
                const int row = k * 16 + lane / 16 * 8 + lane % 8, column = (warp * OWN + own) * 16 + lane / 8 % 2 * 8;
                ldmatrix_x4_transposed(a, in_tile<ROW_BYTES>(tile, row, column));
#pragma unroll
                for (int i = 0; i < TILES; i++) mma_m16n8k16<T>(db[own][i], a, low_own[i]);
            }
        }
        __syncthreads();
        for (int i = thread; i < STEP * RANK; i += THREADS) {
            const int token = first + step * STEP + i / RANK;
            float sum = 0;
#pragma unroll
            for (int quarter = 0; quarter < QUARTERS; quarter++) sum += quarters[quarter * STEP * RANK + i];
            if (token < end) dlow_shares[(static_cast<long long>(blockIdx.x) * n + token) * RANK + i % RANK] = sum;
        }
    }
    db_shares += (static_cast<long long>(blockIdx.y) * gridDim.x + blockIdx.x) * COLUMNS * RANK;
#pragma unroll
    for (int own = 0; own < OWN; own++) {
#pragma unroll
        for (int i = 0; i < TILES * 2; i++) {
            const int row = (warp * OWN + own) * 16 + lane / 4 + i % 2 * 8, column = i / 2 * 8 + lane % 4 * 2;
            *reinterpret_cast<float2*>(db_shares + row * RANK + column) = make_float2(db[own][i / 2][i % 2 * 2], db[own][i / 2][i % 2 * 2 + 1]);
        }
    }
}

#endif

constexpr int RUN = 4;

// The sum of `count` shares of RUN numbers, `apart` from each other, in order.
__device__ __forceinline__ float4 sum_shares(const float* from, long long apart, int count) {
    float4 sum = {0, 0, 0, 0};
#pragma unroll 8
    for (int i = 0; i < count; i++) {
        const float4 share = *reinterpret_cast<const float4*>(from + i * apart);
        sum.x += share.x, sum.y += share.y, sum.z += share.z, sum.w += share.w;
    }
    return sum;
}

template <typename T>
__device__ void sum(T* dlow, const float* dlow_shares, float* const (&db)[PARTS], const float* db_shares, const int (&rows)[PARTS],
                    const int (&ranks)[PARTS], int n, int room, int stride, int padded, int token_blocks, int column_blocks, float scaling) {
    const int db_runs = (rows[0] * ranks[0] + rows[1] * ranks[1] + rows[2] * ranks[2]) / RUN;
    const long long all = db_runs + static_cast<long long>(n) * room / RUN;
    for (long long i = static_cast<long long>(blockIdx.x) * THREADS + threadIdx.x; i < all; i += static_cast<long long>(gridDim.x) * THREADS) {
        const bool of_db = i < db_runs;
        // The number's place: in its part's db, or in its token's dlow.
        int own = of_db ? static_cast<int>(i) * RUN : static_cast<int>((i - db_runs) % (room / RUN)) * RUN;
        const long long token = of_db ? 0 : (i - db_runs) / (room / RUN);
        int block = 0;  // the part's first
        Run<T, RUN> run;
#pragma unroll
        for (int part = 0; part < PARTS; part++) {
            const int rank = ranks[part], count = of_db ? rows[part] * rank : rank;
            const int blocks = rank > 0 ? (rows[part] + COLUMNS - 1) / COLUMNS : 0;
            if (own >= 0 && own < count) {
                if (of_db) {
                    const float* from = db_shares + (static_cast<long long>(block) * COLUMNS + own / rank) * padded + own % rank;
                    const float4 share = sum_shares(from, static_cast<long long>(column_blocks) * COLUMNS * padded, token_blocks);
                    float4* to = reinterpret_cast<float4*>(db[part] + own);
                    const float4 before = *to;
                    *to = {before.x + share.x, before.y + share.y, before.z + share.z, before.w + share.w};
                } else {
                    const float* from = dlow_shares + (static_cast<long long>(block) * n + token) * padded + own;
                    const float4 share = sum_shares(from, static_cast<long long>(n) * padded, blocks);
                    const float sums[RUN] = {share.x, share.y, share.z, share.w};
#pragma unroll
                    for (int k = 0; k < RUN; k++) run.values[k] = from_f32<T>(scaling * sums[k]);
                }
            }
            own -= count;
            block += blocks;
        }
        if (!of_db) store_run(dlow + token * stride + (i - db_runs) % (room / RUN) * RUN, run);
    }
}

#define DEFINE(NAME, T, RANK, STAGES, RESIDENT)                                                                                       \
    extern "C" __device__ int low_rank_backward_##RANK##_##STAGES##_##NAME##_launch[3] = {COLUMNS, THREADS, SHARED_BYTES<RANK, STAGES>}; \
    extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT)                                                                   \
    low_rank_backward_##RANK##_##STAGES##_##NAME(float* dlow_shares, float* db_shares, const T* dy, const T* b, const T* low,         \
                                                 int rows0, int rows1, int rows2, int rank0, int rank1, int rank2, int n,             \
                                                 int dy_stride, int b_stride, int low_stride, int tokens) {                           \
        low_rank_backward<RANK, STAGES, T>(dlow_shares, db_shares, dy, b, low, {rows0, rows1, rows2}, {rank0, rank1, rank2}, n,       \
                                           dy_stride, b_stride, low_stride, tokens);                                                  \
    }
#define DEFINE_SUM(NAME, T)                                                                                                           \
    extern "C" __global__ void __launch_bounds__(THREADS)                                                                             \
    low_rank_backward_sum_##NAME(T* dlow, const float* dlow_shares, float* db0, float* db1, float* db2, const float* db_shares,       \
                                 int rows0, int rows1, int rows2, int rank0, int rank1, int rank2, int n, int room, int stride,       \
                                 int padded, int token_blocks, int column_blocks, float scaling) {                                    \
        sum<T>(dlow, dlow_shares, {db0, db1, db2}, db_shares, {rows0, rows1, rows2}, {rank0, rank1, rank2}, n, room, stride, padded,  \
               token_blocks, column_blocks, scaling);                                                                                 \
    }

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
// Three stages where a processor has the memory for them, as on compute_90.
#define DEFINE_ALL(NAME, T) DEFINE(NAME, T, 16, 2, 2) DEFINE(NAME, T, 16, 3, 2) DEFINE(NAME, T, 32, 2, 1) DEFINE(NAME, T, 32, 3, 1)
DEFINE_ALL(f16, f16)
DEFINE_ALL(bf16, bf16)
#endif
FOR_NUMBER_TYPES(DEFINE_SUM)
