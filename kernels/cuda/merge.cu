// W' = W + sum of up_i down_i over some of its rows, out of place: W is read once and W' written once, all sums in f32, rounded once.
// W is of the type of W', or e4m3 or GGUF's blocks, which are widened on the way: for one product, where W itself is to stay as it is.
//
// Tensor cores take 16-bit values, so each factor that is no bf16 is split into two bf16 whose sum has 16 bits of its mantissa, and
// three of the four products are made (the fourth is below 2^-16 of the sum). Bytes per value of a 16-bit W: composed of candle's
// operations 26 with f32 copies; here 4, and the factors, which stay in the second-level cache. Of Q4_K 2.6, as without a LoRA; a product
// of the LoRA's own takes 8 for each value that the layer gives, and keeps GELU out of the layer's. Time on a card: not measured yet.
#include "blocks.cuh"
#include "e4m3.cuh"

struct MergeAddend {
    const void *up;    // (rows, rank), or the whole change (rows, columns) if rank is 0
    const void *down;  // (rank, columns)
    uint32_t from, to; // rows of W
    uint32_t rank;
};

constexpr int MERGE_ADDENDS = 8;

struct MergeArguments {
    const void *weight; // (rows, columns), as it is stored
    const float *scale; // of e4m3: (rows), or (1), or null
    void *merged;       // (rows, columns)
    uint32_t rows, columns;
    uint32_t of_rows;   // whether there is a scale for each row
    uint32_t count;
    MergeAddend addends[MERGE_ADDENDS];
};

constexpr int MERGE_THREADS = 256;
constexpr int MERGE_ROWS = 128;   // of a block: 16 for each warp
constexpr int MERGE_COLUMNS = 64; // of a block
constexpr int MERGE_DEPTH = 16;   // of the factors at a time
constexpr int MERGE_PITCH = MERGE_DEPTH + 4; // so that neighbouring rows lie in other banks

// How W is stored: eight neighbouring values of a row.
template <typename T> struct Plainly {
    static __device__ __forceinline__ void load(const MergeArguments &a, uint32_t row, uint32_t column, float (&v)[8]) {
        load8((const T *)a.weight + (uint64_t)row * a.columns + column, v);
    }
};

struct InE4m3 {
    static __device__ __forceinline__ void load(const MergeArguments &a, uint32_t row, uint32_t column, float (&v)[8]) {
        float scale = a.scale ? read(a.scale + (a.of_rows ? row : 0)) : 1.0f;
        uint64_t eight = read(reinterpret_cast<const uint64_t *>((const uint8_t *)a.weight + (uint64_t)row * a.columns + column));
        for (int j = 0; j < 8; j++) v[j] = from_e4m3((uint32_t)(eight >> (8 * j)) & 0xff) * scale;
    }
};

template <typename Format> struct InBlocks {
    static __device__ __forceinline__ void load(const MergeArguments &a, uint32_t row, uint32_t column, float (&v)[8]) {
        uint64_t i = (uint64_t)row * a.columns + column;
        Format::decode((const uint8_t *)a.weight + i / Format::VALUES * Format::BYTES, i % Format::VALUES, v);
    }
};

// Whether values of a factor are bf16 already.
template <typename F> constexpr bool IS_BF16 = false;
template <> constexpr bool IS_BF16<bf16> = true;

// Two neighbouring values of a factor as bf16, and what is missing.
__device__ __forceinline__ void split(const float *x, uint32_t &high, uint32_t &low) {
    bf16 h[2], l[2];
    for (int i = 0; i < 2; i++) {
        round_to(x[i], h[i]);
        round_to(x[i] - widen(h[i]), l[i]);
    }
    high = both(h[0], h[1]);
    low = both(l[0], l[1]);
}

