// GGUF's blocks, widened to the type of computation before a product.
//
// Bytes per value (Q4_K, to 16 bits): composed of candle's operations 10.6 (f32 written, read and rounded), here 2.6. Time on
// a card: not measured yet.
#include "blocks.cuh"

struct BlocksArguments {
    const uint8_t *x; // blocks, one after another
    void *y;          // (n)
    uint64_t n;       // a multiple of the values of a block
};

constexpr int BLOCKS_THREADS = 256;
// Values of a thread block: of any format whole blocks, and whole words of 16 bytes.
constexpr int BLOCKS_CHUNK = 8 * BLOCKS_THREADS;

template <typename T, typename Format> __device__ __forceinline__ void widen_blocks(const BlocksArguments &a) {
    constexpr uint32_t BYTES = BLOCKS_CHUNK / Format::VALUES * Format::BYTES;
    static_assert(BLOCKS_CHUNK % Format::VALUES == 0 && BYTES % 16 == 0, "chunks begin with a block and at a word");
    DYNAMIC_SHARED(shared);
    uint64_t from = (uint64_t)blockIdx.x * BLOCKS_CHUNK, i = 8 * threadIdx.x;
    const uint8_t *x = a.x + (uint64_t)blockIdx.x * BYTES;
    uint32_t left = (uint32_t)((a.n - from < BLOCKS_CHUNK ? a.n - from : BLOCKS_CHUNK) / Format::VALUES) * Format::BYTES;
    for (uint32_t at = 16 * threadIdx.x; at < left; at += 16 * BLOCKS_THREADS) {
        if (at + 16 <= left) {
            *reinterpret_cast<Words *>(shared + at) = read(reinterpret_cast<const Words *>(x + at));
        } else {
            for (; at < left; at += 2) *reinterpret_cast<uint16_t *>(shared + at) = read(reinterpret_cast<const uint16_t *>(x + at));
        }
    }
    __syncthreads();
    if (from + i >= a.n) return;
    float v[8];
    Format::decode(shared + i / Format::VALUES * Format::BYTES, i % Format::VALUES, v);
    store8((T *)a.y + from + i, v);
}

#define BLOCKS(name, ...) \
    template <typename T> __device__ __forceinline__ void widen_##name(const BlocksArguments &a) { widen_blocks<T, __VA_ARGS__>(a); } \
    KERNELS(widen_##name, BlocksArguments, BLOCKS_THREADS)
FORMATS(BLOCKS)
