// From a stream's fused projection to its part of the joint q, k and v: split, root-mean-square norm, rotation, without a copy.
//
// Bytes per value of qkv (16 bits): composed about 40 (transposed copies, f32 copies, concatenation); here 4. Time on a card: not
// measured yet.
#include "common.cuh"

struct HeadsArguments {
    const void *qkv; // (b, l, 3 h e)
    const float *query_scale, *key_scale; // (e)
    const float *cos, *sin; // (all tokens, e / 2)
    void *q, *k, *v; // (b, h, all tokens, e)
    uint64_t item, token; // in values, from one item or token of qkv to the next
    uint32_t l, h, e, all, before; // tokens of this stream, of all streams, and of the streams before
    float eps;
};

constexpr int HEADS_THREADS = 128;
constexpr int HEADS_PAIRS = 4; // of a lane: heads of up to 256 channels

template <typename T> __device__ __forceinline__ void heads(const HeadsArguments &a) {
    // One warp for each head of each token, neighbours in memory side by side.
    uint32_t warp = (blockIdx.x * HEADS_THREADS + threadIdx.x) / 32, lane = threadIdx.x % 32;
    if (warp >= a.l * a.h) return;
    uint32_t token = warp / a.h, head = warp % a.h, pairs = a.e / 2;
    uint64_t width = (uint64_t)a.h * a.e;
    const T *from = (const T *)a.qkv + blockIdx.y * a.item + token * a.token + head * a.e;
    uint64_t to = (((uint64_t)blockIdx.y * a.h + head) * a.all + a.before + token) * a.e;

    for (int part = 0; part < 3; part++) {
        float x[HEADS_PAIRS][2], squares = 0;
#pragma unroll
        for (int n = 0; n < HEADS_PAIRS; n++) {
            uint32_t pair = 32 * n + lane;
            if (pair >= pairs) continue;
            for (int j = 0; j < 2; j++) {
                x[n][j] = widen(read(from + part * width + 2 * pair + j));
                squares += x[n][j] * x[n][j];
            }
        }
        float factor = 1.0f / sqrtf(warp_sum(squares) / a.e + a.eps);
        T *out = (T *)(part == 0 ? a.q : part == 1 ? a.k : a.v) + to;
        const float *scale = part == 0 ? a.query_scale : a.key_scale;
#pragma unroll
        for (int n = 0; n < HEADS_PAIRS; n++) {
            uint32_t pair = 32 * n + lane;
            if (pair >= pairs) continue;
            float y[2] = {x[n][0], x[n][1]};
            if (part < 2) {
                uint64_t angle = (uint64_t)(a.before + token) * pairs + pair;
                float cos = read(a.cos + angle), sin = read(a.sin + angle);
                float u = x[n][0] * factor * read(scale + 2 * pair), w = x[n][1] * factor * read(scale + 2 * pair + 1);
                y[0] = u * cos - w * sin;
                y[1] = u * sin + w * cos;
            }
            for (int j = 0; j < 2; j++) {
                T value;
                round_to(y[j], value);
                write(out + 2 * pair + j, value);
            }
        }
    }
}
KERNELS(heads, HeadsArguments, HEADS_THREADS)
