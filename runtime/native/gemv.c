/* Matrix times a few vectors, fp16 weights, fp32 vectors, at the speed of memory.
 *
 * Decoding is nothing but such products, and a general library converts fp16 slowly when there are only a few columns.
 * Rows are handed out in small blocks to a few threads; every sum is made by one thread in one order, so the result does
 * not depend on how many threads there are, which of them was late, or how many vectors came together.
 */
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

typedef uint16_t half_t;

/* y[v * y_step + r] = w[r] . x[v] for `rows` rows and `vectors` vectors of `cols` values */
typedef struct {
    const half_t *w;
    const float *x;
    float *y;
    ptrdiff_t rows, cols, vectors, y_step;
} product_t;
typedef void (*product_fn)(const product_t *p);

enum { BLOCK_ROWS = 16, MAX_THREADS = 64, SPINS = 2000, SMALL = 1 << 15 };
#define OPEN 0x80000000u
enum { PORTABLE = 0, AVX2 = 1, AVX512 = 2, NEON = 3, BEST = -1 };

/* ---- dot products, up to four rows by four vectors at a time, per instruction set ---- */

static float half_to_float(half_t h) {
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

/* Each instruction set has one body; constant counts let the compiler unroll it, and TILES calls it over a product. */
#define BODY static inline __attribute__((always_inline))
#define TILES(body)                                                                                                    \
    for (ptrdiff_t r = 0, n; r < p->rows; r += n) {                                                                    \
        n = p->rows - r >= 4 ? 4 : 1;                                                                                  \
        for (ptrdiff_t v = 0, m; v < p->vectors; v += m) {                                                             \
            m = p->vectors - v >= 4 ? 4 : 1;                                                                           \
            const half_t *w = p->w + r * p->cols;                                                                      \
            const float *x = p->x + v * p->cols;                                                                       \
            float *y = p->y + v * p->y_step + r;                                                                       \
            if (n == 4 && m == 4) body(w, x, y, p->cols, p->y_step, 4, 4);                                             \
            else if (n == 4) body(w, x, y, p->cols, p->y_step, 4, 1);                                                  \
            else if (m == 4) body(w, x, y, p->cols, p->y_step, 1, 4);                                                  \
            else body(w, x, y, p->cols, p->y_step, 1, 1);                                                              \
        }                                                                                                              \
    }

BODY void body_portable(const half_t *w, const float *x, float *y, ptrdiff_t cols, ptrdiff_t y_step, const int rows,
                        const int vectors) {
    for (int v = 0; v < vectors; v++)
        for (int i = 0; i < rows; i++) {
            float sum = 0;
            for (ptrdiff_t c = 0; c < cols; c++) sum += half_to_float(w[i * cols + c]) * x[v * cols + c];
            y[v * y_step + i] = sum;
        }
}

static void product_portable(const product_t *p) { TILES(body_portable) }

#if defined(__x86_64__)
#include <immintrin.h>
#define WITH_AVX2 __attribute__((target("avx2,fma,f16c")))
#define WITH_AVX512 __attribute__((target("avx512f,avx512bw,avx512vl")))

WITH_AVX2 BODY float sum8(__m256 v) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_shuffle_ps(s, s, 1)));
}

WITH_AVX2 BODY void body_avx2(const half_t *w, const float *x, float *y, ptrdiff_t cols, ptrdiff_t y_step,
                              const int rows, const int vectors) {
    __m256 sums[4][4];
    for (int v = 0; v < vectors; v++)
        for (int i = 0; i < rows; i++) sums[v][i] = _mm256_setzero_ps();
    ptrdiff_t whole = cols & ~(ptrdiff_t)7;
    for (ptrdiff_t c = 0; c < whole; c += 8)
        for (int i = 0; i < rows; i++) {
            __m256 weights = _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(w + i * cols + c)));
            for (int v = 0; v < vectors; v++)
                sums[v][i] = _mm256_fmadd_ps(weights, _mm256_loadu_ps(x + v * cols + c), sums[v][i]);
        }
    for (int v = 0; v < vectors; v++)
        for (int i = 0; i < rows; i++) {
            float sum = sum8(sums[v][i]);
            for (ptrdiff_t c = whole; c < cols; c++) sum += half_to_float(w[i * cols + c]) * x[v * cols + c];
            y[v * y_step + i] = sum;
        }
}

WITH_AVX2 static void product_avx2(const product_t *p) { TILES(body_avx2) }

