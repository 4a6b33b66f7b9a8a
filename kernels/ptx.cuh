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

__device__ __forceinline__ void store_shared(unsigned address, unsigned short bits) {
    asm volatile("st.shared.u16 [%0], %1;" ::"r"(address), "h"(bits) : "memory");
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

// Waits for all copies of this thread, committed or not.
__device__ __forceinline__ void cp_async_wait_all() {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.wait_all;" ::: "memory");
#endif
}

// 2^x in one instruction, to about 2 units in the last place; results below 2^-126 are 0, 2^-inf is 0.
__device__ __forceinline__ float exp2_approximate(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// ---- Compute capability 9.0 alone (sm_90a)

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

// A barrier in shared memory that counts arrivals; a phase ends with the last of `count`.
__device__ __forceinline__ void barrier_init(unsigned barrier, int count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count) : "memory");
}

__device__ __forceinline__ void barrier_arrive(unsigned barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// This thread arrives once all copies that it began before are done.
__device__ __forceinline__ void barrier_arrive_after_copies(unsigned barrier) {
    asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(barrier) : "memory");
}

// Waits for the end of a phase; they are numbered 0, 1, 0, 1 …
__device__ __forceinline__ void barrier_wait(unsigned barrier, unsigned parity) {
    unsigned done;
    do {
        asm volatile("{\n.reg .pred done;\nmbarrier.try_wait.parity.shared::cta.b64 done, [%1], %2;\nselp.b32 %0, 1, 0, done;\n}"
                     : "=r"(done) : "r"(barrier), "r"(parity) : "memory");
    } while (!done);
}

// What threads wrote to shared memory becomes visible to the tensor cores.
__device__ __forceinline__ void fence_for_tensor_cores() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Registers of each thread of a group of 4 warps from here on.
template <int REGISTERS>
__device__ __forceinline__ void give_registers_back() { asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(REGISTERS)); }
template <int REGISTERS>
__device__ __forceinline__ void take_registers() { asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(REGISTERS)); }

// Products of a group of 4 warps ("wgmma"), which go on behind its back: between the fence and the end of the wait, nobody
// touches the registers of what was begun. Row r of a fragment of 64 rows belongs to warp r / 16; there it is as above.
__device__ __forceinline__ void group_products_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void group_products_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Waits until at most the N latest groups of products are still under way.
template <int N>
__device__ __forceinline__ void group_products_wait() { asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory"); }

// c (64, 8·TILES) = a·b, or += if `add`, over 16 values of k. Matrices in shared memory are given by descriptors ("Matrix
// Descriptor" in the PTX ISA): a (64, 16) row after row; b (16, 8·TILES) column after column, or if ROWS row after row.
template <typename T, bool ROWS, int TILES>
__device__ __forceinline__ void group_mma(float (&c)[TILES][4], unsigned long long a, unsigned long long b, bool add);
// The same with the fragments of a.
template <typename T, bool ROWS, int TILES>
__device__ __forceinline__ void group_mma(float (&c)[TILES][4], const unsigned (&a)[4], unsigned long long b, bool add);

#define SUM_4(c, i) "+f"(c[i][0]), "+f"(c[i][1]), "+f"(c[i][2]), "+f"(c[i][3])
#define SUM_32(c, i) SUM_4(c, i), SUM_4(c, i + 1), SUM_4(c, i + 2), SUM_4(c, i + 3), SUM_4(c, i + 4), SUM_4(c, i + 5), \
    SUM_4(c, i + 6), SUM_4(c, i + 7)

#define GROUP_MMA_64(T, TYPE, ROWS)                                                                                          \
    template <>                                                                                                              \
    __device__ __forceinline__ void group_mma<T, ROWS, 8>(float (&c)[8][4], unsigned long long a, unsigned long long b,      \
                                                           bool add) {                                                       \
        asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, %34, 0;\n"                                                        \
                     "wgmma.mma_async.sync.aligned.m64n64k16.f32." TYPE "." TYPE " {"                                        \
                     "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, "  \
                     "%22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, %32, %33, add, 1, 1, 0, %35;"                       \
                     "\n}"                                                                                                   \
                     : SUM_32(c, 0) : "l"(a), "l"(b), "r"(int(add)), "n"(int(ROWS)));                                        \
    }                                                                                                                        \
    template <>                                                                                                              \
    __device__ __forceinline__ void group_mma<T, ROWS, 8>(float (&c)[8][4], const unsigned (&a)[4], unsigned long long b,    \
                                                           bool add) {                                                       \
        asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, %37, 0;\n"                                                        \
                     "wgmma.mma_async.sync.aligned.m64n64k16.f32." TYPE "." TYPE " {"                                        \
                     "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, "  \
                     "%22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, {%32, %33, %34, %35}, %36, add, 1, 1, %38;"         \
                     "\n}"                                                                                                   \
                     : SUM_32(c, 0) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int(add)), "n"(int(ROWS)));    \
    }
GROUP_MMA_64(__half, "f16", false)
GROUP_MMA_64(__half, "f16", true)
GROUP_MMA_64(__nv_bfloat16, "bf16", false)
GROUP_MMA_64(__nv_bfloat16, "bf16", true)
#undef GROUP_MMA_64

#define GROUP_MMA_128(T, TYPE, ROWS)                                                                                         \
    template <>                                                                                                              \
    __device__ __forceinline__ void group_mma<T, ROWS, 16>(float (&c)[16][4], unsigned long long a, unsigned long long b,    \
                                                           bool add) {                                                       \
        asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, %66, 0;\n"                                                        \
                     "wgmma.mma_async.sync.aligned.m64n128k16.f32." TYPE "." TYPE " {"                                       \
                     "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, "  \
                     "%22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, "  \
                     "%42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, "  \
                     "%62, %63}, %64, %65, add, 1, 1, 0, %67;"                                                               \
                     "\n}"                                                                                                   \
                     : SUM_32(c, 0), SUM_32(c, 8) : "l"(a), "l"(b), "r"(int(add)), "n"(int(ROWS)));                          \
    }                                                                                                                        \
    template <>                                                                                                              \
    __device__ __forceinline__ void group_mma<T, ROWS, 16>(float (&c)[16][4], const unsigned (&a)[4], unsigned long long b,  \
                                                           bool add) {                                                       \
        asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, %69, 0;\n"                                                        \
                     "wgmma.mma_async.sync.aligned.m64n128k16.f32." TYPE "." TYPE " {"                                       \
                     "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, "  \
                     "%22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, "  \
                     "%42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, "  \
                     "%62, %63}, {%64, %65, %66, %67}, %68, add, 1, 1, %70;"                                                 \
                     "\n}"                                                                                                   \
                     : SUM_32(c, 0), SUM_32(c, 8) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int(add)), "n"(int(ROWS)));\
    }
GROUP_MMA_128(__half, "f16", false)
GROUP_MMA_128(__half, "f16", true)
GROUP_MMA_128(__nv_bfloat16, "bf16", false)
GROUP_MMA_128(__nv_bfloat16, "bf16", true)
#undef GROUP_MMA_128

#undef SUM_32
#undef SUM_4

#endif
