// GELU (tanh form) of one tensor's rows, beside rows of another: the single block's [attention | mlp], without a concatenation.
//
// Bytes per value (16 bits): composed 8 (GELU, then the copy of both parts); here 4. Time on a card: not measured yet.
#include "e4m3.cuh"

struct GeluArguments {
    const void *beside; // (rows, width), or null
    const void *x;      // (rows, d)
    void *y;            // (rows, width + d)
    uint64_t beside_row, x_row; // in values, from one row to the next
    uint32_t width, d;
};

constexpr int GELU_THREADS = 256;

template <typename T> __device__ __forceinline__ void gelu_beside(const GeluArguments &a) {
    uint32_t i = 8 * (blockIdx.y * GELU_THREADS + threadIdx.x), all = a.width + a.d;
    if (i >= all) return;
    uint64_t row = blockIdx.x;
    float v[8];
    if (i < a.width) {
        load8((const T *)a.beside + row * a.beside_row + i, v);
    } else {
        load8((const T *)a.x + row * a.x_row + (i - a.width), v);
        for (int j = 0; j < 8; j++) v[j] = gelu(v[j]);
    }
    store8((T *)a.y + row * all + i, v);
}
KERNELS(gelu_beside, GeluArguments, GELU_THREADS)

// The same as rows of e4m3. Bytes per value: by way of the rows above 7, here 3.
struct GeluRowsArguments {
    GeluArguments to; // y is e4m3
    float *scale;     // (rows)
};

constexpr int GELU_VECTORS = 4; // of eight values, that a thread keeps in registers
constexpr int GELU_ROW_THREADS = 1024;

template <typename T> __device__ __forceinline__ void gelu_beside_fp8(const GeluRowsArguments &arguments) {
    DYNAMIC_SHARED(shared);
    const GeluArguments &a = arguments.to;
    uint32_t all = a.width + a.d;
    uint64_t row = blockIdx.x;
    float v[GELU_VECTORS][8], most = 0;
#pragma unroll
    for (int n = 0; n < GELU_VECTORS; n++) {
        uint32_t i = 8 * (n * blockDim.x + threadIdx.x);
        if (i >= all) continue;
        if (i < a.width) {
            load8((const T *)a.beside + row * a.beside_row + i, v[n]);
        } else {
            load8((const T *)a.x + row * a.x_row + (i - a.width), v[n]);
            for (int j = 0; j < 8; j++) v[n][j] = rounded<T>(gelu(v[n][j]));
        }
        most = largest8(v[n], most);
    }
    float scale = row_scale(most, reinterpret_cast<float *>(shared), arguments.scale + row);
#pragma unroll
    for (int n = 0; n < GELU_VECTORS; n++) {
        uint32_t i = 8 * (n * blockDim.x + threadIdx.x);
        if (i < all) store8_e4m3((uint8_t *)a.y + row * all + i, v[n], scale);
    }
}
KERNELS(gelu_beside_fp8, GeluRowsArguments, GELU_ROW_THREADS)
