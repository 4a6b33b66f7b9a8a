// A mixture of experts on one card: which experts each token goes to, its rows brought together by expert, and back.
//   route           p = softmax(score), chosen = the k with the largest, falling, the earlier of equals;
//                   normalised: the softmax is of those k alone, and p of others is 0
//                   // score, p (N, E), in one place;  chosen (N, k)
//   arrange         slots: the tokens of expert 0, in order, then those of expert 1 … Each expert's are filled up to a multiple of
//                   `together` by slots without a token, of which token is NOBODY and weight is 0.
//                   // token, weight (slots);  place (N, k): the slot of token and choice;  count (E): tokens of each
//   gather          out[i] = x[token[i]], or 0                                    // out (slots, C);  x (N, C)
//   gate_forward    hidden[i] = weight[i]·act(gate)·up                            // as in activation.cu, (slots, F)
//   gate_backward   gate_up = its gradient, dot[i] = Σ act(gate)·up·dhidden       // dhidden: the gradient of hidden
//   combine         y[n] = Σ_j x[place[n, j]], j = 0 … k − 1                      // y (N, C);  x (slots, C)
//   route_backward  dscore = p·(g − Σ p·g), g = dot of a token's slots, 0 where it has none
//                   // dscore (N, E);  by the layout's own sums in a fixed order
// y = Σ down(weight·hidden) is Σ weight·down(hidden), and weight's gradient is then a dot of what is there already.
// All are written (=). Sums are in f32, in an order that depends on the shapes alone.
// crates/nn/src/experts.rs.
//
// Launch: BLOCK threads. route, route_backward: grid.x counts BLOCK / 32 tokens a block. arrange: as many blocks as experts, E ints
// of dynamic shared memory. gather, gate_forward, combine: grid.x counts 2048 numbers of the output a block (any grid is right).
// gate_backward: one block for each slot.

#include "activation.cuh"

constexpr int BLOCK = 256;
constexpr int WARPS = BLOCK / WARP;
constexpr unsigned NOBODY = 0xffffffffu;

// ---- Where tokens go

// Whether a score comes before another; NaN comes last, so that every token has its k experts.
__device__ __forceinline__ bool is_before(float a, int a_at, float b, int b_at) { return a > b || (a == b && a_at < b_at); }

__device__ __forceinline__ float comparable(float score) { return isnan(score) ? -INFINITY : score; }

extern "C" __global__ void __launch_bounds__(BLOCK)
route(float* scores, unsigned* chosen, int tokens, int experts, int k, int normalised) {
    const int token = blockIdx.x * WARPS + threadIdx.x / WARP, lane = threadIdx.x % WARP;
    if (token >= tokens) return;  // the whole warp
    float* own = scores + static_cast<long long>(token) * experts;
    float last = INFINITY, largest = 0, sum = 0;
    int last_at = -1;
    for (int j = 0; j < k; j++) {
        float best = -INFINITY;
        int best_at = 0x7fffffff;
        for (int at = lane; at < experts; at += WARP) {
            const float score = comparable(own[at]);
            if (is_before(last, last_at, score, at) && is_before(score, at, best, best_at)) best = score, best_at = at;
        }
#pragma unroll
        for (int distance = WARP / 2; distance > 0; distance /= 2) {
            const float other = __shfl_xor_sync(FULL_WARP, best, distance);
            const int other_at = __shfl_xor_sync(FULL_WARP, best_at, distance);
            if (is_before(other, other_at, best, best_at)) best = other, best_at = other_at;
        }
        if (j == 0) largest = best;
        if (lane == 0) chosen[static_cast<long long>(token) * k + j] = best_at;
        last = best, last_at = best_at;
    }
    // Those before or at the last choice are the k.
    for (int at = lane; at < experts; at += WARP) {
        const float score = own[at];
        const bool counts = !normalised || !is_before(last, last_at, comparable(score), at);
        const float e = counts ? expf(score - largest) : 0.0f;
        own[at] = e;
        sum += e;
    }
    sum = warp_sum(sum);
    for (int at = lane; at < experts; at += WARP) own[at] /= sum;
}

