# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
"""The disks of a random world of stores: jobs that end in any order, late, and at times badly."""
from libc.stdint cimport int64_t, int32_t, uint64_t
from libc.stdlib cimport free, malloc
from libc.string cimport memcpy
from hopcoll._store cimport store_end_job, store_look, store_take_job
from hopcoll._store_state cimport *


cdef void disk_rings(void* context) noexcept nogil:
    """The world looks for itself."""
    pass


cdef bint disk_has(const Disk* disk, const Store* store, int rank) noexcept nogil:
    """Whether there is something to do for the disk of a rank."""
    cdef int i
    for i in range(disk.taken_count):
        if disk.taker[i] == rank:
            return True
    return store.jobs != NULL and disk.taken_count < TAKEN


cdef int find_file(const Disk* disk, int rank, int64_t number) noexcept nogil:
    cdef int i
    for i in range(disk.files_count):
        if disk.files[i].rank == rank and disk.files[i].number == number:
            return i
    return -1


cdef void drop_file(Disk* disk, int at) noexcept nogil:
    free(disk.files[at].bytes)
    disk.files_count -= 1
    disk.files[at] = disk.files[disk.files_count]


cdef uint64_t sum_of(const unsigned char* bytes, int64_t nbytes) noexcept nogil:
    cdef uint64_t out = 0
    cdef int64_t i
    for i in range(nbytes):
        out = mixed(out ^ bytes[i])
    return out


cdef void do_job(Disk* disk, int rank, Job* job, uint64_t chance) noexcept nogil:
    cdef int at = find_file(disk, rank, job.file)
    cdef File* made = &disk.files[disk.files_count]
    job.failed = job.kind != JOB_REMOVE and disk.fails and chance % <uint64_t>disk.fails == 0
    disk.failures += job.failed
    if (at < 0) != (job.kind == JOB_WRITE) or disk.files_count == FILES:
        disk.strange = 1000 * job.kind + 1 + rank
        job.failed = 1
    elif job.kind == JOB_REMOVE:
        drop_file(disk, at)
    elif job.kind == JOB_READ:
        memcpy(job.copy.data, disk.files[at].bytes, job.nbytes)
        if sum_of(disk.files[at].bytes, job.nbytes) != job.checksum:
            disk.strange = 1 + rank
    elif not job.failed:
        disk.files_count += 1
        made.rank = rank
        made.number = job.file
        made.nbytes = job.nbytes
        made.bytes = <unsigned char*>malloc(job.nbytes)
        memcpy(made.bytes, job.copy.data, job.nbytes)
        job.checksum = sum_of(made.bytes, made.nbytes)


cdef bint disk_step(Disk* disk, Store* store, int rank, uint64_t chance) noexcept nogil:
    """Takes a job, or ends one of those that were taken; whether one has ended."""
    cdef int i, count = 0, at = -1
    cdef Job* job
    for i in range(disk.taken_count):
        if disk.taker[i] == rank:
            count += 1
            if (chance >> 8) % <uint64_t>count == 0:
                at = i
    if store.jobs != NULL and disk.taken_count < TAKEN and (count == 0 or chance & 1):
        disk.taken[disk.taken_count] = store_take_job(store)
        disk.taker[disk.taken_count] = rank
        disk.taken_count += 1
        return False
    job = disk.taken[at]
    disk.taken_count -= 1
    disk.taken[at] = disk.taken[disk.taken_count]
    disk.taker[at] = disk.taker[disk.taken_count]
    do_job(disk, rank, job, chance >> 16)
    store_end_job(store, job)
    store_look(store)
    return True


cdef int32_t disk_files(const Disk* disk, int rank) noexcept nogil:
    cdef int32_t i, count = 0
    for i in range(disk.files_count):
        count += disk.files[i].rank == rank
    return count


cdef void disk_clear(Disk* disk) noexcept nogil:
    while disk.files_count:
        drop_file(disk, 0)
