// compile: HEAD_DIM = 16, 32, 64, 80, 96, 128, 256
//
// Attention of one further token to all before it, whose keys and values join the cache (formulas: attention_forward.cu):
//   qkv  // ((H + 2K)·D): the token's q, k and v; q and k are turned here (rope.cu), if there is a table
//   table  // (2·half): cosines, then sines
//   position  // (1): the token's, on the device, so that a recorded launch serves every token
//   keys, values  // (capacity, K·D): rows 0 … position−1 are read (the last `window` with a window), row `position` =
//   out  // (H·D) =
//   partial  // (H, grid.x, D + 2), scratch;   arrived  // (K), zeros before and after
// A block has some of the keys for all heads of a group; the last block of a group that is done adds up what the others left, in
// their order: the same bits whichever it is (Dao et al. 2023, "Flash-Decoding").
//
// Launch: THREADS threads; grid.x = ⌈capacity / keys_per_block⌉ (blocks beyond the last key do nothing), grid.y = K; dynamic shared
// memory: that of the launch facts for the tiles, and group·(2·D + KEYS + 3 + grid.x)·4 bytes. It may begin before the kernels ahead
// have ended: only qkv and table are theirs.
// archs: 75, 80, 90

#include "common.cuh"

// Where launches may overlap (compute_90, Launch::early): waits until every kernel before has ended and what it wrote is seen. All
// kernels that are launched so must wait before they end; then none ends before those ahead of it.
__device__ __forceinline__ void wait_for_kernels_before() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Lets the next kernel begin, which then waits as above.
__device__ __forceinline__ void let_next_kernel_begin() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;");
#endif
}


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

// Channel i of a head after it has been turned, rounded as it would be stored.
template <typename T>
__device__ float turned(const T* head, int i, const float* table, int half, int interleaved) {
    if (table == nullptr || i >= 2 * half) return to_f32(head[i]);
    const int pair = interleaved ? i / 2 : i % half;
    const bool second = interleaved ? i % 2 != 0 : i >= half;
    const float a = to_f32(head[interleaved ? 2 * pair : pair]), b = to_f32(head[interleaved ? 2 * pair + 1 : pair + half]);
    const float cosine = table[pair], sine = table[half + pair];
    return to_f32(from_f32<T>(second ? b * cosine + a * sine : a * cosine - b * sine));
}

