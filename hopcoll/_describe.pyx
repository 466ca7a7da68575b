# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
"""What the ranks of a simulated world are at, in words: for the reader of a violation."""
from libc.stdint cimport int64_t
from hopcoll._state cimport *
from hopcoll._network cimport Port
from hopcoll._world cimport *


cdef list ranks_in(const Mask* mask, int size):
    return [r for r in range(size) if mask_has(mask, r)]


cdef list describe_operation(const Engine* e, const Operation* op):
    cdef const Block* block
    cdef const Sink* sink
    cdef int b, phase
    out = [f"    operation {op.seq}: called {op.called} attempt {op.attempt} status {op.status} "
           f"complete {op.complete} standing {op.standing} in flight {op.in_flight} "
           f"{op.in_flight_retained} have {ranks_in(&op.have, e.size)} awaited {op.awaited} "
           f"rolled {op.rolled} in {op.roll_attempt} {ranks_in(&op.roll, e.size)} arrived "
           f"{ranks_in(&op.arrived, e.size)} forgotten {op.forgotten} carry {op.takes_carry} "
           f"whole {op.whole} told {op.whole_told} in {op.whole_epoch} wholes "
           f"{ranks_in(&op.wholes, e.size)} in {op.wholes_epoch} holders "
           f"{[op.holder[b] for b in range(BLOCKS_MAX)]}"]
    for b in range(op.blocks):
        block = &op.block[b]
        states = "".join(str(op.states[block.state + c]) for c in range(block.grid.chunks))
        out.append(f"        block {b}: {block.start} to {block.dest} epoch {block.epoch} "
                   f"finals {block.finals} states {states} "
                   f"in flight {block.in_flight} behind {block.behind} taken {block.taken}")
        for phase in range(PHASES):
            sink = &block.sink[phase]
            if sink.tag:
                name = ("partial", "final", "right")[phase]
                out.append(f"            {name} from {sink.source}: "
                           f"open {sink.open} broken {sink.broken} {sink.first}..{sink.end} "
                           f"arrived {sink.arrived} posted {sink.posted} told {sink.told}")
    return out


cdef list describe(World* world):
    """What each rank is at, for the reader of a violation."""
    cdef int r, k
    cdef int64_t seq
    cdef Engine* e
    cdef Port* port
    cdef Rank* one
    cdef const Outlet* outlet
    out = []
    for r in range(world.size):
        one = &world.ranks[r]
        e = one.engine
        port = &world.network.ports[r]
        life = ("dead" if port.dead else "gone" if port.left
                else "leaving" if one.leaving else "here")
        out.append(f"rank {r}: {life} epoch {e.epoch} suspecting {e.suspecting} promised "
                   f"{ballot_round(e.promised)}.{ballot_rank(e.promised)} frozen {e.frozen} "
                   f"stage {e.stage} answered {ranks_in(&e.answered, e.size)} silent "
                   f"{ranks_in(&e.silent, e.size)} stopped {e.stopped} called "
                   f"{e.next_seq} done {e.done} finished "
                   f"{e.finished} stable {e.stable} freed {e.freed} outlets "
                   f"{e.outlets_used} broken {e.broken} peers "
                   f"{[e.peer_done[k] for k in range(e.size if e.peer_done != NULL else 0)]} "
                   f"below {[e.below_done[k] for k in range(e.flow.children)]} knows dead "
                   f"{ranks_in(&e.dead, e.size)} left {ranks_in(&e.left, e.size)} posted "
                   f"{port.posted_count} late {port.late_count} memory "
                   f"{port.region.live_bytes - one.baseline_bytes}")
        for k in range(e.epoch):
            out.append(f"    epoch {k + 1}: from operation {e.history[k].cut}, kind "
                       f"{e.history[k].kind}, {ranks_in(&e.history[k].members, e.size)}")
        for k in range(one.checked):
            out.append(f"    returned {k}: status {one.results[k].status} epoch "
                       f"{one.results[k].epoch} contributors "
                       f"{ranks_in(&one.results[k].contributors, e.size)}")
        for k in range(e.outlets_made):
            outlet = &e.outlets[k]
            if outlet.used:
                out.append(f"    outlet {k}: operation {outlet.seq} block {outlet.block} phase "
                           f"{outlet.phase} epoch {outlet.epoch} early {outlet.early} to "
                           f"{outlet.spring.dest} tag {outlet.spring.tag} next "
                           f"{outlet.spring.next} limit {outlet.spring.limit} end "
                           f"{outlet.spring.end} in flight {outlet.spring.in_flight}")
        for seq in range(e.freed, e.freed + e.settings.ring):
            if find_operation(e, seq) != NULL:
                out.extend(describe_operation(e, find_operation(e, seq)))
    return out
