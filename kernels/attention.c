/* Causal grouped-query attention of one sequence, forward and backward [L2 §2.2, GQA].
 *
 *     for h < H:  for t < T:                                            (the naive nest)
 *         for s <= t in t's segment:  z_s = q[t][h] . k[s][h / group] / sqrt(hd)
 *         p = softmax(z);   out[t][h] = sum_s p_s v[s][h / group]
 *
 * Queries are taken BLOCK at a time. Their scores are one matrix product with the keys that at
 * least one of them may see, so half of the square above the diagonal is never computed, and the
 * (H, T, T) probabilities never exist: the backward pass redoes a block from the log of its
 * softmax's denominator, one number per row (FlashAttention's saving, Dao et al. 2022; here the
 * whole row fits the cache, so the softmax needs no running maximum).
 *
 * Backward, with dP = dO V^T and delta_t = sum_s p_ts dP_ts = dO_t . O_t:
 *     dV = P^T dO,   dZ = P (dP - delta) / sqrt(hd),   dQ = dZ K,   dK = dZ^T Q.
 * dZ is the softmax's derivative: dp_s/dz_r = p_s (1[s = r] - p_r), so with z = q . k / sqrt(hd)
 * dloss/dz_r = sum_s dP_s p_s (1[s = r] - p_r) = p_r (dP_r - delta).
 *
 * Forward is two products of n x m x hd per block and head, backward five: scores, dP, dQ, dK, dV.
 * In bfloat16 the factors are q, k, v, P, dO and dZ; scores, the softmax, its sums and delta are
 * float. What limits it is hd: each exponential (20 instructions per vector) is paid for by only
 * 2 hd multiply-adds forward and 5 hd backward, and dK, dV sum over BLOCK queries at a time, so
 * their tiles are read and written after 24 steps only.
 */
#include "kernels.h"

/* Fill the cache from qkv (T, D + 2 KV hd), rotated already. */
void fill_keys(const Shape *s, long T, const num *qkv, const Keys *c) {
    long hd = head_dim(s), E = qkv_dim(s);
    for (long j = 0; j < s->n_kv_heads; j++) {
        const num *k = qkv + s->dim + j * hd, *v = k + s->n_kv_heads * hd;
        pack_transposed(hd, T, k, E, keys_of(s, c, j), deep(hd) * NR);
        pack(T, hd, v, E, values_of(s, c, j), deep(c->room) * NR);
    }
}

/* Keys that some query in [t0, t1) sees; from is a multiple of NR. */
static Span span_of(long t0, long t1, const int64_t *segments) {
    Span span = {0, t1, segments};
    if (!segments) return span;
    for (span.from = 0; span.from < t0; span.from++) {
        int seen = 0;
        for (long t = t0; t < t1; t++) seen |= segments[span.from] == segments[t];
        if (seen) break;
    }
    span.from = span.from / NR * NR;
    return span;
}

/* z (to - from rounded up to VLEN): -inf where query t may not look. Whole vectors are written,
 * since whole vectors are read next: a processor waits when a load joins several stores. */
INLINE void hide(float *z, long t, Span span) {
    long seen = at_most(t + 1, span.to) - span.from, last = seen / VLEN * VLEN;
    if (last < seen) store(z + last, first_lanes(load(z + last), seen - last, -INFINITY));
    for (long s = round_up(seen, VLEN); s < span.to - span.from; s += VLEN)
        store(z + s, (vec){0} - INFINITY);
    if (!span.segments) return;
    for (long s = span.from; s < t; s++)
        if (span.segments[s] != span.segments[t]) z[s - span.from] = -INFINITY;
}

/* p (n, m; ld) = exp(scale (z - max)) as factors, from the scores z (n, m; ld) of n rows against m
 * keys; row r is query t0 + r. p may be z in float32. sums (n): each row's sum; log_sum (n): the
 * log of the softmax's denominator. */
ALONE void exp_rows(long n, float *z, long ld, long t0, Span span, float scale, num *p, float *sums,
                    float *log_sum) {
    long m = span.to - span.from;
    for (long r = 0; r < n; r++, z += ld, p += ld) {
        hide(z, t0 + r, span);
        vec most = (vec){0} - INFINITY, sum = {0};
        for (long s = 0; s < m; s += VLEN) most = greater(load(z + s), most);
        float top = max_of(most);
        for (long s = 0; s < m; s += VLEN) {
            vec e = exp_fast(scale * (load(z + s) - top));
            store_num(p + s, e, VLEN);
            sum += e;
        }
        sums[r] = sum_of(sum);
        log_sum[r] = scale * top + logf(sums[r]);
    }
}

/* Rows of out (n, hd; ld) divided by their sums (n): the softmax's normalisation, on hd numbers
 * instead of on the row of scores. */
ALONE void divide_rows(long n, long hd, float *out, long ld, const float *sums) {
    for (long r = 0; r < n; r++, out += ld) {
        float part = 1.0f / sums[r];
#pragma omp simd
        for (long i = 0; i < hd; i++) out[i] *= part;
    }
}

/* out (T, D) from the queries in qkv (T, D + 2 KV hd) and the cache; log_sum (H, T) for backward;
 * z: scores_size(T) floats of scratch. */
