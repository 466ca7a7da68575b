# cython: language_level=3
"""Contexts: many communicators over one transport; see _contexts.pyx."""
from libc.stdint cimport int64_t, int32_t, int16_t, uint64_t, uint32_t, uint16_t, uint8_t
from cython_kernels.transport cimport Transport, Event
from hopcoll._state cimport Engine, Mask, RANKS_MAX
from hopcoll._store_state cimport Store, StoreSettings

cdef enum:
    CONTEXTS_MAX = 64         # besides the root: one bit each in Hub.awake
    STORE_SLOT = 65           # of the store of objects: the same at every rank, from the start
    CONTEXT_MARK = 255        # no type of message starts with it

cdef struct ContextHead:      # goes before each control message of a context
    uint8_t mark
    uint8_t pad
    uint16_t slot             # at the receiver
    uint32_t serial           # how many the receiver had reserved before it: never the same again

cdef struct Context:
    Transport table           # what its engine sends by
    Hub* hub
    Engine* engine            # NULL: a transport alone, or not open yet
    Store* store              # in the place of an engine
    int32_t slot
    uint32_t serial
    int32_t size              # 0: reserved, not open yet
    int32_t told              # it was told of the dead, and is told at once of those that follow
    int64_t requests          # of data, whose ends are awaited
    int64_t flushed_done      # the watermarks that its engine has told
    int64_t flushed_stable
    Mask early_byes           # ranks of the root that left it before it was open here
    int16_t roots[RANKS_MAX]  # the root's numbers of its ranks
    int16_t ranks[RANKS_MAX]  # its numbers of the root's ranks, -1: none
    ContextHead heads[RANKS_MAX]

cdef struct Hub:
    Transport* transport      # of the root
    int32_t* tags             # of all engines over it
    unsigned char* room       # to put heads together
    uint64_t awake            # bit slot - 1: its clock has to tick
    uint32_t serial
    int32_t count
    int64_t now_us
    Mask dead                 # as the root numbers them
    Mask lost                 # what its engine had decided when the contexts last heard of it
    int32_t stopped
    int32_t unsure
    int32_t store_used        # by us or by others; until then it follows nothing
    int32_t pad
    Mask left                 # who had left the root when the store last heard of it
    Context* slots[STORE_SLOT + 1]        # 0 is the root's, and empty

cdef enum Route:
    ROUTE_ROOT = 0            # the event is the root's; a death is everyone's
    ROUTE_CONTEXT = 1         # it was made one of the context
    ROUTE_NOWHERE = 2         # it was for a context that is closed

cdef Context* context_reserve(Hub* hub) noexcept nogil
cdef int64_t context_handle(const Context* context) noexcept nogil
cdef Context* context_at(Hub* hub, int64_t handle) noexcept nogil
cdef void context_open(Context* context, int size, int rank, const int16_t* roots,
                       const int64_t* handles) noexcept nogil
cdef void context_tell(Context* context, const Mask* gone) noexcept nogil
cdef bint context_detach(Context* context) noexcept nogil
cdef void context_wake(Context* context) noexcept nogil
cdef int hub_route(Hub* hub, Event* event, Context** context) noexcept nogil
cdef bint hub_event(Hub* hub, Event* event) noexcept nogil
cdef void hub_tick(Hub* hub, int64_t now_us) noexcept nogil
cdef Store* hub_open_store(Hub* hub, const StoreSettings* settings,
                           const uint16_t* host) noexcept nogil
cdef Store* hub_store(const Hub* hub) noexcept nogil
cdef void hub_follow(Hub* hub, const Engine* root) noexcept nogil
