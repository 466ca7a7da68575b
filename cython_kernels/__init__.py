"""Native kernels: chunk streams over MPI point-to-point and elementwise reductions.

`reduction` holds the reduction loops; `transport` the interface that the protocol sends through;
`mpi_transport` its form over MPI; `stream` the windows of nonblocking requests; `doorbell` wakes an
idle rank of the same host. The kernels move and reduce bytes without the GIL, by a plan that they
were handed, and decide nothing.
"""
