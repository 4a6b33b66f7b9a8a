// The backward of attention for compute capability 9.0, numbers of 16 bits and heads of whole panels; included by
// attention_backward.cu, whose formulas, orders of sums and arguments these are.

#pragma once

#include "attention_hopper.cuh"

namespace hopper {

// Rows of a tile.
constexpr int STEP = 64;
constexpr int STEP_TILES = STEP / 8;
constexpr int STAGES = 4;
using TilesRing = Ring<STAGES>;

// Shared memory, from a multiple of 1024 on: STAGES pairs of tiles; for dk and dv, the block's own k and v; their statistics; the
// ring's barriers.
constexpr int PAIR_BYTES = 2 * TILE_BYTES<STEP>;
constexpr int STATISTICS_BYTES = 2 * STEP * 4;  // of a tile of queries: lse, delta
constexpr int DQ_BYTES = 1024 + STAGES * PAIR_BYTES + TilesRing::BYTES;
constexpr int DKV_BYTES = DQ_BYTES + 2 * TILE_BYTES<OWN> + STAGES * STATISTICS_BYTES;

template <typename T>
__device__ void attention_backward_dq(T* dq, const T* q, const T* k, const T* v, const T* dout, const float* lse,
                                      const float* delta, const int4* blocks, int dq_stride, int q_stride, int kv_stride,
                                      int dout_stride, int heads, int group, float scale, int window, float softcap) {
    DYNAMIC_SHARED(unsigned char, shared);
    const unsigned tiles = aligned_1024(shared_address(shared));  // (STAGES, 2, STEP, D): keys, values
    const TilesRing ring(tiles + STAGES * PAIR_BYTES);

    const int4 block = blocks[blockIdx.y];
    const int position = block.w, head = blockIdx.x;
    const Sight sight(window);
    const int first_key = max(0, position + 1 - sight.limit), keys = position + block.y - first_key;
    const int n = (keys + STEP - 1) / STEP;
    if (is_loader()) {
        give_registers_back<LOADER_REGISTERS>();
        const long long first = block.z + first_key;
        k += first * kv_stride + head / group * D;
        v += first * kv_stride + head / group * D;
        const bool aligned = rows_are_aligned_16(k, kv_stride) && rows_are_aligned_16(v, kv_stride);
        ring.fill(n, aligned, [&](int i, int stage) {
            const unsigned to = tiles + stage * PAIR_BYTES;
            const long long offset = static_cast<long long>(i * STEP) * kv_stride;
            load_tile<STEP>(to, k + offset, keys - i * STEP, kv_stride, aligned);
            load_tile<STEP>(to + TILE_BYTES<STEP>, v + offset, keys - i * STEP, kv_stride, aligned);
        });
        return;
    }
    take_registers<PRODUCT_REGISTERS>();
    const Scores scores(scale, softcap);
    const int own = group_row(), count = block.y - own;  // the group's rows; there may be none
    const long long first = block.x + own;
    const int first_query = position + own, row = row_of_thread();
    const OwnFragments<T> queries(q + first * q_stride + head * D, count, q_stride);
    const OwnFragments<T> douts(dout + first * dout_stride + head * D, count, dout_stride);
    float row_exponent[2] = {}, row_delta[2] = {};
#pragma unroll
    for (int half = 0; half < 2; half++) {
        if (row + 8 * half >= count) break;
        row_exponent[half] = lse[(first + row + 8 * half) * heads + head] * LOG2_E;
        row_delta[half] = delta[(first + row + 8 * half) * heads + head];
    }
    float sum[D / 8][4] = {};  // dq / scale
    ring.drain(n, [&](int i, int stage) {
        const int step_key = first_key + i * STEP;
        if (count <= 0 || sight.sees_none<GROUP_ROWS, STEP>(first_query, step_key)) return;
        const Tile<STEP> k_rows(tiles + stage * PAIR_BYTES), v_rows(tiles + stage * PAIR_BYTES + TILE_BYTES<STEP>);
        const auto delta_of = [&](int i) { return row_delta[i % 4 / 2]; };
        float s[STEP_TILES][4], ds[STEP_TILES][4];
        group_products_begin();
        begin_transposed<T>(s, queries, k_rows);
        group_products_commit();
        begin_transposed<T>(ds, douts, v_rows);
        group_products_commit();
        group_products_wait<1>();
        if (scores.capped) {
            group_products_wait<0>();
            bend_backward<T>(scores, s, ds, delta_of);
        }
        probabilities<T>(
            scores, s, sight.sees_all<GROUP_ROWS, STEP>(first_query, step_key), [&](int i) { return row_exponent[i % 4 / 2]; },
            [&](int i) { return sight.sees(first_query + row + i % 4 / 2 * 8, step_key + column_of(i)); });
        group_products_wait<0>();
#pragma unroll
        for (int i = 0; i < STEP_TILES * 4; i++) {
            float& it = ds[i / 4][i % 4];
            it = s[i / 4][i % 4] * (scores.capped ? it : it - delta_of(i));
        }
        unsigned rounded[STEP_TILES / 2][4];
        round_to_fragments<T>(rounded, ds);
        group_products_begin();
        begin_product<T>(sum, rounded, k_rows);
        group_products_commit();
        group_products_wait<0>();
    });
    store_group(dq + first * dq_stride + head * D, dq_stride, count, sum, {scale, scale});
}

template <typename T>
__device__ void attention_backward_dkv(T* dk, T* dv, const T* q, const T* k, const T* v, const T* dout, const float* lse,
                                       const float* delta, const int4* blocks, int dkv_stride, int q_stride, int kv_stride,
                                       int dout_stride, int heads, int group, float scale, int window, float softcap,
                                       int share) {
    DYNAMIC_SHARED(unsigned char, shared);
    const unsigned tiles = aligned_1024(shared_address(shared));  // (STAGES, 2, STEP, D): queries, their gradients
    const unsigned home = tiles + STAGES * PAIR_BYTES;            // (2, OWN, D): keys, values
    const unsigned statistics = home + 2 * TILE_BYTES<OWN>;       // (STAGES, 2, STEP): lse, delta
    const TilesRing ring(statistics + STAGES * STATISTICS_BYTES);

    const int4 block = blocks[blockIdx.y];
    const int k_row = block.x, first_head = blockIdx.x * share, kv_head = first_head / group;
    const Sight sight(window);
    const int first_key = k_row - block.z, length = block.w - block.z;  // counted in the sequence
    // The first query to see a key stands in the key's own row.
    const int queries = min(length - first_key - (block.y - 1), sight.limit) + block.y - 1;
    const int head_tiles = (queries + STEP - 1) / STEP, n = share * head_tiles;
    if (is_loader()) {
        give_registers_back<LOADER_REGISTERS>();
        k += static_cast<long long>(k_row) * kv_stride + kv_head * D;
        v += static_cast<long long>(k_row) * kv_stride + kv_head * D;
        q += static_cast<long long>(k_row) * q_stride;
        dout += static_cast<long long>(k_row) * dout_stride;
        const int of_tile = threadIdx.x % STEP, kind = threadIdx.x % GROUP / STEP;
        const float* from = (kind == 0 ? lse : delta) + (static_cast<long long>(k_row) + of_tile) * heads;
        const bool aligned = rows_are_aligned_16(k, kv_stride) && rows_are_aligned_16(v, kv_stride) &&
                             rows_are_aligned_16(q, q_stride) && rows_are_aligned_16(dout, dout_stride);
        load_tile<OWN>(home, k, block.y, kv_stride, aligned);
        load_tile<OWN>(home + TILE_BYTES<OWN>, v, block.y, kv_stride, aligned);
        int head = first_head, query = 0;  // of the tile that is loaded next
        ring.fill(n, aligned, [&](int, int stage) {
            const unsigned to = tiles + stage * PAIR_BYTES;
            const long long row = query;
            load_tile<STEP>(to, q + row * q_stride + head * D, queries - query, q_stride, aligned);
            load_tile<STEP>(to + TILE_BYTES<STEP>, dout + row * dout_stride + head * D, queries - query, dout_stride, aligned);
            cp_async_4(statistics + stage * STATISTICS_BYTES + (kind * STEP + of_tile) * 4, from + row * heads + head,
                       query + of_tile < queries);
            query += STEP;
            if (query >= queries) query = 0, head++;
        });
        return;
    }
    take_registers<PRODUCT_REGISTERS>();
    const Scores scores(scale, softcap);
    const int own = group_row(), count = block.y - own;
    const Tile<OWN> keys(home + own * ROW_BYTES), values(home + TILE_BYTES<OWN> + own * ROW_BYTES);
    float dv_sum[D / 8][4] = {}, dk_sum[D / 8][4] = {};  // dv, dk / scale
    int query = 0;                                       // of the tile that is used next
    ring.drain(n, [&](int, int stage) {
        const int ahead = query - own;  // from the group's first key to the tile's first query
        query += STEP;
        if (query >= queries) query = 0;
        if (count <= 0 || sight.sees_none<STEP, GROUP_ROWS>(ahead, 0)) return;
        const Tile<STEP> q_rows(tiles + stage * PAIR_BYTES), dout_rows(tiles + stage * PAIR_BYTES + TILE_BYTES<STEP>);
        const unsigned lse_of = statistics + stage * STATISTICS_BYTES, delta_of = lse_of + STEP * 4;
        const auto delta_at = [&](int i) { return load_shared(delta_of + column_of(i) * 4); };
        float p[STEP_TILES][4], ds[STEP_TILES][4];  // (keys, queries)
        group_products_begin();
        begin_transposed<T>(p, keys, q_rows);
        group_products_commit();
        begin_transposed<T>(ds, values, dout_rows);
        group_products_commit();
        group_products_wait<1>();
        if (scores.capped) {
            group_products_wait<0>();
            bend_backward<T>(scores, p, ds, delta_at);
        }
        // Queries that don't exist are rows of zeros, and so are their lse and delta: they add nothing.
        probabilities<T>(
            scores, p, sight.sees_all<STEP, GROUP_ROWS>(ahead, 0), [&](int i) { return load_shared(lse_of + column_of(i) * 4) * LOG2_E; },
            [&](int i) { return sight.sees(ahead + column_of(i), row_of_thread() + i % 4 / 2 * 8); });
        group_products_wait<0>();
#pragma unroll
        for (int i = 0; i < STEP_TILES * 4; i++) {
            float& it = ds[i / 4][i % 4];
            it = p[i / 4][i % 4] * (scores.capped ? it : it - delta_at(i));
        }
        unsigned rounded_p[STEP_TILES / 2][4], rounded_ds[STEP_TILES / 2][4];
        round_to_fragments<T>(rounded_p, p);
        round_to_fragments<T>(rounded_ds, ds);
        group_products_begin();
        begin_product<T>(dv_sum, rounded_p, dout_rows);
        begin_product<T>(dk_sum, rounded_ds, q_rows);
        group_products_commit();
        group_products_wait<0>();
    });
    const long long first = k_row + own;
    store_group(dv + first * dkv_stride + blockIdx.x * D, dkv_stride, count, dv_sum, {1, 1});
    store_group(dk + first * dkv_stride + blockIdx.x * D, dkv_stride, count, dk_sum, {scale, scale});
}

}  // namespace hopper
