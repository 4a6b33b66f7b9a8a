// compile: HEAD_DIM = 16, 32, 64, 80, 96, 128, 256
// compile: HEAD_DIM = 64, 128 for 90a
//
// Backward of causal attention (attention_forward.cu), the probabilities made again from lse:
//   p = exp(t − lse),  dv = pᵀ·dout,  dt = p·(dout·vᵀ − delta),  delta = dout·out,  ds = dt·(1 − (t/cap)²)
//   dq = scale·ds·k,  dk = scale·dsᵀ·q
// dq goes through the keys of each query, dk and dv through the queries of each key (of all heads that share it, in order), so
// that each sum has one owner and a fixed order. Where that gives too few blocks, each takes `share` of the heads, and
// attention_backward_sum adds up. Dao, "FlashAttention-2" (2023), without its atomic additions to dq.
//   q, out, dout, dq (N, H·D)   k, v, dk, dv (N, K·D)   lse, delta (N, H); dq, dk, dv, delta =

#include "attention.cuh"

// Rows of a tile, and as many of them as a warp has products with in registers at a time.
template <typename T>
constexpr int ROWS = sizeof(T) == 4 ? 16 : D <= 64 ? 64 : D <= 128 ? 32 : 16;
template <typename T>
constexpr int STEP = ROWS<T> < 32 ? ROWS<T> : 32;

// The two operands whose rows a block owns. With wide heads, the registers have no room for both.
template <typename T>
using FirstOwn = RegisterRows<T>;
template <typename T>
using SecondOwn = std::conditional_t<D < 128, RegisterRows<T>, SharedRows<T>>;

// The sums of dk and dv of the widest heads are too many for a warp: half of the warps make dv, the other half dk.
constexpr bool APART = D > 128;
constexpr int DKV_THREADS = APART ? 2 * THREADS : THREADS;

// Blocks that a processor is to hold at a time: more hide more, until registers spill.
constexpr int DQ_BLOCKS = D <= 64 ? 4 : D <= 128 ? 3 : 2;
constexpr int DKV_BLOCKS = D <= 64 ? 3 : D <= 128 ? 2 : 1;

// What a block holds: rows of its own, tiles.
template <typename T>
constexpr int SHARED_BYTES = (SecondOwn<T>::HOME + STAGES * 2 * ROWS<T>) * D * int(sizeof(T));

// The bent scores of raw products in s, if they are capped, and in ds the gradient of what they were bent from, but for the
// probabilities. Element i of a warp's part, i % 4 of column i / 4, has delta(i).
template <typename T, int TILES, typename Delta>
__device__ __forceinline__ void bend_backward(const Scores& scores, float (&s)[TILES][4], float (&ds)[TILES][4], Delta delta) {
#pragma unroll
    for (int i = 0; i < TILES * 4; i++) {
        float& bent = s[i / 4][i % 4];
        bent = bend<T>(bent * scores.inner);
        ds[i / 4][i % 4] = (ds[i / 4][i % 4] - delta(i)) * (1 - bent * bent);
    }
}

// Probabilities of scores, with exponent(i) = lse·log2 e; seen(i) is asked unless all are.
template <typename T, int TILES, typename Exponent, typename Seen>
__device__ __forceinline__ void probabilities(const Scores& scores, float (&s)[TILES][4], bool all, Exponent exponent, Seen seen) {
#pragma unroll
    for (int i = 0; i < TILES * 4; i++) s[i / 4][i % 4] = power_of_two<T>(s[i / 4][i % 4] * scores.factor - exponent(i));
    if (!all) {
#pragma unroll
        for (int i = 0; i < TILES * 4; i++) {
            if (!seen(i)) s[i / 4][i % 4] = 0;
        }
    }
}

// In: raw products in s, those of dout and v in ds. Out: probabilities, and gradients of scale·(q·k).
template <typename T, int TILES, typename Exponent, typename Delta, typename Seen>
__device__ __forceinline__ void score_backward(const Scores& scores, float (&s)[TILES][4], float (&ds)[TILES][4], bool all,
                                               Exponent exponent, Delta delta, Seen seen) {
    if (scores.capped) {
        bend_backward<T>(scores, s, ds, delta);
    } else {
#pragma unroll
        for (int i = 0; i < TILES * 4; i++) ds[i / 4][i % 4] -= delta(i);
    }
    probabilities<T>(scores, s, all, exponent, seen);
#pragma unroll
    for (int i = 0; i < TILES * 4; i++) ds[i / 4][i % 4] *= s[i / 4][i % 4];
}

