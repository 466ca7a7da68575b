# cython: language_level=3
"""The bell on which a progress thread sleeps; see doorbell.pyx."""
from libc.stdint cimport int64_t

cdef extern from "<sys/un.h>" nogil:
    ctypedef unsigned int socklen_t
    cdef struct sockaddr_un:
        unsigned short sun_family
        char sun_path[108]

cdef struct Bell:
    int fd
    int size
    int64_t* written_us       # by peer: when we last wrote to it
    sockaddr_un* address      # by peer
    socklen_t* length         # by peer; 0: it has no bell

cdef void bell_written(Bell* bell, int peer) noexcept nogil
cdef void bell_ring(Bell* bell, int peer) noexcept nogil
cdef bint bell_wait(Bell* bell, int64_t timeout_us) noexcept nogil

cdef class Doorbell:
    cdef Bell bell
    cdef readonly bytes name
    cdef readonly bytes host
