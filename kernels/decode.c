/* One answer, token by token: the network as a few matrix-vector products.
 *
 *     for each token:  for each layer:  y = W x,  seven times                      (the naive nest)
 *                      for r < rows:  for k < cols:  y[r] += w[r][k] * x[k]
 *
 * Each weight is read once per token and used for one product, so time is the bytes of the weights
 * over the memory's bandwidth, and the way to be faster is fewer bytes per weight:
 *
 *     fp32   4      rows as PyTorch has them, not even copied when the file has this format
 *     bf16   2      the same
 *     int8   1.06   groups of 32 along a row: w = d q, one step d in bf16, q in -127..127
 *     int4   0.56   the same with q in -8..7
 *
 * int8 and int4 weights are multiplied by an input in int8, also with a step per group of 32, so a
 * group is a sum of whole numbers (dot_int8, dot_int4 in machine.h) and one multiplication by both
 * steps. They lie in tiles of ROWS rows: a tile is one run of memory,
 *
 *     group 0: d of 16 rows, q of 16 rows x 32 columns    group 1: ..          zeros at both ends
 *
 * that one thread reads from front to back: hardware fetches a single stream at full speed, and
 * loses a fifth of it on two.
 *
 * All threads share every product, by rows, and meet after it; six meetings per layer, of well
 * under a microsecond as long as each thread has its core. Small things (norm, the input's steps)
 * each thread does for itself, which is cheaper than to wait for another.
 *
 * A prompt is read up to MANY tokens at a time, so that memory is read once for all: each tile, or
 * row, is multiplied by one token after the other while it is in the core's cache. For more than
 * FEW tokens fp32 and bf16 are faster in matrix form: a block of weights is laid out in panels in
 * float32 and multiplied by all tokens (gemm.c). int8 and int4 never: theirs is the faster product.
 */
#include "kernels.h" /* first: it asks the system's headers for more than C's */

#include <time.h>

enum { FP32, BF16, FP16, INT8, INT4 }; /* mirrors FORMATS in decode.py */

#define GROUP 32  /* columns that share a step */
#define MANY 128  /* tokens of a prompt at a time */
#define FEW 16    /* so many are not worth panels */
#define DEPTH 256 /* columns of a block of weights laid out at a time */
#define WIDTH 32  /* its rows: a multiple of every NR */

/* ------------------------------------------------------------------------------ matrices */

/* A matrix (rows, cols) in one of the formats; mirrors ctypes in decode.py. */
typedef struct {
    const void *data;
    int64_t rows, cols, format;
} Matrix;

INLINE long groups_of(long cols) { return (cols + GROUP - 1) / GROUP; }
INLINE long group_bytes(long format) { /* of one tile: ROWS steps, ROWS x GROUP numbers */
    return ROWS * 2 + (format == INT8 ? ROWS * GROUP : ROWS * GROUP / 2);
}
INLINE int is_tiled(const Matrix *m) { return m->format == INT8 || m->format == INT4; }
INLINE long tiles_of(const Matrix *m) { return (m->rows + ROWS - 1) / ROWS; }
INLINE const uint8_t *tile_at(const Matrix *m, long tile) {
    return (const uint8_t *)m->data + tile * groups_of(m->cols) * group_bytes(m->format);
}

INLINE long share(long n, int thread, int n_threads) { return n * thread / n_threads; }

/* Where row r begins in a format that has rows. */
INLINE const void *row_at(const Matrix *m, long r) {
    return (const char *)m->data + r * m->cols * (m->format == FP32 ? 4 : 2);
}

INLINE float number(const void *p, long i, long format) {
    return format == FP32 ? ((const float *)p)[i]
         : format == BF16 ? widen_bf16(((const uint16_t *)p)[i])
                          : widen_fp16(((const uint16_t *)p)[i]);
}
INLINE vec numbers(const void *p, long i, long format) {
    return format == FP32 ? load((const float *)p + i)
         : format == BF16 ? load_bf16((const uint16_t *)p + i)
                          : load_fp16((const uint16_t *)p + i);
}

/* out (n) = row r from column k on. */
INLINE void widen_row(const Matrix *m, long r, long k, long n, float *out) {
    const void *row = row_at(m, r);
    if (m->format == FP32) memcpy(out, (const float *)row + k, (size_t)n * sizeof(float));
    else if (m->format == BF16)
        for (long i = 0; i < n; i++) out[i] = widen_bf16(((const uint16_t *)row)[k + i]);
    else
        for (long i = 0; i < n; i++) out[i] = widen_fp16(((const uint16_t *)row)[k + i]);
}

