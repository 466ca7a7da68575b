# cython: language_level=3
"""Sets of ranks."""
from libc.stdint cimport uint64_t

# How wide a set is, is said when the package is built: HOPCOLL_RANKS_MAX (setup.py).
cdef extern from *:
    """
    #ifndef HOPCOLL_RANKS_MAX
    #define HOPCOLL_RANKS_MAX 256
    #endif
    #define HOPCOLL_MASK_WORDS (HOPCOLL_RANKS_MAX / 64)
    """
    enum:
        RANKS_MAX "HOPCOLL_RANKS_MAX"
        MASK_WORDS "HOPCOLL_MASK_WORDS"

cdef extern from *:
    int popcount "__builtin_popcountll"(unsigned long long word) noexcept nogil
    int lowest_bit "__builtin_ctzll"(unsigned long long word) noexcept nogil

cdef struct Mask:
    uint64_t word[MASK_WORDS]

cdef inline bint mask_has(const Mask* mask, int rank) noexcept nogil:
    return (mask.word[rank >> 6] >> (rank & 63)) & 1

cdef inline void mask_add(Mask* mask, int rank) noexcept nogil:
    mask.word[rank >> 6] |= (<uint64_t>1) << (rank & 63)

cdef inline void mask_drop(Mask* mask, int rank) noexcept nogil:
    mask.word[rank >> 6] &= ~((<uint64_t>1) << (rank & 63))

cdef inline bint mask_equal(const Mask* a, const Mask* b) noexcept nogil:
    cdef uint64_t differ = 0
    cdef int i
    for i in range(MASK_WORDS):
        differ |= a.word[i] ^ b.word[i]
    return differ == 0

cdef inline bint mask_within(const Mask* a, const Mask* b) noexcept nogil:
    """Whether every rank of a is in b."""
    cdef uint64_t beyond = 0
    cdef int i
    for i in range(MASK_WORDS):
        beyond |= a.word[i] & ~b.word[i]
    return beyond == 0

cdef inline Mask mask_without(const Mask* a, const Mask* b) noexcept nogil:
    cdef Mask out
    cdef int i
    for i in range(MASK_WORDS):
        out.word[i] = a.word[i] & ~b.word[i]
    return out

cdef inline Mask mask_or(const Mask* a, const Mask* b) noexcept nogil:
    cdef Mask out
    cdef int i
    for i in range(MASK_WORDS):
        out.word[i] = a.word[i] | b.word[i]
    return out

cdef inline Mask mask_and(const Mask* a, const Mask* b) noexcept nogil:
    cdef Mask out
    cdef int i
    for i in range(MASK_WORDS):
        out.word[i] = a.word[i] & b.word[i]
    return out

cdef inline bint mask_empty(const Mask* a) noexcept nogil:
    cdef uint64_t any = 0
    cdef int i
    for i in range(MASK_WORDS):
        any |= a.word[i]
    return any == 0

cdef inline int mask_count(const Mask* mask) noexcept nogil:
    cdef int i, count = 0
    for i in range(MASK_WORDS):
        count += popcount(mask.word[i])
    return count

cdef inline int mask_below(const Mask* mask, int rank) noexcept nogil:
    """How many of its ranks are lower than this one."""
    cdef int i, count = 0
    for i in range(rank >> 6):
        count += popcount(mask.word[i])
    return count + popcount(mask.word[rank >> 6] & (((<uint64_t>1) << (rank & 63)) - 1))

cdef inline int mask_nth(const Mask* mask, int n) noexcept nogil:
    """The rank that has n lower ones before it; -1: there are not so many."""
    cdef int i, here
    cdef uint64_t w
    for i in range(MASK_WORDS):
        here = popcount(mask.word[i])
        if n < here:
            w = mask.word[i]
            while n:
                w &= w - 1
                n -= 1
            return i * 64 + lowest_bit(w)
        n -= here
    return -1

cdef inline Mask mask_none() noexcept nogil:
    cdef Mask out
    cdef int i
    for i in range(MASK_WORDS):
        out.word[i] = 0
    return out

cdef inline Mask mask_full(int size) noexcept nogil:
    cdef Mask out = mask_none()
    cdef int i
    for i in range(size >> 6):
        out.word[i] = ~<uint64_t>0
    if size & 63:
        out.word[size >> 6] = (<uint64_t>1 << (size & 63)) - 1
    return out
