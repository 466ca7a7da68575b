# cython: language_level=3
"""Channels of MPI requests: the state behind `MpiTransport`; see mpi_channels.pyx."""
from libc.stdint cimport int64_t

from cython_kernels.doorbell cimport Bell
from cython_kernels.mpi_calls cimport MPI_Comm, MPI_Request, MPI_Status
from cython_kernels.transport cimport Event, Transport

cdef enum NodeKind:
    CONTROL_IN = 0
    CONTROL_OUT = 1
    DATA_IN = 2
    DATA_OUT = 3

cdef struct Node:              # one request
    MPI_Request request        # while it waits behind the head of its channel
    int kind
    int peer
    int tag
    int refused                # the error class with which MPI refused to start it
    int64_t token
    unsigned char* memory      # of control messages: RING slots and copies of what is sent
    Node* next                 # in its channel, or in a list of spare nodes
    Node* registered           # all nodes ever made, for the end

cdef struct Channel:
    int tag
    int broken                 # a receive was lost: the ones behind it are lost, too
    Node* head
    Node* tail
    Channel* next

cdef struct Queued:
    Event event
    Node* node                 # the control slot that the event shows, to be posted again

cdef enum:
    SPARES_MAX = 32

cdef struct Spare:             # a large block that nobody uses
    unsigned char* block
    int64_t nbytes

cdef struct World:
    int rank
    int size
    int error_class
    int error_peer
    int closed
    MPI_Comm comm
    int64_t control_bytes_max
    Channel* control           # by peer
    Channel** data             # by peer: its list of channels
    unsigned char* dead        # by peer
    Channel* spare_channels
    Node* spare_nodes          # without memory
    Node* spare_slots          # with control_bytes_max of it
    Node* registered
    Spare spares[SPARES_MAX]
    int64_t spare_bytes
    Node* lent                 # the slot of the event that the last poll gave out
    # What MPI_Testsome tests, dense: the heads of the channels and the sends in flight.
    int active
    int capacity
    MPI_Request* requests
    Node** nodes
    int* indices
    MPI_Status* statuses
    Queued* queue              # a ring of events; queue_room is a power of two
    int64_t queue_room
    int64_t queue_first
    int64_t queue_count
    long long last_poll
    Bell* bell                 # wakes peers of this host; NULL: they look by themselves

cdef World* make_world(MPI_Comm comm, int64_t control_bytes_max) noexcept nogil
cdef void fill_table(Transport* table, World* world) noexcept nogil
cdef void settle(World* world, int place, int error_class, const MPI_Status* status) noexcept nogil
cdef bint drain(World* world, double until) noexcept nogil
cdef void free_world(World* world) noexcept nogil
cdef double clock_s() noexcept nogil
cdef void rest_since(double begin) noexcept nogil
cdef int wait_request(MPI_Request* request, int* complete, double until) noexcept nogil
