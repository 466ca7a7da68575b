# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
"""The checkers of a simulated world: what a user may rely on, apart from how the protocol goes
about it."""
from libc.stdint cimport int64_t, uint64_t
from libc.string cimport memset
from hopcoll._state cimport *
from hopcoll._plan cimport is_for_root, is_from_root
from hopcoll._script cimport *
from hopcoll._tree cimport is_flat
from hopcoll._world cimport *

cdef enum:
    GARBAGE = 0xA5


cdef void report(World* world, int violation, int rank, int step) noexcept nogil:
    if world.violation == FINE:
        world.violation = violation
        world.blamed_rank = rank
        world.blamed_step = step


cdef void check_value(World* world, int rank, int k) noexcept nogil:
    """The bytes are those of the contributors, each once; the input is as it was."""
    cdef Rank* one = &world.ranks[rank]
    cdef const Result* result = &one.results[k]
    cdef const Step* step = step_of(world, rank, k)
    cdef uint64_t expected, who = result.contributors.word[0]
    cdef int64_t i, count, at = 0
    cdef int r
    cdef bint in_place = step.flags & FLAG_IN_PLACE and has_result(world, rank, step)
    if result.status == STATUS_OK and has_result(world, rank, step):
        if step.kind == GATHER or step.kind == ALLGATHER or step.kind == ALLTOALL:
            for r in range(world.size):
                count = pair_count(step, r, rank)
                for i in range(count):
                    expected = copy_item(k, r, rank if step.kind == ALLTOALL else 0, i) \
                        if mask_has(&result.contributors, r) else 0
                    if one.recv[k][at + i] != expected:
                        report(world, WRONG_VALUE, rank, k)
                at += count
        elif step.kind == SCATTER:
            for i in range(0 if in_place and rank == step.root
                           else pair_count(step, step.root, rank)):
                if one.recv[k][i] != copy_item(k, step.root, rank, i):
                    report(world, WRONG_VALUE, rank, k)
        else:
            count = step.count
            if step.kind == REDUCE_SCATTER:
                count = pair_count(step, 0, rank)
                at = items_before(step, rank, rank)
            elif step.kind == SCAN:
                who &= ~<uint64_t>0 >> (63 - rank)
            elif step.kind == EXSCAN:
                who &= ((<uint64_t>1) << rank) - 1
                if who == 0:
                    count = 0           # nobody is before it: undefined
            for i in range(count):
                if step.flags & FLAG_CARRY:
                    expected = 0
                    for r in range(world.size):
                        if who >> r & 1:
                            expected += carried_sum(world, r, k, i)
                elif step.kind == BCAST:
                    expected = bcast_item(k, step.root, i)
                elif step.flags & STEP_MIXED:
                    if not has_brackets(world, step):
                        break
                    expected = mixed_item(world, step, k, &result.contributors, i)
                else:
                    expected = rotate(who, at + i)
                if one.recv[k][i] != expected:
                    report(world, WRONG_VALUE, rank, k)
    if not in_place or step.kind == SCATTER:
        for i in range(send_items(step, world.size, rank) if step.kind != BCAST else 0):
            if one.send[k][i] != input_item(step, world.size, rank, k, i):
                report(world, INPUT_CHANGED, rank, k)


