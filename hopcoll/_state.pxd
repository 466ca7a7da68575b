# cython: language_level=3
"""The state of one rank's engine, and the layout of its control messages.

Plain structs without Python objects: the same decisions run inside a progress thread that never
takes the GIL, and inside the simulated network.  Nothing here knows MPI, a clock or randomness.
"""
from libc.stdint cimport int64_t, int32_t, int16_t, uint64_t, uint32_t, uint16_t, uint8_t
from cython_kernels.transport cimport Transport
from cython_kernels.stream cimport Grid, Sink, Spring
from hopcoll._mask cimport *
from hopcoll._words cimport *

cdef struct Signature:        # what all ranks must agree on in one operation
    uint8_t kind
    uint8_t dtype
    uint8_t redop
    uint8_t flags
    int16_t root              # FLAG_PARTIAL: how many contributors are enough; 0: all
    uint16_t raised           # FLAG_RAISE: how the one before it was numbered, see raised_of
    int64_t count             # items of a contribution, or of a rank's block; of all blocks
    uint64_t layout           # hash of the blocks' lengths, where all know them; of a user's op
    int64_t deadline_us       # FLAG_PARTIAL: how long the first to arrive waits for others; 0: ever

cdef struct Layout:           # FLAG_VECTOR: lengths and offsets in bytes, by rank
    const int64_t* send_bytes
    const int64_t* send_at
    const int64_t* recv_bytes
    const int64_t* recv_at

cdef struct Settings:
    int64_t chunk_bytes
    int64_t eager_bytes
    int64_t retain_bytes_max      # of one result
    int64_t retain_budget_bytes   # of all results
    int64_t late_budget_bytes     # of results that are kept for ranks that are late
    int64_t announce_us
    int64_t report_us         # an operation that waits so long is reported
    int64_t flush_us
    int64_t patience_us       # so long nobody goes around a rank that is not there yet
    int64_t detect_us         # a rank that is silent so long is suspected; 0: nobody ever is
    int32_t window
    int32_t ring
    int32_t active                # operations that move chunks at once
    int32_t outlets_max
    int32_t degree            # of the control tree
    int32_t epochs_max        # 0: as many as there are ranks to lose, and some more
    uint32_t sabotage

cdef struct Entry:            # one membership: epoch i + 1 is history[i]
    int64_t cut               # operations from here on run under this epoch
    int32_t kind
    int32_t pad
    Mask members
    Mask lost                 # left out although nobody knows them to be dead
    Mask left                 # ... as they had said good-bye

cdef struct Stand:            # a decision about one operation: it stands
    Mask roll                 # FLAG_PARTIAL: whose input is in it
    Signature sig             # what was called: who calls it later need not hear of it otherwise
    int32_t known             # whether somebody told us so
    int32_t pad
    int16_t holder[BLOCKS_MAX]

cdef struct Early:            # a message of an epoch that we have not entered, as it came
    Early* next
    int64_t nbytes
    int32_t peer
    int32_t pad

cdef struct Carry:            # input that came too late for its operation, of one kind of call
    Carry* next
    Signature sig             # of the calls; all but the quorum and the deadline
    unsigned char* data       # NULL: nothing
    unsigned char* more       # what came too late while an operation has `data` along
    int64_t seq               # that operation; -1: none

cdef struct Result:           # what a request of the caller reads; outlives the record
    int64_t seq
    int32_t complete
    int32_t strays            # a lost rank may still read the caller's memory: it must stay
    int32_t status
    int32_t epoch
    Mask contributors
    Mask failed

cdef struct Outlet:           # a Spring that serves one granted stream
    Spring spring
    int64_t seq
    int64_t nbytes            # how long the other rank takes the block to be
    int32_t used
    int32_t next              # in the list of its block and phase, of its operation, or of the free
    int32_t epoch
    int32_t block
    int32_t phase
    int32_t early             # its epoch is ahead of ours
    int32_t attached          # in the list of its block: we have called what it asks for
    int32_t stray             # to a lost rank: nothing waits for the end of its sends
    int32_t retained          # of its sends in flight, those that read the retained result
    int32_t pad
    Signature sig             # what the other rank called