/* The bytes of a matrix in INT8 or INT4. */
EXPORT long packed_bytes(long rows, long cols, long format) {
    return (rows + ROWS - 1) / ROWS * groups_of(cols) * group_bytes(format);
}

/* ---------------------------------------------------------------------------- quantising */

/* w / step, cut to least .. most. */
INLINE float cut(float x, float least, float most) {
    x = x < least ? least : x;
    return x > most ? most : x;
}

/* The greatest size among 32 numbers; nan if one of them is not finite (0 * inf is nan). */
INLINE float greatest(const float *w) {
    float most = 0, finite = 0;
#pragma omp simd reduction(max : most) reduction(+ : finite)
    for (int k = 0; k < GROUP; k++) {
        most = fabsf(w[k]) > most ? fabsf(w[k]) : most;
        finite += 0.0f * w[k];
    }
    return most + finite;
}

/* The step of 32 numbers in int4 with the least squared error among a few choices: the number of
 * greatest size becomes one of -7 .. -9 (cut to -8) in quarters; q follows, and for that q the best
 * step is d = sum w q / sum q^2, with error sum w^2 - (sum w q)^2 / sum q^2. */
INLINE float step_int4(const float *w) {
    float most = greatest(w), top = 0, best = 0, step = 0;
    if (!(most > 0)) return most; /* 0 or nan */
#pragma omp simd reduction(max : top)
    for (int k = 0; k < GROUP; k++) top = w[k] > top ? w[k] : top;
    if (top == most) most = -most; /* a step below 0 lets the greatest be -8 */
    for (int i = 0; i <= 8; i++) {
        float inverse = (7.0f + 0.25f * (float)i) / most, wq = 0, qq = 0;
#pragma omp simd reduction(+ : wq, qq)
        for (int k = 0; k < GROUP; k++) {
            float q = whole(cut(w[k] * inverse, -8, 7));
            wq += w[k] * q, qq += q * q;
        }
        if (wq * wq > best * qq) best = wq * wq / qq, step = wq / qq;
    }
    return step;
}

/* Write 16 rows x 32 columns, w (16, 32), as one group of a tile. format is a compile-time
 * constant. */
INLINE void pack_group(const int format, const float (*w)[GROUP], uint8_t *out) {
    uint8_t *bytes = out + ROWS * 2;
    for (int r = 0; r < ROWS; r++) {
        uint16_t step = narrow_bf16(format == INT8 ? greatest(w[r]) / 127.0f : step_int4(w[r]));
        float d = widen_bf16(step), inverse = d == 0 ? 0 : 1.0f / d; /* q for the step as stored */
        float least = format == INT8 ? -127 : -8, most = format == INT8 ? 127 : 7;
        int32_t q[GROUP];
#pragma omp simd
        for (int k = 0; k < GROUP; k++) q[k] = whole_int(cut(w[r][k] * inverse, least, most));
        memcpy(out + 2 * r, &step, 2);
        for (int c = 0; c < (format == INT8 ? 32 : 16); c++)
            bytes[c / 4 * 64 + 4 * r + c % 4] = (uint8_t)(
                format == INT8 ? (uint32_t)(q[c] + W8_ZERO)
                               : (uint32_t)(q[c] + 8) | (uint32_t)(q[c + 16] + 8) << 4);
    }
}

typedef struct {
    const Matrix *from; /* FP32, BF16 or FP16 */
    long format;
    uint8_t *out;
} Quantising;

INLINE void quantise_tile(const int format, const Matrix *m, long tile, uint8_t *out) {
    long rows = at_most(ROWS, m->rows - tile * ROWS);
    for (long k0 = 0; k0 < m->cols; k0 += GROUP, out += group_bytes(format)) {
        float w[ROWS][GROUP] = {{0}};
        for (long r = 0; r < rows; r++)
            widen_row(m, tile * ROWS + r, k0, at_most(GROUP, m->cols - k0), w[r]);
        pack_group(format, (const float(*)[GROUP])w, out);
    }
}

