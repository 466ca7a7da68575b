# cython: language_level=3
"""The contract between the protocol and whatever carries its bytes.

A transport is a table of functions over an opaque ``self``.  Two exist: MPI
(`cython_kernels.mpi_transport`) and the simulated network (`hopcoll._simulation`); one test
suite holds both to the rules below.

1. No function blocks, takes the GIL or raises.  Callers serialise their calls.
2. ``send_control`` copies the message.  Control messages of one pair arrive in the order sent,
   unless the sender dies: then any suffix of them may be missing.
3. ``send_data`` and ``recv_data`` borrow the memory until exactly one event names their token:
   SENT or RECEIVED, or LOST when the peer is dead.  A data message matches the oldest receive
   posted for the same (peer, tag), and the receives of one (peer, tag) end in the order posted; the
   protocol posts the receive before it lets the peer send.
   The memory of a receive that is LOST is undefined: something may have been written.
   A data message of zero bytes is a *void* and arrives as RECEIVED with ``nbytes == 0``.
4. DEAD names a dead peer once, and is never wrong.  No control message of the peer comes after
   it; requests that are still open with the peer end as RECEIVED, SENT or LOST, before or after.
   After DEAD, control messages to the peer are dropped and new data requests answer LOST.
"""
from libc.stdint cimport int64_t

cdef enum EventKind:
    EVENT_NONE = 0
    EVENT_CONTROL = 1     # peer, payload, nbytes; payload is valid until the next poll
    EVENT_SENT = 2        # peer, token
    EVENT_RECEIVED = 3    # peer, token, nbytes
    EVENT_LOST = 4        # peer, token: the request ended because its peer is dead
    EVENT_DEAD = 5        # peer

cdef struct Event:
    int kind
    int peer
    int64_t token
    int64_t nbytes
    const unsigned char* payload

cdef struct Transport:
    void* self
    int rank
    int size
    int64_t control_bytes_max
    void (*send_control)(void* self, int dest, const void* head, int64_t head_bytes,
                         const void* body, int64_t body_bytes) noexcept nogil
    void (*send_data)(void* self, int dest, int tag, const void* data, int64_t nbytes,
                      int64_t token) noexcept nogil
    void (*recv_data)(void* self, int source, int tag, void* data, int64_t nbytes,
                      int64_t token) noexcept nogil
    int (*poll)(void* self, Event* event) noexcept nogil      # 1: an event was written, 0: none
    void* (*allocate)(void* self, int64_t nbytes) noexcept nogil   # NULL when out of memory
    void (*release)(void* self, void* memory) noexcept nogil
