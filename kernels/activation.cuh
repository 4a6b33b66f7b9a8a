// What gates are passed through: act(x) = x·σ(z), with the slope of z.

#pragma once

#include "common.cuh"

struct Silu {
    __device__ static float z(float x) { return x; }
    __device__ static float slope(float) { return 1; }
};

struct GeluTanh {
    static constexpr float C = 1.5957691216057308f, K = 0.044715f;  // 2·√(2/π)
    __device__ static float z(float x) { return C * (x + K * x * x * x); }
    __device__ static float slope(float x) { return C * (1 + 3 * K * x * x); }
};

template <typename Act>
__device__ __forceinline__ float activate(float x) { return x * sigmoid(Act::z(x)); }