static void quantise_tiles(void *task, int thread, int n_threads) {
    Quantising *z = task;
    long tiles = tiles_of(z->from), size = groups_of(z->from->cols) * group_bytes(z->format);
    for (long t = share(tiles, thread, n_threads); t < share(tiles, thread + 1, n_threads); t++) {
        if (z->format == INT8) quantise_tile(INT8, z->from, t, z->out + t * size);
        else quantise_tile(INT4, z->from, t, z->out + t * size);
    }
}

/* out (packed_bytes) = m in INT8 or INT4. */
EXPORT int quantise(const Matrix *m, long format, uint8_t *out, int n_threads) {
    Quantising task = {m, format, out};
    in_threads(quantise_tiles, &task, n_threads);
    return 0;
}

/* ------------------------------------------------------------------------ matrix x vector */

/* The input of a product: as it is, and in int8 with one step and one sum per group. */
typedef struct {
    float *x;      /* (cols) */
    int8_t *q;     /* (cols rounded up to a group), zeros at the end */
    float *step;   /* (groups) */
    int32_t *sum;  /* (groups): of q */
} Input;

/* q, step and sum of x (cols). */
static ALONE void quantise_input(long cols, const Input *in) {
    for (long g = 0; g < groups_of(cols); g++) {
        const float *x = in->x + g * GROUP;
        int8_t *q = in->q + g * GROUP;
        long width = at_most(GROUP, cols - g * GROUP);
        float part[GROUP] = {0};
        uint32_t sum = 0; /* unsigned: nan makes large numbers */
        int32_t n[GROUP];
        if (width < GROUP) memcpy(part, x, (size_t)width * sizeof(float)), x = part;
        float most = greatest(x), inverse = most > 0 ? 127.0f / most : 0;
#pragma omp simd reduction(+ : sum)
        for (int k = 0; k < GROUP; k++) sum += (uint32_t)(n[k] = whole_int(x[k] * inverse));
#pragma omp simd
        for (int k = 0; k < GROUP; k++) q[k] = (int8_t)n[k];
        in->step[g] = most / 127.0f; /* nan if x is not finite: it reaches y */
        in->sum[g] = most == most ? (int32_t)sum : 0;
    }
}

/* ROWS rows of w x: w is a tile. format is a compile-time constant. */
INLINE void tile_times(const int format, const uint8_t *w, long groups, const Input *in, float *y) {
    vec total[NI];
    for (int i = 0; i < NI; i++) total[i] = (vec){0};
    for (long g = 0; g < groups; g++, w += group_bytes(format)) {
        ivec sum[NI];
        for (long p = 0; p < group_bytes(format); p += 64) __builtin_prefetch(w + 8192 + p);
        if (format == INT8) dot_int8(w + ROWS * 2, in->q + g * GROUP, -W8_ZERO * in->sum[g], sum);
        else dot_int4(w + ROWS * 2, in->q + g * GROUP, -8 * in->sum[g], sum);
        for (int i = 0; i < NI; i++) {
            vec d = load_bf16((const uint16_t *)w + i * VLEN) * in->step[g];
            total[i] += __builtin_convertvector(sum[i], vec) * d;
        }
    }
    for (int i = 0; i < NI; i++) store(y + i * VLEN, total[i]);
}

/* One row times x (n). format is a compile-time constant. */
INLINE float row_times(const int format, const void *w, long n, const float *x) {
    vec sum[4];
    long k = 0;
    for (int i = 0; i < 4; i++) sum[i] = (vec){0};
    for (; k + 4 * VLEN <= n; k += 4 * VLEN) {
        __builtin_prefetch((const char *)w + k * (format == FP32 ? 4 : 2) + 4096);
        for (int i = 0; i < 4; i++)
            sum[i] += numbers(w, k + i * VLEN, format) * load(x + k + i * VLEN);
    }
    float total = 0;
    for (; k < n; k++) total += number(w, k, format) * x[k];
    return total + sum_of((sum[0] + sum[1]) + (sum[2] + sum[3]));
}

INLINE void tiles_times(const int format, const Matrix *m, long M, const Input *in, long tile,
                        long end, float *y, long ldy, int add) {
    for (; tile < end; tile++)
        for (long k = 0; k < M; k++) {
            long n = at_most(ROWS, m->rows - tile * ROWS);
            float part[ROWS], *to = y + k * ldy + tile * ROWS;
            if (format == INT8 || format == INT4)
                tile_times(format, tile_at(m, tile), groups_of(m->cols), in + k, part);
            else
                for (long i = 0; i < n; i++)
                    part[i] = row_times(format, row_at(m, tile * ROWS + i), m->cols, in[k].x);
            for (long i = 0; i < n; i++) to[i] = part[i] + (add ? to[i] : 0.0f);
        }
}

