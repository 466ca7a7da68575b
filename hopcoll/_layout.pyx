# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
"""Where the blocks of a large operation lie: in the caller's buffers, in scratch, or nowhere."""
from libc.stdint cimport int64_t, uint8_t
from libc.string cimport memcpy, memset
from cython_kernels.stream cimport CHUNK_FINAL, CHUNK_NONE, make_grid
from hopcoll._state cimport *
from hopcoll._plan cimport block_dest, block_start, blocks_of, is_fold, is_wanted
from hopcoll._twins cimport is_twinned, twin_levels

cdef enum:
    CHUNK_BYTES_MIN = 8192    # shorter ones cost a rank more than the link
    CHAIN_PARTS = 8           # so many times longer than the chain is a message, in chunks
    LEVEL_STEPS = 8           # of a chain that is as long as one level of a tree


cdef void land(Block* block, const unsigned char* source) noexcept nogil:
    """A block that we have ourselves: into its place, unless it is there already."""
    if source != NULL and block.recv != source and block.grid.nbytes:
        memcpy(block.recv, source, block.grid.nbytes)


cdef int64_t chunk_bytes_of(const Engine* engine, const Operation* op,
                            int64_t nbytes) noexcept nogil:
    """How long the chunks of a block are.  Where one chain goes through all ranks, its last rank
    begins a chunk a rank later than the first, and in a tree, where those of four streams wait for
    the same link, some for each rank that is above it: in a short message that is to be a small
    part."""
    cdef int64_t most = engine.settings.chunk_bytes, fitting
    cdef int steps = LEVEL_STEPS * twin_levels(engine.size) if op.twins else engine.size - 2
    if (op.blocks > 1 and not op.twins) or steps < 1:
        return most
    fitting = nbytes // (CHAIN_PARTS * steps)
    if fitting < CHUNK_BYTES_MIN:
        fitting = CHUNK_BYTES_MIN
    fitting = (fitting + 63) & ~63            # whole items of any dtype
    return fitting if fitting < most else most


cdef int lay_out(Engine* engine, Operation* op, const Layout* layout,
                 unsigned char* recv) noexcept nogil:
    """Where each block's bytes are here, and go to."""
    cdef int kind = op.sig.kind, size = engine.size, me = engine.rank, b
    cdef int64_t unit = op.sig.count * op.item_bytes, begin, end
    cdef int64_t chunk_bytes = chunk_bytes_of(engine, op, unit)
    cdef bint vector = op.sig.flags & FLAG_VECTOR
    cdef Block* block
    for b in range(op.blocks):
        block = &op.block[b]
        begin, end = b * unit, (b + 1) * unit
        if kind == ALLREDUCE or op.twins:
            begin = (b * op.sig.count // op.blocks) * op.item_bytes
            end = ((b + 1) * op.sig.count // op.blocks) * op.item_bytes
        elif kind == REDUCE_SCATTER and vector:
            begin, end = layout.send_at[b], layout.send_at[b] + layout.send_bytes[b]
        if is_fold(kind) or kind == BCAST:
            block.grid = make_grid(end - begin, chunk_bytes)
            block.send = op.send + begin if op.send != NULL else NULL
            if op.base != NULL and not (kind == REDUCE_SCATTER and b != me):
                block.recv = op.base + (0 if kind == REDUCE_SCATTER else begin)
            elif op.scratch != NULL:
                block.recv = op.scratch + begin
            if kind == BCAST and op.sig.root == me:
                block.send = NULL
            continue
        # A copy: what comes, what goes, and what stays.
        if kind == ALLGATHER or kind == ALLTOALL or (kind == GATHER and op.sig.root == me):
            block.grid = make_grid(layout.recv_bytes[b] if vector else unit, chunk_bytes)
            block.recv = recv + (layout.recv_at[b] if vector else begin)
        elif kind == SCATTER and b == me and recv != NULL:
            block.grid = make_grid(layout.recv_bytes[me] if vector else unit, chunk_bytes)
            block.recv = recv
        if kind == ALLTOALL or (kind == SCATTER and op.sig.root == me):
            block.out = make_grid(layout.send_bytes[b] if vector else unit, chunk_bytes)
            block.send = op.send + (layout.send_at[b] if vector else begin)
        elif kind == GATHER and b == me and op.sig.root != me:
            block.out = make_grid(layout.send_bytes[me] if vector else unit, chunk_bytes)
            block.send = op.send
        if b == me and block.recv != NULL:
            land(block, block.send if block.send != NULL else op.send)
    return START_OK


cdef int prepare_blocks(Engine* engine, Operation* op, const Layout* layout,
                        unsigned char* recv) noexcept nogil:
    cdef int b, phase, kind = op.sig.kind
    cdef int64_t states = 0
    cdef Block* block
    op.twins = is_twinned(engine, &op.sig)
    op.blocks = blocks_of(engine, &op.sig)
    op.block = <Block*>engine.transport.allocate(engine.transport.self,
                                                 op.blocks * sizeof(Block))
    if op.block == NULL:
        op.blocks = 0
        return START_NO_MEMORY
    memset(op.block, 0, op.blocks * sizeof(Block))
    lay_out(engine, op, layout, recv)
    for b in range(op.blocks):
        block = &op.block[b]
        block.start = block_start(kind, engine.size, op.sig.root, b, op.blocks)
        block.dest = block_dest(kind, engine.rank, op.sig.root, b)
        if op.sig.flags & FLAG_ORDERED or (op.twins and kind == ALLREDUCE):
            block.start = 0
            if kind == REDUCE:
                block.dest = -1
        block.epoch = block.behind = block.twin.epoch = -1
        block.outlets[0] = block.outlets[1] = -1
        for phase in range(PHASES):
            block.landing[phase] = -1
        block.offset = block.recv - op.base
        block.state = states
        states += block.grid.chunks
    op.chunks = states
    op.states = <uint8_t*>engine.transport.allocate(engine.transport.self, states + 1)
    if op.states == NULL:
        return START_NO_MEMORY
    memset(op.states, CHUNK_NONE, states + 1)
    for b in range(op.blocks):
        block = &op.block[b]
        if block.start == engine.rank and not is_fold(kind):
            memset(op.states + block.state, CHUNK_FINAL, block.grid.chunks)
            block.finals = block.grid.chunks
    return START_OK


cdef void count_awaited(Engine* engine, Operation* op) noexcept nogil:
    cdef int b
    op.awaited = 0
    for b in range(op.blocks):
        if is_wanted(engine, op, b):
            op.awaited += op.block[b].grid.chunks - op.block[b].finals