#if HOPPER
#include "attention_backward_hopper.cuh"
#endif

template <typename T>
__device__ void attention_delta(float* delta, const T* out, const T* dout, int rows, int out_stride, int dout_stride, int heads) {
    const long long i = static_cast<long long>(blockIdx.x) * (THREADS / WARP) + threadIdx.x / WARP;
    if (i >= static_cast<long long>(rows) * heads) return;
    const int lane = threadIdx.x % WARP, row = i / heads, head = i % heads;
    out += static_cast<long long>(row) * out_stride + head * D;
    dout += static_cast<long long>(row) * dout_stride + head * D;
    float sum = 0;
#pragma unroll
    for (int column = lane; column < D; column += WARP) sum += to_f32(out[column]) * to_f32(dout[column]);
    sum = warp_sum(sum);
    if (lane == 0) delta[i] = sum;
}

template <typename T>
__device__ void attention_backward_dq(T* dq, const T* q, const T* k, const T* v, const T* dout, const float* lse,
                                      const float* delta, const int4* blocks, int dq_stride, int q_stride, int kv_stride,
                                      int dout_stride, int heads, int group, float scale, int window, float softcap) {
    DYNAMIC_SHARED(unsigned char, shared);
    constexpr int TILE = ROWS<T> * D;
    T* home = reinterpret_cast<T*>(shared);    // (HOME, D): what the block owns
    T* tiles = home + SecondOwn<T>::HOME * D;  // (STAGES, 2, ROWS, D): keys, values

    const int4 block = blocks[blockIdx.y];
    const int q_row = block.x, count = block.y, k_row = block.z, position = block.w;
    const int head = blockIdx.x;
    q += static_cast<long long>(q_row) * q_stride + head * D;
    dout += static_cast<long long>(q_row) * dout_stride + head * D;
    k += static_cast<long long>(k_row) * kv_stride + head / group * D;
    v += static_cast<long long>(k_row) * kv_stride + head / group * D;
    const Sight sight(window);
    const Scores scores(scale, softcap);
    const bool aligned = rows_are_aligned_16(k, kv_stride) && rows_are_aligned_16(v, kv_stride);
    const LanePlaces<T> places;
    const int lane = threadIdx.x % WARP, warp_row = first_row_of_warp();
    const int first_query = position + warp_row;  // of the warp, counted in the sequence

    FirstOwn<T> douts;
    douts.take(home, dout, count, dout_stride, places);
    SecondOwn<T> queries;
    queries.take(home, q, count, q_stride, places);
    float row_exponent[2] = {}, row_delta[2] = {};
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const int row = warp_row + lane / 4 + 8 * half;
        if (row >= count) break;
        row_exponent[half] = lse[static_cast<long long>(q_row + row) * heads + head] * LOG2_E;
        row_delta[half] = delta[static_cast<long long>(q_row + row) * heads + head];
    }
    float sum[D / 8][4] = {};  // dq / scale

    const int first_key = max(0, position + 1 - sight.limit), keys = position + count - first_key;
    const auto load = [&](int i, int stage) {
        const int key = i * ROWS<T>;
        const long long offset = static_cast<long long>(first_key + key) * kv_stride;
        load_rows<ROWS<T>>(tiles + 2 * stage * TILE, k + offset, keys - key, kv_stride, aligned);
        load_rows<ROWS<T>>(tiles + (2 * stage + 1) * TILE, v + offset, keys - key, kv_stride, aligned);
    };
    for_tiles((keys + ROWS<T> - 1) / ROWS<T>, load, [&](int i, int stage) {
        if (warp_row >= count) return;
        for (int step = 0; step < ROWS<T>; step += STEP<T>) {
            const T* k_rows = tiles + 2 * stage * TILE + step * D;
            const int step_key = first_key + i * ROWS<T> + step;
            if (sight.sees_none<WARP_ROWS, STEP<T>>(first_query, step_key)) continue;

            float s[STEP<T> / 8][4] = {}, ds[STEP<T> / 8][4] = {};
            add_product_transposed(s, queries, k_rows, places);
            add_product_transposed(ds, douts, k_rows + TILE, places);
            score_backward<T>(
                scores, s, ds, sight.sees_all<WARP_ROWS, STEP<T>>(first_query, step_key),
                [&](int i) { return row_exponent[i % 4 / 2]; }, [&](int i) { return row_delta[i % 4 / 2]; },
                [&](int i) {
                    const int query = first_query + lane / 4 + i % 4 / 2 * 8, key = step_key + i / 4 * 8 + lane % 4 * 2 + i % 2;
                    return sight.sees(query, key);
                });
            add_product(sum, ds, k_rows, places);
        }
    });
    store_rows(home, dq + static_cast<long long>(q_row) * dq_stride + head * D, dq_stride, count, sum, {scale, scale});
}

