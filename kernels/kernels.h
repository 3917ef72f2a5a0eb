/* What the C files share: the types, and every function that one file offers to another. What a
 * function does stands above its body.
 *
 *     machine.h    vectors, memory, threads
 *     gemm.c       the matrix product              layer.c    RMSNorm, RoPE, SwiGLU
 *     attention.c  causal attention                weights.c  packing of the weights
 *     block.c      one block of the network        trunk.c    all blocks, all sequences: training
 *     head.c       log-probabilities of tokens     rollout.c  generation in batches
 *     decode.c     one answer, weights in 4, 8, 16 or 32 bits
 *
 * Names of sizes are model.py's: B T D H KV hd F V L; E = D + 2 KV hd is the width of q, k and v
 * side by side. A matrix (M, N; ld) has ld floats from one row to the next.
 */
#ifndef KERNELS_H
#define KERNELS_H

#include "machine.h"

/* The shape of a network; mirrors ctypes in build.py. */
typedef struct {
    int64_t dim, n_layers, n_heads, n_kv_heads, hidden_dim, vocab_size;
    float norm_eps;
} Shape;

INLINE long head_dim(const Shape *s) { return s->dim / s->n_heads; }
INLINE long qkv_dim(const Shape *s) { return s->dim + 2 * s->n_kv_heads * head_dim(s); } /* E */

/* --------------------------------------------------------------------------------------- gemm.c */

/* Words of a sum over K. */
INLINE long deep(long K) { return (K + PAIR - 1) / PAIR; }

/* The left matrix, in words: a(i, k) = p[i / MR * tile + i % MR * row + k * col]. */
typedef struct {
    const word *p;
    long row, col, tile;
} Left;

/* A as it lies in memory, a (M, K) with ld numbers from row to row, a multiple of PAIR. */
INLINE Left rows_of(const num *a, long ld) {
    return (Left){(const word *)a, ld / PAIR, 1, MR * ld / PAIR};
}

/* Written by pack_left: tiles of MR columns, (M / MR, deep(K), MR). */
INLINE Left packed_columns(const word *a, long K) { return (Left){a, 1, MR, deep(K) * MR}; }

/* The size in words of panels for a right matrix (K, N). */
INLINE long panels(long K, long N) { return round_up(N, NR) * deep(K); }

void gemm(long M, long N, long K, Left a, const word *b, long panel, float *c, long ldc,
    const float *r, long ldr);
void gemm_num(long M, long N, long K, Left a, const word *b, long panel, num *c, long ldc);
void pack(long K, long N, const num *b, long ld, word *out, long panel);
void pack_transposed(long K, long N, const num *b, long ld, word *out, long panel);
void pack_left(long K, long M, const num *a, long ld, word *out);
Left columns(long K, long M, const num *a, long ld, word *room);
void narrow(long T, long N, const float *x, long ldx, num *y, long ldy);

/* Where a result goes that will be a factor: in float32 to y itself, in bfloat16 to room, from
 * where `narrow` brings it to y. */
INLINE float *wide(num *y, float *room) {
#if PAIR == 1
    (void)room;
    return y;
#else
    (void)y;
    return room;
#endif
}

/* The factors of x (T, N): x itself in float32, else y, filled. */
INLINE const num *narrowed(long T, long N, const float *x, num *y) {
#if PAIR == 1
    (void)T, (void)N, (void)y;
    return x;
#else
    narrow(T, N, x, N, y, even(N));
    return y;
#endif
}

/* -------------------------------------------------------------------------------------- layer.c */

void rmsnorm(long T, long D, const float *x, const float *w, float eps, float *y, float *scale);
void rmsnorm_again(long T, long D, const float *x, const float *w, const float *scale, float *y);
void rmsnorm_backward(long T, long D, const float *x, const float *w, const float *scale,
    const float *dy, float *dx, float *dw);
void rotate(long n_heads, long hd, float *x, const float *cos, const float *sin, float direction);
void rope(const Shape *s, long T, float *qkv, const float *cos, const float *sin, float direction);
void swiglu(long T, long F, const num *gu, num *a);
void swiglu_backward(long T, long F, num *gu, num *da);
float exp_row(long n, float *z, float scale, float top);
INLINE vec silu_times(vec g, vec u) { return g / (1.0f + exp_fast(-g)) * u; }

/* ---------------------------------------------------------------------------------- attention.c */

#define BLOCK 24 /* queries at a time, a multiple of every MR */

/* Keys and values of one sequence and layer in the layouts that the products read; `room` tokens
 * long. They are the key-value cache of generation too. Sizes in words. */
typedef struct {
    word *k_t; /* (KV, room / NR, hd / PAIR, NR): right matrix of q k^T */
    word *v;   /* (KV, hd / NR, room / PAIR, NR): right matrix of p v */
    long room; /* tokens, a multiple of NR */
} Keys;

INLINE long keys_size(const Shape *s, long room) { /* words of k_t; of v */
    return s->n_kv_heads * room * round_up(head_dim(s), NR) / PAIR;
}
INLINE word *keys_of(const Shape *s, const Keys *c, long j) { /* head j of k_t */
    return c->k_t + j * c->room * head_dim(s) / PAIR;
}
INLINE word *values_of(const Shape *s, const Keys *c, long j) { /* head j of v */
    return c->v + j * c->room * round_up(head_dim(s), NR) / PAIR;
}

