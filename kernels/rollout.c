/* Answers to many prompts in one call: tokens and their log-probabilities.
 *
 *     for b < B:  while row b lives:  token ~ softmax(logits(prompt, answer so far) / temperature)
 *
 * A thread owns some of the rows from the first token to the last and never waits for another. All
 * its rows take a step together, so each weight is read once for all of them; attention looks at
 * each row's own cache. A row that ends leaves at once. The prompt but for its last token is read
 * in matrix form by the block_forward that trains, whose packed keys and values are the cache; the
 * last token takes its step with those of the other rows.
 *
 * In a dialogue the next prompt is the last one, its answer and a new question. A caller who keeps
 * the caches gets by with the new tokens: the rows take them in step by step, all rows together,
 * before they draw.
 *
 * The random number of (seed, row id, position) is model.py's `uniform`, bit for bit, so the same
 * tokens come out as from PyTorch as long as rounding does not decide.
 */
#include "kernels.h"

/* ------------------------------------------------------------------------------ sampling */

/* splitmix64's finaliser (Steele et al. 2014). */
static uint64_t mix(uint64_t z) {
    z += 0x9E3779B97F4A7C15u;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
    return z ^ (z >> 31);
}

/* A number in [0, 1) for (seed, row, position). */
float uniform(int64_t seed, int64_t row, int64_t position) {
    uint64_t bits = mix(mix(mix((uint64_t)seed) ^ (uint64_t)row) ^ (uint64_t)position);
    return (float)(bits >> 40) / (float)(1 << 24);
}

/* The index of the largest of z (V), the first if several. A search for the place only looks into
 * the last part whose maximum was greater than all before it. */
ALONE long argmax(long V, const float *z) {
    float top = -INFINITY;
    long place = 0;
    for (long from = 0; from < V; from += 512) {
        float most = -INFINITY;
#pragma omp simd reduction(max : most)
        for (long v = from; v < at_most(from + 512, V); v++) most = z[v] > most ? z[v] : most;
        if (most > top) top = most, place = from;
    }
    for (long v = place; v < V; v++)
        if (z[v] == top) return v;
    return 0; /* every logit is nan */
}

/* The first index whose cumulated p exceeds u * total, never one beyond the last p > 0. Sums are
 * doubles rounded to float, as PyTorch's cumsum has them. */
static ALONE long invert(long n, const float *p, float u) {
    double total = 0, sum = 0;
#pragma omp simd reduction(+ : total)
    for (long i = 0; i < n; i++) total += p[i];
    float end = (float)total, target = u * end;
    for (long i = 0; i < n; i++) {
        sum += p[i];
        if ((float)sum > target || (float)sum >= end) return i;
    }
    return n - 1;
}

static int by_p(const void *a, const void *b) { /* most likely first; ties: the smaller token */
    const Candidate *x = a, *y = b;
    return x->p != y->p ? (x->p < y->p ? 1 : -1) : x->token - y->token;
}

/* Draw from the most likely tokens of p (V), up to the one that crosses top_p [code]. kept (V) and
 * c (V) are scratch. */
static long nucleus(long V, const float *p, float top_p, float u, float *kept, Candidate *c) {
    float least = (1.0f - top_p) / (float)V; /* all below this together weigh less than 1 - top_p */
    long n = 0, m = 0;
    for (long v = 0; v < V; v++)
        if (p[v] >= least) c[n++] = (Candidate){p[v], (int32_t)v};
    if (n == 0) return argmax(V, p);
    qsort(c, (size_t)n, sizeof *c, by_p);
    double sum = 0;
    for (; m < n; m++) {
        sum += kept[m] = c[m].p;
        if ((float)sum - kept[m] > top_p) break;
    }
    return c[invert(m, kept, u)].token;
}

/* Draw a token from logits z (V), which are overwritten; *logp becomes its log-probability in the
 * plain distribution at this temperature (1 if greedy), whatever top_p. kept, c (V): scratch. */
