/* What the machine offers: vectors, threads, aligned memory. The one file with a word on
 * instruction sets; each choice has its plain fallback, and no intrinsic is needed for float32.
 *
 * Vectors are the compiler's own (GCC and clang "vector extensions"): `vec` is as wide as one
 * register of the target that -march=native names, arithmetic on it is written as on a float.
 */
#ifndef MACHINE_H
#define MACHINE_H

#define _GNU_SOURCE /* cores by number: take_core */
#if defined(__AVX__)
#include <immintrin.h>
#elif defined(__ARM_FEATURE_DOTPROD)
#include <arm_neon.h>
#endif
#include <math.h>
#include <pthread.h>
#include <sched.h>
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
/* Compiled once and on its own: inlined into a larger function, GCC 12 leaves some loops as scalar
 * code. */
#if defined(__clang__)
#define ALONE __attribute__((noinline))
#else
#define ALONE __attribute__((noinline, noclone))
#endif
/* The next loop fully: without it the sums of a tile go through memory once more when it ends. */
#define UNROLL _Pragma("GCC unroll 16")
#define EXPORT __attribute__((visibility("default"))) /* called from Python; all else is hidden */

typedef float vec __attribute__((vector_size(VLEN * 4)));
typedef float vec_anywhere __attribute__((vector_size(VLEN * 4), aligned(4), may_alias));

INLINE vec load(const float *p) { return *(const vec_anywhere *)p; }
INLINE void store(float *p, vec v) { *(vec_anywhere *)p = v; }

typedef uint32_t uvec __attribute__((vector_size(VLEN * 4)));
typedef uint16_t shorts __attribute__((vector_size(VLEN * 2), aligned(2), may_alias));

INLINE float as_float(uint32_t bits) {
    float x;
    memcpy(&x, &bits, 4);
    return x;
}

/* bfloat16 is the upper half of a float: its sign, its 8 bits of exponent, 7 of its 23 bits of
 * fraction. */
INLINE float widen_bf16(uint16_t h) { return as_float((uint32_t)h << 16); }
INLINE uint16_t narrow_bf16(float x) { /* to the nearest, ties to even; nan stays nan */
    uint32_t bits;
    memcpy(&bits, &x, 4);
    uint32_t rounded = bits + 0x7fff + (bits >> 16 & 1);
    return (uint16_t)((x == x ? rounded : bits | 0x400000) >> 16);
}
INLINE vec load_bf16(const uint16_t *p) {
#if defined(__AVX512F__) /* GCC 12 makes five instructions of the last line */
    __m256i bits = _mm256_loadu_si256((const __m256i *)p);
    return (vec)_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16);
#elif defined(__AVX2__)
    return (vec)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)p)), 16);
#else
    return (vec)(__builtin_convertvector(*(const shorts *)p, uvec) << 16);
#endif
}

/* ------------------------------------------------------- the factors of a matrix product */

/* Both factors of every matrix product are of type num: float, or with -DBFLOAT16 bfloat16. The
 * range is float's, so no loss ever needs scaling; the error is at most 1/256 of a number. Sums,
 * the residual stream, norms, softmax, and the gradients of weights stay float in both.
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

INLINE float widen(num x) { return widen_bf16(x); }
INLINE num narrow_one(float x) { return narrow_bf16(x); }
INLINE word pair(num lo, num hi) { return lo | (word)hi << 16; }

#ifdef __AVX512BF16__
#define ISA "AVX512-BF16"
INLINE vec dot(vec sum, word left, words right) {
    __m512i both = _mm512_set1_epi32((int)left);
    return (vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)both, (__m512bh)right);
}
INLINE void narrow_vec(vec x, num *y) { /* VLEN numbers */
    _mm256_storeu_si256((__m256i *)y, (__m256i)_mm512_cvtneps_pbh((__m512)x));
}
#else /* the same sums, on float's multiply-add: right but no faster than float */
INLINE vec dot(vec sum, word left, words right) {
    sum += as_float(left & 0xffff0000u) * (vec)(right & 0xffff0000u);
    return sum + as_float(left << 16) * (vec)(right << 16);
}
INLINE void narrow_vec(vec x, num *y) {
    for (int i = 0; i < VLEN; i++) y[i] = narrow_one(x[i]);
}
#endif
INLINE vec widen_vec(const num *p) { return load_bf16(p); }

