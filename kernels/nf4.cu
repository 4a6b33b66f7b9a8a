// NF4 with block-wise scales, the scales themselves quantised again ("double quantisation"), bit for bit as crates/quant; the formula
// and the layout are in codes.cuh. Dettmers et al. 2023, "QLoRA"; levels, thresholds, rounding and layout are bitsandbytes'
// (bitsandbytes/functional.py, csrc/kernels.cu); crates/quant/src/nf4.rs.
//   x, out         // (n): a matrix; rows of out, of `cols` numbers, are `stride` apart
//   codes          // (⌈n/2⌉)
//   absmax         // (⌈n/64⌉), plain; or codes of it // (⌈n/64⌉), nested_absmax // (⌈blocks/256⌉) and offset // (1)
//   map            // (256), ascending
// All outputs =. Products and sums are rounded one by one, never fused.
//
// Launch: BLOCK threads, no dynamic shared memory; grid.x counts
//   nf4_quantize: 2048 elements a block (any grid is right);  nf4_mean: parts (any; the order of the sum depends on it);
//   nf4_offset: 1;  nf4_nest: 256 scales a block, exactly;  nf4_dequantize: 8192 elements a block, exactly

#include "codes.cuh"

constexpr int BLOCK = 256;
constexpr float SMALLEST = 1e-38f;  // keeps the reciprocal of a scale finite

// A number above the k-th of these has a code above k.
__device__ unsigned code_of(float x) {
    constexpr float THRESHOLDS[15] = {
        -0.8480964004993439f, -0.6106329262256622f,  -0.4599952697753906f,   -0.33967943489551544f, -0.23460740596055984f,
        -0.13791173323988914f, -0.045525018125772476f, 0.03979014977812767f, 0.1202552504837513f,   0.2035212516784668f,
        0.2920137718319893f,  0.3893125355243683f,   0.5016634166240692f,    0.6427869200706482f,   0.8614784178118011f,
    };
    unsigned code = 0;
#pragma unroll
    for (int k = 0; k < 15; k++) code += x > THRESHOLDS[k];
    return code;
}

// ---- Quantising

constexpr int EACH = 8;  // elements of a thread: four bytes of codes

__device__ float number(const float* x, long long i) { return x[i]; }
__device__ float number(const f16* x, long long i) { return to_f32(x[i]); }
__device__ float number(const unsigned short* x, long long i) { return bf16_bits_to_f32(x[i]); }  // bf16 on any device

__device__ void eight_numbers(float (&values)[EACH], const float* x) { load_constants(values, x); }
template <typename Half>
__device__ void eight_numbers(float (&values)[EACH], const Half* x) {
    const Run<Half, EACH> run = load_run<EACH>(x);
#pragma unroll
    for (int i = 0; i < EACH; i++) values[i] = number(run.values, i);
}

template <typename T>
__device__ void quantize(unsigned char* codes, float* absmax, const T* x, long long n) {
    const bool x_aligned = is_aligned_16(x), codes_aligned = runs_are_aligned<EACH / 2>(codes);
    // All lanes go round together: eight of them share a scale.
#pragma unroll 1
    for (long long first = static_cast<long long>(blockIdx.x) * BLOCK * EACH; first < n;
         first += static_cast<long long>(gridDim.x) * BLOCK * EACH) {
        const long long at = first + threadIdx.x * EACH, block = at / SCALED;
        const int count = static_cast<int>(min(max(n - at, 0ll), static_cast<long long>(EACH)));
        float values[EACH] = {};
        if (x_aligned && count == EACH) {
            eight_numbers(values, x + at);
        } else {
            for (int i = 0; i < EACH; i++) {
                if (i < count) values[i] = number(x, at + i);
            }
        }
        // As integers: there a NaN is above infinity, so that neither is lost.
        unsigned largest = 0;
#pragma unroll
        for (int i = 0; i < EACH; i++) largest = max(largest, __float_as_uint(values[i]) & 0x7fffffffu);
        largest = warp_max<SCALED / EACH>(largest);
        float scale = __uint_as_float(largest);
        // bitsandbytes stores a last, partial block of zeros so.
        if ((block + 1) * SCALED > n && scale < SMALLEST) scale = SMALLEST;
        if (at % SCALED == 0 && count > 0) absmax[block] = scale;
        // A block of zeros gets the code of zero, and so does what is missing of the last byte.
        const float inverse = __fdiv_rn(1.0f, fmaxf(scale, SMALLEST));
        unsigned packed = 0;
#pragma unroll
        for (int i = 0; i < EACH; i++) packed |= code_of(__fmul_rn(values[i], inverse)) << (i / 2 * 8 + (i % 2 == 0 ? 4 : 0));
        if (codes_aligned && count == EACH) {
            *reinterpret_cast<unsigned*>(codes + at / 2) = packed;
        } else {
            for (int i = 0; i < (count + 1) / 2; i++) codes[at / 2 + i] = static_cast<unsigned char>(packed >> 8 * i);
        }
    }
}

