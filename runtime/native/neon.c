/* Products for NEON, which every aarch64 processor has. */
#include "kernels.h"

#if defined(__aarch64__)
#include <arm_neon.h>

typedef struct {
    float32x4_t low, high;
} eight_t;

BODY eight_t halves8(const half_t *from) {
    float16x8_t halves = vreinterpretq_f16_u16(vld1q_u16(from));
    return (eight_t){vcvt_f32_f16(vget_low_f16(halves)), vcvt_f32_f16(vget_high_f16(halves))};
}

BODY void product8(const product_t *p, const half_t *w, const float *x, float *y, const int rows, const int vectors) {
    float32x4_t sums[4][4];
    for (int v = 0; v < vectors; v++)
        for (int i = 0; i < rows; i++) sums[v][i] = vdupq_n_f32(0);
    ptrdiff_t whole = p->cols & ~(ptrdiff_t)7;
    for (ptrdiff_t c = 0; c < whole; c += 8)
        for (int i = 0; i < rows; i++) {
            eight_t weights = halves8(w + i * p->w_step + c);
            for (int v = 0; v < vectors; v++) {
                const float *values = x + v * p->x_step + c;
                sums[v][i] = vfmaq_f32(sums[v][i], weights.low, vld1q_f32(values));
                sums[v][i] = vfmaq_f32(sums[v][i], weights.high, vld1q_f32(values + 4));
            }
        }
    for (int v = 0; v < vectors; v++)
        for (int i = 0; i < rows; i++) {
            float sum = vaddvq_f32(sums[v][i]);
            for (ptrdiff_t c = whole; c < p->cols; c++)
                sum += edge_from_half(w[i * p->w_step + c]) * x[v * p->x_step + c];
            y[v * p->y_step + i] = sum;
        }
}

BODY void mix8(const mixture_t *p, const half_t *w, const float *x, float *y, const int parts, const int vectors) {
    eight_t sums[4][4];
    for (int v = 0; v < vectors; v++)
        for (int i = 0; i < parts; i++) sums[v][i] = (eight_t){vdupq_n_f32(0), vdupq_n_f32(0)};
    for (ptrdiff_t r = 0; r < p->rows; r++)
        for (int i = 0; i < parts; i++) {
            eight_t weights = halves8(w + r * p->w_step + 8 * i);
            for (int v = 0; v < vectors; v++) {
                float factor = x[v * p->x_step + r];
                sums[v][i].low = vfmaq_n_f32(sums[v][i].low, weights.low, factor);
                sums[v][i].high = vfmaq_n_f32(sums[v][i].high, weights.high, factor);
            }
        }
    for (int v = 0; v < vectors; v++)
        for (int i = 0; i < parts; i++) {
            vst1q_f32(y + v * p->y_step + 8 * i, sums[v][i].low);
            vst1q_f32(y + v * p->y_step + 8 * i + 4, sums[v][i].high);
        }
}

static void mix_few(const mixture_t *p, const half_t *w, const float *x, float *y, ptrdiff_t cols, ptrdiff_t vectors) {
    mixture_t rest = *p;
    rest.w = w, rest.x = x, rest.y = y, rest.cols = cols, rest.vectors = vectors;
    edge_mix_portable(&rest);
}

void edge_product_neon(const product_t *p) { PRODUCT(product8) }

void edge_mix_neon(const mixture_t *p) { MIX(mix8, mix_few, 8) }

void edge_to_half_neon(const float *from, half_t *to, ptrdiff_t count) {
    ptrdiff_t i = 0;
    for (; i + 4 <= count; i += 4) vst1_u16(to + i, vreinterpret_u16_f16(vcvt_f16_f32(vld1q_f32(from + i))));
    edge_to_half_portable(from + i, to + i, count - i);
}
#endif