/* Columns of tiles [tile, end): y (M, rows; ldy) = x m^T, or y += x m^T, for M inputs. */
static ALONE void times_inputs(const Matrix *m, long M, const Input *in, long tile, long end,
                               float *y, long ldy, int add) {
    switch (m->format) {
        case FP32: tiles_times(FP32, m, M, in, tile, end, y, ldy, add); break;
        case BF16: tiles_times(BF16, m, M, in, tile, end, y, ldy, add); break;
        case FP16: tiles_times(FP16, m, M, in, tile, end, y, ldy, add); break;
        case INT8: tiles_times(INT8, m, M, in, tile, end, y, ldy, add); break;
        default:   tiles_times(INT4, m, M, in, tile, end, y, ldy, add);
    }
}

/* ------------------------------------------------------------------------ matrix x matrix */

/* Rows [r, r + WIDTH) and columns [k0, k0 + n) of m as panels (WIDTH / NR, n, NR) of its transpose;
 * k0 is a multiple of DEPTH. */
static ALONE void lay_out(const Matrix *m, long r, long k0, long n, float *out) {
    long rows = at_most(WIDTH, m->rows - r);
    if (rows < WIDTH) memset(out, 0, (size_t)(WIDTH * n) * sizeof(float));
    for (long i = 0; i < rows; i++) {
        float row[DEPTH], *to = out + i / NR * (n * NR) + i % NR;
        widen_row(m, r + i, k0, n, row);
        for (long k = 0; k < n; k++) to[k * NR] = row[k];
    }
}

/* Columns of tiles [tile, end): y (M, rows; ldy) = x m^T, or y += x m^T, with x (M, cols; ldx).
 * block: WIDTH * DEPTH numbers of scratch. */
static void times_matrix(const Matrix *m, long M, const float *x, long ldx, long tile, long end,
                         float *y, long ldy, int add, float *block) {
    for (long r = tile * ROWS; r < at_most(end * ROWS, m->rows); r += WIDTH) {
        long rows = at_most(WIDTH, at_most(end * ROWS, m->rows) - r);
        for (long k = 0; k < m->cols; k += DEPTH) {
            long n = at_most(DEPTH, m->cols - k);
            lay_out(m, r, k, n, block);
            gemm(M, rows, n, rows_of(x + k, ldx), block, n * NR, y + r, ldy,
                 add || k ? y + r : NULL, ldy);
        }
    }
}

/* ----------------------------------------------------------------------------- the decoder */

typedef struct {
    const float *attention_norm, *ffn_norm; /* (D) */
    Matrix wq, wk, wv, wo, w_gate, w_up, w_down;
} DecoderLayer;

/* A network and its cache; mirrors ctypes in decode.py. Keys and values are FP32 or BF16, per layer
 *
 *     keys (KV, room / NR, hd, NR), values (KV, hd / NR rounded up, room, NR)
 *
 * where room is the context rounded up to NR: NR keys, or NR parts of a value, are side by side, so
 * that both products of attention go along them. */
typedef struct {
    Shape shape;
    Matrix embeddings, output; /* (V, D) each; embeddings has rows */
    const float *final_norm;   /* (D) */
    const DecoderLayer *layers;
    const float *cos, *sin;    /* (context, hd/2) */
    void *keys, *values;
    int64_t context, cache_format;
} Decoder;

/* Numbers of keys, of values per layer. */
EXPORT long cache_numbers(const Shape *s, long context) {
    return s->n_kv_heads * round_up(context, NR) * round_up(head_dim(s), NR);
}

/* What is asked for, and what the threads share. */
typedef struct {
    const Decoder *d;
    long position, n;          /* tokens in the cache; tokens to read after them */
    const int64_t *prompt;     /* (n) */
    long max_new;              /* tokens to draw at most */
    double seconds;            /* begin no further token after this time */
    float temperature, top_p;
    int64_t seed, stop;        /* stop: -1 for none */
    int64_t *tokens;           /* (max_new): out */
    float *logits;             /* (V): out, of the last token drawn */
    long drawn;                /* out */
    float *x, *qkv, *out, *gu; /* (M, D), (M, D + 2 KV hd), (M, D), (M, 2F): M tokens at a time */
    float *kept;               /* scratch of draw, with candidates and drawable logits (V) */
    float *odds;
    Candidate *candidates;
    Meeting meeting;
    int failed;
} Generation;

