# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
"""A bell that wakes the idle progress thread of another rank on this host.

A thread that looks for messages which seldom come pays for every look: a timer's wake alone costs
5 us on a plain machine and 30 us in a virtual one, so that 2 ms between two looks can cost more
than 1% of a core.  Between ranks of one host, whoever writes to a rank that may be asleep rings,
and the thread sleeps on its bell.  The bell is a datagram socket of Linux's abstract namespace: it
needs no file, and goes with its process.

A ring carries nothing, and may be lost: it shortens a wait that has an end anyway.
"""
import os
import secrets
import socket

from libc.stdint cimport int64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy

cdef extern from "<sys/socket.h>" nogil:
    cdef struct sockaddr:
        pass
    ssize_t sendto(int, const void*, size_t, int, const sockaddr*, socklen_t)
    ssize_t recv(int, void*, size_t, int)
    int AF_UNIX
    int MSG_DONTWAIT

cdef extern from "<poll.h>" nogil:
    cdef struct pollfd:
        int fd
        short events
        short revents
    int poll(pollfd*, unsigned long, int)
    short POLLIN

cdef extern from "<unistd.h>" nogil:
    int close(int)

cdef extern from "<time.h>" nogil:
    cdef struct timespec:
        long tv_sec
        long tv_nsec
    int clock_gettime(int, timespec*)
    int CLOCK_MONOTONIC

cdef enum:
    #: A thread sleeps only when it has seen no message for longer than this.
    AWAKE_US = 1000


cdef void bell_ring(Bell* bell, int peer) noexcept nogil:
    """Wakes a peer, whatever it does. Local, a system call of some microseconds."""
    cdef char nothing = 0
    if bell.length[peer]:
        sendto(bell.fd, &nothing, 1, MSG_DONTWAIT, <const sockaddr*>&bell.address[peer],
               bell.length[peer])


cdef void bell_written(Bell* bell, int peer) noexcept nogil:
    """A message to this peer is on its way: rings unless an earlier one keeps it awake."""
    cdef timespec now
    cdef int64_t now_us
    clock_gettime(CLOCK_MONOTONIC, &now)
    now_us = <int64_t>now.tv_sec * 1000000 + now.tv_nsec // 1000
    if now_us - bell.written_us[peer] > AWAKE_US:
        bell_ring(bell, peer)
    bell.written_us[peer] = now_us


cdef bint bell_wait(Bell* bell, int64_t timeout_us) noexcept nogil:
    """Sleeps until somebody rings; False when the time is over."""
    cdef pollfd entry
    cdef char nothing
    entry.fd = bell.fd
    entry.events = POLLIN
    entry.revents = 0
    if poll(&entry, 1, <int>((timeout_us + 999) // 1000)) <= 0:
        return False
    while recv(bell.fd, &nothing, 1, MSG_DONTWAIT) >= 0:
        pass
    return True


cdef class Doorbell:
    """One rank's bell, and the way to those of its peers.

    Attributes
    ----------
    name : bytes
        Its address, for the peers.
    host : bytes
        Who has the same can ring it.
    """

    def __cinit__(self):
        self.bell.fd = -1

    def __init__(self):
        self.name = f"\0hopcoll.{os.getpid()}.{secrets.token_hex(8)}".encode()
        kind = socket.SOCK_DGRAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC
        with socket.socket(socket.AF_UNIX, kind) as bound:
            bound.bind(self.name)
            self.bell.fd = bound.detach()
        with open("/proc/sys/kernel/random/boot_id", "rb") as file:
            boot = file.read().strip()
        # Abstract names belong to a network namespace, of which a host may have many.
        self.host = b"%s/%d" % (boot, os.stat("/proc/self/ns/net").st_ino)

    def connect(self, names):
        """Learn the addresses of all peers, by rank. Local.

        Parameters
        ----------
        names : list of bytes
            Empty for a rank without a bell.
        """
        cdef int peer
        cdef bytes name
        cdef sockaddr_un* address
        if self.bell.size:
            raise RuntimeError("the doorbell is connected already")
        self.bell.size = len(names)
        self.bell.written_us = <int64_t*>calloc(len(names), sizeof(int64_t))
        self.bell.address = <sockaddr_un*>calloc(len(names), sizeof(sockaddr_un))
        self.bell.length = <socklen_t*>calloc(len(names), sizeof(socklen_t))
        if (self.bell.written_us == NULL or self.bell.address == NULL
                or self.bell.length == NULL):
            raise MemoryError("doorbell: no memory for the addresses")
        for peer, name in enumerate(names):
            address = &self.bell.address[peer]
            if 0 < len(name) <= sizeof(address.sun_path):
                address.sun_family = AF_UNIX
                memcpy(address.sun_path, <const char*>name, len(name))
                self.bell.length[peer] = sizeof(address.sun_family) + len(name)

    def ring(self, int peer):
        """Wake a peer. Local, never blocks; without effect when it is gone or has no bell."""
        if not 0 <= peer < self.bell.size:
            raise IndexError(f"peer must be from 0 to {self.bell.size - 1}, not {peer}")
        with nogil:
            bell_ring(&self.bell, peer)

    def wait(self, timeout_s):
        """Sleep until somebody rings. Local; rounds up to milliseconds.

        Returns
        -------
        bool
            False when the time is over.
        """
        cdef int64_t timeout_us = <int64_t>(timeout_s * 1e6)
        cdef bint rung
        with nogil:
            rung = bell_wait(&self.bell, timeout_us)
        return rung

    def __dealloc__(self):
        if self.bell.fd >= 0:
            close(self.bell.fd)
        free(self.bell.written_us)
        free(self.bell.address)
        free(self.bell.length)
