/* Products in plain C, for processors without the instructions that the other files use. */
#include "kernels.h"

BODY void product(const product_t *p, const half_t *w, const float *x, float *y, const int rows, const int vectors) {
    for (int v = 0; v < vectors; v++)
        for (int i = 0; i < rows; i++) {
            float sum = 0;
            for (ptrdiff_t c = 0; c < p->cols; c++) sum += edge_from_half(w[i * p->w_step + c]) * x[v * p->x_step + c];
            y[v * p->y_step + i] = sum;
        }
}

void edge_product_portable(const product_t *p) { PRODUCT(product) }

void edge_mix_portable(const mixture_t *p) {
    for (ptrdiff_t v = 0; v < p->vectors; v++)
        for (ptrdiff_t c = 0; c < p->cols; c++) p->y[v * p->y_step + c] = 0;
    for (ptrdiff_t r = 0; r < p->rows; r++)
        for (ptrdiff_t c = 0; c < p->cols; c++) {
            float weight = edge_from_half(p->w[r * p->w_step + c]);
            for (ptrdiff_t v = 0; v < p->vectors; v++) p->y[v * p->y_step + c] += weight * p->x[v * p->x_step + r];
        }
}

static half_t half_of(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    uint32_t sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
    if (magnitude > 0x7f800000) return (half_t)(sign | 0x7e00);
    if (magnitude >= 0x477ff000) return (half_t)(sign | 0x7c00); /* rounds to 65536 or more */
    if (magnitude < 0x38800000) { /* below 2^-14: adding 2^-1 leaves the bits of a multiple of 2^-24, rounded */
        float shifted;
        memcpy(&shifted, &magnitude, 4);
        shifted += 0.5f;
        memcpy(&bits, &shifted, 4);
        return (half_t)(sign | (bits - 0x3f000000));
    }
    magnitude += 0xfff + (magnitude >> 13 & 1); /* to nearest, a tie to the even one */
    return (half_t)(sign | (magnitude - 0x38000000) >> 13);
}

void edge_to_half_portable(const float *from, half_t *to, ptrdiff_t count) {
    for (ptrdiff_t i = 0; i < count; i++) to[i] = half_of(from[i]);
}
