// AdamW with decoupled decay (Loshchilov and Hutter 2019), a block for each chunk of a tensor.
//
// adamw_f32, in the order of crates/trainer/src/optimizer.rs, no step of it fused:
//   g = grad_scale·grad,  p = decay·p,  m = β₁m + (1 − β₁)g,  v = β₂v + (1 − β₂)g·g
//   p −= step_size · (m / (√v/root + ε));      decay 1 − lr·wd,  step_size lr/(1 − β₁ᵗ),  root √(1 − β₂ᵗ)
//
// adamw_8bit follows bitsandbytes (csrc/kernels.cu at 95f9af30, kOptimizerStatic8bit2StateBlockwise for Adam): m and v are bytes into
// two maps, in blocks of 256 with one scale each, the largest |m| and |v| of the block.
//   m = map_m[code]·absmax_m,  v = map_v[code]·absmax_v, moved as above
//   p −= step_size·root · (m / (√v + root·ε)),  then p = decay·p
//   codes of m/absmax, v/absmax: the nearest of the map, the even code where two are as near (bitsandbytes' search ends so); of m, the
//   next code in m's direction where the nearest has the other sign (0 counts as positive); a block of zeros: 0/0 finds code 0.
//   Where grad is NaN or infinite, m and v become 0 and p stays.
// Different from it: each operation is rounded by itself, quotients correctly (it uses __fdividef); the missing elements of a last,
// partial block don't count in its absmax (it takes them for the smallest code above 0).
//
//   value, grad  // (n);  m, v  // (n), f32 or bytes;  absmax_m, absmax_v  // (⌈n/256⌉);  compute  // (n), value rounded
// value =, m =, v =, absmax =, compute =. square_sum: partials[chunk] = Σ grad². sum_partials: out = Σ partials. Sums are f64.
//
// Launch: BLOCK threads; grid.x = chunks (sum_partials: 1); no dynamic shared memory.

#include "common.cuh"

constexpr int BLOCK = 256;
constexpr int CODES = 256;        // of a map
constexpr int STATE_BLOCK = 256;  // elements that share a scale

// Chunks of one tensor start at multiples of 4096 elements.
struct Chunk {
    float* value;
    const float* grad;
    void* m;
    void* v;
    float* absmax_m;
    float* absmax_v;
    void* compute;  // null: there is no copy
    int n;
    int compute_type;  // 1 f16, 2 bf16
};

template <int WIDTH>
__device__ void store_copy(const Chunk& chunk, int at, const float (&values)[WIDTH]) {
    if (chunk.compute == nullptr) return;
    Run<unsigned short, WIDTH> copy;
#pragma unroll
    for (int i = 0; i < WIDTH; i++) {
        copy.values[i] = chunk.compute_type == 1 ? __half_as_ushort(__float2half_rn(values[i])) : f32_to_bf16_bits(values[i]);
    }
    store_run(static_cast<unsigned short*>(chunk.compute) + at, copy);
}

// Each operation rounded by itself, as on the CPU: nvcc would fuse products into sums.
__device__ float next_m(float m, float beta, float rest, float g) { return __fadd_rn(__fmul_rn(m, beta), __fmul_rn(rest, g)); }
__device__ float next_v(float v, float beta, float rest, float g) {
    return __fadd_rn(__fmul_rn(v, beta), __fmul_rn(__fmul_rn(rest, g), g));
}

// Calls body(at) with a width that is 4 for most of an aligned chunk, else 1; body is a generic lambda.
template <int WIDTH>
struct Width {
    static constexpr int VALUE = WIDTH;
};

template <typename Body>
__device__ void for_chunk(int n, bool aligned, Body body) {
    const int whole = aligned ? n / 4 * 4 : 0;
    for (int at = threadIdx.x * 4; at < whole; at += BLOCK * 4) body(Width<4>(), at);
#pragma unroll 1
    for (int at = whole + threadIdx.x; at < n; at += BLOCK) body(Width<1>(), at);
}

__device__ bool copy_is_aligned(const Chunk& chunk) { return runs_are_aligned<4>(static_cast<unsigned short*>(chunk.compute)); }

