# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
"""Chunk streams over a transport; see stream.pxd."""
from libc.stdint cimport int64_t, uint8_t
from cython_kernels.transport cimport Transport


cdef Grid make_grid(int64_t nbytes, int64_t chunk_bytes) noexcept nogil:
    cdef Grid grid
    grid.nbytes = nbytes
    grid.chunk_bytes = chunk_bytes
    grid.chunks = (nbytes + chunk_bytes - 1) // chunk_bytes
    return grid


cdef int64_t chunk_length(const Grid* grid, int64_t chunk) noexcept nogil:
    cdef int64_t left = grid.nbytes - chunk * grid.chunk_bytes
    return left if left < grid.chunk_bytes else grid.chunk_bytes


cdef void sink_open(Sink* sink, int source, int tag, int64_t first, int64_t end) noexcept nogil:
    sink.source = source
    sink.tag = tag
    sink.open = 1
    sink.broken = 0
    sink.first = first
    sink.end = end
    sink.posted = first
    sink.arrived = first
    sink.told = first


cdef unsigned char* slot_of_chunk(const Grid* grid, unsigned char* slots, int window,
                                  int64_t chunk) noexcept nogil:
    return slots + (chunk % window) * grid.chunk_bytes


cdef int64_t sink_post(Sink* sink, Transport* transport, const Grid* grid, unsigned char* base,
                       unsigned char* slots, int window, int64_t gate,
                       int64_t token) noexcept nogil:
    """Posts receives ahead, for chunks below `gate`; returns how many.  With `slots`, a window of
    them, the chunks land there, else where they belong in `base`."""
    cdef int64_t until = sink.arrived + window
    cdef int64_t before = sink.posted
    if until > sink.end:
        until = sink.end
    if until > gate:
        until = gate
    while sink.posted < until:
        # The token's low half is the caller's; a sink's chunks arrive in order, so that the
        # event does not need to name one.
        transport.recv_data(transport.self, sink.source, sink.tag,
                            slot_of_chunk(grid, slots, window, sink.posted) if slots != NULL
                            else base + sink.posted * grid.chunk_bytes,
                            chunk_length(grid, sink.posted), token)
        sink.posted += 1
    return sink.posted - before


cdef int64_t sink_arrived(Sink* sink) noexcept nogil:
    """Counts one arrival and returns the number of its chunk."""
    sink.arrived += 1
    return sink.arrived - 1


cdef bint sink_credit_due(const Sink* sink, int window, int parts) noexcept nogil:
    """Whether the sender should hear of new receives: of one of so many parts of a window, the last
    ones, or any when it has nothing left to send on."""
    cdef int64_t news = sink.posted - sink.told
    return news > 0 and (parts * news >= window or sink.posted == sink.end
                         or sink.arrived == sink.told)


cdef bint sink_idle(const Sink* sink) noexcept nogil:
    return sink.arrived == sink.posted


cdef int64_t spring_push(Spring* spring, Transport* transport, const Grid* grid,
                         const unsigned char* base, const uint8_t* states, int wanted,
                         int64_t token) noexcept nogil:
    """Sends the chunks that are granted and whose state is `wanted` (states NULL: all are there);
    returns how many."""
    cdef int64_t before = spring.next
    while spring.next < spring.limit and (states == NULL or states[spring.next] == wanted):
        transport.send_data(transport.self, spring.dest, spring.tag,
                            base + spring.next * grid.chunk_bytes,
                            chunk_length(grid, spring.next), token)
        spring.next += 1
        spring.in_flight += 1
    return spring.next - before


cdef void send_voids(Transport* transport, int dest, int tag, int64_t count,
                     int64_t token) noexcept nogil:
    cdef int64_t i
    for i in range(count):
        transport.send_data(transport.self, dest, tag, NULL, 0, token)


cdef int64_t spring_close(Spring* spring, Transport* transport, int64_t token) noexcept nogil:
    """Answers every receive that is still waiting for this stream with a void; returns how many."""
    cdef int64_t count = spring.limit - spring.next
    send_voids(transport, spring.dest, spring.tag, count, token)
    spring.next = spring.limit
    spring.end = spring.limit
    return count
