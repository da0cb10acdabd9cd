// Group norm, affine map and SiLU of a picture's activations: one pass for the statistics, one to apply them.
//
// Bytes per value (16 bits): composed about 40 (f32 copies of every stage); here 6. Time on a card: not measured yet.
#include "common.cuh"

struct GroupNormArguments {
    const void *x;  // (b, c, area)
    const float *weight, *bias; // (c)
    float *parts;   // (b groups, blocks, 3): count, mean and squared distance from it of each block's values
    void *y;        // as x
    uint32_t c, groups, blocks, silu;
    uint64_t area;
    float eps;
};

constexpr int GROUP_NORM_THREADS = 256;

// The statistics of two sets as those of one (Chan et al.), so that large means do not swallow small distances.
__device__ __forceinline__ void join(float &count, float &mean, float &squares, float other, float other_mean, float other_squares) {
    float all = count + other;
    if (other == 0) return;
    float apart = other_mean - mean;
    mean += apart * (other / all);
    squares += other_squares + apart * apart * (count * (other / all));
    count = all;
}

// The values of block `blockIdx.x` of group `blockIdx.y`: eight at a time, every `blocks` times.
template <typename T> __device__ __forceinline__ void group_norm_parts(const GroupNormArguments &a) {
    DYNAMIC_SHARED(shared);
    float *sums = reinterpret_cast<float *>(shared);
    uint64_t size = a.c / a.groups * a.area, stride = 8ull * GROUP_NORM_THREADS * a.blocks;
    const T *x = (const T *)a.x + blockIdx.y * size;
    float count = 0, mean = 0, squares = 0;
    for (uint64_t i = 8ull * (blockIdx.x * GROUP_NORM_THREADS + threadIdx.x); i < size; i += stride) {
        float v[8], centre = 0, apart = 0;
        load8(x + i, v);
        for (int j = 0; j < 8; j++) centre += v[j] / 8;
        for (int j = 0; j < 8; j++) apart += (v[j] - centre) * (v[j] - centre);
        join(count, mean, squares, 8, centre, apart);
    }
    // All threads' together: distances are taken from the mean of all.
    float all = block_sum(count, sums), centre = block_sum(count * mean, sums) / fmaxf(all, 1);
    float apart = block_sum(squares + count * (mean - centre) * (mean - centre), sums);
    if (threadIdx.x == 0) {
        float *part = a.parts + 3 * ((uint64_t)blockIdx.y * a.blocks + blockIdx.x);
        write(part, all);
        write(part + 1, centre);
        write(part + 2, apart);
    }
}

template <typename T> __device__ __forceinline__ void group_norm_apply(const GroupNormArguments &a) {
    DYNAMIC_SHARED(shared);
    float *statistics = reinterpret_cast<float *>(shared); // the group's mean and factor
    if (threadIdx.x == 0) {
        // One thread joins the few parts in their order, so that all blocks agree.
        float count = 0, mean = 0, squares = 0;
        for (uint32_t i = 0; i < a.blocks; i++) {
            const float *part = a.parts + 3 * ((uint64_t)blockIdx.y * a.blocks + i);
            join(count, mean, squares, read(part), read(part + 1), read(part + 2));
        }
        statistics[0] = mean;
        statistics[1] = 1.0f / sqrtf(squares / count + a.eps);
    }
    __syncthreads();
    float mean = statistics[0], factor = statistics[1];
    uint32_t per_group = a.c / a.groups, first = blockIdx.y % a.groups * per_group;
    uint64_t size = per_group * a.area, stride = 8ull * GROUP_NORM_THREADS * gridDim.x;
    const T *x = (const T *)a.x + blockIdx.y * size;
    T *y = (T *)a.y + blockIdx.y * size;
    for (uint64_t i = 8ull * (blockIdx.x * GROUP_NORM_THREADS + threadIdx.x); i < size; i += stride) {
        float v[8], scale = 0, shift = 0;
        load8(x + i, v);
        // Eight values are of one channel, except in pictures of odd sizes; dividing for each would take longer than reading it.
        bool one_channel = a.area % 8 == 0;
        for (int j = 0; j < 8; j++) {
            if (j == 0 || !one_channel) {
                uint32_t channel = first + (uint32_t)((i + j) / a.area);
                scale = read(a.weight + channel) * factor;
                shift = read(a.bias + channel) - mean * scale;
            }
            v[j] = v[j] * scale + shift;
            if (a.silu) v[j] = silu(v[j]);
        }
        store8(y + i, v);
    }
}
KERNELS(group_norm_parts, GroupNormArguments, GROUP_NORM_THREADS)
KERNELS(group_norm_apply, GroupNormArguments, GROUP_NORM_THREADS)
