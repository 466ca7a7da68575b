# cython: language_level=3
"""What a rank can say of itself when it is late; see _lookout.pyx."""
from libc.stdint cimport int64_t, int32_t
from hopcoll._state cimport Engine, Mask, RANKS_MAX
from hopcoll._trace cimport Trace

cdef struct Lookout:
    int32_t fd                # wakes the thread that can ask Python; -1: there is none
    int32_t inside            # threads of the program that wait in a call
    int64_t changed_us        # when the program last entered or left one
    Mask askers               # ranks that want our stack
    char* stacks[RANKS_MAX]   # of others, by rank
    int64_t lengths[RANKS_MAX]

cdef void look_out(Lookout* lookout, Engine* engine) noexcept nogil
cdef dict late_report(Lookout* lookout, Engine* engine)
cdef list flight_of(Engine* engine)
cdef void give_stack(Lookout* lookout, Engine* engine, Trace* trace, bytes text)
cdef void close_lookout(Lookout* lookout) noexcept nogil
