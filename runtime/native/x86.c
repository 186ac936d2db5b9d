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

WITH_AVX2 BODY void product8(const product_t *p, const half_t *w, const float *x, float *y, const int rows,
                             const int vectors) {
    __m256 sums[4][4];
    for (int v = 0; v < vectors; v++)
        for (int i = 0; i < rows; i++) sums[v][i] = _mm256_setzero_ps();
    ptrdiff_t whole = p->cols & ~(ptrdiff_t)7;
    for (ptrdiff_t c = 0; c < whole; c += 8)
        for (int i = 0; i < rows; i++) {
            __m256 weights = halves8(w + i * p->w_step + c);
            for (int v = 0; v < vectors; v++)
                sums[v][i] = _mm256_fmadd_ps(weights, _mm256_loadu_ps(x + v * p->x_step + c), sums[v][i]);
        }
    for (int v = 0; v < vectors; v++)
        for (int i = 0; i < rows; i++) {
            float sum = sum8(sums[v][i]);
            for (ptrdiff_t c = whole; c < p->cols; c++)
                sum += edge_from_half(w[i * p->w_step + c]) * x[v * p->x_step + c];
            y[v * p->y_step + i] = sum;
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

WITH_AVX2 void edge_product_avx2(const product_t *p) { PRODUCT(product8) }

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

WITH_AVX512 BODY void product16(const product_t *p, const half_t *w, const float *x, float *y, const int rows,
                                const int vectors) {
    __m512 sums[4][4];
    for (int v = 0; v < vectors; v++)
        for (int i = 0; i < rows; i++) sums[v][i] = _mm512_setzero_ps();
    ptrdiff_t whole = p->cols & ~(ptrdiff_t)15;
    for (ptrdiff_t c = 0; c < whole; c += 16)
        for (int i = 0; i < rows; i++) {
            __m512 weights = halves16(w + i * p->w_step + c);
            for (int v = 0; v < vectors; v++)
                sums[v][i] = _mm512_fmadd_ps(weights, _mm512_loadu_ps(x + v * p->x_step + c), sums[v][i]);
        }
    if (whole < p->cols) {
        __mmask16 mask = first_lanes(p->cols - whole);
        for (int i = 0; i < rows; i++) {
            __m512 weights = _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask, w + i * p->w_step + whole));
            for (int v = 0; v < vectors; v++)
                sums[v][i] =
                    _mm512_fmadd_ps(weights, _mm512_maskz_loadu_ps(mask, x + v * p->x_step + whole), sums[v][i]);
        }
    }
    for (int v = 0; v < vectors; v++)
        for (int i = 0; i < rows; i++) y[v * p->y_step + i] = _mm512_reduce_add_ps(sums[v][i]);
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
