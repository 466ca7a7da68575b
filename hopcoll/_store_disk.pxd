# cython: language_level=3
"""The disks of a random world of stores; see _store_disk.pyx."""
from libc.stdint cimport int64_t, int32_t, uint64_t
from hopcoll._store_state cimport *

cdef enum:
    FILES = 512
    TAKEN = 64

cdef struct File:
    int32_t rank
    int32_t pad
    int64_t number
    int64_t nbytes
    unsigned char* bytes

cdef struct Disk:             # of all ranks
    int32_t fails             # one in so many jobs fails; 0: none
    int32_t failures
    int32_t files_count
    int32_t taken_count
    int32_t strange           # a job that cannot be: 1 + its rank
    int32_t pad
    File files[FILES]
    Job* taken[TAKEN]
    int32_t taker[TAKEN]

cdef void disk_rings(void* context) noexcept nogil
cdef bint disk_has(const Disk* disk, const Store* store, int rank) noexcept nogil
cdef bint disk_step(Disk* disk, Store* store, int rank, uint64_t chance) noexcept nogil
cdef int32_t disk_files(const Disk* disk, int rank) noexcept nogil
cdef void disk_clear(Disk* disk) noexcept nogil