/* Buffers of one thread. */
typedef struct {
    int thread, n_threads;
    float *normed;  /* (M, D) */
    Input in[MANY]; /* inputs of a product, one a token */
    float *z;       /* scores: one row, or BLOCK rows of a prompt */
    float *k, *v;   /* one head's keys and values in float32, for a prompt */
    float *block;   /* weights laid out, for a prompt */
} Worker;

/* The rows of y = W x that are this thread's, for M tokens: x (M, cols; ldx) -> y (M, rows; ldy).
 * w->in holds the same, taken. */
static void product(const Worker *w, const Matrix *m, long M, const float *x, long ldx, float *y,
                    long ldy, int add) {
    long tiles = tiles_of(m), tile = share(tiles, w->thread, w->n_threads);
    long end = share(tiles, w->thread + 1, w->n_threads);
    if (is_tiled(m) || M <= FEW) times_inputs(m, M, w->in, tile, end, y, ldy, add);
    else times_matrix(m, M, x, ldx, tile, end, y, ldy, add, w->block);
}

/* Take x (M, n; ldx) as the input of the next products with m's format. */
static void take(Worker *w, const Matrix *m, long M, float *x, long n, long ldx) {
    for (long k = 0; k < M; k++) {
        w->in[k].x = x + k * ldx;
        if (is_tiled(m)) quantise_input(n, w->in + k);
    }
}

/* ------------------------------------------------------------------------------ attention */

INLINE void *part_of(const Decoder *d, void *cache, long layer, long head) {
    const Shape *s = &d->shape;
    long at = (layer * s->n_kv_heads + head) * round_up(d->context, NR) * round_up(head_dim(s), NR);
    return (char *)cache + at * (d->cache_format == FP32 ? 4 : 2);
}

INLINE void put(void *p, long i, float x, long format) {
    if (format == FP32) ((float *)p)[i] = x;
    else ((uint16_t *)p)[i] = narrow_bf16(x);
}

/* Turn the queries and keys of M tokens from position on and put keys and values into the cache:
 * the key/value heads of this thread, with their query heads. */
static void fill_cache(const Generation *g, const Worker *w, long M, long position, long layer) {
    const Decoder *d = g->d;
    const Shape *s = &d->shape;
    long hd = head_dim(s), E = qkv_dim(s), group = s->n_heads / s->n_kv_heads;
    long room = round_up(d->context, NR);
    for (long j = share(s->n_kv_heads, w->thread, w->n_threads);
         j < share(s->n_kv_heads, w->thread + 1, w->n_threads); j++) {
        void *keys = part_of(d, d->keys, layer, j), *values = part_of(d, d->values, layer, j);
        for (long m = 0; m < M; m++) {
            long at = position + m;
            const float *cos = d->cos + at * hd / 2, *sin = d->sin + at * hd / 2;
            float *q = g->qkv + m * E + j * group * hd, *k = g->qkv + m * E + s->dim + j * hd;
            const float *v = k + s->n_kv_heads * hd;
            rotate(group, hd, q, cos, sin, 1);
            rotate(1, hd, k, cos, sin, 1);
            for (long i = 0; i < hd; i++) {
                put(keys, at / NR * NR * hd + i * NR + at % NR, k[i], d->cache_format);
                put(values, (i / NR * room + at) * NR + i % NR, v[i], d->cache_format);
            }
        }
    }
}

/* z (S) becomes exp(scale (z - max)); returns the sum. */
static ALONE float exp_scores(long S, float *z, float scale) {
    float top = -INFINITY;
#pragma omp simd reduction(max : top)
    for (long i = 0; i < S; i++) top = z[i] > top ? z[i] : top;
    return exp_row(S, z, scale, top);
}

