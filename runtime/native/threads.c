/* A few threads that take pieces of a job, for work that lasts microseconds.
 *
 * `gate` says whether a job may be joined, and how many helpers are in it. The caller opens it, works, closes it and
 * waits only for those that came: a helper that wakes late finds it closed and costs nothing.
 */
#define _GNU_SOURCE
#include "kernels.h"

#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <unistd.h>

enum { MAX_THREADS = 64, SPINS = 2000 };
#define OPEN 0x80000000u

static pthread_mutex_t turn = PTHREAD_MUTEX_INITIALIZER; /* callers of several threads take turns */
static int helpers;                                      /* threads beside the caller's */
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t wake = PTHREAD_COND_INITIALIZER;
static int asleep;
static atomic_uint round_number;
static atomic_uint gate;

static struct {
    void (*piece)(const void *job, ptrdiff_t begin, ptrdiff_t end);
    const void *job;
    ptrdiff_t count, grain;
} shared;
static atomic_ptrdiff_t next;

static void work(void) {
    for (;;) {
        ptrdiff_t begin = atomic_fetch_add_explicit(&next, shared.grain, memory_order_relaxed);
        if (begin >= shared.count) return;
        shared.piece(shared.job, begin, shared.count - begin < shared.grain ? shared.count : begin + shared.grain);
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

/* Have at least `threads` in all; threads never end. Returns 0, or -1 when one did not start. */
int edge_have_threads(int threads) {
    while (helpers < (threads < MAX_THREADS ? threads : MAX_THREADS) - 1) {
        pthread_t thread;
        if (pthread_create(&thread, NULL, helper, NULL)) return -1;
        pthread_detach(thread);
        helpers++;
    }
    return 0;
}

/* How many share a job, the caller's among them. */
int edge_threads(void) { return helpers + 1; }

void edge_take_turn(void) { pthread_mutex_lock(&turn); }

void edge_end_turn(void) { pthread_mutex_unlock(&turn); }

/* Do pieces of `grain` of 0 ... count - 1, each by whichever thread comes first. One grain is the caller's alone. */
void edge_share(void (*piece)(const void *job, ptrdiff_t begin, ptrdiff_t end), const void *job, ptrdiff_t count,
                ptrdiff_t grain) {
    if (!helpers || count <= grain) {
        piece(job, 0, count);
        return;
    }
    shared.piece = piece, shared.job = job, shared.count = count, shared.grain = grain;
    atomic_store(&next, 0);
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

/* ---- for threads that read ---- */

enum { SLICE_NS = 100000 }; /* the least that Linux takes */

/* Ask for turns of SLICE_NS for the calling thread: a waking thread with short turns goes before one in the middle of a
 * long turn (Linux 6.12 and later; sched(7)). Returns 0, or -1 where the thread has no ordinary policy. */
int edge_short_slice(void) {
    struct { /* sched_attr of sched_setattr(2), as first published; glibc has a wrapper from 2.41 on */
        uint32_t size, policy;
        uint64_t flags;
        int32_t nice;
        uint32_t priority;
        uint64_t runtime, deadline, period;
    } wish = {.size = sizeof wish, .policy = SCHED_OTHER, .nice = getpriority(PRIO_PROCESS, 0), .runtime = SLICE_NS};
    if (sched_getscheduler(0) != SCHED_OTHER) return -1;
    return (int)syscall(SYS_sched_setattr, 0, &wish, 0);
}