ALONE long draw(long V, float *z, float temperature, float top_p, float u, float *kept,
                Candidate *c, float *logp) {
    float divisor = temperature == 0 ? 1.0f : temperature, top = -INFINITY;
    long token = temperature > 0 ? 0 : argmax(V, z);
#pragma omp simd reduction(max : top)
    for (long v = 0; v < V; v++) {
        z[v] /= divisor;
        top = z[v] > top ? z[v] : top;
    }
    float part = 1.0f / exp_row(V, z, 1, top);
#pragma omp simd
    for (long v = 0; v < V; v++) z[v] *= part;
    if (temperature > 0) token = top_p < 1 ? nucleus(V, z, top_p, u, kept, c) : invert(V, z, u);
    *logp = logf(z[token]);
    return token;
}

/* ---------------------------------------------------------------------------- generation */

/* Everything that the threads share. */
typedef struct {
    const Shape *s;
    const Layer *layers;
    const Packed *packed;
    const float *final_norm, *embeddings; /* (D), (V, D) */
    const word *head;                     /* panels of output.weight^T (D, V) */
    const float *cos, *sin;               /* (longest row, hd/2) */
    long B, context, max_new;
    const int64_t *prompts, *starts;      /* prompt b: prompts[starts[b]..starts[b + 1]) */
    const int64_t *row_ids;               /* (B) */
    const int64_t *known, *places;        /* (B): tokens in the kept cache; its number there */
    word *kept;                           /* (any, row_cache): caches kept by the caller, or NULL */
    float temperature, top_p;
    int64_t seed, stop;                   /* stop: -1 for none */
    int64_t *tokens, *counts;             /* (B, max_new), (B): out */
    float *logps;                         /* (B, max_new): out */
    int failed;
} Rollout;

/* One living row of a thread. */
typedef struct {
    long b, position, limit; /* where its next token goes; where it must end */
    int64_t token;           /* the one before it: the prompt's last, or the last drawn */
    Keys *keys;              /* (L): its cache */
} Row;

/* Buffers of one thread for M rows at a time. */
typedef struct {
    float *x, *qkv, *logits;            /* (M, D), (M, D + 2 KV hd), (M, V) */
    float *wide;                        /* (M, D): a result before it is a factor */
    num *n, *qkv_num, *out, *gu, *act;  /* factors; gu (M, 2F), act (M, even(F)) */
    float *z, *sums, *log_sum; /* one row's scores: (group, width), (group), (group) */
    num *p;                    /* the same as factors */
    float *kept;
    Candidate *candidates;
} Step;

static Step step_buffers(const Shape *s, long M, long room, Pool *pool) {
    Step w;
    long D = s->dim, V = s->vocab_size, group = s->n_heads / s->n_kv_heads;
    long width = group * scores_width(room), F = s->hidden_dim;
    w.x = grab(pool, M * D), w.qkv = grab(pool, M * qkv_dim(s));
    w.wide = grab(pool, M * D);
    w.n = (num *)grab(pool, M * D), w.out = (num *)grab(pool, M * D);
    w.gu = (num *)grab(pool, M * 2 * F), w.act = (num *)grab(pool, M * even(F));
    w.qkv_num = PAIR == 1 ? (num *)w.qkv : (num *)grab(pool, M * qkv_dim(s));
    w.logits = grab(pool, M * V);
    w.z = grab(pool, width), w.p = PAIR == 1 ? (num *)w.z : (num *)grab(pool, width);
    w.sums = grab(pool, group), w.log_sum = grab(pool, group);
    w.kept = grab(pool, V);
    w.candidates = (Candidate *)grab(pool, V * (long)(sizeof(Candidate) / sizeof(float)));
    return w;
}

