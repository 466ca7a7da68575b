# cython: language_level=3
"""Chunk streams: the windows of nonblocking requests that carry one block of an operation.

A block is `nbytes` of memory cut into chunks of `chunk_bytes`.  A `Sink` receives the chunks
[first, end) of a block in order, with at most `window` receives posted ahead.  A `Spring` sends
them, never beyond `limit`: what the receiver has posted and told.  A relay is a Sink and a Spring
over the same memory, tied by the byte array of chunk states.
"""
from libc.stdint cimport int64_t, uint8_t
from cython_kernels.transport cimport Transport

cdef enum ChunkState:
    CHUNK_NONE = 0
    CHUNK_PARTIAL = 1
    CHUNK_FINAL = 2
    CHUNK_LEFT = 3        # less than a partial sum: what comes from a second child is to be added

cdef struct Grid:
    int64_t nbytes
    int64_t chunk_bytes
    int64_t chunks

cdef struct Sink:
    int source
    int tag
    int open          # still posting; a closed sink only drains
    int broken        # a void or a loss was seen: no more will come on it
    int64_t first
    int64_t end
    int64_t posted    # receives posted so far: chunks [first, posted)
    int64_t arrived   # chunks [first, arrived) have come (or came as voids)
    int64_t told      # the limit that the sender knows

cdef struct Spring:
    int dest
    int tag
    int64_t next      # next chunk to send
    int64_t end
    int64_t limit     # chunks below this have a posted receive
    int in_flight

cdef Grid make_grid(int64_t nbytes, int64_t chunk_bytes) noexcept nogil
cdef int64_t chunk_length(const Grid* grid, int64_t chunk) noexcept nogil
cdef void sink_open(Sink* sink, int source, int tag, int64_t first, int64_t end) noexcept nogil
cdef unsigned char* slot_of_chunk(const Grid* grid, unsigned char* slots, int window,
                                  int64_t chunk) noexcept nogil
cdef int64_t sink_post(Sink* sink, Transport* transport, const Grid* grid, unsigned char* base,
                       unsigned char* slots, int window, int64_t gate, int64_t token) noexcept nogil
cdef int64_t sink_arrived(Sink* sink) noexcept nogil
cdef bint sink_credit_due(const Sink* sink, int window, int parts) noexcept nogil
cdef bint sink_idle(const Sink* sink) noexcept nogil
cdef int64_t spring_push(Spring* spring, Transport* transport, const Grid* grid,
                         const unsigned char* base, const uint8_t* states, int wanted,
                         int64_t token) noexcept nogil
cdef int64_t spring_close(Spring* spring, Transport* transport, int64_t token) noexcept nogil
cdef void send_voids(Transport* transport, int dest, int tag, int64_t count,
                     int64_t token) noexcept nogil
