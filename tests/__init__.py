"""unit: no MPI. sim: the protocol over a simulated network. mpi: real jobs. crash: real deaths."""