#else /* float */
#define PAIR 1
#define PRODUCTS "float32"
typedef float num;
typedef float word;
typedef vec words;
typedef vec_anywhere words_anywhere;

INLINE float widen(num x) { return x; }
INLINE num narrow_one(float x) { return x; }
INLINE void narrow_vec(vec x, num *y) { store(y, x); }
INLINE vec widen_vec(const num *p) { return load(p); }
INLINE vec dot(vec sum, word left, words right) { return sum + left * right; }
#endif

#ifndef ISA
#define ISA VECTORS
#endif

INLINE words load_words(const word *p) { return *(const words_anywhere *)p; }

/* --------------------------------------------------------------------- arithmetic on vectors */

typedef int32_t ivec __attribute__((vector_size(VLEN * 4)));

/* The greater one of each lane; b where one of them is nan. */
INLINE vec greater(vec a, vec b) {
#if defined(__AVX512F__)
    return (vec)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX__)
    return (vec)_mm256_max_ps((__m256)a, (__m256)b);
#else
    ivec first = a > b;
    return (vec)((first & (ivec)a) | (~first & (ivec)b));
#endif
}

/* x in the first n lanes, y in the others. */
INLINE vec first_lanes(vec x, long n, float y) {
    static const int32_t numbers[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    ivec first;
    memcpy(&first, numbers, sizeof first);
    first = first < (int32_t)n;
    return (vec)((first & (ivec)x) | (~first & (ivec)((vec){0} + y)));
}

/* Sum and maximum over the lanes, halving: lanes one after another would wait for each other. */
INLINE float sum_of(vec v) {
    UNROLL
    for (int half = VLEN / 2; half; half /= 2)
        for (int i = 0; i < half; i++) v[i] += v[i + half];
    return v[0];
}
INLINE float max_of(vec v) {
    UNROLL
    for (int half = VLEN / 2; half; half /= 2)
        for (int i = 0; i < half; i++) v[i] = v[i] > v[i + half] ? v[i] : v[i + half];
    return v[0];
}

/* The nearest whole number of |x| < 2^22, ties to even: where 1.5 2^23 is added, the last bit of a
 * float is worth 1, and the bits are those of the integer plus WHOLE_BITS. */
#define WHOLE 12582912.0f
#define WHOLE_BITS 0x4B400000

/* e^x to 2 units in the last place; 0 below -87.7 (so a masked score of -inf weighs exactly 0), at
 * most e^88, nan stays nan.
 *
 *     x = n ln 2 + r, |r| <= ln 2 / 2;   e^x = 2^n e^r;   e^r by its Taylor polynomial. */
INLINE vec exp_fast(vec x) {
    vec least = (vec){0} - 88.0f;           /* there n = -127, whose 2^n comes out as 0 */
    vec y = -greater(least, -greater(least, x));
    vec shifted = y * 1.44269504f + WHOLE, n = shifted - WHOLE;
    vec r = (y - n * 0.693359375f) + n * 2.12194440e-4f; /* ln 2 in two parts: exact n * hi */
    vec p = 1.0f + r * (1.0f + r * (1.0f / 2 + r * (1.0f / 6 + r * (1.0f / 24 +
            r * (1.0f / 120 + r * (1.0f / 720 + r * (1.0f / 5040)))))));
    uvec power = ((uvec)shifted - (WHOLE_BITS - 127)) << 23; /* the exponent field of a float */
    return p * (vec)power;
}

/* n numbers, VLEN if there are more; behind them 0 is read and nothing written. */
INLINE vec load_num(const num *p, long n) {
    num some[VLEN] = {0};
    if (n >= VLEN) return widen_vec(p);
    memcpy(some, p, (size_t)n * sizeof(num));
    return widen_vec(some);
}
INLINE void store_num(num *p, vec v, long n) {
    num some[VLEN];
    if (n >= VLEN) {
        narrow_vec(v, p);
        return;
    }
    narrow_vec(v, some);
    memcpy(p, some, (size_t)n * sizeof(num));
}
INLINE vec load_some(const float *p, long n) { /* the same for floats */
    float some[VLEN] = {0};
    if (n >= VLEN) return load(p);
    memcpy(some, p, (size_t)n * sizeof(float));
    return load(some);
}
INLINE void store_some(float *p, vec v, long n) {
    float some[VLEN];
    if (n >= VLEN) {
        store(p, v);
        return;
    }
    store(some, v);
    memcpy(p, some, (size_t)n * sizeof(float));
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
    char *taken; /* (CORES): where a thread of this job runs */
} Start;

/* Go to a core where no other thread of the job is, if there is one; from then on the system may
 * move the thread as it likes. A new thread often begins on its maker's core though another is
 * idle, and is moved after some ms: in jobs of 10 ms two threads were slower than one. */
#define CORES 1024
static inline void take_core(char *taken) {
#ifdef __linux__
    cpu_set_t all, rest;
    int core, moved = 0;
    while ((core = sched_getcpu()) >= 0 && core < CORES &&
           __atomic_exchange_n(taken + core, 1, __ATOMIC_RELAXED)) {
        if (!moved && sched_getaffinity(0, sizeof all, &all)) return;
        rest = all;
        for (int c = 0; c < CORES; c++)
            if (__atomic_load_n(taken + c, __ATOMIC_RELAXED)) CPU_CLR(c, &rest);
        if (!CPU_COUNT(&rest) || sched_setaffinity(0, sizeof rest, &rest)) break;
        moved = 1;
    }
    if (moved) sched_setaffinity(0, sizeof all, &all);
#else
    (void)taken;
#endif
}

static inline void *start(void *p) {
    Start *s = p;
    take_core(s->taken);
    s->job(s->task, s->thread, s->n_threads);
    return NULL;
}

/* Run job in n_threads (at most 256) threads and wait for all. Threads are made anew each time:
 * 20 us against calls of 10 ms and more, and no thread spins beside PyTorch's own. */
static inline void in_threads(Job job, void *task, int n_threads) {
    pthread_t ids[256];
    Start starts[256];
    char made[256], taken[CORES] = {0};
    if (n_threads > 1) take_core(taken);
    for (int i = 1; i < n_threads; i++) {
        starts[i] = (Start){job, task, i, n_threads, taken};
        made[i] = !pthread_create(&ids[i], NULL, start, &starts[i]);
    }
    job(task, 0, n_threads);
    for (int i = 1; i < n_threads; i++) {
        if (made[i]) pthread_join(ids[i], NULL);
        else job(task, i, n_threads); /* no thread to be had: do its share here */
    }
}

/* ------------------------------------------------- threads that wait for each other: decoding */

/* Where the threads of a job meet: nobody goes on before all have come. They spin, since what lies
 * between two meetings takes microseconds; when another program has the core they need, they let
 * it run. */
typedef struct {
    int waiting, round;
} Meeting;

INLINE void meet(Meeting *m, int n_threads) {
    if (n_threads == 1) return;
    int round = __atomic_load_n(&m->round, __ATOMIC_RELAXED);
    if (__atomic_add_fetch(&m->waiting, 1, __ATOMIC_ACQ_REL) == n_threads) {
        __atomic_store_n(&m->waiting, 0, __ATOMIC_RELAXED);
        __atomic_store_n(&m->round, round + 1, __ATOMIC_RELEASE);
        return;
    }
    for (long spins = 0; __atomic_load_n(&m->round, __ATOMIC_ACQUIRE) == round; spins++)
        if (spins > 20000) sched_yield();
}

typedef struct {
    Start start;
    int *n_threads; /* how many there are; 0 as long as that is not known */
} Member;

static inline void *join_in(void *p) {
    Member *m = p;
    int n;
    take_core(m->start.taken);
    while (!(n = __atomic_load_n(m->n_threads, __ATOMIC_ACQUIRE))) sched_yield();
    m->start.job(m->start.task, m->start.thread, n);
    return NULL;
}

/* in_threads for a job whose threads meet: all of them run at once, so n_threads in the job is the
 * number that could be had. */
static inline void in_company(Job job, void *task, int n_threads) {
    pthread_t ids[256];
    Member members[256];
    int made = 1, known = 0;
    char taken[CORES] = {0};
    if (n_threads > 1) take_core(taken);
    for (; made < n_threads; made++) {
        members[made] = (Member){{job, task, made, 0, taken}, &known};
        if (pthread_create(&ids[made], NULL, join_in, &members[made])) break;
    }
    __atomic_store_n(&known, made, __ATOMIC_RELEASE);
    job(task, 0, made);
    for (int i = 1; i < made; i++) pthread_join(ids[i], NULL);
}

/* ------------------------------------------------------ numbers of 16, 8 and 4 bits: decoding */

/* float16: 1 sign, 5 exponent, 10 mantissa bits. Moved to a float's places, the exponent is too
 * small by 112, which a multiplication mends, for subnormal numbers too. */
INLINE float widen_fp16(uint16_t h) {
    uint32_t sign = (uint32_t)(h & 0x8000) << 16, rest = (uint32_t)(h & 0x7FFF) << 13;
    if (rest >= 0x0F800000) return as_float(sign | 0x70000000 | rest); /* inf, nan */
    return as_float(sign | 0x77800000) * as_float(rest);
}

INLINE vec load_fp16(const uint16_t *p) {
#if defined(__F16C__) && VLEN == 8
    return (vec)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p));
