# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
"""Ranks that are late for a large Bcast, which its bytes need not pass through.

Each rank asks the one before it in the chain.  One that has not called the operation, and does not
within `patience_us`, says so (AWAY), and is gone around: who asked it asks the one before it.  It
asks for the bytes itself when it comes.  The rank before it does not wait to be asked, either: it
shows what it called (CALLED), and is complete.
"""
from libc.stdint cimport int32_t
from hopcoll._state cimport *
from hopcoll._records cimport send_message
from hopcoll._streams cimport close_outlet


cdef void wait_patiently(Engine* engine, Operation* op) noexcept nogil:
    """From now on, for so long."""
    if op.asked_us == 0:
        op.asked_us = engine.now_us + 1
    if engine.patience_us == 0 or op.asked_us + engine.settings.patience_us < engine.patience_us:
        engine.patience_us = op.asked_us + engine.settings.patience_us


cdef bint is_over(const Engine* engine, const Operation* op) noexcept nogil:
    return op.asked_us and engine.now_us - op.asked_us >= engine.settings.patience_us


cdef bint awaits_us(const Engine* engine, const Operation* op) noexcept nogil:
    """Whether others wait in a Bcast of another root for us to call it."""
    return (not op.called and op.early >= 0 and op.sig_from >= 0 and op.sig.kind == BCAST
            and op.sig.root != engine.rank)


cdef void send_around(Engine* engine, Operation* op) noexcept nogil:
    """Others ask us for a Bcast that we have not called: they had better ask somebody else."""
    cdef int32_t index = op.early, next
    cdef const Outlet* outlet
    cdef AwayBody body
    while index >= 0:
        outlet = &engine.outlets[index]
        next = outlet.next
        if outlet.epoch == engine.epoch and outlet.phase == FINAL_PHASE:
            body.tag = outlet.spring.tag
            body.pad = 0
            send_message(engine, outlet.spring.dest, MSG_AWAY, op.seq, &outlet.sig, &body,
                         sizeof(body))
            close_outlet(engine, op, index)
        index = next
