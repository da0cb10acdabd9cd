// fp8 e4m3, and rows of it with a scale for each.
#pragma once
#include "common.cuh"

constexpr float LARGEST_E4M3 = 448.0f;

// An e4m3 has the layout of an f16's upper bits, with an exponent that is 8 less.
__device__ __forceinline__ float from_e4m3(uint32_t byte) {
    uint32_t bits = (byte & 0x80) << 24 | (byte & 0x7f) << 20;
    float x;
    memcpy(&x, &bits, sizeof x);
    // As a float its exponent is 120 too small; subnormal numbers come out right as well.
    return (byte & 0x7f) == 0x7f ? NAN : x * 1.329227995784916e36f; // 2^120
}

// To the nearest, ties to even, and at most 448 in size.
__device__ __forceinline__ uint32_t to_e4m3(float x) {
    uint32_t bits, byte;
    memcpy(&bits, &x, sizeof bits);
    float size = fabsf(x);
    if (!(size <= LARGEST_E4M3)) byte = size > LARGEST_E4M3 ? 0x7e : 0x7f;
    else if (size < 0.015625f) byte = (uint32_t)rintf(size * 512.0f); // below 2^-6 in steps of 2^-9
    else byte = (((bits & 0x7fffffff) + 0x7ffff + (bits >> 20 & 1)) >> 20) - (120 << 3);
    return byte | (bits >> 24 & 0x80);
}

// Of two values, the first in the lower byte. Matrix units for e4m3 come with an instruction for this.
__device__ __forceinline__ uint32_t both_to_e4m3(float low, float high) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
    uint16_t both;
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(both) : "f"(high), "f"(low));
    return both;
#else
    return to_e4m3(low) | to_e4m3(high) << 8;
#endif
}

// The size of the largest of eight values, if it is more than `most`.
__device__ __forceinline__ float largest8(const float (&v)[8], float most) {
    for (int j = 0; j < 8; j++) most = fmaxf(most, fabsf(v[j]));
    return most;
}

// The scale of the row that a block works on, in every thread, and written to `scale`: `most` is the largest size of a thread's values.
// `shared` has room for a value of each warp.
__device__ __forceinline__ float row_scale(float most, float *shared, float *scale) {
    for (int apart = 16; apart > 0; apart /= 2) most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, apart));
    __syncthreads(); // what was there before, all have read
    if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = most;
    __syncthreads();
    for (int i = 0; i < (int)(blockDim.x / 32); i++) most = fmaxf(most, shared[i]);
    // A row of zeros has any scale but 0. A product, as candle makes of the division: values in the middle of two go the same way.
    float of_row = fmaxf(most * (1.0f / LARGEST_E4M3), 1.17549435e-38f);
    if (threadIdx.x == 0) write(scale, of_row);
    return of_row;
}

__device__ __forceinline__ void store8_e4m3(uint8_t *p, const float (&v)[8], float scale) {
    uint64_t eight = 0;
    for (int j = 0; j < 8; j += 2) eight |= (uint64_t)both_to_e4m3(v[j] / scale, v[j + 1] / scale) << (8 * j);
    write(reinterpret_cast<uint64_t *>(p), eight);
}
