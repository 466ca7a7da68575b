# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
"""Faults that tests plant: a rank kills or stops itself at a chosen point, and writes down where it
was."""
import os

from libc.stdint cimport int64_t
from libc.stdio cimport snprintf
from libc.string cimport memcpy
from hopcoll._state cimport *
from hopcoll._plan cimport chain_after, chain_before, is_fold
from hopcoll._twins cimport twin_of

cdef extern from "<signal.h>" nogil:
    int kill(int, int)
    int SIGKILL
    int SIGSTOP
    int SIGCONT

cdef extern from "<unistd.h>" nogil:
    int getpid()
    int pause()
    int fork()
    int usleep(unsigned int)
    void _exit(int)
    ssize_t write(int, const void*, size_t)

cdef extern from "<sys/wait.h>" nogil:
    int waitpid(int, int*, int)

cdef extern from "<fcntl.h>" nogil:
    int open(const char*, int, ...)
    int O_WRONLY
    int O_CREAT
    int O_TRUNC


cdef int64_t moved_total(Engine* engine, Operation* op) noexcept nogil:
    """The bytes that this rank receives and sends in a fault-free run of the operation."""
    cdef int b, before, after, ways
    cdef int64_t total = 0
    cdef Block* block
    cdef const Twin* twin
    cdef Mask members = members_of(engine, op.attempt)
    for b in range(op.blocks):
        block = &op.block[b]
        if op.sig.kind == BCAST or op.sig.kind == ALLGATHER or is_fold(op.sig.kind):
            ways = 2 if op.sig.kind == ALLREDUCE else 1      # partial sums, and finals back
            if op.twins:
                twin = twin_of(engine, op, b)
                before = twin.parent >= 0
                after = (twin.child[0] >= 0) + (twin.child[1] >= 0)
            else:
                before = chain_before(&members, engine.size, block.start, engine.rank) >= 0
                after = chain_after(&members, engine.size, block.start, engine.rank) >= 0
            total += ways * (before + after) * block.grid.nbytes
        elif block.start != engine.rank:
            total += block.grid.nbytes
        if op.sig.kind != ALLTOALL or b != engine.rank:
            total += block.out.nbytes
    return total


cdef void stop_for(int64_t ms) noexcept nogil:
    """Stops this process; a grandchild, whom nobody has to wait for, lets it go on."""
    cdef int own = getpid(), child
    if ms > 0:
        child = fork()
        if child == 0:
            if fork() == 0:
                usleep(<unsigned int>(1000 * ms))
                kill(own, SIGCONT)
            _exit(0)
        waitpid(child, NULL, 0)
    kill(own, SIGSTOP)


cdef void disarm(Fault* fault) noexcept nogil:
    fault.seq = -1
    fault.ballot = 0
    fault.time_us = -1


cdef void fire(void* context, Engine* engine, const Fault* fault, int index) noexcept nogil:
    """Writes down where we are, and dies or stops."""
    cdef Faults* faults = <Faults*>context
    cdef char line[512]
    cdef int n, fd, repair
    cdef int64_t seq, moved = 0, total = 0, at = -1, chunk = 0
    cdef Operation* op
    cdef Mask members = members_of(engine, engine.epoch)
    cdef Mask lost = mask_and(&members, &engine.dead)
    repair = engine.frozen or engine.stage or not mask_empty(&lost)
    for seq in range(engine.finished, engine.next_seq):
        op = find_operation(engine, seq)
        if op == NULL or not op.called or op.finished:
            continue
        if op.born < engine.epoch:
            repair = 1
        if at < 0 or (moved == 0 and op.moved_bytes > 0):
            at = seq
            moved = op.moved_bytes
            chunk = op.moved_chunks
            total = 0 if op.small else moved_total(engine, op)
    if total < moved:
        total = moved
    if faults.record_path[0]:
        n = snprintf(line, sizeof(line),
                     b'{"rank": %d, "trigger": "%s", "op": %lld, "chunk": %lld, '
                     b'"moved_bytes": %lld, "total_bytes": %lld, "repair": %d, '
                     b'"coordinator": %d, "epoch": %d, "stop_ms": %lld}\n',
                     engine.rank,
                     <const char*>b"time" if fault.time_us >= 0 else
                     <const char*>b"ballot" if fault.ballot else <const char*>b"chunk",
                     <long long>at, <long long>chunk, <long long>moved, <long long>total, repair,
                     <int>(coordinator_of(engine) == engine.rank), engine.epoch,
                     <long long>fault.stop_ms)
        fd = open(faults.record_path, O_WRONLY | O_CREAT | O_TRUNC, 0o644)
        if fd >= 0:
            write(fd, line, n)
    if fault.stop_ms >= 0:
        disarm(&engine.fault[index])
        stop_for(engine.fault[index].stop_ms)
        return
    kill(getpid(), SIGKILL)
    while True:
        pause()


cdef void check_timed_faults(Faults* faults, Engine* engine, int64_t now) noexcept nogil:
    cdef int i
    for i in range(engine.faults):
        if engine.fault[i].time_us >= 0 and now - faults.started_us >= engine.fault[i].time_us:
            fire(faults, engine, &engine.fault[i], i)


cdef int plant_faults(Faults* faults, Engine* engine) except -1:
    """Reads HOPCOLL_FAULT: faults for tests, "rank=2,op=7,chunk=40;rank=0,ballot=1,send=2"."""
    cdef Fault* fault
    text = os.environ.get("HOPCOLL_FAULT", "")
    for part in filter(None, (p.strip() for p in text.split(";"))):
        try:
            fields = dict(item.split("=") for item in part.split(","))
            known = set(fields) <= {"rank", "op", "chunk", "ballot", "send", "time", "stop"}
            triggers = {"op", "ballot", "time"} & set(fields)
            if not known or "rank" not in fields or len(triggers) != 1:
                raise ValueError
            numbers = {key: float(value) if key == "time" else int(value)
                       for key, value in fields.items()}
        except ValueError:
            raise ValueError(f"HOPCOLL_FAULT: {part!r} is not rank=R with op=S,chunk=C or "
                             "ballot=N,send=K or time=SECONDS, and perhaps stop=MILLISECONDS"
                             ) from None
        if numbers["rank"] != engine.rank:
            continue
        if engine.faults == FAULTS_MAX:
            raise ValueError(f"HOPCOLL_FAULT: more than {FAULTS_MAX} faults for one rank")
        fault = &engine.fault[engine.faults]
        fault.seq = numbers.get("op", -1)
        fault.chunk = numbers.get("chunk", 0)
        fault.ballot = numbers.get("ballot", 0)
        fault.send = numbers.get("send", 0)
        fault.time_us = <int64_t>(numbers["time"] * 1e6) if "time" in numbers else -1
        fault.stop_ms = numbers.get("stop", -1)
        faults.timed |= fault.time_us >= 0
        engine.faults += 1
    prefix = os.environ.get("HOPCOLL_FAULT_RECORD", "")
    if prefix:
        path = os.fsencode(f"{prefix}.{engine.rank}")
        if len(path) >= RECORD_PATH_MAX:
            raise ValueError("HOPCOLL_FAULT_RECORD: the path is too long")
        memcpy(faults.record_path, <const char*>path, len(path) + 1)
    engine.fault_context = faults
    engine.fire = fire
    return 0
