// Group norm, affine map and SiLU of pixels whose channels lie side by side: one pass for the statistics, one to apply them, and a small one
// over what the blocks of the first have found.
//
// Bytes per value (16 bits): composed about 40 (f32 copies of every stage); here 6. Time on a card: not measured yet.
#include "common.cuh"

struct GroupNormArguments {
    const void *x;  // (b, area, c); c is a multiple of 8 and at most 2048
    const float *weight, *bias; // (c)
    float *parts;   // (b, groups, blocks, 3): count, mean and squared distance from it of each block's values
    float *affine;  // (b, 2, c): what a channel's values are multiplied with, and what is added
    void *y;        // as x
    uint64_t area;  // pixels of a picture
    uint32_t pixels, blocks; // of a block, of a picture
    uint32_t c, groups, silu;
    float eps;
};

constexpr int GROUP_NORM_THREADS = 256;

// A thread has eight channels of every so manyth pixel of its block.
struct Share {
    uint32_t eights, apart, channel, slot; // of all channels; pixels between two of a thread; its first channel; its first pixel
    uint64_t first;                        // pixel of the block,
    uint32_t count;                        // and how many it has
    __device__ __forceinline__ explicit Share(const GroupNormArguments &a)
        : eights(a.c / 8), apart(GROUP_NORM_THREADS / eights), channel(8 * (threadIdx.x % eights)), slot(threadIdx.x / eights),
          first((uint64_t)blockIdx.x * a.pixels), count(a.area - first < a.pixels ? (uint32_t)(a.area - first) : a.pixels) {}
    // How many pixels the threads of a slot have. A few threads may have none.
    __device__ __forceinline__ uint32_t pixels_of(uint32_t slot) const {
        return slot < apart && slot < count ? (count - slot - 1) / apart + 1 : 0;
    }
};

template <typename T> __device__ __forceinline__ void group_norm_parts(const GroupNormArguments &a) {
    DYNAMIC_SHARED(shared);
    float *means = reinterpret_cast<float *>(shared), *squares = means + 8 * GROUP_NORM_THREADS; // of each slot's channels
    Share share(a);
    const T *x = (const T *)a.x + (blockIdx.y * a.area + share.first) * a.c + share.channel;
    // Distances are taken from the thread's first value: where that lies far out, the whole group's squares are as large as what is lost.
    float centre[8] = {}, sum[8] = {}, square[8] = {};
    uint32_t mine = share.pixels_of(share.slot);
    if (mine) load8(x + (uint64_t)share.slot * a.c, centre);
#pragma unroll 4
    for (uint32_t i = 1; i < mine; i++) {
        float v[8];
        load8(x + (share.slot + (uint64_t)i * share.apart) * a.c, v);
        for (int j = 0; j < 8; j++) {
            float apart = v[j] - centre[j];
            sum[j] += apart;
            square[j] += apart * apart;
        }
    }
    if (share.slot < share.apart)
        for (int j = 0; j < 8; j++) {
            float shift = mine ? sum[j] / mine : 0;
            means[share.slot * a.c + share.channel + j] = centre[j] + shift;
            squares[share.slot * a.c + share.channel + j] = fmaxf(square[j] - sum[j] * shift, 0);
        }
    __syncthreads();

    // A warp joins a group's channels and slots: all distances as from the mean of all (Chan et al.).
    uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32, of_group = a.c / a.groups, sets = of_group * share.apart;
    for (uint32_t group = warp; group < a.groups; group += GROUP_NORM_THREADS / 32) {
        float all = (float)of_group * share.count, mean = 0, distance = 0;
        for (uint32_t i = lane; i < sets; i += 32)
            mean += share.pixels_of(i / of_group) * means[i / of_group * a.c + group * of_group + i % of_group];
        mean = warp_sum(mean) / all;
        for (uint32_t i = lane; i < sets; i += 32) {
            uint32_t at = i / of_group * a.c + group * of_group + i % of_group;
            distance += squares[at] + share.pixels_of(i / of_group) * (means[at] - mean) * (means[at] - mean);
        }
        distance = warp_sum(distance);
        if (lane > 0) continue;
        float *part = a.parts + 3 * (((uint64_t)blockIdx.y * a.groups + group) * a.blocks + blockIdx.x);
        write(part, all);
        write(part + 1, mean);
        write(part + 2, distance);
    }
}

// One block for each group of each picture, which joins what all blocks have found in an order that is always the same.
__device__ __forceinline__ void group_norm_join(const GroupNormArguments &a) {
    DYNAMIC_SHARED(shared);
    float *sums = reinterpret_cast<float *>(shared);
    const float *parts = a.parts + 3 * ((uint64_t)blockIdx.y * a.groups + blockIdx.x) * a.blocks;
    float count = 0, mean = 0, squares = 0;
    for (uint32_t i = threadIdx.x; i < a.blocks; i += GROUP_NORM_THREADS) {
        count += read(parts + 3 * i);
        mean += read(parts + 3 * i) * read(parts + 3 * i + 1);
    }
    count = block_sum(count, sums);
    mean = block_sum(mean, sums) / count;
    for (uint32_t i = threadIdx.x; i < a.blocks; i += GROUP_NORM_THREADS) {
        float apart = read(parts + 3 * i + 1) - mean;
        squares += read(parts + 3 * i + 2) + read(parts + 3 * i) * apart * apart;
    }
    squares = block_sum(squares, sums);
    float factor = 1.0f / sqrtf(squares / count + a.eps);
    uint32_t of_group = a.c / a.groups;
    for (uint32_t i = threadIdx.x; i < of_group; i += GROUP_NORM_THREADS) {
        uint32_t channel = blockIdx.x * of_group + i;
        float scale = read(a.weight + channel) * factor, *affine = a.affine + 2ull * blockIdx.y * a.c + channel;
        write(affine, scale);
        write(affine + a.c, read(a.bias + channel) - mean * scale);
    }
}

template <typename T> __device__ __forceinline__ void group_norm_apply(const GroupNormArguments &a) {
    Share share(a);
    float scale[8], shift[8];
    load8(a.affine + 2ull * blockIdx.y * a.c + share.channel, scale);
    load8(a.affine + (2ull * blockIdx.y + 1) * a.c + share.channel, shift);
    uint32_t mine = share.pixels_of(share.slot);
    auto at = [&](uint32_t i) {
        return (blockIdx.y * a.area + share.first + share.slot + (uint64_t)i * share.apart) * a.c + share.channel;
    };
    // As far as the compiler knows a store may change what is loaded after it: loads come first, and wait together.
    constexpr int AT_ONCE = 4;
    for (uint32_t first = 0; first < mine; first += AT_ONCE) {
        float v[AT_ONCE][8];
#pragma unroll
        for (int n = 0; n < AT_ONCE; n++)
            if (first + n < mine) load8((const T *)a.x + at(first + n), v[n]);
#pragma unroll
        for (int n = 0; n < AT_ONCE; n++) {
            if (first + n >= mine) continue;
            for (int j = 0; j < 8; j++) {
                v[n][j] = v[n][j] * scale[j] + shift[j];
                if (a.silu) v[n][j] = silu(v[n][j]);
            }
            store8((T *)a.y + at(first + n), v[n]);
        }
    }
}
KERNELS(group_norm_parts, GroupNormArguments, GROUP_NORM_THREADS)
KERNEL(group_norm_join_f32, GroupNormArguments, GROUP_NORM_THREADS, group_norm_join)
KERNELS(group_norm_apply, GroupNormArguments, GROUP_NORM_THREADS)
