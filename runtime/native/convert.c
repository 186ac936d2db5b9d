/* bf16 to fp16, rounding to nearest even, and whether every result is finite, in one pass: a checkpoint on its way into
 * a bundle is as many values as a disk can take, and general libraries make three passes of it. */
#include <stddef.h>
#include <stdint.h>

#if defined(__x86_64__)
#include <immintrin.h>

__attribute__((target("avx2,f16c"))) static ptrdiff_t convert(const uint16_t *from, uint16_t *to, ptrdiff_t count,
                                                              unsigned *largest) {
    __m128i most = _mm_setzero_si128(), magnitude = _mm_set1_epi16(0x7fff);
    ptrdiff_t whole = count & ~(ptrdiff_t)7;
    for (ptrdiff_t i = 0; i < whole; i += 8) {
        __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)(from + i)));
        __m256 values = _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
        __m128i halves = _mm256_cvtps_ph(values, _MM_FROUND_TO_NEAREST_INT);
        most = _mm_max_epu16(most, _mm_and_si128(halves, magnitude));
        _mm_storeu_si128((__m128i *)(to + i), halves);
    }
    uint16_t lanes[8];
    _mm_storeu_si128((__m128i *)lanes, most);
    for (int i = 0; i < 8; i++)
        if (lanes[i] > *largest) *largest = lanes[i];
    return whole;
}

static int usable(void) { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c"); }
#elif defined(__aarch64__)
#include <arm_neon.h>

static ptrdiff_t convert(const uint16_t *from, uint16_t *to, ptrdiff_t count, unsigned *largest) {
    uint16x4_t most = vdup_n_u16(0), magnitude = vdup_n_u16(0x7fff);
    ptrdiff_t whole = count & ~(ptrdiff_t)3;
    for (ptrdiff_t i = 0; i < whole; i += 4) {
        uint32x4_t wide = vshll_n_u16(vld1_u16(from + i), 16);
        uint16x4_t halves = vreinterpret_u16_f16(vcvt_f16_f32(vreinterpretq_f32_u32(wide)));
        most = vmax_u16(most, vand_u16(halves, magnitude));
        vst1_u16(to + i, halves);
    }
    unsigned found = vmaxv_u16(most);
    if (found > *largest) *largest = found;
    return whole;
}

static int usable(void) { return 1; }
#else
static ptrdiff_t convert(const uint16_t *from, uint16_t *to, ptrdiff_t count, unsigned *largest) {
    (void)from, (void)to, (void)count, (void)largest;
    return 0;
}

static int usable(void) { return 0; }
#endif

/* Returns 1 when all results are finite, 0 when one is not, -1 when this processor cannot do it. */
int edge_half_from_bf16(const uint16_t *from, uint16_t *to, ptrdiff_t count) {
    if (!usable()) return -1;
    unsigned largest = 0;
    ptrdiff_t whole = convert(from, to, count, &largest);
    if (whole < count) { /* the rest, once more through a full vector */
        uint16_t rest[8] = {0}, halves[8];
        for (ptrdiff_t i = whole; i < count; i++) rest[i - whole] = from[i];
        convert(rest, halves, 8, &largest);
        for (ptrdiff_t i = whole; i < count; i++) to[i] = halves[i - whole];
    }
    return largest < 0x7c00;
}
