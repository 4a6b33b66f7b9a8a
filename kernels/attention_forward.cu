// compile: HEAD_DIM = 16, 32, 64, 80, 96, 128, 256
//
// Causal attention over packed sequences with grouped queries, never holding a sequence's scores:
//   s = q·kᵀ·scale,  t = cap·tanh(s/cap) if capped,  p = exp(t − lse),  out = p·v,  lse = log Σ exp(t)
// A query sees its own key and those before it; with a window only the last `window` of these.
// The softmax goes along as keys come, rescaling what it has: Dao et al., "FlashAttention" (2022) and "FlashAttention-2" (2023).
//   q, out (N, H·D) =   k, v (N, K·D)   lse (N, H) =
// Backward: attention_backward.cu.

#include "attention.cuh"

// Keys of a tile.
template <typename T>
constexpr int KEYS = sizeof(T) == 4 ? 16 : D <= 128 ? 64 : 32;

// Blocks that a processor is to hold at a time: more hide more, until registers spill.
constexpr int FORWARD_BLOCKS = D <= 64 ? 4 : D <= 128 ? 3 : 2;

template <typename T>
__device__ void attention_forward(T* out, float* lse, const T* q, const T* k, const T* v, const int4* blocks, int out_stride,
                                  int q_stride, int kv_stride, int heads, int group, float scale, int window, float softcap) {
    DYNAMIC_SHARED(unsigned char, shared);
    constexpr int TILE = KEYS<T> * D;
    T* tiles = reinterpret_cast<T*>(shared);  // (STAGES, 2, KEYS, D): keys, values

    const int4 block = blocks[blockIdx.x];
    const int q_row = block.x, count = block.y, k_row = block.z, position = block.w;
    const int head = blockIdx.y;
    q += static_cast<long long>(q_row) * q_stride + head * D;
    k += static_cast<long long>(k_row) * kv_stride + head / group * D;
    v += static_cast<long long>(k_row) * kv_stride + head / group * D;
    const Sight sight(window);
    const Scores scores(scale, softcap);
    const bool aligned = rows_are_aligned_16(k, kv_stride) && rows_are_aligned_16(v, kv_stride);
    const LanePlaces<T> places;
    const int lane = threadIdx.x % WARP, warp_row = first_row_of_warp();
    const int first_query = position + warp_row;  // of the warp, counted in the sequence

    RegisterRows<T> queries;
    queries.take(tiles, q, count, q_stride, places);
    float o[D / 8][4] = {};
    float top[2] = {-INFINITY, -INFINITY};  // the largest exponent so far, of rows g and g+8
    float sum[2] = {0, 0};                  // of the powers in this lane's columns

    const int first_key = max(0, position + 1 - sight.limit), keys = position + count - first_key;
    const auto load = [&](int i, int stage) {
        const int key = i * KEYS<T>;
        const long long offset = static_cast<long long>(first_key + key) * kv_stride;
        load_rows<KEYS<T>>(tiles + (2 * stage) * TILE, k + offset, keys - key, kv_stride, aligned);
        load_rows<KEYS<T>>(tiles + (2 * stage + 1) * TILE, v + offset, keys - key, kv_stride, aligned);
    };
    for_tiles((keys + KEYS<T> - 1) / KEYS<T>, load, [&](int i, int stage) {
        const int tile_key = first_key + i * KEYS<T>;
        if (warp_row >= count || sight.sees_none<WARP_ROWS, KEYS<T>>(first_query, tile_key)) return;

        float s[KEYS<T> / 8][4] = {};
        add_product_transposed(s, queries, tiles + 2 * stage * TILE, places);
        if (scores.capped) {
#pragma unroll
            for (int i = 0; i < KEYS<T> / 2; i++) s[i / 4][i % 4] = bend<T>(s[i / 4][i % 4] * scores.inner);
        }
        if (!sight.sees_all<WARP_ROWS, KEYS<T>>(first_query, tile_key)) {
#pragma unroll
            for (int i = 0; i < KEYS<T> / 2; i++) {
                const int query = first_query + lane / 4 + i % 4 / 2 * 8, key = tile_key + i / 4 * 8 + lane % 4 * 2 + i % 2;
                if (!sight.sees(query, key)) s[i / 4][i % 4] = -INFINITY;
            }
        }
        float tile_top[2] = {-INFINITY, -INFINITY};
#pragma unroll
        for (int i = 0; i < KEYS<T> / 2; i++) tile_top[i % 4 / 2] = fmaxf(tile_top[i % 4 / 2], s[i / 4][i % 4]);
        float shift[2], rescale[2];
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const float new_top = fmaxf(top[half], warp_max<4>(tile_top[half]) * scores.factor);
            shift[half] = new_top == -INFINITY ? 0 : new_top;  // nothing seen yet: −∞ − 0, not −∞ − −∞
            rescale[half] = power_of_two<T>(top[half] - shift[half]);
            top[half] = new_top;
            sum[half] *= rescale[half];
        }
        if (!__all_sync(FULL_WARP, rescale[0] == 1 && rescale[1] == 1)) {
#pragma unroll
            for (int i = 0; i < D / 2; i++) o[i / 4][i % 4] *= rescale[i % 4 / 2];
        }
#pragma unroll
        for (int i = 0; i < KEYS<T> / 2; i++) {
            float& p = s[i / 4][i % 4];
            p = power_of_two<T>(p * scores.factor - shift[i % 4 / 2]);
            sum[i % 4 / 2] += p;
        }
        add_product(o, s, tiles + (2 * stage + 1) * TILE, places);
    });

    float inverse[2];
#pragma unroll
    for (int half = 0; half < 2; half++) {
        sum[half] = warp_sum<4>(sum[half]);
        inverse[half] = 1 / sum[half];
        const int row = warp_row + lane / 4 + 8 * half;
        if (lane % 4 == 0 && row < count) {
            lse[static_cast<long long>(q_row + row) * heads + head] = (top[half] + log2f(sum[half])) / LOG2_E;
        }
    }
    store_rows(tiles, out + static_cast<long long>(q_row) * out_stride + head * D, out_stride, count, o, inverse);
}

// blocks: {first row of q, queries (1 to BLOCK), row of k where their sequence begins, position of the first query in it}.
// THREADS threads; grid.x = blocks, grid.y = H; dynamic shared memory: STAGES·2·KEYS·D·sizeof(T) bytes.
#define DEFINE(name, T)                                                                                                      \
    extern "C" __device__ int attention_forward_##name##_launch[3] = {BLOCK, THREADS, int(STAGES * 2 * KEYS<T> * D * sizeof(T))}; \
    extern "C" __global__ void __launch_bounds__(THREADS, FORWARD_BLOCKS) attention_forward_##name(                          \
        T* out, float* lse, const T* q, const T* k, const T* v, const int4* blocks, int out_stride, int q_stride,            \
        int kv_stride, int heads, int group, float scale, int window, float softcap) {                                       \
        attention_forward<T>(out, lse, q, k, v, blocks, out_stride, q_stride, kv_stride, heads, group, scale, window, softcap); \
    }
FOR_NUMBER_TYPES(DEFINE)
