// Matrices in 4-bit codes of 16 levels, scaled by block, the scales themselves in codes or not: what kernels that write them out share.
//   w = level[code]·absmax,   a block is 64 elements of the row-major matrix
//   absmax: as it is; or map[code]·nested + offset, where a group of 256 blocks has one `nested`
// Two codes share a byte, the earlier element in the high half.
//   tables  // (16 + 256): the levels, then the map, ascending
// Products and sums are rounded one by one, never fused: bit for bit as crates/quant.

#pragma once

#include "common.cuh"

constexpr int SCALED = 64;  // elements that share a scale
constexpr int GROUP = 256;  // scales that share a scale of scales
constexpr int LEVELS = 16;

// One matrix.
struct Coded {
    const unsigned char* codes;  // (⌈n/2⌉)
    const void* absmax;          // (⌈n/64⌉): f32; codes of it where there is `nested`
    const float* nested;         // (⌈blocks/256⌉), or null
    const float* offset;         // (1)
};

// Its scales.
struct Scales {
    const float* plain;
    const unsigned char* codes;  // null: plain
    const float* nested;
    const float* map;
    float offset;

    __device__ Scales(const Coded& coded, const float* tables)
        : plain(static_cast<const float*>(coded.absmax)),
          codes(coded.nested == nullptr ? nullptr : static_cast<const unsigned char*>(coded.absmax)),
          nested(coded.nested),
          map(tables + LEVELS),
          offset(coded.nested == nullptr ? 0.0f : *coded.offset) {}

    __device__ float of(int block) const {
        if (codes == nullptr) return plain[block];
        return __fadd_rn(__fmul_rn(map[codes[block]], nested[block / GROUP]), offset);
    }
};

// Elements that a block of BLOCK threads writes: four stores of 16 bytes a thread, of 16-bit numbers.
template <int BLOCK>
constexpr int PIECE = 32 * BLOCK;

// What a number is rounded to before it is stored.
enum RoundTo { AS_IT_IS, TO_F16, TO_BF16 };

__device__ __forceinline__ float rounded(float value, int round_to) {
    if (round_to == TO_F16) return to_f32(__float2half_rn(value));
    if (round_to == TO_BF16) return bf16_bits_to_f32(f32_to_bf16_bits(value));
    return value;
}

// What storing a number as one of these rounds to anyhow.
__device__ constexpr RoundTo rounding_of(const float*) { return AS_IT_IS; }
__device__ constexpr RoundTo rounding_of(const f16*) { return TO_F16; }
__device__ constexpr RoundTo rounding_of(const bf16*) { return TO_BF16; }

// Writes a piece, that of `block`, of a matrix of n elements whose rows have `cols` of them to rows of out that are `stride` apart. All
// BLOCK threads take part, once in a kernel.
template <int BLOCK, typename T>
__device__ void write_coded(T* out, const Coded& coded, const float* tables, long long n, int cols, int stride, int round_to, int block) {
    constexpr int WIDTH = Pack<T>::SIZE, STEP = BLOCK * WIDTH, RUNS = PIECE<BLOCK> / STEP;
    __shared__ float levels[LEVELS];  // looked up without conflicts: they lie in different banks
    __shared__ float scale[PIECE<BLOCK> / SCALED];
    const long long first = static_cast<long long>(block) * PIECE<BLOCK>;
    const int count = static_cast<int>(min(n - first, static_cast<long long>(PIECE<BLOCK>)));
    const unsigned char* codes = coded.codes + first / 2;
    const bool whole = cols % WIDTH == 0 && rows_are_aligned_16(out, stride) && runs_are_aligned<WIDTH / 2>(codes);
    // Nothing waits for what is loaded before all loads are under way.
    Run<unsigned char, WIDTH / 2> bytes[RUNS];
#pragma unroll
    for (int k = 0; k < RUNS; k++) {
        const int at = k * STEP + threadIdx.x * WIDTH;
        if (whole && at < count) bytes[k] = load_run<WIDTH / 2>(codes + at / 2);
    }
    if (threadIdx.x < LEVELS) levels[threadIdx.x] = tables[threadIdx.x];
    const Scales scales(coded, tables);
    for (int i = threadIdx.x; i * SCALED < count; i += BLOCK) scale[i] = scales.of(block * (PIECE<BLOCK> / SCALED) + i);
    const unsigned width = cols;
    const unsigned row = first >> 32 == 0 ? static_cast<unsigned>(first) / width : static_cast<unsigned>(first / cols);
    const unsigned column = static_cast<unsigned>(first - static_cast<long long>(row) * cols);
    out += static_cast<long long>(row) * stride;
    if (round_to == rounding_of(out)) round_to = AS_IT_IS;  // once is enough
    __syncthreads();
    // Element i of a word of codes. Its place among the levels comes out of the word as an offset in bytes.
    const auto number = [&](unsigned word, int i, float scale) {
        const int bits = i / 2 * 8 + (i % 2 == 0 ? 4 : 0);
        const unsigned offset = (bits == 0 ? word << 2 : word >> (bits - 2)) & 15 * sizeof(float);
        const float level = *reinterpret_cast<const float*>(reinterpret_cast<const char*>(levels) + offset);
        return rounded(__fmul_rn(level, scale), round_to);
    };
    if (!whole) {
        for (int at = threadIdx.x; at < count; at += BLOCK) {
            const unsigned down = (column + at) / width;
            out[static_cast<long long>(down) * stride + (column + at - down * width)] =
                from_f32<T>(number(codes[at / 2], at % 2, scale[at / SCALED]));
        }
        return;
    }
    const unsigned step_down = STEP / width, step_right = STEP % width, down = (column + threadIdx.x * WIDTH) / width;
    unsigned right = column + threadIdx.x * WIDTH - down * width;
    T* to = out + static_cast<long long>(down) * stride + right;
#pragma unroll
    for (int k = 0; k < RUNS; k++) {
        const int at = k * STEP + threadIdx.x * WIDTH;
        if (at >= count) break;
        float values[WIDTH];
#pragma unroll
        for (int i = 0; i < WIDTH; i++) values[i] = number(bytes[k].words[0], i, scale[at / SCALED]);
        store_run(to, values);
        to += STEP + static_cast<long long>(step_down) * (stride - cols);
        right += step_right;
        if (right >= width) {
            right -= width;
            to += stride - cols;
        }
    }
}
