# cython: language_level=3
"""The MPI that the transport calls. Own declarations: building needs no other package's."""

cdef extern from "cython_kernels/mpi_calls.h":
    ctypedef struct _hopcoll_comm:
        pass
    ctypedef _hopcoll_comm* MPI_Comm
    ctypedef struct _hopcoll_request:
        pass
    ctypedef _hopcoll_request* MPI_Request
    ctypedef struct _hopcoll_datatype:
        pass
    ctypedef _hopcoll_datatype* MPI_Datatype
    ctypedef struct _hopcoll_errhandler:
        pass
    ctypedef _hopcoll_errhandler* MPI_Errhandler
    ctypedef struct MPI_Status:
        int MPI_ERROR

    const int MPI_SUCCESS, MPI_ERR_IN_STATUS, MPI_ERR_NO_MEM, MPI_ERR_COUNT, MPI_TAG_UB
    MPI_Request MPI_REQUEST_NULL
    MPI_Datatype MPI_BYTE
    MPI_Errhandler MPI_ERRORS_RETURN
    MPI_Status* MPI_STATUS_IGNORE

    int MPI_Initialized(int*) nogil
    int MPI_Finalized(int*) nogil
    int MPI_Get_library_version(char*, int*) nogil
    int MPI_Comm_idup(MPI_Comm, MPI_Comm*, MPI_Request*) nogil
    int MPI_Comm_set_errhandler(MPI_Comm, MPI_Errhandler) nogil
    int MPI_Comm_rank(MPI_Comm, int*) nogil
    int MPI_Comm_size(MPI_Comm, int*) nogil
    int MPI_Isend(const void*, int, MPI_Datatype, int, int, MPI_Comm, MPI_Request*) nogil
    int MPI_Irecv(void*, int, MPI_Datatype, int, int, MPI_Comm, MPI_Request*) nogil
    int MPI_Test(MPI_Request*, int*, MPI_Status*) nogil
    int MPI_Testsome(int, MPI_Request*, int*, int*, MPI_Status*) nogil
    int MPI_Get_count(const MPI_Status*, MPI_Datatype, int*) nogil
    int MPI_Cancel(MPI_Request*) nogil
    int MPI_Request_free(MPI_Request*) nogil

    int hopcoll_class(int code) nogil
    int hopcoll_class_is_death(int error_class) nogil
    int hopcoll_peer_failed(MPI_Comm, int peer) nogil
    int hopcoll_world_attribute(int key, int missing) nogil
    int hopcoll_fault_tolerant() nogil
    void hopcoll_progress() nogil
    long long hopcoll_coarse_clock() nogil
