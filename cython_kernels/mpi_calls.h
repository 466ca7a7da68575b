/* What Cython cannot say about MPI: the parts that only some MPIs have. */
#ifndef HOPCOLL_MPI_CALLS_H
#define HOPCOLL_MPI_CALLS_H

#include <mpi.h>
#include <time.h>
#if defined(OPEN_MPI)
#include <mpi-ext.h>
#endif
#if !defined(CLOCK_MONOTONIC_COARSE)
#define CLOCK_MONOTONIC_COARSE CLOCK_MONOTONIC
#endif

static inline int hopcoll_class(int code)
{
    int error_class = code;
    if (code != MPI_SUCCESS) MPI_Error_class(code, &error_class);
    return error_class;
}

/* Whether an error of this class means by itself that the peer is dead. */
static inline int hopcoll_class_is_death(int error_class)
{
#if defined(MPIX_ERR_PROC_FAILED)
    return error_class == MPIX_ERR_PROC_FAILED;
#else
    return 0;
#endif
}

/* Whether MPI counts the rank among the dead; local, and never wrong about "yes". */
static inline int hopcoll_peer_failed(MPI_Comm comm, int peer)
{
#if defined(OMPI_HAVE_MPIX_COMM_GET_FAILED)
    MPI_Group failed, all;
    int place = MPI_UNDEFINED;
    if (MPIX_Comm_get_failed(comm, &failed) != MPI_SUCCESS) return 0;
    if (MPI_Comm_group(comm, &all) == MPI_SUCCESS) {
        MPI_Group_translate_ranks(all, 1, &peer, failed, &place);
        MPI_Group_free(&all);
    }
    MPI_Group_free(&failed);
    return place != MPI_UNDEFINED;
#else
    return 0;
#endif
}

/* An attribute of the whole job: MPI attaches it to the world, and only there. */
static inline int hopcoll_world_attribute(int key, int missing)
{
    int *value = NULL, found = 0;
    if (MPI_Comm_get_attr(MPI_COMM_WORLD, key, &value, &found) != MPI_SUCCESS) return missing;
    return found && value ? *value : missing;
}

static inline int hopcoll_fault_tolerant(void)
{
#if defined(MPIX_FT)
    return hopcoll_world_attribute(MPIX_FT, 0);
#else
    return 0;
#endif
}

/* Lets MPI take in what has arrived; a probe of oneself finds nothing and touches no peer. */
static inline void hopcoll_progress(void)
{
    int found;
    MPI_Iprobe(MPI_ANY_SOURCE, MPI_ANY_TAG, MPI_COMM_SELF, &found, MPI_STATUS_IGNORE);
}

static inline long long hopcoll_coarse_clock(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC_COARSE, &now);
    return now.tv_sec * 1000000000LL + now.tv_nsec;
}

#endif
