/* One block over one sequence, forward and backward [L2 §2.2]:
 *
 *     mid = x + wo attention(rope(w_qkv norm(x)));   next = mid + w_down swiglu(w_gu norm(mid))
 *
 * Kept for backward, in floats per token: 3 D + (D + 2 KV hd) + 2 F + H + 2. What is cheap is done
 * again instead of kept: both normalised inputs, the product in SwiGLU, the probabilities.
 */
#include "kernels.h"

/* --------------------------------------------------------------------- what backward needs */

long saved_per_layer(const Shape *s, long T) {
    return T * (3 * s->dim + qkv_dim(s) + 2 * s->hidden_dim + s->n_heads + 2);
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
    a.qkv = a.scale + T;
    a.out = a.qkv + T * qkv_dim(s);
    a.log_sum = a.out + T * D;
    a.mid = a.log_sum + T * s->n_heads;
    a.mid_scale = a.mid + T * D;
    a.gu = a.mid_scale + T;
    return a;
}

/* ------------------------------------------------------------------------------- forward */

Forward forward_buffers(const Shape *s, long T, Pool *pool) {
    Forward f;
    long room = round_up(T, NR);
    f.n = grab(pool, T * s->dim);
    f.act = grab(pool, T * s->hidden_dim);
    f.z = grab(pool, BLOCK * scores_width(T));
    f.keys = (Keys){grab(pool, keys_size(s, room)), grab(pool, keys_size(s, room)), room};
    return f;
}

/* The first part of a block: a.x (T, D) -> a.qkv, and keys and values in f->keys. */
void block_keys(const Shape *s, long T, const Layer *w, const Packed *p, const float *cos,
                const float *sin, const Forward *f, Saved a) {
    long D = s->dim, E = qkv_dim(s);
    rmsnorm(T, D, a.x, w->attention_norm, s->norm_eps, f->n, a.scale);
    gemm(T, E, D, rows_of(f->n, D), p->qkv, D * NR, a.qkv, E, NULL, 0);
    rope(s, T, a.qkv, cos, sin, 1);
    fill_keys(s, T, a.qkv, &f->keys);
}

/* One block over one sequence: a.x (T, D) -> next (T, D), filling a. next may be a.x. */
void block_forward(const Shape *s, long T, const Layer *w, const Packed *p, const float *cos,
                   const float *sin, const int64_t *segments, const Forward *f, Saved a,
                   float *next) {
    long D = s->dim, F = s->hidden_dim;
    block_keys(s, T, w, p, cos, sin, f, a);
    attention(s, T, a.qkv, &f->keys, segments, a.out, a.log_sum, f->z);
    gemm(T, D, D, rows_of(a.out, D), p->o, D * NR, a.mid, D, a.x, D); /* mid = x + wo out */
    rmsnorm(T, D, a.mid, w->ffn_norm, s->norm_eps, f->n, a.mid_scale);
    gemm(T, 2 * F, D, rows_of(f->n, D), p->gu, D * NR, a.gu, 2 * F, NULL, 0);
    swiglu(T, F, a.gu, f->act);
    gemm(T, D, F, rows_of(f->act, F), p->down, F * NR, next, D, a.mid, D);
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
    long widest = E > 2 * F ? E : 2 * F, keys = keys_size(s, room);
    Backward w;
    w.dx = grab(pool, T * D), w.n = grab(pool, T * D), w.dn = grab(pool, T * D);
    w.act = grab(pool, T * F), w.d_act = grab(pool, T * F), w.dgu = grab(pool, 2 * T * F);
    w.d_out = grab(pool, T * D), w.dqkv = grab(pool, T * E);
    w.left = grab(pool, T * round_up(widest, MR));
    w.right = grab(pool, panels(T, D > F ? D : F));
    w.keys = (Keys){grab(pool, keys), grab(pool, keys), room};
    w.scratch.z = grab(pool, BLOCK * scores_width(T));
    w.scratch.dz = grab(pool, BLOCK * scores_width(T));
    w.scratch.q = grab(pool, panels(BLOCK, head_dim(s)));
    w.scratch.d_out = grab(pool, panels(BLOCK, head_dim(s)));
    w.scratch.k = grab(pool, keys), w.scratch.v_t = grab(pool, keys);
    return w;
}

/* dw (N, K) += dy^T x: the gradient of w in y = x w^T, from dy (T, N) and x (T, K). */
static void weight_gradient(long T, long N, long K, const float *dy, const float *x,
                            const Backward *w, float *dw) {
    pack_left(T, N, dy, N, w->left);
    pack(T, K, x, K, w->right, T * NR);
    gemm(N, K, T, packed_columns(w->left, T), w->right, T * NR, dw, K, dw, K);
}

/* One block over one sequence: w->dx (T, D) holds the gradient of the block's output and leaves as
 * that of its input; weight gradients are added to g. The forward pass read from bottom to top. */
void block_backward(const Shape *s, long T, const Layer *l, const Packed *p, const float *cos,
                    const float *sin, const int64_t *segments, Saved a, const Backward *w,
                    Gradients g) {
    long D = s->dim, E = qkv_dim(s), F = s->hidden_dim;
    /* next = mid + w_down swiglu(w_gu norm(mid)) */
    gemm(T, F, D, rows_of(w->dx, D), p->down, D * NR, w->d_act, F, NULL, 0);
    swiglu_backward(T, F, a.gu, w->d_act, w->act, w->dgu);
    weight_gradient(T, D, F, w->dx, w->act, w, g.down);
    rmsnorm_again(T, D, a.mid, l->ffn_norm, a.mid_scale, w->n);
    weight_gradient(T, 2 * F, D, w->dgu, w->n, w, g.gu);
    gemm(T, D, 2 * F, rows_of(w->dgu, 2 * F), p->gu, 2 * F * NR, w->dn, D, NULL, 0);
    rmsnorm_backward(T, D, a.mid, l->ffn_norm, a.mid_scale, w->dn, w->dx, g.ffn_norm);
    /* mid = x + wo attention(rope(w_qkv norm(x))) */
    gemm(T, D, D, rows_of(w->dx, D), p->o, D * NR, w->d_out, D, NULL, 0);
    weight_gradient(T, D, D, w->dx, a.out, w, g.o);
    fill_keys(s, T, a.qkv, &w->keys);
    attention_backward(s, T, a.qkv, &w->keys, segments, a.out, a.log_sum, w->d_out, w->dqkv,
                       w->scratch);
    rope(s, T, w->dqkv, cos, sin, -1);
    rmsnorm_again(T, D, a.x, l->attention_norm, a.scale, w->n);
    weight_gradient(T, E, D, w->dqkv, w->n, w, g.qkv);
    gemm(T, D, E, rows_of(w->dqkv, E), p->qkv, E * NR, w->dn, D, NULL, 0);
    rmsnorm_backward(T, D, a.x, l->attention_norm, a.scale, w->dn, w->dx, g.attention_norm);
}