// 1 − β as the CPU has it, from the f64 that was rounded to this f32: a decimal of at most seven places. 1 − 0.999 differs in its
// fifth digit if taken of the f32.
__device__ float one_minus(float beta) { return static_cast<float>(1.0 - rint(beta * 1e7) / 1e7); }

extern "C" __global__ void __launch_bounds__(BLOCK)
adamw_f32(const Chunk* chunks, float decay, float beta1, float beta2, float epsilon, float step_size, float root, float grad_scale) {
    const Chunk chunk = chunks[blockIdx.x];
    float *m = static_cast<float*>(chunk.m), *v = static_cast<float*>(chunk.v);
    const bool aligned =
        is_aligned_16(chunk.value) && is_aligned_16(chunk.grad) && is_aligned_16(m) && is_aligned_16(v) && copy_is_aligned(chunk);
    const float rest1 = one_minus(beta1), rest2 = one_minus(beta2);
    for_chunk(chunk.n, aligned, [&](auto width, int at) {
        constexpr int WIDTH = decltype(width)::VALUE;
        const Run<float, WIDTH> p_run = load_run<WIDTH>(chunk.value + at), g_run = load_run<WIDTH>(chunk.grad + at);
        const Run<float, WIDTH> m_run = load_run<WIDTH>(m + at), v_run = load_run<WIDTH>(v + at);
        float p[WIDTH], new_m[WIDTH], new_v[WIDTH];
#pragma unroll
        for (int i = 0; i < WIDTH; i++) {
            const float g = __fmul_rn(g_run[i], grad_scale);
            new_m[i] = next_m(m_run[i], beta1, rest1, g);
            new_v[i] = next_v(v_run[i], beta2, rest2, g);
            const float direction = __fdiv_rn(new_m[i], __fadd_rn(__fdiv_rn(__fsqrt_rn(new_v[i]), root), epsilon));
            p[i] = __fsub_rn(__fmul_rn(p_run[i], decay), __fmul_rn(step_size, direction));
        }
        store_run(m + at, new_m);
        store_run(v + at, new_v);
        store_run(chunk.value + at, p);
        store_copy(chunk, at, p);
    });
}

// The nearest code; of NaN, code 0.
__device__ int code_of(const float* map, float x) {
    int low = 0;  // the last code whose number is below x
#pragma unroll
    for (int step = CODES / 2; step > 0; step /= 2) {
        if (x > map[low + step]) low += step;
    }
    const int high = min(low + 1, CODES - 1);
    const float middle = 0.5f * (map[low] + map[high]);
    return x > middle ? high : x < middle ? low : low + (low & 1);
}

