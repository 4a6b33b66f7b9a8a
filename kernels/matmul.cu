// C = alpha·op(A)·op(B) + beta·C: the product where cuBLASLt isn't there. Sums are in f32; the result is rounded once.
//
//   nt   A (m, k), B (n, k)   C = A·Bᵀ   a projection forward
//   nn   A (m, k), B (k, n)   C = A·B    its gradient to x
//   tn   A (k, m), B (k, n)   C = Aᵀ·B   its gradient to a weight
//
// C (m, n) is `=` where beta is 0 (and isn't read), else `+=` to beta·C.
//
// 16 bits: tensor cores, several stages of tiles under way to shared memory while one is multiplied, as in NVIDIA's CUTLASS
// ("Efficient GEMM in CUDA"). Rows in shared memory are permuted in pieces of 16 bytes, so that the 8 rows which one ldmatrix reads
// lie in different banks. Operands whose address or stride isn't a multiple of 16 bytes are read number by number: slow, not wrong.
//
// f32: plain, for tests.
//
// Launch: grid.x = ceil(m / tile rows) · ceil(n / tile columns), m and n not 0.
//   kernel                                     tile       threads   dynamic shared memory, compute_80 | compute_75
//   matmul_{nt,nn,tn}_{f16,bf16}_{T,f32}       128×256    256       98304 | 49152
//   matmul_{nt,nn,tn}_{f16,bf16}_{T,f32}_thin   64×64     128       49152 | 32768
//   matmul_{nt,nn,tn}_f32_f32                   64×64     256       0
// thin is for m or n of at most 64 (adapters), and for products with fewer large tiles than half the card's multiprocessors.

#include "common.cuh"
#include "ptx.cuh"

#if __CUDA_ARCH__ >= 800
#define STAGES_OR_TWO(stages) stages
#else
#define STAGES_OR_TWO(stages) 2  // one is multiplied, one is filled: the next waits in registers
#endif

// A block's tile is M×N, a warp's WARP_M×WARP_N; a stage holds K of the sum.
struct Large {
    static constexpr int M = 128, N = 256, K = 32, WARP_M = 64, WARP_N = 64, STAGES = STAGES_OR_TWO(4), BLOCKS = 1;
    static constexpr int THREADS = M / WARP_M * (N / WARP_N) * WARP;
};

struct Thin {
    static constexpr int M = 64, N = 64, K = 64, WARP_M = 32, WARP_N = 32, STAGES = STAGES_OR_TWO(3), BLOCKS = 4;
    static constexpr int THREADS = M / WARP_M * (N / WARP_N) * WARP;
};

// What tensor cores take in at once.
constexpr int MMA_K = 16, MMA_M = 16, MMA_N = 8;

// Numbers of 16 bits in 16 bytes.
constexpr int CHUNK = 8;

// Which tile a block works on. Groups of 16 rows of tiles, down each column of the group before the next: blocks that run at the
// same time share rows of A and columns of B, which then come from the L2 cache.
struct TilePosition {
    int row, col;
    __device__ TilePosition(int index, int rows, int cols) {
        constexpr int GROUP = 16;
        int group = index / (GROUP * cols), within = index - group * (GROUP * cols);
        int height = min(rows - group * GROUP, GROUP);
        row = group * GROUP + within % height;
        col = within / height;
    }
};

// The first `count` of 8 numbers, zeros behind them.
template <typename T>
__device__ __forceinline__ uint4 load_chunk(const T* source, int count, bool aligned) {
    if (aligned && count == CHUNK) return *reinterpret_cast<const uint4*>(source);
    Pack<T> chunk;
#pragma unroll
    for (int i = 0; i < CHUNK; i++) {
        if (i < count) chunk[i] = source[i];
    }
    return chunk.bits;
}

// One operand of a block: from global to shared memory, tile after tile along k, and from there into fragments.
// ALONG_K: the matrix is (EXTENT.., k), else (k, EXTENT..), where EXTENT is the block's part of m or n.
template <typename T, typename Shape, int EXTENT, bool ALONG_K>
struct Operand {
    static constexpr int ROWS = ALONG_K ? EXTENT : Shape::K, ROW_CHUNKS = (ALONG_K ? Shape::K : EXTENT) / CHUNK;
    static constexpr int ROW_BYTES = 16 * ROW_CHUNKS, BYTES = ROWS * ROW_BYTES;
    static constexpr int ROW_STEP = Shape::THREADS / ROW_CHUNKS, COPIES = ROWS / ROW_STEP;
    static_assert(ROW_STEP % 8 == 0 && ROWS % ROW_STEP == 0, "a thread's chunks have the same place in their rows");

