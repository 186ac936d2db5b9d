/* XXH3, 64 bits, of data in whole blocks of 1,024 bytes, in two steps: what a block adds does not depend on the blocks
 * before it, so pieces are added up by whichever thread has them in its cache, in any order; folding the sums into the
 * state goes from the first block to the last and is some fifty times less work. */
#pragma once
#include <stddef.h>
#include <stdint.h>

enum { XXH3_BLOCK = 1024, XXH3_LANES = 8, XXH3_SECRET = 192 };

/* sums[8 * i ...] = what block i of `data` adds. The last block of all is none of these. */
typedef void xxh3_sums_t(const uint8_t *secret, const uint8_t *data, ptrdiff_t blocks, uint64_t *sums);

typedef struct {
    uint8_t secret[XXH3_SECRET];
    uint64_t lanes[XXH3_LANES];
    uint64_t length;
    xxh3_sums_t *add_up;
} xxh3_t;

#pragma GCC visibility push(hidden)
/* `level` as in kernels.h. Returns 0, or -1 where this processor does not have it. */
int edge_xxh3_begin(xxh3_t *hash, uint64_t seed, int level);
void edge_xxh3_fold(xxh3_t *hash, const uint64_t *sums, ptrdiff_t blocks);
uint64_t edge_xxh3_end(xxh3_t *hash, const uint8_t *last_block);
#pragma GCC visibility pop
