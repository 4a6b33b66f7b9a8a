// compile: HEAD_DIM = 16, 32, 64, 80, 96, 128, 256
// compile: HEAD_DIM = 64, 128 for 90a
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

    const int4 block = blocks[blockIdx.y];
    const int q_row = block.x, count = block.y, k_row = block.z, position = block.w;
    const int head = blockIdx.x;
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
    RunningSoftmax softmax;

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
        float rescale[2];
        softmax.take<T>(
            scores, s, sight.sees_all<WARP_ROWS, KEYS<T>>(first_query, tile_key), rescale, [&](int i) {
                return sight.sees(first_query + lane / 4 + i % 4 / 2 * 8, tile_key + i / 4 * 8 + lane % 4 * 2 + i % 2);
            });
        if (!__all_sync(FULL_WARP, rescale[0] == 1 && rescale[1] == 1)) {
#pragma unroll
            for (int i = 0; i < D / 2; i++) o[i / 4][i % 4] *= rescale[i % 4 / 2];
        }
        add_product(o, s, tiles + (2 * stage + 1) * TILE, places);
    });

    float inverse[2], row_lse[2];
    softmax.finish(inverse, row_lse);
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const int row = warp_row + lane / 4 + 8 * half;
        if (lane % 4 == 0 && row < count) lse[static_cast<long long>(q_row + row) * heads + head] = row_lse[half];
    }
    store_rows(tiles, out + static_cast<long long>(q_row) * out_stride + head * D, out_stride, count, o, inverse);
}

#if HOPPER
#include "attention_forward_hopper.cuh"
#endif

// blocks: {first row of q, queries (1 to rows), row of k where their sequence begins, position of the first query in it}.
// grid.x = H, grid.y = blocks, the longest first.
#define KERNEL(name, T, rows, threads, shared, resident, run)                                                                \
    extern "C" __device__ int attention_forward_##name##_launch[3] = {rows, threads, int(shared)};                           \
    extern "C" __global__ void __launch_bounds__(threads, resident) attention_forward_##name(                                \
        T* out, float* lse, const T* q, const T* k, const T* v, const int4* blocks, int out_stride, int q_stride,            \
        int kv_stride, int heads, int group, float scale, int window, float softcap) {                                       \
        run(out, lse, q, k, v, blocks, out_stride, q_stride, kv_stride, heads, group, scale, window, softcap);               \
    }
#define BY_WARPS(name, T) \
    KERNEL(name, T, BLOCK, THREADS, STAGES * 2 * KEYS<T> * D * sizeof(T), FORWARD_BLOCKS, attention_forward<T>)
#define BY_GROUPS(name, T) KERNEL(name, T, hopper::OWN, hopper::THREADS, hopper::FORWARD_BYTES, 1, hopper::attention_forward<T>)
FOR_TYPES(BY_WARPS, BY_GROUPS)
