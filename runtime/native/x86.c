/* Products for AVX2 with FMA and F16C, and for AVX-512. */
#include "kernels.h"

#if defined(__x86_64__)
#include <immintrin.h>
#define WITH_AVX2 __attribute__((target("avx2,fma,f16c")))
#define WITH_AVX512 __attribute__((target("avx512f,avx512bw,avx512vl")))

WITH_AVX2 BODY __m256 halves8(const half_t *from) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)from)); }

WITH_AVX2 BODY float sum8(__m256 v) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_shuffle_ps(s, s, 1)));
}

/* Rows `apart` from each other with one vector, side by side. */
WITH_AVX2 BODY void product8(const product_t *p, const half_t *w, const float *x, float *y, const ptrdiff_t apart,
                             const int rows) {
    __m256 sums[4][2];
    for (int i = 0; i < rows; i++) sums[i][0] = sums[i][1] = _mm256_setzero_ps();
    ptrdiff_t c = 0;
    for (; c + 32 <= p->cols; c += 32)
        for (int i = 0; i < rows; i++)
            for (int j = 0; j < 4; j++) {
                __m256 weights = halves8(w + i * apart * p->w_step + c + 8 * j);
                sums[i][j & 1] = _mm256_fmadd_ps(weights, _mm256_loadu_ps(x + c + 8 * j), sums[i][j & 1]);
            }
    for (int i = 0; i < rows; i++) {
        float sum = sum8(_mm256_add_ps(sums[i][0], sums[i][1]));
        for (ptrdiff_t rest = c; rest < p->cols; rest++) sum += edge_from_half(w[i * apart * p->w_step + rest]) * x[rest];
        y[i * apart] = sum;
    }
}

WITH_AVX2 BODY void mix8(const mixture_t *p, const half_t *w, const float *x, float *y, const int parts,
                         const int vectors) {
    __m256 sums[4][4];
    for (int v = 0; v < vectors; v++)
        for (int i = 0; i < parts; i++) sums[v][i] = _mm256_setzero_ps();
    for (ptrdiff_t r = 0; r < p->rows; r++)
        for (int i = 0; i < parts; i++) {
            __m256 weights = halves8(w + r * p->w_step + 8 * i);
            for (int v = 0; v < vectors; v++)
                sums[v][i] = _mm256_fmadd_ps(weights, _mm256_set1_ps(x[v * p->x_step + r]), sums[v][i]);
        }
    for (int v = 0; v < vectors; v++)
        for (int i = 0; i < parts; i++) _mm256_storeu_ps(y + v * p->y_step + 8 * i, sums[v][i]);
}

WITH_AVX2 static void mix_few(const mixture_t *p, const half_t *w, const float *x, float *y, ptrdiff_t cols,
                              ptrdiff_t vectors) {
    mixture_t rest = *p;
    rest.w = w, rest.x = x, rest.y = y, rest.cols = cols, rest.vectors = vectors;
    edge_mix_portable(&rest);
}

/* Four rows a quarter of all apart are four long streams of memory. A Zen 3, which has no AVX-512, reads them 1.2 to 1.6
 * times as fast as one stream or as four rows that are neighbours, and fetching ahead only costs: it takes up the few
 * misses that a core may have under way. The next vector finds the rows in the cache; several at once would need more
 * registers than there are. */
WITH_AVX2 void edge_product_avx2(const product_t *p) {
    ptrdiff_t quarter = p->rows / 4;
    for (ptrdiff_t r = 0; r < quarter; r++)
        for (ptrdiff_t v = 0; v < p->vectors; v++)
            product8(p, p->w + r * p->w_step, p->x + v * p->x_step, p->y + v * p->y_step + r, quarter, 4);
    for (ptrdiff_t r = 4 * quarter; r < p->rows; r++)
        for (ptrdiff_t v = 0; v < p->vectors; v++)
            product8(p, p->w + r * p->w_step, p->x + v * p->x_step, p->y + v * p->y_step + r, 0, 1);
}

WITH_AVX2 void edge_mix_avx2(const mixture_t *p) { MIX(mix8, mix_few, 8) }

WITH_AVX2 void edge_to_half_avx2(const float *from, half_t *to, ptrdiff_t count) {
    ptrdiff_t i = 0;
    for (; i + 8 <= count; i += 8)
        _mm_storeu_si128((__m128i *)(to + i), _mm256_cvtps_ph(_mm256_loadu_ps(from + i), _MM_FROUND_TO_NEAREST_INT));
    edge_to_half_portable(from + i, to + i, count - i);
}

WITH_AVX512 BODY __mmask16 first_lanes(ptrdiff_t count) { return (__mmask16)((1u << count) - 1); }