extern "C" __global__ void __launch_bounds__(BLOCK)
arrange(unsigned* token, float* weight, unsigned* place, unsigned* count, const unsigned* chosen, const float* p, int tokens, int k,
        int experts, int together) {
    extern __shared__ int counts[];
    __shared__ int of_warp[WARPS];
    const int expert = blockIdx.x, lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    const long long choices = static_cast<long long>(tokens) * k;
    for (int at = threadIdx.x; at < experts; at += BLOCK) counts[at] = 0;
    __syncthreads();
    for (long long i = threadIdx.x; i < choices; i += BLOCK) atomicAdd(&counts[chosen[i]], 1);  // whole numbers: in any order
    __syncthreads();
    const int own = counts[expert];
    int first = 0;
    for (int at = threadIdx.x; at < expert; at += BLOCK) first += (counts[at] + together - 1) / together * together;
    first = block_sum(first);

    int next = first;
    for (long long start = 0; start < choices; start += BLOCK) {
        const long long i = start + threadIdx.x;
        const bool mine = i < choices && chosen[i] == static_cast<unsigned>(expert);
        const unsigned those = __ballot_sync(FULL_WARP, mine);
        __syncthreads();  // what the warps counted before has been read
        if (lane == 0) of_warp[warp] = __popc(those);
        __syncthreads();
        int before = 0, all = 0;
        for (int w = 0; w < WARPS; w++) {
            if (w < warp) before += of_warp[w];
            all += of_warp[w];
        }
        if (mine) {
            const int slot = next + before + __popc(those & ((1u << lane) - 1));
            const unsigned row = static_cast<unsigned>(i / k);
            token[slot] = row;
            weight[slot] = p[static_cast<long long>(row) * experts + expert];
            place[i] = slot;
        }
        next += all;
    }
    const int end = first + (own + together - 1) / together * together;
    for (int slot = first + own + threadIdx.x; slot < end; slot += BLOCK) token[slot] = NOBODY, weight[slot] = 0;
    if (threadIdx.x == 0) count[expert] = own;
}

template <typename T>
__device__ void route_backward(T* dscores, const float* p, const unsigned* chosen, const unsigned* place, const float* dots, int tokens,
                               int experts, int k) {
    const int token = blockIdx.x * WARPS + threadIdx.x / WARP, lane = threadIdx.x % WARP;
    if (token >= tokens) return;  // the whole warp
    const float* own = p + static_cast<long long>(token) * experts;
    chosen += static_cast<long long>(token) * k;
    place += static_cast<long long>(token) * k;
    float mean = 0;
    for (int j = lane; j < k; j += WARP) mean += own[chosen[j]] * dots[place[j]];
    mean = warp_sum(mean);
    for (int at = lane; at < experts; at += WARP) {
        float g = 0;
        for (int j = 0; j < k; j++) {
            if (chosen[j] == static_cast<unsigned>(at)) g = dots[place[j]];
        }
        dscores[static_cast<long long>(token) * experts + at] = from_f32<T>(own[at] * (g - mean));
    }
}

// ---- Rows

template <int WIDTH, typename T>
__device__ void gather(T* out, const T* x, const unsigned* token, int slots, int width, int out_stride) {
    for_each_run<WIDTH>(slots, width, [&](int slot, int column) {
        Run<T, WIDTH> run;
        if (token[slot] != NOBODY) run = load_run<WIDTH>(x + static_cast<long long>(token[slot]) * width + column);
        store_run(out + static_cast<long long>(slot) * out_stride + column, run);
    });
}

template <int WIDTH, typename T>
__device__ void combine(T* y, const T* x, const unsigned* place, int tokens, int k, int width) {
    for_each_run<WIDTH>(tokens, width, [&](int token, int column) {
        float values[WIDTH] = {};
        for (int j = 0; j < k; j++) {
            const unsigned slot = place[static_cast<long long>(token) * k + j];
            const Run<T, WIDTH> run = load_run<WIDTH>(x + static_cast<long long>(slot) * width + column);
#pragma unroll
            for (int i = 0; i < WIDTH; i++) values[i] += run[i];
        }
        store_run(y + static_cast<long long>(token) * width + column, values);
    });
}

// ---- Gates, as in activation.cu but for the weight

template <typename T>
struct Gates {
    T* gate_up;
    T* hidden;  // or its gradient
    const float* weight;
    int inner, hidden_stride, gate_up_stride, gated;

    template <int WIDTH>
    __device__ bool takes_runs() const {
        return inner % WIDTH == 0 && rows_are_aligned_16(gate_up, gate_up_stride) && rows_are_aligned_16(hidden, hidden_stride);
    }

    template <typename Act, int WIDTH>
    __device__ void forward(int slots) const {
        for_each_run<WIDTH>(slots, inner, [&](int slot, int column) {
            const T* gate = gate_up + static_cast<long long>(slot) * gate_up_stride + column;
            const Run<T, WIDTH> g = load_run<WIDTH>(gate);
            Run<T, WIDTH> u;
            if (gated) u = load_run<WIDTH>(gate + inner);
            float values[WIDTH];
#pragma unroll
            for (int i = 0; i < WIDTH; i++) values[i] = weight[slot] * activate<Act>(g[i]) * (gated ? u[i] : 1.0f);
            store_run(hidden + static_cast<long long>(slot) * hidden_stride + column, values);
        });
    }