/* Put number (k, n) into the panels of a right matrix, the sum's further numbers being unknown. */
INLINE void put(word *panels, long panel, long k, long n, num x) {
    num *to = (num *)(panels + n / NR * panel + k / PAIR * NR + n % NR);
    to[k % PAIR] = x;
#if PAIR == 2
    if (k % 2 == 0) to[1] = 0; /* what is multiplied by 0 must be a number */
#endif
}

/* Write one token's key and value, qkv (D + 2 KV hd), at its place in the cache. */
static void append_key(const Shape *s, const num *qkv, long position, const Keys *c) {
    long hd = head_dim(s);
    for (long j = 0; j < s->n_kv_heads; j++) {
        const num *k = qkv + s->dim + j * hd, *v = k + s->n_kv_heads * hd;
        word *k_t = keys_of(s, c, j), *values = values_of(s, c, j);
        for (long i = 0; i < hd; i++) {
            put(k_t, deep(hd) * NR, i, position, k[i]);
            put(values, deep(c->room) * NR, position, i, v[i]);
        }
    }
}

/* Attention of one new token over its row's cache: qkv (D + 2 KV hd) -> out (D). */
static void attend(const Shape *s, const num *qkv, long position, const Keys *c, num *out,
                   const Step *w) {
    long hd = head_dim(s), group = s->n_heads / s->n_kv_heads, ld = scores_width(c->room);
    Span span = {0, position + 1, NULL};
    for (long j = 0; j < s->n_kv_heads; j++) {
        long at = j * group * hd;
        float *to = wide(out + at, w->wide);
        gemm(group, round_up(span.to, NR), hd, rows_of(qkv + at, hd), keys_of(s, c, j),
             deep(hd) * NR, w->z, ld, NULL, 0);
        exp_rows(group, w->z, ld, position, span, 1.0f / sqrtf((float)hd), w->p, w->sums,
                 w->log_sum);
        gemm(group, hd, span.to, rows_of(w->p, ld), values_of(s, c, j), deep(c->room) * NR, to,
             hd, NULL, 0);
        divide_rows(group, hd, to, hd, w->sums);
        narrow(group, hd, to, hd, out + at, hd);
    }
}

/* n (M, D) = the factors of rmsnorm(x (M, D)). */
static void norm_rows(const Rollout *g, long M, const float *weight, const Step *w) {
    long D = g->s->dim;
    float *to = wide(w->n, w->wide);
    rmsnorm(M, D, w->x, weight, g->s->norm_eps, to, NULL);
    narrow(M, D, to, D, w->n, D);
}

/* All layers for the last token of M rows: w->x (M, D), embedded, becomes the trunk's output. */
static void step(const Rollout *g, long M, Row *const *rows, const Step *w) {
    const Shape *s = g->s;
    long D = s->dim, E = qkv_dim(s), F = s->hidden_dim, hd = head_dim(s);
    for (long l = 0; l < s->n_layers; l++) {
        const Layer *y = g->layers + l;
        const Packed *p = g->packed + l;
        norm_rows(g, M, y->attention_norm, w);
        gemm(M, E, D, rows_of(w->n, D), p->qkv, deep(D) * NR, w->qkv, E, NULL, 0);
        for (long m = 0; m < M; m++) {
            long at = rows[m]->position - 1;
            num *qkv = w->qkv_num + m * E;
            rotate(s->n_heads + s->n_kv_heads, hd, w->qkv + m * E, g->cos + at * hd / 2,
                   g->sin + at * hd / 2, 1);
            narrow(1, E, w->qkv + m * E, E, qkv, E);
            append_key(s, qkv, at, rows[m]->keys + l);
            attend(s, qkv, at, rows[m]->keys + l, w->out + m * D, w);
        }
        gemm(M, D, D, rows_of(w->out, D), p->o, deep(D) * NR, w->x, D, w->x, D);
        norm_rows(g, M, y->ffn_norm, w);
        gemm_num(M, 2 * F, D, rows_of(w->n, D), p->gu, deep(D) * NR, w->gu, 2 * F);
        swiglu(M, F, w->gu, w->act);
        gemm(M, D, F, rows_of(w->act, even(F)), p->down, deep(F) * NR, w->x, D, w->x, D);
    }
}

