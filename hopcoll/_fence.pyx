# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
"""Kills ranks of this host that no longer answer.

A stopped process may be continued at any time, and would write where its messages were expected.
A death is better than a suspicion: it is certain, MPI tells everyone of it, and what was open with
the rank ends.  A process is named by a descriptor (pidfd_open, Linux 5.3), so that no other one
that got its number later can be meant.
"""
import os

from libc.stdint cimport int32_t
from libc.stdlib cimport calloc, free
from posix.unistd cimport close

cdef extern from *:
    """
    #include <signal.h>
    #include <sys/syscall.h>
    #include <unistd.h>
    #ifndef SYS_pidfd_send_signal
    #define SYS_pidfd_send_signal 424
    #endif
    static inline int hopcoll_kill(int pidfd) {
        return (int)syscall(SYS_pidfd_send_signal, pidfd, SIGKILL, (void *)0, 0);
    }
    """
    int hopcoll_kill(int pidfd) nogil


cdef void fence_rank(void* context, int rank) noexcept nogil:
    """Kills a rank, if it is of this host; an error means that it has ended."""
    cdef Targets* targets = <Targets*>context
    if 0 <= rank < targets.size and targets.pidfds[rank] >= 0:
        hopcoll_kill(targets.pidfds[rank])


cdef class Fence:
    """The processes of the ranks of this host.

    Attributes
    ----------
    host : bytes
        Ranks that have the same can kill each other.
    hello : bytes
        What the others need: `host` and the number of this process.
    """

    def __init__(self):
        with open("/proc/sys/kernel/random/boot_id", "rb") as file:
            boot = file.read().strip()
        # One machine may play several hosts, each with a network of its own.
        self.host = b"%s/%d/%d/%d" % (boot, os.stat("/proc/self/ns/pid").st_ino,
                                      os.stat("/proc/self/ns/net").st_ino, os.getuid())
        self.hello = b"%s %d" % (self.host, os.getpid())

    def connect(self, hellos):
        """Learn who is of this host. Local.

        Parameters
        ----------
        hellos : list of bytes
            Of all ranks, by rank.
        """
        cdef int rank
        self.targets.pidfds = <int32_t*>calloc(len(hellos), sizeof(int32_t))
        if self.targets.pidfds == NULL:
            raise MemoryError("fence: no memory for the ranks of this host")
        self.targets.size = len(hellos)
        for rank, hello in enumerate(hellos):
            self.targets.pidfds[rank] = -1
            host, _, pid = hello.rpartition(b" ")
            if host == self.host and int(pid) != os.getpid():
                try:
                    self.targets.pidfds[rank] = os.pidfd_open(int(pid))
                except OSError:
                    pass          # it has died, or the kernel is too old for this

    def numbers(self, hellos):
        """Return a number for each rank that only ranks of one host share. Local."""
        hosts = {}
        return [hosts.setdefault(hello.rpartition(b" ")[0], len(hosts)) for hello in hellos]

    def __dealloc__(self):
        cdef int rank
        if self.targets.pidfds != NULL:
            for rank in range(self.targets.size):
                if self.targets.pidfds[rank] >= 0:
                    close(self.targets.pidfds[rank])
        free(self.targets.pidfds)