template <typename T>
__device__ void attention_backward_dkv(T* dk, T* dv, const T* q, const T* k, const T* v, const T* dout, const float* lse,
                                       const float* delta, const int4* blocks, int dkv_stride, int q_stride, int kv_stride,
                                       int dout_stride, int heads, int group, float scale, int window, float softcap,
                                       int share) {
    DYNAMIC_SHARED(unsigned char, shared);
    constexpr int TILE = ROWS<T> * D;
    T* home = reinterpret_cast<T*>(shared);                                   // (HOME, D): what the block owns
    T* tiles = home + SecondOwn<T>::HOME * D;                                 // (STAGES, 2, ROWS, D): queries, dout
    float* statistics = reinterpret_cast<float*>(tiles + STAGES * 2 * TILE);  // (STAGES, 2, ROWS): lse, delta

    const int4 block = blocks[blockIdx.y];
    const int k_row = block.x, count = block.y;
    const int first_key = k_row - block.z, length = block.w - block.z;  // counted in the sequence
    const int first_head = blockIdx.x * share, kv_head = first_head / group;
    k += static_cast<long long>(k_row) * kv_stride + kv_head * D;
    v += static_cast<long long>(k_row) * kv_stride + kv_head * D;
    dk += static_cast<long long>(k_row) * dkv_stride + blockIdx.x * D;
    dv += static_cast<long long>(k_row) * dkv_stride + blockIdx.x * D;
    // The first query to see a key stands in the key's own row.
    q += static_cast<long long>(k_row) * q_stride;
    dout += static_cast<long long>(k_row) * dout_stride;
    lse += static_cast<long long>(k_row) * heads;
    delta += static_cast<long long>(k_row) * heads;
    const Sight sight(window);
    const Scores scores(scale, softcap);
    const bool aligned = rows_are_aligned_16(q, q_stride) && rows_are_aligned_16(dout, dout_stride);
    const LanePlaces<T> places;
    const int lane = threadIdx.x % WARP, warp_row = first_row_of_warp();
    const bool makes_dk = !APART || threadIdx.x >= THREADS;

    FirstOwn<T> keys;
    keys.template take<DKV_THREADS>(home, k, count, kv_stride, places);
    SecondOwn<T> values;
    values.template take<DKV_THREADS>(home, v, count, kv_stride, places);
    float dv_sum[D / 8][4] = {}, dk_sum[D / 8][4] = {};  // dv, dk / scale; if they are apart, the first is either

    const int queries = min(length - first_key - (count - 1), sight.limit) + count - 1;
    const int head_tiles = (queries + ROWS<T> - 1) / ROWS<T>;
    int load_head = first_head, load_query = 0, query = 0;  // of the tile that is loaded next, and of the one used next
    const auto load = [&](int, int stage) {
        const T* q_from = q + static_cast<long long>(load_query) * q_stride + load_head * D;
        const T* dout_from = dout + static_cast<long long>(load_query) * dout_stride + load_head * D;
        load_rows<ROWS<T>, DKV_THREADS>(tiles + 2 * stage * TILE, q_from, queries - load_query, q_stride, aligned);
        load_rows<ROWS<T>, DKV_THREADS>(tiles + (2 * stage + 1) * TILE, dout_from, queries - load_query, dout_stride, aligned);
        const int row = threadIdx.x % ROWS<T>, kind = threadIdx.x / ROWS<T>;
        if (kind < 2) {
            const float* from = (kind == 0 ? lse : delta) + static_cast<long long>(load_query + row) * heads + load_head;
            cp_async_4(shared_address(statistics + (2 * stage + kind) * ROWS<T> + row), from, load_query + row < queries);
        }
        load_query += ROWS<T>;
        if (load_query >= queries) load_query = 0, load_head++;
    };
    for_tiles(share * head_tiles, load, [&](int, int stage) {
        for (int step = 0; step < ROWS<T> && query + step < queries; step += STEP<T>) {
            const T* q_rows = tiles + 2 * stage * TILE + step * D;
            const T* dout_rows = q_rows + TILE;
            const float* lse_of = statistics + 2 * stage * ROWS<T> + step + lane % 4 * 2;
            const float* delta_of = lse_of + ROWS<T>;
            const int ahead = query + step - warp_row;  // from the warp's first key to the step's first query
            if (warp_row >= count || sight.sees_none<STEP<T>, WARP_ROWS>(ahead, 0)) continue;

            float p[STEP<T> / 8][4] = {}, ds[STEP<T> / 8][4] = {};  // (keys, queries)
            add_product_transposed(p, keys, q_rows, places);
            if (makes_dk) add_product_transposed(ds, values, dout_rows, places);
            // Queries that don't exist are rows of zeros, and so are their lse and delta: they add nothing.
            score_backward<T>(
                scores, p, ds, sight.sees_all<STEP<T>, WARP_ROWS>(ahead, 0),
                [&](int i) { return lse_of[i / 4 * 8 + i % 2] * LOG2_E; }, [&](int i) { return delta_of[i / 4 * 8 + i % 2]; },
                [&](int i) {
                    const int key = lane / 4 + i % 4 / 2 * 8, after = ahead + i / 4 * 8 + lane % 4 * 2 + i % 2;
                    return sight.sees(after, key);
                });
            if constexpr (APART) {
#pragma unroll
                for (int i = 0; i < STEP<T> / 2; i++) p[i / 4][i % 4] = makes_dk ? ds[i / 4][i % 4] : p[i / 4][i % 4];
                add_product(dv_sum, p, makes_dk ? q_rows : dout_rows, places);
            } else {
                add_product(dv_sum, p, dout_rows, places);
                add_product(dk_sum, ds, q_rows, places);
            }
        }
        query += ROWS<T>;
        if (query >= queries) query = 0;
    });
    if constexpr (APART) {
        const float factor = makes_dk ? scale : 1;
        store_rows(home, makes_dk ? dk : dv, dkv_stride, count, dv_sum, {factor, factor});
    } else {
        store_rows(home, dv, dkv_stride, count, dv_sum, {1, 1});
        store_rows(home, dk, dkv_stride, count, dk_sum, {scale, scale});
    }
}

