/* After the specification of xxHash (doc/xxhash_spec.md of its repository), the part for large inputs. */
#include "xxh3.h"

#include "kernels.h"

#include <string.h>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

enum { STRIPE = 64, STRIPES = XXH3_BLOCK / STRIPE, STEP = 8 }; /* the key moves on by STEP bytes from stripe to stripe */
enum { AHEAD = 2048 }; /* bytes asked for in advance: the processor's own prefetch ends with every page of 4 KiB */
enum { SCRAMBLE_KEY = XXH3_SECRET - 64, LAST_STRIPE_KEY = SCRAMBLE_KEY - 7, MERGE_KEY = 11 };

static const uint64_t P32_1 = 0x9e3779b1, P32_2 = 0x85ebca77, P32_3 = 0xc2b2ae3d, P64_1 = 0x9e3779b185ebca87,
                      P64_2 = 0xc2b2ae3d27d4eb4f, P64_3 = 0x165667b19e3779f9, P64_4 = 0x85ebca77c2b2ae63,
                      P64_5 = 0x27d4eb2f165667c5, P_END = 0x165667919e3779f9;

static const uint64_t SECRET[XXH3_SECRET / 8] = {
    0xbe4ba423396cfeb8, 0x1cad21f72c81017c, 0xdb979083e96dd4de, 0x1f67b3b7a4a44072, 0x78e5c0cc4ee679cb,
    0x2172ffcc7dd05a82, 0x8e2443f7744608b8, 0x4c263a81e69035e0, 0xcb00c391bb52283c, 0xa32e531b8b65d088,
    0x4ef90da297486471, 0xd8acdea946ef1938, 0x3f349ce33f76faa8, 0x1d4f0bc7c7bbdcf9, 0x3159b4cd4be0518a,
    0x647378d9c97e9fc8, 0xc3ebd33483acc5ea, 0xeb6313faffa081c5, 0x49daf0b751dd0d17, 0x9e68d429265516d3,
    0xfca1477d58be162b, 0xce31d07ad1b8f88f, 0x280416958f3acb45, 0x7e404bbbcafbd7af};

static uint64_t word(const uint8_t *from) { /* the library is built for little-endian processors only */
    uint64_t value;
    memcpy(&value, from, 8);
    return value;
}

/* ---- what a block adds, by instruction set ---- */

static void add_stripe(const uint8_t *key, const uint8_t *data, uint64_t *sums) {
    for (int i = 0; i < XXH3_LANES; i++) {
        uint64_t value = word(data + 8 * i), keyed = value ^ word(key + 8 * i);
        sums[i ^ 1] += value;
        sums[i] += (keyed & 0xffffffff) * (keyed >> 32);
    }
}

#if defined(__x86_64__)
__attribute__((target("avx2"))) static void sums_avx2(const uint8_t *secret, const uint8_t *data, ptrdiff_t blocks,
                                                      uint64_t *sums) {
    for (; blocks; blocks--, data += XXH3_BLOCK, sums += XXH3_LANES)
        for (int half = 0; half < 2; half++) {
            __m256i products = _mm256_setzero_si256(), values = products;
            for (int s = 0; s < STRIPES; s++) {
                __builtin_prefetch(data + STRIPE * s + AHEAD);
                __m256i value = _mm256_loadu_si256((const __m256i *)(data + STRIPE * s) + half);
                __m256i key = _mm256_loadu_si256((const __m256i *)(secret + STEP * s) + half);
                key = _mm256_xor_si256(key, value);
                values = _mm256_add_epi64(values, value);
                products = _mm256_add_epi64(products, _mm256_mul_epu32(key, _mm256_srli_epi64(key, 32)));
            }
            values = _mm256_shuffle_epi32(values, _MM_SHUFFLE(1, 0, 3, 2));
            _mm256_storeu_si256((__m256i *)sums + half, _mm256_add_epi64(products, values));
        }
}

__attribute__((target("avx512f"))) static void sums_avx512(const uint8_t *secret, const uint8_t *data,
                                                           ptrdiff_t blocks, uint64_t *sums) {
    for (; blocks; blocks--, data += XXH3_BLOCK, sums += XXH3_LANES) {
        __m512i products = _mm512_setzero_si512(), values = products;
        for (int s = 0; s < STRIPES; s++) {
            __builtin_prefetch(data + STRIPE * s + AHEAD);
            __m512i value = _mm512_loadu_si512(data + STRIPE * s);
            __m512i key = _mm512_xor_si512(_mm512_loadu_si512(secret + STEP * s), value);
            values = _mm512_add_epi64(values, value);
            products = _mm512_add_epi64(products, _mm512_mul_epu32(key, _mm512_srli_epi64(key, 32)));
        }
        values = _mm512_shuffle_epi32(values, _MM_PERM_BADC);
        _mm512_storeu_si512(sums, _mm512_add_epi64(products, values));
    }
}
#elif defined(__aarch64__)
static void sums_neon(const uint8_t *secret, const uint8_t *data, ptrdiff_t blocks, uint64_t *sums) {
    for (; blocks; blocks--, data += XXH3_BLOCK, sums += XXH3_LANES)
        for (int i = 0; i < XXH3_LANES; i += 2) {
            uint64x2_t products = vdupq_n_u64(0), values = products;
            for (int s = 0; s < STRIPES; s++) {
                __builtin_prefetch(data + STRIPE * s + AHEAD);
                uint64x2_t value = vreinterpretq_u64_u8(vld1q_u8(data + STRIPE * s + 8 * i));
                uint64x2_t key = veorq_u64(vreinterpretq_u64_u8(vld1q_u8(secret + STEP * s + 8 * i)), value);
                values = vaddq_u64(values, value);
                products = vmlal_u32(products, vmovn_u64(key), vshrn_n_u64(key, 32));
            }
            vst1q_u64(sums + i, vaddq_u64(products, vextq_u64(values, values, 1)));
        }
}
#endif

