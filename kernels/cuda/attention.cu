// softmax(q k^T scale) v without a score matrix (Dao, FlashAttention-2): a block keeps 128 queries, and keys and values pass by in
// tiles of 64, the next ones on their way while these are multiplied. A warp has 32 queries, so that what it reads of a tile serves
// twice: with 16, reading shared memory would take twice as long as multiplying.
//
// For matrix units of compute capability 8.0 and newer. Bytes saved at FLUX.1's 4608 tokens: the score matrix, 1 GB written and read
// three times in every block. Time on a card: not measured yet; a card of capability 9.0 has faster instructions than these.
#include "common.cuh"

struct AttentionArguments {
    const void *q, *k, *v; // (b, h, l, e), (b, h, l_kv, e) twice; values of a head side by side
    void *y;               // (b, l, h, e), whose heads lie side by side
    // In values: from one item, head and token to the next.
    uint64_t q_item, q_head, q_token, k_item, k_head, k_token, v_item, v_head, v_token;
    uint64_t y_item, y_token;
    uint32_t h, l, l_kv;
    float scale; // of the scores, times log2(e)
};

constexpr int ATTENTION_THREADS = 128;
constexpr int QUERIES = 128; // of a block: 32 for each warp, in two halves
constexpr int KEYS = 64;     // of a tile

// A tile's rows are E values; chunk c (16 bytes) of row r lies at c ^ (r % 8), so that eight rows' chunks lie in different banks.
template <int E> __device__ __forceinline__ int place(int row, int chunk) {
    constexpr int CHUNKS = E / 8;
    return row * E + 8 * (chunk ^ (row & ((CHUNKS < 8 ? CHUNKS : 8) - 1)));
}

template <typename T, int E, int ROWS>
__device__ __forceinline__ void fetch(T *tile, const T *from, uint64_t token, uint32_t first, uint32_t limit) {
    // Rows of a thread's chunks are a multiple of eight apart, so that their places are equally far apart.
    constexpr int APART = ATTENTION_THREADS / (E / 8);
    static_assert(APART % 8 == 0 && ROWS % APART == 0, "see above");
    int row = threadIdx.x / (E / 8), chunk = threadIdx.x % (E / 8);
    const T *at = from + (first + row) * token + 8 * chunk;
    T *to = tile + place<E>(row, chunk);
    uint64_t apart = APART * token;
#pragma unroll
    for (int i = 0; i < ROWS / APART; i++, at += apart) {
        bool inside = first + row + i * APART < limit;
        copy_async(to + i * APART * E, inside ? at : from, inside);
    }
}

template <typename T, int E> __device__ __forceinline__ void attention(const AttentionArguments &a) {
    DYNAMIC_SHARED(shared);
    T *q_tile = reinterpret_cast<T *>(shared);
    T *k_tiles = q_tile + QUERIES * E, *v_tiles = k_tiles + 2 * KEYS * E; // two of each
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32, matrix = lane / 8, line = lane % 8;
    uint32_t first = blockIdx.x * QUERIES, head = blockIdx.y, item = blockIdx.z;
    const T *q = (const T *)a.q + item * a.q_item + head * a.q_head;
    const T *k = (const T *)a.k + item * a.k_item + head * a.k_head;
    const T *v = (const T *)a.v + item * a.v_item + head * a.v_head;

    fetch<T, E, QUERIES>(q_tile, q, a.q_token, first, a.l);
    fetch<T, E, KEYS>(k_tiles, k, a.k_token, 0, a.l_kv);
    fetch<T, E, KEYS>(v_tiles, v, a.v_token, 0, a.l_kv);
    commit_copies();

    // Of each half: results, and of its rows lane / 4 and lane / 4 + 8 the largest score and the sum.
    float y[2][E / 8][4] = {};
    float largest[2][2] = {{-INFINITY, -INFINITY}, {-INFINITY, -INFINITY}}, total[2][2] = {};
    int tiles = (a.l_kv + KEYS - 1) / KEYS;
    for (int t = 0; t < tiles; t++) {
        const T *k_tile = k_tiles + t % 2 * KEYS * E, *v_tile = v_tiles + t % 2 * KEYS * E;
        wait_for_copies<0>();
        __syncthreads(); // this tile is there for all, and all are done with the one before, whose place the next one takes
        if (t + 1 < tiles) {
            fetch<T, E, KEYS>(k_tiles + (t + 1) % 2 * KEYS * E, k, a.k_token, (t + 1) * KEYS, a.l_kv);
            fetch<T, E, KEYS>(v_tiles + (t + 1) % 2 * KEYS * E, v, a.v_token, (t + 1) * KEYS, a.l_kv);
        }
        commit_copies();

        float s[2][KEYS / 8][4] = {};
#pragma unroll 4
        for (int e = 0; e < E / 16; e++) {
            uint32_t q_part[2][4];
#pragma unroll
            for (int half = 0; half < 2; half++)
                load_matrices(q_part[half], q_tile + place<E>(32 * warp + 16 * half + matrix % 2 * 8 + line, 2 * e + matrix / 2));
#pragma unroll
            for (int j = 0; j < KEYS / 16; j++) {
                uint32_t part[4];
                load_matrices(part, k_tile + place<E>(16 * j + matrix / 2 * 8 + line, 2 * e + matrix % 2));
                uint32_t left[2] = {part[0], part[1]}, right[2] = {part[2], part[3]};
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    multiply(s[half][2 * j], q_part[half], left, T());
                    multiply(s[half][2 * j + 1], q_part[half], right, T());
                }
            }
        }
        if ((t + 1) * KEYS > (int)a.l_kv)
#pragma unroll
            for (int j = 0; j < KEYS / 8; j++)
                for (int i = 0; i < 4; i++)
                    if (t * KEYS + 8 * j + 2 * (lane % 4) + i % 2 >= (int)a.l_kv) s[0][j][i] = s[1][j][i] = -INFINITY;

#pragma unroll
        for (int half = 0; half < 2; half++)
#pragma unroll
            for (int r = 0; r < 2; r++) {
                float most = largest[half][r], sum = 0;
#pragma unroll
                for (int j = 0; j < KEYS / 8; j++) most = fmaxf(most, fmaxf(s[half][j][2 * r], s[half][j][2 * r + 1]));
                for (int apart = 1; apart < 4; apart *= 2) most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, apart));
                float shrink = power_of_two((largest[half][r] - most) * a.scale);
                largest[half][r] = most;
