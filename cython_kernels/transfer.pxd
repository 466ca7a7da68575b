# cython: language_level=3
"""The ends of chunked transfers: what `Pipeline` is made of; see transfer.pyx."""
from libc.stdint cimport int32_t, int64_t, uint8_t

from cython_kernels.stream cimport Grid, Sink, Spring
from cython_kernels.transport cimport Transport

cdef enum NoteKind:
    GRANT = 1                  # receiver to sender: chunks below `limit` have posted receives
    STOP = 2                   # receiver to sender: I gave up; `limit` receives are posted

cdef struct Note:
    int32_t kind
    int32_t tag
    int32_t wire_tag
    int32_t unused
    int64_t ordinal
    int64_t limit
    int64_t nbytes
    int64_t chunk_bytes

cdef enum EndState:
    WAITING = 0                # granted by the receiver; send has not been called yet
    ACTIVE = 1
    CLOSED = 2                 # given up by this rank, or by the peer before it was called

# One end of a transfer: a sink or a spring.  Its address is the token of its requests.
cdef struct End:
    int inbound
    int peer
    int tag
    int state
    int cut                    # the other side gave up, or the transfer is lost
    int64_t ordinal
    int64_t whole              # chunks that arrived, or that were handed over
    int32_t wire_tag
    int64_t peer_nbytes        # the receiver's grid, once it is known
    int64_t peer_chunk_bytes
    Grid grid
    Sink sink
    Spring spring
    unsigned char* base
    Transfer* transfer         # NULL when no verb waits for it any more
    End* next

cdef struct Transfer:
    End* sink
    uint8_t* states            # by chunk: what may be sent on; NULL when all may be
    int dtype
    int op
    int64_t itemsize
    const unsigned char* own   # NULL: nothing is reduced

cdef struct Counter:           # how many transfers there were with a peer under a tag
    int peer
    int tag
    int64_t sends
    int64_t receives
    Counter* next

cdef struct Line:
    Transport* table
    int64_t chunk_bytes
    int window
    int wire_tag_max
    int32_t wire_tag
    int64_t moved_chunks
    int64_t kill_after_chunks
    int events                 # seen in the last round; nothing to do: yield
    End* ends
    Counter* counters
    uint8_t* dead

cdef Counter* counter_of(Line* line, int peer, int tag) noexcept nogil
cdef End* find_spring(Line* line, int peer, int tag, int64_t ordinal) noexcept nogil
cdef End* add_end(Line* line, int inbound, int peer, int tag, int64_t ordinal) noexcept nogil
cdef bint quiet(const End* end) noexcept nogil
cdef bint over(Line* line, const End* end) noexcept nogil
cdef bint complete(const End* end) noexcept nogil
cdef bint fits(const End* end) noexcept nogil
cdef void forget(Line* line, End* end) noexcept nogil
cdef void send_note(Line* line, const End* end, int kind, int64_t limit) noexcept nogil
cdef void answer_with_voids(Line* line, End* end) noexcept nogil
cdef void take_events(Line* line) noexcept nogil
cdef int run(Line* line, Transfer* transfer, End** springs, int count, double until) noexcept nogil
