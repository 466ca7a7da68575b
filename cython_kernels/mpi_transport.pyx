# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
"""The transport over MPI: first contacts, and the end.  mpi_channels.pyx is what runs in between.

Everything is a nonblocking request on a duplicate of the caller's communicator.  Nothing collective
is called after construction, and no function of the table waits.
"""
cimport cython
from libc.stdint cimport int64_t, uintptr_t
from libc.stdlib cimport calloc, free

from cpython.exc cimport PyErr_CheckSignals
from cython_kernels.mpi_calls cimport (
    MPI_Comm, MPI_Comm_idup, MPI_Comm_set_errhandler, MPI_ERRORS_RETURN, MPI_ERR_NO_MEM,
    MPI_Finalized, MPI_Get_library_version, MPI_Initialized, MPI_Request, MPI_SUCCESS, MPI_TAG_UB,
    MPI_Test, hopcoll_class, hopcoll_fault_tolerant, hopcoll_world_attribute)
from cython_kernels.mpi_channels cimport (
    CONTROL_IN, Node, World, clock_s, drain, fill_table, free_world, make_world, rest_since,
    settle, wait_request)
from cython_kernels.transport cimport Event, Transport

from mpi4py import MPI

cdef enum:
    LIBRARY_VERSION_BYTES = 16384
    SLICE_MS = 50              # how long a waiting constructor goes without looking for signals

cdef struct Duplication:
    MPI_Comm comm
    MPI_Request request


cdef int transport_error(const Transport* table, int* peer) noexcept nogil:
    cdef World* world = <World*>table.self
    if peer != NULL:
        peer[0] = world.error_peer
    return world.error_class


cdef int hello_exchange(Transport* table, unsigned char* answered, const unsigned char* hello,
                        int64_t hello_bytes, bint first, double until) noexcept nogil:
    """Sends the hello (the first time) and takes answers until all are there or time is up.

    Only the first message of a peer is taken; one that follows it belongs to the protocol.  Returns
    the number of peers without an answer, or minus the rank of a peer that failed, minus 1.
    """
    cdef World* world = <World*>table.self
    cdef int peer, complete, missing, place
    cdef double begin = clock_s()
    cdef Node* node
    if first:
        for peer in range(world.size):
            if peer != world.rank:
                table.send_control(world, peer, hello, hello_bytes, NULL, 0)
    while True:
        missing = 0
        # The table holds the oldest control receive of each peer, and hellos still under way.
        for place in range(world.active):
            node = world.nodes[place]
            if node.kind != CONTROL_IN or answered[node.peer]:
                continue
            peer = node.peer
            complete = 0
            if MPI_Test(&world.requests[place], &complete, &world.statuses[0]) != MPI_SUCCESS:
                return -1 - peer
            if not complete:
                missing += 1
                continue
            answered[peer] = 1
            settle(world, place, 0, &world.statuses[0])
        if missing == 0 or clock_s() >= until:
            return missing
        rest_since(begin)


