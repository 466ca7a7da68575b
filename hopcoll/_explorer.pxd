# cython: language_level=3
"""Every order of everything; see _explorer.pyx."""
from libc.stdint cimport int64_t, int32_t, uint64_t
from hopcoll._world cimport World, Choice

cdef enum:
    CHOICES_MAX = 160
    TAGS_MAX = 256
    VERDICTS_ROOM = 1 << 14

cdef enum Order:
    EVERY_ORDER = 0
    LOWEST_FIRST = 1          # one order of calls and deliveries, all of deaths and detections
    IN_TURNS = 2

cdef struct Explorer:
    World* world
    int64_t world_bytes
    int32_t order
    int32_t canonical_states  # equal up to history: one state
    int32_t stopped           # 1: states_max, 2: depth_max
    int32_t trace_count
    int32_t stack_room
    int64_t states
    int64_t transitions
    int64_t ends
    int64_t states_max
    int64_t seen_room
    uint64_t* seen
    uint64_t* verdicts        # the set of outcomes at ends
    int64_t verdicts_count
    uint64_t verdicts_digest  # sum over that set
    Choice* trace
    Choice* choices           # CHOICES_MAX per depth
    unsigned char* stack      # saved worlds, by depth
    uint64_t engine[8]        # its digest at each rank, which one step changes at one; 0: not known
    # renaming, of the state at hand
    int32_t tag_count[8]
    int32_t tags[8][TAGS_MAX]
    int32_t outlet_count[8]
    int32_t outlet_name[8][128]

cdef void explore(Explorer* x) noexcept nogil
