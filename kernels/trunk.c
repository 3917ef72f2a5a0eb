/* The whole trunk, forward and backward: L blocks and the final norm [L2 §2.2].
 *
 *     for b < B:  x = in[b];  for l < L:  x = block_l(x);   hidden[b] = norm(x)    (the naive nest)
 *
 * One sequence goes through all layers in one thread, so its activations stay in that core's
 * caches, where running operation by operation over the whole batch streams every activation
 * through memory a dozen times; and threads meet only at the end. Each thread adds up its own
 * weight gradients; at the end they are summed. Which thread takes which sequence depends on the
 * lengths alone, never on timing, so the same call gives the same bits.
 */
#include "kernels.h"

/* The instruction set that the library was compiled for, and the type of its products' factors. */
EXPORT const char *isa(void) { return ISA; }
EXPORT const char *products(void) { return PRODUCTS; }

/* 0 if a small product comes out right: tried once, in its own process, before the library is
 * used. */
EXPORT int self_test(void) { /* small whole numbers: exact in bfloat16 too */
    float a[7][5], b[5][19], c[7][19];
    num left[7][6], right[5][20];
    word packed[5 * (19 + NR)];
    for (int k = 0; k < 5; k++) {
        for (int i = 0; i < 7; i++) a[i][k] = (float)(i - k);
        for (int j = 0; j < 19; j++) b[k][j] = (float)(j % 4 + k);
    }
    narrow(7, 5, a[0], 5, left[0], 6);
    narrow(5, 19, b[0], 19, right[0], 20);
    pack(5, 19, right[0], 20, packed, deep(5) * NR);
    gemm(7, 19, 5, rows_of(left[0], 6), packed, deep(5) * NR, c[0], 19, NULL, 0);
    for (int i = 0; i < 7; i++)
        for (int j = 0; j < 19; j++) {
            float sum = 0;
            for (int k = 0; k < 5; k++) sum += a[i][k] * b[k][j];
            if (c[i][j] != sum) return 1;
        }
    return 0;
}

/* ----------------------------------------------------------------------------- the batch */

/* Everything that the threads of one call share. */
typedef struct {
    const Shape *s;
    long B, T;
    const Layer *layers;
    const float *final_norm;  /* (D) */
    const float *cos, *sin;   /* (T, hd/2) */
    const int64_t *lengths;   /* (B) */
    const int64_t *segments;  /* (B, T) or NULL */
    const int *owner;         /* (B): the thread of each sequence */
    const Packed *packed;
    float *saved;             /* (B, saved_size), or NULL: nothing is kept */
    const float *in;          /* (B, T, D): x, or d_hidden */
    float *out;               /* (B, T, D): hidden, or dx */
    float *gradients, *others; /* all_gradients: the first thread's; one row for each other */
    int ffn;                  /* whether the feed-forward matrices learn */
    int failed;
} Batch;

/* Give each sequence to the thread with the least work so far. */
static void share_out(long B, const int64_t *lengths, int n_threads, int *owner) {
    long load[256] = {0};
    for (long b = 0; b < B; b++) {
        int least = 0;
        for (int i = 1; i < n_threads; i++)
            if (load[i] < load[least]) least = i;
        load[owner[b] = least] += lengths[b];
    }
}

/* ------------------------------------------------------------------------------- forward */

static void forward_job(void *task, int thread, int n_threads) {
    Batch *g = task;
    const Shape *s = g->s;
    (void)n_threads;
    long D = s->dim, T = g->T;
    Pool pool = {.n = 0};
    Forward f = forward_buffers(s, T, &pool);
    float *one_layer = g->saved ? NULL : grab(&pool, saved_per_layer(s, T));
    if (pool.failed) g->failed = 1;
    for (long b = 0; b < g->B && !pool.failed; b++) {
        if (g->owner[b] != thread) continue;
        long n = g->lengths[b];
        float *base = g->saved ? g->saved + b * saved_size(s, T) : one_layer;
        Saved a = saved_at(s, T, base, 0);
        memcpy(a.x, g->in + b * T * D, (size_t)(n * D) * sizeof(float));
        for (long l = 0; l < s->n_layers && n; l++) {
            Saved next = saved_at(s, T, base, g->saved ? l + 1 : 0);
            block_forward(s, n, g->layers + l, g->packed + l, g->cos, g->sin,
                          g->segments ? g->segments + b * T : NULL, &f, a, next.x);
            a = next;
        }
        float *hidden = g->out + b * T * D;
        rmsnorm(n, D, a.x, g->final_norm, s->norm_eps, hidden, a.scale);
        memset(hidden + n * D, 0, (size_t)((T - n) * D) * sizeof(float));
    }
    release(&pool);
}