    const T* source;          // this thread's first chunk of the next tile
    long long chunk_step;     // from one chunk of this thread to the next, numbers
    long long tile_step;      // from one tile to the next, numbers
    int row, col;             // of this thread's first chunk, in the tile
    int extent_left, k_left;  // the matrix, counted from the next tile's corner
    bool aligned;
#if __CUDA_ARCH__ < 800
    uint4 held[COPIES];
#endif

    __device__ Operand(const T* matrix, int stride, int first, int extent, int k) {
        row = threadIdx.x / ROW_CHUNKS;
        col = threadIdx.x % ROW_CHUNKS * CHUNK;
        extent_left = extent - first;
        k_left = k;
        aligned = rows_are_aligned_16(matrix, stride);
        source = matrix + (ALONG_K ? static_cast<long long>(first) * stride : first) + static_cast<long long>(row) * stride + col;
        chunk_step = static_cast<long long>(ROW_STEP) * stride;
        tile_step = ALONG_K ? Shape::K : static_cast<long long>(Shape::K) * stride;
    }

    // Where a chunk lies in a tile in shared memory: in its row, but permuted by the row's number.
    __device__ static int offset(int row, int chunk) {
        return row * ROW_BYTES + (chunk ^ (ROW_BYTES == 64 ? row / 2 % 4 : row % 8)) * 16;
    }

    // Begins to bring the next tile; it is in shared memory after `settle` and the wait.
    __device__ void fetch(unsigned char* tile) {
        const int rows = ALONG_K ? extent_left : k_left, cols = ALONG_K ? k_left : extent_left;
        const int count = max(min(cols - col, CHUNK), 0);
#if __CUDA_ARCH__ >= 800
        unsigned char* destination = tile + offset(row, col / CHUNK);
        if (aligned) {
#pragma unroll
            for (int i = 0; i < COPIES; i++) {
                int bytes = row + i * ROW_STEP < rows ? count * 2 : 0;
                cp_async_up_to_16(shared_address(destination) + i * ROW_STEP * ROW_BYTES, source + i * chunk_step, bytes);
            }
        } else {
#pragma unroll 1
            for (int i = 0; i < COPIES; i++) {
                uint4 chunk = load_chunk(source + i * chunk_step, row + i * ROW_STEP < rows ? count : 0, false);
                *reinterpret_cast<uint4*>(destination + i * ROW_STEP * ROW_BYTES) = chunk;
            }
        }
#else
#pragma unroll
        for (int i = 0; i < COPIES; i++) held[i] = load_chunk(source + i * chunk_step, row + i * ROW_STEP < rows ? count : 0, aligned);
#endif
        source += tile_step;
        k_left -= Shape::K;
    }

    // compute_75 copies through registers.
    __device__ void settle(unsigned char* tile) {
#if __CUDA_ARCH__ < 800
#pragma unroll
        for (int i = 0; i < COPIES; i++) *reinterpret_cast<uint4*>(tile + offset(row + i * ROW_STEP, col / CHUNK)) = held[i];
#endif
    }

    // Where this lane's row of a 16×16 piece begins, for ldmatrix_x4: piece 0 of the warp's part of EXTENT, which begins at `first`.
    // The four matrices are the halves of the piece, in the order of A's fragment or of two of B's.
    __device__ static int lane_offset(int first, bool is_a) {
        int lane = threadIdx.x % WARP, extent_half = is_a ? lane / 8 % 2 : lane / 16, k_half = is_a ? lane / 16 : lane / 8 % 2;
        return ALONG_K ? offset(first + lane % 8 + extent_half * 8, k_half) : offset(lane % 8 + k_half * 8, first / CHUNK + extent_half);
    }

    // Piece i along EXTENT, piece `step` along k. Along a row, moving by 2 chunks changes bits that the permutation only flips.
    __device__ static void load_piece(unsigned (&r)[4], unsigned tile, int lane_offset, int i, int step) {
        if constexpr (ALONG_K) {
            ldmatrix_x4(r, tile + (lane_offset ^ step * 32) + i * 16 * ROW_BYTES);
        } else {
            ldmatrix_x4_transposed(r, tile + (lane_offset ^ i * 32) + step * 16 * ROW_BYTES);
        }
    }
};

