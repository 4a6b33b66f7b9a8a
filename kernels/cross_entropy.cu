// Raw products of the head to log-probabilities of target tokens, and to their gradient in place.
//   z = scale·raw, bent where softcap is not 0: cap·tanh(scale·raw/cap)
//   log p = z[target] − log Σ exp(z);   correct: z[target] is the largest
//   ∂/∂raw = dlogp·(1[target] − p)·∂z/∂raw,   ∂z/∂raw = scale·(1 − (z/cap)²)
//   logits         // (n, V)
//   targets, logp, correct, dlogp  // (n); dlogp is read only for a gradient
// logp =, correct =, logits = the gradient if one is wanted. bend: logits = z.
// Targets are the caller's to check. Σ exp(z) is summed online: Milakov and Gimelshein 2018, "Online normalizer calculation for
// softmax"; crates/nn/src/head.rs.
//
// Launch: cross_entropy: 1024 threads (any number of whole warps is right), so that few rows are under way at once and stay in
// the cache; grid.x = n. bend: BLOCK threads, grid.x counts 2048 logits a block (any grid is right). No dynamic shared memory.

#include "common.cuh"

constexpr int MOST_THREADS = 1024;
constexpr int BLOCK = 256;
constexpr int BATCH = 4;  // runs that a thread has under way

// From raw products to logits.
template <bool CAPPED>
struct Bend {
    float scale, cap, inverse;  // 1/cap

    __device__ Bend(float scale, float cap) : scale(scale), cap(cap), inverse(1 / cap) {}
    __device__ float z(float raw) const { return CAPPED ? cap * tanh_from_sigmoid(scale * raw * inverse) : scale * raw; }
    __device__ float slope(float z) const { return CAPPED ? scale * (1 - z * inverse * (z * inverse)) : scale; }
};

// Calls body(column, run) for this thread's runs of a row, from the front or, the same ones, from the back.
enum Direction { FORWARD, BACKWARD };

template <Direction DIRECTION, int WIDTH, typename T, typename Body>
__device__ void for_runs(const T* row, int vocab, Body body) {
    const unsigned apart = blockDim.x * WIDTH, steps = (vocab + BATCH * apart - 1) / (BATCH * apart);
#pragma unroll 1
    for (unsigned step = 0; step < steps; step++) {
        const unsigned first = (DIRECTION == FORWARD ? step : steps - 1 - step) * BATCH * apart + threadIdx.x * WIDTH;
        Run<T, WIDTH> runs[BATCH];
#pragma unroll
        for (int i = 0; i < BATCH; i++) {
            if (first + i * apart < vocab) runs[i] = load_run<WIDTH>(row + first + i * apart);
        }
#pragma unroll
        for (int i = 0; i < BATCH; i++) {
            if (first + i * apart < vocab) body(first + i * apart, runs[i]);
        }
    }
}

