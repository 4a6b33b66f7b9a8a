// compile: HEAD_DIM = 16, 32, 64, 80, 96, 128, 256
//
// Attention of one further token to all before it, whose keys and values join the cache (formulas: attention_forward.cu):
//   qkv  // ((H + 2K)·D): the token's q, k and v, turned already
//   position  // (1): the token's, on the device, so that a recorded launch serves every token
//   keys, values  // (capacity, K·D): rows 0 … position−1 are read (the last `window` with a window), row `position` =
//   out  // (H·D) =
//   partial  // (H, grid.x, D + 2), scratch;   arrived  // (K), zeros before and after
// A block has some of the keys for all heads of a group; the last block of a group that is done adds up what the others left, in
// their order: the same bits whichever it is (Dao et al. 2023, "Flash-Decoding").
//
// Launch: THREADS threads; grid.x = ⌈capacity / keys_per_block⌉ (blocks beyond the last key do nothing), grid.y = K; dynamic shared
// memory: that of the launch facts for the tiles, and group·(2·D + KEYS + 3)·4 bytes.

#include "common.cuh"

constexpr int D = HEAD_DIM;
constexpr int THREADS = 128;

// Keys of a tile. Loops over it stay loops: each is gone through a few times only, and instructions have to be fetched too.
template <typename T>
constexpr int KEYS = sizeof(T) * D <= 512 ? 32 : 16;

// Packs of a key, the lanes that share it (a power of two, some of which may idle), and the packs of each.
template <typename T>
constexpr int PACKS = D / Pack<T>::SIZE;
template <typename T>
constexpr int LANES = PACKS<T> <= 2 ? 2 : PACKS<T> <= 4 ? 4 : PACKS<T> <= 8 ? 8 : PACKS<T> <= 16 ? 16 : 32;
template <typename T>
constexpr int EACH = (PACKS<T> + LANES<T> - 1) / LANES<T>;