// Writes a warp's sums, 16 rows at a time, through shared memory: in fragments a row's neighbours are spread over lanes.
template <typename Shape, typename Out>
struct Writer {
    static constexpr int STRIDE = Shape::WARP_N + 8;  // floats; the fragments of half a warp fall into different banks
    static constexpr int BYTES = MMA_M * STRIDE * static_cast<int>(sizeof(float));
    static constexpr int WIDTH = Pack<Out>::SIZE, ROW_LANES = Shape::WARP_N / WIDTH;
    static constexpr int PASS_ROWS = WARP / ROW_LANES, PASSES = MMA_M / PASS_ROWS;

    float* staged;   // of this warp
    Out* c;          // this lane's first number
    int stride;      // of C
    int row, col;    // of this lane in 16 rows
    int rows, cols;  // that C has from the warp's part on
    bool aligned;
    float alpha, beta;

    __device__ Writer(float* staged, Out* matrix, int stride, int first_row, int first_col, int m, int n, float alpha, float beta)
        : staged(staged), stride(stride), rows(m - first_row), cols(n - first_col), alpha(alpha), beta(beta) {
        row = threadIdx.x % WARP / ROW_LANES;
        col = threadIdx.x % ROW_LANES * WIDTH;
        c = matrix + (static_cast<long long>(first_row) + row) * stride + first_col + col;
        aligned = rows_are_aligned_16(matrix, stride);
    }

    __device__ void write(const float (&sums)[Shape::WARP_N / MMA_N][4], int from_row) {
        const int g = threadIdx.x % WARP / 4, t = threadIdx.x % 4;
        const int count = min(cols - col, WIDTH);
        const bool whole = aligned && count == WIDTH;
        Pack<Out> old[PASSES];  // zeros, or asked for before they are needed
        if (beta != 0.0f && whole) {
#pragma unroll
            for (int pass = 0; pass < PASSES; pass++) {
                const int offset = from_row + pass * PASS_ROWS;
                if (offset + row < rows) old[pass] = load_pack(c + static_cast<long long>(offset) * stride);
            }
        }
        __syncwarp();  // the rows before these have been read
#pragma unroll
        for (int i = 0; i < Shape::WARP_N / MMA_N; i++) {
            *reinterpret_cast<float2*>(staged + g * STRIDE + i * MMA_N + 2 * t) = make_float2(sums[i][0], sums[i][1]);
            *reinterpret_cast<float2*>(staged + (g + 8) * STRIDE + i * MMA_N + 2 * t) = make_float2(sums[i][2], sums[i][3]);
        }
        __syncwarp();
        if (whole) {
#pragma unroll
            for (int pass = 0; pass < PASSES; pass++) {
                const int offset = from_row + pass * PASS_ROWS;
                if (offset + row >= rows) continue;
                const float* sum = staged + (pass * PASS_ROWS + row) * STRIDE + col;
                Pack<Out> result;
#pragma unroll
                for (int i = 0; i < WIDTH; i += 4) {
                    const float4 four = *reinterpret_cast<const float4*>(sum + i);
                    result[i] = from_f32<Out>(combine(four.x, to_f32(old[pass][i])));
                    result[i + 1] = from_f32<Out>(combine(four.y, to_f32(old[pass][i + 1])));
                    result[i + 2] = from_f32<Out>(combine(four.z, to_f32(old[pass][i + 2])));
                    result[i + 3] = from_f32<Out>(combine(four.w, to_f32(old[pass][i + 3])));
                }
                store_pack(c + static_cast<long long>(offset) * stride, result);
            }
        } else {
#pragma unroll 1
            for (int pass = 0; pass < PASSES; pass++) {
                const int offset = from_row + pass * PASS_ROWS;
                if (offset + row >= rows) continue;
                const float* sum = staged + (pass * PASS_ROWS + row) * STRIDE + col;
                Out* to = c + static_cast<long long>(offset) * stride;
#pragma unroll 1
                for (int i = 0; i < count; i++) to[i] = from_f32<Out>(combine(sum[i], beta != 0.0f ? to_f32(to[i]) : 0.0f));
            }
        }
    }

    __device__ float combine(float sum, float old) const { return alpha * sum + beta * old; }
};

