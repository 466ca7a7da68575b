# cython: language_level=3
"""A random world of stores, and what is checked in it; see _store_world.pyx."""
from libc.stdint cimport int64_t, int32_t, uint64_t
from hopcoll._network cimport Network, next_random
from hopcoll._store_disk cimport Disk
from hopcoll._store_state cimport *

cdef enum:
    RANKS = 8
    KEYS = 6                  # of objects that are put
    RESULTS = 6               # of reductions
    INPUTS = 4
    ATTEMPTS = 512
    NOTES = 160
    STEPS_MAX = 60000
    CHOICES = 4096
    CHUNK = 16
    LIMIT_BYTES = 1 << 20     # more than there can be

cdef enum Violation:
    FINE = 0
    HANG = 1
    WRONG_BYTES = 2
    LOST_TOO_EARLY = 3
    WRONG_ANSWER = 4
    CIRCLE = 5
    TWO_RECEIVERS = 6
    NOT_DELETED = 7
    LEAK = 8
    NETWORK = 9
    LIVELOCK = 10
    BROKEN = 11
    SPLIT = 12
    OVER_LIMIT = 13

cdef enum Fate:
    HERE = 0
    DIED = 1
    LEFT = 2
    LOST = 3

cdef struct Note:             # something that a rank has called
    Ask ask
    int32_t rank
    int32_t key
    int32_t seen              # its answer was checked
    int32_t kept              # the program still looks at the copy
    int32_t drops             # ... and will let go of it
    int32_t waits             # a put has no room yet
    int64_t known             # what its ref knew
    int64_t stamps_before     # of a deletion: stamps of that key that were accepted by then

cdef struct Reduction:
    int32_t caller
    int32_t count
    int32_t inputs_count
    int32_t ended             # somebody was told that there will be no result
    int32_t inputs[INPUTS]    # their keys
    int64_t known             # what its ref knows, once it is taken
    int64_t read              # the attempt that was read first

cdef struct Attempt:          # of which all inputs were known
    int64_t stamp
    int64_t nbytes
    int32_t key
    int32_t count
    int32_t sealed
    int32_t pad
    int64_t bits
    uint64_t knowers          # ranks that know that it was sealed, or have all of it, by bits
    int64_t inputs[INPUTS]    # stamps

cdef struct StoreWorld:
    Network network
    int32_t size
    int32_t keys
    int32_t notes_count
    int32_t calls_left
    int32_t deaths_left
    int32_t leaves_left
    int32_t losses_left
    int32_t violation
    int32_t blamed_rank
    int32_t blamed_key
    int32_t deaths
    int32_t steps
    int64_t bytes_max
    int32_t tags[RANKS]
    int32_t fate[RANKS]
    Store* stores[RANKS]
    int32_t told_lost[RANKS][RANKS]
    int32_t deletes[KEYS + RESULTS]
    int64_t accepted[KEYS][NOTES]
    int32_t accepted_count[KEYS]
    int32_t deletes_too       # the program deletes before the end
    int32_t uniform           # nearly all objects have one length
    int32_t reduces_left
    int32_t reductions_count
    int32_t attempts_count
    Reduction reductions[RESULTS]
    Attempt attempts[ATTEMPTS]
    int64_t answers[7]
    int64_t letters           # sent before all was deleted at the end
    int32_t with_disk
    int32_t no_gets
    Disk disk
    Note notes[NOTES]


cdef void blame(StoreWorld* world, int violation, int rank, int key) noexcept nogil
cdef Key key_of(int k) noexcept nogil
cdef unsigned char byte_of(int64_t stamp, int64_t i) noexcept nogil
cdef int64_t length_of(const StoreWorld* world, int64_t stamp) noexcept nogil
cdef void note_attempt(void* context, const Recipe* recipe) noexcept nogil
cdef void note_seal(void* context, const Entry* entry) noexcept nogil
cdef void check_world(StoreWorld* world) noexcept nogil
cdef void check_end(StoreWorld* world) noexcept nogil
cdef void check_memory(StoreWorld* world) noexcept nogil

cdef inline uint64_t below(StoreWorld* world, uint64_t n) noexcept nogil:
    return next_random(&world.network) % n

cdef inline bint counts(const StoreWorld* world, int rank) noexcept nogil:
    return world.fate[rank] == HERE

cdef inline bint acts(const StoreWorld* world, int rank) noexcept nogil:
    return world.fate[rank] != DIED
