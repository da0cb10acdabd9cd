// A 3 x 3 convolution of pixels whose channels lie side by side, as a matrix product whose left side is never written down ("implicit GEMM"):
// its rows are pixels of the output, its columns the output's channels, and it sums over nine taps of every channel. A block has 8 x 16
// pixels and up to 128 channels of the output, a warp 64 x 64 of these. What the block reads of 32 channels, its tile's border included,
// is copied to shared memory once and serves all nine taps; the weights of one tap and 32 channels pass by in a ring of three. Both come
// while the ones before are multiplied. A block has 47 KB and 128 threads of at most 255 registers, so that two fit a multiprocessor of any
// card since 8.0 and one multiplies while the other begins or ends. (With a stride of two the tile's input is larger: 94 KB.)
//
// Borders are never stored, nor is a picture that is doubled first (each pixel standing for 2 x 2); bias and residual are added before the
// only rounding. For matrix units of compute capability 8.0 and newer.
//
// Bytes of global memory for each value of the output, 16 bits, as many channels in as out, counted: unfolding reads one value, writes and
// reads nine (38), writes the product and turns it over into planes (6), and passes again for bias (4), residual (6) and doubling (2.5);
// here the input is read 1.4 times and the output written once: 5, and 2 for a residual. There are as many multiplications, and those with
// the zeros that fill a chunk of 32 channels or a tile of 128 outputs (32 where there are few). Time on a card: not measured yet.
#include "common.cuh"

struct ConvolveArguments {
    const void *x;        // (b, height, width, c); c is a multiple of 8
    const void *weight;   // (o, 3, 3, c)
    const void *bias;     // (o)
    const void *residual; // as y, or null
    void *y;              // (b, rows, columns, o)
    uint32_t c, o, height, width, rows, columns;
    uint32_t before;  // zeros above and to the left
    uint32_t doubled; // 1 if each pixel of x stands for 2 x 2, else 0
};

constexpr int CONVOLVE_THREADS = 128;
constexpr int TILE_ROWS = 8, TILE_COLUMNS = 16; // of output pixels
constexpr int CHUNK = 32;                       // channels of the input at a time
constexpr int PIECES = CHUNK / 8;               // of 16 bytes
constexpr int RING = 3;                         // taps of weights; divides nine, so that a tap's place is known when compiled

// The part of the input under a tile, for one chunk.
template <int STRIDE> struct Halo {
    static constexpr int ROWS = (TILE_ROWS - 1) * STRIDE + 3, COLUMNS = (TILE_COLUMNS - 1) * STRIDE + 3;
    static constexpr int VALUES = ROWS * COLUMNS * CHUNK;

    // Where a piece lies. What neighbouring output pixels read lies side by side (with a stride of two, even columns come before odd ones),
    // and the pieces of eight such pixels in different banks.
    static __device__ __forceinline__ int place(int row, int column, int piece) {
        int pixel = row * COLUMNS + (STRIDE == 1 ? column : column / 2 + column % 2 * (COLUMNS / 2 + 1));
        return pixel * CHUNK + 8 * (piece ^ (pixel / 2 % PIECES));
    }
};

// As much for the weights of one tap. The eight rows that are read together are neighbours two by two, eight apart.
__device__ __forceinline__ int weight_place(int output, int piece) { return output * CHUNK + 8 * (piece ^ (output / 8 % PIECES)); }

