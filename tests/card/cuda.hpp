// What candle's kernels take from CUDA's headers, for a processor's compiler. They are compiled as they stand, for capability 8.0.
#pragma once

#include <cmath>
#include <math.h>
#include <stdint.h>
#include <string.h>

#include <algorithm>
#include <limits>
#include <type_traits>

#include "emulator.hpp"

#ifndef __global__ // is set to find the kernels
#define __global__
#endif
#define __shared__ static
#define __constant__ static const
#define __align__(n) alignas(n)
#define warpSize 32

#undef assert
#define assert(holds) ((holds) ? (void)0 : emulator::fault("assertion failed: " #holds))

using std::max;
using std::min;
inline float max(float a, float b) { return fmaxf(a, b); }
inline float min(float a, float b) { return fminf(a, b); }
inline unsigned int min(unsigned int a, int b) { return std::min(a, (unsigned int)b); }
inline unsigned int min(int a, unsigned int b) { return std::min((unsigned int)a, b); }
inline unsigned long min(unsigned long a, unsigned int b) { return std::min(a, (unsigned long)b); }
namespace cuda::std { template <typename T> using numeric_limits = ::std::numeric_limits<T>; }

// Sixteen bits that are widened for every operation and rounded after it, as a card's are.
template <typename Bits> struct Narrow {
    Bits bits;
    Narrow() = default;
    template <typename T, typename = std::enable_if_t<std::is_arithmetic_v<T>>> Narrow(T x) { round_to((float)x, bits); }
    operator float() const { return widen(bits); }
    Narrow operator-() const { return Narrow(-widen(bits)); }
    Narrow &operator+=(Narrow x) { return *this = Narrow(widen(bits) + widen(x.bits)); }
    Narrow &operator-=(Narrow x) { return *this = Narrow(widen(bits) - widen(x.bits)); }
    Narrow &operator*=(Narrow x) { return *this = Narrow(widen(bits) * widen(x.bits)); }
    Narrow &operator/=(Narrow x) { return *this = Narrow(widen(bits) / widen(x.bits)); }
    friend Narrow operator+(Narrow a, Narrow b) { return a += b; }
    friend Narrow operator-(Narrow a, Narrow b) { return a -= b; }
    friend Narrow operator*(Narrow a, Narrow b) { return a *= b; }
    friend Narrow operator/(Narrow a, Narrow b) { return a /= b; }
    friend bool operator<(Narrow a, Narrow b) { return widen(a.bits) < widen(b.bits); }
    friend bool operator>(Narrow a, Narrow b) { return widen(a.bits) > widen(b.bits); }
    friend bool operator<=(Narrow a, Narrow b) { return widen(a.bits) <= widen(b.bits); }
    friend bool operator>=(Narrow a, Narrow b) { return widen(a.bits) >= widen(b.bits); }
    friend bool operator==(Narrow a, Narrow b) { return widen(a.bits) == widen(b.bits); }
    friend bool operator!=(Narrow a, Narrow b) { return widen(a.bits) != widen(b.bits); }
};
using __half = Narrow<f16>;
using __nv_bfloat16 = Narrow<bf16>;
using half = __half;

#define NARROW_FUNCTIONS(T) \
    inline bool __hisnan(T a) { return isnan((float)a); } \
    inline T __hmax_nan(T a, T b) { return __hisnan(a) ? a : __hisnan(b) ? b : a < b ? b : a; } \
    inline T __hmin_nan(T a, T b) { return __hisnan(a) ? a : __hisnan(b) ? b : b < a ? b : a; } \
    inline T __habs(T a) { return T(fabsf(a)); } \
    inline T hsqrt(T a) { return T(sqrtf(a)); } \
    inline T hcos(T a) { return T(cosf(a)); } \
    inline T hsin(T a) { return T(sinf(a)); } \
    inline T hlog(T a) { return T(logf(a)); } \
    inline T hexp(T a) { return T(expf(a)); }
NARROW_FUNCTIONS(__half)
NARROW_FUNCTIONS(__nv_bfloat16)

inline __half __float2half(float x) { return __half(x); }
inline float __half2float(__half x) { return x; }
inline __half __int2half_rn(int x) { return __half(x); }
inline __nv_bfloat16 __float2bfloat16(float x) { return __nv_bfloat16(x); }
inline __nv_bfloat16 __float2bfloat16_rn(float x) { return __nv_bfloat16(x); }
inline float __bfloat162float(__nv_bfloat16 x) { return x; }
inline unsigned short __half_as_ushort(__half x) { return x.bits.bits; }
inline __half __ushort_as_half(unsigned short bits) { __half x; x.bits.bits = bits; return x; }

// Candle's operations on e4m3 do not run on CUDA, whose names for them it gets wrong: conversions are enough to compile them.
struct __nv_fp8_e4m3 {
    uint8_t __x;
    __nv_fp8_e4m3() = default;
    explicit __nv_fp8_e4m3(float) { emulator::fault("candle's e4m3 was not expected to run"); }
    operator float() const { emulator::fault("candle's e4m3 was not expected to run"); }
};
enum { __NV_E4M3 };
inline __half __nv_cvt_fp8_to_halfraw(uint8_t x, int) { return __half((float)__nv_fp8_e4m3(x)); }