/* What may be seen: the keys [from, to) of a block of queries, and which of them by which. */
typedef struct {
    long from, to;
    const int64_t *segments; /* (T), or NULL: one segment */
} Span;

INLINE long scores_width(long T) { return round_up(T, NR) + NR; }

/* Room that attention needs per thread, in floats: one block of scores, the same as factors and,
 * as they come from the product, a block of one head's outputs. */
INLINE long scores_size(const Shape *s, long T) {
    return BLOCK * (2 * scores_width(T) + head_dim(s));
}

/* Scratch of the backward pass. */
typedef struct {
    float *z, *dz;          /* BLOCK * scores_width(T) each */
    num *p_num, *dz_num;    /* the same as factors */
    word *p_t, *dz_t;       /* and as left matrices of products that sum over queries */
    word *q, *d_out;        /* (hd / NR, BLOCK, NR): a block of queries, of d_out: right matrices */
    word *k, *v_t;          /* keys_size: keys as right matrix of dZ K, values of dO V^T */
} AttentionScratch;

void fill_keys(const Shape *s, long T, const num *qkv, const Keys *c);
void exp_rows(long n, float *z, long ld, long t0, Span span, float scale, num *p, float *sums,
    float *log_sum);
void divide_rows(long n, long hd, float *out, long ld, const float *sums);
void attention(const Shape *s, long T, const num *qkv, const Keys *c, const int64_t *segments,
    num *out, float *log_sum, float *z);
void attention_backward(const Shape *s, long T, const num *qkv, const Keys *c,
    const int64_t *segments, const num *out, const float *log_sum, const num *d_out, float *dqkv,
    AttentionScratch x);

/* ------------------------------------------------------------------------------------ weights.c */

/* The parameters of one layer, as PyTorch holds them: (out, in), row by row. */
typedef struct {
    const float *attention_norm;      /* (D) */
    const float *wq, *wk, *wv, *wo;   /* (D, D), (KV hd, D), (KV hd, D), (D, D) */
    const float *ffn_norm;            /* (D) */
    const float *w_gate, *w_up, *w_down; /* (F, D), (F, D), (D, F) */
} Layer;

/* One layer's matrices as right matrices of a product; q, k, v and gate, up each as one. */
typedef struct {
    word *qkv, *o, *gu, *down;
} Packed;

Packed *pack_weights(const Shape *s, const Layer *layers, int backward, int n_threads, Pool *pool);

/* -------------------------------------------------------------------------------------- block.c */

#define CHUNK 96 /* tokens at a time between two matrix products, a multiple of every MR */

/* Activations of one sequence at one layer. */
typedef struct {
    float *x, *scale;       /* (T, D), (T): the layer's input and its norm's scale */
    num *qkv;               /* (T, D + 2 KV hd), rotated */
    num *out;               /* (T, D): attention before wo */
    float *log_sum;         /* (H, T): of its softmax */
    float *mid, *mid_scale; /* (T, D), (T): after attention */
    num *gu;                /* (T, 2F): gates, ups */
} Saved;

/* Buffers of one thread in the forward pass. */
typedef struct {
    num *n;     /* (CHUNK, D): a normalised input */
    num *act;   /* (CHUNK, even(F)): swiglu's output */
    float *wide; /* (CHUNK, D + 2 KV hd): results before they are factors */
    float *z;   /* scores of a block of queries */
    Keys keys;
} Forward;

/* Gradients of one layer's weights, in the order of Layer, so that one flat buffer splits into
 * PyTorch's tensors. gu and down may be NULL: not computed. */
typedef struct {
    float *attention_norm, *qkv, *o, *ffn_norm, *gu, *down;
} Gradients;

/* Buffers of one thread in the backward pass. */
typedef struct {
    float *dx, *dn;          /* (T, D): the running gradient; that of a normalised input */
    float *dqkv;             /* (T, D + 2 KV hd) */
    num *n, *act;            /* (T, D), (T, even(F)): factors that the forward pass had */
    num *dy, *d_out;         /* (T, D + 2 KV hd), (T, D): gradients as factors */
    float *wide;             /* (T, D) */
    word *left, *right;      /* both factors of a weight gradient, packed */
    Keys keys;
    AttentionScratch scratch;
} Backward;

long saved_per_layer(const Shape *s, long T);
long saved_size(const Shape *s, long T);
Saved saved_at(const Shape *s, long T, float *base, long l);
Forward forward_buffers(const Shape *s, long T, Pool *pool);
void block_keys(const Shape *s, long T, const Layer *w, const Packed *p, const float *cos,
    const float *sin, const Forward *f, Saved a);
void block_forward(const Shape *s, long T, const Layer *w, const Packed *p, const float *cos,
    const float *sin, const int64_t *segments, const Forward *f, Saved a, float *next);
long gradients_size(const Shape *s);
Gradients gradients_at(const Shape *s, float *flat, long l);
Backward backward_buffers(const Shape *s, long T, Pool *pool);
void block_backward(const Shape *s, long T, const Layer *l, const Packed *p, const float *cos,
    const float *sin, const int64_t *segments, Saved a, const Backward *w, Gradients g);

/* ------------------------------------------------------------------------------------ rollout.c */

/* A token that may be drawn, and its probability. */
typedef struct {
    float p;
    int32_t token;
} Candidate;

float uniform(int64_t seed, int64_t row, int64_t position);
long argmax(long V, const float *z);
long draw(long V, float *z, float temperature, float top_p, float u, float *kept, Candidate *c,
    float *logp);

#endif
