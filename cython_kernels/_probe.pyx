# cython: language_level=3
"""Any transport's table of functions, one call at a time from Python: what its contract is tested
with."""
cimport cython
from libc.stdint cimport int64_t, uintptr_t

from cython_kernels.transport cimport (
    Transport, Event, EVENT_CONTROL, EVENT_SENT, EVENT_RECEIVED, EVENT_LOST, EVENT_DEAD)

NAMES = {EVENT_CONTROL: "control", EVENT_SENT: "sent", EVENT_RECEIVED: "received",
         EVENT_LOST: "lost", EVENT_DEAD: "dead"}


@cython.final
cdef class Probe:
    """Python's hand on a transport.

    Parameters
    ----------
    owner : object
        Has a method ``table_address()``: the address of its ``Transport`` struct as an int.
    """

    cdef Transport* table
    cdef object owner
    cdef dict borrowed         # token -> memoryview, until the event that names the token

    def __init__(self, owner):
        self.table = <Transport*><uintptr_t>owner.table_address()
        self.owner = owner
        self.borrowed = {}

    @property
    def rank(self):
        return self.table.rank

    @property
    def size(self):
        return self.table.size

    @property
    def control_bytes_max(self):
        return self.table.control_bytes_max

    @property
    def open_count(self):
        """How many data requests wait for their event."""
        return len(self.borrowed)

    def send_control(self, int dest, const unsigned char[::1] head not None, body=b""):
        """Send head and body as one control message."""
        cdef const unsigned char[::1] rest = body
        self.table.send_control(self.table.self, dest, &head[0] if len(head) else NULL, len(head),
                                &rest[0] if len(rest) else NULL, len(rest))

    def send_data(self, int dest, int tag, const unsigned char[::1] data not None, int64_t token):
        """Send a data message; `data` is kept until its event."""
        self.borrow(token, data)
        self.table.send_data(self.table.self, dest, tag, &data[0] if len(data) else NULL,
                             len(data), token)

    def recv_data(self, int source, int tag, unsigned char[::1] data not None, int64_t token):
        """Post a receive; `data` is kept until its event."""
        self.borrow(token, data)
        self.table.recv_data(self.table.self, source, tag, &data[0] if len(data) else NULL,
                             len(data), token)

    cdef borrow(self, int64_t token, memory):
        if token in self.borrowed:
            raise ValueError(f"token: {token} names an open request")
        self.borrowed[token] = memory

    def poll(self):
        """Return the next event, or None.

        ``("control", peer, bytes)``, ``("sent", peer, token)``,
        ``("received", peer, token, nbytes)``, ``("lost", peer, token)`` or ``("dead", peer)``.
        """
        cdef Event event
        if not self.table.poll(self.table.self, &event):
            return None
        name = NAMES[event.kind]
        if event.kind == EVENT_DEAD:
            return name, event.peer
        if event.kind == EVENT_CONTROL:
            return name, event.peer, event.payload[:event.nbytes]
        del self.borrowed[event.token]     # KeyError: a second event for one token
        if event.kind == EVENT_RECEIVED:
            return name, event.peer, event.token, event.nbytes
        return name, event.peer, event.token