template <typename T>
__device__ void attention_decoding(T* out, float* partial, unsigned* arrived, T* keys, T* values, const T* qkv, int position,
                                   int window, int keys_per_block, int heads, int group, float scale, float softcap) {
    DYNAMIC_SHARED(unsigned char, shared);
    const int first_key = window > 0 ? max(0, position + 1 - window) : 0;
    const unsigned blocks = (position - first_key) / keys_per_block + 1;  // that have keys
    if (blockIdx.x >= blocks) return;
    constexpr int SIZE = Pack<T>::SIZE, TEAMS = THREADS / LANES<T>, TILE = KEYS<T>;
    const int kv_heads = heads / group, kv_head = blockIdx.y, stride = kv_heads * D, outputs = group * D;
    T* k_tile = reinterpret_cast<T*>(shared);               // (TILE, D)
    T* v_tile = k_tile + TILE * D;                          // (TILE, D)
    float* q = reinterpret_cast<float*>(v_tile + TILE * D); // (group, D)
    float* o = q + outputs;                                 // (group, D): sums so far
    float* p = o + outputs;                                 // (group, TILE): scores, then powers
    float* top = p + group * TILE;                          // (group): the largest score so far
    float* sum = top + group;                               // (group): of the powers
    float* rescale = sum + group;                           // (group)

    const T* k_new = qkv + (heads + kv_head) * D;
    const T* v_new = k_new + stride;
    keys += kv_head * D;
    values += kv_head * D;
    for (int i = threadIdx.x; i < outputs; i += THREADS) {
        q[i] = to_f32(qkv[kv_head * outputs + i]);
        o[i] = 0;
    }
    for (int i = threadIdx.x; i < group; i += THREADS) {
        top[i] = -INFINITY;
        sum[i] = 0;
    }

    const int begin = first_key + blockIdx.x * keys_per_block, end = min(begin + keys_per_block, position + 1);
    const int team = threadIdx.x / LANES<T>, member = threadIdx.x % LANES<T>;
    for (int first = begin; first < end; first += TILE) {
        __syncthreads();  // q is there; the tile before has been used
#pragma unroll 4
        for (int i = threadIdx.x; i < TILE * PACKS<T>; i += THREADS) {
            const int key = first + i / PACKS<T>, offset = i % PACKS<T> * SIZE;
            const bool is_new = key == position;
            const long long at = static_cast<long long>(key) * stride + offset;
            cp_async_16(shared_address(k_tile + i * SIZE), is_new ? k_new + offset : keys + at, key < end);
            cp_async_16(shared_address(v_tile + i * SIZE), is_new ? v_new + offset : values + at, key < end);
        }
        cp_async_commit();
        cp_async_wait<0>();
        __syncthreads();
        if (position < first + TILE && threadIdx.x < PACKS<T> && end == position + 1) {  // the token's own
            const long long at = static_cast<long long>(position) * stride + threadIdx.x * SIZE;
            const int from = (position - first) * D + threadIdx.x * SIZE;
            store_pack(keys + at, load_pack(k_tile + from));
            store_pack(values + at, load_pack(v_tile + from));
        }
#pragma unroll 1
        for (int i = team; i < TILE; i += TEAMS) {
#pragma unroll 1
            for (int head = 0; head < group; head++) {
                float dot = 0;
#pragma unroll
                for (int n = 0; n < EACH<T>; n++) {
                    const int pack = member + n * LANES<T>;
                    if (pack >= PACKS<T>) continue;
                    const Pack<T> k = load_pack(k_tile + i * D + pack * SIZE);
                    const float* of_head = q + head * D + pack * SIZE;
#pragma unroll
                    for (int c = 0; c < SIZE; c++) dot += to_f32(k[c]) * of_head[c];
                }
                dot = warp_sum<LANES<T>>(dot) * scale;
                if (softcap > 0) dot = softcap * tanhf(dot / softcap);
                if (member == 0) p[head * TILE + i] = first + i < end ? dot : -INFINITY;
            }
        }
        __syncthreads();
        for (int head = threadIdx.x / WARP; head < group; head += THREADS / WARP) {
            float largest = top[head];
            for (int i = threadIdx.x % WARP; i < TILE; i += WARP) largest = fmaxf(largest, p[head * TILE + i]);
            largest = warp_max(largest);
            float powers = 0;
            for (int i = threadIdx.x % WARP; i < TILE; i += WARP) {
                float& power = p[head * TILE + i];
                power = exp_approximate(power - largest);
                powers += power;
            }
            powers = warp_sum(powers);
            if (threadIdx.x % WARP == 0) {
                rescale[head] = exp_approximate(top[head] - largest);
                sum[head] = sum[head] * rescale[head] + powers;
                top[head] = largest;
            }
        }
        __syncthreads();
        const int count = min(TILE, end - first);
        for (int i = threadIdx.x; i < outputs; i += THREADS) {
            const int head = i / D, channel = i % D;
            float value = o[i] * rescale[head];
#pragma unroll 8
            for (int key = 0; key < count; key++) value += p[head * TILE + key] * to_f32(v_tile[key * D + channel]);
            o[i] = value;
        }
    }

    out += kv_head * outputs;
    if (blocks == 1) {
        for (int i = threadIdx.x; i < outputs; i += THREADS) out[i] = from_f32<T>(o[i] / sum[i / D]);  // a thread's own sums
        return;
    }
    constexpr int RECORD = D + 2;  // sums, their largest exponent, the powers' sum
    partial += static_cast<long long>(kv_head) * group * gridDim.x * RECORD;
    for (int i = threadIdx.x; i < outputs; i += THREADS) {
        float* record = partial + (i / D * static_cast<long long>(gridDim.x) + blockIdx.x) * RECORD;
        record[i % D] = o[i];
        if (i % D == 0) {
            record[D] = top[i / D];
            record[D + 1] = sum[i / D];
        }
    }
    __threadfence();
    __shared__ bool last;
    __syncthreads();
    if (threadIdx.x == 0) last = atomicAdd(arrived + kv_head, 1u) == blocks - 1;
    __syncthreads();
    if (!last) return;
    __threadfence();
    for (int i = threadIdx.x; i < outputs; i += THREADS) {
        const float* record = partial + i / D * static_cast<long long>(gridDim.x) * RECORD;
        float largest = -INFINITY, all = 0, value = 0;
        for (unsigned block = 0; block < blocks; block++) largest = fmaxf(largest, __ldcg(record + block * RECORD + D));
        for (unsigned block = 0; block < blocks; block++) {
            const float factor = exp_approximate(__ldcg(record + block * RECORD + D) - largest);
            all += __ldcg(record + block * RECORD + D + 1) * factor;
            value += __ldcg(record + block * RECORD + i % D) * factor;
        }
        out[i] = from_f32<T>(value / all);
    }
    if (threadIdx.x == 0) arrived[kv_head] = 0;
}

#define DEFINE(NAME, T)                                                                                                         \
    extern "C" __device__ int attention_decoding_##NAME##_launch[3] = {KEYS<T>, THREADS, int(2 * KEYS<T> * D * sizeof(T))};         \
    extern "C" __global__ void __launch_bounds__(THREADS) attention_decoding_##NAME(                                            \
        T* out, float* partial, unsigned* arrived, T* keys, T* values, const T* qkv, const unsigned* position, int window,      \
        int keys_per_block, int heads, int group, float scale, float softcap) {                                                 \
        attention_decoding<T>(out, partial, arrived, keys, values, qkv, *position, window, keys_per_block, heads, group, scale, \
                              softcap);                                                                                         \
    }
FOR_NUMBER_TYPES(DEFINE)