template <typename Shape, bool A_ALONG_K, bool B_ALONG_K, typename T, typename Out>
__device__ __forceinline__ void multiply(Out* c, const T* a, const T* b, int m, int n, int k, int lda, int ldb, int ldc, float alpha,
                                         float beta) {
    using A = Operand<T, Shape, Shape::M, A_ALONG_K>;
    using B = Operand<T, Shape, Shape::N, B_ALONG_K>;
    using C = Writer<Shape, Out>;
    constexpr int STAGES = Shape::STAGES, STAGE_BYTES = A::BYTES + B::BYTES, STEPS = Shape::K / MMA_K;
    constexpr int A_PIECES = Shape::WARP_M / 16, B_PIECES = Shape::WARP_N / 16;
    static_assert(Shape::THREADS / WARP * C::BYTES <= STAGES * STAGE_BYTES, "results pass through the stages' memory");
    DYNAMIC_SHARED(unsigned char, stages);

    const TilePosition tile(blockIdx.x, (m - 1) / Shape::M + 1, (n - 1) / Shape::N + 1);
    const int warp = threadIdx.x / WARP;
    const int warp_row = warp % (Shape::M / Shape::WARP_M) * Shape::WARP_M, warp_col = warp / (Shape::M / Shape::WARP_M) * Shape::WARP_N;
    A left(a, lda, tile.row * Shape::M, m, k);
    B right(b, ldb, tile.col * Shape::N, n, k);

    auto fetch = [&](int stage) {
        left.fetch(stages + stage * STAGE_BYTES);
        right.fetch(stages + stage * STAGE_BYTES + A::BYTES);
    };
    auto settle = [&](int stage) {
        left.settle(stages + stage * STAGE_BYTES);
        right.settle(stages + stage * STAGE_BYTES + A::BYTES);
    };

    // Fragments of this step and of the next.
    unsigned left_pieces[2][A_PIECES][4], right_pieces[2][B_PIECES][4];
    const int left_lane = A::lane_offset(warp_row, true), right_lane = B::lane_offset(warp_col, false);
    auto load_pieces = [&](int stage, int step) {
        unsigned at = shared_address(stages) + stage * STAGE_BYTES;
#pragma unroll
        for (int i = 0; i < A_PIECES; i++) A::load_piece(left_pieces[step % 2][i], at, left_lane, i, step);
#pragma unroll
        for (int j = 0; j < B_PIECES; j++) B::load_piece(right_pieces[step % 2][j], at + A::BYTES, right_lane, j, step);
    };

    float sums[A_PIECES][2 * B_PIECES][4] = {};
    const int tiles = k / Shape::K + (k % Shape::K != 0);
#pragma unroll 1
    for (int i = 0; i < STAGES - 1; i++) {
        if (i < tiles) {
            fetch(i);
            settle(i);
        }
        cp_async_commit();
    }
    cp_async_wait<STAGES - 2>();
    __syncthreads();
    if (tiles > 0) load_pieces(0, 0);

    int stage = 0, free_stage = STAGES - 1;
#pragma unroll 1
    for (int i = 0; i < tiles; i++) {
        const int next_stage = stage + 1 == STAGES ? 0 : stage + 1;
        const bool more = i + STAGES - 1 < tiles;
#pragma unroll
        for (int step = 0; step < STEPS; step++) {
            if (step == 0) {
                if (more) fetch(free_stage);
                cp_async_commit();
            }
            if (step + 1 < STEPS) {
                load_pieces(stage, step + 1);
            } else {
                // From here on nobody reads this stage, and the next one is there for everyone.
                if (more) settle(free_stage);
                cp_async_wait<STAGES - 2>();
                __syncthreads();
                load_pieces(next_stage, 0);  // behind the last tile: never used
            }
#pragma unroll
            for (int mi = 0; mi < A_PIECES; mi++) {
#pragma unroll
                for (int nj = 0; nj < 2 * B_PIECES; nj++) {
                    const unsigned(&pieces)[4] = right_pieces[step % 2][nj / 2];
                    const unsigned piece[2] = {pieces[nj % 2 * 2], pieces[nj % 2 * 2 + 1]};
                    mma_m16n8k16<T>(sums[mi][nj], left_pieces[step % 2][mi], piece);
                }
            }
        }
        free_stage = stage;
        stage = next_stage;
    }
    cp_async_wait<0>();
    __syncthreads();

    float* staged = reinterpret_cast<float*>(stages + warp * C::BYTES);
    C writer(staged, c, ldc, tile.row * Shape::M + warp_row, tile.col * Shape::N + warp_col, m, n, alpha, beta);
#pragma unroll
    for (int i = 0; i < A_PIECES; i++) writer.write(sums[i], i * MMA_M);
}