cdef void check_status(World* world, int rank, int k) noexcept nogil:
    """The status follows from who is dead, and from what was raised before."""
    cdef Rank* one = &world.ranks[rank]
    cdef const Result* result = &one.results[k]
    cdef const Step* step = step_of(world, rank, k)
    cdef Mask before = mask_full(world.size)
    cdef bint shrank
    cdef int i, r
    for i in range(k):
        if step_of(world, rank, i).flags & FLAG_RAISE:
            before = one.results[i].contributors
    shrank = step.flags & FLAG_RAISE and not mask_equal(&before, &result.contributors)
    if result.status == STATUS_STOPPED:
        if not one.engine.stopped:
            report(world, WRONG_STATUS, rank, k)
        elif not world.silence:
            report(world, LEFT_THE_HEALTHY, rank, k)
        return
    if result.status == STATUS_MISMATCH:
        if world.odd_rank < 0 or k < world.odd_step:
            report(world, WRONG_STATUS, rank, k)
        return
    if k and one.results[k - 1].status == STATUS_MISMATCH:
        report(world, WRONG_STATUS, rank, k)
    if result.status == STATUS_MISSED:
        if not step.flags & FLAG_PARTIAL:
            report(world, WRONG_STATUS, rank, k)
        return
    if shrank != (result.status == STATUS_RANK_FAILED) and not (
            is_from_root(step.kind) and not mask_has(&result.contributors, step.root)):
        report(world, RAISED_WRONGLY, rank, k)
    if is_from_root(step.kind) and not shrank:
        if (result.status == STATUS_RANK_FAILED) == mask_has(&result.contributors, step.root):
            report(world, WRONG_STATUS, rank, k)
    if result.status == STATUS_ROOT_LOST and (
            not is_for_root(step.kind) or mask_has(&result.contributors, step.root)):
        report(world, WRONG_STATUS, rank, k)
    if result.status == STATUS_RANK_FAILED:
        if mask_empty(&result.failed):
            report(world, RAISED_WRONGLY, rank, k)
        for r in range(world.size):
            if (mask_has(&result.failed, r) and is_here(world, r) and not world.ranks[r].leaving
                    and not is_disturbed(world, r)):
                report(world, RAISED_WRONGLY, rank, k)
    if step.flags & FLAG_PARTIAL:
        check_quorum(world, rank, k)
        return
    for r in range(world.size):
        # What a rank that left had called is stable: it stays in.
        if (not mask_has(&result.contributors, r) and not world.network.ports[r].dead
                and not is_disturbed(world, r) and not (
                    world.ranks[r].leaving and (k >= world.ranks[r].steps
                                                or world.ranks[r].engine.stopped))):
            report(world, LIVING_LEFT_OUT, rank, k)
    for i in range(k - 1, -1, -1):
        if step_of(world, rank, i).flags & FLAG_PARTIAL:
            continue
        if not mask_within(&result.contributors, &one.results[i].contributors):
            report(world, CONTRIBUTORS_GREW, rank, k)
        break


cdef void check_quorum(World* world, int rank, int k) noexcept nogil:
    """As many contributors as were asked for, or all that there are; in time: at least one."""
    cdef const Result* result = &world.ranks[rank].results[k]
    cdef const Step* step = step_of(world, rank, k)
    cdef int r, here = 0, least = 1, count = mask_count(&result.contributors)
    for r in range(world.size):
        here += is_here(world, r) and not world.ranks[r].leaving and not is_disturbed(world, r)
    if step.deadline_us == 0:
        least = step.root if 0 < step.root < here else here
    if count < least or count < 1:
        report(world, NO_QUORUM, rank, k)


cdef bint same_status(int a, int b) noexcept nogil:
    """A rank alone may have missed what others got."""
    return a == b or a == STATUS_MISSED or b == STATUS_MISSED


cdef void check_alike(World* world, int rank, int k) noexcept nogil:
    """All ranks that have this outcome have the same one."""
    cdef const Result* result = &world.ranks[rank].results[k]
    cdef const Result* other
    cdef int r
    for r in range(world.size):
        # A rank that died may have taken with it a result that nobody else had.
        if world.ranks[r].checked <= k or r == rank or world.network.ports[r].dead:
            continue
        other = &world.ranks[r].results[k]
        if world.odd_rank >= 0 and (other.status == STATUS_MISMATCH
                                    or result.status == STATUS_MISMATCH):
            continue           # who had returned before learns of it at its next call
        if world.odd_rank >= 0 and k >= world.odd_step and (rank == world.odd_rank
                                                            or r == world.odd_rank):
            continue           # each failed, or succeeded alone, for what it had called
        if (not same_status(other.status, result.status) or other.epoch != result.epoch
                or not mask_equal(&other.contributors, &result.contributors)
                or not mask_equal(&other.failed, &result.failed)):
            report(world, DIFFERENT_OUTCOMES, rank, k)


