// The forward of attention for compute capability 9.0, numbers of 16 bits and heads of whole panels; included by
// attention_forward.cu, whose formulas and arguments these are.

#pragma once

#include "attention_hopper.cuh"

namespace hopper {

// Keys of a tile.
constexpr int TILE_KEYS = 128;
constexpr int STAGES = 3;

// Shared memory, from a multiple of 1024 on: STAGES pairs of tiles, the ring's barriers.
constexpr int PAIR_BYTES = 2 * TILE_BYTES<TILE_KEYS>;
constexpr int FORWARD_BYTES = 1024 + STAGES * PAIR_BYTES + Ring<STAGES>::BYTES;

template <typename T>
__device__ void attention_forward(T* out, float* lse, const T* q, const T* k, const T* v, const int4* blocks, int out_stride,
                                  int q_stride, int kv_stride, int heads, int group, float scale, int window, float softcap) {
    DYNAMIC_SHARED(unsigned char, shared);
    const unsigned tiles = aligned_1024(shared_address(shared));  // (STAGES, 2, TILE_KEYS, D): keys, values
    const Ring<STAGES> ring(tiles + STAGES * PAIR_BYTES);

    const int4 block = blocks[blockIdx.y];
    const int position = block.w, head = blockIdx.x;
    const Sight sight(window);
    const int first_key = max(0, position + 1 - sight.limit), keys = position + block.y - first_key;
    const int n = (keys + TILE_KEYS - 1) / TILE_KEYS;
    if (is_loader()) {
        give_registers_back<LOADER_REGISTERS>();
        const long long first = block.z + first_key;
        k += first * kv_stride + head / group * D;
        v += first * kv_stride + head / group * D;
        const bool aligned = rows_are_aligned_16(k, kv_stride) && rows_are_aligned_16(v, kv_stride);
        ring.fill(n, aligned, [&](int i, int stage) {
            const unsigned to = tiles + stage * PAIR_BYTES;
            const long long offset = static_cast<long long>(i * TILE_KEYS) * kv_stride;
            load_tile<TILE_KEYS>(to, k + offset, keys - i * TILE_KEYS, kv_stride, aligned);
            load_tile<TILE_KEYS>(to + TILE_BYTES<TILE_KEYS>, v + offset, keys - i * TILE_KEYS, kv_stride, aligned);
        });
        return;
    }
    take_registers<PRODUCT_REGISTERS>();
    const Scores scores(scale, softcap);
    const int own = group_row(), count = block.y - own;  // the group's rows; there may be none
    const long long first = block.x + own;
    const int first_query = position + own, row = row_of_thread();
    const OwnFragments<T> queries(q + first * q_stride + head * D, count, q_stride);
    RunningSoftmax softmax;
    float o[D / 8][4] = {};
    unsigned rounded[TILE_KEYS / 16][4];  // powers of the tile before, whose product with its values is still to come

    // The powers of a tile are made while the product of the one before goes on.
    const auto visible = [&](int i) {
        return count > 0 && !sight.sees_none<GROUP_ROWS, TILE_KEYS>(first_query, first_key + i * TILE_KEYS);
    };
    const auto keys_of = [&](int i) { return Tile<TILE_KEYS>(tiles + i % STAGES * PAIR_BYTES); };
    const auto values_of = [&](int i) { return Tile<TILE_KEYS>(tiles + i % STAGES * PAIR_BYTES + TILE_BYTES<TILE_KEYS>); };
    const auto soften = [&](int i, float (&s)[TILE_KEYS / 8][4], float (&rescale)[2]) {
        const int tile_key = first_key + i * TILE_KEYS;
        softmax.take<T>(
            scores, s, sight.sees_all<GROUP_ROWS, TILE_KEYS>(first_query, tile_key), rescale,
            [&](int i) { return sight.sees(first_query + row + i % 4 / 2 * 8, tile_key + column_of(i)); });
    };
    int i = 0;
    for (; i < n && !visible(i); i++) {
        ring.wait(i);
        ring.release(i);
    }
    const bool any = i < n;
    if (any) {
        float s[TILE_KEYS / 8][4], rescale[2];
        ring.wait(i);
        group_products_begin();
        begin_transposed<T>(s, queries, keys_of(i));
        group_products_commit();
        group_products_wait<0>();
        soften(i, s, rescale);
        round_to_fragments<T>(rounded, s);
        for (i++; i < n && visible(i); i++) {
            ring.wait(i);
            group_products_begin();
            begin_transposed<T>(s, queries, keys_of(i));
            group_products_commit();
            begin_product<T>(o, rounded, values_of(i - 1));
            group_products_commit();
            group_products_wait<1>();
            soften(i, s, rescale);
            group_products_wait<0>();
            ring.release(i - 1);
#pragma unroll
            for (int i = 0; i < D / 2; i++) o[i / 4][i % 4] *= rescale[i % 4 / 2];
            round_to_fragments<T>(rounded, s);
        }
        group_products_begin();
        begin_product<T>(o, rounded, values_of(i - 1));
        group_products_commit();
        group_products_wait<0>();
        ring.release(i - 1);
    }
    for (; i < n; i++) {
        ring.wait(i);
        ring.release(i);
    }

    float inverse[2], row_lse[2];
    softmax.finish(inverse, row_lse);
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const bool mine = threadIdx.x % 4 == 0 && row + 8 * half < count;
        if (mine) lse[(first + row + 8 * half) * heads + head] = row_lse[half];
    }
    store_group(out + first * out_stride + head * D, out_stride, count, o, inverse);
}

}  // namespace hopper
