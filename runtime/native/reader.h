/* What Python and the reader tell each other; runtime/native/reader.py has the same structures. */
#pragma once
#include <stddef.h>
#include <stdint.h>

/* One positioned read of up to `bytes` bytes; the count, 0 at the end of the file, or the negative error number. */
typedef int64_t read_bytes_t(int64_t file, void *to, int64_t bytes, int64_t offset);

typedef struct {
    int64_t blob_bytes;    /* of every blob, whole blocks of XXH3 */
    const int64_t *edges;  /* where chunks begin and end, `chunks` + 1 of them, on whole pages */
    int64_t chunks, threads;
    int64_t direct;        /* O_DIRECT: after a short read go on from a page boundary */
    read_bytes_t *read;    /* NULL: pread of descriptor `file` */
} reader_setup_t;

enum { READ_WELL = 0, READ_ERROR = 1, READ_ENDED = 2, READ_STALLED = 3, READ_DIFFERS = 4, READ_CANCELLED = 5 };

typedef struct {
    int64_t id;                                  /* as submitted */
    int64_t submitted_ns, started_ns, finished_ns; /* CLOCK_MONOTONIC */
    int64_t problem, error, offset;              /* READ_...; with READ_ERROR its number; where reading stopped */
    int64_t bytes;                               /* in chunks that were read, the second time if there were two */
} reader_result_t;
