/* C = R + A B, the matrix product that does nine tenths of the work.
 *
 *     for i < M:  for j < N:  for k < K:  c[i][j] += a[i][k] * b[k][j]         (the naive nest)
 *
 * Computed in tiles of MR x NR numbers that stay in registers for the whole sum over k: each step
 * loads NV vectors of B and MR single words of A and does MR * NV fused multiply-adds, so it is
 * limited by arithmetic and not by loads. B is packed beforehand into panels of NR columns,
 *
 *     panel j:  b[0][j..j+NR) b[1][j..j+NR) ... b[K-1][j..j+NR)      zeros beyond column N
 *
 * read front to back by the inner loop; weights are packed once per step and used by all
 * sequences. A panel stays in the first-level cache while all rows of A pass by.
 *
 * With bfloat16 factors (machine.h) a word holds two neighbours along the sum,
 *
 *     panel j:  b[0][j] b[1][j]  b[0][j+1] b[1][j+1] ...  b[2][j] b[3][j]  ...     0 if K is odd
 *
 * and one instruction does two multiply-adds per lane: half the instructions, half the bytes, the
 * same loops. A matrix that is summed over along its rows is already in that order; one that is
 * summed over from row to row is paired up by `pack`, `pack_left` or `columns`.
 *
 * Backward, of y = x w^T, with dy[i][j] = d loss / d y[i][j]: x acts on the loss through y alone,
 *     dx[i][k] = sum_j dy[i][j] d y[i][j] / d x[i][k] = sum_j dy[i][j] w[j][k]:  dx = dy w,
 * and likewise dw = dy^T x. Two more products: a training step is three times the forward pass.
 *
 * The limit: MR * NV accumulators, NV vectors of B and one broadcast fill the registers (15 of 16
 * with AVX2, 27 of 32 with AVX512), and each of the MR * NV multiply-adds per step depends only on
 * the one before in its own accumulator. A step issues MR + NV loads beside MR * NV multiply-adds,
 * 8 to 12 (AVX2) and 14 to 24 (AVX512), where the processor can do as many loads as multiply-adds.
 * What is lost is at the ends: reading and writing a tile of C, about 5% at K = 128, and tiles that
 * are not full.
 */
#include "kernels.h"

#define KC 384 /* words of a panel's column used at a time: KC * NR * 4 bytes fit the L1 or L2 */

/* One tile: c (rows, cols) = r + a b over K words, or to = a b as factors where to is given. rows,
 * vectors (of NV, what cols needs) and contiguous are compile-time constants. */
INLINE void tile(const int rows, const int vectors, const int contiguous, long K, const word *a,
                 long ai, long ak, const word *b, float *c, long ldc, const float *r, long ldr,
                 num *to, long cols) {
    vec sum[MR][NV] = {{{0}}};
    const long row = contiguous ? 1 : ai, col = contiguous ? ak : 1;
    for (int i = 0; r && i < rows; i++) /* asked for now, used when the sums are made */
        for (int j = 0; j < vectors; j++) __builtin_prefetch(r + i * ldr + j * VLEN);
    for (long k = 0; k < K; k++, b += NR) {
        words right[NV];
        for (int j = 0; j < vectors; j++) right[j] = load_words(b + j * VLEN);
        for (int i = 0; i < rows; i++)
            for (int j = 0; j < vectors; j++)
                sum[i][j] = dot(sum[i][j], a[i * row + k * col], right[j]);
    }
    if (cols < vectors * VLEN) { /* the last panel: only part of the tile exists in C */
        float whole[MR][NR];
        UNROLL
        for (int i = 0; i < rows; i++)
            for (int j = 0; j < vectors; j++) store(whole[i] + j * VLEN, sum[i][j]);
        for (int i = 0; i < rows; i++)
            for (long j = 0; j < cols; j++)
                if (to) to[i * ldc + j] = narrow_one(whole[i][j]);
                else c[i * ldc + j] = whole[i][j] + (r ? r[i * ldr + j] : 0.0f);
        return;
    }
    UNROLL
    for (int i = 0; i < rows; i++)
        for (int j = 0; j < vectors; j++) {
            if (to) {
                narrow_vec(sum[i][j], to + i * ldc + j * VLEN);
                continue;
            }
            vec old = r ? load(r + i * ldr + j * VLEN) : (vec){0};
            store(c + i * ldc + j * VLEN, sum[i][j] + old);
        }
}

