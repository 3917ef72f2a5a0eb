/* One block over one sequence, forward and backward [L2 §2.2]:
 *
 *     mid = x + wo attention(rope(w_qkv norm(x)));   next = mid + w_down swiglu(w_gu norm(mid))
 *
 * Kept for backward per token: 2 D + H + 2 floats and D + (D + 2 KV hd) + 2 F factors of products.
 * What is cheap is done again instead of kept: both normalised inputs, the product in SwiGLU, the
 * probabilities. A product whose result is a factor writes it as one (gemm_num). What is worked on
 * in between is float first (`wide`), then a factor (`narrow`); where factors are float32 both are
 * one array and nothing is copied (gemm.c).
 */
#include "kernels.h"

/* --------------------------------------------------------------------- what backward needs */

long saved_per_layer(const Shape *s, long T) {
    long factors = qkv_dim(s) + s->dim + 2 * s->hidden_dim;
    return T * (2 * s->dim + factors / PAIR + s->n_heads + 2);
}

/* Floats kept per sequence of T tokens: all layers, then x and its scale before the final norm. */
EXPORT long saved_size(const Shape *s, long T) {
    return s->n_layers * saved_per_layer(s, T) + T * (s->dim + 1);
}

Saved saved_at(const Shape *s, long T, float *base, long l) {
    long D = s->dim;
    Saved a;
    a.x = base + l * saved_per_layer(s, T);
    a.scale = a.x + T * D;
    a.log_sum = a.scale + T;
    a.mid = a.log_sum + T * s->n_heads;
    a.mid_scale = a.mid + T * D;
    a.qkv = (num *)(a.mid_scale + T);
    a.out = a.qkv + T * qkv_dim(s);
    a.gu = a.out + T * D;
    return a;
}

/* ------------------------------------------------------------------------------- forward */

/* The widest of a block's products per token: q, k, v or gates and ups. */
static long widest(const Shape *s) {
    long E = qkv_dim(s), F = s->hidden_dim;
    return E > 2 * F ? E : 2 * F;
}

Forward forward_buffers(const Shape *s, long T, Pool *pool) {
    Forward f;
    long room = round_up(T, NR), rows = at_most(CHUNK, T);
    f.n = (num *)grab(pool, rows * s->dim);
    f.act = (num *)grab(pool, rows * even(s->hidden_dim));
    f.wide = grab(pool, PAIR == 1 ? 0 : rows * qkv_dim(s));
    f.z = grab(pool, scores_size(s, T));
    f.keys = (Keys){grab_words(pool, keys_size(s, room)), grab_words(pool, keys_size(s, room)),
                    room};
    return f;
}

/* The first part of a block: a.x (T, D) -> a.qkv, and keys and values in f->keys. */
void block_keys(const Shape *s, long T, const Layer *w, const Packed *p, const float *cos,
                const float *sin, const Forward *f, Saved a) {
    long D = s->dim, E = qkv_dim(s), half = head_dim(s) / 2;
    for (long t = 0; t < T; t += CHUNK) {
        long n = at_most(CHUNK, T - t);
        float *normed = wide(f->n, f->wide), *qkv = wide(a.qkv + t * E, f->wide);
        rmsnorm(n, D, a.x + t * D, w->attention_norm, s->norm_eps, normed, a.scale + t);
        narrow(n, D, normed, D, f->n, D);
        gemm(n, E, D, rows_of(f->n, D), p->qkv, deep(D) * NR, qkv, E, NULL, 0);
        rope(s, n, qkv, cos + t * half, sin + t * half, 1);
        narrow(n, E, qkv, E, a.qkv + t * E, E);
    }
    fill_keys(s, T, a.qkv, &f->keys);
}

/* One block over one sequence: a.x (T, D) -> next (T, D), filling a. next may be a.x. CHUNK tokens
 * at a time, so that what a product writes is still in the core's cache when the next reads it. */
void block_forward(const Shape *s, long T, const Layer *w, const Packed *p, const float *cos,
                   const float *sin, const int64_t *segments, const Forward *f, Saved a,
                   float *next) {
    long D = s->dim, F = s->hidden_dim;
    block_keys(s, T, w, p, cos, sin, f, a);
    attention(s, T, a.qkv, &f->keys, segments, a.out, a.log_sum, f->z);
    for (long t = 0; t < T; t += CHUNK) {
        long n = at_most(CHUNK, T - t);
        float *mid = a.mid + t * D, *normed = wide(f->n, f->wide);
        num *gu = a.gu + t * 2 * F;
        gemm(n, D, D, rows_of(a.out + t * D, D), p->o, deep(D) * NR, mid, D, a.x + t * D, D);
        rmsnorm(n, D, mid, w->ffn_norm, s->norm_eps, normed, a.mid_scale + t);
        narrow(n, D, normed, D, f->n, D);
        gemm_num(n, 2 * F, D, rows_of(f->n, D), p->gu, deep(D) * NR, gu, 2 * F);
        swiglu(n, F, gu, f->act);
        gemm(n, D, F, rows_of(f->act, even(F)), p->down, deep(F) * NR, next + t * D, D, mid, D);
    }
}

/* ------------------------------------------------------------------------------ backward */

long gradients_size(const Shape *s) { /* floats per layer */
    return s->dim * (2 + qkv_dim(s) + s->dim + 3 * s->hidden_dim);
}