struct float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct int2 { int x, y; };
struct alignas(16) int4 { int x, y, z, w; };
template <typename T> struct Two { T x, y; };
using half2 = Two<__half>;
using __half2 = half2;
using __nv_bfloat162 = Two<__nv_bfloat16>;
struct dim3 { unsigned int x, y, z; dim3(unsigned int x = 1, unsigned int y = 1, unsigned int z = 1) : x(x), y(y), z(z) {} };
inline float2 make_float2(float x, float y) { return {x, y}; }
inline half2 make_half2(__half x, __half y) { return {x, y}; }
inline float2 __half22float2(half2 a) { return {a.x, a.y}; }
inline __half __low2half(half2 a) { return a.x; }
inline __half __high2half(half2 a) { return a.y; }
inline float __low2float(half2 a) { return a.x; }
inline float __high2float(half2 a) { return a.y; }
template <typename T> Two<T> __hmul2(Two<T> a, Two<T> b) { return {a.x * b.x, a.y * b.y}; }
template <typename T> Two<T> __hadd2(Two<T> a, Two<T> b) { return {a.x + b.x, a.y + b.y}; }
template <typename T> Two<T> __hsub2(Two<T> a, Two<T> b) { return {a.x - b.x, a.y - b.y}; }

inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
inline double rsqrt(double x) { return 1.0 / sqrt(x); }
inline float normcdff(float x) { return 0.5f * erfcf(-x * 0.70710678118654752f); }
inline double normcdf(double x) { return 0.5 * erfc(-x * 0.70710678118654752); }
inline float __fdividef(float a, float b) { return a / b; }

inline int __dp4a(int a, int b, int c) {
    for (int i = 0; i < 4; i++) c += (int)(int8_t)(a >> 8 * i) * (int)(int8_t)(b >> 8 * i);
    return c;
}
inline unsigned int __vsubss4(unsigned int a, unsigned int b) {
    unsigned int c = 0;
    for (int i = 0; i < 4; i++) {
        int d = (int)(int8_t)(a >> 8 * i) - (int)(int8_t)(b >> 8 * i);
        c |= (unsigned int)(uint8_t)(int8_t)std::clamp(d, -128, 127) << 8 * i;
    }
    return c;
}

// One thread runs at a time.
template <typename T, typename V> T atomicAdd(T *p, V x) { T old = *p; *p = old + (T)x; return old; }
template <typename T, typename V> T atomicMax(T *p, V x) { T old = *p; *p = old < (T)x ? (T)x : old; return old; }
template <typename T, typename V> T atomicMin(T *p, V x) { T old = *p; *p = (T)x < old ? (T)x : old; return old; }
template <typename T> T atomicCAS(T *p, T compare, T x) { T old = *p; if (old == compare) *p = x; return old; }
template <typename To, typename From> To same_bits(From x) { To y; memcpy(&y, &x, sizeof y); return y; }
inline unsigned int __float_as_uint(float x) { return same_bits<unsigned int>(x); }
inline int __float_as_int(float x) { return same_bits<int>(x); }
inline float __uint_as_float(unsigned int x) { return same_bits<float>(x); }
inline float __int_as_float(int x) { return same_bits<float>(x); }
inline long long __double_as_longlong(double x) { return same_bits<long long>(x); }
inline double __longlong_as_double(long long x) { return same_bits<double>(x); }

// A kernel's arguments are given as addresses, in order.
template <typename... A, size_t... I> void call_with(void (*kernel)(A...), void *const *given, std::index_sequence<I...>) {
    kernel(*(std::remove_const_t<A> *)given[I]...);
}
template <typename... A> void call_with(void (*kernel)(A...), void *const *given) {
    call_with(kernel, given, std::index_sequence_for<A...>());
}
template <typename... A, size_t... I> std::vector<emulator::Pointed> pointed_by(void (*)(A...), void *const *given, std::index_sequence<I...>) {
    std::vector<emulator::Pointed> all;
    auto one = [&]<typename P>(void *given, P *) {
        if constexpr (std::is_pointer_v<P>) all.push_back({*(const void **)given, !std::is_const_v<std::remove_pointer_t<P>>});
    };
    (one(given[I], (std::remove_const_t<A> *)nullptr), ...);
    return all;
}
template <typename... A> std::vector<emulator::Pointed> pointed_by(void (*kernel)(A...), void *const *given) {
    return pointed_by(kernel, given, std::index_sequence_for<A...>());
}
#define CANDLE_KERNEL(name) \
    static emulator::Listed listed_##name(#name, {[](const void *given) { call_with(name, (void *const *)given); }, \
                                                  [](const void *given) { return pointed_by(name, (void *const *)given); }});
