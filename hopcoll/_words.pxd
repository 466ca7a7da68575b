# cython: language_level=3
"""The numbers that have names: bounds, kinds, statuses, messages, broken variants."""

cdef enum:
    FAULTS_MAX = 16
    BLOCKS_MAX = 8            # of a result that all ranks get
    TWINS = 2                 # ... along two trees
    NOBODY = 0x7fff           # "no holder" in 16 bits
    DEGREE_MAX = 16           # of the control tree
    GROUPS_MAX = 8            # of ranks that called different things, which an error names
    TOKEN_IGNORED = 0
    USER_OP = 12              # behind the operations of the kernels: the caller's own

cdef enum Kind:
    BCAST = 0
    REDUCE = 1
    ALLREDUCE = 2
    BARRIER = 3
    GATHER = 4
    ALLGATHER = 5
    SCATTER = 6
    ALLTOALL = 7
    REDUCE_SCATTER = 8
    SCAN = 9
    EXSCAN = 10

cdef enum Flag:
    FLAG_IN_PLACE = 1         # local: never part of a signature
    FLAG_RAISE = 2
    FLAG_VECTOR = 4           # blocks of different lengths
    FLAG_ORDERED = 8          # a fold in the order of the ranks, whoever that suits
    FLAG_PARTIAL = 16         # of those who come first, or in time; the root is the quorum
    FLAG_CARRY = 32           # what came too late is added to the next one of this layout
    FLAG_ARRIVAL = 64         # a fold in the order in which the ranks call it

cdef enum Status:
    STATUS_OK = 0
    STATUS_ROOT_LOST = 1
    STATUS_RANK_FAILED = 2
    STATUS_MISMATCH = 3
    STATUS_CLOSED = 4
    STATUS_MPI_ERROR = 5
    STATUS_STOPPED = 6        # this rank has no part in it any more; see Stop
    STATUS_MISSED = 7         # this rank came so late that nobody keeps the result any more

cdef enum Phase:
    PARTIAL_PHASE = 0
    FINAL_PHASE = 1
    RIGHT_PHASE = 2           # partial sums again, of the other child; see _twins.pyx
    PHASES = 3

cdef enum EntryKind:
    ENTRY_DEATH = 0
    ENTRY_MISMATCH = 1

cdef enum Suspicion:
    SUSPICION_NONE = 0
    SUSPICION_NEW = 1
    SUSPICION_TOLD = 2        # our status in the open ballot shows what we called

cdef enum StartResult:
    START_OK = 0
    START_AGAIN = 1
    START_NO_MEMORY = 2
    START_STOPPED = 3

cdef enum Stop:               # why a rank goes on no further
    STOP_NONE = 0
    STOP_OUT = 1              # the others took it for dead, and decided so
    STOP_MINORITY = 2         # too few are within reach to decide anything

cdef enum Stage:              # of a ballot, at the rank that leads it
    STAGE_NONE = 0
    STAGE_ASKING = 1          # until all have answered
    STAGE_PROPOSING = 2       # until enough have accepted

# Broken variants: each switches one rule off, so that the checkers can prove themselves awake.
cdef enum Sabotage:
    BREAK_FREEZE = 1
    BREAK_BALLOT_ORDER = 2
    BREAK_ORDERED_CUT = 4
    BREAK_TAINT = 8
    BREAK_VOIDS = 16
    BREAK_RETENTION = 32
    BREAK_SEAL = 64
    BREAK_LOST = 128
    BREAK_ASKED = 256
    BREAK_MINORITY = 512      # a minority goes on
    BREAK_BALLOT = 1024       # each decides by itself, as soon as it knows of a death
    BREAK_STAND = 2048        # what once stood binds for ever
    BREAK_STABLE = 4096       # what comes later makes stable
    BREAK_OWN_RAISE = 8192    # a rank raises by what it knows alone
    BREAK_DRAIN = 16384       # a region is granted again before the old grant has drained
    BREAK_ACCEPT = 32768      # a proposal is decided before others have it
    BREAK_CARRY = 65536       # a carry is consumed before the operation that takes it along
    BREAK_ROLL = 131072       # a roll that was closed once binds for ever
    BREAK_FORMER = 262144     # who has left in peace is waited for
    BREAK_CHAIN = 524288      # who was only proposed as a member decides
    BREAK_MERGE = 1048576     # an answer for many forgets what one of them said
    BREAK_SPEAK = 2097152     # a rank answers for others that have not promised
    BREAK_COVER = 4194304     # a rank tells how far others are that it has not heard of
    BREAK_ATTEMPT = 8388608   # what went up or down a tree counts in another attempt
    BREAK_RUN = 16777216      # a sum is kept although it is of other ranks now
    BREAK_SLOTS = 33554432    # a slot is granted again before what came into it was added
    BREAK_SIDES = 67108864    # what is behind us in the order is added as if it were before us

cdef enum Cut:                # somebody told that the tree of a ballot is cut
    CUT_NONE = 0
    CUT_NEW = 1
    CUT_KNOWN = 2             # ... by a rank that nobody is reached through, if that can be

cdef enum More:               # in the head of a WATERMARK
    MORE_NONE = 0
    MORE_BELOW = 1            # `seq` is done at all who are reached through us
    MORE_AGAIN = 2            # tell us what is done at yours

cdef enum MessageType:
    MSG_EAGER = 1
    MSG_GRANT = 2
    MSG_CREDIT = 3
    MSG_WATERMARK = 4
    MSG_PREPARE = 5
    MSG_STATUS = 6
    MSG_DECIDE = 7
    MSG_FETCH = 8
    MSG_RELAY = 9
    MSG_ANNOUNCE = 10
    MSG_COMPLAIN = 11
    MSG_BYE = 12
    MSG_READY = 13
    MSG_BYE_HEARD = 14
    MSG_ROOT_DONE = 15
    MSG_WHOLE = 16
    MSG_SEAL = 17
    MSG_CALLED = 18
    MSG_PROPOSE = 19
    MSG_ACCEPTED = 20
    MSG_REFUSED = 21
    MSG_BEAT = 22
    MSG_SILENT = 23
    MSG_FENCE = 24
    MSG_OUT = 25
    MSG_STOP = 26
    MSG_ARRIVED = 27
    MSG_ROLL = 28
    MSG_GONE = 29
    MSG_PLACE = 30
    MSG_NEXT = 31
    MSG_AWAY = 32
    MSG_CUT = 33
    MSG_UP = 34
    MSG_DOWN = 35
    MSG_ASK = 40
    MSG_WHERE = 41
    MSG_STACK = 42