WITH_AVX512 BODY __m512 halves16(const half_t *from) {
    return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)from));
}

/* Columns to fetch ahead of a row whose successors follow it in memory: 8 KB, as the processor by itself looks no further
 * than the page. Rows with a step, those of the KV cache, lie among rows that nobody has asked for. */
BODY ptrdiff_t columns_ahead(const product_t *p) { return p->w_step == p->cols ? 4096 : 0; }

/* A row after the other: on a Zen 5 and a Xeon one stream of memory per thread is read faster than four rows that are
 * neighbours. Rows far apart, as above, were not tried there. */
WITH_AVX512 BODY void product16(const product_t *p, const half_t *w, const float *x, float *y, const int rows,
                                const int vectors) {
    ptrdiff_t ahead = columns_ahead(p);
    for (int i = 0; i < rows; i++, w += p->w_step) {
        __m512 sums[4][4];
        for (int v = 0; v < vectors; v++)
            for (int j = 0; j < 4; j++) sums[v][j] = _mm512_setzero_ps();
        ptrdiff_t c = 0;
        for (; c + 64 <= p->cols; c += 64) {
            _mm_prefetch((const char *)(w + c + ahead), _MM_HINT_T1);
            _mm_prefetch((const char *)(w + c + 32 + ahead), _MM_HINT_T1);
            for (int j = 0; j < 4; j++) {
                __m512 weights = halves16(w + c + 16 * j);
                for (int v = 0; v < vectors; v++)
                    sums[v][j] = _mm512_fmadd_ps(weights, _mm512_loadu_ps(x + v * p->x_step + c + 16 * j), sums[v][j]);
            }
        }
        for (; c < p->cols; c += 16) {
            __mmask16 mask = first_lanes(p->cols - c < 16 ? p->cols - c : 16);
            __m512 weights = _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask, w + c));
            for (int v = 0; v < vectors; v++)
                sums[v][0] = _mm512_fmadd_ps(weights, _mm512_maskz_loadu_ps(mask, x + v * p->x_step + c), sums[v][0]);
        }
        for (int v = 0; v < vectors; v++) {
            __m512 first = _mm512_add_ps(sums[v][0], sums[v][1]), second = _mm512_add_ps(sums[v][2], sums[v][3]);
            y[v * p->y_step + i] = _mm512_reduce_add_ps(_mm512_add_ps(first, second));
        }
    }
}

WITH_AVX512 BODY void mix16(const mixture_t *p, const half_t *w, const float *x, float *y, const int parts,
                            const int vectors) {
    __m512 sums[4][4];
    for (int v = 0; v < vectors; v++)
        for (int i = 0; i < parts; i++) sums[v][i] = _mm512_setzero_ps();
    for (ptrdiff_t r = 0; r < p->rows; r++)
        for (int i = 0; i < parts; i++) {
            __m512 weights = halves16(w + r * p->w_step + 16 * i);
            for (int v = 0; v < vectors; v++)
                sums[v][i] = _mm512_fmadd_ps(weights, _mm512_set1_ps(x[v * p->x_step + r]), sums[v][i]);
        }
    for (int v = 0; v < vectors; v++)
        for (int i = 0; i < parts; i++) _mm512_storeu_ps(y + v * p->y_step + 16 * i, sums[v][i]);
}

WITH_AVX512 static void mix_masked(const mixture_t *p, const half_t *w, const float *x, float *y, ptrdiff_t cols,
                                   ptrdiff_t vectors) {
    __mmask16 mask = first_lanes(cols);
    for (ptrdiff_t v = 0; v < vectors; v++) {
        __m512 sum = _mm512_setzero_ps();
        for (ptrdiff_t r = 0; r < p->rows; r++) {
            __m512 weights = _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask, w + r * p->w_step));
            sum = _mm512_fmadd_ps(weights, _mm512_set1_ps(x[v * p->x_step + r]), sum);
        }
        _mm512_mask_storeu_ps(y + v * p->y_step, mask, sum);
    }
}

WITH_AVX512 void edge_product_avx512(const product_t *p) { PRODUCT(product16) }

WITH_AVX512 void edge_mix_avx512(const mixture_t *p) { MIX(mix16, mix_masked, 16) }

WITH_AVX512 void edge_to_half_avx512(const float *from, half_t *to, ptrdiff_t count) {
    for (ptrdiff_t i = 0; i < count; i += 16) {
        __mmask16 mask = first_lanes(count - i < 16 ? count - i : 16);
        __m256i halves = _mm512_cvtps_ph(_mm512_maskz_loadu_ps(mask, from + i), _MM_FROUND_TO_NEAREST_INT);
        _mm256_mask_storeu_epi16(to + i, mask, halves);
    }
}
#endif
