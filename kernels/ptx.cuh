// Every instruction that C++ has no name for, a function each, and nothing else. Kernels contain no assembly themselves.
//
// Fragments, as the PTX ISA has them ("Matrix Fragments for mma.m16n8k16"). lane = 4·g + t; a register holds two numbers of
// 16 bits, the lower column (or k) in the lower half.
//   A (16, 16)  a0: row g,   columns 2t, 2t+1      a1: row g+8, the same columns
//               a2: row g,   columns 2t+8, 2t+9    a3: row g+8, the same columns
//   B (16, 8)   b0: rows 2t, 2t+1 of column g      b1: rows 2t+8, 2t+9 of column g
//   C (16, 8)   c0, c1: row g, columns 2t, 2t+1    c2, c3: row g+8, the same columns
// The accumulator of one product, rounded in pairs, is the A of the next: a0 = (c0, c1), a1 = (c2, c3).

#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

// The shared memory whose size is given at the launch.
#define DYNAMIC_SHARED(type, name) extern __shared__ __align__(128) type name[]

// The address of shared memory, as the instructions below take it.
__device__ __forceinline__ unsigned shared_address(const void* shared) {
    return static_cast<unsigned>(__cvta_generic_to_shared(shared));
}

// A number at such an address.
__device__ __forceinline__ float load_shared(unsigned address) {
    float value;
    asm volatile("ld.shared.f32 %0, [%1];" : "=f"(value) : "r"(address));
    return value;
}

// Matrices of 8 rows of 16 bytes. Lane l gives the (16-byte aligned) address of row l % 8 of matrix l / 8; register i holds, of
// matrix i, the two numbers 2t, 2t+1 of row g.
__device__ __forceinline__ void ldmatrix_x4(unsigned (&r)[4], unsigned address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(address) : "memory");
}

// The same for two matrices: lanes 0 to 15 give the addresses.
__device__ __forceinline__ void ldmatrix_x2(unsigned (&r)[2], unsigned address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
                 : "=r"(r[0]), "=r"(r[1]) : "r"(address) : "memory");
}

// Transposed: register i holds, of matrix i, the numbers of rows 2t, 2t+1 in column g.
__device__ __forceinline__ void ldmatrix_x4_transposed(unsigned (&r)[4], unsigned address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(address) : "memory");
}

__device__ __forceinline__ void ldmatrix_x2_transposed(unsigned (&r)[2], unsigned address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
                 : "=r"(r[0]), "=r"(r[1]) : "r"(address) : "memory");
}

// c += a·b for one 16×8 tile over 16 values of k; T says what the 16 bits are: __half or __nv_bfloat16. compute_75 has only
// half of the depth, whose fragments are the halves of these.
template <typename T>
__device__ __forceinline__ void mma_m16n8k16(float (&c)[4], const unsigned (&a)[4], const unsigned (&b)[2]);

template <>
__device__ __forceinline__ void mma_m16n8k16<__half>(float (&c)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
#if __CUDA_ARCH__ >= 800
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
#pragma unroll
    for (int half = 0; half < 2; half++) {
        asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
            : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
            : "r"(a[2 * half]), "r"(a[2 * half + 1]), "r"(b[half]));
    }
#endif
}

#if __CUDA_ARCH__ >= 800
template <>
__device__ __forceinline__ void mma_m16n8k16<__nv_bfloat16>(float (&c)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
#endif

// Copies 16 aligned bytes to shared memory behind the thread's back, or writes zeros where `valid` is false, without reading
// `source`. Done after a commit and a wait (and, for other threads, a barrier). compute_75 copies at once, through registers.
__device__ __forceinline__ void cp_async_16(unsigned destination, const void* source, bool valid) {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(destination), "l"(__cvta_generic_to_global(source)),
                 "r"(valid ? 16 : 0) : "memory");
#else
    uint4 bits = valid ? *static_cast<const uint4*>(source) : make_uint4(0, 0, 0, 0);
    asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(destination), "r"(bits.x), "r"(bits.y), "r"(bits.z), "r"(bits.w)
                 : "memory");
#endif
}

// The same for the first `bytes` of 16, 0 to 16; the others become zeros and aren't read. Only from compute_80 on.
#if __CUDA_ARCH__ >= 800
__device__ __forceinline__ void cp_async_up_to_16(unsigned destination, const void* source, int bytes) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(destination), "l"(__cvta_generic_to_global(source)), "r"(bytes)
                 : "memory");
}
#endif

// The same as cp_async_16 for 4 aligned bytes.
__device__ __forceinline__ void cp_async_4(unsigned destination, const void* source, bool valid) {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(destination), "l"(__cvta_generic_to_global(source)),
                 "r"(valid ? 4 : 0) : "memory");
#else
    unsigned bits = valid ? *static_cast<const unsigned*>(source) : 0;
    asm volatile("st.shared.b32 [%0], %1;" ::"r"(destination), "r"(bits) : "memory");
#endif
}

// Closes a group of the copies begun since the last one (there may be none).
__device__ __forceinline__ void cp_async_commit() {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits until at most the N latest groups of this thread are still under way.
template <int N>
__device__ __forceinline__ void cp_async_wait() {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
#endif
}

// 2^x in one instruction, to about 2 units in the last place; results below 2^-126 are 0, 2^-inf is 0.
__device__ __forceinline__ float exp2_approximate(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