template <bool CAPPED, int WIDTH, typename T>
__device__ void cross_entropy(T* logits, const unsigned* targets, const float* dlogp, float* logp, unsigned* correct, int vocab,
                              Bend<CAPPED> bend, int gradient) {
    T* row = logits + static_cast<long long>(blockIdx.x) * vocab;
    const unsigned target = targets[blockIdx.x];
    const float z_target = bend.z(to_f32(row[target]));  // read before the barriers below, written over after them

    // Not −∞: the difference of two of these is 0.
    float max = -3.402823466e38f, sum = 0;
    for_runs<FORWARD, WIDTH>(row, vocab, [&](unsigned, const Run<T, WIDTH>& run) {
        float z[WIDTH], best = max;
#pragma unroll
        for (int i = 0; i < WIDTH; i++) {
            z[i] = bend.z(run[i]);
            best = fmaxf(best, z[i]);
        }
        sum *= exp_approximate(max - best);
        max = best;
#pragma unroll
        for (int i = 0; i < WIDTH; i++) sum += exp_approximate(z[i] - max);
    });
    const float best = block_max(max);
    sum = block_sum(sum * exp_approximate(max - best));
    const float lse = best + logf(sum);
    if (threadIdx.x == 0) {
        logp[blockIdx.x] = z_target - lse;
        correct[blockIdx.x] = z_target >= best;
    }
    if (!gradient) return;

    // From the back: the end of the row is what the cache still holds.
    const float d = dlogp[blockIdx.x];
    for_runs<BACKWARD, WIDTH>(row, vocab, [&](unsigned column, const Run<T, WIDTH>& run) {
        float values[WIDTH];
#pragma unroll
        for (int i = 0; i < WIDTH; i++) {
            const float z = bend.z(run[i]);
            values[i] = -d * exp_approximate(z - lse) * bend.slope(z);
        }
        store_run(row + column, values);
    });
    // Written again by the thread that wrote it.
    if (target / WIDTH % blockDim.x == threadIdx.x) {
        row[target] = from_f32<T>(d * (1 - exp_approximate(z_target - lse)) * bend.slope(z_target));
    }
}

template <bool CAPPED, typename T>
__device__ void cross_entropy(T* logits, const unsigned* targets, const float* dlogp, float* logp, unsigned* correct, int vocab,
                              float scale, float softcap, int gradient) {
    constexpr int WIDTH = Pack<T>::SIZE;
    const Bend<CAPPED> bend(scale, softcap);
    if (rows_are_aligned_16(logits, vocab)) cross_entropy<CAPPED, WIDTH>(logits, targets, dlogp, logp, correct, vocab, bend, gradient);
    else cross_entropy<CAPPED, 1>(logits, targets, dlogp, logp, correct, vocab, bend, gradient);
}

template <bool CAPPED, int WIDTH, typename T>
__device__ void bend_runs(T* logits, long long begin, long long end, Bend<CAPPED> bend) {
    const long long step = static_cast<long long>(gridDim.x) * BLOCK * WIDTH;
#pragma unroll 1
    for (long long at = begin + (static_cast<long long>(blockIdx.x) * BLOCK + threadIdx.x) * WIDTH; at < end; at += step) {
        const Run<T, WIDTH> run = load_run<WIDTH>(logits + at);
        float values[WIDTH];
#pragma unroll
        for (int i = 0; i < WIDTH; i++) values[i] = bend.z(run[i]);
        store_run(logits + at, values);
    }
}

template <bool CAPPED, typename T>
__device__ void bend(T* logits, long long n, float scale, float softcap) {
    constexpr int WIDTH = Pack<T>::SIZE;
    const long long whole = is_aligned_16(logits) ? n / WIDTH * WIDTH : 0;
    bend_runs<CAPPED, WIDTH>(logits, 0, whole, Bend<CAPPED>(scale, softcap));
    bend_runs<CAPPED, 1>(logits, whole, n, Bend<CAPPED>(scale, softcap));
}

#define DEFINE(NAME, T)                                                                                                              \
    extern "C" __global__ void __launch_bounds__(MOST_THREADS)                                                                       \
    cross_entropy_##NAME(T* logits, const unsigned* targets, const float* dlogp, float* logp, unsigned* correct, int n, int vocab,   \
                         float scale, float softcap, int gradient) {                                                                 \
        if (softcap != 0) cross_entropy<true>(logits, targets, dlogp, logp, correct, vocab, scale, softcap, gradient);               \
        else cross_entropy<false>(logits, targets, dlogp, logp, correct, vocab, scale, 1, gradient);                                 \
    }                                                                                                                                \
    extern "C" __global__ void __launch_bounds__(BLOCK) bend_##NAME(T* logits, long long n, float scale, float softcap) {            \
        if (softcap != 0) bend<true>(logits, n, scale, softcap);                                                                     \
        else bend<false>(logits, n, scale, 1);                                                                                       \
    }

FOR_NUMBER_TYPES(DEFINE)