/* hidden (B, T, D) from the embedded tokens x (B, T, D); 0 from lengths[b] on. weights: 9 pointers
 * a layer in the order of Layer, then the final norm. saved: (B, saved_size) for the backward
 * pass, or NULL. Returns 0, or -1 when memory is short. */
EXPORT int trunk_forward(const Shape *s, long B, long T, const float *x, const int64_t *lengths,
                         const int64_t *segments, const float *const *weights, const float *cos,
                         const float *sin, float *saved, float *hidden, int n_threads) {
    Pool pool = {.n = 0};
    const Layer *layers = (const Layer *)weights;
    int *owner = (int *)grab(&pool, B);
    Packed *packed = pack_weights(s, layers, 0, n_threads, &pool);
    Batch g = {s, B, T, layers, weights[9 * s->n_layers], cos, sin, lengths, segments, owner,
               packed, saved, x, hidden, NULL, NULL, 0, pool.failed};
    if (!g.failed) {
        share_out(B, lengths, n_threads, owner);
        in_threads(forward_job, &g, n_threads);
    }
    release(&pool);
    return g.failed ? -1 : 0;
}

/* ------------------------------------------------------------------------------ backward */

static long all_gradients(const Shape *s) {
    return s->n_layers * gradients_size(s) + s->dim;
}

static void backward_job(void *task, int thread, int n_threads) {
    Batch *g = task;
    const Shape *s = g->s;
    (void)n_threads;
    long D = s->dim, T = g->T, L = s->n_layers;
    float *flat = thread ? g->others + (thread - 1) * all_gradients(s) : g->gradients;
    memset(flat, 0, (size_t)all_gradients(s) * sizeof(float));
    Pool pool = {.n = 0};
    Backward w = backward_buffers(s, T, &pool);
    if (pool.failed) g->failed = 1;
    for (long b = 0; b < g->B && !pool.failed; b++) {
        if (g->owner[b] != thread) continue;
        long n = g->lengths[b];
        float *base = g->saved + b * saved_size(s, T), *dx = g->out + b * T * D;
        Saved last = saved_at(s, T, base, L);
        memset(w.dx, 0, (size_t)(n * D) * sizeof(float));
        rmsnorm_backward(n, D, last.x, g->final_norm, last.scale, g->in + b * T * D, w.dx,
                         flat + L * gradients_size(s));
        for (long l = L - 1; l >= 0 && n; l--) {
            Gradients at = gradients_at(s, flat, l);
            if (!g->ffn) at.gu = at.down = NULL;
            block_backward(s, n, g->layers + l, g->packed + l, g->cos, g->sin,
                           g->segments ? g->segments + b * T : NULL, saved_at(s, T, base, l), &w,
                           at);
        }
        memcpy(dx, w.dx, (size_t)(n * D) * sizeof(float));
        memset(dx + n * D, 0, (size_t)((T - n) * D) * sizeof(float));
    }
    release(&pool);
}

/* The first thread's gradients += those of all others, each thread its share of the numbers. */
static void sum_job(void *task, int thread, int n_threads) {
    Batch *g = task;
    long n = all_gradients(g->s), share = (n + n_threads - 1) / n_threads;
    for (int i = 1; i < n_threads; i++)
#pragma omp simd
        for (long j = thread * share; j < at_most(n, (thread + 1) * share); j++)
            g->gradients[j] += g->others[(i - 1) * n + j];
}

/* dx (B, T, D) and all weight gradients from d_hidden (B, T, D). saved: as the forward pass left
 * it. gradients: (all_gradients), in the order of the weights; without ffn those of gate, up and
 * down are 0: a third of the products with weights is left out. Returns 0, or -1 when memory is
 * short. */
EXPORT int trunk_backward(const Shape *s, long B, long T, const float *d_hidden,
                          const int64_t *lengths, const int64_t *segments,
                          const float *const *weights, const float *cos, const float *sin,
                          float *saved, float *dx, float *gradients, int ffn, int n_threads) {
    Pool pool = {.n = 0};
    const Layer *layers = (const Layer *)weights;
    int *owner = (int *)grab(&pool, B);
    Packed *packed = pack_weights(s, layers, 1, n_threads, &pool);
    float *others = grab(&pool, (n_threads - 1) * all_gradients(s));
    Batch g = {s, B, T, layers, weights[9 * s->n_layers], cos, sin, lengths, segments, owner,
               packed, saved, d_hidden, dx, gradients, others, ffn, pool.failed};
    if (!g.failed) {
        share_out(B, lengths, n_threads, owner);
        in_threads(backward_job, &g, n_threads);
        in_threads(sum_job, &g, n_threads);
    }
    release(&pool);
    return g.failed ? -1 : 0;
}
