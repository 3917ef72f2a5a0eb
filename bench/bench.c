/* Each kernel alone, for `python -m bench`, which checks it against float64 and times it.
 *
 * A function runs its kernel `repeat` times on the same buffers, so a timed call finds its numbers
 * in this core's caches, as the trunk does. The caller starts one thread per core, each with
 * buffers of its own. This file and the kernels are compiled into one library beside theirs
 * (ops.py): what trains and generates has none of it. All arguments are float; what a product
 * multiplies is rounded on the way in, once, before the clock that repeat is.
 */
#include "../kernels/kernels.h"

/* x (T, N) as factors, rows even(N) apart: x itself in float32. */
static const num *factors(long T, long N, const float *x, Pool *pool) {
    num *y = PAIR == 1 ? NULL : (num *)grab(pool, T * even(N) / PAIR);
    return pool->failed ? NULL : narrowed(T, N, x, y);
}

/* ------------------------------------------------------------------------ what the machine can */

/* The most multiply-adds a core can do: MR * NV independent sums, as a tile of the product has
 * them, and no memory. out (MR, NR) keeps them from being optimised away. Returns the operations
 * of one round. */
EXPORT int bench_multiply_add(long repeat, float *out) {
    vec sum[MR][NV];
    for (int i = 0; i < MR; i++)
        for (int j = 0; j < NV; j++) sum[i][j] = load(out + i * NR + j * VLEN);
#if PAIR == 1 /* sum = sum / 2 + 1: a plain sum += a b would become an addition */
    vec half = sum[0][0] * 0 + 0.5f;
    vec one = half + half;
#define STEP(x) (x * half + one)
#else
    words one = (words)sum[0][0];
#define STEP(x) dot(x, one[0], one)
#endif
    for (long r = 0; r < repeat; r++)
        for (int i = 0; i < MR; i++)
            for (int j = 0; j < NV; j++) sum[i][j] = STEP(sum[i][j]);
#undef STEP
    for (int i = 0; i < MR; i++)
        for (int j = 0; j < NV; j++) store(out + i * NR + j * VLEN, sum[i][j]);
    return 2 * PAIR * MR * NV * VLEN;
}

/* Read p (n) from front to back, n a multiple of 8 VLEN; out (VLEN): the sums. Asked for 4 KB
 * ahead, which gets up to 10% more from memory. */
EXPORT int bench_read(long repeat, long n, const float *p, float *out) {
    vec sum[8] = {{0}};
    for (long r = 0; r < repeat; r++)
        for (long i = 0; i < n; i += 8 * VLEN) {
            for (long j = 0; j < 8 * VLEN; j += 16) __builtin_prefetch(p + i + j + 1024);
            for (int j = 0; j < 8; j++) sum[j] += load(p + i + j * VLEN);
        }
    for (int j = 1; j < 8; j++) sum[0] += sum[j];
    store(out, sum[0]);
    return 0;
}

/* Copy from (n) to (n), n a multiple of 8 VLEN: reads and writes in equal parts. */
EXPORT int bench_copy(long repeat, long n, const float *from, float *to) {
    for (long r = 0; r < repeat; r++) {
        for (long i = 0; i < n; i += VLEN) store(to + i, load(from + i));
        __asm__ volatile("" ::: "memory"); /* every round counts */
    }
    return 0;
}

/* -------------------------------------------------------------------------------- the kernels */

/* c (M, N) = a b in one of the three forms of a training step:
 *     0  forward   y = x w^T    a (M, K), b (N, K): w, packed before the clock
 *     1  to x      dx = dy w    a (M, K), b (K, N): w, packed before too
 *     2  to w      dw = dy^T x  a (K, M), b (K, N): both packed in every round
 * Returns 0, or -1 when memory is short; so do all below. */
EXPORT int bench_product(long repeat, int form, long M, long N, long K, const float *a,
                         const float *b, float *c) {
    Pool pool = {.n = 0};
    const num *a_num = form == 2 ? factors(K, M, a, &pool) : factors(M, K, a, &pool);
    const num *b_num = form == 0 ? factors(N, K, b, &pool) : factors(K, N, b, &pool);
    word *right = (word *)grab(&pool, panels(K, N));
    word *left = (word *)grab(&pool, deep(K) * round_up(M, MR));
    long panel = deep(K) * NR;
    int failed = pool.failed;
    if (!failed && form == 0) pack_transposed(K, N, b_num, even(K), right, panel);
    if (!failed && form == 1) pack(K, N, b_num, even(N), right, panel);
    for (long r = 0; r < repeat && !failed; r++) {
        if (form == 2) {
            pack_left(K, M, a_num, even(M), left);
            pack(K, N, b_num, even(N), right, panel);
        }
        Left rows = form == 2 ? packed_columns(left, K) : rows_of(a_num, even(K));
        gemm(M, N, K, rows, right, panel, c, N, NULL, 0);
    }
    release(&pool);
    return failed ? -1 : 0;
}

