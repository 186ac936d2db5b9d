/* Reads blobs in chunks straight into memory, with threads that never wait for Python.
 *
 * A thread that has read a chunk adds up its blocks for the checksum while they are near; the blob's checksum takes
 * the chunks in order. A blob that fails to read or to match is read once more. Who settles the last chunk ends it.
 */
#define _GNU_SOURCE
#include "reader.h"

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "kernels.h"
#include "xxh3.h"

enum { PAGE = 4096, MAX_STALLS = 8, STACK_BYTES = 256 << 10, SECOND_NS = 1000000000 };

typedef struct load {
    struct load *next;  /* in one of three lists: to be read, ended, spare */
    struct load *older; /* of all there are */
    reader_result_t result;
    int64_t file, seed, checksum;
    uint8_t *to;
    uint64_t *sums;                    /* of every block, from the first chunk to the last */
    int64_t taken, settled, folded;    /* chunks */
    int64_t retried, cancelled;
    xxh3_t hash;
    uint8_t landed[];
} load_t;

typedef struct {
    load_t *first, **end;
} list_t;

typedef struct {
    reader_setup_t setup;
    int64_t *edges;
    pthread_mutex_t lock; /* of everything below */
    pthread_cond_t work, ended, left;
    list_t queue, results, spare;
    load_t *newest;
    uint64_t *sums, **rooms; /* rooms for sums that no blob uses: blobs being read are at most one per thread and one */
    int64_t free_rooms, threads, idle, stop, abandoned;
    int64_t in_flight, busy_since_ns, busy_ns, retries;
} reader_t;

static int64_t now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * (int64_t)SECOND_NS + t.tv_nsec;
}

static void append(list_t *list, load_t *load) {
    load->next = NULL;
    *list->end = load;
    list->end = &load->next;
}

static load_t *take_first(list_t *list) {
    load_t *load = list->first;
    if (load && !(list->first = load->next)) list->end = &list->first;
    return load;
}

/* ---- one chunk ---- */

static int64_t read_file(const reader_t *r, int64_t file, void *to, int64_t bytes, int64_t offset) {
    if (r->setup.read) return r->setup.read(file, to, bytes, offset);
    ssize_t count;
    do count = pread((int)file, to, (size_t)bytes, offset);
    while (count < 0 && errno == EINTR);
    if (count < 0) return -errno;
    if (!r->setup.direct) posix_fadvise((int)file, offset, count, POSIX_FADV_DONTNEED);
    return count;
}

/* Bytes `begin` to `end` of a blob, going on after short reads; what went wrong goes into `problem`. */
static void read_chunk(const reader_t *r, const load_t *load, int64_t begin, int64_t end, reader_result_t *problem) {
    int64_t stalls = 0;
    if (__atomic_load_n(&load->cancelled, __ATOMIC_RELAXED)) problem->problem = READ_CANCELLED;
    if (problem->problem) return;
    while (begin < end && !__atomic_load_n(&r->stop, __ATOMIC_RELAXED)) {
        int64_t count = read_file(r, load->file, load->to + begin, end - begin, begin);
        problem->offset = begin;
        if (count < 0) problem->problem = READ_ERROR, problem->error = -count;
        else if (count == 0) problem->problem = READ_ENDED;
        if (count <= 0) return;
        if (r->setup.direct && begin + count < end) count -= count % PAGE; /* O_DIRECT goes on from whole pages only */
        stalls = count ? 0 : stalls + 1;
        if (stalls > MAX_STALLS) {
            problem->problem = READ_STALLED;
            return;
        }
        begin += count;
    }
}

/* Blocks of chunk `index` that are added up; the blob's last block is not. */
static int64_t blocks_of(const reader_t *r, int64_t index) {
    return (r->edges[index + 1] - r->edges[index]) / XXH3_BLOCK - (index + 1 == r->setup.chunks);
}

static uint64_t *sums_of(const reader_t *r, const load_t *load, int64_t index) {
    return load->sums + r->edges[index] / XXH3_BLOCK * XXH3_LANES;
}

/* ---- a blob from chunk to chunk; the lock is held ---- */

static void begin_reading(load_t *load, int64_t chunks) {
    load->taken = load->settled = load->folded = 0;
    load->result.problem = load->result.error = load->result.offset = load->result.bytes = 0;
    memset(load->landed, 0, (size_t)chunks);
    edge_xxh3_begin(&load->hash, (uint64_t)load->seed, BEST);
}

static void enqueue(reader_t *r, load_t *load) {
    append(&r->queue, load);
    if (r->idle) pthread_cond_signal(&r->work);
}