#pragma unroll
                for (int j = 0; j < KEYS / 8; j++)
#pragma unroll
                    for (int i = 2 * r; i < 2 * r + 2; i++) {
                        s[half][j][i] = power_of_two(fmaf(s[half][j][i], a.scale, -most * a.scale));
                        sum += s[half][j][i];
                    }
                // Of this lane's columns; the four lanes of a row add up in the end.
                total[half][r] = total[half][r] * shrink + sum;
#pragma unroll
                for (int j = 0; j < E / 8; j++)
#pragma unroll
                    for (int i = 2 * r; i < 2 * r + 2; i++) y[half][j][i] *= shrink;
            }

#pragma unroll
        for (int j = 0; j < KEYS / 16; j++) {
            uint32_t p[2][4];
#pragma unroll
            for (int half = 0; half < 2; half++)
#pragma unroll
                for (int i = 0; i < 4; i++) // what was a result's layout is an operand's
                    p[half][i] = both_rounded<T>(s[half][2 * j + i / 2][i % 2 * 2], s[half][2 * j + i / 2][i % 2 * 2 + 1]);
#pragma unroll
            for (int e = 0; e < E / 16; e++) {
                uint32_t part[4];
                load_matrices_transposed(part, v_tile + place<E>(16 * j + matrix % 2 * 8 + line, 2 * e + matrix / 2));
                uint32_t left[2] = {part[0], part[1]}, right[2] = {part[2], part[3]};
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    multiply(y[half][2 * e], p[half], left, T());
                    multiply(y[half][2 * e + 1], p[half], right, T());
                }
            }
        }
    }

#pragma unroll
    for (int half = 0; half < 2; half++)
#pragma unroll
        for (int r = 0; r < 2; r++) {
            for (int apart = 1; apart < 4; apart *= 2) total[half][r] += __shfl_xor_sync(0xffffffffu, total[half][r], apart);
            uint32_t token = first + 32 * warp + 16 * half + lane / 4 + 8 * r;
            if (token >= a.l) continue;
            T *to = (T *)a.y + item * a.y_item + token * a.y_token + head * E + 2 * (lane % 4);
            float factor = 1.0f / total[half][r];
#pragma unroll
            for (int j = 0; j < E / 8; j++) {
                uint32_t pair = both_rounded<T>(y[half][j][2 * r] * factor, y[half][j][2 * r + 1] * factor);
                write(reinterpret_cast<uint32_t *>(to + 8 * j), pair);
            }
        }
}

#define ATTENTION(E) \
    KERNEL(attention_##E##_f16, AttentionArguments, ATTENTION_THREADS, (attention<f16, E>)) \
    KERNEL(attention_##E##_bf16, AttentionArguments, ATTENTION_THREADS, (attention<bf16, E>))
ATTENTION(16)
ATTENTION(32)
ATTENTION(64)
ATTENTION(128)
