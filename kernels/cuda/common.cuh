// What the kernels share. Every kernel is a template over the type of its values, takes one struct of arguments, and is listed by
// KERNEL. The same text is compiled by nvcc for cards and, with emulator.hpp, by a C++ compiler for tests on a processor, where
// every access to memory is checked; so kernels touch global memory through load and store only.
#pragma once

#include <stdint.h>

#ifdef DARKROOM_EMULATOR
#include "emulator.hpp"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>

typedef __nv_bfloat16 bf16;
typedef __half f16;

#define KERNEL(name, Arguments, threads, body) \
    extern "C" __global__ void __launch_bounds__(threads) name(const Arguments a) { body(a); }
#define DYNAMIC_SHARED(name) extern __shared__ __align__(16) unsigned char name[]

__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ float widen(bf16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float widen(f16 x) { return __half2float(x); }
__device__ __forceinline__ void round_to(float x, float &y) { y = x; }
__device__ __forceinline__ void round_to(float x, bf16 &y) { y = __float2bfloat16_rn(x); }
__device__ __forceinline__ void round_to(float x, f16 &y) { y = __float2half_rn(x); }

template <typename V> __device__ __forceinline__ V read(const V *p) { return *p; }
template <typename V> __device__ __forceinline__ void write(V *p, V value) { *p = value; }

// Two 16-bit values of A or B, and what a warp makes of them: D (16 x 8, f32) += A (16 x 16) B (16 x 8).
__device__ __forceinline__ void multiply(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], bf16) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
__device__ __forceinline__ void multiply(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], f16) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Four 8 x 8 matrices of 16-bit values from shared memory, lane 8 i + j naming row j of matrix i. Lane l gets of each the values
// 2 (l % 4) and the next of row l / 4; transposed, of column l / 4.
__device__ __forceinline__ void load_matrices(uint32_t (&r)[4], const void *row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"((uint32_t)__cvta_generic_to_shared(row)) : "memory");
}
__device__ __forceinline__ void load_matrices_transposed(uint32_t (&r)[4], const void *row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"((uint32_t)__cvta_generic_to_shared(row)) : "memory");
}

// 16 bytes on their way from global to shared memory; zeros if `from` is not to be read.
__device__ __forceinline__ void copy_async(void *to, const void *from, bool valid) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
                 :: "r"((uint32_t)__cvta_generic_to_shared(to)), "l"(from), "r"(valid ? 16 : 0) : "memory");
}
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most N groups are still on their way.
template <int N> __device__ __forceinline__ void wait_for_copies() { asm volatile("cp.async.wait_group %0;" :: "n"(N) : "memory"); }
#endif

template <typename T> __device__ __forceinline__ float rounded(float x) {
    T y;
    round_to(x, y);
    return widen(y);
}

// 16 bytes, and eight values in as many accesses of 16 bytes as they need: addresses must be multiples of 16.
struct alignas(16) Words { uint32_t w[4]; };

template <typename T> struct alignas(16) Eight { T v[8]; };

template <typename T> __device__ __forceinline__ void load8(const T *p, float (&x)[8]) {
    constexpr int PIECES = sizeof(Eight<T>) / sizeof(Words);
    Words words[PIECES];
    Eight<T> eight;
    for (int i = 0; i < PIECES; i++) words[i] = read(reinterpret_cast<const Words *>(p) + i);
    memcpy(&eight, words, sizeof eight);
    for (int i = 0; i < 8; i++) x[i] = widen(eight.v[i]);
}

template <typename T> __device__ __forceinline__ void store8(T *p, const float (&x)[8]) {
    constexpr int PIECES = sizeof(Eight<T>) / sizeof(Words);
    Words words[PIECES];
    Eight<T> eight;
    for (int i = 0; i < 8; i++) round_to(x[i], eight.v[i]);
    memcpy(words, &eight, sizeof eight);
    for (int i = 0; i < PIECES; i++) write(reinterpret_cast<Words *>(p) + i, words[i]);
}

// Two values of 16 bits as one word, as the matrix units take them.
template <typename T> __device__ __forceinline__ uint32_t both(T low, T high) {
    static_assert(sizeof(T) == 2, "two halves of a word");
    T pair[2] = {low, high};
    uint32_t word;
    memcpy(&word, pair, sizeof word);
    return word;
}

template <typename T> __device__ __forceinline__ uint32_t both_rounded(float low, float high) {
    T pair[2];
    round_to(low, pair[0]);
    round_to(high, pair[1]);
    return both(pair[0], pair[1]);
}

// The sum over all lanes, in every lane, in an order that is always the same.
__device__ __forceinline__ float warp_sum(float x) {
    for (int lane = 16; lane > 0; lane /= 2) x += __shfl_xor_sync(0xffffffffu, x, lane);
    return x;
}

// The sum over the block's threads, in every thread. `sums` is shared memory for one value of each warp; blocks are of whole warps.
__device__ __forceinline__ float block_sum(float x, float *sums) {
    x = warp_sum(x);
    __syncthreads(); // of an earlier sum, all have read
    if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = x;
    __syncthreads();
    float total = 0;
    for (int i = 0; i < (int)(blockDim.x / 32); i++) total += sums[i];
    return total;
}

// 2^x by the card's own instruction, to two units in the last place; 0 for what is less than a normal number.
__device__ __forceinline__ float power_of_two(float x) {
#ifdef __CUDA_ARCH__
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
#else
    return exp2f(x);
#endif
}

// a / b to two units in the last place, without the branch and the steps that the exact quotient takes; b may be infinite.
__device__ __forceinline__ float quotient(float a, float b) {
#ifdef __CUDA_ARCH__
    return __fdividef(a, b);
#else
    return a / b;
#endif
}

__device__ __forceinline__ float gelu(float x) {
    // 0.5 x (1 + tanh u) written as x / (1 + exp(-2 u)).
    float u = 0.7978845608028654f * (x + 0.044715f * x * x * x);
    return quotient(x, 1.0f + expf(-2.0f * u));
}

__device__ __forceinline__ float silu(float x) { return quotient(x, 1.0f + expf(-x)); }

// The kernel for each type of values, named after it.
#define KERNELS(name, Arguments, threads) \
    KERNEL(name##_f32, Arguments, threads, name<float>) \
    KERNEL(name##_f16, Arguments, threads, name<f16>) \
    KERNEL(name##_bf16, Arguments, threads, name<bf16>)
