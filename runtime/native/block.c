/* The dense block of one token: norm, grouped-query attention over the cache, residual, norm. One call instead of some
 * thirty small operations of a general library, which together take as long as a third of the products.
 *
 * Everything is fp32 but the weights, the cache and h, which are fp16. A row of the cache is looked at in chunks of fixed
 * size, whatever the threads, and what they give is put together in their order: the bits depend on nothing else.
 */
#include "kernels.h"

enum { CHUNK = 128, HEAD_PARTS = 4, FEW_VALUES = 1 << 15 };

/* One layer. q_norm, k_norm, qkv_bias and o_bias are NULL where the model has none; `clip` is infinite where it has none.
 * `norm_whole`: q and k are normed as a whole, not per head. */
typedef struct {
    const float *attn_norm, *ffn_norm, *q_norm, *k_norm, *qkv_bias, *o_bias;
    const half_t *qkv, *o;
    int64_t hidden, heads, kv_heads, head_size, value_size, norm_whole;
    float norm_eps, clip, scale, residual_scale;
} block_t;

/* One call: x [hidden] at `position`, cos and sin [head_size] of it, the layer's rows of the cache [.., kv_heads, size];
 * results out [hidden] and h [hidden]. */
typedef struct {
    const float *x, *cos, *sin;
    half_t *keys, *values;
    int64_t position;
    float *scratch, *out;
    half_t *h;
} step_t;

typedef struct {
    const block_t *b;
    const step_t *s;
    const float *q;  /* [heads, head_size], scaled */
    float *scores;   /* [chunks, heads, CHUNK] */
    float *mixed;    /* [chunks, heads, value_size], not yet divided by the sum of the weights */
    float *extremes; /* [chunks, heads, 2]: largest score, and the sum of the weights relative to it */
    float *attended; /* [heads, value_size] */
    ptrdiff_t chunks, head_parts;
} attention_t;

static ptrdiff_t chunks_of(int64_t position) { return (position + CHUNK) / CHUNK; }

/* Floats of scratch that a step at `position` needs. */
ptrdiff_t edge_block_scratch(const block_t *b, int64_t position) {
    ptrdiff_t q_size = b->heads * b->head_size, k_size = b->kv_heads * b->head_size;
    ptrdiff_t one = 2 * b->hidden + q_size + k_size + b->kv_heads * b->value_size + b->heads * b->value_size;
    return one + chunks_of(position) * b->heads * (CHUNK + b->value_size + 2);
}

static void rms_norm(const float *x, const float *weight, float eps, float *y, ptrdiff_t count) {
    float lanes[16] = {0}, sum = 0;
    ptrdiff_t i = 0;
    for (; i + 16 <= count; i += 16)
        for (int j = 0; j < 16; j++) lanes[j] += x[i + j] * x[i + j];
    for (; i < count; i++) sum += x[i] * x[i];
    for (int j = 0; j < 16; j++) sum += lanes[j];
    float factor = 1 / __builtin_sqrtf(sum / (float)count + eps);
    for (i = 0; i < count; i++) y[i] = x[i] * factor * weight[i];
}

static void add_bias(float *x, const float *bias, ptrdiff_t count) {
    if (bias)
        for (ptrdiff_t i = 0; i < count; i++) x[i] += bias[i];
}

static void clip_values(float *x, float limit, ptrdiff_t count) {
    if (limit < __builtin_inff())
        for (ptrdiff_t i = 0; i < count; i++) x[i] = x[i] < -limit ? -limit : x[i] > limit ? limit : x[i];
}

/* Value i of a head turns with value i + size / 2. */
static void rotate(float *x, const float *cos, const float *sin, ptrdiff_t heads, ptrdiff_t size) {
    ptrdiff_t half = size / 2;
    for (float *end = x + heads * size; x < end; x += size)
        for (ptrdiff_t i = 0; i < half; i++) {
            float first = x[i], second = x[i + half];
            x[i] = first * cos[i] - second * sin[i];
            x[i + half] = second * cos[i + half] + first * sin[i + half];
        }
}

static void norm_heads(float *x, const float *weight, const block_t *b, ptrdiff_t heads) {
    if (!weight) return;
    ptrdiff_t size = b->norm_whole ? heads * b->head_size : b->head_size;
    for (ptrdiff_t i = 0; i < heads * b->head_size; i += size) rms_norm(x + i, weight, b->norm_eps, x + i, size);
}

/* Scores to weights relative to the largest: largest[0] and their sum in largest[1]. */
static void weigh(float *scores, ptrdiff_t count, float *largest) {
    float top = scores[0], lanes[8] = {0}, sum = 0;
    for (ptrdiff_t i = 1; i < count; i++) top = scores[i] > top ? scores[i] : top;
    for (ptrdiff_t i = 0; i < count; i++) scores[i] = edge_exp(scores[i] - top);
    ptrdiff_t i = 0;
    for (; i + 8 <= count; i += 8)
        for (int j = 0; j < 8; j++) lanes[j] += scores[i + j];
    for (; i < count; i++) sum += scores[i];
    for (int j = 0; j < 8; j++) sum += lanes[j];
    largest[0] = top, largest[1] = sum;
}