#elif defined(__AVX512F__)
    return (vec)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p));
#else
    vec v;
    for (int i = 0; i < VLEN; i++) v[i] = widen_fp16(p[i]);
    return v;
#endif
}

INLINE float whole(float x) { return (x + WHOLE) - WHOLE; }
INLINE int32_t whole_int(float x) { /* anything for nan */
    float y = x + WHOLE;
    int32_t bits;
    memcpy(&bits, &y, 4);
    return bits - WHOLE_BITS;
}

/* Products of whole numbers: 16 rows of a matrix times 32 columns, start + sum_k w[r][k] x[k], one
 * sum per row in NI vectors. The weights lie so that 4 columns of 16 rows are 64 bytes in a row,
 *
 *     int8   k0: r0 c0..3, r1 c0..3, .. r15 c0..3   k1: r0 c4..7, ..   .. k7        512 bytes
 *     int4   the same 4 times, with column c + 16 in the upper half of column c's byte
 *
 * since that is what one instruction of each machine takes: 4 products per 32-bit lane, summed.
 *
 * int4 is stored as 0..15 for -8..7; int8 plus W8_ZERO, because AVX512's instruction wants one
 * factor without sign. The caller's start takes both away again: -8 or -W8_ZERO times sum_k x[k].
 * |x| is at most 127, and so is |w| of int8. */
