/* The small parts of a block, forward and backward: RMSNorm, RoPE, SwiGLU.
 *
 * Each is a few operations per number, so alone its time is that of moving its numbers. Here they
 * stay in the core's own cache between the matrix products before and after. Loops without a sum
 * are the naive nest and the fast version at once: `omp simd` lets the compiler turn them into
 * vector code (it starts no threads). Sums and exponentials are written in vectors (machine.h):
 * load_some and load_num read 0 behind a row's end.
 */
#include "kernels.h"

/* ------------------------------------------------------------------------------- RMSNorm
 *     y_i = x_i s w_i,   s = (mean_j x_j^2 + eps)^(-1/2)                            [RMS Eq.4] */

/* y (T, D) = rmsnorm(x (T, D), w (D)); scale (T) keeps s of each row, or is
 * NULL. */
ALONE void rmsnorm(long T, long D, const float *x, const float *w, float eps, float *y,
                   float *scale) {
    for (long t = 0; t < T; t++, x += D, y += D) {
        vec sum = {0};
        for (long i = 0; i < D; i += VLEN) {
            vec v = load_some(x + i, D - i);
            sum += v * v;
        }
        float s = 1.0f / sqrtf(sum_of(sum) / (float)D + eps);
        if (scale) scale[t] = s;
#pragma omp simd
        for (long i = 0; i < D; i++) y[i] = x[i] * s * w[i];
    }
}

/* y (T, D) again, from the scale (T) that was kept: cheaper than keeping y. */
ALONE void rmsnorm_again(long T, long D, const float *x, const float *w, const float *scale,
                         float *y) {
    for (long t = 0; t < T; t++)
#pragma omp simd
        for (long i = 0; i < D; i++) y[t * D + i] = x[t * D + i] * scale[t] * w[i];
}

/* dx (T, D) += gradient through the norm of dy (T, D); dw (D) += that of the weight.
 *
 * With m = sum_j x_j^2 / D, s = (m + eps)^(-1/2):  ds/dx_i = -1/2 s^3 2 x_i / D = -s^3 x_i / D. All
 * y_j = x_j s w_j depend on x_i through s, and y_i directly. With g_j = dy_j w_j:
 *
 *     dx_i = s g_i + ds/dx_i sum_j g_j x_j = s g_i - x_i s^3 / D sum_j g_j x_j
 *     dw_i = dy_i x_i s */
ALONE void rmsnorm_backward(long T, long D, const float *x, const float *w, const float *scale,
                            const float *dy, float *dx, float *dw) {
    for (long t = 0; t < T; t++, x += D, dy += D, dx += D) {
        float s = scale[t];
        vec sum = {0};
        for (long i = 0; i < D; i += VLEN)
            sum += load_some(dy + i, D - i) * load_some(w + i, D - i) * load_some(x + i, D - i);
        float common = sum_of(sum) * s * s * s / (float)D;
#pragma omp simd
        for (long i = 0; i < D; i++) {
            dx[i] += s * dy[i] * w[i] - common * x[i];
            dw[i] += dy[i] * x[i] * s;
        }
    }
}

/* ---------------------------------------------------------------------------------- RoPE
 *     (x_2i, x_2i+1) turns by the angle p theta^(-2i/hd) of its position p         [RoPE Eq.34]
 * A rotation is orthogonal: its backward pass is the rotation by the opposite angle. */

/* Turn n_heads heads of one token, x (n_heads, hd), by cos, sin (hd/2); direction +1 or -1. */
void rotate(long n_heads, long hd, float *x, const float *cos, const float *sin, float direction) {
    for (long h = 0; h < n_heads; h++, x += hd)
#pragma omp simd
        for (long i = 0; i < hd / 2; i++) {
            float even = x[2 * i], odd = x[2 * i + 1], s = direction * sin[i];
            x[2 * i] = even * cos[i] - odd * s;
            x[2 * i + 1] = even * s + odd * cos[i];
        }
}

/* Turn the queries and keys of T tokens at positions 0..T-1: qkv (T, D + 2 KV hd). */
ALONE void rope(const Shape *s, long T, float *qkv, const float *cos, const float *sin,
                float direction) {
    long hd = head_dim(s), half = hd / 2;
    for (long t = 0; t < T; t++) /* keys stand right behind the queries: one run of heads */
        rotate(s->n_heads + s->n_kv_heads, hd, qkv + t * qkv_dim(s), cos + t * half,
               sin + t * half, direction);
}

/* -------------------------------------------------------------------------------- SwiGLU
 *     a = silu(g) u,   silu(g) = g sigma(g)                                         [GLU Eq.6] */

/* a (T, F; even(F)) from gu (T, 2F): a row holds its F gates, then its F ups. */
ALONE void swiglu(long T, long F, const num *gu, num *a) {
    for (long t = 0; t < T; t++, gu += 2 * F, a += even(F)) {
        for (long i = 0; i < F; i += VLEN)
            store_num(a + i, silu_times(load_num(gu + i, F - i), load_num(gu + F + i, F - i)),
                      F - i);
        if (even(F) > F) a[F] = 0;
    }
}

/* In place: gu (T, 2F) becomes its gradient, and da (T, F; even(F)) a, which the forward pass had:
 *
 *     du = da silu(g),   dg = da u silu'(g) = da u sigma(g) (1 + g (1 - sigma(g))),
 *
 * from sigma' = sigma (1 - sigma). */
ALONE void swiglu_backward(long T, long F, num *gu, num *da) {
    for (long t = 0; t < T; t++, gu += 2 * F, da += even(F)) {
        for (long i = 0; i < F; i += VLEN) {
            long n = F - i;
            vec g = load_num(gu + i, n), u = load_num(gu + F + i, n), d = load_num(da + i, n);
            vec sigma = 1.0f / (1.0f + exp_fast(-g));
            store_num(da + i, g * sigma * u, n);
            store_num(gu + i, d * u * sigma * (1.0f + g * (1.0f - sigma)), n);
            store_num(gu + F + i, d * g * sigma, n);
        }
        if (even(F) > F) da[F] = 0;
    }
}

/* ------------------------------------------------------------------------------- softmax */

/* z (n) becomes exp(scale (z - top)); returns the sum. */
ALONE float exp_row(long n, float *z, float scale, float top) {
    vec sum = {0};
    for (long i = 0; i < n; i += VLEN) {
        vec e = exp_fast(scale * (load_some(z + i, n - i) - top));
        store_some(z + i, e, n - i);
        sum += first_lanes(e, n - i, 0);
    }
    return sum_of(sum);
}