// To values T, of what is stored as `Stored` says, with factors F.
template <typename T, typename Stored, typename F> __device__ __forceinline__ void merge(const MergeArguments &a) {
    DYNAMIC_SHARED(shared);
    float *up = reinterpret_cast<float *>(shared);      // (MERGE_ROWS, MERGE_PITCH)
    float *down = up + MERGE_ROWS * MERGE_PITCH;        // (MERGE_COLUMNS, MERGE_PITCH): transposed
    uint32_t first_row = blockIdx.x * MERGE_ROWS, first_column = blockIdx.y * MERGE_COLUMNS;
    uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32, group = lane / 4, quad = lane % 4;

    // A lane has eight neighbouring columns of two rows in each 32: in tile j of them it stands for columns 8 quad + 2 j and the next.
    float sum[MERGE_COLUMNS / 32][2][8];
    uint32_t row[2] = {first_row + 16 * warp + group, first_row + 16 * warp + group + 8};
#pragma unroll
    for (int c = 0; c < MERGE_COLUMNS / 32; c++)
        for (int r = 0; r < 2; r++) {
            uint32_t column = first_column + 32 * c + 8 * quad;
            for (int j = 0; j < 8; j++) sum[c][r][j] = 0;
            if (row[r] < a.rows && column < a.columns) Stored::load(a, row[r], column, sum[c][r]);
        }

    for (uint32_t n = 0; n < a.count; n++) {
        const MergeAddend &addend = a.addends[n];
        if (addend.to <= first_row || addend.from >= first_row + MERGE_ROWS) continue;
        if (addend.rank == 0) {
#pragma unroll
            for (int c = 0; c < MERGE_COLUMNS / 32; c++)
                for (int r = 0; r < 2; r++) {
                    uint32_t column = first_column + 32 * c + 8 * quad;
                    if (row[r] < addend.from || row[r] >= addend.to || column >= a.columns) continue;
                    float change[8];
                    load8((const F *)addend.up + (uint64_t)(row[r] - addend.from) * a.columns + column, change);
                    for (int j = 0; j < 8; j++) sum[c][r][j] += change[j];
                }
            continue;
        }
        // Each addend is summed by itself and then added, as the reference on the CPU does.
        float product[MERGE_COLUMNS / 8][4] = {};
        for (uint32_t k = 0; k < addend.rank; k += MERGE_DEPTH) {
            __syncthreads(); // the factors before have been read
            for (uint32_t i = threadIdx.x; i < MERGE_ROWS * MERGE_DEPTH; i += MERGE_THREADS) {
                uint32_t y = i / MERGE_DEPTH, x = i % MERGE_DEPTH, at = first_row + y;
                bool inside = at >= addend.from && at < addend.to && k + x < addend.rank;
                up[y * MERGE_PITCH + x] = inside ? widen(read((const F *)addend.up + (uint64_t)(at - addend.from) * addend.rank + k + x)) : 0.0f;
            }
            for (uint32_t i = threadIdx.x; i < MERGE_COLUMNS * MERGE_DEPTH; i += MERGE_THREADS) {
                uint32_t y = i / MERGE_COLUMNS, x = i % MERGE_COLUMNS;
                bool inside = k + y < addend.rank && first_column + x < a.columns;
                down[x * MERGE_PITCH + y] = inside ? widen(read((const F *)addend.down + (uint64_t)(k + y) * a.columns + first_column + x)) : 0.0f;
            }
            __syncthreads();
            uint32_t high[4], low[4];
            for (int i = 0; i < 4; i++) split(up + (16 * warp + group + 8 * (i % 2)) * MERGE_PITCH + 2 * quad + 8 * (i / 2), high[i], low[i]);
#pragma unroll
            for (int tile = 0; tile < MERGE_COLUMNS / 8; tile++) {
                // The tile's column `group`, as the lanes share columns out.
                uint32_t column = 32 * (tile / 4) + 8 * (group / 2) + 2 * (tile % 4) + group % 2;
                uint32_t high_b[2], low_b[2];
                for (int i = 0; i < 2; i++) split(down + column * MERGE_PITCH + 2 * quad + 8 * i, high_b[i], low_b[i]);
                if constexpr (!IS_BF16<F>) {
                    multiply(product[tile], low, high_b, bf16());
                    multiply(product[tile], high, low_b, bf16());
                }
                multiply(product[tile], high, high_b, bf16());
            }
        }
#pragma unroll
        for (int tile = 0; tile < MERGE_COLUMNS / 8; tile++)
            for (int i = 0; i < 4; i++) sum[tile / 4][i / 2][2 * (tile % 4) + i % 2] += product[tile][i];
    }

#pragma unroll
    for (int c = 0; c < MERGE_COLUMNS / 32; c++)
        for (int r = 0; r < 2; r++) {
            uint32_t column = first_column + 32 * c + 8 * quad;
            if (row[r] < a.rows && column < a.columns) store8((T *)a.merged + (uint64_t)row[r] * a.columns + column, sum[c][r]);
        }
}
template <typename T> __device__ __forceinline__ void merge_plainly(const MergeArguments &a) { merge<T, Plainly<T>, float>(a); }
KERNEL(merge_f16, MergeArguments, MERGE_THREADS, merge_plainly<f16>)
KERNEL(merge_bf16, MergeArguments, MERGE_THREADS, merge_plainly<bf16>)

#define MERGE_STORED(name, ...) \
    template <typename T> __device__ __forceinline__ void merge_##name(const MergeArguments &a) { merge<T, __VA_ARGS__, T>(a); } \
    KERNEL(merge_##name##_f16, MergeArguments, MERGE_THREADS, merge_##name<f16>) \
    KERNEL(merge_##name##_bf16, MergeArguments, MERGE_THREADS, merge_##name<bf16>)
#define MERGE_BLOCKS(name, ...) MERGE_STORED(name, InBlocks<__VA_ARGS__>)
MERGE_STORED(e4m3, InE4m3)
FORMATS(MERGE_BLOCKS)