WITH_AVX512 BODY void body_avx512(const half_t *w, const float *x, float *y, ptrdiff_t cols, ptrdiff_t y_step,
                                  const int rows, const int vectors) {
    __m512 sums[4][4];
    for (int v = 0; v < vectors; v++)
        for (int i = 0; i < rows; i++) sums[v][i] = _mm512_setzero_ps();
    ptrdiff_t whole = cols & ~(ptrdiff_t)15;
    for (ptrdiff_t c = 0; c < whole; c += 16)
        for (int i = 0; i < rows; i++) {
            __m512 weights = _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(w + i * cols + c)));
            for (int v = 0; v < vectors; v++)
                sums[v][i] = _mm512_fmadd_ps(weights, _mm512_loadu_ps(x + v * cols + c), sums[v][i]);
        }
    if (whole < cols) {
        __mmask16 mask = (__mmask16)((1u << (cols - whole)) - 1);
        for (int i = 0; i < rows; i++) {
            __m512 weights = _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask, w + i * cols + whole));
            for (int v = 0; v < vectors; v++)
                sums[v][i] = _mm512_fmadd_ps(weights, _mm512_maskz_loadu_ps(mask, x + v * cols + whole), sums[v][i]);
        }
    }
    for (int v = 0; v < vectors; v++)
        for (int i = 0; i < rows; i++) y[v * y_step + i] = _mm512_reduce_add_ps(sums[v][i]);
}

WITH_AVX512 static void product_avx512(const product_t *p) { TILES(body_avx512) }
#elif defined(__aarch64__)
#include <arm_neon.h>

BODY void body_neon(const half_t *w, const float *x, float *y, ptrdiff_t cols, ptrdiff_t y_step, const int rows,
                    const int vectors) {
    float32x4_t sums[4][4];
    for (int v = 0; v < vectors; v++)
        for (int i = 0; i < rows; i++) sums[v][i] = vdupq_n_f32(0);
    ptrdiff_t whole = cols & ~(ptrdiff_t)7;
    for (ptrdiff_t c = 0; c < whole; c += 8)
        for (int i = 0; i < rows; i++) {
            float16x8_t halves = vreinterpretq_f16_u16(vld1q_u16(w + i * cols + c));
            float32x4_t low = vcvt_f32_f16(vget_low_f16(halves)), high = vcvt_f32_f16(vget_high_f16(halves));
            for (int v = 0; v < vectors; v++) {
                sums[v][i] = vfmaq_f32(sums[v][i], low, vld1q_f32(x + v * cols + c));
                sums[v][i] = vfmaq_f32(sums[v][i], high, vld1q_f32(x + v * cols + c + 4));
            }
        }
    for (int v = 0; v < vectors; v++)
        for (int i = 0; i < rows; i++) {
            float sum = vaddvq_f32(sums[v][i]);
            for (ptrdiff_t c = whole; c < cols; c++) sum += half_to_float(w[i * cols + c]) * x[v * cols + c];
            y[v * y_step + i] = sum;
        }
}

static void product_neon(const product_t *p) { TILES(body_neon) }
#endif

static product_fn kernel_for(int level) {
#if defined(__x86_64__)
    int has512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                 __builtin_cpu_supports("avx512vl");
    int has256 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    if ((level == BEST || level == AVX512) && has512) return product_avx512;
    if ((level == BEST || level == AVX2) && has256) return product_avx2;
#elif defined(__aarch64__)
    if (level == BEST || level == NEON) return product_neon;
#endif
    return level == PORTABLE ? product_portable : NULL;
}

/* ---- a few threads that take blocks of rows ----
 *
 * `gate` says whether a product may be joined, and how many helpers are in it. The caller opens it, works, closes it
 * and waits only for those that came: a helper that wakes late finds it closed and costs nothing.
 */

static product_fn kernel;
static int helpers; /* threads beside the caller's */
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t wake = PTHREAD_COND_INITIALIZER;
static int asleep;
static atomic_uint round_number;
static atomic_uint gate;

static product_t job;
static atomic_ptrdiff_t next_row;

static void work(void) {
    product_t part = job;
    for (;;) {
        ptrdiff_t row = atomic_fetch_add_explicit(&next_row, BLOCK_ROWS, memory_order_relaxed);
        if (row >= job.rows) return;
        part.w = job.w + row * job.cols;
        part.y = job.y + row;
        part.rows = job.rows - row < BLOCK_ROWS ? job.rows - row : BLOCK_ROWS;
        kernel(&part);
    }
}

static void pause_cpu(void) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

static void join(void) {
    unsigned state = atomic_load(&gate);
    while (state & OPEN)
        if (atomic_compare_exchange_weak(&gate, &state, state + 1)) {
            work();
            atomic_fetch_sub(&gate, 1);
            return;
        }
}

