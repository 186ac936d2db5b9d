/* Matrix times one vector, fp16 weights, fp32 vectors, at the speed of memory.
 *
 * Decoding one token is nothing but such products, and a general library converts fp16 slowly when there is only one
 * column. Rows are handed out in small blocks to a few threads; every row is summed by one thread in one order, so the
 * result does not depend on how many threads there are or which of them was late.
 */
#include <math.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

typedef uint16_t half_t;
typedef void (*rows_fn)(const half_t *w, const float *x, float *y, ptrdiff_t rows, ptrdiff_t cols);

enum { BLOCK_ROWS = 16, MAX_THREADS = 64, SPINS = 2000, SMALL = 1 << 15 };
#define OPEN 0x80000000u
enum { PORTABLE = 0, AVX2 = 1, AVX512 = 2, NEON = 3, BEST = -1 };

/* ---- dot products, four rows at a time, per instruction set ---- */

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

static void rows_portable(const half_t *w, const float *x, float *y, ptrdiff_t rows, ptrdiff_t cols) {
    for (ptrdiff_t r = 0; r < rows; r++) {
        float sum = 0;
        for (ptrdiff_t c = 0; c < cols; c++) sum += half_to_float(w[r * cols + c]) * x[c];
        y[r] = sum;
    }
}

/* Each instruction set has one body for `count` rows at a time; a constant count lets the compiler unroll it. */
#define BODY static inline __attribute__((always_inline))

#if defined(__x86_64__)
#include <immintrin.h>
#define WITH_AVX2 __attribute__((target("avx2,fma,f16c")))
#define WITH_AVX512 __attribute__((target("avx512f,avx512bw,avx512vl")))

WITH_AVX2 BODY float sum8(__m256 v) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_shuffle_ps(s, s, 1)));
}

WITH_AVX2 BODY void body_avx2(const half_t *w, const float *x, float *y, ptrdiff_t cols, const int count) {
    __m256 sums[4] = {_mm256_setzero_ps(), _mm256_setzero_ps(), _mm256_setzero_ps(), _mm256_setzero_ps()};
    ptrdiff_t whole = cols & ~(ptrdiff_t)7;
    for (ptrdiff_t c = 0; c < whole; c += 8) {
        __m256 v = _mm256_loadu_ps(x + c);
        for (int i = 0; i < count; i++)
            sums[i] = _mm256_fmadd_ps(_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(w + i * cols + c))), v, sums[i]);
    }
    for (int i = 0; i < count; i++) {
        y[i] = sum8(sums[i]);
        for (ptrdiff_t c = whole; c < cols; c++) y[i] += half_to_float(w[i * cols + c]) * x[c];
    }
}

WITH_AVX2 static void rows_avx2(const half_t *w, const float *x, float *y, ptrdiff_t rows, ptrdiff_t cols) {
    ptrdiff_t r = 0;
    for (; r + 4 <= rows; r += 4) body_avx2(w + r * cols, x, y + r, cols, 4);
    for (; r < rows; r++) body_avx2(w + r * cols, x, y + r, cols, 1);
}

WITH_AVX512 BODY void body_avx512(const half_t *w, const float *x, float *y, ptrdiff_t cols, const int count) {
    __m512 sums[4] = {_mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps()};
    ptrdiff_t whole = cols & ~(ptrdiff_t)15;
    for (ptrdiff_t c = 0; c < whole; c += 16) {
        __m512 v = _mm512_loadu_ps(x + c);
        for (int i = 0; i < count; i++) {
            __m256i halves = _mm256_loadu_si256((const __m256i *)(w + i * cols + c));
            sums[i] = _mm512_fmadd_ps(_mm512_cvtph_ps(halves), v, sums[i]);
        }
    }
    if (whole < cols) {
        __mmask16 mask = (__mmask16)((1u << (cols - whole)) - 1);
        __m512 v = _mm512_maskz_loadu_ps(mask, x + whole);
        for (int i = 0; i < count; i++) {
            __m256i halves = _mm256_maskz_loadu_epi16(mask, w + i * cols + whole);
            sums[i] = _mm512_fmadd_ps(_mm512_cvtph_ps(halves), v, sums[i]);
        }
    }
    for (int i = 0; i < count; i++) y[i] = _mm512_reduce_add_ps(sums[i]);
}

WITH_AVX512 static void rows_avx512(const half_t *w, const float *x, float *y, ptrdiff_t rows, ptrdiff_t cols) {
    ptrdiff_t r = 0;
    for (; r + 4 <= rows; r += 4) body_avx512(w + r * cols, x, y + r, cols, 4);
    for (; r < rows; r++) body_avx512(w + r * cols, x, y + r, cols, 1);
}
#elif defined(__aarch64__)
#include <arm_neon.h>