/* Two of its three constants are chosen here. */
INLINE void tile_rows(const int rows, int contiguous, long K, const word *a, long ai, long ak,
                      const word *b, float *c, long ldc, const float *r, long ldr, num *to,
                      long cols) {
    if (contiguous) tile(rows, NV, 1, K, a, ai, ak, b, c, ldc, r, ldr, to, cols);
    else if (cols > VLEN) tile(rows, NV, 0, K, a, ai, ak, b, c, ldc, r, ldr, to, cols);
    else tile(rows, 1, 0, K, a, ai, ak, b, c, ldc, r, ldr, to, cols);
}

/* The tallest tile that has a compiled copy and at most `left` rows: a sum of few of them makes
 * any number of rows. */
INLINE long tile_height(long left) {
    return left >= MR ? MR : left >= 8 && MR > 8 ? 8 : left >= 4 ? 4 : left >= 2 ? 2 : 1;
}

static ALONE void tile_of(long rows, int contiguous, long K, const word *a, long ai, long ak,
                    const word *b, float *c, long ldc, const float *r, long ldr, num *to,
                    long cols) {
#define CASE(n)                                                                \
    case n:                                                                    \
        tile_rows(n, contiguous, K, a, ai, ak, b, c, ldc, r, ldr, to, cols);   \
        break;
    switch (rows) {
        CASE(MR) CASE(4) CASE(2) CASE(1)
#if MR > 8
        CASE(8)
#endif
    }
#undef CASE
}

/* Words [k, k + depth) of the sum, all tiles. */
static void tiles(long M, long N, long k, long depth, Left a, const word *b, long panel, float *c,
                  long ldc, const float *r, long ldr, num *to) {
    for (long j = 0; j < N; j += NR)
        for (long i = 0, rows; i < M; i += rows) {
            rows = tile_height(M - i);
            tile_of(rows, a.row == 1 && a.col != 1, depth,
                    a.p + i / MR * a.tile + i % MR * a.row + k * a.col, a.row, a.col,
                    b + j / NR * panel + k * NR, c ? c + i * ldc + j : NULL, ldc,
                    r ? r + i * ldr + j : NULL, ldr, to ? to + i * ldc + j : NULL,
                    at_most(NR, N - j));
        }
}

/* c (M, N; ldc) = r + a b, sums over K >= 1. a: see Left. b: panels, `panel` words from one to the
 * next (deep(K) * NR when packed for this product alone). r (M, N; ldr): NULL for 0, or c to
 * accumulate. */
void gemm(long M, long N, long K, Left a, const word *b, long panel, float *c, long ldc,
          const float *r, long ldr) {
    long W = deep(K), parts = (W + KC - 1) / KC, depth = (W + parts - 1) / parts; /* equal parts */
    for (long k = 0; k < W; k += depth) {
        tiles(M, N, k, at_most(depth, W - k), a, b, panel, c, ldc, r, ldr, NULL);
        r = c, ldr = ldc; /* further parts of the sum add to what is there */
    }
}

/* The same for a result that is a factor of the next product: c (M, N; ldc) = a b. In bfloat16 the
 * sum is in one part, since parts are added up as floats. */
void gemm_num(long M, long N, long K, Left a, const word *b, long panel, num *c, long ldc) {
#if PAIR == 1
    gemm(M, N, K, a, b, panel, c, ldc, NULL, 0);
#else
    tiles(M, N, 0, deep(K), a, b, panel, NULL, ldc, NULL, 0, c);
#endif
}

