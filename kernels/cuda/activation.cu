// GELU (tanh form) of one tensor's rows, beside rows of another: the single block's [attention | mlp], without a concatenation.
//
// Bytes per value (16 bits): composed 8 (GELU, then the copy of both parts); here 4. Time on a card: not measured yet.
#include "common.cuh"

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
