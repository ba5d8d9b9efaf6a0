// Numbers in fp32 and bf16, one at a time and several at a time, and e^x of them.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#ifdef __AVX2__
#include <immintrin.h>
#endif

typedef int64_t i64;

struct bf16 {
    uint16_t bits;
};

static inline float get(const float* p, i64 i) { return p[i]; }
static inline float get(const bf16* p, i64 i) {
    uint32_t wide = uint32_t(p[i].bits) << 16;
    float value;
    memcpy(&value, &wide, 4);
    return value;
}
static inline void put(float* p, i64 i, float value) { p[i] = value; }
static inline void put(bf16* p, i64 i, float value) {
    uint32_t wide;
    memcpy(&wide, &value, 4);
    uint32_t rounded = (wide + 0x7fff + ((wide >> 16) & 1)) >> 16;  // to nearest, ties to even
    p[i].bits = value != value ? 0x7fc0 : uint16_t(rounded);
}
template <typename T>
static inline float rounded(float value) {
    T cell;
    put(&cell, 0, value);
    return get(&cell, 0);
}

// As many numbers at once as the processor takes, for what computes e^x: from loops over single numbers compilers make
// twice the operations, since they keep every way in which a NaN might pass.
#if defined(__AVX512F__)
const i64 LANES = 16;
#elif defined(__AVX2__)
const i64 LANES = 8;
#else
const i64 LANES = 4;
#endif
typedef float lanes __attribute__((vector_size(4 * LANES)));
typedef uint32_t lane_bits __attribute__((vector_size(4 * LANES)));
typedef int32_t lane_integers __attribute__((vector_size(4 * LANES)));
typedef uint16_t half_bits __attribute__((vector_size(2 * LANES)));

// n numbers from p on, and `rest` after them
static inline lanes load(const float* p, i64 n, float rest = 0) {
    lanes values = lanes{} + rest;
    memcpy(&values, p, n * sizeof(float));
    return values;
}
static inline lanes load(const bf16* p, i64 n, float rest = 0) {
    half_bits cells;
    if (n < LANES) {
        bf16 filled[LANES];
        for (i64 i = 0; i < LANES; i++) put(filled, i, rest);
        memcpy(static_cast<void*>(filled), p, n * sizeof(bf16));
        memcpy(&cells, filled, sizeof cells);
    } else {
        memcpy(&cells, p, sizeof cells);
    }
    lane_bits wide = __builtin_convertvector(cells, lane_bits) << 16;
    lanes values;
    memcpy(&values, &wide, sizeof values);
    return values;
}
static inline void store(float* p, i64 n, lanes values) { memcpy(p, &values, n * sizeof(float)); }
static inline void store(bf16* p, i64 n, lanes values) {
#ifdef __AVX512BF16__
    __m256bh cells = _mm512_cvtneps_pbh((__m512)values);  // what is below 1.2e-38 becomes 0
#else
    lane_bits wide;
    memcpy(&wide, &values, sizeof wide);
    lane_bits rounded = (wide + 0x7fff + ((wide >> 16) & 1)) >> 16;
    half_bits cells = __builtin_convertvector(values != values ? lane_bits{} + 0x7fc0 : rounded, half_bits);
#endif
    memcpy(static_cast<void*>(p), &cells, n * sizeof(bf16));
}

// a b + c, rounded once where the processor has that as one operation; x, or `bound` where x is more or less. NaN stays.
#if defined(__AVX512F__)
static inline lanes fused(lanes a, lanes b, lanes c) { return (lanes)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c); }
static inline lanes at_most(lanes bound, lanes x) { return (lanes)_mm512_min_ps((__m512)bound, (__m512)x); }
static inline lanes at_least(lanes bound, lanes x) { return (lanes)_mm512_max_ps((__m512)bound, (__m512)x); }
#elif defined(__AVX2__) && defined(__FMA__)
static inline lanes fused(lanes a, lanes b, lanes c) { return (lanes)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c); }
static inline lanes at_most(lanes bound, lanes x) { return (lanes)_mm256_min_ps((__m256)bound, (__m256)x); }
static inline lanes at_least(lanes bound, lanes x) { return (lanes)_mm256_max_ps((__m256)bound, (__m256)x); }
#else
static inline lanes fused(lanes a, lanes b, lanes c) { return a * b + c; }
static inline lanes at_most(lanes bound, lanes x) { return x > bound ? bound : x; }
static inline lanes at_least(lanes bound, lanes x) { return x < bound ? bound : x; }
#endif

static inline lanes all(float value) { return lanes{} + value; }

// e^x to two units in the last place; 0 below -87, inf above 88.7
static inline lanes exponential(lanes x) {
    lanes bounded = at_most(all(89.0f), at_least(all(-87.3f), x));
#ifdef __AVX512F__
    lanes n = (lanes)_mm512_roundscale_ps((__m512)(bounded * 1.44269504f), _MM_FROUND_TO_NEAREST_INT);
#else
    lanes n = (bounded * 1.44269504f + 12582912.0f) - 12582912.0f;  // 1.5 * 2^23: the sum has no digits after the point
#endif
    lanes r = fused(n, all(2.12194440e-4f), fused(n, all(-0.693359375f), bounded));
    lanes p = all(1.9875691500e-4f);
    p = fused(p, r, all(1.3981999507e-3f));
    p = fused(p, r, all(8.3334519073e-3f));
    p = fused(p, r, all(4.1665795894e-2f));
    p = fused(p, r, all(1.6666665459e-1f));
    p = fused(p, r, all(5.0000001201e-1f));
    p = fused(p * r, r, r) + 1.0f;
#ifdef __AVX512F__
    __mmask16 seen = _mm512_cmp_ps_mask((__m512)x, _mm512_set1_ps(-87.0f), _CMP_NLE_UQ);  // NaN too
    return (lanes)_mm512_maskz_scalef_ps(seen, (__m512)p, (__m512)n);
#else
    // 2^(n - 1), since n may be 128; of n = -126 this is 0
    lane_integers bits = (__builtin_convertvector(n, lane_integers) + 126) << 23;
    lanes half;
    memcpy(&half, &bits, sizeof half);
    return p * half * 2.0f;
#endif
}

static inline lanes sigmoid(lanes x) { return 1.0f / (1.0f + exponential(-x)); }
static inline float sum(lanes values) {
    float total = 0;
#pragma omp simd reduction(+ : total)
    for (i64 i = 0; i < LANES; i++) total += values[i];
    return total;
}
static inline float largest(lanes values) {
    float top = -INFINITY;
#pragma omp simd reduction(max : top)
    for (i64 i = 0; i < LANES; i++) top = values[i] > top ? values[i] : top;
    return top;
}

// body(i, n), a lambda marked INLINE, for n numbers from i on: LANES, but at the end the rest
#define INLINE __attribute__((always_inline))
template <typename Body>
static inline void over(i64 from, i64 to, Body body) {
    for (; from + LANES <= to; from += LANES) body(from, LANES);
    if (from < to) body(from, to - from);
}
