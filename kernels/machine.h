/* What the machine offers: vectors, threads, aligned memory. The one file with a word on
 * instruction sets; each choice has its plain fallback, and no intrinsic is needed for float32.
 *
 * Vectors are the compiler's own (GCC and clang "vector extensions"): `vec` is as wide as one
 * register of the target that -march=native names, arithmetic on it is written as on a float.
 */
#ifndef MACHINE_H
#define MACHINE_H

#if defined(BFLOAT16) && defined(__AVX512BF16__)
#include <immintrin.h>
#endif
#include <math.h>
#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

/* ------------------------------------------------------------------------------- vectors */

/* One tile of a matrix product is MR rows x NV vectors, all in registers: MR * NV accumulators,
 * NV for the right matrix and one for the broadcast of the left must fit. */
#if defined(__AVX512F__)   /* 32 registers of 16 floats */
#define VLEN 16
#define MR 12
#define NV 2
#define VECTORS "AVX512"
#elif defined(__AVX__)     /* 16 registers of 8 floats */
#define VLEN 8
#define MR 6
#define NV 2
#define VECTORS "AVX2"
#elif defined(__aarch64__) /* 32 registers of 4 floats */
#define VLEN 4
#define MR 6
#define NV 4
#define VECTORS "NEON"
#else                      /* SSE2 and anything else: 16 registers of 4 floats */
#define VLEN 4
#define MR 6
#define NV 2
#define VECTORS "plain C"
#endif
#define NR (NV * VLEN)     /* columns of one tile */
#define INLINE static inline __attribute__((always_inline))
/* Compiled on its own: inlined into a larger function, GCC 12 leaves some loops as scalar code. */
#define ALONE __attribute__((noinline))
/* The next loop fully: without it the sums of a tile go through memory once more when it ends. */
#define UNROLL _Pragma("GCC unroll 16")
#define EXPORT __attribute__((visibility("default"))) /* called from Python; all else is hidden */

typedef float vec __attribute__((vector_size(VLEN * 4)));
typedef float vec_anywhere __attribute__((vector_size(VLEN * 4), aligned(4), may_alias));

INLINE vec load(const float *p) { return *(const vec_anywhere *)p; }
INLINE void store(float *p, vec v) { *(vec_anywhere *)p = v; }

/* ------------------------------------------------------- the factors of a matrix product */

/* Both factors of every matrix product are of type num: float, or with -DBFLOAT16 bfloat16, the
 * upper half of a float: its sign, its 8 bits of exponent, 7 of its 23 bits of fraction. The range
 * is float's, so no loss ever needs scaling; the error is at most 1/256 of a number. Sums, the
 * residual stream, norms, softmax, gradients and weights stay float in both.
 *
 * Products read words of 32 bits: a float, or PAIR = 2 neighbours along the sum, which is what one
 * lane of the processor's dot product takes. So one word of code serves both types:
 *
 *     dot(sum, left, right):  sum[lane] += left * right[lane]                         (float)
 *                             sum[lane] += left.lo * right[lane].lo + left.hi * right[lane].hi */
#ifdef BFLOAT16
#define PAIR 2
#define PRODUCTS "bfloat16"
typedef uint16_t num;
typedef uint32_t word __attribute__((may_alias));
typedef uint32_t words __attribute__((vector_size(VLEN * 4)));
typedef uint32_t words_anywhere
    __attribute__((vector_size(VLEN * 4), aligned(4), may_alias));

INLINE float as_float(uint32_t bits) {
    float x;
    memcpy(&x, &bits, 4);
    return x;
}

INLINE float widen(num x) { return as_float((uint32_t)x << 16); }

/* The nearest bfloat16, of two equally near the even one; nan stays nan. */
INLINE num narrow_one(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    uint32_t rounded = bits + 0x7fff + (bits >> 16 & 1);
    return (num)((x == x ? rounded : bits | 0x400000) >> 16);
}

INLINE word pair(num lo, num hi) { return lo | (word)hi << 16; }