cdef void check_rank(World* world, int rank) noexcept nogil:
    """After each step of a rank: what it got back, and what it believes."""
    cdef Rank* one = &world.ranks[rank]
    cdef Engine* engine = one.engine
    cdef int64_t nbytes
    cdef int r, k
    world.network.ports[rank].given_up = engine.abandoned if not engine.stopped \
        else mask_full(world.size)
    if engine.broken:
        report(world, ENGINE_BROKEN, rank, one.checked)
    if engine.stable < one.stable:
        report(world, STABLE_WENT_BACK, rank, one.checked)
    if not engine.stopped:
        # Who is out, and does not know it yet, may hear of more than it has done.
        one.stable = engine.stable if engine.stable < engine.done else engine.done
    while one.checked < one.called and one.results[one.checked].complete:
        k = one.checked
        note_return(world, rank, k)
        check_value(world, rank, k)
        check_status(world, rank, k)
        if not world.silence:
            check_alike(world, rank, k)
        one.checked += 1
        nbytes = 8 * send_items(step_of(world, rank, k), world.size, rank)
        memset(one.send[k], GARBAGE, nbytes)
        nbytes = 8 * recv_items(step_of(world, rank, k), world.size, rank)
        memset(one.recv[k], GARBAGE, nbytes)
    for r in range(world.size):
        if (is_here(world, r) and not world.ranks[r].leaving and not is_disturbed(world, r)
                and not engine.stopped and not world.ranks[r].engine.stopped
                and world.ranks[r].engine.done < engine.stable):
            report(world, STABLE_TOO_EARLY, rank, one.checked)


cdef bint is_garbage(const uint64_t* items, int64_t count) noexcept nogil:
    cdef int64_t i
    for i in range(count):
        if items[i] != <uint64_t>0xA5A5A5A5A5A5A5A5ULL:
            return False
    return True


cdef bint succeeds_alone(const World* world, int rank) noexcept nogil:
    """The operation in question needs no other rank here: the root has its data, nobody else has
    any, and where a loss is raised, or a root is lost, nobody is asked."""
    cdef const Step* step = step_of(world, rank, world.odd_step)
    cdef int status = world.ranks[rank].results[world.odd_step].status
    cdef int r
    if status == STATUS_RANK_FAILED or status == STATUS_ROOT_LOST:
        return True
    if is_from_root(step.kind):            # what is small is sent, and that is all
        return step.root == rank and not step.flags & FLAG_VECTOR and 8 * step.count * (
            world.size if step.kind == SCATTER else 1) <= world.settings.eager_bytes
    if not step.flags & FLAG_VECTOR or not (step.kind == ALLGATHER or (
            step.kind == GATHER and step.root == rank)):
        return False
    for r in range(world.size):
        if r != rank and is_here(world, r) and pair_count(step, r, rank):
            return False
    return True


cdef bint same_outcome(const Result* a, const Result* b) noexcept nogil:
    return (same_status(a.status, b.status) and a.epoch == b.epoch
            and mask_equal(&a.contributors, &b.contributors)
            and mask_equal(&a.failed, &b.failed))