#define DEFINE(NAME, T)                                                                                                              \
    extern "C" __global__ void __launch_bounds__(BLOCK)                                                                              \
    nf4_quantize_##NAME(unsigned char* codes, float* absmax, const T* x, long long n) { quantize(codes, absmax, x, n); }

DEFINE(f32, float)
DEFINE(f16, f16)
DEFINE(bf16, unsigned short)
#undef DEFINE

extern "C" __global__ void __launch_bounds__(BLOCK) nf4_mean(double* partials, const float* absmax, int n) {
    const long long first = static_cast<long long>(blockIdx.x) * BLOCK + threadIdx.x, step = static_cast<long long>(gridDim.x) * BLOCK;
    double sum = 0;
    for (long long i = first; i < n; i += step) sum += absmax[i];
    sum = block_sum(sum);
    if (threadIdx.x == 0) partials[blockIdx.x] = sum;
}

extern "C" __global__ void __launch_bounds__(BLOCK) nf4_offset(float* offset, const double* partials, int parts, int n) {
    double sum = 0;
    for (int i = threadIdx.x; i < parts; i += BLOCK) sum += partials[i];
    sum = block_sum(sum);
    if (threadIdx.x == 0) *offset = n > 0 ? static_cast<float>(sum / n) : 0.0f;
}

extern "C" __global__ void __launch_bounds__(BLOCK)
nf4_nest(unsigned char* codes, float* nested_absmax, const float* absmax, const float* offset, const float* map, int blocks) {
    __shared__ float midpoints[256];
    if (threadIdx.x < 255) midpoints[threadIdx.x] = __fmul_rn(__fadd_rn(map[threadIdx.x], map[threadIdx.x + 1]), 0.5f);
    const long long block = static_cast<long long>(blockIdx.x) * GROUP + threadIdx.x;
    const float centered = block < blocks ? __fsub_rn(absmax[block], *offset) : 0.0f;
    const float largest = block_max(fabsf(centered));
    if (threadIdx.x == 0) nested_absmax[blockIdx.x] = largest;
    if (block >= blocks) return;
    const float x = __fmul_rn(centered, __fdiv_rn(1.0f, fmaxf(largest, SMALLEST)));
    int code = 0;  // how many midpoints lie below x
#pragma unroll
    for (int step = 128; step > 0; step /= 2) {
        if (x > midpoints[code + step - 1]) code += step;
    }
    codes[block] = static_cast<unsigned char>(code);
}

// ---- Dequantising

#define DEFINE(NAME, T)                                                                                                              \
    extern "C" __global__ void __launch_bounds__(BLOCK)                                                                              \
    nf4_dequantize_##NAME(T* out, const float* tables, const unsigned char* codes, const void* absmax, const float* nested_absmax,   \
                          const float* offset, long long n, int cols, int stride, int round_to) {                                    \
        write_coded<BLOCK>(out, {codes, absmax, nested_absmax, offset}, tables, n, cols, stride, round_to, blockIdx.x);              \
    }

FOR_NUMBER_TYPES(DEFINE)