cdef struct Landing:          # slots in which the chunks of a stream from another host land
    unsigned char* slots      # a window of them
    int64_t seq
    int32_t part              # of the operation: block and phase
    int32_t in_flight
    int32_t stray             # the rank is lost: what may still land is looked at by nobody
    int32_t next              # in the list of the free

cdef struct Twin:             # our place in one of two trees; see _twins.pyx
    int32_t epoch             # in which it was found; -1: never
    int32_t attempt           # ... in this attempt
    int32_t holder            # ... of what stands, and goes out from there; -1: it does not
    int32_t parent            # -1: nobody
    int32_t child[2]          # what is before us, and behind us, in its order; -1: nobody
    int32_t first             # those whose sum we make, us included: the run of positions from
    int32_t last              # here to here

# A piece of a result with a way of its own.  A fold goes along a chain of ranks, each of which adds
# its input, or up a tree; a copy starts where its bytes are.
cdef struct Block:
    Grid grid                 # what is put together here
    Grid out                  # what is given from `send`, where that is no fold
    unsigned char* recv       # where it is put together; NULL: nowhere here
    const unsigned char* send # our input to it
    int64_t offset            # bytes from the start of the result
    int64_t state             # index of its first chunk's state
    int64_t finals            # chunks in state FINAL
    int32_t start             # rank at which its chain starts
    int32_t dest              # rank that wants it; -1: all
    int32_t epoch             # epoch in which its streams were opened, -1 before
    int32_t in_flight         # sends of it that read the caller's memory
    int32_t behind            # of a large Bcast: whom we were sent to; -1: nobody
    int32_t pad
    Sink sink[PHASES]
    int32_t sink_attempt[PHASES]
    int32_t landing[PHASES]   # -1: chunks land where they belong
    int32_t outlets[2]        # by phase, partial and final
    int64_t taken             # chunks below were taken out of the slots of RIGHT_PHASE
    Twin twin

cdef struct Quarrel:          # two ranks take a block to be of different lengths
    int32_t source            # -1: none
    int32_t dest
    int64_t sent_bytes
    int64_t expected_bytes

cdef struct Dispute:          # a signature that is not ours, as it was seen: records do not last
    int64_t seq               # -1: none
    int32_t peer
    int32_t source            # who saw it
    Signature ours
    Signature theirs

cdef struct Operation:
    int64_t seq               # -1: free record
    Signature sig             # ours once called, else the first one seen
    int32_t sig_from          # whose; -1: none yet
    int32_t called
    int32_t small
    int32_t attempt           # epoch whose members contribute
    int32_t status
    int32_t complete          # the local part of the result is there, and all of it that is private
    int32_t done
    int32_t finished          # given back to the caller
    int32_t standing          # decided STAND: what is missing is fetched from a holder
    int32_t blocks
    int32_t complained        # another signature than ours was seen
    int32_t announced         # how often we announced ourselves as stuck
    int32_t fetched           # epoch + 1 in which the result was asked for
    int32_t in_flight         # sends from the caller's memory
    int32_t in_flight_retained
    int32_t root_done         # of a Reduce or Gather: the root said that it has the result
    int32_t keeps_nothing     # no other rank can need anything of it from us
    int32_t born              # the epoch in which it was called
    int32_t early             # outlets for which we have not called the right thing yet
    int32_t whole             # our own part is there; others may lack theirs
    int32_t strays            # sends of ours to lost ranks, which read our memory: it must stay
    int32_t whole_told        # the coordinator that knows so, and the epoch; -1: none
    int32_t whole_epoch
    int32_t wholes_epoch      # at the coordinator: who is whole in which epoch
    int32_t rolled            # of a partial operation: it is known whose input is in it
    int32_t roll_attempt      # ... in this attempt
    int32_t late_kept         # `retained` is for ranks that are late
    int32_t forgotten         # ... and had to go
    int32_t takes_carry       # our input has an earlier one along
    int32_t have_attempt      # of a small one that goes along a tree: of which `have` tells
    int32_t up_attempt        # ... in which our part went up
    int32_t landed_attempt    # ... of which its result is here; -1: none
    int32_t down_epoch        # epoch + 1 in which we passed that on
    int32_t spread_epoch      # epoch + 1 in which it stands, and goes out from a holder
    int32_t spread_from       # ... that one
    Mask roll                 # those are
    Mask arrived              # at the keeper: who has called it
    Mask placed               # ... and has a place in the order of arrival
    int32_t arrived_attempt   # ... in this attempt
    int32_t tail              # ... the last of them
    int32_t place_attempt     # in which we have a place; -1: none
    int32_t before            # us in that order; -1: nobody
    int32_t after             # ... -1: nobody yet
    int32_t last              # we are the last
    int32_t twins             # it goes along two trees
    Mask wholes
    Mask asked                # of a large Bcast: who showed that they have called it
    Mask told                 # ... to whom we showed that we have
    Mask away                 # ... who has not, and is gone around
    int64_t item_bytes
    int64_t nbytes            # of a contribution (small), or of a result that lies in one piece
    int64_t undo_bytes
    int64_t share_at          # of a small Reduce_scatter: our part
    int64_t share_bytes
    int64_t chunks
    int64_t awaited           # chunks that we need and that are not FINAL
    int64_t previous_raise    # the raise-flagged operation before this one
    int64_t called_us
    int64_t asked_us          # of a large Bcast: since when others wait for us, or we for them
    int64_t done_us
    int64_t arrived_us        # at the keeper: when the first one had
    int64_t moved_us          # when the last chunk of it came or went
    int64_t moved_chunks
    int64_t moved_bytes
    Carry* carry              # where our input goes when it is too late
    unsigned char* input      # our input and what it takes along, or room for it
    const unsigned char* send # our input (for IN_PLACE its undo copy)
    unsigned char* base       # the caller's result buffer, or scratch in its place
    unsigned char* scratch    # partial sums that have no place in the caller's buffer
    unsigned char* undo
    unsigned char* retained   # copy of the result that outlives the call
    unsigned char* inbox      # contributions of a small operation, by rank
    uint8_t* states
    Mask have                 # ranks whose contribution is in the inbox
    int16_t holder[BLOCKS_MAX]
    Block* block
    Result* result