// THREADS threads; grid.x = ⌈rows·H / (THREADS / 32)⌉, a warp for each head of a row; no dynamic shared memory.
#define DEFINE_DELTA(name, T)                                                                                                \
    extern "C" __device__ int attention_delta_##name##_launch[3] = {THREADS / WARP, THREADS, 0};                             \
    extern "C" __global__ void __launch_bounds__(THREADS) attention_delta_##name(                                            \
        float* delta, const T* out, const T* dout, int rows, int out_stride, int dout_stride, int heads) {                   \
        attention_delta<T>(delta, out, dout, rows, out_stride, dout_stride, heads);                                          \
    }
FOR_NUMBER_TYPES(DEFINE_DELTA)

// blocks as in the forward; grid.x = H, grid.y = blocks, the longest first.
#define DQ(name, T, rows, threads, shared, resident, run)                                                                    \
    extern "C" __device__ int attention_backward_dq_##name##_launch[3] = {rows, threads, shared};                            \
    extern "C" __global__ void __launch_bounds__(threads, resident) attention_backward_dq_##name(                            \
        T* dq, const T* q, const T* k, const T* v, const T* dout, const float* lse, const float* delta, const int4* blocks,  \
        int dq_stride, int q_stride, int kv_stride, int dout_stride, int heads, int group, float scale, int window,          \
        float softcap) {                                                                                                     \
        run(dq, q, k, v, dout, lse, delta, blocks, dq_stride, q_stride, kv_stride, dout_stride, heads, group, scale, window, \
            softcap);                                                                                                        \
    }