#define ROWS 16
#define NI (ROWS / VLEN)

INLINE int32_t four(const int8_t *x) { /* 4 bytes as they lie */
    int32_t bytes;
    memcpy(&bytes, x, 4);
    return bytes;
}

#if defined(__AVX512VNNI__)
#define W8_ZERO 128

INLINE void dot_int8(const uint8_t *w, const int8_t *x, int32_t start, ivec *sum) {
    __m512i s = _mm512_set1_epi32(start);
    for (int k = 0; k < 8; k++)
        s = _mm512_dpbusd_epi32(s, _mm512_loadu_si512(w + 64 * k),
                                _mm512_set1_epi32(four(x + 4 * k)));
    sum[0] = (ivec)s;
}

INLINE void dot_int4(const uint8_t *w, const int8_t *x, int32_t start, ivec *sum) {
    __m512i s = _mm512_set1_epi32(start), low = _mm512_set1_epi8(15);
    for (int k = 0; k < 4; k++) {
        __m512i b = _mm512_loadu_si512(w + 64 * k);
        s = _mm512_dpbusd_epi32(s, _mm512_and_si512(b, low),
                                _mm512_set1_epi32(four(x + 4 * k)));
        s = _mm512_dpbusd_epi32(s, _mm512_and_si512(_mm512_srli_epi16(b, 4), low),
                                _mm512_set1_epi32(four(x + 4 * k + 16)));
    }
    sum[0] = (ivec)s;
}
#elif defined(__AVX2__)
#define W8_ZERO 0

/* maddubs: bytes without sign times bytes with sign, neighbours summed to 16 bits; madd with ones
 * sums those to 32. The sign of x moves to w, so that |x| is the factor without sign: at most
 * 2 * 127 * 127 < 2^15. Four bits leave room for eight such sums: 8 * 2 * 15 * 127 < 2^15. */