/* Tokens of row r's prompt that have not taken their step yet. */
static long unread(const Rollout *g, const Row *r) {
    return g->starts[r->b + 1] - g->starts[r->b] - r->position;
}

/* Draw the next token of M rows from w->x (M, D), or take it from a prompt that is not read to its
 * end; rows that end leave the list. Returns how many live on. */
static long draw_tokens(const Rollout *g, long M, Row **rows, const Step *w) {
    const Shape *s = g->s;
    long D = s->dim, V = s->vocab_size, live = 0, drawing = 0;
    for (long m = 0; m < M; m++) drawing += unread(g, rows[m]) <= 0;
    if (drawing) {
        norm_rows(g, M, g->final_norm, w);
        gemm(M, V, D, rows_of(w->n, D), g->head, deep(D) * NR, w->logits, V, NULL, 0);
    }
    for (long m = 0; m < M; m++) {
        Row *r = rows[m];
        if (unread(g, r) > 0) {
            r->token = g->prompts[g->starts[r->b] + r->position++];
            rows[live++] = r;
            continue;
        }
        float u = uniform(g->seed, g->row_ids[r->b], r->position);
        long at = r->b * g->max_new + g->counts[r->b]++;
        r->token = g->tokens[at] = draw(V, w->logits + m * V, g->temperature, g->top_p, u, w->kept,
                                        w->candidates, g->logps + at);
        r->position++;
        if (r->position < r->limit && r->token != g->stop) rows[live++] = r;
    }
    return live;
}

/* Read the prompt of one row, all but its last token, into its cache. Nothing looks at the last
 * layer's output there, so that layer stops at its keys. a, f: buffers for the longest prompt. */
static void read_prompt(const Rollout *g, const Row *r, Saved a, Forward f) {
    const Shape *s = g->s;
    long D = s->dim, T = r->position - 1;
    for (long t = 0; t < T; t++)
        memcpy(a.x + t * D, g->embeddings + g->prompts[g->starts[r->b] + t] * D,
               (size_t)D * sizeof(float));
    for (long l = 0; l < s->n_layers && T; l++) {
        const Layer *w = g->layers + l;
        f.keys = r->keys[l];
        if (l == s->n_layers - 1) block_keys(s, T, w, g->packed + l, g->cos, g->sin, &f, a);
        else block_forward(s, T, w, g->packed + l, g->cos, g->sin, NULL, &f, a, a.x);
    }
}

/* Words of one row's cache in `kept`. */
static long row_cache(const Shape *s, long context) {
    return 2 * s->n_layers * keys_size(s, round_up(context, NR));
}
EXPORT long row_cache_size(const Shape *s, long context) { return row_cache(s, context); }