cdef struct Fault:
    int64_t seq
    int64_t chunk
    int64_t ballot            # 0: a chunk fault
    int64_t send
    int64_t time_us           # >= 0: a time fault
    int64_t stop_ms           # -1: it kills; 0: it stops for ever; else for so long

cdef struct Counters:
    int64_t ballots
    int64_t decisions
    int64_t stands
    int64_t reruns
    int64_t chunks_sent
    int64_t chunks_received
    int64_t bytes_sent
    int64_t bytes_received
    int64_t voids
    int64_t kept_chunks
    int64_t dropped_chunks
    int64_t controls_sent
    int64_t superseded        # ballots of ours that a higher one took over
    int64_t silences          # ranks that we did not hear from in time
    int64_t pauses            # times that we were away ourselves
    int64_t fenced            # ranks that a ballot of ours had killed
    int64_t lost              # ranks left out that are not known to be dead
    int64_t zombies           # messages of such ranks
    int64_t minorities        # ballots of ours that too few answered
    int64_t strays            # streams that a lost rank may still touch
    int64_t rolls             # of partial operations that we closed
    int64_t detours           # ranks that were gone around in a Bcast
    int64_t copies            # results that were copied because somebody was late
    int64_t late              # partial operations that had begun without us
    int64_t forgotten         # results that were kept for others, and had to go
    int64_t carried           # inputs that went into a later operation

cdef struct Tree:             # who passes agreement on to whom; see _tree.pyx
    Mask ranks
    Mask doubtful             # those who are best left to the end of it
    int32_t root
    int32_t degree
    int32_t count             # of `ranks`
    int32_t pad

cdef struct Passing:          # our place in a tree
    int16_t parent            # -1: we are its root
    int16_t children
    uint32_t leaves           # bit i: nobody is reached through child i
    int16_t child[DEGREE_MAX]

cdef struct Group:            # ranks that called the same
    Signature sig
    Mask who

cdef struct Late:             # at the coordinator: an operation in which somebody waits
    int64_t seq
    int64_t since_us          # 0: none
    int64_t asked_us          # 0: nobody was asked
    int64_t times             # it was reported
    Mask replied

cdef struct Flight:           # of one operation, for those who want to know what went before
    int64_t seq
    Signature sig
    int64_t called_us
    int64_t done_us
    int64_t moved_bytes
    int32_t attempt
    int32_t status

cdef enum:
    FLIGHTS = 64              # operations that are remembered