void attention(const Shape *s, long T, const num *qkv, const Keys *c, const int64_t *segments,
               num *out, float *log_sum, float *z) {
    long hd = head_dim(s), E = qkv_dim(s), D = s->dim, group = s->n_heads / s->n_kv_heads;
    long ld = scores_width(T), ldo = PAIR == 1 ? D : hd;
    num *p = PAIR == 1 ? (num *)z : (num *)(z + BLOCK * ld);
    float *head = z + BLOCK * 2 * ld;
    float scale = 1.0f / sqrtf((float)hd);
    for (long t0 = 0; t0 < T; t0 += BLOCK) {
        long n = at_most(BLOCK, T - t0);
        Span span = span_of(t0, t0 + n, segments);
        long m = span.to - span.from;
        for (long h = 0; h < s->n_heads; h++) {
            const word *k_t = keys_of(s, c, h / group) + span.from * hd / PAIR;
            const word *v = values_of(s, c, h / group) + span.from / PAIR * NR;
            /* whole panels of keys: what lies beyond m is not looked at */
            gemm(n, round_up(m, NR), hd, rows_of(qkv + t0 * E + h * hd, E), k_t, deep(hd) * NR, z,
                 ld, NULL, 0);
            float sums[BLOCK];
            exp_rows(n, z, ld, t0, span, scale, p, sums, log_sum + h * T + t0);
            float *to = wide(out + t0 * D + h * hd, head);
            gemm(n, hd, m, rows_of(p, ld), v, deep(c->room) * NR, to, ldo, NULL, 0);
            divide_rows(n, hd, to, ldo, sums);
            narrow(n, hd, to, ldo, out + t0 * D + h * hd, D);
        }
    }
}

/* p = softmax again, dz = gradient of the scores, as factors (n, m; ld), from z = q k^T and dp, the
 * same size; in float32 p may be z and dz dp. out, d_out: this head's columns at query t0, rows D
 * apart. delta comes from the same factors as dP, so that what cancels in exact arithmetic (a
 * single key: dZ = 0) cancels here. */
static ALONE void softmax_backward(long n, float *z, const float *dp, long ld, long t0, Span span,
                                   float scale, const float *log_sum, const num *out,
                                   const num *d_out, long D, long hd, num *p, num *dz) {
    long m = span.to - span.from;
    for (long r = 0; r < n; r++, z += ld, dp += ld, p += ld, dz += ld, out += D, d_out += D) {
        hide(z, t0 + r, span);
        vec sum = {0};
        for (long i = 0; i < hd; i += VLEN)
            sum += load_num(d_out + i, hd - i) * load_num(out + i, hd - i);
        float delta = sum_of(sum);
        for (long s = 0; s < m; s += VLEN) {
            vec e = exp_fast(scale * load(z + s) - log_sum[r]);
            vec d = e * (load(dp + s) - delta) * scale;
            store_num(p + s, e, VLEN);
            store_num(dz + s, d, VLEN);
        }
    }
}

/* dqkv (T, D + 2 KV hd) from d_out (T, D), with the qkv, out and log_sum of the forward pass. The
 * keys and values of a group of heads are shared, so their gradients add up over its heads. */
void attention_backward(const Shape *s, long T, const num *qkv, const Keys *c,
                        const int64_t *segments, const num *out, const float *log_sum,
                        const num *d_out, float *dqkv, AttentionScratch x) {
    long hd = head_dim(s), E = qkv_dim(s), D = s->dim, KV = s->n_kv_heads, deep_hd = deep(hd);
    long group = s->n_heads / KV, ld = scores_width(T), hd_up = round_up(hd, NR);
    long room = deep(c->room);
    float scale = 1.0f / sqrtf((float)hd);
    num *p = PAIR == 1 ? (num *)x.z : x.p_num, *dz = PAIR == 1 ? (num *)x.dz : x.dz_num;
    for (long j = 0; j < KV; j++) {
        pack(T, hd, qkv + D + j * hd, E, x.k + j * room * hd_up, room * NR);
        pack_transposed(hd, T, qkv + D + (KV + j) * hd, E, x.v_t + j * c->room * deep_hd,
                        deep_hd * NR);
    }
    for (long t = 0; t < T; t++) memset(dqkv + t * E + D, 0, (size_t)(E - D) * sizeof(float));
    for (long t0 = 0; t0 < T; t0 += BLOCK) {
        long n = at_most(BLOCK, T - t0);
        Span span = span_of(t0, t0 + n, segments);
        long m = span.to - span.from;
        for (long h = 0; h < s->n_heads; h++) {
            long j = h / group, at = t0 * D + h * hd;
            const num *q = qkv + t0 * E + h * hd;
            float *dk = dqkv + span.from * E + D + j * hd, *dv = dk + KV * hd;
            /* 1) scores, and dP = dO V^T */
            gemm(n, round_up(m, NR), hd, rows_of(q, E), keys_of(s, c, j) + span.from * deep_hd,
                 deep_hd * NR, x.z, ld, NULL, 0);
            gemm(n, round_up(m, NR), hd, rows_of(d_out + at, D),
                 x.v_t + (j * c->room + span.from) * deep_hd, deep_hd * NR, x.dz, ld, NULL, 0);
            /* 2) P and dZ */
            softmax_backward(n, x.z, x.dz, ld, t0, span, scale, log_sum + h * T + t0, out + at,
                             d_out + at, D, hd, p, dz);
            /* 3) dQ = dZ K */
            gemm(n, hd, m, rows_of(dz, ld), x.k + j * room * hd_up + span.from / PAIR * NR,
                 room * NR, dqkv + t0 * E + h * hd, E, NULL, 0);
            /* 4) dK += dZ^T Q, dV += P^T dO */
            pack(n, hd, q, E, x.q, deep(n) * NR);
            pack(n, hd, d_out + at, D, x.d_out, deep(n) * NR);
            gemm(m, hd, n, columns(n, m, dz, ld, x.dz_t), x.q, deep(n) * NR, dk, E, dk, E);
            gemm(m, hd, n, columns(n, m, p, ld, x.p_t), x.d_out, deep(n) * NR, dv, E, dv, E);
        }
    }
}