Gradients gradients_at(const Shape *s, float *flat, long l) {
    long D = s->dim, F = s->hidden_dim;
    Gradients g;
    g.attention_norm = flat + l * gradients_size(s);
    g.qkv = g.attention_norm + D;
    g.o = g.qkv + qkv_dim(s) * D;
    g.ffn_norm = g.o + D * D;
    g.gu = g.ffn_norm + D;
    g.down = g.gu + 2 * F * D;
    return g;
}

Backward backward_buffers(const Shape *s, long T, Pool *pool) {
    long D = s->dim, E = qkv_dim(s), F = s->hidden_dim, room = round_up(T, NR);
    long keys = keys_size(s, room), scores = BLOCK * scores_width(T), both = PAIR == 1 ? 0 : 1;
    Backward w;
    w.dx = grab(pool, T * D), w.dn = grab(pool, T * D);
    w.dqkv = grab(pool, T * E), w.d_out = (num *)grab(pool, T * D);
    w.n = (num *)grab(pool, T * D), w.act = (num *)grab(pool, T * even(F));
    w.dy = (num *)grab(pool, both * T * E), w.wide = grab(pool, both * T * D);
    w.left = grab_words(pool, round_up(widest(s), MR) * deep(T));
    w.right = grab_words(pool, panels(T, D > F ? D : F));
    w.keys = (Keys){grab_words(pool, keys), grab_words(pool, keys), room};
    w.scratch.z = grab(pool, scores), w.scratch.dz = grab(pool, scores);
    w.scratch.p_num = (num *)grab(pool, both * scores);
    w.scratch.dz_num = (num *)grab(pool, both * scores);
    w.scratch.p_t = grab_words(pool, both * scores);
    w.scratch.dz_t = grab_words(pool, both * scores);
    w.scratch.q = grab_words(pool, panels(BLOCK, head_dim(s)));
    w.scratch.d_out = grab_words(pool, panels(BLOCK, head_dim(s)));
    w.scratch.k = grab_words(pool, keys), w.scratch.v_t = grab_words(pool, keys);
    return w;
}

/* dw (N, K) += dy^T x: the gradient of w in y = x w^T, from dy (T, N) and x (T, K; ldx). Nothing
 * for NULL, a weight that does not learn. */
static void weight_gradient(long T, long N, long K, const num *dy, const num *x, long ldx,
                            const Backward *w, float *dw) {
    if (!dw) return;
    pack_left(T, N, dy, N, w->left);
    pack(T, K, x, ldx, w->right, deep(T) * NR);
    gemm(N, K, T, packed_columns(w->left, T), w->right, deep(T) * NR, dw, K, dw, K);
}

/* The normalised input again, as a factor: w->n (T, D). */
static void norm_again(long T, long D, const float *x, const float *weight, const float *scale,
                       const Backward *w) {
    float *n = wide(w->n, w->wide);
    rmsnorm_again(T, D, x, weight, scale, n);
    narrow(T, D, n, D, w->n, D);
}

/* One block over one sequence: w->dx (T, D) holds the gradient of the block's output and leaves as
 * that of its input; weight gradients are added to g. The forward pass read from bottom to top. */
void block_backward(const Shape *s, long T, const Layer *l, const Packed *p, const float *cos,
                    const float *sin, const int64_t *segments, Saved a, const Backward *w,
                    Gradients g) {
    long D = s->dim, E = qkv_dim(s), F = s->hidden_dim;
    /* next = mid + w_down swiglu(w_gu norm(mid)); act comes to stand where d_act stood, dgu where
     * gu did */
    const num *dy = narrowed(T, D, w->dx, w->dy);
    gemm_num(T, F, D, rows_of(dy, D), p->down, deep(D) * NR, w->act, even(F));
    swiglu_backward(T, F, a.gu, w->act);
    weight_gradient(T, D, F, dy, w->act, even(F), w, g.down);
    if (g.gu) norm_again(T, D, a.mid, l->ffn_norm, a.mid_scale, w);
    weight_gradient(T, 2 * F, D, a.gu, w->n, D, w, g.gu);
    gemm(T, D, 2 * F, rows_of(a.gu, 2 * F), p->gu, deep(2 * F) * NR, w->dn, D, NULL, 0);
    rmsnorm_backward(T, D, a.mid, l->ffn_norm, a.mid_scale, w->dn, w->dx, g.ffn_norm);
    /* mid = x + wo attention(rope(w_qkv norm(x))) */
    dy = narrowed(T, D, w->dx, w->dy);
    gemm_num(T, D, D, rows_of(dy, D), p->o, deep(D) * NR, w->d_out, D);
    weight_gradient(T, D, D, dy, a.out, D, w, g.o);
    fill_keys(s, T, a.qkv, &w->keys);
    attention_backward(s, T, a.qkv, &w->keys, segments, a.out, a.log_sum, w->d_out, w->dqkv,
                       w->scratch);
    rope(s, T, w->dqkv, cos, sin, -1);
    norm_again(T, D, a.x, l->attention_norm, a.scale, w);
    dy = narrowed(T, E, w->dqkv, w->dy);
    weight_gradient(T, E, D, dy, w->n, D, w, g.qkv);
    gemm(T, D, E, rows_of(dy, E), p->qkv, deep(E) * NR, w->dn, D, NULL, 0);
    rmsnorm_backward(T, D, a.x, l->attention_norm, a.scale, w->dn, w->dx, g.attention_norm);
}
