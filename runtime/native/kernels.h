/* What the files of the library share. Names begin with edge_ and stay inside it unless Python calls them. */
#pragma once
#include <stddef.h>
#include <stdint.h>
#include <string.h>

typedef uint16_t half_t; /* the bits of an fp16 value */

/* y[v * y_step + r] = w[r * w_step ...] . x[v * x_step ...] for `rows` rows and `vectors` vectors of `cols` values */
typedef struct {
    const half_t *w;
    const float *x;
    float *y;
    ptrdiff_t rows, cols, vectors, w_step, x_step, y_step;
} product_t;

/* y[v * y_step + c] = sum over r of x[v * x_step + r] * w[r * w_step + c]: rows mixed instead of multiplied */
typedef product_t mixture_t;

/* What an instruction set does. A sum is made in one order, whatever else is computed with it. */
typedef struct {
    void (*product)(const product_t *p);
    void (*mix)(const mixture_t *m);
    void (*to_half)(const float *from, half_t *to, ptrdiff_t count); /* to nearest even */
} kernels_t;

enum { PORTABLE = 0, AVX2 = 1, AVX512 = 2, NEON = 3, BEST = -1 };

/* Constant counts let the compiler unroll a body that is written once per instruction set. */
#define BODY static inline __attribute__((always_inline))
/* A product in tiles of up to four rows by four vectors. */
#define PRODUCT(body)                                                                                                  \
    for (ptrdiff_t r = 0, n; r < p->rows; r += n) {                                                                    \
        n = p->rows - r >= 4 ? 4 : 1;                                                                                  \
        for (ptrdiff_t v = 0, m; v < p->vectors; v += m) {                                                             \
            m = p->vectors - v >= 4 ? 4 : 1;                                                                           \
            const half_t *w = p->w + r * p->w_step;                                                                    \
            const float *x = p->x + v * p->x_step;                                                                     \
            float *y = p->y + v * p->y_step + r;                                                                       \
            if (n == 4 && m == 4) body(p, w, x, y, 4, 4);                                                              \
            else if (n == 4) body(p, w, x, y, 4, 1);                                                                   \
            else if (m == 4) body(p, w, x, y, 1, 4);                                                                   \
            else body(p, w, x, y, 1, 1);                                                                               \
        }                                                                                                              \
    }
/* A mixture in tiles of up to four vectors by four or one pieces of `width` columns; the body leaves what is no whole
 * piece to `last`, called with the number of columns left. */
#define MIX(body, last, width)                                                                                         \
    for (ptrdiff_t v = 0, m; v < p->vectors; v += m) {                                                                 \
        m = p->vectors - v >= 4 ? 4 : 1;                                                                               \
        const float *x = p->x + v * p->x_step;                                                                         \
        float *y = p->y + v * p->y_step;                                                                               \
        ptrdiff_t c = 0;                                                                                               \
        for (; p->cols - c >= 4 * (width); c += 4 * (width))                                                           \
            if (m == 4) body(p, p->w + c, x, y + c, 4, 4);                                                             \
            else body(p, p->w + c, x, y + c, 4, 1);                                                                    \
        for (; p->cols - c >= (width); c += (width))                                                                   \
            if (m == 4) body(p, p->w + c, x, y + c, 1, 4);                                                             \
            else body(p, p->w + c, x, y + c, 1, 1);                                                                    \
        if (c < p->cols) last(p, p->w + c, x, y + c, p->cols - c, m);                                                  \
    }

int edge_short_slice(void); /* threads.c; Python calls it, too */

#pragma GCC visibility push(hidden)
extern kernels_t edge_kernels; /* those chosen by edge_start */

void edge_product_portable(const product_t *p);
void edge_mix_portable(const mixture_t *m);
void edge_to_half_portable(const float *from, half_t *to, ptrdiff_t count);
void edge_product_avx2(const product_t *p);
void edge_mix_avx2(const mixture_t *m);
void edge_to_half_avx2(const float *from, half_t *to, ptrdiff_t count);
void edge_product_avx512(const product_t *p);
void edge_mix_avx512(const mixture_t *m);
void edge_to_half_avx512(const float *from, half_t *to, ptrdiff_t count);
void edge_product_neon(const product_t *p);
void edge_mix_neon(const mixture_t *m);
void edge_to_half_neon(const float *from, half_t *to, ptrdiff_t count);

/* Threads: see threads.c. Between edge_take_turn and edge_end_turn they belong to the caller. */
void edge_take_turn(void);
void edge_end_turn(void);
int edge_have_threads(int threads);
int edge_threads(void);
void edge_share(void (*piece)(const void *job, ptrdiff_t begin, ptrdiff_t end), const void *job, ptrdiff_t count,
                ptrdiff_t grain);

/* y[vectors, rows] = x[vectors, cols] w[rows, cols]^T by all threads */
void edge_multiply(const half_t *w, const float *x, float *y, ptrdiff_t rows, ptrdiff_t cols, ptrdiff_t vectors);
#pragma GCC visibility pop

static inline float edge_from_half(half_t h) {
    uint32_t sign = (uint32_t)(h & 0x8000) << 16, exponent = (h >> 10) & 31, fraction = h & 1023, bits;
    if (exponent == 31) bits = sign | 0x7f800000u | fraction << 13;
    else if (exponent) bits = sign | (exponent + 112) << 23 | fraction << 13;
    else {
        float small = (float)fraction * 0x1p-24f;
        return sign ? -small : small;
    }
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

/* e^x by 2^n e^r with |r| <= ln 2 / 2 and a polynomial whose next term is below 2e-7; no call, so that loops over it
 * become vector code. */
static inline float edge_exp(float x) {
    x = x < -87.0f ? -87.0f : x > 88.0f ? 88.0f : x;
    float n = x * 1.44269504f + 12582912.0f - 12582912.0f; /* nearest integer: the sum has no room for a fraction */
    float r = x - n * 0.693145752f - n * 1.42860677e-6f;
    float e = 1 + r * (1 + r * (0.5f + r * (1 / 6.0f + r * (1 / 24.0f + r * (1 / 120.0f + r * (1 / 720.0f))))));
    uint32_t bits = (uint32_t)((int32_t)n + 127) << 23;
    float power;
    memcpy(&power, &bits, 4);
    return e * power;
}