cdef struct WhereBody:        # where a rank is
    int64_t seq               # of the operation that it was asked about
    int64_t called            # operations below were called
    int64_t done
    int64_t since_us          # how long its program has been where it is
    int32_t inside            # it waits in a call of ours
    int32_t pad

cdef struct Engine:
    Transport* transport
    Settings settings
    int32_t rank
    int32_t size
    # membership
    Mask dead                 # MPI says so, and is right
    Mask left                 # said good-bye
    Mask lost                 # out of the membership by a decision, and perhaps alive
    Mask abandoned            # nothing that they were to send, or to take, is waited for any more
    Mask silent               # not heard from: led over, in ballots, until they are
    Mask ready                # ranks that have heard from everyone at the start
    Mask heard                # ranks that know that we leave and want nothing of us any more
    int32_t leaving
    int32_t epoch             # = entries in history
    int32_t history_max
    Entry* history
    int64_t promised          # highest ballot answered
    int64_t promised_us
    int32_t frozen            # answered and not decided: nothing completes
    int32_t stage             # of the ballot that we lead
    int64_t ballot            # its number
    int64_t ballot_us         # when its stage began
    int64_t answer_us         # when the last answer to it came
    int64_t round
    int64_t rival             # a higher ballot that others told us of
    int64_t accepted          # the highest ballot whose proposal we keep, decided or not
    unsigned char* proposal   # that proposal
    int32_t complaint         # a mismatch was reported, or a rank is silent: a ballot is due
    int32_t unsure            # we were away for long: nothing completes before a ballot
    int32_t stopped           # Stop
    int64_t parted_us         # when the last epoch began that left somebody out; 0: long ago
    Mask fenced               # in this ballot: who does not answer, and was ordered to be killed
    int64_t fenced_us         # ... when the last of these orders was given; 0: none was
    int64_t stopped_us
    Mask stopped_by           # those who were out of reach
    int32_t watched           # the rank whose beats we count on; -1: none
    int64_t heard_us          # from it
    int64_t beat_us           # when we sent our last beat
    int64_t calling_us        # since when we wait for a sign of life of everyone; 0: we do not
    Mask replied              # who gave one
    int32_t poisoned          # a mismatch was decided
    int32_t suspecting        # Suspicion: a mismatch was seen here, and from operation `suspect`
    int64_t suspect           # on nothing is done before a ballot that knows of it
    int64_t poison_cut
    Dispute dispute
    Mask answered
    Mask acceptors            # of those who are reached through us
    Tree tree                 # of the ballot that we promised
    Passing passing           # ... our place in it
    Mask below                # ... and who is reached through us, ourselves included
    int64_t below_us          # since when we wait for what they say
    int64_t tree_ballot       # whose tree it is
    int32_t said              # we passed that on
    int32_t accepting         # they accept; before that they answer
    int32_t cut_told          # we told the leader that the tree is cut; at the leader: we know
    Mask doubtful             # at the leader: who is to be no rank's way to others
    unsigned char* statuses   # of us, and of each child, with all who are reached through it
    int64_t status_bytes
    unsigned char* outbox     # room to write one control message
    Group groups[GROUPS_MAX]  # who called what, at the mismatch
    int32_t groups_count
    uint32_t rows             # which of the statuses are there, in this ballot
    int32_t again             # our children are to tell us anew how far they are
    Quarrel quarrel           # ... or blocks that two ranks take to be of different lengths
    # operations
    Operation* ring
    int64_t next_seq
    int64_t done              # operations below are done here
    int64_t finished          # operations below were given back
    int64_t freed             # records below are free
    int64_t stable            # operations below are done at every living rank
    int64_t* peer_done        # by rank; NULL: there are too many, and the tree tells
    Passing flow              # our place in the tree of the members, along which that is told
    int64_t below_done[DEGREE_MAX]    # done at all who are reached through a child
    int64_t told_done
    int64_t told_stable
    int32_t watermark_due
    int32_t wholes_due        # an operation became whole, here or elsewhere
    int64_t last_large        # behind the last large operation that is done: ranks may wait for it
    int32_t stable_due
    int64_t watermark_us
    int64_t last_raise
    int64_t retained_bytes
    int64_t late_bytes
    Carry* carries
    Early* early              # what is of an epoch that we have not entered
    int64_t patience_us       # when our patience with a late rank is over, or others' with us
    int64_t roll_us           # when the first deadline is over for which we keep the roll; 0: none
    int32_t rolls_due         # somebody arrived, or is gone
    Landing* landings         # NULL as long as none was needed
    int32_t landing_free
    int32_t landings_used
    Outlet* outlets
    int32_t outlet_free
    int32_t outlets_used
    int32_t next_tag
    int32_t broken            # protocol error or out of memory: nothing goes on
    int64_t now_us
    # the caller's own operations: 0, or not 0 when it failed
    void* user_context
    int (*user)(void* context, const Operation* op, void* dest, const void* left,
                const void* right, int64_t count) noexcept nogil
    # ranks that are late
    Late late
    WhereBody* wheres         # by rank
    void* where_context
    void (*where)(void* context, WhereBody* out) noexcept nogil
    void (*want_stack)(void* context, int asker) noexcept nogil
    void (*keep_stack)(void* context, int rank, const unsigned char* text,
                       int64_t nbytes) noexcept nogil
    void (*report)(void* context) noexcept nogil
    # faults for tests
    int32_t faults
    Fault fault[FAULTS_MAX]
    int64_t ballots_seen
    int64_t ballot_sends
    void* fault_context
    void* fence_context
    void (*fence)(void* context, int rank) noexcept nogil      # kills a rank of this host
    void (*fire)(void* context, Engine* engine, const Fault* fault, int index) noexcept nogil
    Counters counters
    uint16_t host[RANKS_MAX]  # which host each rank is on
    Flight* flight            # the last operations, FLIGHTS of them
    int32_t outlets_made      # the others' memory was never touched
    int32_t* tags             # the last tag given to a stream, of all engines over one transport

