# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
"""What a rank can say of itself when it is late, and the report of those that wait for it.

The engine's answers come from its progress thread, which has no GIL.  A Python stack needs it: one
thread of Python's (`hopcoll._report`) sleeps on a pipe for that, and gets the GIL as long as the
program runs Python.  Whoever calls these functions holds the engine's lock.
"""
from libc.stdint cimport int64_t
from libc.stdlib cimport free, malloc
from libc.string cimport memcpy
from posix.unistd cimport close, write
from hopcoll._state cimport *
from hopcoll._records cimport send_message
from hopcoll._texts cimport signature_text
from hopcoll._trace cimport Trace, trace_stack


cdef void say_where(void* context, WhereBody* out) noexcept nogil:
    cdef Lookout* lookout = <Lookout*>context
    out.inside = lookout.inside > 0
    out.since_us = lookout.changed_us      # the engine knows the time


cdef void want_stack(void* context, int asker) noexcept nogil:
    cdef Lookout* lookout = <Lookout*>context
    mask_add(&lookout.askers, asker)
    write(lookout.fd, b"s", 1)


cdef void keep_stack(void* context, int rank, const unsigned char* text,
                     int64_t nbytes) noexcept nogil:
    cdef Lookout* lookout = <Lookout*>context
    free(lookout.stacks[rank])
    lookout.stacks[rank] = <char*>malloc(nbytes + 1)
    lookout.lengths[rank] = nbytes if lookout.stacks[rank] != NULL else 0
    if lookout.stacks[rank] != NULL:
        memcpy(lookout.stacks[rank], text, nbytes)


cdef void report_due(void* context) noexcept nogil:
    write((<Lookout*>context).fd, b"r", 1)


cdef void look_out(Lookout* lookout, Engine* engine) noexcept nogil:
    """Has the engine ask us; `fd` is open."""
    engine.where_context = lookout
    engine.where = say_where
    engine.want_stack = want_stack
    engine.keep_stack = keep_stack
    engine.report = report_due


cdef void close_lookout(Lookout* lookout) noexcept nogil:
    cdef int r
    if lookout.fd >= 0:
        close(lookout.fd)
        lookout.fd = -1
    for r in range(RANKS_MAX):
        free(lookout.stacks[r])
        lookout.stacks[r] = NULL


cdef void give_stack(Lookout* lookout, Engine* engine, Trace* trace, bytes text):
    """Our stack, to all who asked for it."""
    cdef int r
    cdef const unsigned char* data
    text = text[-(engine.transport.control_bytes_max - <int64_t>sizeof(Head)):]
    data = text
    for r in range(engine.size):
        if not mask_has(&lookout.askers, r):
            continue
        mask_drop(&lookout.askers, r)
        if r == engine.rank:
            keep_stack(lookout, r, data, len(text))
        elif not is_gone(engine, r):
            if trace != NULL:
                trace_stack(trace, r, len(text))
            send_message(engine, r, MSG_STACK, engine.done, NULL, data, len(text))


cdef dict late_report(Lookout* lookout, Engine* engine):
    """Who is where, of all that were asked: what `hopcoll._report` puts into words."""
    cdef Late* late = &engine.late
    cdef const Operation* op = find_operation(engine, late.seq)
    cdef const WhereBody* where
    cdef Mask out = gone(engine)
    cdef int r
    ranks = {}
    for r in range(engine.size):
        if mask_has(&out, r):
            continue
        where = &engine.wheres[r]
        one = ranks[r] = {"answers": bool(mask_has(&late.replied, r)), "stack": ""}
        if one["answers"]:
            one |= {"called": where.called, "inside": bool(where.inside),
                    "since_s": where.since_us / 1e6}
        if lookout.stacks[r] != NULL:
            one["stack"] = lookout.stacks[r][:lookout.lengths[r]].decode("utf-8", "replace")
            free(lookout.stacks[r])
            lookout.stacks[r] = NULL
    return {"seq": late.seq, "ranks": ranks,
            "what": signature_text(&op.sig, late.seq) if op != NULL and op.sig_from >= 0 else ""}


cdef list flight_of(Engine* engine):
    """The last operations, and those under way: what the flight recorder writes."""
    cdef const Flight* flight
    cdef const Operation* op
    cdef int64_t seq
    out = []
    for seq in range(max(0, engine.done - FLIGHTS), engine.next_seq):
        op = find_operation(engine, seq)
        flight = &engine.flight[seq % FLIGHTS]
        if seq < engine.done and flight.seq == seq:
            out.append({"operation": seq, "what": signature_text(&flight.sig, seq),
                        "called_us": flight.called_us, "done_us": flight.done_us,
                        "moved_bytes": flight.moved_bytes, "epoch": flight.attempt,
                        "status": flight.status})
        elif op != NULL and op.called:
            out.append({"operation": seq, "what": signature_text(&op.sig, seq),
                        "called_us": op.called_us, "done_us": None,
                        "moved_bytes": op.moved_bytes, "epoch": op.attempt,
                        "complete": bool(op.complete), "chunks_awaited": op.awaited,
                        "status": op.status})
    return out
