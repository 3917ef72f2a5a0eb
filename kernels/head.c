/* Log-probabilities of given tokens, without ever holding the logits (N, V) as floats.
 *
 *     for n < N:  for v < V:  z[v] = hidden[n] . w[v] / temperature               (the naive nest)
 *                 logp[n] = z[target[n]] - log sum_v exp(z[v])
 *
 * Forward: threads own rows; a row's sum of exponentials grows block of vocabulary by block, with a
 * running maximum, so a block of NB x VB logits is all that exists, in the core's cache.
 *
 * Backward: with g = d loss / d logp, and d logp / d z[v] = 1[v = target] - exp(z[v]) / sum exp(z),
 *     dz[v] = g (1[v = target] - exp(z[v] - log_sum)),
 *     d_hidden = dz w / temperature,   dw = dz^T hidden / temperature.
 *
 * Two products, if the logits are still there. The forward pass keeps them if the caller has room,
 * as factors (2 bytes each in bfloat16) and relative to their row's maximum so far: then exp(z) is
 * wrong by |z - maximum| / 512, little exactly where exp(z) is not little itself. Without room they
 * are computed again, a third more arithmetic. Threads own blocks of the vocabulary, so each row of
 * dw has one writer; d_hidden is summed at the end.
 */
#include "kernels.h"

#define NB 192 /* rows (N) of a block of logits */
#define VB 128 /* its columns (V), a multiple of every NR */

typedef struct {
    long N, D, V;
    const float *hidden;    /* (any, D) */
    const int64_t *rows;    /* (N): which rows of hidden */
    const float *w;         /* (V, D) */
    const int64_t *targets; /* (N) */
    float temperature;
    float *logp, *tops, *log_sum; /* (N): the largest logit, log sum_v exp(z[v] - it) */
    num *kept;              /* (V / VB, N, VB): logits less their shift; or NULL */
    float *shifts;          /* (V / VB, N) */
    const float *g;         /* (N): gradient of logp */
    float *d_hidden, *dw;   /* (any, D), (V, D) */
    word *w_t;              /* panels of w^T (D, V): forward */
    num *h;                 /* (N, even(D)): the chosen rows, one after another */
    word *h_packed;         /* the same as right matrices (NB, D): backward */
    float *parts;           /* (n_threads, N, D): each thread's part of d_hidden */
    int failed;
} Head;

/* ------------------------------------------------------------------------------- forward */

static void gather_job(void *task, int thread, int n_threads) {
    Head *a = task;
    long D = a->D, ld = even(D);
    Pool pool = {.n = 0};
    num *w = (num *)grab(&pool, VB * ld);
    if (pool.failed) a->failed = 1;
    for (long v = thread * VB; a->w_t && !pool.failed && v < a->V; v += n_threads * VB) {
        long cols = at_most(VB, a->V - v);
        pack_transposed(D, cols, narrowed(cols, D, a->w + v * D, w), ld, a->w_t + v * deep(D),
                        deep(D) * NR);
    }
    for (long n = thread * NB; n < a->N; n += n_threads * NB) {
        long m = at_most(NB, a->N - n);
        for (long r = n; r < n + m; r++)
            narrow(1, D, a->hidden + a->rows[r] * D, D, a->h + r * ld, ld);
        if (a->h_packed)
            pack(m, D, a->h + n * ld, ld, a->h_packed + n / PAIR * round_up(D, NR), deep(m) * NR);
    }
    release(&pool);
}

/* The block z (m, cols; VB) of logits at row n, from panels w_t of its tokens. Divided by the
 * temperature here, on its own: fused into a later difference of two logits the multiplication
 * would not be rounded, and the largest less itself not 0. */
static void logits(const Head *a, long n, long m, long cols, const word *w_t, float *z) {
    long ld = even(a->D);
    float inverse = 1.0f / a->temperature;
    gemm(m, round_up(cols, NR), a->D, rows_of(a->h + n * ld, ld), w_t, deep(a->D) * NR, z, VB, NULL,
         0);
    for (long r = 0; r < m && inverse != 1; r++)
#pragma omp simd
        for (long j = 0; j < cols; j++) z[r * VB + j] *= inverse;
}

/* Take the logits of one row's block, z (cols, rounded up to VLEN), into its running maximum top
 * and rest = sum exp(z - top) over all but one that is the maximum: 1 + rest would lose the digits
 * of a small rest. kept (as large), or NULL: z - top. */