// A warp does a state's block; a lane 8 of its elements, in runs of WIDTH that lie a warp apart.
template <int WIDTH>
__device__ void adamw_8bit(const Chunk& chunk, int first, const float* map_m, const float* map_v, float decay, float beta1, float beta2,
                           float epsilon, float step_size, float root, float grad_scale) {
    constexpr int LANE = STATE_BLOCK / WARP;
    unsigned char* codes_m = static_cast<unsigned char*>(chunk.m) + first;
    unsigned char* codes_v = static_cast<unsigned char*>(chunk.v) + first;
    const int n = min(chunk.n - first, STATE_BLOCK), block = first / STATE_BLOCK;
    const float absmax_m = chunk.absmax_m[block], absmax_v = chunk.absmax_v[block];

    float p[LANE], m[LANE], v[LANE];
    unsigned finite = 0;  // a bit for each element
    float largest_m = 0, largest_v = 0;
#pragma unroll
    for (int run = 0; run < LANE; run += WIDTH) {
        const int at = run * WARP + threadIdx.x % WARP * WIDTH;
        if (at >= n) continue;
        const Run<float, WIDTH> p_run = load_run<WIDTH>(chunk.value + first + at), g_run = load_run<WIDTH>(chunk.grad + first + at);
        const Run<unsigned char, WIDTH> m_run = load_run<WIDTH>(codes_m + at), v_run = load_run<WIDTH>(codes_v + at);
#pragma unroll
        for (int i = 0; i < WIDTH; i++) {
            const int k = run + i;
            p[k] = p_run[i];
            m[k] = v[k] = 0;
            if (isfinite(g_run[i])) {
                const float g = g_run[i] * grad_scale;
                m[k] = next_m(map_m[m_run.values[i]] * absmax_m, beta1, 1 - beta1, g);
                v[k] = next_v(map_v[v_run.values[i]] * absmax_v, beta2, 1 - beta2, g);
                finite |= 1u << k;
            }
            largest_m = fmaxf(largest_m, fabsf(m[k]));
            largest_v = fmaxf(largest_v, fabsf(v[k]));
        }
    }
    largest_m = warp_max(largest_m);
    largest_v = warp_max(largest_v);
    if (threadIdx.x % WARP == 0) {
        chunk.absmax_m[block] = largest_m;
        chunk.absmax_v[block] = largest_v;
    }
#pragma unroll
    for (int run = 0; run < LANE; run += WIDTH) {
        const int at = run * WARP + threadIdx.x % WARP * WIDTH;
        if (at >= n) continue;
        float values[WIDTH];
        Run<unsigned char, WIDTH> m_run, v_run;
#pragma unroll
        for (int i = 0; i < WIDTH; i++) {
            const int k = run + i;
            values[i] = p[k];
            if (finite >> k & 1) {
                const float direction = m[k] / __fadd_rn(sqrtf(v[k]), __fmul_rn(root, epsilon));
                values[i] = __fsub_rn(p[k], __fmul_rn(step_size * root, direction)) * decay;
            }
            const int code = code_of(map_m, m[k] / largest_m);
            const bool turned = signbit(map_m[code]) != signbit(m[k]);
            m_run.values[i] = static_cast<unsigned char>(turned ? code + (m[k] > 0 ? 1 : -1) : code);
            v_run.values[i] = static_cast<unsigned char>(code_of(map_v, v[k] / largest_v));
        }
        store_run(chunk.value + first + at, values);
        store_run(codes_m + at, m_run);
        store_run(codes_v + at, v_run);
        store_copy(chunk, first + at, values);
    }
}

extern "C" __global__ void __launch_bounds__(BLOCK, 2)
adamw_8bit(const Chunk* chunks, const float* map_m, const float* map_v, float decay, float beta1, float beta2, float epsilon,
           float step_size, float root, float grad_scale) {
    __shared__ float shared_m[CODES], shared_v[CODES];
    shared_m[threadIdx.x] = map_m[threadIdx.x];
    shared_v[threadIdx.x] = map_v[threadIdx.x];
    __syncthreads();
    const Chunk chunk = chunks[blockIdx.x];
    const bool aligned = is_aligned_16(chunk.value) && is_aligned_16(chunk.grad) && copy_is_aligned(chunk) &&
                         runs_are_aligned<4>(static_cast<unsigned char*>(chunk.m)) &&
                         runs_are_aligned<4>(static_cast<unsigned char*>(chunk.v));
    for (int first = threadIdx.x / WARP * STATE_BLOCK; first < chunk.n; first += BLOCK / WARP * STATE_BLOCK) {
        if (aligned && chunk.n - first >= STATE_BLOCK) {
            adamw_8bit<4>(chunk, first, shared_m, shared_v, decay, beta1, beta2, epsilon, step_size, root, grad_scale);
        } else {
            adamw_8bit<1>(chunk, first, shared_m, shared_v, decay, beta1, beta2, epsilon, step_size, root, grad_scale);
        }
    }
}

extern "C" __global__ void __launch_bounds__(BLOCK) square_sum(const Chunk* chunks, double* partials) {
    const Chunk chunk = chunks[blockIdx.x];
    double sum = 0;
    for_chunk(chunk.n, is_aligned_16(chunk.grad), [&](auto width, int at) {
        constexpr int WIDTH = decltype(width)::VALUE;
        const Run<float, WIDTH> run = load_run<WIDTH>(chunk.grad + at);
#pragma unroll
        for (int i = 0; i < WIDTH; i++) sum += static_cast<double>(run[i]) * run[i];
    });
    sum = block_sum(sum);
    if (threadIdx.x == 0) partials[blockIdx.x] = sum;
}

extern "C" __global__ void __launch_bounds__(BLOCK) sum_partials(const double* partials, double* out, int n) {
    double sum = 0;
    for (int i = threadIdx.x; i < n; i += BLOCK) sum += partials[i];
    sum = block_sum(sum);
    if (threadIdx.x == 0) *out = sum;
}