/* One query q (hd) against S keys: out (hd). format is a compile-time constant. z: (S up to NR). */
INLINE void attend_one(const int format, long hd, long S, long room, const float *q, const void *k,
                       const void *v, float *out, float *z) {
    for (long s = 0; s < S; s += NR) {
        vec sum[2][NV];
        for (int j = 0; j < NV; j++) sum[0][j] = sum[1][j] = (vec){0};
        for (long i = 0; i < hd; i += 2)
            for (int j = 0; j < NV; j++) {
                sum[0][j] += q[i] * numbers(k, s * hd + i * NR + j * VLEN, format);
                sum[1][j] += q[i + 1] * numbers(k, s * hd + (i + 1) * NR + j * VLEN, format);
            }
        for (int j = 0; j < NV; j++) store(z + s + j * VLEN, sum[0][j] + sum[1][j]);
    }
    float part = 1.0f / exp_scores(S, z, 1.0f / sqrtf((float)hd));
    for (long i = 0; i < hd; i += NR) {
        vec sum[4][NV];
        float whole[NR];
        for (int u = 0; u < 4; u++)
            for (int j = 0; j < NV; j++) sum[u][j] = (vec){0};
        long s = 0, at = i * room; /* this panel of v */
        for (; s + 4 <= S; s += 4)
            for (int u = 0; u < 4; u++)
                for (int j = 0; j < NV; j++)
                    sum[u][j] += z[s + u] * numbers(v, at + (s + u) * NR + j * VLEN, format);
        for (; s < S; s++)
            for (int j = 0; j < NV; j++)
                sum[0][j] += z[s] * numbers(v, at + s * NR + j * VLEN, format);
        for (int j = 0; j < NV; j++)
            store(whole + j * VLEN, part * ((sum[0][j] + sum[1][j]) + (sum[2][j] + sum[3][j])));
        memcpy(out + i, whole, (size_t)at_most(NR, hd - i) * sizeof(float));
    }
}

static ALONE void attend_fp32(long hd, long S, long room, const float *q, const void *k,
                              const void *v, float *out, float *z) {
    attend_one(FP32, hd, S, room, q, k, v, out, z);
}
static ALONE void attend_bf16(long hd, long S, long room, const float *q, const void *k,
                              const void *v, float *out, float *z) {
    attend_one(BF16, hd, S, room, q, k, v, out, z);
}

/* Keys and values of one head to float32: all blocks of NR keys that hold one of the first S, with
 * zeros behind S; k (S up, hd), v (hd up / NR, S up, NR). */
static ALONE void widen_cache(const Decoder *d, long S, const void *keys, const void *values,
                              float *k, float *v) {
    long hd = head_dim(&d->shape), up = round_up(S, NR), room = round_up(d->context, NR);
    long format = d->cache_format;
    for (long i = 0; i < up * hd; i += VLEN) store(k + i, numbers(keys, i, format));
    for (long p = 0; p * NR < hd; p++)
        for (long i = 0; i < S * NR; i += VLEN)
            store(v + p * up * NR + i, numbers(values, p * room * NR + i, format));
}

/* Attention of M tokens from position on in matrix form, for the query heads of this thread. */
static void attend_many(const Generation *g, const Worker *w, long M, long position, long layer) {
    const Decoder *d = g->d;
    const Shape *s = &d->shape;
    long hd = head_dim(s), E = qkv_dim(s), D = s->dim, group = s->n_heads / s->n_kv_heads;
    long S = position + M, up = round_up(S, NR), ld = up + NR, last = -1;
    for (long h = share(s->n_heads, w->thread, w->n_threads);
         h < share(s->n_heads, w->thread + 1, w->n_threads); h++) {
        if (h / group != last) {
            last = h / group;
            widen_cache(d, S, part_of(d, d->keys, layer, last), part_of(d, d->values, layer, last),
                        w->k, w->v);
        }
        for (long t = 0; t < M; t += BLOCK) {
            long n = at_most(BLOCK, M - t), m = position + t + n;
            float *out = g->out + t * D + h * hd;
            gemm(n, m, hd, rows_of(g->qkv + t * E + h * hd, E), w->k, hd * NR, w->z, ld, NULL, 0);
            float part[BLOCK];
            for (long r = 0; r < n; r++) { /* row r sees all but the n - 1 - r last keys */
                float *z = w->z + r * ld;
                part[r] = 1.0f / exp_scores(m - n + 1 + r, z, 1.0f / sqrtf((float)hd));
                memset(z + m - n + 1 + r, 0, (size_t)(n - 1 - r) * sizeof(float));
            }
            gemm(n, hd, m, rows_of(w->z, ld), w->v, up * NR, out, D, NULL, 0);
            for (long r = 0; r < n; r++)
                for (long i = 0; i < hd; i++) out[r * D + i] *= part[r];
        }
    }
}