# ---- control messages ---------------------------------------------------------------------

cdef struct Head:
    uint8_t type
    uint8_t more              # More
    uint8_t pad[2]
    int32_t epoch
    int64_t seq
    int64_t done
    int64_t stable
    Signature sig

cdef struct GrantBody:
    int32_t block
    int32_t phase
    int32_t tag
    int32_t pad
    int64_t first
    int64_t end
    int64_t limit
    int64_t nbytes            # of the whole block

cdef struct CreditBody:
    int32_t block
    int32_t phase
    int32_t tag
    int32_t pad
    int64_t told
    int64_t limit

cdef struct AwayBody:
    int32_t tag               # of the stream that was asked for
    int32_t behind            # who gives it instead; -1: whoever comes before us

cdef struct FetchBody:
    Mask have                 # contributions that need not be sent

cdef struct FanBody:          # UP and DOWN, followed by a partial or the final value
    int32_t attempt
    int32_t small             # else it says only that the root has its result
    int32_t called            # by who sends it
    int32_t pad

cdef struct RelayBody:        # followed by the contribution of
    int32_t rank
    int32_t pad

cdef struct RollBody:
    Mask roll
    int32_t attempt
    int32_t pad

cdef struct PlaceBody:        # PLACE: who comes before us; NEXT: who comes after us; ARRIVED
    int32_t attempt
    int32_t rank              # -1: nobody
    int32_t last              # all have arrived
    int32_t pad

cdef struct BallotBody:       # REFUSED and DECIDE
    int64_t ballot

cdef struct PrepareBody:
    int64_t ballot
    Mask ranks                # the tree along which it goes
    Mask doubtful

cdef struct AcceptedBody:
    int64_t ballot
    Mask who

cdef struct CutBody:          # who is reached through `rank` is not
    int64_t ballot
    int32_t rank
    int32_t pad

cdef struct RankBody:         # SILENT: of whom; FENCE: whom to kill
    int32_t rank
    int32_t pad

# Of one rank, or of many.  Followed by Entry[entries], then OperationStatus[operations].
cdef struct StatusBody:
    int64_t ballot
    int64_t accepted          # the ballot that proposed these entries: the highest one
    int64_t next_seq          # the highest, ...
    int64_t next_low          # ... the lowest
    int64_t done
    int64_t done_low
    int32_t entries
    int32_t operations
    int32_t decided           # the first entries are decided
    int32_t pad
    Dispute dispute           # of those of all, the first
    Mask who                  # answers

