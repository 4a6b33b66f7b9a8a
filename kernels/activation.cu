// h = act(gate)·up, or act(up) without a gate.   act(x) = x·σ(z):  silu: z = x;  GELU's tanh form: z = 2·√(2/π)·(x + 0.044715·x³)
//   backward, in place: dgate = dh·up·act′(gate),  dup = dh·act(gate);   act′(x) = σ(z) + x·σ(z)·(1 − σ(z))·z′
//   and h once more, in the place of dh, for the gradients of what reads it
//   gate_up  // (N, 2F): gate, then up; (N, F) without a gate
//   hidden, dhidden  // (N, F);  all with strides of their own
// hidden =, gate_up = its gradient, dhidden = hidden if `again`. ½·(1 + tanh(u)) = σ(2u) makes one formula of both.
// Shazeer 2020, "GLU Variants Improve Transformer"; crates/nn/src/mlp.rs.
//
// Launch: BLOCK threads; grid.x counts 2048 numbers of hidden a block (any grid is right); no dynamic shared memory.

#include "activation.cuh"

constexpr int BLOCK = 256;

template <typename Act, int WIDTH, typename T>
__device__ void forward(T* hidden, const T* gate_up, int rows, int inner, int hidden_stride, int gate_up_stride, int gated) {
    for_each_run<WIDTH>(rows, inner, [&](int row, int column) {
        const T* gate = gate_up + static_cast<long long>(row) * gate_up_stride + column;
        const Run<T, WIDTH> g = load_run<WIDTH>(gate);
        Run<T, WIDTH> u;
        if (gated) u = load_run<WIDTH>(gate + inner);
        float values[WIDTH];
#pragma unroll
        for (int i = 0; i < WIDTH; i++) values[i] = activate<Act>(g[i]) * (gated ? u[i] : 1.0f);
        store_run(hidden + static_cast<long long>(row) * hidden_stride + column, values);
    });
}

template <typename Act, int WIDTH, typename T>
__device__ void backward(T* gate_up, T* dhidden, int rows, int inner, int hidden_stride, int gate_up_stride, int gated, int again) {
    for_each_run<WIDTH>(rows, inner, [&](int row, int column) {
        T *gate = gate_up + static_cast<long long>(row) * gate_up_stride + column,
          *hidden = dhidden + static_cast<long long>(row) * hidden_stride + column;
        const Run<T, WIDTH> dh = load_run<WIDTH>(hidden);
        const Run<T, WIDTH> g = load_run<WIDTH>(gate);
        Run<T, WIDTH> u;
        if (gated) u = load_run<WIDTH>(gate + inner);
        float dgate[WIDTH], dup[WIDTH], h[WIDTH];
#pragma unroll
        for (int i = 0; i < WIDTH; i++) {
            const float s = sigmoid(Act::z(g[i])), act = g[i] * s;
            h[i] = act * (gated ? u[i] : 1.0f);
            dgate[i] = dh[i] * (gated ? u[i] : 1.0f) * (s + act * (1 - s) * Act::slope(g[i]));
            dup[i] = dh[i] * act;
        }
        store_run(gate, dgate);
        if (gated) store_run(gate + inner, dup);
        if (again) store_run(hidden, h);
    });
}

template <int WIDTH, typename T>
__device__ bool takes_runs(const T* gate_up, const T* hidden, int inner, int hidden_stride, int gate_up_stride) {
    return inner % WIDTH == 0 && rows_are_aligned_16(gate_up, gate_up_stride) && rows_are_aligned_16(hidden, hidden_stride);
}

template <typename T>
__device__ void gate_forward(T* hidden, const T* gate_up, int rows, int inner, int hidden_stride, int gate_up_stride, int gated, int kind) {
    constexpr int WIDTH = Pack<T>::SIZE;
    if (takes_runs<WIDTH>(gate_up, hidden, inner, hidden_stride, gate_up_stride)) {
        if (kind == 0) forward<Silu, WIDTH>(hidden, gate_up, rows, inner, hidden_stride, gate_up_stride, gated);
        else forward<GeluTanh, WIDTH>(hidden, gate_up, rows, inner, hidden_stride, gate_up_stride, gated);
    } else {
        if (kind == 0) forward<Silu, 1>(hidden, gate_up, rows, inner, hidden_stride, gate_up_stride, gated);
        else forward<GeluTanh, 1>(hidden, gate_up, rows, inner, hidden_stride, gate_up_stride, gated);
    }
}

template <typename T>
__device__ void gate_backward(T* gate_up, T* dhidden, int rows, int inner, int hidden_stride, int gate_up_stride, int gated, int kind,
                              int again) {
    constexpr int WIDTH = Pack<T>::SIZE;
    if (takes_runs<WIDTH>(gate_up, dhidden, inner, hidden_stride, gate_up_stride)) {
        if (kind == 0) backward<Silu, WIDTH>(gate_up, dhidden, rows, inner, hidden_stride, gate_up_stride, gated, again);
        else backward<GeluTanh, WIDTH>(gate_up, dhidden, rows, inner, hidden_stride, gate_up_stride, gated, again);
    } else {
        if (kind == 0) backward<Silu, 1>(gate_up, dhidden, rows, inner, hidden_stride, gate_up_stride, gated, again);
        else backward<GeluTanh, 1>(gate_up, dhidden, rows, inner, hidden_stride, gate_up_stride, gated, again);
    }
}

#define DEFINE(NAME, T)                                                                                                              \
    extern "C" __global__ void __launch_bounds__(BLOCK)                                                                              \
    gate_forward_##NAME(T* hidden, const T* gate_up, int rows, int inner, int hidden_stride, int gate_up_stride, int gated, int kind) { \
        gate_forward(hidden, gate_up, rows, inner, hidden_stride, gate_up_stride, gated, kind);                                      \
    }                                                                                                                                \
    extern "C" __global__ void __launch_bounds__(BLOCK)                                                                              \
    gate_backward_##NAME(T* gate_up, T* dhidden, int rows, int inner, int hidden_stride, int gate_up_stride, int gated, int kind,    \
                         int again) {                                                                                                \
        gate_backward(gate_up, dhidden, rows, inner, hidden_stride, gate_up_stride, gated, kind, again);                             \
    }

FOR_NUMBER_TYPES(DEFINE)
