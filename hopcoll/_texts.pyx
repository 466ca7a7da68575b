# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
"""What the engine says of operations and ranks, in words."""
from libc.stdint cimport int64_t
from hopcoll._state cimport *
from hopcoll._plan cimport is_fold, is_for_root, is_from_root

from cython_kernels import reduction

_KINDS = {BCAST: "Bcast", REDUCE: "Reduce", ALLREDUCE: "Allreduce", BARRIER: "Barrier",
          GATHER: "Gather", ALLGATHER: "Allgather", SCATTER: "Scatter", ALLTOALL: "Alltoall",
          REDUCE_SCATTER: "Reduce_scatter_block", SCAN: "Scan", EXSCAN: "Exscan"}


cdef str kind_name(const Signature* sig):
    name = _KINDS.get(sig.kind, f"operation {sig.kind}")
    if sig.flags & FLAG_VECTOR:
        return "Reduce_scatter" if sig.kind == REDUCE_SCATTER else name + "v"
    return name


cdef str signature_text(const Signature* sig, int64_t seq):
    parts = []
    if sig.layout and not sig.flags & (FLAG_VECTOR | FLAG_CARRY) and sig.redop != USER_OP:
        # Nobody else asks for agreement on a number: hopcoll._groups.
        return f"Split, {'the first' if sig.kind == ALLGATHER else 'the second'} of its steps"
    if sig.kind != BARRIER:
        parts.append(reduction.DTYPE_NAMES[sig.dtype].lower())
    if sig.flags & FLAG_VECTOR and sig.layout:
        parts.append(f"{sig.count} items in blocks {sig.layout & 0xffffff:06x}")
    elif sig.kind != BARRIER and not sig.flags & FLAG_VECTOR:
        parts.append(f"count={sig.count}")
    if is_fold(sig.kind):
        parts.append(f"op={reduction.OP_NAMES[sig.redop]}" if sig.redop != USER_OP
                     else f"op of the user's {sig.layout & 0xffffff:06x}")
    if is_from_root(sig.kind) or is_for_root(sig.kind):
        parts.append(f"root={sig.root}")
    if sig.flags & FLAG_PARTIAL and sig.root:
        parts.append(f"quorum={sig.root}")
    if sig.deadline_us:
        parts.append(f"deadline_s={sig.deadline_us / 1e6:g}")
    if sig.flags & FLAG_CARRY:
        parts.append(f"late='carry', name {sig.layout & 0xffffff:06x}")
    if sig.flags & FLAG_ARRIVAL:
        parts.append("order='arrival'")
    if sig.flags & FLAG_RAISE:
        parts.append("on_failure='raise'")
    text = f"{kind_name(sig)}({', '.join(parts)})"
    if sig.raised:
        text += f" with operation {seq - ((seq + 1 - sig.raised) & 0xffff)} raising before it"
    return text


cdef tuple ranks_of(const Mask* mask, int size):
    return tuple([r for r in range(size) if mask_has(mask, r)])


cdef str mismatch_text(const Engine* engine):
    """Who called what, where a mismatch was decided."""
    cdef int r, i
    cdef const Quarrel* quarrel = &engine.quarrel
    groups = {}
    if quarrel.source >= 0:
        return (f"lengths differ between ranks in operation {engine.poison_cut} of "
                f"this communicator ({kind_name(&engine.groups[0].sig)}): "
                f"rank {quarrel.source} has {quarrel.sent_bytes} bytes for rank "
                f"{quarrel.dest}, which expects {quarrel.expected_bytes}. It cannot be used "
                "any more")
    for r in range(engine.size):
        for i in range(engine.groups_count):
            if mask_has(&engine.groups[i].who, r):
                text = signature_text(&engine.groups[i].sig, engine.poison_cut)
                groups.setdefault(text, []).append(r)
    text = "; ".join(
        f"{'rank' if len(ranks) == 1 else 'ranks'} {', '.join(map(str, ranks))} called {name}"
        for name, ranks in groups.items())
    return (f"arguments differ between ranks in operation {engine.poison_cut} of this "
            f"communicator: {text}. It cannot be used any more")
