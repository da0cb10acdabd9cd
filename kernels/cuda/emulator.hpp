// A stand-in for a card: runs kernels on a processor, one block after another, its threads as fibers in an order drawn at random; warps
// run ahead of each other, so that a missing barrier shows. Of kernels of ours, reads and writes of global memory outside the buffers that
// a launch names, misaligned accesses, and barriers that not all threads reach are errors; shared memory is all NaN when a block begins.
// They use dynamic shared memory only. Speed matters little here: it is for tests.
#pragma once

#ifdef __APPLE__
#define _XOPEN_SOURCE 600 // for ucontext.h
#define _DARWIN_C_SOURCE
#endif

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>

#include <algorithm>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#define __device__
#define __host__
#define __forceinline__ inline
#define __restrict__
#define __launch_bounds__(...)
#define DYNAMIC_SHARED(name) unsigned char *name = emulator::shared()

struct bf16 { uint16_t bits; };
struct f16 { uint16_t bits; };

inline float widen(float x) { return x; }
inline float widen(f16 x) {
    int exponent = x.bits >> 10 & 31, mantissa = x.bits & 1023;
    float y = exponent == 31 ? (mantissa ? NAN : INFINITY)
            : exponent ? ldexpf((float)(1024 + mantissa), exponent - 25) : ldexpf((float)mantissa, -24);
    return x.bits >> 15 ? -y : y;
}
inline float widen(bf16 x) {
    uint32_t bits = (uint32_t)x.bits << 16;
    float y;
    memcpy(&y, &bits, 4);
    return y;
}
inline void round_to(float x, float &y) { y = x; }
inline void round_to(float x, f16 &y) {
    uint16_t sign = signbit(x) ? 0x8000 : 0;
    x = fabsf(x);
    if (x != x) y.bits = sign | 0x7e00;
    else if (x >= 65520.0f) y.bits = sign | 0x7c00;
    else if (x < 6.103515625e-05f) y.bits = sign | (uint16_t)rintf(x * 16777216.0f); // below 2^-14 in steps of 2^-24
    else {
        int exponent;
        float fraction = frexpf(x, &exponent); // 0.5 to 1
        // What rounds up to 2048 carries into the exponent.
        y.bits = sign | (uint16_t)(((exponent + 13) << 10) + (uint16_t)rintf(fraction * 2048.0f));
    }
}
inline void round_to(float x, bf16 &y) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    y.bits = x != x ? 0x7fc0 : (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
}

struct Dim3 { uint32_t x, y, z; };
extern thread_local Dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulator {

struct Fault : std::runtime_error { using std::runtime_error::runtime_error; };

unsigned char *shared();
[[noreturn]] void fault(const std::string &what);

enum class Trust {
    Nothing, // what a kernel of ours may not do is an error
    Threads, // blocks of any size, barriers without threads that have ended: all that CUDA allows
    All,     // as before, and no thread waits for another: they are run as a loop
};
// Runs a kernel over its whole grid. Returns what went wrong, or nothing.
std::string run(Dim3 grid, Dim3 block, size_t shared_bytes, void (*kernel)(const void *), const void *arguments, Trust trust, uint32_t seed);

// Where an argument points, and whether the kernel may write there.
struct Pointed { const void *at; bool writing; };
struct Kernel {
    void (*run)(const void *arguments);
    std::vector<Pointed> (*pointed)(const void *arguments);
};
// What `list` knows under this name, or null.
const Kernel *find(const char *name);
// Waits for all threads of the block.
void block_barrier();
// Waits for all lanes of the warp to do the same; then `then` is called with what each lane has given, which may write to it. Lanes that
// have ended or never were are null; a kernel of ours has none.
void collective(const char *what, void *mine, const std::function<void(void *const *)> &then);
// Errors unless a launch's buffer holds these bytes, at a multiple of `alignment`.
void check(const void *p, size_t bytes, size_t alignment, bool writing);
void start_copy(void *to, const void *from, bool valid);
void commit_copies();
void wait_for_copies(int still_running);

void list(const char *name, Kernel kernel);
struct Listed { Listed(const char *name, Kernel kernel) { list(name, kernel); } };
// Every word of a struct of arguments may be a pointer.
template <typename Arguments> std::vector<Pointed> words(const void *arguments) {
    std::vector<Pointed> all(sizeof(Arguments) / sizeof(void *));
    for (size_t i = 0; i < all.size(); i++) all[i] = {((const void *const *)arguments)[i], true};
    return all;
}

} // namespace emulator