cdef void check_silence(World* world) noexcept nogil:
    """After stops and cuts: one group at most has gone on, all of it alike; who was left out has
    no stable result that differs, and no buffer of anyone was touched."""
    cdef int r, other, k
    cdef Rank* one
    cdef Mask members
    cdef const Step* step
    for r in range(world.size):
        one = &world.ranks[r]
        for k in range(one.checked if is_here(world, r) else 0):
            step = step_of(world, r, k)
            if not is_garbage(one.send[k], send_items(step, world.size, r)) or not is_garbage(
                    one.recv[k], recv_items(step, world.size, r)):
                report(world, TOUCHED_AFTER_RETURN, r, k)
        if not in_force(world, r):
            continue
        members = members_of(one.engine, one.engine.epoch)
        for other in range(world.size):
            if (in_force(world, other) and not mask_has(&members, other)
                    and not world.ranks[other].engine.frozen
                    and not world.ranks[other].engine.unsure):
                report(world, SPLIT, r, one.checked)
            for k in range(world.ranks[other].checked):
                if (in_force(world, other) or k < world.ranks[other].stable) and not same_outcome(
                        &one.results[k], &world.ranks[other].results[k]):
                    report(world, DIFFERENT_OUTCOMES, other, k)
        if one.engine.counters.strays == 0 and mask_empty(&one.engine.abandoned) and (
                one.engine.landings_used or one.engine.outlets_used):
            report(world, LEAK, r, one.checked)


cdef int64_t rounded(int64_t nbytes) noexcept nogil:
    return (nbytes + 15) & ~15


cdef int64_t kept_bytes(const Engine* engine) noexcept nogil:
    """What a rank may keep for ever: input that no later operation took along, and tables that it
    makes when first they are needed."""
    cdef int64_t total = 0
    cdef const Carry* one = engine.carries
    while one != NULL:
        total += rounded(sizeof(Carry))
        total += rounded(8 * one.sig.count) * ((one.data != NULL) + (one.more != NULL))
        one = one.next
    if engine.wheres != NULL:
        total += rounded(engine.size * sizeof(WhereBody))
    if engine.landings != NULL:
        total += rounded(engine.settings.outlets_max * sizeof(Landing))
    if engine.peer_done != NULL and not is_flat(engine):
        total += rounded(engine.size * sizeof(int64_t))
    return total


cdef void check_end(World* world) noexcept nogil:
    """Nothing can happen any more: everyone alive must have everything, and owe nothing."""
    cdef int r, k
    cdef Rank* one
    cdef const Step* step
    cdef bint noticed = False
    cdef int others = 0
    cdef bint odd_lives = world.odd_rank >= 0 and not world.network.ports[world.odd_rank].dead
    if world.silence:
        check_silence(world)
        return
    for r in range(world.size):
        one = &world.ranks[r]
        if world.network.ports[r].dead:
            continue
        if one.checked < one.steps or one.engine.stable < one.steps:
            report(world, HANG, r, one.checked)
            return
        if world.leaving and not world.network.ports[r].left:
            report(world, HANG, r, one.checked)
            return
        for k in range(one.steps):
            step = step_of(world, r, k)
            if not is_garbage(one.send[k], send_items(step, world.size, r)) or not is_garbage(
                    one.recv[k], recv_items(step, world.size, r)):
                report(world, TOUCHED_AFTER_RETURN, r, one.checked)
            if one.results[k].status != STATUS_MISMATCH and not (
                    step.flags & FLAG_PARTIAL) and not mask_has(
                    &one.results[k].contributors, r):
                report(world, LIVING_LEFT_OUT, r, one.checked)
        if odd_lives and r != world.odd_rank:
            noticed = noticed or one.results[one.steps - 1].status == STATUS_MISMATCH
            others += 1
        if world.network.ports[r].left:
            continue
        if (one.engine.freed < one.steps or one.engine.outlets_used or one.engine.retained_bytes
                or one.engine.late_bytes or world.network.ports[r].region.live_bytes
                != one.baseline_bytes + kept_bytes(one.engine)
                or world.network.ports[r].posted_count):
            report(world, LEAK, r, one.checked)
    # Whoever had returned from it learns of it at its next call: ranks that call nothing more, or
    # only what they can do alone, may never.
    if odd_lives and others and not noticed and not succeeds_alone(world, world.odd_rank):
        for k in range(world.odd_step, world.ranks[world.odd_rank].steps):
            if world.ranks[world.odd_rank].results[k].status == STATUS_MISMATCH:
                return
        report(world, MISMATCH_MISSED, world.odd_rank, world.odd_step)