static void finish(reader_t *r, load_t *load) {
    reader_result_t *result = &load->result;
    if (!result->problem) {
        uint64_t digest = edge_xxh3_end(&load->hash, load->to + r->setup.blob_bytes - XXH3_BLOCK);
        if (digest != (uint64_t)load->checksum) result->problem = READ_DIFFERS;
    }
    r->rooms[r->free_rooms++] = load->sums;
    if (result->problem && !load->retried && !load->cancelled) {
        load->retried = 1;
        r->retries++;
        begin_reading(load, r->setup.chunks);
        enqueue(r, load);
        return;
    }
    result->finished_ns = now();
    if (--r->in_flight == 0) r->busy_ns += result->finished_ns - r->busy_since_ns;
    append(&r->results, load);
    pthread_cond_signal(&r->ended);
}

static void settle(reader_t *r, load_t *load, int64_t index, const reader_result_t *problem) {
    if (problem->problem && !load->result.problem) {
        load->result.problem = problem->problem;
        load->result.error = problem->error;
        load->result.offset = problem->offset;
    }
    load->landed[index] = !problem->problem;
    if (!problem->problem) load->result.bytes += r->edges[index + 1] - r->edges[index];
    for (; load->folded < r->setup.chunks && load->landed[load->folded]; load->folded++)
        edge_xxh3_fold(&load->hash, sums_of(r, load, load->folded), blocks_of(r, load->folded));
    if (++load->settled == r->setup.chunks) finish(r, load);
}

/* The next chunk in order, or -1 where there is nothing to read. */
static int64_t take_chunk(reader_t *r, load_t **load) {
    *load = r->queue.first;
    if (!*load) return -1;
    int64_t index = (*load)->taken++;
    if (!index) (*load)->sums = r->rooms[--r->free_rooms];
    if (!index && !(*load)->result.started_ns) (*load)->result.started_ns = now();
    if ((*load)->taken == r->setup.chunks) take_first(&r->queue);
    if (r->queue.first && r->idle) pthread_cond_signal(&r->work); /* each wakes the next: the submitter wakes but one */
    return index;
}

static void release(reader_t *r) {
    for (load_t *load; (load = r->newest); free(load)) r->newest = load->older;
    free(r->sums);
    free(r->rooms);
    free(r->edges);
    pthread_mutex_destroy(&r->lock);
    pthread_cond_destroy(&r->work);
    pthread_cond_destroy(&r->ended);
    pthread_cond_destroy(&r->left);
    free(r);
}

static void *work(void *argument) {
    reader_t *r = argument;
    edge_short_slice(); /* a reader has microseconds to do: it need not wait until arithmetic's turn is over */
    pthread_mutex_lock(&r->lock);
    while (!r->stop) {
        load_t *load;
        int64_t index = take_chunk(r, &load);
        if (index < 0) {
            r->idle++;
            pthread_cond_wait(&r->work, &r->lock);
            r->idle--;
            continue;
        }
        pthread_mutex_unlock(&r->lock);
        reader_result_t problem = {0};
        read_chunk(r, load, r->edges[index], r->edges[index + 1], &problem);
        if (!problem.problem && !__atomic_load_n(&r->stop, __ATOMIC_RELAXED))
            load->hash.add_up(load->hash.secret, load->to + r->edges[index], blocks_of(r, index),
                              sums_of(r, load, index));
        pthread_mutex_lock(&r->lock);
        if (!r->stop) settle(r, load, index, &problem);
    }
    int last = --r->threads == 0 && r->abandoned;
    pthread_cond_signal(&r->left);
    pthread_mutex_unlock(&r->lock);
    if (last) release(r);
    return NULL;
}

/* ---- what Python calls ---- */

static int64_t copy_setup(reader_t *r, const reader_setup_t *setup) {
    size_t edges = (size_t)(setup->chunks + 1) * sizeof *r->edges;
    int64_t room = setup->blob_bytes / XXH3_BLOCK * XXH3_LANES, rooms = setup->threads + 1;
    r->setup = *setup;
    r->edges = malloc(edges);
    r->rooms = malloc((size_t)rooms * sizeof *r->rooms);
    r->sums = malloc((size_t)(rooms * room) * sizeof *r->sums);
    if (!r->edges || !r->rooms || !r->sums) return -1;
    memcpy(r->edges, setup->edges, edges);
    for (; r->free_rooms < rooms; r->free_rooms++) r->rooms[r->free_rooms] = r->sums + r->free_rooms * room;
    return 0;
}

static void start_threads(reader_t *r) {
    pthread_attr_t attributes;
    sigset_t all, before;
    sigfillset(&all);
    pthread_attr_init(&attributes);
    pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
    pthread_attr_setstacksize(&attributes, STACK_BYTES);
    pthread_sigmask(SIG_SETMASK, &all, &before); /* Ctrl-C is for Python's thread */
    for (pthread_t thread; r->threads < r->setup.threads; r->threads++)
        if (pthread_create(&thread, &attributes, work, r)) break;
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    pthread_attr_destroy(&attributes);
}

