// softmax(q k^T scale) v without a score matrix (Dao, FlashAttention-2): a block keeps 128 queries, and keys and values pass by in
// tiles of 64, the next ones on their way while these are multiplied.
//
// For matrix units of compute capability 8.0 and newer. Bytes saved at FLUX.1's 4608 tokens: the score matrix, 1 GB written and read
// three times in every block. Time on a card: not measured yet; a card of capability 9.0 has faster instructions than these.
#include "common.cuh"

struct AttentionArguments {
    const void *q, *k, *v; // (b, h, l, e), (b, h, l_kv, e) twice; values of a head side by side
    void *y;               // (b, l, h, e)
    // In values: from one item, head and token to the next.
    uint64_t q_item, q_head, q_token, k_item, k_head, k_token, v_item, v_head, v_token;
    uint32_t h, l, l_kv;
    float scale; // of the scores, times log2(e)
};

constexpr int ATTENTION_THREADS = 256;
constexpr int QUERIES = 128; // of a block: 16 for each warp
constexpr int KEYS = 64;     // of a tile

// A tile's rows are E values; chunk c (16 bytes) of row r lies at c ^ (r % 8), so that eight rows' chunks lie in different banks.
template <int E> __device__ __forceinline__ int place(int row, int chunk) {
    constexpr int CHUNKS = E / 8;
    return row * E + 8 * (chunk ^ (row & ((CHUNKS < 8 ? CHUNKS : 8) - 1)));
}

template <typename T, int E, int ROWS>
__device__ __forceinline__ void fetch(T *tile, const T *from, uint64_t token, uint32_t first, uint32_t limit) {
    for (int i = threadIdx.x; i < ROWS * E / 8; i += ATTENTION_THREADS) {
        int row = i / (E / 8), chunk = i % (E / 8);
        bool inside = first + row < limit;
        copy_async(tile + place<E>(row, chunk), from + (inside ? first + row : 0) * token + 8 * chunk, inside);
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
    commit_copies();
    fetch<T, E, KEYS>(v_tiles, v, a.v_token, 0, a.l_kv);
    commit_copies();

    uint32_t q_parts[E / 16][4];
    float y[E / 8][4] = {};
    float largest[2] = {-INFINITY, -INFINITY}, total[2] = {0, 0}; // of rows lane / 4 and lane / 4 + 8
    int tiles = (a.l_kv + KEYS - 1) / KEYS;
    for (int t = 0; t < tiles; t++) {
        const T *k_tile = k_tiles + t % 2 * KEYS * E, *v_tile = v_tiles + t % 2 * KEYS * E;
        wait_for_copies<1>(); // this tile's keys (and the queries); its values may still be on their way
        __syncthreads();
        if (t == 0)
#pragma unroll
            for (int e = 0; e < E / 16; e++)
                load_matrices(q_parts[e], q_tile + place<E>(16 * warp + matrix % 2 * 8 + line, 2 * e + matrix / 2));
        if (t + 1 < tiles) fetch<T, E, KEYS>(k_tiles + (t + 1) % 2 * KEYS * E, k, a.k_token, (t + 1) * KEYS, a.l_kv);
        commit_copies();

        float s[KEYS / 8][4] = {};
#pragma unroll
        for (int e = 0; e < E / 16; e++)
#pragma unroll
            for (int j = 0; j < KEYS / 16; j++) {
                uint32_t part[4];
                load_matrices(part, k_tile + place<E>(16 * j + matrix / 2 * 8 + line, 2 * e + matrix % 2));
                uint32_t left[2] = {part[0], part[1]}, right[2] = {part[2], part[3]};
                multiply(s[2 * j], q_parts[e], left, T());
                multiply(s[2 * j + 1], q_parts[e], right, T());
            }
        if ((t + 1) * KEYS > (int)a.l_kv)
#pragma unroll
            for (int j = 0; j < KEYS / 8; j++)
                for (int i = 0; i < 4; i++)
                    if (t * KEYS + 8 * j + 2 * (lane % 4) + i % 2 >= (int)a.l_kv) s[j][i] = -INFINITY;

#pragma unroll
        for (int r = 0; r < 2; r++) {
            float most = largest[r], sum = 0;
            for (int j = 0; j < KEYS / 8; j++) most = fmaxf(most, fmaxf(s[j][2 * r], s[j][2 * r + 1]));
            for (int apart = 1; apart < 4; apart *= 2) most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, apart));
            float shrink = exp2f((largest[r] - most) * a.scale);
            largest[r] = most;
            for (int j = 0; j < KEYS / 8; j++)
                for (int i = 2 * r; i < 2 * r + 2; i++) {
                    s[j][i] = exp2f((s[j][i] - most) * a.scale);
                    sum += s[j][i];
                }
            total[r] = total[r] * shrink + sum; // of this lane's columns; the four lanes of a row add up in the end
            for (int j = 0; j < E / 8; j++)
                for (int i = 2 * r; i < 2 * r + 2; i++) y[j][i] *= shrink;
        }

        wait_for_copies<1>(); // this tile's values
        __syncthreads();
        if (t + 1 < tiles) fetch<T, E, KEYS>(v_tiles + (t + 1) % 2 * KEYS * E, v, a.v_token, (t + 1) * KEYS, a.l_kv);
        commit_copies();
#pragma unroll
        for (int j = 0; j < KEYS / 16; j++) {
            // What was a result's layout is an operand's.
            uint32_t p[4] = {both_rounded<T>(s[2 * j][0], s[2 * j][1]), both_rounded<T>(s[2 * j][2], s[2 * j][3]),
                             both_rounded<T>(s[2 * j + 1][0], s[2 * j + 1][1]), both_rounded<T>(s[2 * j + 1][2], s[2 * j + 1][3])};
#pragma unroll
            for (int e = 0; e < E / 16; e++) {
                uint32_t part[4];
                load_matrices_transposed(part, v_tile + place<E>(16 * j + matrix % 2 * 8 + line, 2 * e + matrix / 2));
                uint32_t left[2] = {part[0], part[1]}, right[2] = {part[2], part[3]};
                multiply(y[2 * e], p, left, T());
                multiply(y[2 * e + 1], p, right, T());
            }
        }
    }

    for (int r = 0; r < 2; r++) {
        for (int apart = 1; apart < 4; apart *= 2) total[r] += __shfl_xor_sync(0xffffffffu, total[r], apart);
        uint32_t token = first + 16 * warp + lane / 4 + 8 * r;
        if (token >= a.l) continue;
        T *to = (T *)a.y + (((uint64_t)item * a.l + token) * a.h + head) * E + 2 * (lane % 4);
#pragma unroll
        for (int j = 0; j < E / 8; j++)
            write(reinterpret_cast<uint32_t *>(to + 8 * j), both_rounded<T>(y[j][2 * r] / total[r], y[j][2 * r + 1] / total[r]));
    }
}

#define ATTENTION(E) \
    KERNEL(attention_##E##_f16, AttentionArguments, ATTENTION_THREADS, (attention<f16, E>)) \
    KERNEL(attention_##E##_bf16, AttentionArguments, ATTENTION_THREADS, (attention<bf16, E>))
ATTENTION(16)
ATTENTION(32)
ATTENTION(64)
ATTENTION(128)
