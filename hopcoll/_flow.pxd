# cython: language_level=3
"""What is done and stable; see _flow.pyx."""
from hopcoll._state cimport *

cdef void flow_anew(Engine* engine) noexcept nogil
cdef bint know_others(Engine* engine) noexcept nogil
cdef void update_stable(Engine* engine) noexcept nogil
cdef void flush_watermark(Engine* engine) noexcept nogil
cdef void flush_due(Engine* engine) noexcept nogil