/* ------------------------------------------------------------------------------- operands */

/* Row k of b (K rows; ld) and, in bfloat16, the one below it: out (n) words. */
INLINE void pair_rows(long K, long k, long n, const num *b, long ld, word *out) {
#if PAIR == 1
    (void)K;
    memcpy(out, b + k * ld, (size_t)n * sizeof(word));
#else
    const num *lo = b + k * ld, *hi = lo + ld;
    if (k + 1 < K)
#pragma omp simd
        for (long i = 0; i < n; i++) out[i] = pair(lo[i], hi[i]);
    else
#pragma omp simd
        for (long i = 0; i < n; i++) out[i] = lo[i];
#endif
}

/* Panels of b (K, N; ld): out (ceil(N / NR), deep(K), NR), `panel` words from one to the next. */
void pack(long K, long N, const num *b, long ld, word *out, long panel) {
    for (long j = 0; j < N; j += NR, out += panel)
        for (long k = 0; k < K; k += PAIR) {
            word *to = out + k / PAIR * NR;
            if (N - j >= NR) pair_rows(K, k, NR, b + j, ld, to);
            else {
                memset(to, 0, sizeof(word[NR]));
                pair_rows(K, k, N - j, b + j, ld, to);
            }
        }
}

/* Panels of the transpose of b (N, K; ld), the same out: for y = x w^T, w as PyTorch has it. ld is
 * even and an odd K has a zero behind it, where numbers are bfloat16. */
void pack_transposed(long K, long N, const num *b, long ld, word *out, long panel) {
    const word *from = (const word *)b;
    for (long j = 0; j < N; j += NR, out += panel)
        for (int n = 0; n < NR; n++)
            for (long k = 0; k < deep(K); k++)
                out[k * NR + n] = n < N - j ? from[(j + n) * (ld / PAIR) + k] : 0;
}

/* Tiles of MR columns of a (K, M; ld): out (ceil(M / MR), deep(K), MR), read through
 * packed_columns. */
void pack_left(long K, long M, const num *a, long ld, word *out) {
    for (long i = 0; i < M; i += MR, out += deep(K) * MR)
        for (long k = 0; k < K; k += PAIR) {
            word *to = out + k / PAIR * MR;
            if (M - i >= MR) pair_rows(K, k, MR, a + i, ld, to);
            else {
                memset(to, 0, sizeof(word[MR]));
                pair_rows(K, k, M - i, a + i, ld, to);
            }
        }
}

/* The transpose of a (K, M; ld) as left matrix: a itself in float32; in bfloat16 its rows paired
 * up in room (deep(K), M). */
Left columns(long K, long M, const num *a, long ld, word *room) {
#if PAIR == 1
    (void)K, (void)M, (void)room;
    return (Left){a, 1, ld, MR};
#else
    for (long k = 0; k < K; k += PAIR) pair_rows(K, k, M, a, ld, room + k / PAIR * M);
    return (Left){room, 1, M, MR};
#endif
}

/* y (T, N; ldy) = x (T, N; ldx) as factors of a product; in bfloat16 an odd row ends with a zero.
 * Where x is y, as `wide` makes it in float32, there is nothing to do. */
void narrow(long T, long N, const float *x, long ldx, num *y, long ldy) {
#if PAIR == 1
    for (long t = 0; t < T && x != y; t++)
        memcpy(y + t * ldy, x + t * ldx, (size_t)N * sizeof(float));
#else
    for (long t = 0; t < T; t++, x += ldx, y += ldy) {
        long i = 0;
        for (; i + VLEN <= N; i += VLEN) narrow_vec(load(x + i), y + i);
        for (; i < N; i++) y[i] = narrow_one(x[i]);
        if (N % 2) y[N] = 0;
    }
#endif
}