static void sums_portable(const uint8_t *secret, const uint8_t *data, ptrdiff_t blocks, uint64_t *sums) {
    for (; blocks; blocks--, data += XXH3_BLOCK, sums += XXH3_LANES) {
        memset(sums, 0, XXH3_LANES * sizeof *sums);
        for (int s = 0; s < STRIPES; s++) add_stripe(secret + STEP * s, data + STRIPE * s, sums);
    }
}

static xxh3_sums_t *choose(int level) {
#if defined(__x86_64__)
    if ((level == AVX512 || level == BEST) && __builtin_cpu_supports("avx512f")) return sums_avx512;
    if ((level == AVX2 || level == BEST) && __builtin_cpu_supports("avx2")) return sums_avx2;
#elif defined(__aarch64__)
    if (level == NEON || level == BEST) return sums_neon;
#endif
    return level == PORTABLE || level == BEST ? sums_portable : NULL;
}

/* ---- the whole ---- */

int edge_xxh3_begin(xxh3_t *hash, uint64_t seed, int level) {
    const uint64_t start[XXH3_LANES] = {P32_3, P64_1, P64_2, P64_3, P64_4, P32_2, P64_5, P32_1};
    for (int i = 0; i < XXH3_SECRET / 8; i++) {
        uint64_t key = i % 2 ? SECRET[i] - seed : SECRET[i] + seed;
        memcpy(hash->secret + 8 * i, &key, 8);
    }
    memcpy(hash->lanes, start, sizeof start);
    hash->length = 0;
    hash->add_up = choose(level);
    return hash->add_up ? 0 : -1;
}

void edge_xxh3_fold(xxh3_t *hash, const uint64_t *sums, ptrdiff_t blocks) {
    hash->length += (uint64_t)blocks * XXH3_BLOCK;
    for (; blocks; blocks--, sums += XXH3_LANES)
        for (int i = 0; i < XXH3_LANES; i++) {
            uint64_t lane = hash->lanes[i] + sums[i];
            hash->lanes[i] = (lane ^ lane >> 47 ^ word(hash->secret + SCRAMBLE_KEY + 8 * i)) * P32_1;
        }
}

static uint64_t folded_product(uint64_t a, uint64_t b) {
    unsigned __int128 product = (unsigned __int128)a * b;
    return (uint64_t)product ^ (uint64_t)(product >> 64);
}

uint64_t edge_xxh3_end(xxh3_t *hash, const uint8_t *last_block) {
    for (int s = 0; s < STRIPES - 1; s++) add_stripe(hash->secret + STEP * s, last_block + STRIPE * s, hash->lanes);
    add_stripe(hash->secret + LAST_STRIPE_KEY, last_block + XXH3_BLOCK - STRIPE, hash->lanes);
    uint64_t result = (hash->length + XXH3_BLOCK) * P64_1;
    for (int i = 0; i < XXH3_LANES; i += 2) {
        const uint8_t *key = hash->secret + MERGE_KEY + 8 * i;
        result += folded_product(hash->lanes[i] ^ word(key), hash->lanes[i + 1] ^ word(key + 8));
    }
    result = (result ^ result >> 37) * P_END;
    return result ^ result >> 32;
}

/* For tests: `bytes` are whole blocks, at most `MOST` of them at a time. Returns 0, or -1 without that instruction set. */
int edge_xxh3(const uint8_t *data, ptrdiff_t bytes, uint64_t seed, int level, uint64_t *result) {
    enum { MOST = 7 };
    uint64_t sums[MOST * XXH3_LANES];
    xxh3_t hash;
    if (edge_xxh3_begin(&hash, seed, level)) return -1;
    ptrdiff_t blocks = bytes / XXH3_BLOCK - 1;
    for (ptrdiff_t done = 0, n; done < blocks; done += n) {
        n = blocks - done < MOST ? blocks - done : MOST;
        hash.add_up(hash.secret, data + done * XXH3_BLOCK, n, sums);
        edge_xxh3_fold(&hash, sums, n);
    }
    *result = edge_xxh3_end(&hash, data + blocks * XXH3_BLOCK);
    return 0;
}
