# Nothing for Python: channels of MPI requests, for mpi_transport.
