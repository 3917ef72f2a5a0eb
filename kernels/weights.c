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
    float *joined; /* (n_threads, max(D + 2 KV hd, 2F), D): matrices side by side */
} Packing;

static long joined_size(const Shape *s) {
    long E = qkv_dim(s), F = s->hidden_dim;
    return s->dim * (E > 2 * F ? E : 2 * F);
}

/* Pack some layers' weights: w^T for y = x w^T in the forward pass, w for dx = dy w in backward. */
static void pack_layers(void *task, int thread, int n_threads) {
    Packing *p = task;
    const Shape *s = p->s;
    long D = s->dim, E = qkv_dim(s), F = s->hidden_dim, kv = (E - D) / 2;
    float *joined = p->joined + thread * joined_size(s);
    for (long l = thread; l < s->n_layers; l += n_threads) {
        const Layer *w = p->layers + l;
        Packed out = p->packed[l];
        memcpy(joined, w->wq, (size_t)(D * D) * sizeof(float));
        memcpy(joined + D * D, w->wk, (size_t)(kv * D) * sizeof(float));
        memcpy(joined + (D + kv) * D, w->wv, (size_t)(kv * D) * sizeof(float));
        if (p->backward) pack(E, D, joined, D, out.qkv, E * NR);
        else pack_transposed(D, E, joined, D, out.qkv, D * NR);
        memcpy(joined, w->w_gate, (size_t)(F * D) * sizeof(float));
        memcpy(joined + F * D, w->w_up, (size_t)(F * D) * sizeof(float));
        if (p->backward) {
            pack(2 * F, D, joined, D, out.gu, 2 * F * NR);
            pack(D, D, w->wo, D, out.o, D * NR);
            pack(D, F, w->w_down, F, out.down, D * NR);
        } else {
            pack_transposed(D, 2 * F, joined, D, out.gu, D * NR);
            pack_transposed(D, D, w->wo, D, out.o, D * NR);
            pack_transposed(F, D, w->w_down, F, out.down, F * NR);
        }
    }
}

/* Packed weights of all layers, taken from pool; NULL if memory is short. */
Packed *pack_weights(const Shape *s, const Layer *layers, int backward, int n_threads, Pool *pool) {
    long D = s->dim, E = qkv_dim(s), F = s->hidden_dim;
    Packed *packed = (Packed *)grab(pool, s->n_layers * (long)(sizeof(Packed) / sizeof(float)));
    long qkv = backward ? panels(E, D) : panels(D, E), o = panels(D, D);
    long gu = backward ? panels(2 * F, D) : panels(D, 2 * F);
    long down = backward ? panels(D, F) : panels(F, D);
    float *all = grab(pool, s->n_layers * (qkv + o + gu + down));
    Packing task = {s, layers, packed, backward, grab(pool, n_threads * joined_size(s))};
    if (pool->failed) return NULL;
    for (long l = 0; l < s->n_layers; l++, all += qkv + o + gu + down)
        packed[l] = (Packed){all, all + qkv, all + qkv + o, all + qkv + o + gu};
    in_threads(pack_layers, &task, n_threads);
    return packed;
}