cdef struct OperationStatus:  # what ranks say of one attempt that they call alike
    int64_t seq
    Signature sig
    int32_t attempt
    int32_t small
    int32_t complete          # a rank at which it is; -1: none
    int32_t whole             # how many have their own part
    int32_t keeper            # a rank that holds the blocks `kept`
    int32_t pad
    int16_t holder[BLOCKS_MAX]    # a rank that has all of a block
    Mask who                  # has called it
    Mask held                 # bit b: one of them has all of block b, ...
    Mask common               # ... every one of them
    Mask kept
    Mask roll                 # of a partial operation; empty: not known to them
    Quarrel quarrel

# Followed by Entry[entries], Stand[holders], Group[groups].
cdef struct ProposeBody:
    int64_t ballot
    int64_t first_held        # holders start with this operation
    int32_t entries
    int32_t holders
    int32_t groups
    int32_t pad
    Quarrel quarrel

# ---- signatures ---------------------------------------------------------------------------

cdef inline bint signature_equal(const Signature* a, const Signature* b) noexcept nogil:
    return (a.kind == b.kind and a.dtype == b.dtype and a.redop == b.redop
            and a.flags == b.flags and a.root == b.root and a.raised == b.raised
            and a.count == b.count and a.layout == b.layout and a.deadline_us == b.deadline_us)

cdef inline uint16_t raised_of(int64_t previous_raise) noexcept nogil:
    """What went before decides what a raising operation reports: ranks must agree on it too.  The
    low bits of the number after it; 0 when there was none."""
    return <uint16_t>(previous_raise + 1)

# ---- memberships --------------------------------------------------------------------------

cdef inline Mask members_of(const Engine* engine, int epoch) noexcept nogil:
    if epoch == 0:
        return mask_full(engine.size)
    return engine.history[epoch - 1].members

cdef inline int attempt_of(const Engine* engine, int64_t seq) noexcept nogil:
    """The epoch under which operation `seq` runs: the last whose cut is not behind it."""
    cdef int epoch = engine.epoch
    while epoch > 0 and engine.history[epoch - 1].cut > seq:
        epoch -= 1
    return epoch

cdef inline Mask attempt_members(const Engine* engine, const Operation* op) noexcept nogil:
    """Whose input is in an operation, as far as this attempt gets."""
    if op.rolled:
        return mask_and(&engine.history[op.attempt - 1].members, &op.roll) if op.attempt > 0 \
            else op.roll
    return members_of(engine, op.attempt)

cdef inline bint awaits_roll(const Operation* op) noexcept nogil:
    """Whether it is not known yet whose input is in a partial operation."""
    return op.sig.flags & FLAG_PARTIAL and not op.rolled

cdef inline bint awaits_place(const Operation* op) noexcept nogil:
    """Whether it is not known yet where we stand in the order of arrival."""
    return (op.sig.flags & FLAG_ARRIVAL and not op.small and not op.standing
            and op.place_attempt != op.attempt)

cdef inline Mask gone(const Engine* engine) noexcept nogil:
    cdef Mask out = mask_or(&engine.dead, &engine.left)
    return mask_or(&out, &engine.lost)

cdef inline bint is_gone(const Engine* engine, int rank) noexcept nogil:
    return (mask_has(&engine.dead, rank) or mask_has(&engine.left, rank)
            or mask_has(&engine.lost, rank))

cdef inline int64_t ballot_of(int64_t round, int rank) noexcept nogil:
    return round << 16 | rank

cdef inline int ballot_rank(int64_t ballot) noexcept nogil:
    return <int>(ballot & 0xffff)

cdef inline int64_t ballot_round(int64_t ballot) noexcept nogil:
    return ballot >> 16

cdef inline int coordinator_of(const Engine* engine) noexcept nogil:
    """The lowest rank that is not known to be dead, to have left, or to be leaving."""
    cdef Mask out = gone(engine)
    cdef int r
    if engine.leaving:
        mask_add(&out, engine.rank)
    for r in range(engine.size):
        if not mask_has(&out, r):
            return r
    return engine.rank

cdef inline Operation* slot_of(Engine* engine, int64_t seq) noexcept nogil:
    return &engine.ring[seq % engine.settings.ring]

cdef inline Operation* find_operation(Engine* engine, int64_t seq) noexcept nogil:
    cdef Operation* op = slot_of(engine, seq)
    return op if op.seq == seq else NULL
