/* The small parts of a block, forward and backward: RMSNorm, RoPE, SwiGLU.
 *
 * Each is a few operations per number, so alone its time is that of moving its numbers. Here they
 * stay in the core's own cache between the matrix products before and after. The simple loops
 * below are the naive nests and the fast version at once: `omp simd` lets the compiler turn each
 * into vector code (it permits the sums to be added in another order; it starts no threads).
 */
#include "kernels.h"

/* ------------------------------------------------------------------------------- RMSNorm
 *     y_i = x_i s w_i,   s = (mean_j x_j^2 + eps)^(-1/2)                            [RMS Eq.4] */

/* y (T, D) = rmsnorm(x (T, D), w (D)); scale (T) keeps s of each row, or is
 * NULL. */
ALONE void rmsnorm(long T, long D, const float *x, const float *w, float eps, float *y,
                   float *scale) {
    for (long t = 0; t < T; t++, x += D, y += D) {
        float sum = 0;
#pragma omp simd reduction(+ : sum)
        for (long i = 0; i < D; i++) sum += x[i] * x[i];
        float s = 1.0f / sqrtf(sum / (float)D + eps);
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
        float s = scale[t], sum = 0;
#pragma omp simd reduction(+ : sum)
        for (long i = 0; i < D; i++) sum += dy[i] * w[i] * x[i];
        float common = sum * s * s * s / (float)D;
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

/* a (T, F) from gu (T, 2F): a row holds its F gates, then its F ups. */
ALONE void swiglu(long T, long F, const float *gu, float *a) {
    for (long t = 0; t < T; t++, gu += 2 * F, a += F)
#pragma omp simd
        for (long i = 0; i < F; i++) a[i] = gu[i] / (1.0f + exp_fast(-gu[i])) * gu[F + i];
}

/* a (T, F) again, and dgu (T, 2F) from da (T, F); a may be da, and dgu gu:
 *
 *     du = da silu(g),   dg = da u silu'(g) = da u sigma(g) (1 + g (1 - sigma(g))),
 *
 * from sigma' = sigma (1 - sigma). */
ALONE void swiglu_backward(long T, long F, const float *gu, const float *da, float *a, float *dgu) {
    for (long t = 0; t < T; t++, gu += 2 * F, dgu += 2 * F, a += F, da += F)
#pragma omp simd
        for (long i = 0; i < F; i++) {
            float g = gu[i], u = gu[F + i], d = da[i], sigma = 1.0f / (1.0f + exp_fast(-g));
            a[i] = g * sigma * u;
            dgu[i] = d * u * sigma * (1.0f + g * (1.0f - sigma));
            dgu[F + i] = d * g * sigma;
        }
}