#define DQ_BY_WARPS(name, T) DQ(name, T, BLOCK, THREADS, SHARED_BYTES<T>, DQ_BLOCKS, attention_backward_dq<T>)
#define DQ_BY_GROUPS(name, T) DQ(name, T, hopper::OWN, hopper::THREADS, hopper::DQ_BYTES, 1, hopper::attention_backward_dq<T>)
FOR_TYPES(DQ_BY_WARPS, DQ_BY_GROUPS)

// blocks: {first row of k, keys (1 to rows), first row of their sequence, the row after its last}; q and k have the same rows.
// dk and dv (N, H/share·D), grid.x = H/share, grid.y = blocks, the longest first.
#define DKV(name, T, rows, threads, shared, resident, run)                                                                   \
    extern "C" __device__ int attention_backward_dkv_##name##_launch[3] = {rows, threads, shared};                           \
    extern "C" __global__ void __launch_bounds__(threads, resident) attention_backward_dkv_##name(                           \
        T* dk, T* dv, const T* q, const T* k, const T* v, const T* dout, const float* lse, const float* delta,               \
        const int4* blocks, int dkv_stride, int q_stride, int kv_stride, int dout_stride, int heads, int group, float scale, \
        int window, float softcap, int share) {                                                                              \
        run(dk, dv, q, k, v, dout, lse, delta, blocks, dkv_stride, q_stride, kv_stride, dout_stride, heads, group, scale,    \
            window, softcap, share);                                                                                         \
    }
#define DKV_BY_WARPS(name, T)                                                                                     \
    DKV(name, T, BLOCK, DKV_THREADS, SHARED_BYTES<T> + STAGES * 2 * ROWS<T> * 4, DKV_BLOCKS, attention_backward_dkv<T>)
#define DKV_BY_GROUPS(name, T) DKV(name, T, hopper::OWN, hopper::THREADS, hopper::DKV_BYTES, 1, hopper::attention_backward_dkv<T>)
FOR_TYPES(DKV_BY_WARPS, DKV_BY_GROUPS)

// dk =, dv = the sums over `parts` neighbouring heads of dk_parts and dv_parts (N, parts·cols).
template <typename T>
__device__ void attention_backward_sum(T* sum, const T* parts, int rows, int cols, int stride, int count) {
    const auto add = [&](auto width) {
        constexpr int WIDTH = decltype(width)::value;
        for_each_run<WIDTH>(rows, cols, [&](int row, int column) {
            const T* from = parts + (static_cast<long long>(row) * cols + column / D * D) * count + column % D;
            float values[WIDTH] = {};
            for (int part = 0; part < count; part++) {
                const Run<T, WIDTH> run = load_run<WIDTH>(from + part * D);
                for (int i = 0; i < WIDTH; i++) values[i] += run[i];
            }
            store_run(sum + static_cast<long long>(row) * stride + column, values);
        });
    };
    if (rows_are_aligned_16(sum, stride)) add(std::integral_constant<int, Pack<T>::SIZE>());
    else add(std::integral_constant<int, 1>());
}

// THREADS threads; grid.x counts 1024 numbers of dk a block (any grid is right), grid.y = 2; no dynamic shared memory.
#define DEFINE_SUM(name, T)                                                                                                  \
    extern "C" __device__ int attention_backward_sum_##name##_launch[3] = {1024, THREADS, 0};                                \
    extern "C" __global__ void __launch_bounds__(THREADS) attention_backward_sum_##name(                                     \
        T* dk, T* dv, const T* dk_parts, const T* dv_parts, int rows, int cols, int stride, int parts) {                     \
        const bool first = blockIdx.y == 0;                                                                                  \
        attention_backward_sum(first ? dk : dv, first ? dk_parts : dv_parts, rows, cols, stride, parts);                     \
    }
FOR_NUMBER_TYPES(DEFINE_SUM)