template <typename T>
__device__ void attention_decoding(T* out, float* partial, unsigned* arrived, T* keys, T* values, const T* qkv, const float* table,
                                   int half, int interleaved, int position, int window, int keys_per_block, int heads, int group,
                                   float scale, float softcap) {
    DYNAMIC_SHARED(unsigned char, shared);
    let_next_kernel_begin();
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
    float* factors = rescale + group;                       // (group, grid.x): of what the blocks have

    const T* k_new = qkv + (heads + kv_head) * D;
    const T* v_new = k_new + stride;
    keys += kv_head * D;
    values += kv_head * D;
    const int begin = first_key + blockIdx.x * keys_per_block, end = min(begin + keys_per_block, position + 1);
    // Keys of earlier tokens, and zeros after the last.
    const auto load_tile = [&](int first) {
#pragma unroll 4
        for (int i = threadIdx.x; i < TILE * PACKS<T>; i += THREADS) {
            const int key = first + i / PACKS<T>, offset = i % PACKS<T> * SIZE;
            if (key == position) continue;
            const long long at = static_cast<long long>(key) * stride + offset;
            cp_async_16(shared_address(k_tile + i * SIZE), keys + at, key < end);
            cp_async_16(shared_address(v_tile + i * SIZE), values + at, key < end);
        }
        cp_async_commit();
    };
    load_tile(begin);
    for (int i = threadIdx.x; i < outputs; i += THREADS) o[i] = 0;
    for (int i = threadIdx.x; i < group; i += THREADS) {
        top[i] = -INFINITY;
        sum[i] = 0;
    }
    wait_for_kernels_before();
    for (int i = threadIdx.x; i < outputs; i += THREADS) {
        q[i] = turned(qkv + (kv_head * group + i / D) * D, i % D, table, half, interleaved);
    }

    const int team = threadIdx.x / LANES<T>, member = threadIdx.x % LANES<T>;
    for (int first = begin; first < end; first += TILE) {
        if (first > begin) {
            __syncthreads();  // the tile before has been used
            load_tile(first);
        }
        if (position < first + TILE && end == position + 1) {  // the token's own
            for (int i = threadIdx.x; i < D; i += THREADS) {
                const int at = (position - first) * D + i;
                const T k = from_f32<T>(turned(k_new, i, table, half, interleaved)), v = v_new[i];
                k_tile[at] = k;
                v_tile[at] = v;
                keys[static_cast<long long>(position) * stride + i] = k;
                values[static_cast<long long>(position) * stride + i] = v;
            }
        }
        cp_async_wait<0>();
        __syncthreads();
        // A few keys at a time, so that one's sum doesn't wait for another's.
        constexpr int AT_ONCE = TILE / TEAMS >= 4 ? 4 : TILE / TEAMS >= 2 ? 2 : 1;
#pragma unroll 1
        for (int i = team; i < TILE; i += TEAMS * AT_ONCE) {
#pragma unroll 1
            for (int head = 0; head < group; head++) {
                float dots[AT_ONCE] = {};
#pragma unroll
                for (int n = 0; n < EACH<T>; n++) {
                    const int pack = member + n * LANES<T>;
                    if (pack >= PACKS<T>) continue;
                    float of_head[SIZE];
                    load_constants(of_head, q + head * D + pack * SIZE);
#pragma unroll
                    for (int j = 0; j < AT_ONCE; j++) {
                        const Pack<T> k = load_pack(k_tile + (i + j * TEAMS) * D + pack * SIZE);
#pragma unroll
                        for (int c = 0; c < SIZE; c++) dots[j] += to_f32(k[c]) * of_head[c];
                    }
                }
#pragma unroll
                for (int j = 0; j < AT_ONCE; j++) {
                    const int key = i + j * TEAMS;
                    float dot = warp_sum<LANES<T>>(dots[j]) * scale;
                    if (softcap > 0) dot = softcap * tanhf(dot / softcap);
                    if (member == 0) p[head * TILE + key] = first + key < end ? dot : -INFINITY;
                }
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
    for (int head = threadIdx.x / WARP; head < group; head += THREADS / WARP) {
        const float* record = partial + head * static_cast<long long>(gridDim.x) * RECORD;
        float* of_head = factors + head * gridDim.x;
        const unsigned lane = threadIdx.x % WARP;
        float largest = -INFINITY, all = 0;
        for (unsigned block = lane; block < blocks; block += WARP) {
            of_head[block] = __ldcg(record + block * RECORD + D);
            largest = fmaxf(largest, of_head[block]);
        }
        largest = warp_max(largest);
        for (unsigned block = lane; block < blocks; block += WARP) {
            of_head[block] = exp_approximate(of_head[block] - largest);
            all += __ldcg(record + block * RECORD + D + 1) * of_head[block];
        }
        all = warp_sum(all);
        for (unsigned block = lane; block < blocks; block += WARP) of_head[block] /= all;
    }
    __syncthreads();
    for (int i = threadIdx.x; i < outputs; i += THREADS) {
        const float* record = partial + i / D * static_cast<long long>(gridDim.x) * RECORD + i % D;
        const float* of_head = factors + i / D * gridDim.x;
        float value = 0;
#pragma unroll 8
        for (unsigned block = 0; block < blocks; block++) value += __ldcg(record + block * RECORD) * of_head[block];
        out[i] = from_f32<T>(value);
    }
    if (threadIdx.x == 0) arrived[kv_head] = 0;
}

#define DEFINE(NAME, T)                                                                                                         \
    extern "C" __device__ int attention_decoding_##NAME##_launch[3] = {KEYS<T>, THREADS, int(2 * KEYS<T> * D * sizeof(T))};         \
    extern "C" __global__ void __launch_bounds__(THREADS) attention_decoding_##NAME(                                            \
        T* out, float* partial, unsigned* arrived, T* keys, T* values, const T* qkv, const float* table, int half,              \
        int interleaved, const unsigned* position, int window, int keys_per_block, int heads, int group, float scale,           \
        float softcap) {                                                                                                        \
        attention_decoding<T>(out, partial, arrived, keys, values, qkv, table, half, interleaved, *position, window,            \
                              keys_per_block, heads, group, scale, softcap);                                                    \
    }
FOR_NUMBER_TYPES(DEFINE)