/* The query heads of one key head over one chunk of the cache. */
static void attend_chunk(const attention_t *a, ptrdiff_t chunk, ptrdiff_t kv_head) {
    const block_t *b = a->b;
    ptrdiff_t group = b->heads / b->kv_heads, first = chunk * CHUNK, left = a->s->position + 1 - first;
    ptrdiff_t rows = left < CHUNK ? left : CHUNK, place = chunk * b->heads + kv_head * group;
    float *scores = a->scores + place * CHUNK;
    product_t p = {a->s->keys + (first * b->kv_heads + kv_head) * b->head_size, a->q + kv_head * group * b->head_size,
                   scores, rows, b->head_size, group, b->kv_heads * b->head_size, b->head_size, CHUNK};
    edge_kernels.product(&p);
    for (ptrdiff_t v = 0; v < group; v++) weigh(scores + v * CHUNK, rows, a->extremes + 2 * (place + v));
    mixture_t m = {a->s->values + (first * b->kv_heads + kv_head) * b->value_size, scores, a->mixed + place * b->value_size,
                   rows, b->value_size, group, b->kv_heads * b->value_size, CHUNK, b->value_size};
    edge_kernels.mix(&m);
}

static void attend_pieces(const void *job, ptrdiff_t begin, ptrdiff_t end) {
    const attention_t *a = job;
    for (ptrdiff_t i = begin; i < end; i++) {
        ptrdiff_t part = i % a->head_parts, heads = a->b->kv_heads;
        for (ptrdiff_t g = part * heads / a->head_parts; g < (part + 1) * heads / a->head_parts; g++)
            attend_chunk(a, i / a->head_parts, g);
    }
}

/* What the chunks gave, put together for some heads. */
static void join_chunks(const void *job, ptrdiff_t begin, ptrdiff_t end) {
    const attention_t *a = job;
    ptrdiff_t heads = a->b->heads, size = a->b->value_size;
    for (ptrdiff_t head = begin; head < end; head++) {
        const float *extremes = a->extremes + 2 * head, *mixed = a->mixed + head * size;
        float *y = a->attended + head * size, top = extremes[0], sum = 0;
        for (ptrdiff_t c = 1; c < a->chunks; c++) top = extremes[2 * c * heads] > top ? extremes[2 * c * heads] : top;
        for (ptrdiff_t i = 0; i < size; i++) y[i] = 0;
        for (ptrdiff_t c = 0; c < a->chunks; c++) {
            float share = edge_exp(extremes[2 * c * heads] - top);
            sum += share * extremes[2 * c * heads + 1];
            for (ptrdiff_t i = 0; i < size; i++) y[i] += share * mixed[c * heads * size + i];
        }
        for (ptrdiff_t i = 0; i < size; i++) y[i] /= sum;
    }
}

static void attend(attention_t *a) {
    const block_t *b = a->b;
    ptrdiff_t pieces = a->chunks * a->head_parts;
    int64_t values = (a->s->position + 1) * b->kv_heads * (b->head_size + b->value_size);
    edge_share(attend_pieces, a, pieces, values < FEW_VALUES ? pieces : 1);
    edge_share(join_chunks, a, b->heads, a->chunks < HEAD_PARTS ? b->heads : 1 + (b->heads - 1) / HEAD_PARTS);
}

/* q, k and v of x into `qkv`, q scaled; k and v into the cache. */
static void project(const block_t *b, const step_t *s, float *normed, float *qkv) {
    ptrdiff_t q_size = b->heads * b->head_size, k_size = b->kv_heads * b->head_size;
    ptrdiff_t v_size = b->kv_heads * b->value_size;
    float *q = qkv, *k = q + q_size, *v = k + k_size;
    rms_norm(s->x, b->attn_norm, b->norm_eps, normed, b->hidden);
    edge_multiply(b->qkv, normed, qkv, q_size + k_size + v_size, b->hidden, 1);
    add_bias(qkv, b->qkv_bias, q_size + k_size + v_size);
    if (b->norm_whole) norm_heads(q, b->q_norm, b, b->heads), norm_heads(k, b->k_norm, b, b->kv_heads);
    clip_values(qkv, b->clip, q_size + k_size + v_size);
    if (!b->norm_whole) norm_heads(q, b->q_norm, b, b->heads), norm_heads(k, b->k_norm, b, b->kv_heads);
    rotate(q, s->cos, s->sin, b->heads, b->head_size);
    rotate(k, s->cos, s->sin, b->kv_heads, b->head_size);
    for (ptrdiff_t i = 0; i < q_size; i++) q[i] *= b->scale;
    edge_kernels.to_half(k, s->keys + s->position * k_size, k_size);
    edge_kernels.to_half(v, s->values + s->position * v_size, v_size);
}

/* out = x + residual_scale * attention(norm(x)), h = norm(out). Rows of the cache below `position` are valid; this one
 * is written. */
void edge_block(const block_t *b, const step_t *s) {
    ptrdiff_t qkv_size = (b->heads + b->kv_heads) * b->head_size + b->kv_heads * b->value_size;
    ptrdiff_t mixed_size = b->heads * b->value_size, chunks = chunks_of(s->position);
    float *normed = s->scratch, *added = normed + b->hidden, *qkv = added + b->hidden;
    attention_t a = {.b = b, .s = s, .q = qkv, .chunks = chunks};
    a.head_parts = b->kv_heads < HEAD_PARTS ? b->kv_heads : HEAD_PARTS;
    a.attended = qkv + qkv_size;
    a.scores = a.attended + mixed_size;
    a.mixed = a.scores + chunks * b->heads * CHUNK;
    a.extremes = a.mixed + chunks * mixed_size;
    edge_take_turn();
    project(b, s, normed, qkv);
    attend(&a);
    edge_multiply(b->o, a.attended, added, b->hidden, mixed_size, 1);
    edge_end_turn();
    add_bias(added, b->o_bias, b->hidden);
    for (ptrdiff_t i = 0; i < b->hidden; i++) s->out[i] = s->x[i] + b->residual_scale * added[i];
    rms_norm(s->out, b->ffn_norm, b->norm_eps, normed, b->hidden);
    edge_kernels.to_half(normed, s->h, b->hidden);
}