/* Wait until `condition` is signalled; 0 when it was, 1 after `until`. */
static int wait_until(pthread_cond_t *condition, pthread_mutex_t *lock, int64_t until) {
    struct timespec t = {.tv_sec = until / SECOND_NS, .tv_nsec = until % SECOND_NS};
    return pthread_cond_timedwait(condition, lock, &t) == ETIMEDOUT;
}

/* Tell the threads to end and wait for them at most `timeout_ns`. Returns how many are still inside a read: while one
 * is, memory that was submitted may still be written to. The last one out frees the reader. */
int64_t edge_reader_stop(reader_t *r, int64_t timeout_ns) {
    int64_t until = now() + timeout_ns;
    pthread_mutex_lock(&r->lock);
    __atomic_store_n(&r->stop, 1, __ATOMIC_RELAXED);
    pthread_cond_broadcast(&r->work);
    while (r->threads && !wait_until(&r->left, &r->lock, until)) {}
    int64_t threads = r->threads;
    r->abandoned = threads != 0;
    pthread_mutex_unlock(&r->lock);
    if (!threads) release(r);
    return threads;
}

/* A reader with its threads, or NULL where memory or a thread is not to be had. */
reader_t *edge_reader_start(const reader_setup_t *setup) {
    reader_t *r = calloc(1, sizeof *r);
    if (!r) return NULL;
    pthread_condattr_t monotonic;
    pthread_condattr_init(&monotonic);
    pthread_condattr_setclock(&monotonic, CLOCK_MONOTONIC);
    pthread_mutex_init(&r->lock, NULL);
    pthread_cond_init(&r->work, NULL);
    pthread_cond_init(&r->ended, &monotonic);
    pthread_cond_init(&r->left, &monotonic);
    pthread_condattr_destroy(&monotonic);
    r->queue.end = &r->queue.first, r->results.end = &r->results.first, r->spare.end = &r->spare.first;
    if (copy_setup(r, setup)) {
        release(r);
        return NULL;
    }
    pthread_mutex_lock(&r->lock); /* the threads are counted before one looks */
    start_threads(r);
    pthread_mutex_unlock(&r->lock);
    if (r->threads == setup->threads) return r;
    edge_reader_stop(r, SECOND_NS);
    return NULL;
}

/* Read the blob of `file` into `to`; edge_reader_wait gives `id` back. Returns 0, or -1 without memory. */
int edge_reader_submit(reader_t *r, int64_t id, int64_t file, int64_t seed, int64_t checksum, void *to) {
    pthread_mutex_lock(&r->lock);
    load_t *load = take_first(&r->spare);
    if (!load && (load = malloc(sizeof *load + (size_t)r->setup.chunks))) load->older = r->newest, r->newest = load;
    int64_t first = load && r->in_flight == 0;
    if (load) {
        memset(&load->result, 0, sizeof load->result);
        load->result.id = id, load->result.submitted_ns = now();
        load->file = file, load->seed = seed, load->checksum = checksum, load->to = to;
        load->retried = load->cancelled = 0;
        begin_reading(load, r->setup.chunks);
        if (r->in_flight++ == 0) r->busy_since_ns = load->result.submitted_ns;
        enqueue(r, load);
    }
    pthread_mutex_unlock(&r->lock);
    /* The caller goes on to compute on every core. A thread that wakes on the caller's would wait until that is done. */
    if (first) sched_yield();
    return load ? 0 : -1;
}

/* What has not been read yet of the blob that was submitted as `id` need not be: it ends soon, well or cancelled. */
void edge_reader_cancel(reader_t *r, int64_t id) {
    pthread_mutex_lock(&r->lock);
    for (load_t *load = r->newest; load; load = load->older)
        if (load->result.id == id) __atomic_store_n(&load->cancelled, 1, __ATOMIC_RELAXED);
    pthread_mutex_unlock(&r->lock);
}

/* The next blob that has ended, well or not: 1, or 0 when none has within `timeout_ns`. One caller at a time. */
int edge_reader_wait(reader_t *r, int64_t timeout_ns, reader_result_t *result) {
    int64_t until = now() + timeout_ns;
    pthread_mutex_lock(&r->lock);
    while (!r->results.first && !wait_until(&r->ended, &r->lock, until)) {}
    load_t *load = take_first(&r->results);
    if (load) {
        *result = load->result;
        append(&r->spare, load);
    }
    pthread_mutex_unlock(&r->lock);
    return load != NULL;
}

/* counts[0]: ns so far with at least one blob on its way; counts[1]: blobs that were read twice. */
void edge_reader_counts(reader_t *r, int64_t counts[2]) {
    pthread_mutex_lock(&r->lock);
    counts[0] = r->busy_ns + (r->in_flight ? now() - r->busy_since_ns : 0);
    counts[1] = r->retries;
    pthread_mutex_unlock(&r->lock);
}