static void attend(const Generation *g, const Worker *w, long M, long position, long layer) {
    const Decoder *d = g->d;
    const Shape *s = &d->shape;
    long hd = head_dim(s), group = s->n_heads / s->n_kv_heads, room = round_up(d->context, NR);
    if (M > 1) {
        attend_many(g, w, M, position, layer);
        return;
    }
    for (long h = share(s->n_heads, w->thread, w->n_threads);
         h < share(s->n_heads, w->thread + 1, w->n_threads); h++)
        (d->cache_format == FP32 ? attend_fp32 : attend_bf16)(
            hd, position + 1, room, g->qkv + h * hd, part_of(d, d->keys, layer, h / group),
            part_of(d, d->values, layer, h / group), g->out + h * hd, w->z);
}

/* ------------------------------------------------------------------------------ the network */

/* All layers for M tokens that follow the `position` tokens in the cache; g->x (M, D) becomes the
 * trunk's output. Called by all threads. */
static void forward(Generation *g, Worker *w, long M, long position) {
    const Decoder *d = g->d;
    const Shape *s = &d->shape;
    long D = s->dim, E = qkv_dim(s), F = s->hidden_dim, kv = (E - D) / 2;
    int n_threads = w->n_threads;
    for (long l = 0; l < s->n_layers; l++) {
        const DecoderLayer *y = d->layers + l;
        /* 1) queries, keys, values; keys and values into the cache */
        rmsnorm(M, D, g->x, y->attention_norm, s->norm_eps, w->normed, NULL);
        take(w, &y->wq, M, w->normed, D, D);
        product(w, &y->wq, M, w->normed, D, g->qkv, E, 0);
        product(w, &y->wk, M, w->normed, D, g->qkv + D, E, 0);
        product(w, &y->wv, M, w->normed, D, g->qkv + D + kv, E, 0);
        meet(&g->meeting, n_threads);
        fill_cache(g, w, M, position, l);
        if (s->n_kv_heads % n_threads) meet(&g->meeting, n_threads); /* a head is shared by two */
        /* 2) attention, and its projection into the residual stream */
        attend(g, w, M, position, l);
        meet(&g->meeting, n_threads);
        take(w, &y->wo, M, g->out, D, D);
        product(w, &y->wo, M, g->out, D, g->x, D, 1);
        meet(&g->meeting, n_threads);
        /* 3) SwiGLU: gates and ups of the same rows are the same thread's */
        rmsnorm(M, D, g->x, y->ffn_norm, s->norm_eps, w->normed, NULL);
        take(w, &y->w_gate, M, w->normed, D, D);
        product(w, &y->w_gate, M, w->normed, D, g->gu, 2 * F, 0);
        product(w, &y->w_up, M, w->normed, D, g->gu + F, 2 * F, 0);
        long tiles = tiles_of(&y->w_gate), from = share(tiles, w->thread, n_threads) * ROWS;
        long to = at_most(share(tiles, w->thread + 1, n_threads) * ROWS, F);
        for (long m = 0; m < M; m++) {
            float *gate = g->gu + m * 2 * F, *up = gate + F;
            for (long i = from; i < to; i += VLEN)
                store_some(gate + i, silu_times(load_some(gate + i, to - i),
                                                load_some(up + i, to - i)), to - i);
        }
        meet(&g->meeting, n_threads);
        take(w, &y->w_down, M, g->gu, F, 2 * F);
        product(w, &y->w_down, M, g->gu, 2 * F, g->x, D, 1);
        meet(&g->meeting, n_threads);
    }
}

/* g->x (M, D) = embeddings of M tokens; by one thread. */
static void embed(const Generation *g, long M, const int64_t *tokens) {
    const Matrix *e = &g->d->embeddings;
    for (long m = 0; m < M; m++) widen_row(e, tokens[m], 0, e->cols, g->x + m * e->cols);
}

