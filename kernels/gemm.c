/* C = R + A B, the matrix product that does nine tenths of the work, in float32.
 *
 *     for i < M:  for j < N:  for k < K:  c[i][j] += a[i][k] * b[k][j]         (the naive nest)
 *
 * Computed in tiles of MR x NR numbers that stay in registers for the whole sum over k: each step
 * loads NV vectors of B and MR single numbers of A and does MR * NV fused multiply-adds, so it is
 * limited by arithmetic and not by loads. B is packed beforehand into panels of NR columns,
 *
 *     panel j:  b[0][j..j+NR) b[1][j..j+NR) ... b[K-1][j..j+NR)      zeros beyond column N
 *
 * read front to back by the inner loop; weights are packed once per step and used by all
 * sequences. A panel stays in the first-level cache while all rows of A pass by.
 */
#include "kernels.h"

#define KC 384 /* rows of a panel used at a time: KC * NR * 4 bytes stay below the L1 cache */

/* One tile: c (rows, cols) = r + a b over k < K. rows and contiguous are compile-time constants. */
INLINE void tile(const int rows, const int contiguous, long K, const float *a, long ai, long ak,
                 const float *b, float *c, long ldc, const float *r, long ldr, long cols) {
    vec sum[MR][NV] = {{{0}}};
    const long row = contiguous ? 1 : ai, col = contiguous ? ak : 1;
    for (long k = 0; k < K; k++, b += NR) {
        for (int i = 0; i < rows; i++)
            for (int j = 0; j < NV; j++) sum[i][j] += a[i * row + k * col] * load(b + j * VLEN);
    }
    if (cols < NR) { /* the last panel: only part of the tile exists in C */
        float whole[MR][NR];
        for (int i = 0; i < rows; i++) {
            for (int j = 0; j < NV; j++) store(whole[i] + j * VLEN, sum[i][j]);
            for (long j = 0; j < cols; j++)
                c[i * ldc + j] = whole[i][j] + (r ? r[i * ldr + j] : 0.0f);
        }
        return;
    }
    for (int i = 0; i < rows; i++)
        for (int j = 0; j < NV; j++) {
            vec old = r ? load(r + i * ldr + j * VLEN) : (vec){0};
            store(c + i * ldc + j * VLEN, sum[i][j] + old);
        }
}

/* The same with the number of rows known only now: one compiled copy of `tile` for each. */
static void tile_of(long rows, int contiguous, long K, const float *a, long ai, long ak,
                    const float *b, float *c, long ldc, const float *r, long ldr, long cols) {
#define CASE(n)                                                                          \
    case n:                                                                              \
        if (contiguous) tile(n, 1, K, a, ai, ak, b, c, ldc, r, ldr, cols);               \
        else tile(n, 0, K, a, ai, ak, b, c, ldc, r, ldr, cols);                          \
        break;
    switch (rows) {
        CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6)
#if MR > 6
        CASE(7) CASE(8) CASE(9) CASE(10) CASE(11) CASE(12)
#endif
    }
#undef CASE
}

/* c (M, N; ldc) = r + a b, K >= 1. a: see Left. b: panels, `panel` numbers from one to the next
 * (K * NR when packed for this product alone). r (M, N; ldr): NULL for 0, or c to accumulate. */
void gemm(long M, long N, long K, Left a, const float *b, long panel, float *c, long ldc,
          const float *r, long ldr) {
    long parts = (K + KC - 1) / KC, depth = (K + parts - 1) / parts; /* parts of equal size */
    for (long k = 0; k < K; k += depth) {
        for (long j = 0; j < N; j += NR)
            for (long i = 0; i < M; i += MR)
                tile_of(at_most(MR, M - i), a.row == 1 && a.col != 1, at_most(depth, K - k),
                        a.p + i / MR * a.tile + k * a.col, a.row, a.col,
                        b + j / NR * panel + k * NR, c + i * ldc + j, ldc,
                        r ? r + i * ldr + j : NULL, ldr, at_most(NR, N - j));
        r = c, ldr = ldc; /* further parts of the sum add to what is there */
    }
}

/* Panels of b (K, N; ld): out (ceil(N / NR), K, NR), `panel` numbers from one to the next. */
void pack(long K, long N, const float *b, long ld, float *out, long panel) {
    for (long j = 0; j < N; j += NR, out += panel)
        for (long k = 0; k < K; k++) {
            const float *from = b + k * ld + j;
            if (N - j >= NR)
                for (int v = 0; v < NV; v++) store(out + k * NR + v * VLEN, load(from + v * VLEN));
            else
                for (int n = 0; n < NR; n++) out[k * NR + n] = n < N - j ? from[n] : 0.0f;
        }
}

/* Panels of the transpose of b (N, K; ld), the same out: for y = x w^T, w as PyTorch has it. */
void pack_transposed(long K, long N, const float *b, long ld, float *out, long panel) {
    for (long j = 0; j < N; j += NR, out += panel)
        for (int n = 0; n < NR; n++)
            for (long k = 0; k < K; k++)
                out[k * NR + n] = n < N - j ? b[(j + n) * ld + k] : 0.0f;
}

/* Tiles of MR columns of a (K, M; ld): out (ceil(M / MR), K, MR), read through packed_columns. */
void pack_left(long K, long M, const float *a, long ld, float *out) {
    for (long i = 0; i < M; i += MR, out += K * MR)
        for (long k = 0; k < K; k++) {
            const float *from = a + k * ld + i;
            if (M - i >= MR) memcpy(out + k * MR, from, sizeof(float[MR]));
            else
                for (int m = 0; m < MR; m++) out[k * MR + m] = m < M - i ? from[m] : 0.0f;
        }
}

