# cython: language_level=3
"""The transport contract over MPI point-to-point; see mpi_transport.pyx."""
from cython_kernels.mpi_channels cimport World
from cython_kernels.transport cimport Transport

cdef class MpiTransport:
    cdef Transport table   # its address is valid as long as the object lives
    cdef World* world
    cdef readonly list hellos
    cdef readonly bint fault_tolerant
    cdef readonly str library_version
    cdef readonly int tag_max
    cdef meet(self, bytes hello, double deadline, connect_timeout_s)

# MPI's class of the first error that no death explains, 0 when there was none; its peer (or -1)
# goes to `peer` when that is not NULL.
cdef int transport_error(const Transport* table, int* peer) noexcept nogil