/* y (T, D) and scale (T) from x (T, D) and the weights w (D). */
EXPORT int bench_rmsnorm(long repeat, long T, long D, const float *x, const float *w, float eps,
                         float *y, float *scale) {
    for (long r = 0; r < repeat; r++) rmsnorm(T, D, x, w, eps, y, scale);
    return 0;
}

/* dx (T, D) and dw (D) from dy (T, D), with the scale of the forward pass; they are added to. */
EXPORT int bench_rmsnorm_backward(long repeat, long T, long D, const float *x, const float *w,
                                  const float *scale, const float *dy, float *dx, float *dw) {
    for (long r = 0; r < repeat; r++) rmsnorm_backward(T, D, x, w, scale, dy, dx, dw);
    return 0;
}

/* qkv (T, E) is turned in place: `repeat` times as far. cos, sin (T, hd / 2). */
EXPORT int bench_rope(long repeat, const Shape *s, long T, float *qkv, const float *cos,
                      const float *sin, float direction) {
    for (long r = 0; r < repeat; r++) rope(s, T, qkv, cos, sin, direction);
    return 0;
}

/* a (T, F) from gu (T, 2F). */
EXPORT int bench_swiglu(long repeat, long T, long F, const float *gu, float *a) {
    Pool pool = {.n = 0};
    const num *gu_num = factors(T, 2 * F, gu, &pool);
    num *a_num = (num *)grab(&pool, T * even(F));
    int failed = pool.failed;
    for (long r = 0; r < repeat && !failed; r++) swiglu(T, F, gu_num, a_num);
    for (long t = 0; t < T && !failed; t++)
        for (long i = 0; i < F; i++) a[t * F + i] = widen(a_num[t * even(F) + i]);
    release(&pool);
    return failed ? -1 : 0;
}

/* a (T, F) and dgu (T, 2F) of the first time, from gu and da: in place, so that a second time its
 * input is what the first one made. */
EXPORT int bench_swiglu_backward(long repeat, long T, long F, const float *gu, const float *da,
                                 float *a, float *dgu) {
    Pool pool = {.n = 0};
    num *gu_num = (num *)grab(&pool, T * 2 * F);   /* dgu afterwards */
    num *da_num = (num *)grab(&pool, T * even(F)); /* a afterwards */
    int failed = pool.failed;
    for (long r = 0; r < repeat && !failed; r++) {
        if (r == 0) {
            narrow(T, 2 * F, gu, 2 * F, gu_num, 2 * F);
            narrow(T, F, da, F, da_num, even(F));
        }
        swiglu_backward(T, F, gu_num, da_num);
        for (long t = 0; t < T && r == 0; t++) {
            for (long i = 0; i < F; i++) a[t * F + i] = widen(da_num[t * even(F) + i]);
            for (long i = 0; i < 2 * F; i++) dgu[t * 2 * F + i] = widen(gu_num[t * 2 * F + i]);
        }
    }
    release(&pool);
    return failed ? -1 : 0;
}

/* out (T, D), log_sum (H, T) from qkv, rotated already; packing of keys and values included. */
EXPORT int bench_attention(long repeat, const Shape *s, long T, const float *qkv, float *out,
                           float *log_sum) {
    Pool pool = {.n = 0};
    long size = T * s->dim;
    Forward buffers = forward_buffers(s, T, &pool);
    const num *qkv_num = factors(T, qkv_dim(s), qkv, &pool);
    num *out_num = PAIR == 1 ? (num *)out : (num *)grab(&pool, size);
    int failed = pool.failed;
    for (long r = 0; r < repeat && !failed; r++) {
        fill_keys(s, T, qkv_num, &buffers.keys);
        attention(s, T, qkv_num, &buffers.keys, NULL, out_num, log_sum, buffers.z);
    }
    for (long i = 0; i < size && !failed && PAIR > 1; i++) out[i] = widen(out_num[i]);
    release(&pool);
    return failed ? -1 : 0;
}

/* dqkv from d_out (T, D), with out and log_sum of the forward pass. */
EXPORT int bench_attention_backward(long repeat, const Shape *s, long T, const float *qkv,
                                    const float *out, const float *log_sum, const float *d_out,
                                    float *dqkv) {
    Pool pool = {.n = 0};
    Backward buffers = backward_buffers(s, T, &pool);
    const num *qkv_num = factors(T, qkv_dim(s), qkv, &pool);
    const num *out_num = factors(T, s->dim, out, &pool);
    const num *d_out_num = factors(T, s->dim, d_out, &pool);
    int failed = pool.failed;
    for (long r = 0; r < repeat && !failed; r++) {
        fill_keys(s, T, qkv_num, &buffers.keys);
        attention_backward(s, T, qkv_num, &buffers.keys, NULL, out_num, log_sum, d_out_num, dqkv,
                           buffers.scratch);
    }
    release(&pool);
    return failed ? -1 : 0;
}
