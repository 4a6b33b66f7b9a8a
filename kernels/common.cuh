// What all kernels share: number types, 16-byte accesses, reductions in a fixed order, counted randomness.

#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "ptx.cuh"

using f16 = __half;
using bf16 = __nv_bfloat16;

// Calls DEFINE(name of the type, type) for each type that kernels exist in. bf16 exists from compute_80 on.
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
#define FOR_NUMBER_TYPES(DEFINE) DEFINE(f32, float) DEFINE(f16, f16) DEFINE(bf16, bf16)
#else
#define FOR_NUMBER_TYPES(DEFINE) DEFINE(f32, float) DEFINE(f16, f16)
#endif

template <typename T>
constexpr bool is_bf16 = false;
template <>
constexpr bool is_bf16<bf16> = true;

constexpr int WARP = 32;
constexpr unsigned FULL_WARP = 0xffffffffu;

// ---- Numbers

// bf16 is the upper half of f32. These two need no bf16 instruction.
__device__ __forceinline__ float bf16_bits_to_f32(unsigned short bits) {
    return __uint_as_float(static_cast<unsigned>(bits) << 16);
}

// Nearest, ties to even; a NaN stays one.
__device__ __forceinline__ unsigned short f32_to_bf16_bits(float value) {
    unsigned bits = __float_as_uint(value);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<unsigned short>(bits >> 16 | 0x40);
    return static_cast<unsigned short>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

__device__ __forceinline__ float to_f32(float value) { return value; }
__device__ __forceinline__ float to_f32(f16 value) { return __half2float(value); }
__device__ __forceinline__ float to_f32(bf16 value) { return bf16_bits_to_f32(__bfloat16_as_ushort(value)); }

// Rounds to nearest, ties to even.
template <typename T>
__device__ __forceinline__ T from_f32(float value);
template <>
__device__ __forceinline__ float from_f32<float>(float value) {
    return value;
}
template <>
__device__ __forceinline__ f16 from_f32<f16>(float value) {
    return __float2half_rn(value);
}
template <>
__device__ __forceinline__ bf16 from_f32<bf16>(float value) {
#if __CUDA_ARCH__ >= 800
    return __float2bfloat16_rn(value);
#else
    return __ushort_as_bfloat16(f32_to_bf16_bits(value));
#endif
}

// Two numbers of 16 bits in a register, the first in the lower half: what fragments of matrices are made of.
template <typename T>
__device__ __forceinline__ unsigned pair_from_f32(float low, float high);
template <>
__device__ __forceinline__ unsigned pair_from_f32<f16>(float low, float high) {
    __half2 pair = __floats2half2_rn(low, high);
    return *reinterpret_cast<unsigned*>(&pair);
}
template <>
__device__ __forceinline__ unsigned pair_from_f32<bf16>(float low, float high) {
#if __CUDA_ARCH__ >= 800
    __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<unsigned*>(&pair);
#else
    return f32_to_bf16_bits(low) | static_cast<unsigned>(f32_to_bf16_bits(high)) << 16;
#endif
}

// The bits of a number of 16 bits; two of them in a register, the first in the lower half.
template <typename T>
__device__ __forceinline__ unsigned short bits_16(T value) {
    static_assert(sizeof(T) == 2, "a number of 16 bits");
    return *reinterpret_cast<unsigned short*>(&value);
}
template <typename T>
__device__ __forceinline__ unsigned pair_of(T low, T high) { return bits_16(low) | static_cast<unsigned>(bits_16(high)) << 16; }

// ---- 16-byte accesses

// As many numbers as one access of 16 bytes moves.
template <typename T>
struct Pack {
    static constexpr int SIZE = 16 / sizeof(T);
    union {
        uint4 bits;
        T values[SIZE];
    };
    __device__ Pack() : bits(make_uint4(0, 0, 0, 0)) {}
    __device__ T& operator[](int i) { return values[i]; }
    __device__ const T& operator[](int i) const { return values[i]; }
};

// The address must be a multiple of 16.
template <typename T>
__device__ __forceinline__ Pack<T> load_pack(const T* address) {
    Pack<T> pack;
    pack.bits = *reinterpret_cast<const uint4*>(address);
    return pack;
}

template <typename T>
__device__ __forceinline__ void store_pack(T* address, const Pack<T>& pack) {
    *reinterpret_cast<uint4*>(address) = pack.bits;
}

__device__ __forceinline__ bool is_aligned_16(const void* address) {
    return (reinterpret_cast<unsigned long long>(address) & 15) == 0;
}

// Whether rows of this stride (in elements) all begin at a multiple of 16 bytes.
template <typename T>
__device__ __forceinline__ bool rows_are_aligned_16(const T* first, int stride) {
    return is_aligned_16(first) && stride % Pack<T>::SIZE == 0;
}

// ---- Reductions, in an order that depends on nothing but the shape. Every thread gets the result, the same bits.

struct Sum {
    template <typename V>
    __device__ static V identity() { return V(0); }
    template <typename V>
    __device__ static V apply(V a, V b) { return a + b; }
};

struct Max {
    template <typename V>
    __device__ static V identity() { return V(-INFINITY); }
    template <typename V>
    __device__ static V apply(V a, V b) { return a > b ? a : b; }
};

// Over WIDTH neighbouring lanes, a power of two. All lanes of the warp must take part.
template <typename Op, int WIDTH = WARP, typename V>
__device__ __forceinline__ V warp_reduce(V value) {
#pragma unroll
    for (int distance = WIDTH / 2; distance > 0; distance /= 2) {
        value = Op::apply(value, __shfl_xor_sync(FULL_WARP, value, distance));
    }
    return value;
}

// Over a block of whole warps. All threads must take part.
template <typename Op, typename V>
__device__ __forceinline__ V block_reduce(V value) {
    __shared__ V partials[WARP];
    int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, warps = blockDim.x / WARP;
    value = warp_reduce<Op>(value);
    __syncthreads();  // the partials of an earlier call may still be read
    if (lane == 0) partials[warp] = value;
    __syncthreads();
    return warp_reduce<Op>(lane < warps ? partials[lane] : Op::template identity<V>());
}

// Several sums over a block at once.
template <int COUNT>
__device__ __forceinline__ void block_sums(float (&values)[COUNT]) {
    __shared__ float partials[COUNT][WARP];
    int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, warps = blockDim.x / WARP;
#pragma unroll
    for (int i = 0; i < COUNT; i++) values[i] = warp_reduce<Sum>(values[i]);
    __syncthreads();  // the partials of an earlier call may still be read
#pragma unroll
    for (int i = 0; i < COUNT; i++) {
        if (lane == 0) partials[i][warp] = values[i];
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < COUNT; i++) values[i] = warp_reduce<Sum>(lane < warps ? partials[i][lane] : 0.0f);
}

template <int WIDTH = WARP, typename V>
__device__ __forceinline__ V warp_sum(V value) { return warp_reduce<Sum, WIDTH>(value); }
template <int WIDTH = WARP, typename V>
__device__ __forceinline__ V warp_max(V value) { return warp_reduce<Max, WIDTH>(value); }
template <typename V>
__device__ __forceinline__ V block_sum(V value) { return block_reduce<Sum>(value); }
template <typename V>
__device__ __forceinline__ V block_max(V value) { return block_reduce<Max>(value); }

// ---- Counted randomness, as in crates/tensor/src/random.rs

__device__ __forceinline__ unsigned long long mix(unsigned long long z) {
    z += 0x9E3779B97F4A7C15ull;
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9ull;
    z = (z ^ z >> 27) * 0x94D049BB133111EBull;
    return z ^ z >> 31;
}

// Uniform in [0, 1), with 24 bits.
__device__ __forceinline__ float random_unit(unsigned long long key, unsigned long long index) {
    return static_cast<float>(mix(key ^ mix(index)) >> 40) / 16777216.0f;
}

// ---- Runs: neighbouring numbers moved by one access of 1 to 16 bytes. A kernel is written once for any width of run; width 1 is
// its path for addresses and sizes that allow no more.

template <int BYTES>
struct Access;
template <>
struct Access<1> { using Bits = unsigned char; };
template <>
struct Access<2> { using Bits = unsigned short; };
template <>
struct Access<4> { using Bits = unsigned; };
template <>
struct Access<8> { using Bits = uint2; };
template <>
struct Access<16> { using Bits = uint4; };

template <typename T, int WIDTH>
struct Run {
    union {
        typename Access<WIDTH * sizeof(T)>::Bits bits;
        T values[WIDTH];
        unsigned words[(WIDTH * sizeof(T) + 3) / 4];
    };
    __device__ Run() : bits() {}
    __device__ float operator[](int i) const {
        // The upper half of a word is a number by itself: that takes one instruction, not two.
        if constexpr (is_bf16<T> && WIDTH > 1) return __uint_as_float(i % 2 == 0 ? words[i / 2] << 16 : words[i / 2] & 0xffff0000u);
        else return to_f32(values[i]);
    }
};

template <int WIDTH, typename T>
__device__ __forceinline__ Run<T, WIDTH> load_run(const T* address) {
    Run<T, WIDTH> run;
    run.bits = *reinterpret_cast<const decltype(run.bits)*>(address);
    return run;
}

template <int WIDTH, typename T>
__device__ __forceinline__ void store_run(T* address, const Run<T, WIDTH>& run) {
    if constexpr (sizeof(run) == 16) {
        __stwb(reinterpret_cast<uint4*>(address), run.bits);  // an assignment is sometimes cut into four
    } else {
        *reinterpret_cast<decltype(Run<T, WIDTH>::bits)*>(address) = run.bits;
    }
}

// Rounded.
template <int WIDTH, typename T>
__device__ __forceinline__ void store_run(T* address, const float (&values)[WIDTH]) {
    if constexpr (sizeof(T) == 2 && WIDTH > 1) {
        Run<unsigned, WIDTH / 2> pairs;
#pragma unroll
        for (int i = 0; i < WIDTH / 2; i++) pairs.values[i] = pair_from_f32<T>(values[2 * i], values[2 * i + 1]);
        store_run(reinterpret_cast<unsigned*>(address), pairs);
    } else {
        Run<T, WIDTH> run;
#pragma unroll
        for (int i = 0; i < WIDTH; i++) run.values[i] = from_f32<T>(values[i]);
        store_run(address, run);
    }
}

// Constants that go with a run of some 16-bit or 32-bit numbers: in pieces of 16 bytes, or one.
template <int WIDTH>
__device__ __forceinline__ void load_constants(float (&values)[WIDTH], const float* address) {
    constexpr int PIECE = WIDTH < 4 ? WIDTH : 4;
#pragma unroll
    for (int i = 0; i < WIDTH; i += PIECE) {
        Run<float, PIECE> piece = load_run<PIECE>(address + i);
#pragma unroll
        for (int j = 0; j < PIECE; j++) values[i + j] = piece[j];
    }
}

template <int WIDTH, typename T>
__device__ __forceinline__ bool runs_are_aligned(const T* address) {
    return reinterpret_cast<unsigned long long>(address) % (WIDTH * sizeof(T)) == 0;
}

// Calls body(row, column) for columns 0, WIDTH, 2·WIDTH … of every row, spread over all threads of the grid, however many.
// cols is a multiple of WIDTH.
template <int WIDTH, typename Body>
__device__ __forceinline__ void for_each_run(int rows, int cols, Body body) {
    const int runs = cols / WIDTH;
    const long long all = static_cast<long long>(rows) * runs, step = static_cast<long long>(gridDim.x) * blockDim.x;
#pragma unroll 1
    for (long long at = static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x; at < all; at += step) {
        // A division of 64 bits takes as long as all else of a short body.
        const int row = all >> 32 == 0 ? static_cast<unsigned>(at) / static_cast<unsigned>(runs) : static_cast<int>(at / runs);
        body(row, static_cast<int>(at - static_cast<long long>(row) * runs) * WIDTH);
    }
}

// ---- Functions of one number

// e^x by the hardware's 2^x: relative error below (2 + |x|)·2^-23.
__device__ __forceinline__ float exp_approximate(float x) { return exp2_approximate(x * 1.4426950408889634f); }

// 1/(1 + e^-x), to a few units in the last place; the quotient is 0 where e^-x is huge.
__device__ __forceinline__ float sigmoid(float x) { return __fdividef(1.0f, 1.0f + exp_approximate(-x)); }

// As crates/nn/src/lanes.rs has it: exact to 2^-23 of 1, not of itself.
__device__ __forceinline__ float tanh_from_sigmoid(float x) { return 2.0f * sigmoid(2.0f * x) - 1.0f; }