    // Of the block's slot; what a thread adds to the dot.
    template <typename Act, int WIDTH>
    __device__ float backward(int slot) const {
        T* row = gate_up + static_cast<long long>(slot) * gate_up_stride;
        const T* dhidden = hidden + static_cast<long long>(slot) * hidden_stride;
        const float scale = weight[slot];
        float dot = 0;
        for (int column = threadIdx.x * WIDTH; column < inner; column += BLOCK * WIDTH) {
            const Run<T, WIDTH> dh = load_run<WIDTH>(dhidden + column), g = load_run<WIDTH>(row + column);
            Run<T, WIDTH> u;
            if (gated) u = load_run<WIDTH>(row + inner + column);
            float dgate[WIDTH], dup[WIDTH];
#pragma unroll
            for (int i = 0; i < WIDTH; i++) {
                const float s = sigmoid(Act::z(g[i])), act = g[i] * s, up = gated ? u[i] : 1.0f;
                dot += act * up * dh[i];
                dgate[i] = scale * dh[i] * up * (s + act * (1 - s) * Act::slope(g[i]));
                dup[i] = scale * dh[i] * act;
            }
            store_run(row + column, dgate);
            if (gated) store_run(row + inner + column, dup);
        }
        return dot;
    }
};

template <typename T>
__device__ void gate_forward(const Gates<T>& gates, int slots, int kind) {
    constexpr int WIDTH = Pack<T>::SIZE;
    if (gates.template takes_runs<WIDTH>()) {
        if (kind == 0) gates.template forward<Silu, WIDTH>(slots);
        else gates.template forward<GeluTanh, WIDTH>(slots);
    } else {
        if (kind == 0) gates.template forward<Silu, 1>(slots);
        else gates.template forward<GeluTanh, 1>(slots);
    }
}

template <typename T>
__device__ void gate_backward(const Gates<T>& gates, float* dots, int kind) {
    constexpr int WIDTH = Pack<T>::SIZE;
    const int slot = blockIdx.x;
    float dot;
    if (gates.template takes_runs<WIDTH>()) {
        dot = kind == 0 ? gates.template backward<Silu, WIDTH>(slot) : gates.template backward<GeluTanh, WIDTH>(slot);
    } else {
        dot = kind == 0 ? gates.template backward<Silu, 1>(slot) : gates.template backward<GeluTanh, 1>(slot);
    }
    dot = block_sum(dot);
    if (threadIdx.x == 0) dots[slot] = dot;
}

#define DEFINE(NAME, T)                                                                                                              \
    extern "C" __global__ void __launch_bounds__(BLOCK)                                                                              \
    route_backward_##NAME(T* dscores, const float* p, const unsigned* chosen, const unsigned* place, const float* dots, int tokens,  \
                          int experts, int k) {                                                                                      \
        route_backward(dscores, p, chosen, place, dots, tokens, experts, k);                                                         \
    }                                                                                                                                \
    extern "C" __global__ void __launch_bounds__(BLOCK)                                                                              \
    gather_##NAME(T* out, const T* x, const unsigned* token, int slots, int width, int out_stride) {                                 \
        if (rows_are_aligned_16(out, out_stride) && rows_are_aligned_16(x, width)) {                                                 \
            gather<Pack<T>::SIZE>(out, x, token, slots, width, out_stride);                                                          \
        } else {                                                                                                                     \
            gather<1>(out, x, token, slots, width, out_stride);                                                                      \
        }                                                                                                                            \
    }                                                                                                                                \
    extern "C" __global__ void __launch_bounds__(BLOCK)                                                                              \
    combine_##NAME(T* y, const T* x, const unsigned* place, int tokens, int k, int width) {                                          \
        if (rows_are_aligned_16(y, width) && rows_are_aligned_16(x, width)) combine<Pack<T>::SIZE>(y, x, place, tokens, k, width);   \
        else combine<1>(y, x, place, tokens, k, width);                                                                              \
    }                                                                                                                                \
    extern "C" __global__ void __launch_bounds__(BLOCK)                                                                              \
    gate_forward_##NAME(T* hidden, T* gate_up, const float* weight, int slots, int inner, int hidden_stride, int gate_up_stride,     \
                        int gated, int kind) {                                                                                       \
        gate_forward(Gates<T>{gate_up, hidden, weight, inner, hidden_stride, gate_up_stride, gated}, slots, kind);                   \
    }                                                                                                                                \
    extern "C" __global__ void __launch_bounds__(BLOCK)                                                                              \
    gate_backward_##NAME(T* gate_up, float* dots, T* dhidden, const float* weight, int inner, int hidden_stride,                     \
                         int gate_up_stride, int gated, int kind) {                                                                  \
        gate_backward(Gates<T>{gate_up, dhidden, weight, inner, hidden_stride, gate_up_stride, gated}, dots, kind);                  \
    }

FOR_NUMBER_TYPES(DEFINE)
