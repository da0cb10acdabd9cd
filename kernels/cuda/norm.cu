// Rows of tokens: x + gate * update, layer norm, scale and shift, and for a product in e4m3 its rows, in one pass.
//
// Bytes per value (16 bits): composed of candle's operations, the gate takes 10 (two reads and a write, a read and a write) and the
// norm about 60 (f32 copies in between); here 4 for the norm, 6 for the gate, 8 for both; to e4m3
// 3 instead of 7. Time on a card: not measured yet.
#include "e4m3.cuh"

struct NormArguments {
    const void *x;      // (b, l, d)
    const void *update; // (b, l, d) in one piece, or null
    const void *gate;   // (b, 1, d), if there is an update
    const void *scale;  // (b, 1, d), or null: the sum only
    const void *shift;  // (b, 1, d)
    void *sum;          // (b, l, d): x + gate * update, rounded; null without an update
    void *y;            // (b, l, d), null without a scale; e4m3 if there is a row_scale
    float *row_scale;   // (b, l), or null
    // In values: from one item of x to the next, from one token to the next, and from one item's gate, scale and shift to the next.
    uint64_t x_item, x_token, gate_item, scale_item, shift_item;
    uint32_t l, d;
    float eps;
};

constexpr int NORM_VECTORS = 4; // of eight values, that a thread keeps in registers
constexpr int NORM_THREADS = 1024;

template <typename T> __device__ __forceinline__ void norm(const NormArguments &a) {
    DYNAMIC_SHARED(shared);
    float *sums = reinterpret_cast<float *>(shared);
    uint32_t row = blockIdx.x, item = row / a.l;
    const T *x = (const T *)a.x + item * a.x_item + row % a.l * a.x_token;
    uint64_t place = (uint64_t)row * a.d;

    float v[NORM_VECTORS][8], total = 0;
#pragma unroll
    for (int n = 0; n < NORM_VECTORS; n++) {
        uint32_t i = 8 * (n * blockDim.x + threadIdx.x);
        if (i >= a.d) continue;
        load8(x + i, v[n]);
        if (a.update) {
            float update[8], gate[8];
            load8((const T *)a.update + place + i, update);
            load8((const T *)a.gate + item * a.gate_item + i, gate);
            // The norm is that of the sum as it is kept, not of a finer one.
            for (int j = 0; j < 8; j++) v[n][j] = rounded<T>(v[n][j] + gate[j] * update[j]);
            store8((T *)a.sum + place + i, v[n]);
        }
        for (int j = 0; j < 8; j++) total += v[n][j];
    }
    if (!a.scale) return;

    float mean = block_sum(total, sums) / a.d, squares = 0;
#pragma unroll
    for (int n = 0; n < NORM_VECTORS; n++) {
        if (8 * (n * blockDim.x + threadIdx.x) >= a.d) continue;
        for (int j = 0; j < 8; j++) squares += (v[n][j] - mean) * (v[n][j] - mean);
    }
    float factor = 1.0f / sqrtf(block_sum(squares, sums) / a.d + a.eps), most = 0;
#pragma unroll
    for (int n = 0; n < NORM_VECTORS; n++) {
        uint32_t i = 8 * (n * blockDim.x + threadIdx.x);
        if (i >= a.d) continue;
        float scale[8], shift[8];
        load8((const T *)a.scale + item * a.scale_item + i, scale);
        load8((const T *)a.shift + item * a.shift_item + i, shift);
        for (int j = 0; j < 8; j++) v[n][j] = (v[n][j] - mean) * factor * (1.0f + scale[j]) + shift[j];
        if (!a.row_scale) {
            store8((T *)a.y + place + i, v[n]);
            continue;
        }
        // e4m3 of what the norm is without it.
        for (int j = 0; j < 8; j++) v[n][j] = rounded<T>(v[n][j]);
        most = largest8(v[n], most);
    }
    if (!a.row_scale) return;
    float scale = row_scale(most, sums, a.row_scale + row);
#pragma unroll
    for (int n = 0; n < NORM_VECTORS; n++) {
        uint32_t i = 8 * (n * blockDim.x + threadIdx.x);
        if (i < a.d) store8_e4m3((uint8_t *)a.y + place + i, v[n], scale);
    }
}
KERNELS(norm, NormArguments, NORM_THREADS)

struct RmsArguments {
    const void *x;      // (rows, d)
    const float *scale; // (d)
    void *y;            // (rows, d)
    uint64_t row;       // in values, from one row of x to the next
    uint32_t d;
    float eps;
};

// x / sqrt(mean(x^2) + eps) * scale: T5's norms. Bytes per value: composed about 50, here 4.
template <typename T> __device__ __forceinline__ void rms(const RmsArguments &a) {
    DYNAMIC_SHARED(shared);
    const T *x = (const T *)a.x + blockIdx.x * a.row;
    float v[NORM_VECTORS][8], squares = 0;
#pragma unroll
    for (int n = 0; n < NORM_VECTORS; n++) {
        uint32_t i = 8 * (n * blockDim.x + threadIdx.x);
        if (i >= a.d) continue;
        load8(x + i, v[n]);
        for (int j = 0; j < 8; j++) squares += v[n][j] * v[n][j];
    }
    float factor = 1.0f / sqrtf(block_sum(squares, reinterpret_cast<float *>(shared)) / a.d + a.eps);
#pragma unroll
    for (int n = 0; n < NORM_VECTORS; n++) {
        uint32_t i = 8 * (n * blockDim.x + threadIdx.x);
        if (i >= a.d) continue;
        float scale[8];
        load8(a.scale + i, scale);
        for (int j = 0; j < 8; j++) v[n][j] *= factor * scale[j];
        store8((T *)a.y + (uint64_t)blockIdx.x * a.d + i, v[n]);
    }
}
KERNELS(rms, RmsArguments, NORM_THREADS)
