/* The weights of the network, as PyTorch holds them and as the matrix products read them.
 *
 * Packing is done anew at every call: a few milliseconds at most against hundreds, and no copy can
 * ever be stale.
 */
#include "kernels.h"

typedef struct {
    const Shape *s;
    const Layer *layers;
    Packed *packed;
    int backward;
    num *joined; /* (n_threads, joined_size): matrices as factors, side by side */
} Packing;

static long joined_size(const Shape *s) {
    long E = qkv_dim(s), F = s->hidden_dim;
    return s->dim * (E > 2 * even(F) ? E : 2 * even(F));
}

/* Pack some layers' weights: w^T for y = x w^T in the forward pass, w for dx = dy w in backward. */
static void pack_layers(void *task, int thread, int n_threads) {
    Packing *p = task;
    const Shape *s = p->s;
    long D = s->dim, E = qkv_dim(s), F = s->hidden_dim, kv = (E - D) / 2;
    num *joined = p->joined + thread * joined_size(s);
    void (*into)(long, long, const num *, long, word *, long) =
        p->backward ? pack : pack_transposed;
    for (long l = thread; l < s->n_layers; l += n_threads) {
        const Layer *w = p->layers + l;
        Packed out = p->packed[l];
        /* y = x w^T sums over the columns of w (out, in), dx = dy w over its rows */
        long d = p->backward ? D : E, e = p->backward ? E : D;
        narrow(D, D, w->wq, D, joined, D);
        narrow(kv, D, w->wk, D, joined + D * D, D);
        narrow(kv, D, w->wv, D, joined + (D + kv) * D, D);
        into(e, d, joined, D, out.qkv, deep(e) * NR);
        d = p->backward ? D : 2 * F, e = p->backward ? 2 * F : D;
        narrow(F, D, w->w_gate, D, joined, D);
        narrow(F, D, w->w_up, D, joined + F * D, D);
        into(e, d, joined, D, out.gu, deep(e) * NR);
        narrow(D, D, w->wo, D, joined, D);
        into(D, D, joined, D, out.o, deep(D) * NR);
        d = p->backward ? F : D, e = p->backward ? D : F;
        narrow(D, F, w->w_down, F, joined, even(F));
        into(e, d, joined, even(F), out.down, deep(e) * NR);
    }
}

/* Packed weights of all layers, taken from pool; NULL if memory is short. */
Packed *pack_weights(const Shape *s, const Layer *layers, int backward, int n_threads, Pool *pool) {
    long D = s->dim, E = qkv_dim(s), F = s->hidden_dim;
    Packed *packed = (Packed *)grab(pool, s->n_layers * (long)(sizeof(Packed) / sizeof(float)));
    long qkv = backward ? panels(E, D) : panels(D, E), o = panels(D, D);
    long gu = backward ? panels(2 * F, D) : panels(D, 2 * F);
    long down = backward ? panels(D, F) : panels(F, D);
    word *all = grab_words(pool, s->n_layers * (qkv + o + gu + down));
    Packing task = {s, layers, packed, backward, (num *)grab(pool, n_threads * joined_size(s))};
    if (pool->failed) return NULL;
    for (long l = 0; l < s->n_layers; l++, all += qkv + o + gu + down)
        packed[l] = (Packed){all, all + qkv, all + qkv + o, all + qkv + o + gu};
    in_threads(pack_layers, &task, n_threads);
    return packed;
}
