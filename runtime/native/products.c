/* Matrix times a few vectors, fp16 weights, fp32 vectors, at the speed of memory.
 *
 * Decoding is nothing but such products, and a general library converts fp16 slowly when there are only a few columns.
 * Rows are handed out in small blocks to a few threads; every sum is made by one thread in one order, so the result does
 * not depend on how many threads there are, which of them was late, or how many vectors came together.
 */
#include "kernels.h"

enum { BLOCK_ROWS = 16, SMALL = 1 << 15 };

kernels_t edge_kernels;

static kernels_t kernels_for(int level) {
#if defined(__x86_64__)
    int has512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                 __builtin_cpu_supports("avx512vl");
    int has256 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    if ((level == BEST || level == AVX512) && has512)
        return (kernels_t){edge_product_avx512, edge_mix_avx512, edge_to_half_avx512};
    if ((level == BEST || level == AVX2) && has256)
        return (kernels_t){edge_product_avx2, edge_mix_avx2, edge_to_half_avx2};
#elif defined(__aarch64__)
    if (level == BEST || level == NEON) return (kernels_t){edge_product_neon, edge_mix_neon, edge_to_half_neon};
#endif
    if (level == PORTABLE) return (kernels_t){edge_product_portable, edge_mix_portable, edge_to_half_portable};
    return (kernels_t){0};
}

static void some_rows(const void *job, ptrdiff_t begin, ptrdiff_t end) {
    product_t part = *(const product_t *)job;
    part.w += begin * part.w_step;
    part.y += begin;
    part.rows = end - begin;
    edge_kernels.product(&part);
}

void edge_multiply(const half_t *w, const float *x, float *y, ptrdiff_t rows, ptrdiff_t cols, ptrdiff_t vectors) {
    product_t job = {w, x, y, rows, cols, vectors, cols, cols, rows};
    edge_share(some_rows, &job, rows, rows * cols < SMALL ? rows : BLOCK_ROWS);
}

/* product[i] = silu(gate[i]) * up[i] */
static void silu_times(const float *restrict gate, const float *restrict up, float *restrict product, ptrdiff_t count) {
    for (ptrdiff_t i = 0; i < count; i++) product[i] = gate[i] / (1 + edge_exp(-gate[i])) * up[i];
}

/* ---- what Python calls ---- */

/* Choose the instruction set (-1: the best there is) and have `threads` in all.
 * Returns 0, or -1 when the processor has not got the instruction set or a thread did not start. */
int edge_start(int level, int threads) {
    kernels_t found = kernels_for(level);
    if (!found.product || threads < 1) return -1;
    edge_take_turn();
    edge_kernels = found;
    int failed = edge_have_threads(threads);
    edge_end_turn();
    return failed;
}

/* y[vectors, rows] = x[vectors, cols] w[rows, cols]^T */
void edge_product(const half_t *w, const float *x, float *y, ptrdiff_t rows, ptrdiff_t cols, ptrdiff_t vectors) {
    edge_take_turn();
    edge_multiply(w, x, y, rows, cols, vectors);
    edge_end_turn();
}

/* For each of the vectors x[hidden]: y[hidden] = down[hidden, inner] (silu(gate x) * up x), where gate_up[2 inner, hidden]
 * holds gate, then up. scratch[3 inner] per vector. */
void edge_gated_mlp(const half_t *gate_up, const half_t *down, const float *x, float *scratch, float *y,
                    ptrdiff_t inner, ptrdiff_t hidden, ptrdiff_t vectors) {
    float *product = scratch + vectors * 2 * inner;
    edge_take_turn();
    edge_multiply(gate_up, x, scratch, 2 * inner, hidden, vectors);
    for (ptrdiff_t v = 0; v < vectors; v++) {
        const float *gate = scratch + v * 2 * inner, *up = gate + inner;
        silu_times(gate, up, product + v * inner, inner);
    }
    edge_multiply(down, product, y, hidden, inner, vectors);
    edge_end_turn();
}