/* Every n_threads-th row, from prompt to end. */
static void rollout_job(void *task, int thread, int n_threads) {
    Rollout *g = task;
    const Shape *s = g->s;
    long most = (g->B + n_threads - 1) / n_threads, M = 0, longest = 1, total = 0, reach = 1;
    Pool pool = {.n = 0};
    Row *all = (Row *)grab(&pool, most * (long)(sizeof(Row) / sizeof(float)));
    Row **rows = (Row **)grab(&pool, most * (long)(sizeof(Row *) / sizeof(float)));
    Keys *keys = (Keys *)grab(&pool, most * s->n_layers * (long)(sizeof(Keys) / sizeof(float)));
    for (long b = thread; b < g->B && !pool.failed; b += n_threads) {
        long length = g->starts[b + 1] - g->starts[b];
        long limit = at_most(length + g->max_new, g->context);
        long room = round_up(g->kept ? g->context : limit, NR);
        long read = g->known[b] ? g->known[b] : length - 1; /* before the first step */
        int64_t token = g->prompts[g->starts[b] + read];
        all[M] = (Row){b, read + 1, limit, token, keys + M * s->n_layers};
        for (long l = 0; l < s->n_layers; l++) all[M].keys[l].room = room;
        longest = length > longest ? length : longest;
        reach = room > reach ? room : reach;
        total += g->kept ? 0 : 2 * s->n_layers * keys_size(s, room);
        rows[M] = all + M;
        M++;
    }
    word *cache = grab_words(&pool, total);
    float *saved = grab(&pool, saved_per_layer(s, longest));
    Saved a = saved_at(s, longest, saved, 0);
    Forward f = forward_buffers(s, longest, &pool);
    Step w = step_buffers(s, most, reach, &pool);
    if (pool.failed) g->failed = 1;
    for (long m = 0; m < M && !pool.failed; m++) {
        long b = rows[m]->b;
        if (g->kept) cache = g->kept + g->places[b] * row_cache(s, g->context);
        for (long l = 0; l < s->n_layers; l++) {
            Keys *k = rows[m]->keys + l;
            k->k_t = cache, k->v = cache + keys_size(s, k->room);
            cache += 2 * keys_size(s, k->room);
        }
        if (!g->known[b]) read_prompt(g, rows[m], a, f);
    }
    if (pool.failed || g->max_new == 0) M = 0;
    while (M) {
        for (long m = 0; m < M; m++)
            memcpy(w.x + m * s->dim, g->embeddings + rows[m]->token * s->dim,
                   (size_t)s->dim * sizeof(float));
        step(g, M, rows, &w);
        M = draw_tokens(g, M, rows, &w);
    }
    release(&pool);
}

/* Panels of output.weight^T, in shares. */
typedef struct {
    long D, V;
    const float *w; /* (V, D) */
    num *room;      /* (V, D) */
    word *out;
} HeadPacking;

static void pack_head(void *task, int thread, int n_threads) {
    HeadPacking *p = task;
    long share = round_up((p->V + n_threads - 1) / n_threads, NR), v = thread * share, D = p->D;
    if (v >= p->V) return;
    long cols = at_most(share, p->V - v);
    pack_transposed(D, cols, narrowed(cols, D, p->w + v * D, p->room + v * D), D,
                    p->out + v * deep(D), deep(D) * NR);
}

/* Answer B prompts (see Rollout for the arguments). weights: as in trunk_forward, then embeddings
 * and output.weight. A prompt has 1 to context - 1 tokens, all in the vocabulary; known[b] is less
 * than its length, and 0 where nothing is kept. Returns 0, or -1 when memory is short. */
EXPORT int rollout(const Shape *s, const float *const *weights, const float *cos, const float *sin,
                   long B, long context, long max_new, const int64_t *prompts,
                   const int64_t *starts, const int64_t *row_ids, const int64_t *known,
                   const int64_t *places, word *kept, float temperature, float top_p, long seed,
                   long stop, int64_t *tokens, float *logps, int64_t *counts, int n_threads) {
    Pool pool = {.n = 0};
    const Layer *layers = (const Layer *)weights;
    const float *const *last = weights + 9 * s->n_layers;
    HeadPacking head = {s->dim, s->vocab_size, last[2],
                        (num *)grab(&pool, PAIR == 1 ? 0 : s->dim * s->vocab_size),
                        grab_words(&pool, panels(s->dim, s->vocab_size))};
    Packed *packed = pack_weights(s, layers, 0, n_threads, &pool);
    Rollout g = {s, layers, packed, last[0], last[1], head.out, cos, sin, B, context, max_new,
                 prompts, starts, row_ids, known, places, kept, temperature, top_p, seed, stop,
                 tokens, counts, logps, pool.failed};
    if (!g.failed) {
        in_threads(pack_head, &head, n_threads);
        in_threads(rollout_job, &g, n_threads);
    }
    release(&pool);
    return g.failed ? -1 : 0;
}