BODY void body_neon(const half_t *w, const float *x, float *y, ptrdiff_t cols, const int count) {
    float32x4_t low[4], high[4];
    ptrdiff_t whole = cols & ~(ptrdiff_t)7;
    for (int i = 0; i < count; i++) low[i] = high[i] = vdupq_n_f32(0);
    for (ptrdiff_t c = 0; c < whole; c += 8) {
        float32x4_t v0 = vld1q_f32(x + c), v1 = vld1q_f32(x + c + 4);
        for (int i = 0; i < count; i++) {
            float16x8_t m = vreinterpretq_f16_u16(vld1q_u16(w + i * cols + c));
            low[i] = vfmaq_f32(low[i], vcvt_f32_f16(vget_low_f16(m)), v0);
            high[i] = vfmaq_f32(high[i], vcvt_f32_f16(vget_high_f16(m)), v1);
        }
    }
    for (int i = 0; i < count; i++) {
        y[i] = vaddvq_f32(vaddq_f32(low[i], high[i]));
        for (ptrdiff_t c = whole; c < cols; c++) y[i] += half_to_float(w[i * cols + c]) * x[c];
    }
}

static void rows_neon(const half_t *w, const float *x, float *y, ptrdiff_t rows, ptrdiff_t cols) {
    ptrdiff_t r = 0;
    for (; r + 4 <= rows; r += 4) body_neon(w + r * cols, x, y + r, cols, 4);
    for (; r < rows; r++) body_neon(w + r * cols, x, y + r, cols, 1);
}
#endif

static rows_fn kernel_for(int level) {
#if defined(__x86_64__)
    int has512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                 __builtin_cpu_supports("avx512vl");
    int has256 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    if ((level == BEST || level == AVX512) && has512) return rows_avx512;
    if ((level == BEST || level == AVX2) && has256) return rows_avx2;
#elif defined(__aarch64__)
    if (level == BEST || level == NEON) return rows_neon;
#endif
    return level == PORTABLE ? rows_portable : NULL;
}

/* ---- a few threads that take blocks of rows ----
 *
 * `gate` says whether a product may be joined, and how many helpers are in it. The caller opens it, works, closes it
 * and waits only for those that came: a helper that wakes late finds it closed and costs nothing.
 */

static rows_fn kernel;
static int helpers; /* threads beside the caller's */
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t wake = PTHREAD_COND_INITIALIZER;
static int asleep;
static atomic_uint round_number;
static atomic_uint gate;

static struct {
    const half_t *w;
    const float *x;
    float *y;
    ptrdiff_t rows, cols;
    atomic_ptrdiff_t next;
} job;

static void work(void) {
    for (;;) {
        ptrdiff_t row = atomic_fetch_add_explicit(&job.next, BLOCK_ROWS, memory_order_relaxed);
        if (row >= job.rows) return;
        ptrdiff_t count = job.rows - row < BLOCK_ROWS ? job.rows - row : BLOCK_ROWS;
        kernel(job.w + row * job.cols, job.x, job.y + row, count, job.cols);
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

static void multiply(const half_t *w, const float *x, float *y, ptrdiff_t rows, ptrdiff_t cols) {
    job.w = w, job.x = x, job.y = y, job.rows = rows, job.cols = cols;
    atomic_store(&job.next, 0);
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

/* ---- what Python calls; callers of several threads take turns ---- */

static pthread_mutex_t turn = PTHREAD_MUTEX_INITIALIZER;

/* Choose the instruction set (-1: the best there is) and have `threads` in all; threads never end.
 * Returns 0, or -1 when the processor has not got the instruction set or a thread did not start. */
int edge_gemv_start(int level, int threads) {
    rows_fn found = kernel_for(level);
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

/* y[rows] = w[rows, cols] x[cols] */
void edge_gemv(const half_t *w, const float *x, float *y, ptrdiff_t rows, ptrdiff_t cols) {
    pthread_mutex_lock(&turn);
    multiply(w, x, y, rows, cols);
    pthread_mutex_unlock(&turn);
}

/* y[hidden] = down[hidden, inner] (silu(gate x) * up x), gate_up[2 inner, hidden]; scratch[2 inner] */
void edge_gated_mlp(const half_t *gate_up, const half_t *down, const float *x, float *scratch, float *y,
                    ptrdiff_t inner, ptrdiff_t hidden) {
    pthread_mutex_lock(&turn);
    multiply(gate_up, x, scratch, 2 * inner, hidden);
    for (ptrdiff_t i = 0; i < inner; i++) scratch[i] = scratch[i] / (1 + expf(-scratch[i])) * scratch[inner + i];
    multiply(down, scratch, y, hidden, inner);
    pthread_mutex_unlock(&turn);
}