template <typename T, int STRIDE, int OUTPUTS> __device__ __forceinline__ void convolve(const ConvolveArguments &a) {
    using Input = Halo<STRIDE>;
    constexpr int COLUMNS = OUTPUTS < 64 ? OUTPUTS : 64;                          // of a warp
    constexpr int ROWS = TILE_ROWS * (OUTPUTS / COLUMNS) / (CONVOLVE_THREADS / 32); // of pixels, each 16 wide
    DYNAMIC_SHARED(shared);
    T *halos = reinterpret_cast<T *>(shared), *ring = halos + 2 * Input::VALUES;
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32, matrix = lane / 8, line = lane % 8;
    int warp_column = warp % (OUTPUTS / COLUMNS) * COLUMNS, warp_row = warp / (OUTPUTS / COLUMNS) * ROWS;

    // Blocks that share a tile of pixels follow each other.
    uint32_t parts = (a.o + OUTPUTS - 1) / OUTPUTS, across = (a.columns + TILE_COLUMNS - 1) / TILE_COLUMNS;
    uint32_t first_output = blockIdx.x % parts * OUTPUTS, tile = blockIdx.x / parts, item = blockIdx.z;
    int top = tile / across * TILE_ROWS, left = tile % across * TILE_COLUMNS;
    const T *x = (const T *)a.x + (uint64_t)item * a.height * a.width * a.c;
    // The first pixel under the tile, which may lie in the border, and which half of it if pixels are doubled.
    int window_y = top * STRIDE - (int)a.before, window_x = left * STRIDE - (int)a.before;
    int from_y = window_y >> a.doubled, from_x = window_x >> a.doubled;
    int half_y = window_y & a.doubled, half_x = window_x & a.doubled;
    int last_row = ((TILE_ROWS - 1) * STRIDE + 2 + half_y) >> a.doubled;
    int last_column = ((TILE_COLUMNS - 1) * STRIDE + 2 + half_x) >> a.doubled;

    auto fetch_input = [&](int chunk) {
        T *halo = halos + chunk % 2 * Input::VALUES;
        for (int i = threadIdx.x; i < Input::VALUES / 8; i += CONVOLVE_THREADS) {
            int piece = i % PIECES, row = i / PIECES / Input::COLUMNS, column = i / PIECES % Input::COLUMNS;
            if (row > last_row || column > last_column) continue;
            uint32_t at_y = from_y + row, at_x = from_x + column, channel = chunk * CHUNK + 8 * piece;
            bool inside = at_y < a.height && at_x < a.width && channel < a.c;
            uint64_t at = inside ? ((uint64_t)at_y * a.width + at_x) * a.c + channel : 0;
            copy_async(halo + Input::place(row, column, piece), x + at, inside);
        }
    };
    auto fetch_weights = [&](int step) {
        T *weights = ring + step % RING * OUTPUTS * CHUNK;
        for (int i = threadIdx.x; i < OUTPUTS * PIECES; i += CONVOLVE_THREADS) {
            int piece = i % PIECES, row = i / PIECES;
            uint32_t output = first_output + row, channel = step / 9 * CHUNK + 8 * piece;
            bool inside = output < a.o && channel < a.c;
            uint64_t at = inside ? ((uint64_t)output * 9 + step % 9) * a.c + channel : 0;
            copy_async(weights + weight_place(row, piece), (const T *)a.weight + at, inside);
        }
    };

    int chunks = (a.c + CHUNK - 1) / CHUNK, step = 0;
    fetch_input(0);
    fetch_weights(0);
    commit_copies();
    fetch_weights(1);
    commit_copies();
    float sum[ROWS][COLUMNS / 8][4] = {};
    for (int chunk = 0; chunk < chunks; chunk++) {
        const T *halo = halos + chunk % 2 * Input::VALUES;
        for (int tap_y = 0; tap_y < 3; tap_y++)
#pragma unroll
            for (int tap_x = 0; tap_x < 3; tap_x++, step++) {
                wait_for_copies<1>();
                __syncthreads(); // this tap is there for all, and all are done with the one before, whose place is free now
                if (step + 2 < 9 * chunks) fetch_weights(step + 2);
                if (tap_y == 0 && tap_x == 0 && chunk + 1 < chunks) fetch_input(chunk + 1);
                commit_copies();

                const T *weights = ring + tap_x * OUTPUTS * CHUNK;
                int column = (lane % 16 * STRIDE + tap_x + half_x) >> a.doubled;
#pragma unroll
                for (int e = 0; e < CHUNK / 16; e++) {
                    uint32_t pixels[ROWS][4];
#pragma unroll
                    for (int r = 0; r < ROWS; r++) {
                        int row = ((warp_row + r) * STRIDE + tap_y + half_y) >> a.doubled;
                        load_matrices(pixels[r], halo + Input::place(row, column, 2 * e + lane / 16));
                    }
#pragma unroll
                    for (int j = 0; j < COLUMNS / 8; j += 2) {
                        // Columns are shared out such that a lane has eight neighbours of each 32: in tile j of them it stands for
                        // 8 (lane % 4) + 2 j and the next.
                        int t = j + matrix / 2, output = warp_column + 32 * (t / 4) + 8 * (line / 2) + 2 * (t % 4) + line % 2;
                        uint32_t part[4];
                        load_matrices(part, weights + weight_place(output, 2 * e + matrix % 2));
                        uint32_t first[2] = {part[0], part[1]}, second[2] = {part[2], part[3]};
#pragma unroll
                        for (int r = 0; r < ROWS; r++) {
                            multiply(sum[r][j], pixels[r], first, T());
                            multiply(sum[r][j + 1], pixels[r], second, T());
                        }
                    }
                }
            }
    }

#pragma unroll
    for (int part = 0; part < COLUMNS / 32; part++) {
        uint32_t output = first_output + warp_column + 32 * part + 8 * (lane % 4);
        if (output >= a.o) continue;
        float bias[8];
#pragma unroll
        for (int i = 0; i < 8; i++) bias[i] = output + i < a.o ? widen(read((const T *)a.bias + output + i)) : 0;
#pragma unroll
        for (int r = 0; r < ROWS; r++)
#pragma unroll
            for (int half = 0; half < 2; half++) {
                uint32_t at_y = top + warp_row + r, at_x = left + lane / 4 + 8 * half;
                if (at_y >= a.rows || at_x >= a.columns) continue;
                uint64_t at = (((uint64_t)item * a.rows + at_y) * a.columns + at_x) * a.o + output;
                T *y = (T *)a.y + at;
                const T *residual = a.residual ? (const T *)a.residual + at : nullptr;
                float v[8], beside[8] = {};
                if (a.o % 8 == 0) {
                    if (residual) load8(residual, beside);
#pragma unroll
                    for (int i = 0; i < 8; i++) v[i] = sum[r][4 * part + i / 2][2 * half + i % 2] + bias[i] + beside[i];
                    store8(y, v);
                } else {
#pragma unroll
                    for (int i = 0; i < 8; i++) {
                        if (output + i >= a.o) continue;
                        float value = sum[r][4 * part + i / 2][2 * half + i % 2] + bias[i];
                        if (residual) value += widen(read(residual + i));
                        T result;
                        round_to(value, result);
                        write(y + i, result);
                    }
                }
            }
    }
}

#define CONVOLVE(name, stride, outputs) \
    KERNEL(name##_f16, ConvolveArguments, CONVOLVE_THREADS, (convolve<f16, stride, outputs>)) \
    KERNEL(name##_bf16, ConvolveArguments, CONVOLVE_THREADS, (convolve<bf16, stride, outputs>))
CONVOLVE(convolve, 1, 128)
CONVOLVE(convolve_few, 1, 32)
CONVOLVE(convolve_halve, 2, 128)
