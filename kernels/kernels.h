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

/* The left matrix: a(i, k) = p[i / MR * tile + i % MR * row + k * col]. */
typedef struct {
    const float *p;
    long row, col, tile;
} Left;

/* A as it lies in memory, a (M, K) with ld numbers from row to row. */
INLINE Left rows_of(const float *a, long ld) { return (Left){a, ld, 1, MR * ld}; }

/* The transpose of what lies in memory, a (K, M) with ld numbers from row to row. */
INLINE Left columns_of(const float *a, long ld) { return (Left){a, 1, ld, MR}; }

/* Written by pack_left: tiles of MR columns, (M / MR, K, MR). */
INLINE Left packed_columns(const float *a, long K) { return (Left){a, 1, MR, K * MR}; }

/* The size in floats of panels for a right matrix (K, N). */
INLINE long panels(long K, long N) { return round_up(N, NR) * K; }

void gemm(long M, long N, long K, Left a, const float *b, long panel, float *c, long ldc,
    const float *r, long ldr);
void pack(long K, long N, const float *b, long ld, float *out, long panel);
void pack_transposed(long K, long N, const float *b, long ld, float *out, long panel);
void pack_left(long K, long M, const float *a, long ld, float *out);

/* -------------------------------------------------------------------------------------- layer.c */

void rmsnorm(long T, long D, const float *x, const float *w, float eps, float *y, float *scale);
void rmsnorm_again(long T, long D, const float *x, const float *w, const float *scale, float *y);
void rmsnorm_backward(long T, long D, const float *x, const float *w, const float *scale,
    const float *dy, float *dx, float *dw);
void rotate(long n_heads, long hd, float *x, const float *cos, const float *sin, float direction);
void rope(const Shape *s, long T, float *qkv, const float *cos, const float *sin, float direction);
void swiglu(long T, long F, const float *gu, float *a);
void swiglu_backward(long T, long F, const float *gu, const float *da, float *a, float *dgu);

/* ---------------------------------------------------------------------------------- attention.c */

#define BLOCK 24 /* queries at a time, a multiple of every MR */

/* Keys and values of one sequence and layer in the layouts that the products read; `room` tokens
 * long. They are the key-value cache of generation too. */
typedef struct {
    float *k_t; /* (KV, room / NR, hd, NR): right matrix of q k^T */
    float *v;   /* (KV, hd / NR, room, NR): right matrix of p v */
    long room;  /* tokens, a multiple of NR */
} Keys;

INLINE long keys_size(const Shape *s, long room) { /* floats of k_t; of v */
    return s->n_kv_heads * room * round_up(head_dim(s), NR);
}
INLINE float *keys_of(const Shape *s, const Keys *c, long j) { /* head j of k_t */
    return c->k_t + j * c->room * head_dim(s);
}
INLINE float *values_of(const Shape *s, const Keys *c, long j) { /* head j of v */
    return c->v + j * c->room * round_up(head_dim(s), NR);
}

/* What may be seen: the keys [from, to) of a block of queries, and which of them by which. */
typedef struct {
    long from, to;
    const int64_t *segments; /* (T), or NULL: one segment */
} Span;

/* Room that attention needs per thread, in floats: one block of scores. */
INLINE long scores_width(long T) { return round_up(T, NR) + NR; }

/* Scratch of the backward pass. */
typedef struct {
    float *z, *dz;   /* BLOCK * scores_width(T) each */
    float *q, *d_out; /* (hd / NR, BLOCK, NR) each: a block of queries, of d_out, as right matrix */
    float *k, *v_t;  /* keys_size each: keys as right matrix of dZ K, values of dO V^T */
} AttentionScratch;

void fill_keys(const Shape *s, long T, const float *qkv, const Keys *c);
void exp_rows(long n, float *z, long ld, long t0, Span span, float scale, float *sums,
    float *log_sum);
void divide_rows(long n, long hd, float *out, long ld, const float *sums);
void attention(const Shape *s, long T, const float *qkv, const Keys *c, const int64_t *segments,
    float *out, float *log_sum, float *z);
void attention_backward(const Shape *s, long T, const float *qkv, const Keys *c,
    const int64_t *segments, const float *out, const float *log_sum, const float *d_out,
    float *dqkv, AttentionScratch x);

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
    float *qkv, *o, *gu, *down;
} Packed;

Packed *pack_weights(const Shape *s, const Layer *layers, int backward, int n_threads, Pool *pool);

/* -------------------------------------------------------------------------------------- block.c */

/* Activations of one sequence at one layer. */
typedef struct {
    float *x, *scale;       /* (T, D), (T): the layer's input and its norm's scale */
    float *qkv;             /* (T, D + 2 KV hd), rotated */
    float *out, *log_sum;   /* (T, D), (H, T): attention before wo */
    float *mid, *mid_scale; /* (T, D), (T): after attention */
    float *gu;              /* (T, 2F): gates, ups */
} Saved;

/* Buffers of one thread in the forward pass. */
typedef struct {
    float *n;   /* (T, D): a normalised input */
    float *act; /* (T, F): swiglu's output */
    float *z;   /* scores of a block of queries */
    Keys keys;
} Forward;

/* Gradients of one layer's weights, in the order of Layer, so that one flat buffer splits into
 * PyTorch's tensors. */
typedef struct {
    float *attention_norm, *qkv, *o, *ffn_norm, *gu, *down;
} Gradients;

/* Buffers of one thread in the backward pass. */
typedef struct {
    float *dx, *n, *dn;      /* (T, D): running gradient; a normalised input, its gradient */
    float *act, *d_act, *dgu; /* (T, F), (T, F), (T, 2F) */
    float *d_out, *dqkv;     /* (T, D), (T, D + 2 KV hd) */
    float *left, *right;     /* both factors of a weight gradient, packed */
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
