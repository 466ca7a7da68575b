# cython: language_level=3
"""A simulated world: engines, their callers and the network; see _world.pyx."""
from libc.stdint cimport int64_t, int32_t, uint64_t, uint32_t, uint8_t
from hopcoll._state cimport Engine, Settings, Result, Mask
from hopcoll._network cimport Network

cdef enum:
    OPERATIONS_MAX = 16

cdef enum:
    STEP_MIXED = 65536        # of a step: combined by an operation that shows every bracket

cdef enum Action:
    ACT_CALL = 1              # rank a calls its next operation
    ACT_CONTROL = 2           # the next control message from a to b arrives
    ACT_DATA = 3              # data message c from a to b arrives
    ACT_LATE = 4              # request b of rank a ends
    ACT_DETECT = 5            # a learns that b is dead
    ACT_KILL = 6              # a dies
    ACT_TICK = 7              # the clock of a goes on by b microseconds
    ACT_LEAVE = 8             # a says good-bye
    ACT_GO = 9                # ... and ends, when it may
    ACT_PAUSE = 10            # a is stopped
    ACT_RESUME = 11           # ... and goes on
    ACT_CUT = 12              # nothing passes between the ranks of a mask (low, high: a, b) and
    ACT_HEAL = 13             # the others, until it does again

cdef enum Violation:
    FINE = 0
    HANG = 1
    WRONG_VALUE = 3
    DIFFERENT_OUTCOMES = 4
    CONTRIBUTORS_GREW = 5
    LIVING_LEFT_OUT = 6
    INPUT_CHANGED = 7
    BAD_UNEXPECTED_DATA = 8
    STABLE_TOO_EARLY = 9
    ENGINE_BROKEN = 10
    WRONG_STATUS = 11
    OUT_OF_ROOM = 12
    LEAK = 13
    BAD_BORROWED_CHANGED = 14
    BAD_BORROWED_FREED = 15
    STABLE_WENT_BACK = 16
    TOUCHED_AFTER_RETURN = 17
    TOO_MANY_MESSAGES = 18
    MISMATCH_MISSED = 19
    RAISED_WRONGLY = 20
    LIVELOCK = 21
    SPLIT = 22
    LEFT_THE_HEALTHY = 23
    NO_QUORUM = 24

cdef struct Step:             # one operation of the script
    int32_t kind
    int32_t root
    int32_t flags
    int32_t deadline_us       # of a partial operation; its root is the quorum
    int64_t count

cdef struct Choice:
    int32_t action
    int32_t a
    int32_t b
    int32_t c
    int32_t budget            # sends before the acting rank dies; -1: it lives

cdef struct Rank:
    Engine* engine
    World* world
    int32_t steps             # operations that it calls before it leaves
    int32_t called
    int32_t checked
    int32_t leaving           # it has said good-bye
    int64_t stable            # as last seen
    int64_t baseline_bytes    # of its memory, before any operation
    Result* results
    uint32_t pending          # operations whose input is to be carried into a later one
    uint32_t takes[OPERATIONS_MAX]     # whose input an operation has along
    uint64_t* send[OPERATIONS_MAX]
    uint64_t* recv[OPERATIONS_MAX]

cdef struct World:
    Network network
    int32_t size
    int32_t steps_count
    int32_t depth
    int32_t violation
    int32_t deaths_left
    int32_t alive
    int32_t ticked            # ticks since anything else happened
    int32_t leaving           # ranks leave when they are through
    int32_t exits             # ... and are seen as dead after that
    int32_t odd_rank          # calls `odd` instead of its step odd_step; -1: none
    int32_t odd_step
    int32_t early_leaver      # calls only so many steps: -1: none
    int32_t early_steps
    int32_t fixed
    int32_t turn              # the rank after the one that acted last
    int32_t blamed_rank       # where the violation showed
    int32_t blamed_step
    int32_t silence           # ranks are stopped, links cut, and both may be healed
    int64_t controls_max
    int64_t clock_us          # of everyone who is not stopped
    uint64_t paused
    uint64_t side             # ranks between which and the others nothing passes; 0: all is well
    uint64_t disturbed        # ranks that were ever paused or on the smaller side of a cut
    uint64_t fenced           # to be killed when this step is over
    Step odd
    Settings settings
    uint8_t host[64]
    Step script[OPERATIONS_MAX]
    Rank* ranks

cdef World* make_world(const World* plan, int64_t* total) noexcept nogil
cdef void free_world(World* world) noexcept nogil
cdef void perform(World* world, const Choice* choice) noexcept nogil
cdef bint can_call(World* world, int rank) noexcept nogil
cdef bint can_leave(World* world, int rank) noexcept nogil
cdef bint can_go(World* world, int rank) noexcept nogil
cdef bint can_detect(World* world, int observer, int peer) noexcept nogil