#define KERNEL(name, Arguments, threads, body) \
    static void call_##name(const void *a) { \
        if (blockDim.x > (threads)) emulator::fault("more threads than the kernel is bound to"); \
        body(*(const Arguments *)a); \
    } \
    static emulator::Listed listed_##name(#name, {call_##name, emulator::words<Arguments>});

inline void __syncthreads() { emulator::block_barrier(); }
inline void __syncwarp() { emulator::collective("__syncwarp", nullptr, [](void *const *) {}); }

template <typename T> T __shfl_xor_sync(uint32_t, T x, int mask, int = 32) {
    T mine = x;
    emulator::collective("__shfl_xor_sync", &mine, [mask](void *const *lanes) {
        T all[32];
        for (int i = 0; i < 32; i++)
            if (lanes[i]) all[i] = *(T *)lanes[i];
        for (int i = 0; i < 32; i++)
            if (lanes[i] && lanes[i ^ mask]) *(T *)lanes[i] = all[i ^ mask];
    });
    return mine;
}

template <typename V> V read(const V *p) {
    emulator::check(p, sizeof *p, alignof(V), false);
    return *p;
}
template <typename V> void write(V *p, V value) {
    emulator::check(p, sizeof *p, alignof(V), true);
    *p = value;
}

template <typename T> float half_of(uint32_t word, int half) {
    uint16_t bits = word >> (16 * half);
    T x;
    memcpy(&x, &bits, 2);
    return widen(x);
}

template <typename T> void multiply(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], T) {
    struct Lane { float *d; const uint32_t *a, *b; } mine{d, a, b};
    emulator::collective("multiply", &mine, [](void *const *lanes) {
        float A[16][16], B[16][8];
        for (int l = 0; l < 32; l++) {
            const Lane &lane = *(Lane *)lanes[l];
            for (int r = 0; r < 4; r++)
                for (int h = 0; h < 2; h++) A[l / 4 + 8 * (r % 2)][2 * (l % 4) + h + 8 * (r / 2)] = half_of<T>(lane.a[r], h);
            for (int r = 0; r < 2; r++)
                for (int h = 0; h < 2; h++) B[2 * (l % 4) + h + 8 * r][l / 4] = half_of<T>(lane.b[r], h);
        }
        for (int l = 0; l < 32; l++)
            for (int i = 0; i < 4; i++) {
                int row = l / 4 + 8 * (i / 2), column = 2 * (l % 4) + i % 2;
                float sum = ((Lane *)lanes[l])->d[i];
                for (int k = 0; k < 16; k++) sum += A[row][k] * B[k][column];
                ((Lane *)lanes[l])->d[i] = sum;
            }
    });
}

inline void load_matrices_as(uint32_t (&r)[4], const void *row, bool transposed) {
    if ((uintptr_t)row % 16) emulator::fault("a row of a matrix in shared memory is not aligned to 16 bytes");
    struct Lane { uint32_t *r; const uint16_t *row; } mine{r, (const uint16_t *)row};
    emulator::collective(transposed ? "load_matrices_transposed" : "load_matrices", &mine, [transposed](void *const *lanes) {
        for (int l = 0; l < 32; l++)
            for (int m = 0; m < 4; m++) {
                uint32_t halves[2];
                for (int h = 0; h < 2; h++) {
                    int y = l / 4, x = 2 * (l % 4) + h;
                    if (transposed) std::swap(y, x);
                    halves[h] = ((Lane *)lanes[8 * m + y])->row[x];
                }
                ((Lane *)lanes[l])->r[m] = halves[0] | halves[1] << 16;
            }
    });
}
inline void load_matrices(uint32_t (&r)[4], const void *row) { load_matrices_as(r, row, false); }
inline void load_matrices_transposed(uint32_t (&r)[4], const void *row) { load_matrices_as(r, row, true); }

inline void copy_async(void *to, const void *from, bool valid) { emulator::start_copy(to, from, valid); }
inline void commit_copies() { emulator::commit_copies(); }
template <int N> void wait_for_copies() { emulator::wait_for_copies(N); }