@cython.final
cdef class MpiTransport:
    """One rank's end of the transport over MPI.

    Collective over `comm`, and blocking until every rank has been heard or the time is up.  The
    communicator is duplicated; the caller's stays as it is.  Every pair of ranks exchanges a hello
    in both directions, so that no connection has to be made later, when a peer may be dead.

    Parameters
    ----------
    comm : mpi4py.MPI.Comm
        An intracommunicator.
    control_bytes_max : int
        The longest control message, in bytes; keep it below the transport's eager limit.
    connect_timeout_s : float
        How long the first contacts may take together, in seconds.
    hello : bytes
        What this rank tells the others at first contact.

    Attributes
    ----------
    rank, size : int
    hellos : list of bytes
        What each rank said at first contact, by rank.
    fault_tolerant : bool
        Whether MPI reports deaths in this job; without it a death ends the job.
    library_version : str
        MPI's name and version.
    tag_max : int
        The largest tag that a data message may have.

    Raises
    ------
    TimeoutError
        Names the ranks that did not answer.
    ConnectionError
        A rank died before it answered.
    RuntimeError
        The kernels and mpi4py use different MPI libraries, or MPI failed.
    """

    def __init__(self, comm, control_bytes_max, connect_timeout_s, hello):
        cdef MPI_Comm handle
        cdef Duplication* duplication
        cdef double deadline
        cdef double slice_end
        cdef int complete = 0
        cdef int rc
        if self.world != NULL:
            raise RuntimeError("MpiTransport is initialised already")
        if not isinstance(comm, MPI.Intracomm):
            raise TypeError(f"comm: an intracommunicator is needed, not {type(comm).__name__}")
        if not isinstance(hello, bytes) or not len(hello) <= control_bytes_max <= 0x7FFFFFFF:
            raise ValueError("control_bytes_max: below 2 GiB and no less than the hello's length")
        self.library_version = check_library()
        handle = <MPI_Comm><uintptr_t>MPI._handleof(comm)
        deadline = clock_s() + connect_timeout_s
        # Not on the stack: after a timeout MPI may still write here, so that it is never freed.
        duplication = <Duplication*>calloc(1, sizeof(Duplication))
        if duplication == NULL:
            raise MemoryError("MpiTransport: no memory for the communicator")
        rc = MPI_Comm_idup(handle, &duplication.comm, &duplication.request)
        while rc == MPI_SUCCESS and not complete:
            slice_end = min(deadline, clock_s() + 1e-3 * SLICE_MS)
            with nogil:
                rc = wait_request(&duplication.request, &complete, slice_end)
            PyErr_CheckSignals()
            if rc == MPI_SUCCESS and not complete and clock_s() >= deadline:
                raise TimeoutError(
                    f"the communicator could not be duplicated within {connect_timeout_s} s: "
                    f"a rank of it has not called this")
        if rc != MPI_SUCCESS:
            raise RuntimeError(f"MPI_Comm_idup failed with error class {hopcoll_class(rc)}")
        MPI_Comm_set_errhandler(duplication.comm, MPI_ERRORS_RETURN)
        self.world = make_world(duplication.comm, control_bytes_max)
        free(duplication)
        if self.world == NULL or self.world.error_class == MPI_ERR_NO_MEM:
            raise MemoryError("MpiTransport: no memory for the control messages")
        fill_table(&self.table, self.world)
        self.fault_tolerant = hopcoll_fault_tolerant() != 0
        self.tag_max = hopcoll_world_attribute(MPI_TAG_UB, 32767)

        try:
            self.meet(hello, deadline, connect_timeout_s)
        except BaseException:
            self.close(0.1)
            raise

    cdef meet(self, bytes hello, double deadline, connect_timeout_s):
        """Exchanges hellos with every peer."""
        cdef bytearray answered = bytearray(self.table.size)
        cdef unsigned char* answered_bytes = answered
        cdef const unsigned char* hello_bytes = hello
        cdef int64_t hello_length = len(hello)
        cdef int64_t i
        cdef double slice_end
        cdef int missing = 1
        cdef bint first = True
        cdef Event event
        answered[self.table.rank] = 1
        while missing:
            slice_end = min(deadline, clock_s() + 1e-3 * SLICE_MS)
            with nogil:
                missing = hello_exchange(&self.table, answered_bytes, hello_bytes, hello_length,
                                         first, slice_end)
            first = False
            PyErr_CheckSignals()
            if missing < 0:
                raise ConnectionError(f"rank {-1 - missing} died before it was heard")
            if missing and clock_s() >= deadline:
                absent = [peer for peer in range(self.table.size) if not answered[peer]]
                raise TimeoutError(
                    f"ranks {absent} did not answer within {connect_timeout_s} s")
        self.hellos = [hello] * self.table.size
        for i in range(self.world.queue_count):
            self.table.poll(self.table.self, &event)
            self.hellos[event.peer] = event.payload[:event.nbytes]

    def __dealloc__(self):
        # MPI may still write into what open requests point at: without close() it stays.
        if self.world != NULL and self.world.closed == 2:
            free_world(self.world)

    @property
    def rank(self):
        return self.table.rank

    @property
    def size(self):
        return self.table.size

    @property
    def error_class(self):
        """MPI's class of the first error that no death explains; 0 when there was none. Local."""
        return self.world.error_class

    @property
    def error_peer(self):
        """The peer of that error; -1 when there is none. Local."""
        return self.world.error_peer

    def table_address(self):
        """Return the address of the C table of functions. Local; valid while the object lives."""
        return <uintptr_t>&self.table

    def close(self, timeout_s):
        """End all requests, or leave them to MPI when that takes longer than `timeout_s`.

        Local.  Waits for sends that are under way, then takes the posted receives back.  The
        duplicated communicator is not freed: MPI_Comm_free is collective, and would wait for the
        dead.  Afterwards the table's functions do nothing.

        Returns
        -------
        bool
            Whether every request ended.  When not, the memory of control messages stays allocated,
            and so must the memory of data requests that are still open.
        """
        cdef int finalized = 0
        cdef double until = clock_s() + timeout_s
        cdef bint ended
        if self.world.closed:
            return self.world.closed == 2
        self.world.closed = 1
        MPI_Finalized(&finalized)
        if finalized:
            return False
        with nogil:
            ended = drain(self.world, until)
        if ended:
            self.world.closed = 2
        return ended


cdef str check_library():
    """The version of the MPI that the kernels call; raises unless it is the one of mpi4py."""
    cdef char text[LIBRARY_VERSION_BYTES]
    cdef int length = 0
    cdef int initialized = 0
    MPI_Get_library_version(text, &length)
    ours = text[:length].decode("utf-8", "replace").rstrip("\0 \n")
    theirs = MPI.Get_library_version().rstrip("\0 \n")
    # Two copies of one version do not share their state: only the one in use is initialised.
    MPI_Initialized(&initialized)
    if ours != theirs or not initialized:
        raise RuntimeError(
            f"the kernels were built against {ours!r} but mpi4py runs on {theirs!r}; "
            f"build hopcoll with the mpicc of mpi4py's MPI (set MPICC), or choose the MPI with "
            f"MPI4PY_MPIABI or MPI4PY_LIBMPI")
    return ours
