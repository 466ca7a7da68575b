# cython: language_level=3
"""The simulated network: ports, channels and memory; see _network.pyx."""
from libc.stdint cimport int64_t, int32_t, uint64_t, uint8_t
from cython_kernels.transport cimport Transport, Event
from hopcoll._state cimport Mask

cdef enum:
    COPY_MAX = 32             # longest data message of which the network keeps a copy

cdef enum Delay:              # when a request of one side ends
    DELAY_NONE = 0            # with the delivery (or the detection) itself
    DELAY_EAGER = 1           # a send ends at once: the network has copied the data
    DELAY_LATE = 2            # any time later
    DELAY_ANY = 3             # each by the random numbers

cdef enum NetworkError:
    NETWORK_FINE = 0
    UNEXPECTED_DATA = 1
    BORROWED_CHANGED = 2
    BORROWED_FREED = 3
    NO_ROOM = 4

cdef struct Posted:
    int32_t peer
    int32_t tag
    int64_t nbytes
    int64_t token
    unsigned char* data

cdef struct DataMessage:
    int32_t tag
    int32_t eager             # copied at once: SENT was given already
    int64_t nbytes
    int64_t token
    const unsigned char* data
    unsigned char copy[COPY_MAX]

cdef struct Late:             # an event that comes any time later
    Event event
    unsigned char* dest       # of a RECEIVED: where `copy` goes when it comes
    unsigned char copy[COPY_MAX]

cdef struct Channel:          # one ordered pair
    unsigned char* bytes      # [int64 length][message]...
    int64_t used
    int64_t room
    DataMessage* data
    int32_t data_count
    int32_t data_room

cdef struct Region:           # the memory of one rank: blocks of [int64 length, next free][bytes]
    unsigned char* base
    int64_t used
    int64_t room
    int64_t live_bytes
    unsigned char* free_list

cdef struct Port:
    Network* network
    int32_t rank
    int32_t dead
    int32_t left
    int32_t pad
    Transport table
    Region region
    Posted* posted
    int32_t posted_count
    int32_t posted_room
    Event* events             # what poll hands out
    int32_t events_count
    int32_t events_room
    Late* late
    int32_t late_count
    int32_t late_room
    unsigned char* payload    # of the last control event that was polled
    Mask detected
    Mask given_up             # peers from whom, and to whom, the rank waits for nothing

cdef struct Network:
    int32_t size
    int32_t fixed             # nothing may grow: the world is one piece of memory
    int32_t error
    int32_t sent_delay        # Delay
    int32_t lost_delay
    int32_t send_budget       # sends left in this step before its rank dies; -1: no limit
    int32_t sends             # of this step
    int32_t dying
    int64_t controls          # control messages sent
    uint64_t random
    Port* ports
    Channel* channels

cdef struct Rooms:            # of a fixed network, for each port or channel
    int64_t region_bytes
    int64_t channel_bytes
    int32_t data
    int32_t posted
    int32_t events
    int32_t late

cdef uint64_t next_random(Network* network) noexcept nogil
cdef int64_t network_bytes(int size, const Rooms* rooms) noexcept nogil
cdef void network_init(Network* network, int size, const Rooms* rooms, int64_t control_bytes_max,
                       unsigned char* memory) noexcept nogil
cdef void network_clear(Network* network) noexcept nogil
cdef void* region_allocate(Region* region, int64_t nbytes) noexcept nogil
cdef bint first_of_tag(const Channel* channel, int i) noexcept nogil
cdef bint first_of_token(const Port* port, int i) noexcept nogil
cdef void deliver_control(Network* network, int source, int dest) noexcept nogil
cdef void deliver_data(Network* network, int source, int dest, int i) noexcept nogil
cdef void deliver_late(Network* network, int rank, int i) noexcept nogil
cdef void kill_port(Network* network, int rank) noexcept nogil
cdef void leave_port(Network* network, int rank) noexcept nogil
cdef void drop_sent(Network* network, int rank, int dest, bint all_of_it) noexcept nogil
cdef void detect_death(Network* network, int observer, int peer) noexcept nogil
cdef void check_borrowed(Network* network, int rank) noexcept nogil
cdef int port_poll(void* self, Event* event) noexcept nogil

cdef inline Channel* channel_of(Network* network, int source, int dest) noexcept nogil:
    return &network.channels[source * network.size + dest]