static double now(void) { /* s */
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

/* Draw one token from g->logits; by one thread. Greedy needs no probabilities. */
static int64_t draw_one(Generation *g, long position) {
    long V = g->d->shape.vocab_size;
    if (g->temperature == 0) return argmax(V, g->logits);
    float logp;
    memcpy(g->odds, g->logits, (size_t)V * sizeof(float));
    return draw(V, g->odds, g->temperature, g->top_p, uniform(g->seed, 0, position), g->kept,
                g->candidates, &logp);
}

static Worker worker(const Generation *g, long M, int thread, int n_threads, Pool *pool) {
    const Shape *s = &g->d->shape;
    long D = s->dim, F = s->hidden_dim, widest = D > F ? D : F, groups = groups_of(widest);
    long S = round_up(g->position + g->n + g->max_new, NR), hd = head_dim(s);
    Worker w = {.thread = thread, .n_threads = n_threads};
    w.normed = grab(pool, M * D);
    int8_t *q = (int8_t *)grab(pool, M * groups * GROUP / 4);
    float *step = grab(pool, M * groups);
    int32_t *sum = (int32_t *)grab(pool, M * groups);
    for (long k = 0; k < M && !pool->failed; k++)
        w.in[k] = (Input){NULL, q + k * groups * GROUP, step + k * groups, sum + k * groups};
    w.z = grab(pool, (M > 1 ? BLOCK : 1) * (S + NR));
    if (M > 1) {
        w.k = grab(pool, S * hd), w.v = grab(pool, S * round_up(hd, NR));
        w.block = grab(pool, WIDTH * DEPTH);
    }
    return w;
}

static void generate_job(void *task, int thread, int n_threads) {
    Generation *g = task;
    const Decoder *d = g->d;
    const Shape *s = &d->shape;
    long D = s->dim, position = g->position;
    Pool pool = {.n = 0};
    Worker w = worker(g, at_most(g->n, MANY), thread, n_threads, &pool);
    double start = now();
    if (pool.failed) __atomic_store_n(&g->failed, 1, __ATOMIC_RELAXED);
    meet(&g->meeting, n_threads);
    int failed = __atomic_load_n(&g->failed, __ATOMIC_RELAXED);
    const int64_t *tokens = g->prompt, *end = g->prompt + g->n;
    while (!failed && tokens < end) {
        long M = at_most(end - tokens, MANY);
        if (thread == 0) embed(g, M, tokens);
        meet(&g->meeting, n_threads);
        forward(g, &w, M, position);
        position += M, tokens += M;
        if (tokens < end || g->max_new == 0) continue; /* more of the prompt; or only to be read */
        rmsnorm(1, D, g->x + (M - 1) * D, d->final_norm, s->norm_eps, w.normed, NULL);
        take(&w, &d->output, 1, w.normed, D, D);
        product(&w, &d->output, 1, w.normed, D, g->logits, 0, 0);
        meet(&g->meeting, n_threads);
        if (thread == 0) {
            int64_t token = g->tokens[g->drawn] = draw_one(g, position);
            int over = token == g->stop || now() - start > g->seconds;
            g->drawn++;
            if (over) g->max_new = g->drawn;
        }
        meet(&g->meeting, n_threads);
        if (g->drawn < g->max_new) tokens = g->tokens + g->drawn - 1, end = tokens + 1;
    }
    release(&pool);
}

/* Read n >= 1 tokens after the `position` tokens in the cache, then draw up to max_new tokens; all
 * but the last drawn are in the cache afterwards. Ends early with the token `stop`, and after
 * `seconds`, with at least one token unless max_new is 0. logits (V): those that the last token was
 * drawn from. position + n + max_new - 1 is at most the context. Returns the number drawn, or -1
 * when memory is short. */
EXPORT int generate(const Decoder *d, long position, long n, const int64_t *prompt, long max_new,
                    float seconds, float temperature, float top_p, long seed, long stop,
                    int64_t *tokens, float *logits, int n_threads) {
    const Shape *s = &d->shape;
    long D = s->dim, V = s->vocab_size, M = at_most(n, MANY);
    Pool pool = {.n = 0};
    Generation g = {.d = d, .position = position, .n = n, .prompt = prompt, .max_new = max_new,
                    .seconds = seconds, .temperature = temperature, .top_p = top_p, .seed = seed,
                    .stop = stop, .tokens = tokens, .logits = logits};
    g.x = grab(&pool, M * D), g.qkv = grab(&pool, M * qkv_dim(s)), g.out = grab(&pool, M * D);
    g.gu = grab(&pool, M * 2 * s->hidden_dim);
    g.kept = grab(&pool, V), g.odds = grab(&pool, V);
    g.candidates = (Candidate *)grab(&pool, V * (long)(sizeof(Candidate) / sizeof(float)));
    if (!pool.failed) in_company(generate_job, &g, n_threads);
    int failed = pool.failed || g.failed;
    release(&pool);
    return failed ? -1 : (int)g.drawn;
}