static ALONE void take_in(float *z, long cols, float *top, float *rest, num *kept) {
    vec most = (vec){0} + *top, more = {0};
    ivec tops = {0}; /* minus the number of maxima */
    float *last = z + (cols - 1) / VLEN * VLEN;
    store(last, first_lanes(load(last), z + cols - last, -INFINITY));
    for (long j = 0; j < cols; j += VLEN) most = greater(load(z + j), most);
    float high = max_of(most);
    for (long j = 0; j < cols; j += VLEN) {
        vec x = load(z + j) - high;
        ivec here = x == 0;
        more += (vec)(~here & (ivec)exp_fast(x));
        tops += here;
        if (kept) store_num(kept + j, x, VLEN);
    }
    float count = -sum_of(__builtin_convertvector(tops, vec));
    if (high > *top) *rest = (1 + *rest) * expf(*top - high) + sum_of(more) + (count - 1);
    else *rest += sum_of(more) + count;
    *top = high;
}

static void logprobs_job(void *task, int thread, int n_threads) {
    Head *a = task;
    long D = a->D;
    Pool pool = {.n = 0};
    float *z = grab(&pool, NB * VB);
    if (pool.failed) a->failed = 1;
    long step = at_most(NB, round_up((a->N + n_threads - 1) / n_threads, MR)); /* even shares */
    for (long n = thread * step; n < a->N && !pool.failed; n += n_threads * step) {
        long m = at_most(step, a->N - n);
        float top[NB], rest[NB], target[NB];
        for (long r = 0; r < m; r++) top[r] = -INFINITY, rest[r] = 0, target[r] = 0;
        for (long v = 0; v < a->V; v += VB) {
            long cols = at_most(VB, a->V - v);
            logits(a, n, m, cols, a->w_t + v * deep(D), z);
            long block = v / VB * a->N + n;
            for (long r = 0; r < m; r++) {
                long at = a->targets[n + r] - v;
                if (at >= 0 && at < cols) target[r] = z[r * VB + at];
                take_in(z + r * VB, cols, top + r, rest + r,
                        a->kept ? a->kept + (block + r) * VB : NULL);
                if (a->kept) a->shifts[block + r] = top[r];
            }
        }
        for (long r = 0; r < m; r++) {
            a->tops[n + r] = top[r], a->log_sum[n + r] = log1pf(rest[r]);
            a->logp[n + r] = (target[r] - top[r]) - a->log_sum[n + r]; /* right also near 0 */
        }
    }
    release(&pool);
}

/* Floats that hold N x V logits for head_backward. */
static long kept_logits(long N, long V) { return N * round_up(V, VB) / PAIR; }
EXPORT long kept_size(long N, long V) { return kept_logits(N, V) + N * round_up(V, VB) / VB; }

/* Fill in where the logits are kept, if they are. */
static void keep(Head *a, float *kept) {
    a->kept = (num *)kept;
    a->shifts = kept ? kept + kept_logits(a->N, a->V) : NULL;
}

/* logp (N) and sums (2, N: tops, log_sum) of targets (N), given hidden (any, D) at rows (N), w (V,
 * D). kept: (kept_size), filled, or NULL. Returns 0, or -1 when memory is short. */
EXPORT int head_forward(long N, long D, long V, const float *hidden, const int64_t *rows,
                        const float *w, const int64_t *targets, float temperature, float *logp,
                        float *sums, float *kept, int n_threads) {
    Pool pool = {.n = 0};
    Head a = {N, D, V, hidden, rows, w, targets, temperature, logp, sums, sums + N, .w_t = NULL};
    keep(&a, kept);
    a.w_t = grab_words(&pool, panels(D, V));
    a.h = (num *)grab(&pool, N * even(D));
    a.failed = pool.failed;
    if (!a.failed) in_threads(gather_job, &a, n_threads);
    if (!a.failed) in_threads(logprobs_job, &a, n_threads);
    release(&pool);
    return a.failed ? -1 : 0;
}

/* ------------------------------------------------------------------------------ backward */

/* The gradient dz (cols) of one row's block of logits z (cols), or kept where it is given, both up
 * to VLEN; dz may be z in float32. at: the target's column, if in it. Its 1 - p is expm1's, which
 * is right where p is nearly 1. */
static ALONE void logits_gradient(const float *z, const num *kept, long cols, long at, float top,
                                  float log_sum, float factor, num *dz) {
    int here = at >= 0 && at < cols;
    float target = !here ? 0 : kept ? widen(kept[at]) : z[at];
    for (long j = 0; j < cols; j += VLEN) {
        vec x = kept ? widen_vec(kept + j) : load(z + j);
        store_num(dz + j, -factor * exp_fast((x - top) - log_sum), VLEN);
    }
    if (here) dz[at] = narrow_one(-factor * expm1f((target - top) - log_sum));
    if (even(cols) > cols) dz[cols] = 0;
}