static void *helper(void *unused) {
    (void)unused;
    unsigned seen = 0;
    for (;;) {
        for (int i = 0; i < SPINS && atomic_load(&round_number) == seen; i++) pause_cpu();
        if (atomic_load(&round_number) == seen) {
            pthread_mutex_lock(&lock);
            asleep++;
            while (atomic_load(&round_number) == seen) pthread_cond_wait(&wake, &lock);
            asleep--;
            pthread_mutex_unlock(&lock);
        }
        seen = atomic_load(&round_number);
        join();
    }
    return NULL;
}

/* y[vectors, rows] = x[vectors, cols] w[rows, cols]^T */
static void multiply(const half_t *w, const float *x, float *y, ptrdiff_t rows, ptrdiff_t cols, ptrdiff_t vectors) {
    job = (product_t){w, x, y, rows, cols, vectors, rows};
    atomic_store(&next_row, 0);
    if (!helpers || rows * cols < SMALL) {
        work();
        return;
    }
    atomic_store(&gate, OPEN);
    pthread_mutex_lock(&lock);
    atomic_fetch_add(&round_number, 1);
    if (asleep) pthread_cond_broadcast(&wake);
    pthread_mutex_unlock(&lock);
    work();
    atomic_fetch_and(&gate, ~OPEN);
    for (int i = 0; atomic_load(&gate); i++)
        if (i < SPINS) pause_cpu();
        else sched_yield();
}

/* ---- silu ---- */

/* e^x by 2^n e^r with |r| <= ln 2 / 2 and a polynomial whose next term is below 2e-7; no call, so that loops over it
 * become vector code. */
static inline float exp_of(float x) {
    x = x < -87.0f ? -87.0f : x > 88.0f ? 88.0f : x;
    float n = x * 1.44269504f + 12582912.0f - 12582912.0f; /* nearest integer: the sum has no room for a fraction */
    float r = x - n * 0.693145752f - n * 1.42860677e-6f;
    float e = 1 + r * (1 + r * (0.5f + r * (1 / 6.0f + r * (1 / 24.0f + r * (1 / 120.0f + r * (1 / 720.0f))))));
    int32_t bits = ((int32_t)n + 127) << 23;
    float power;
    memcpy(&power, &bits, 4);
    return e * power;
}

/* product[i] = silu(gate[i]) * up[i] */
static void silu_times(const float *restrict gate, const float *restrict up, float *restrict product, ptrdiff_t count) {
    for (ptrdiff_t i = 0; i < count; i++) product[i] = gate[i] / (1 + exp_of(-gate[i])) * up[i];
}

/* ---- what Python calls; callers of several threads take turns ---- */

static pthread_mutex_t turn = PTHREAD_MUTEX_INITIALIZER;

/* Choose the instruction set (-1: the best there is) and have `threads` in all; threads never end.
 * Returns 0, or -1 when the processor has not got the instruction set or a thread did not start. */
int edge_start(int level, int threads) {
    product_fn found = kernel_for(level);
    if (!found || threads < 1) return -1;
    int failed = 0;
    pthread_mutex_lock(&turn);
    kernel = found;
    while (!failed && helpers < (threads < MAX_THREADS ? threads : MAX_THREADS) - 1) {
        pthread_t thread;
        failed = pthread_create(&thread, NULL, helper, NULL);
        if (!failed) {
            pthread_detach(thread);
            helpers++;
        }
    }
    pthread_mutex_unlock(&turn);
    return failed ? -1 : 0;
}

/* y[vectors, rows] = x[vectors, cols] w[rows, cols]^T */
void edge_product(const half_t *w, const float *x, float *y, ptrdiff_t rows, ptrdiff_t cols, ptrdiff_t vectors) {
    pthread_mutex_lock(&turn);
    multiply(w, x, y, rows, cols, vectors);
    pthread_mutex_unlock(&turn);
}

/* For each of the vectors x[hidden]: y[hidden] = down[hidden, inner] (silu(gate x) * up x), where gate_up[2 inner, hidden]
 * holds gate, then up. scratch[3 inner] per vector. */
void edge_gated_mlp(const half_t *gate_up, const half_t *down, const float *x, float *scratch, float *y,
                    ptrdiff_t inner, ptrdiff_t hidden, ptrdiff_t vectors) {
    float *product = scratch + vectors * 2 * inner;
    pthread_mutex_lock(&turn);
    multiply(gate_up, x, scratch, 2 * inner, hidden, vectors);
    for (ptrdiff_t v = 0; v < vectors; v++) {
        const float *gate = scratch + v * 2 * inner, *up = gate + inner;
        silu_times(gate, up, product + v * inner, inner);
    }
    multiply(down, product, y, hidden, inner, vectors);
    pthread_mutex_unlock(&turn);
}