INLINE void dot_int8(const uint8_t *w, const int8_t *x, int32_t start, ivec *sum) {
    __m256i s[2] = {_mm256_set1_epi32(start), _mm256_set1_epi32(start)};
    __m256i ones = _mm256_set1_epi16(1);
    for (int k = 0; k < 8; k++) {
        __m256i b = _mm256_set1_epi32(four(x + 4 * k)), a = _mm256_abs_epi8(b);
        for (int i = 0; i < 2; i++) {
            __m256i v = _mm256_loadu_si256((const __m256i *)(w + 64 * k + 32 * i));
            v = _mm256_maddubs_epi16(a, _mm256_sign_epi8(v, b));
            s[i] = _mm256_add_epi32(s[i], _mm256_madd_epi16(v, ones));
        }
    }
    memcpy(sum, s, sizeof s);
}

INLINE void dot_int4(const uint8_t *w, const int8_t *x, int32_t start, ivec *sum) {
    __m256i low = _mm256_set1_epi8(15), s[2] = {_mm256_setzero_si256(), _mm256_setzero_si256()};
    for (int k = 0; k < 4; k++) {
        __m256i x0 = _mm256_set1_epi32(four(x + 4 * k));
        __m256i x1 = _mm256_set1_epi32(four(x + 4 * k + 16));
        for (int i = 0; i < 2; i++) {
            __m256i v = _mm256_loadu_si256((const __m256i *)(w + 64 * k + 32 * i));
            __m256i a = _mm256_maddubs_epi16(_mm256_and_si256(v, low), x0);
            v = _mm256_and_si256(_mm256_srli_epi16(v, 4), low);
            s[i] = _mm256_add_epi16(s[i], _mm256_add_epi16(a, _mm256_maddubs_epi16(v, x1)));
        }
    }
    for (int i = 0; i < 2; i++)
        s[i] = _mm256_add_epi32(_mm256_madd_epi16(s[i], _mm256_set1_epi16(1)),
                                _mm256_set1_epi32(start));
    memcpy(sum, s, sizeof s);
}
#elif defined(__ARM_FEATURE_DOTPROD)
#define W8_ZERO 0

INLINE void dot_int8(const uint8_t *w, const int8_t *x, int32_t start, ivec *sum) {
    for (int i = 0; i < 4; i++) {
        int32x4_t s = vdupq_n_s32(start);
        for (int k = 0; k < 8; k++)
            s = vdotq_s32(s, vld1q_s8((const int8_t *)w + 64 * k + 16 * i),
                          vreinterpretq_s8_s32(vdupq_n_s32(four(x + 4 * k))));
        sum[i] = (ivec)s;
    }
}

INLINE void dot_int4(const uint8_t *w, const int8_t *x, int32_t start, ivec *sum) {
    for (int i = 0; i < 4; i++) {
        int32x4_t s = vdupq_n_s32(start);
        for (int k = 0; k < 4; k++) {
            uint8x16_t b = vld1q_u8(w + 64 * k + 16 * i);
            s = vdotq_s32(s, vreinterpretq_s8_u8(vandq_u8(b, vdupq_n_u8(15))),
                          vreinterpretq_s8_s32(vdupq_n_s32(four(x + 4 * k))));
            s = vdotq_s32(s, vreinterpretq_s8_u8(vshrq_n_u8(b, 4)),
                          vreinterpretq_s8_s32(vdupq_n_s32(four(x + 4 * k + 16))));
        }
        sum[i] = (ivec)s;
    }
}
#else /* any machine; the definition of the two */
#define W8_ZERO 0

INLINE void dot_int8(const uint8_t *w, const int8_t *x, int32_t start, ivec *sum) {
    int32_t s[ROWS];
    for (int r = 0; r < ROWS; r++) s[r] = start;
    for (int k = 0; k < 8; k++)
        for (int r = 0; r < ROWS; r++)
            for (int c = 0; c < 4; c++) s[r] += (int8_t)w[64 * k + 4 * r + c] * x[4 * k + c];
    memcpy(sum, s, sizeof s);
}

INLINE void dot_int4(const uint8_t *w, const int8_t *x, int32_t start, ivec *sum) {
    int32_t s[ROWS];
    for (int r = 0; r < ROWS; r++) s[r] = start;
    for (int k = 0; k < 4; k++)
        for (int r = 0; r < ROWS; r++)
            for (int c = 0; c < 4; c++) {
                int byte = w[64 * k + 4 * r + c];
                s[r] += (byte & 15) * x[4 * k + c] + (byte >> 4) * x[4 * k + c + 16];
            }
    memcpy(sum, s, sizeof s);
}
#endif

#endif