/* The block (m, cols) of gradients of logits at row n, token v: dz (m, VB). w_t and z (m, VB): for
 * logits that were not kept. */
static void gradient_block(const Head *a, long n, long m, long v, long cols, const word *w_t,
                           float *z, num *dz) {
    long block = v / VB * a->N + n;
    const num *kept = a->kept ? a->kept + block * VB : NULL;
    float inverse = 1.0f / a->temperature;
    if (!kept) logits(a, n, m, cols, w_t, z);
    for (long r = 0; r < m; r++) {
        float shift = kept ? a->shifts[block + r] : 0;
        logits_gradient(z + r * VB, kept ? kept + r * VB : NULL, cols, a->targets[n + r] - v,
                        a->tops[n + r] - shift, a->log_sum[n + r], a->g[n + r] * inverse,
                        dz + r * VB);
    }
}

static void head_backward_job(void *task, int thread, int n_threads) {
    Head *a = task;
    long D = a->D, D_up = round_up(D, NR), ld = even(D);
    Pool pool = {.n = 0};
    float *z = grab(&pool, NB * VB);
    num *dz = PAIR == 1 ? (num *)z : (num *)grab(&pool, NB * VB);
    word *dz_t = grab_words(&pool, PAIR == 1 ? 0 : NB * VB);
    num *room = (num *)grab(&pool, VB * ld);
    word *w_t = grab_words(&pool, panels(D, VB)), *w = grab_words(&pool, panels(VB, D));
    float *part = a->parts + thread * a->N * D;
    if (pool.failed) a->failed = 1;
    memset(part, 0, (size_t)(a->N * D) * sizeof(float));
    for (long v = thread * VB; v < a->V && !pool.failed; v += n_threads * VB) {
        long cols = at_most(VB, a->V - v);
        float *dw = a->dw + v * D;
        const num *w_num = narrowed(cols, D, a->w + v * D, room);
        if (!a->kept) pack_transposed(D, cols, w_num, ld, w_t, deep(D) * NR);
        pack(cols, D, w_num, ld, w, deep(cols) * NR);
        for (long n = 0; n < a->N; n += NB) {
            long m = at_most(NB, a->N - n);
            gradient_block(a, n, m, v, cols, w_t, z, dz);
            gemm(m, D, cols, rows_of(dz, VB), w, deep(cols) * NR, part + n * D, D, part + n * D,
                 D);
            gemm(cols, D, m, columns(m, cols, dz, VB, dz_t), a->h_packed + n / PAIR * D_up,
                 deep(m) * NR, dw, D, n ? dw : NULL, D);
        }
    }
    release(&pool);
}

static void scatter_job(void *task, int thread, int n_threads) {
    Head *a = task;
    for (long n = thread; n < a->N; n += n_threads) {
        float *to = a->d_hidden + a->rows[n] * a->D;
        for (int i = 0; i < n_threads; i++)
#pragma omp simd
            for (long j = 0; j < a->D; j++) to[j] += a->parts[(i * a->N + n) * a->D + j];
    }
}

/* d_hidden (any, D) += at rows (N), which are all different; dw (V, D) =: from g (N) = gradient of
 * logp, with sums and kept, or NULL, as forward left them, N >= 1. Returns 0, or -1 when memory
 * is short. */
EXPORT int head_backward(long N, long D, long V, const float *hidden, const int64_t *rows,
                         const float *w, const int64_t *targets, float temperature, float *sums,
                         float *kept, const float *g, float *d_hidden, float *dw, int n_threads) {
    Pool pool = {.n = 0};
    Head a = {N, D, V, hidden, rows, w, targets, temperature, .tops = sums, .log_sum = sums + N,
              .g = g, .d_hidden = d_hidden, .dw = dw};
    keep(&a, kept);
    a.h = (num *)grab(&pool, N * even(D));
    a.h_packed = grab_words(&pool, deep(round_up(N, PAIR)) * round_up(D, NR));
    a.parts = grab(&pool, n_threads * N * D);
    a.failed = pool.failed;
    if (!a.failed) in_threads(gather_job, &a, n_threads);
    if (!a.failed) in_threads(head_backward_job, &a, n_threads);
    if (!a.failed) in_threads(scatter_job, &a, n_threads);
    release(&pool);
    return a.failed ? -1 : 0;
}