// f32: a thread has 4×4 sums; rows and columns 16 apart, so that neighbours read neighbours.
template <bool A_ALONG_K, bool B_ALONG_K>
__device__ __forceinline__ void multiply_f32(float* c, const float* a, const float* b, int m, int n, int k, int lda, int ldb, int ldc,
                                             float alpha, float beta) {
    constexpr int TILE = 64, DEPTH = 16, SIDE = 16, PER_THREAD = TILE / SIDE;
    __shared__ float left[DEPTH][TILE + 1], right[DEPTH][TILE + 1];
    const TilePosition tile(blockIdx.x, (m - 1) / TILE + 1, (n - 1) / TILE + 1);
    const int first_row = tile.row * TILE, first_col = tile.col * TILE, y = threadIdx.x / SIDE, x = threadIdx.x % SIDE;

    // Brings in the part of one operand, extents from `first` on and k from `at` on. Neighbours read along the matrix's rows.
    auto bring = [&](float (&to)[DEPTH][TILE + 1], const float* matrix, int stride, bool along_k, int first, int extent, int at) {
        for (int i = threadIdx.x; i < TILE * DEPTH; i += SIDE * SIDE) {
            const int e = along_k ? i / DEPTH : i % TILE, d = along_k ? i % DEPTH : i / TILE;
            const bool inside = e < extent - first && d < k - at;
            const long long row = along_k ? first + static_cast<long long>(e) : at + static_cast<long long>(d);
            const long long col = along_k ? at + static_cast<long long>(d) : first + static_cast<long long>(e);
            to[d][e] = inside ? matrix[row * stride + col] : 0.0f;
        }
    };

    float sums[PER_THREAD][PER_THREAD] = {};
    for (int left_of_k = k; left_of_k > 0; left_of_k -= DEPTH) {
        bring(left, a, lda, A_ALONG_K, first_row, m, k - left_of_k);
        bring(right, b, ldb, B_ALONG_K, first_col, n, k - left_of_k);
        __syncthreads();
        float step[PER_THREAD][PER_THREAD] = {};  // summed apart, so that a long k doesn't add small numbers to large ones one by one
#pragma unroll
        for (int d = 0; d < DEPTH; d++) {
#pragma unroll
            for (int i = 0; i < PER_THREAD; i++) {
#pragma unroll
                for (int j = 0; j < PER_THREAD; j++) step[i][j] += left[d][y + i * SIDE] * right[d][x + j * SIDE];
            }
        }
#pragma unroll
        for (int i = 0; i < PER_THREAD; i++) {
#pragma unroll
            for (int j = 0; j < PER_THREAD; j++) sums[i][j] += step[i][j];
        }
        __syncthreads();
    }

#pragma unroll
    for (int i = 0; i < PER_THREAD; i++) {
#pragma unroll
        for (int j = 0; j < PER_THREAD; j++) {
            if (y + i * SIDE >= m - first_row || x + j * SIDE >= n - first_col) continue;
            float* to = c + (static_cast<long long>(first_row) + y + i * SIDE) * ldc + first_col + x + j * SIDE;
            float value = alpha * sums[i][j];
            if (beta != 0.0f) value += beta * *to;
            *to = value;
        }
    }
}

#define KERNEL(name, Out, T, threads, blocks, body)                                                                     \
    extern "C" __global__ void __launch_bounds__(threads, blocks)                                                      \
        name(Out* c, const T* a, const T* b, int m, int n, int k, int lda, int ldb, int ldc, float alpha, float beta) { \
        body(c, a, b, m, n, k, lda, ldb, ldc, alpha, beta);                                                            \
    }
#define SHAPE(name, Out, T, Shape, A_ALONG_K, B_ALONG_K) \
    KERNEL(name, Out, T, Shape::THREADS, Shape::BLOCKS, (multiply<Shape, A_ALONG_K, B_ALONG_K, T, Out>))
#define LAYOUT(name, Out, T, A_ALONG_K, B_ALONG_K)       \
    SHAPE(name, Out, T, Large, A_ALONG_K, B_ALONG_K)     \
    SHAPE(name##_thin, Out, T, Thin, A_ALONG_K, B_ALONG_K)
#define LAYOUTS(types, Out, T)                     \
    LAYOUT(matmul_nt_##types, Out, T, true, true)  \
    LAYOUT(matmul_nn_##types, Out, T, true, false) \
    LAYOUT(matmul_tn_##types, Out, T, false, false)

LAYOUTS(f16_f16, f16, f16)
LAYOUTS(f16_f32, float, f16)
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
LAYOUTS(bf16_bf16, bf16, bf16)
LAYOUTS(bf16_f32, float, bf16)
#endif
KERNEL(matmul_nt_f32_f32, float, float, 256, 1, (multiply_f32<true, true>))
KERNEL(matmul_nn_f32_f32, float, float, 256, 1, (multiply_f32<true, false>))
KERNEL(matmul_tn_f32_f32, float, float, 256, 1, (multiply_f32<false, false>))
