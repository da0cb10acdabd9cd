// e4m3 with a scale for each row: widened to the type of computation, and made of activations.
//
// Bytes per value: widening composed of candle's operations takes 19 (through f32, twice), here 3. Quantising a row composed takes about
// 23, here 3. Time on a card: not measured yet.
#include "common.cuh"

struct WidenArguments {
    const uint8_t *x;   // (rows, d) e4m3
    const float *scale; // (rows), or (1), or null
    void *y;            // (rows, d)
    uint32_t d, of_rows; // whether there is a scale for each row
};

struct QuantiseArguments {
    const void *x; // (rows, d)
    uint8_t *y;    // (rows, d) e4m3
    float *scale;  // (rows)
    uint64_t row;  // in values, from one row of x to the next
    uint32_t d;
};

constexpr int FP8_THREADS = 256;
constexpr float LARGEST_E4M3 = 448.0f;

// An e4m3 has the layout of an f16's upper bits, with an exponent that is 8 less.
__device__ __forceinline__ float from_e4m3(uint32_t byte) {
    uint32_t bits = (byte & 0x80) << 24 | (byte & 0x7f) << 20;
    float x;
    memcpy(&x, &bits, sizeof x);
    // As a float its exponent is 120 too small; subnormal numbers come out right as well.
    return (byte & 0x7f) == 0x7f ? NAN : x * 1.329227995784916e36f; // 2^120
}

// To the nearest, ties to even; |x| is at most 448.
__device__ __forceinline__ uint32_t to_e4m3(float x) {
    uint32_t bits, byte;
    memcpy(&bits, &x, sizeof bits);
    float size = fabsf(x);
    if (!(size <= LARGEST_E4M3)) byte = size > LARGEST_E4M3 ? 0x7e : 0x7f;
    else if (size < 0.015625f) byte = (uint32_t)rintf(size * 512.0f); // below 2^-6 in steps of 2^-9
    else byte = (((bits & 0x7fffffff) + 0x7ffff + (bits >> 20 & 1)) >> 20) - (120 << 3);
    return byte | (bits >> 24 & 0x80);
}

template <typename T> __device__ __forceinline__ void widen_fp8(const WidenArguments &a) {
    uint32_t i = 16 * (blockIdx.y * FP8_THREADS + threadIdx.x);
    if (i >= a.d) return;
    uint64_t row = blockIdx.x, at = row * a.d + i;
    float scale = a.scale ? read(a.scale + (a.of_rows ? row : 0)) : 1.0f;
    Words words = read(reinterpret_cast<const Words *>(a.x + at));
    for (int half = 0; half < 2; half++) {
        float v[8];
        for (int j = 0; j < 8; j++) v[j] = from_e4m3(words.w[2 * half + j / 4] >> (8 * (j % 4)) & 0xff) * scale;
        store8((T *)a.y + at + 8 * half, v);
    }
}
KERNELS(widen_fp8, WidenArguments, FP8_THREADS)

// A block for each row, which is read twice: the second time from the cache.
template <typename T> __device__ __forceinline__ void quantise_fp8(const QuantiseArguments &a) {
    DYNAMIC_SHARED(shared);
    float *largest = reinterpret_cast<float *>(shared);
    uint64_t row = blockIdx.x;
    const T *x = (const T *)a.x + row * a.row;
    float most = 0;
    for (uint32_t i = 8 * threadIdx.x; i < a.d; i += 8 * FP8_THREADS) {
        float v[8];
        load8(x + i, v);
        for (int j = 0; j < 8; j++) most = fmaxf(most, fabsf(v[j]));
    }
    for (int apart = 16; apart > 0; apart /= 2) most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, apart));
    if (threadIdx.x % 32 == 0) largest[threadIdx.x / 32] = most;
    __syncthreads();
    for (int i = 0; i < FP8_THREADS / 32; i++) most = fmaxf(most, largest[i]);
    // A row of zeros has any scale but 0. A product, as candle makes of the division: values in the middle of two go the same way.
    float scale = fmaxf(most * (1.0f / LARGEST_E4M3), 1.17549435e-38f);
    if (threadIdx.x == 0) write(a.scale + row, scale);
    for (uint32_t i = 8 * threadIdx.x; i < a.d; i += 8 * FP8_THREADS) {
        float v[8];
        load8(x + i, v);
        uint64_t eight = 0;
        for (int j = 0; j < 8; j++) eight |= (uint64_t)to_e4m3(fminf(fmaxf(v[j] / scale, -LARGEST_E4M3), LARGEST_E4M3)) << (8 * j);
        write(reinterpret_cast<uint64_t *>(a.y + row * a.d + i), eight);
    }
}
KERNELS(quantise_fp8, QuantiseArguments, FP8_THREADS)
