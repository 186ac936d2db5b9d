/* Matrix times a few vectors, fp16 weights, fp32 vectors, at the speed of memory.
 *
 * Decoding is nothing but such products, and a general library converts fp16 slowly when there are only a few columns.
 * Rows are handed out in small blocks to a few threads; every sum is made by one thread in one order, so the result does
 * not depend on how many threads there are, which of them was late, or how many vectors came together.
 */
#include "kernels.h"

enum { LEAST_ROWS = 16, SMALL = 1 << 17, LARGE = 1 << 18 };

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

/* Rows begin ... end - 1 of a product. */
static void multiply_rows(product_t part, ptrdiff_t begin, ptrdiff_t end) {
    part.w += begin * part.w_step;
    part.y += begin;
    part.rows = end - begin;
    edge_kernels.product(&part);
}

static void some_rows(const void *job, ptrdiff_t begin, ptrdiff_t end) {
    multiply_rows(*(const product_t *)job, begin, end);
}

/* Rows that a thread takes at a time. Many, for memory is read fastest in long runs (64 KB at a time cost a tenth of the
 * rate on a Zen 5), but some eight pieces for every thread, as some are late. Few values are the caller's alone, who has
 * read 256 KB before a helper is awake. */
static ptrdiff_t grain(ptrdiff_t rows, ptrdiff_t cols) {
    if (rows * cols < SMALL) return rows;
    ptrdiff_t even = rows / (8 * edge_threads()), most = LARGE / cols;
    ptrdiff_t wanted = even < most ? even : most;
    return wanted < LEAST_ROWS ? LEAST_ROWS : wanted;
}

void edge_multiply(const half_t *w, const float *x, float *y, ptrdiff_t rows, ptrdiff_t cols, ptrdiff_t vectors) {
    product_t job = {w, x, y, rows, cols, vectors, cols, cols, rows};
    edge_share(some_rows, &job, rows, grain(rows, cols));
}

/* product[i] = silu(gate[i]) * up[i] */
static void silu_times(const float *restrict gate, const float *restrict up, float *restrict product, ptrdiff_t count) {
    for (ptrdiff_t i = 0; i < count; i++) product[i] = gate[i] / (1 + edge_exp(-gate[i])) * up[i];
}

/* One gated MLP: weights, and where its results go. */
typedef struct {
    const half_t *gate_up, *down;
    float *y;
} mlp_t;

/* Several of one size, on the same vectors: gate_up [mlps, vectors, 2 inner], product [mlps, vectors, inner]. */
typedef struct {
    const mlp_t *mlps;
    const float *x;
    float *gate_up, *product;
    ptrdiff_t inner, hidden, vectors;
} mlps_t;

static product_t gate_up_of(const mlps_t *j, ptrdiff_t mlp) {
    ptrdiff_t rows = 2 * j->inner, cols = j->hidden;
    return (product_t){j->mlps[mlp].gate_up, j->x, j->gate_up + mlp * j->vectors * rows, rows, cols, j->vectors,
                       cols, cols, rows};
}

static product_t down_of(const mlps_t *j, ptrdiff_t mlp) {
    ptrdiff_t rows = j->hidden, cols = j->inner;
    return (product_t){j->mlps[mlp].down, j->product + mlp * j->vectors * cols, j->mlps[mlp].y, rows, cols, j->vectors,
                       cols, cols, rows};
}

/* Rows begin ... end - 1 of one product of all MLPs, counted through. */
static void rows_through(const mlps_t *j, product_t (*of)(const mlps_t *, ptrdiff_t), ptrdiff_t begin, ptrdiff_t end) {
    for (ptrdiff_t stop; begin < end; begin = stop) {
        ptrdiff_t rows = of(j, 0).rows, mlp = begin / rows, first = mlp * rows;
        stop = first + rows < end ? first + rows : end;
        multiply_rows(of(j, mlp), begin - first, stop - first);
    }
}

static void gate_up_rows(const void *job, ptrdiff_t begin, ptrdiff_t end) { rows_through(job, gate_up_of, begin, end); }

static void down_rows(const void *job, ptrdiff_t begin, ptrdiff_t end) { rows_through(job, down_of, begin, end); }

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

/* For each of `count` MLPs and each of the vectors x[hidden]: y[hidden] = down[hidden, inner] (silu(gate x) * up x), where
 * gate_up[2 inner, hidden] holds gate, then up. scratch[3 inner] per MLP and vector. The threads meet twice, whatever the
 * number of MLPs: a meeting costs some 30 us where a helper has to be woken. */
void edge_gated_mlps(const mlp_t *mlps, ptrdiff_t count, const float *x, float *scratch, ptrdiff_t inner,
                     ptrdiff_t hidden, ptrdiff_t vectors) {
    mlps_t job = {mlps, x, scratch, scratch + count * vectors * 2 * inner, inner, hidden, vectors};
    edge_take_turn();
    edge_share(gate_up_rows, &job, count * 2 * inner, grain(count * 2 * inner, hidden));
    for (ptrdiff_t v = 0; v < count * vectors; v++) {
        const float *gate = job.gate_up + v * 2 * inner;
        silu_times(gate, gate + inner, job.product + v * inner, inner);
    }
    edge_share(down_rows, &job, count * hidden, grain(count * hidden, inner));
    edge_end_turn();
}
