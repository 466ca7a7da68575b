# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
"""Ranks that are late for a large Bcast, which its bytes need not pass through.

Each rank asks the one before it in the chain.  One that has not called the operation, and does not
within `patience_us`, says so (AWAY), and is gone around: who asked it asks the one before it.  It
asks for the bytes itself when it comes; whoever gives them to somebody already sends it on to that
one, so that it ends up behind the last of them and no link carries the bytes twice (Hoplite: a
location serves one receiver at a time).  It has given nobody anything by then, so that no circle
can close.  The rank before it does not wait to be asked, either: it shows what it called (CALLED),
and is complete.

In a tree who asks goes on to the next rank above, and a rank has place for as many as there are
right below it, or for one.  A circle can close there neither: who is sent on comes below a rank
whose way to the root stands, and a way that is still to be asked for leads upwards only.
"""
from libc.stdint cimport int32_t
from hopcoll._state cimport *
from hopcoll._plan cimport final_takers
from hopcoll._twins cimport twin_of
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


cdef bint is_asked(const Engine* engine, const Operation* op) noexcept nogil:
    """Whether the next ranks of a Bcast have shown that they called the same, or are late, and will
    see what we called.  A root needs nothing of others: without this, two of them would never
    notice each other.  Of two trees the second will do: all ranks are in it, and its block is never
    empty."""
    cdef int takers[2]
    cdef int i
    for i in range(final_takers(engine, op, op.blocks - 1, takers)):
        if not mask_has(&op.asked, takers[i]) and not mask_has(&op.told, takers[i]):
            return False
    return True


cdef bint awaits_us(const Engine* engine, const Operation* op) noexcept nogil:
    """Whether others wait in a Bcast of another root for us to call it."""
    return (not op.called and op.early >= 0 and op.sig_from >= 0 and op.sig.kind == BCAST
            and op.sig.root != engine.rank)


cdef void tell_away(Engine* engine, Operation* op, int32_t index, int behind) noexcept nogil:
    """The stream that was asked for is given by another rank."""
    cdef const Outlet* outlet = &engine.outlets[index]
    cdef AwayBody body
    body.tag = outlet.spring.tag
    body.behind = behind
    send_message(engine, outlet.spring.dest, MSG_AWAY, op.seq, &outlet.sig, &body, sizeof(body))
    close_outlet(engine, op, index)


cdef int places(const Engine* engine, const Operation* op, int b) noexcept nogil:
    """How many ranks we give a block to at once before others are sent on to them."""
    cdef const Twin* twin
    if not op.twins:
        return 1
    twin = twin_of(engine, op, b)
    return 2 if twin.child[0] >= 0 and twin.child[1] >= 0 else 1


cdef bint send_behind(Engine* engine, Operation* op, int32_t index) noexcept nogil:
    """Sends who came late to a rank that we are giving our bytes to, if there are as many as we
    have below us (or one)."""
    cdef const Outlet* late = &engine.outlets[index]
    cdef const Outlet* other
    cdef int32_t i
    cdef int room
    if (op.sig.kind != BCAST or not late.attached or late.phase != FINAL_PHASE
            or late.epoch != engine.epoch):
        return False
    room = places(engine, op, late.block)
    i = op.block[late.block].outlets[<int>FINAL_PHASE]
    while i >= 0:
        other = &engine.outlets[i]
        if (other.spring.dest != late.spring.dest and other.epoch == engine.epoch
                and other.spring.next < other.spring.end):
            room -= 1
            if room == 0:
                tell_away(engine, op, index, other.spring.dest)
                return True
        i = other.next
    return False


cdef void send_around(Engine* engine, Operation* op) noexcept nogil:
    """Others ask us for a Bcast that we have not called: they had better ask somebody else."""
    cdef int32_t index = op.early, next
    cdef const Outlet* outlet
    while index >= 0:
        outlet = &engine.outlets[index]
        next = outlet.next
        if outlet.epoch == engine.epoch and outlet.phase == FINAL_PHASE:
            tell_away(engine, op, index, -1)
        index = next
