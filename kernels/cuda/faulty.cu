// What the emulator must find: a kernel that makes one mistake at a time. Only the emulator's own test runs it.
#include "common.cuh"

struct FaultyArguments {
    const float *x;
    float *y; // as many values as there are threads
    uint32_t mistake;
};

__device__ __forceinline__ void faulty_kernel(const FaultyArguments &a) {
    DYNAMIC_SHARED(shared);
    float *values = reinterpret_cast<float *>(shared); // one for each thread
    uint32_t i = threadIdx.x, n = blockDim.x;
    switch (a.mistake) {
    case 1: write(a.y + i + 1, 0.0f); return;                        // beyond the output
    case 2: write(const_cast<float *>(a.x) + i, 0.0f); return;       // an input is written
    case 3: write(reinterpret_cast<Words *>(a.y + 1), Words{}); return; // 16 bytes at a multiple of 4
    case 4: if (i < 32) return; __syncthreads(); return;             // a warp does not come to the barrier
    case 5: if (i % 32 > 0) warp_sum(1); return;                     // a lane does not come to the sum
    case 6: values[n + i] = 0; return;                               // beyond shared memory
    case 7: if (i % 2) write(a.y + i, 0.0f); return;                 // half of the output
    case 8: write(a.y + i, values[i]); return;                       // shared memory that nobody wrote
    }
    if (a.mistake == 9) { // a copy that nobody waits for
        if (i % 4 == 0) copy_async(values + i, a.x + i, true);
        commit_copies();
    } else {
        values[i] = read(a.x + i);
    }
    if (a.mistake != 10) __syncthreads(); // else a warp reads what another has not written yet
    float sum = values[(i + 32) % n];
    if (a.mistake != 11) __syncthreads(); // else a warp writes what another has not read yet
    values[i] = -1;
    write(a.y + i, sum);
}
KERNEL(faulty_f32, FaultyArguments, 128, faulty_kernel)
