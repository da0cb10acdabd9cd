// e4m3 with a scale for each row: widened to the type of computation, and made of activations.
//
// Bytes per value: widening composed of candle's operations takes 19 (through f32, twice), here 3. Quantising a row composed takes about
// 23, here 3. Time on a card: not measured yet.
#include "e4m3.cuh"

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
    uint64_t row = blockIdx.x;
    const T *x = (const T *)a.x + row * a.row;
    float most = 0;
    for (uint32_t i = 8 * threadIdx.x; i < a.d; i += 8 * FP8_THREADS) {
        float v[8];
        load8(x + i, v);
        most = largest8(v, most);
    }
    float scale = row_scale(most, reinterpret_cast<float *>(shared), a.scale + row);
    for (uint32_t i = 8 * threadIdx.x; i < a.d; i += 8 * FP8_THREADS) {
        float v[8];
        load8(x + i, v);
        store8_e4m3(a.y + row * a.d + i, v, scale);
    }
}
KERNELS(quantise_fp8, QuantiseArguments, FP8_THREADS)

struct ScaleArguments {
    const float *row;    // (rows)
    const float *column; // (d)
    const void *bias;    // (d), or null
    void *y;             // (rows, d): a product without its scales, and then with them
    uint32_t d, through_gelu;
};

// What cuBLASLt's epilogue leaves to do on cards where it takes one scale for a whole matrix only. Bytes per value: 4.
template <typename T> __device__ __forceinline__ void scale_products(const ScaleArguments &a) {
    uint32_t i = 8 * (blockIdx.y * FP8_THREADS + threadIdx.x);
    if (i >= a.d) return;
    T *y = (T *)a.y + (uint64_t)blockIdx.x * a.d + i;
    float scale = read(a.row + blockIdx.x), column[8], bias[8] = {}, v[8];
    load8(a.column + i, column);
    if (a.bias) load8((const T *)a.bias + i, bias);
    load8(y, v);
    for (int j = 0; j < 8; j++) {
        v[j] = v[j] * scale * column[j] + bias[j];
        if (a.through_gelu) v[j] = gelu(v[j]);
    }
    store8(y, v);
}
KERNELS(scale_products, ScaleArguments, FP8_THREADS)