#ifdef __AVX512BF16__
#define ISA "AVX512-BF16"
INLINE vec dot(vec sum, word left, words right) {
    __m512i both = _mm512_set1_epi32((int)left);
    return (vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)both, (__m512bh)right);
}
INLINE void narrow_vec(const float *x, num *y) { /* VLEN numbers */
    __m256i bits = (__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(x));
    _mm256_storeu_si256((__m256i *)y, bits);
}
#else /* the same sums, on float's multiply-add: right but no faster than float */
INLINE vec dot(vec sum, word left, words right) {
    sum += as_float(left & 0xffff0000u) * (vec)(right & 0xffff0000u);
    return sum + as_float(left << 16) * (vec)(right << 16);
}
INLINE void narrow_vec(const float *x, num *y) {
    for (int i = 0; i < VLEN; i++) y[i] = narrow_one(x[i]);
}
#endif

#else /* float */
#define PAIR 1
#define PRODUCTS "float32"
typedef float num;
typedef float word;
typedef vec words;
typedef vec_anywhere words_anywhere;

INLINE float widen(num x) { return x; }
INLINE num narrow_one(float x) { return x; }
INLINE vec dot(vec sum, word left, words right) { return sum + left * right; }
#endif

#ifndef ISA
#define ISA VECTORS
#endif

INLINE words load_words(const word *p) { return *(const words_anywhere *)p; }

/* e^x to 2 units in the last place; 0 below -87.7 (so a masked score of -inf weighs exactly 0), at
 * most e^88, nan stays nan. Without a branch, so that loops over it become vector code.
 *
 *     x = n ln 2 + r, |r| <= ln 2 / 2;   e^x = 2^n e^r;   e^r by its Taylor polynomial. */
INLINE float exp_fast(float x) {
    float y = x < -88.0f ? -88.0f : x; /* then n = -127, whose 2^n comes out as 0 below */
    y = y > 88.0f ? 88.0f : y;
    float n = rintf(y * 1.44269504f);
    float r = (y - n * 0.693359375f) + n * 2.12194440e-4f; /* ln 2 in two parts: exact n * hi */
    float p = 1.0f + r * (1.0f + r * (1.0f / 2 + r * (1.0f / 6 + r * (1.0f / 24 +
              r * (1.0f / 120 + r * (1.0f / 720 + r * (1.0f / 5040)))))));
    uint32_t bits = (uint32_t)((int32_t)n + 127) << 23; /* 2^n: the exponent field of a float */
    float power;
    memcpy(&power, &bits, 4);
    return p * power;
}

INLINE long round_up(long n, long to) { return (n + to - 1) / to * to; }
INLINE long even(long n) { return round_up(n, PAIR); } /* numbers in whole words */
INLINE long at_most(long a, long b) { return a < b ? a : b; }

/* -------------------------------------------------------------------------------- memory */

/* Buffers of one thread, freed together. */
typedef struct {
    void *held[64];
    int n, failed;
} Pool;

/* n floats on a cache line's boundary, content undefined; NULL and pool->failed if there is no
 * memory. */
static inline float *grab(Pool *pool, long n) {
    void *p = NULL;
    if (pool->n == 64 || posix_memalign(&p, 64, (size_t)(n > 0 ? n : 1) * sizeof(float))) {
        pool->failed = 1;
        return NULL;
    }
    return pool->held[pool->n++] = p;
}

static inline word *grab_words(Pool *pool, long n) { return (word *)grab(pool, n); }

static inline void release(Pool *pool) {
    while (pool->n) free(pool->held[--pool->n]);
}

/* ------------------------------------------------------------------------------- threads */

/* A job is called once in each of n_threads threads with its thread number; the calls agree by
 * that number alone on who does what, so results do not depend on timing. */
typedef void (*Job)(void *task, int thread, int n_threads);

typedef struct {
    Job job;
    void *task;
    int thread, n_threads;
} Start;

static inline void *start(void *p) {
    Start *s = p;
    s->job(s->task, s->thread, s->n_threads);
    return NULL;
}

/* Run job in n_threads (at most 256) threads and wait for all. Threads are made anew each time:
 * 20 us against calls of 10 ms and more, and no thread spins beside PyTorch's own. */
static inline void in_threads(Job job, void *task, int n_threads) {
    pthread_t ids[256];
    Start starts[256];
    char made[256];
    for (int i = 1; i < n_threads; i++) {
        starts[i] = (Start){job, task, i, n_threads};
        made[i] = !pthread_create(&ids[i], NULL, start, &starts[i]);
    }
    job(task, 0, n_threads);
    for (int i = 1; i < n_threads; i++) {
        if (made[i]) pthread_join(ids[i], NULL);
        else job(task, i, n_threads); /* no thread to be had: do its share here */
    }
}

#endif
