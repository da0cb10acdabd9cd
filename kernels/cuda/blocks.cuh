// GGUF's blocks: ten formats, each described by ggml's `block_*` structs.
#pragma once
#include "common.cuh"

// Blocks lie at even places, no more.
__device__ __forceinline__ uint32_t two_bytes(const uint8_t *p) { return read(reinterpret_cast<const uint16_t *>(p)); }
__device__ __forceinline__ float half_at(const uint8_t *p) {
    uint16_t bits = two_bytes(p);
    f16 x;
    memcpy(&x, &bits, sizeof x);
    return widen(x);
}
__device__ __forceinline__ void eight_bytes(const uint8_t *p, uint32_t (&q)[8]) {
    for (int j = 0; j < 8; j += 2) {
        uint32_t both = two_bytes(p + j);
        q[j] = both & 0xff;
        q[j + 1] = both >> 8;
    }
}

// Each format: a block has VALUES values in BYTES bytes, and `decode` makes eight of them, from the i-th on.

// 32 values of 4 or 5 bits: the first half in the lower halves of its bytes, the second in the upper ones, fifth bits in one word.
template <bool FIFTH, bool MINIMUM> struct Plain {
    static constexpr int VALUES = 32, HEAD = MINIMUM ? 4 : 2, BYTES = HEAD + (FIFTH ? 4 : 0) + 16;
    static __device__ __forceinline__ void decode(const uint8_t *block, uint32_t i, float (&v)[8]) {
        float scale = half_at(block), least = MINIMUM ? half_at(block + 2) : 0.0f;
        uint32_t q[8], fifth = FIFTH ? two_bytes(block + HEAD) | two_bytes(block + HEAD + 2) << 16 : 0;
        eight_bytes(block + HEAD + (FIFTH ? 4 : 0) + i % 16, q);
        for (int j = 0; j < 8; j++) {
            int value = (q[j] >> (i < 16 ? 0 : 4) & 15) | (fifth >> (i + j) & 1) << 4;
            v[j] = MINIMUM ? value * scale + least : (value - (FIFTH ? 16 : 8)) * scale;
        }
    }
};

struct Q8_0 {
    static constexpr int VALUES = 32, BYTES = 34;
    static __device__ __forceinline__ void decode(const uint8_t *block, uint32_t i, float (&v)[8]) {
        uint32_t q[8];
        eight_bytes(block + 2 + i, q);
        for (int j = 0; j < 8; j++) v[j] = (int8_t)q[j] * half_at(block);
    }
};

// The others have 256 values, in parts of 32 with scales of their own (or of 16 each). Parts share bytes: i / 32 says which bits.

// Scale and minimum of one of eight parts: 6 bits each, the upper two of later ones in what earlier ones leave.
__device__ __forceinline__ void scale_and_minimum(const uint8_t *packed, uint32_t part, uint32_t &scale, uint32_t &minimum) {
    if (part < 4) {
        scale = read(packed + part) & 63;
        minimum = read(packed + part + 4) & 63;
    } else {
        uint32_t lower = read(packed + part + 4);
        scale = (lower & 15) | read(packed + part - 4) >> 6 << 4;
        minimum = lower >> 4 | read(packed + part) >> 6 << 4;
    }
}

struct Q2K {
    static constexpr int VALUES = 256, BYTES = 84;
    static __device__ __forceinline__ void decode(const uint8_t *block, uint32_t i, float (&v)[8]) {
        uint32_t part = i / 32, q[8], packed = read(block + i / 16);
        eight_bytes(block + 16 + part / 4 * 32 + i % 32, q);
        float scale = half_at(block + 80) * (packed & 15), minimum = half_at(block + 82) * (packed >> 4);
        for (int j = 0; j < 8; j++) v[j] = scale * (q[j] >> (2 * (part % 4)) & 3) - minimum;
    }
};

struct Q3K {
    static constexpr int VALUES = 256, BYTES = 110;
    static __device__ __forceinline__ void decode(const uint8_t *block, uint32_t i, float (&v)[8]) {
        const uint8_t *packed = block + 96;
        uint32_t part = i / 32, at = i / 16, q[8], third[8];
        eight_bytes(block + i % 32, third);
        eight_bytes(block + 32 + part / 4 * 32 + i % 32, q);
        uint32_t low = read(packed + at % 8) >> (at < 8 ? 0 : 4) & 15, high = read(packed + 8 + at % 4) >> (2 * (at / 4)) & 3;
        float scale = half_at(block + 108) * ((int)(low | high << 4) - 32);
        for (int j = 0; j < 8; j++) {
            int value = (int)(q[j] >> (2 * (part % 4)) & 3) - (third[j] >> part & 1 ? 0 : 4);
            v[j] = scale * value;
        }
    }
};

struct Q4K {
    static constexpr int VALUES = 256, BYTES = 144;
    static __device__ __forceinline__ void decode(const uint8_t *block, uint32_t i, float (&v)[8]) {
        uint32_t part = i / 32, q[8], scale, minimum;
        scale_and_minimum(block + 4, part, scale, minimum);
        eight_bytes(block + 16 + part / 2 * 32 + i % 32, q);
        float wide = half_at(block) * scale, least = half_at(block + 2) * minimum;
        for (int j = 0; j < 8; j++) v[j] = wide * (q[j] >> (4 * (part % 2)) & 15) - least;
    }
};

struct Q5K {
    static constexpr int VALUES = 256, BYTES = 176;
    static __device__ __forceinline__ void decode(const uint8_t *block, uint32_t i, float (&v)[8]) {
        uint32_t part = i / 32, q[8], fifth[8], scale, minimum;
        scale_and_minimum(block + 4, part, scale, minimum);
        eight_bytes(block + 16 + i % 32, fifth);
        eight_bytes(block + 48 + part / 2 * 32 + i % 32, q);
        float wide = half_at(block) * scale, least = half_at(block + 2) * minimum;
        for (int j = 0; j < 8; j++) v[j] = wide * ((q[j] >> (4 * (part % 2)) & 15) | (fifth[j] >> part & 1) << 4) - least;
    }
};

struct Q6K {
    static constexpr int VALUES = 256, BYTES = 210;
    static __device__ __forceinline__ void decode(const uint8_t *block, uint32_t i, float (&v)[8]) {
        uint32_t part = i / 32, q[8], upper[8];
        eight_bytes(block + part / 4 * 64 + part % 2 * 32 + i % 32, q);
        eight_bytes(block + 128 + part / 4 * 32 + i % 32, upper);
        float scale = half_at(block + 208) * (int8_t)read(block + 192 + i / 16);
        for (int j = 0; j < 8; j++) {
            int value = (int)((q[j] >> (part % 4 / 2 * 4) & 15) | (upper[j] >> (2 * (part % 4)) & 3) << 4) - 32;
            v[j] = scale * value;
        }
    }
};

#define FORMATS(use) \
    use(q4_0, Plain<false, false>) \
    use(q4_1, Plain<false, true>) \
    use(q5_0, Plain<true, false>) \
    use(q5_1, Plain<true, true>) \
    use(q8_0, Q8_0) \
    use(q2_k, Q2K) \
    use(q3_k, Q3K) \
    use(q4_k, Q4K) \
    use(q5_k, Q5K) \
    use(q6_k, Q6K)
