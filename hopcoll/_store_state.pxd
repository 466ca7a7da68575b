# cython: language_level=3
"""The state of one rank's store of objects, and the layout of its messages.

Plain structs, like those of the engine (`hopcoll._state`): nothing here knows MPI, a clock or
randomness.  What the words mean is in ARCHITECTURE.md, section Objects.
"""
from libc.stdint cimport int64_t, int32_t, uint64_t, uint32_t, uint16_t, uint8_t
from cython_kernels.stream cimport Grid, Sink, Spring
from cython_kernels.transport cimport Transport
from hopcoll._mask cimport *
from hopcoll._state cimport Result

cdef enum:
    META_MAX = 256            # bytes that say what the bytes are; nobody here looks into them
    BUCKETS_FIRST = 64

cdef enum LetterType:         # the first byte of each message of a store
    # To the owner of a key.
    LETTER_PUT = 1            # we have a complete copy, which is not accepted yet
    LETTER_HOLD = 2           # we have a copy: a new owner is told
    LETTER_ASK = 3            # a get waits here; LETTER_LOOK: a wait
    LETTER_LOOK = 4
    LETTER_COMPLETE = 5       # our partial copy is complete
    LETTER_ORPHAN = 6         # our partial copy has no source; the one that it had is `rank`
    LETTER_DELETE = 7
    LETTER_DROPPED = 8        # we have no copy any more
    LETTER_UNLOOK = 9         # our wait is over
    LETTER_REDUCE = 10        # the object is to be made of others; their keys and stamps behind
    LETTER_SCOUT = 11         # a reduction waits for an input
    LETTER_UNSCOUT = 12
    LETTER_UNPLACED = 13      # our place of an attempt, `rank`, came to nothing; why: `first`
    LETTER_NOTED = 14         # we know that this attempt may have been read
    LETTER_FORGOT = 15        # we called the reduction, and tell nobody of it any more
    # From the owner.
    LETTER_OK = 16            # the put is accepted
    LETTER_EXISTS = 17        # it is not
    LETTER_NAME = 18          # pull from `rank`
    LETTER_HAVE = 19          # here are the bytes
    LETTER_LOOKED = 20        # it is there
    LETTER_DROP = 21          # drop your copy, and say so
    LETTER_LOST = 22
    LETTER_DELETED = 23       # to who waits for it
    LETTER_GONE = 24          # to who deleted it
    LETTER_SEALED = 25        # what you have of this attempt is the object
    LETTER_RETRY = 26         # this attempt came to nothing: drop it, and wait anew
    LETTER_FAILED = 27        # a reduction cannot be: to who waits for it
    LETTER_SCOUTED = 28       # `rank` has it, or a part
    LETTER_TAKEN = 29         # the reduction is known
    LETTER_MADE = 30          # it needs its caller no more
    # Between the two ends of a stream.
    LETTER_GRANT = 32
    LETTER_CREDIT = 33
    LETTER_END = 34
    # From the owner of a result to those who make it.
    LETTER_PLACE = 40         # place `rank` of an attempt is yours; the key of its input behind
    LETTER_FEED = 41          # a child of place `rank` is place `tag` at rank `limit`
    LETTER_ROOT = 42          # what place `rank` makes is the object
    LETTER_LEAVE = 43         # the attempt is over
    LETTER_NOTE = 44          # to who would own the key next: this attempt may be read
    LETTER_UNNOTE = 45
    # Between any two, to measure the network.
    LETTER_PING = 46
    LETTER_PONG = 47
    # To all.
    LETTER_SYNC = 48          # all that concerns you was told, under this set of the gone
    LETTER_BYE = 49

cdef enum LetterFlag:
    LETTER_IS_COMPLETE = 1    # of a HOLD
    LETTER_ASKS = 2           # of a HOLD: a partial copy that has no source
    LETTER_INLINE = 4         # the bytes come behind the meta
    LETTER_IS_GONE = 8        # of an ORPHAN: the source is gone, not only without the copy
    LETTER_IS_REDUCED = 16    # the stamp is that of an attempt of a reduction
    LETTER_IS_UNSEALED = 32   # ... which may still come to nothing
    LETTER_IS_PATIENT = 64    # of a SCOUT: it knows that the object was lost, and waits for another

cdef struct Key:
    uint64_t high
    uint64_t low

cdef struct Letter:           # the meta and the bytes come behind it
    uint8_t type
    uint8_t flags
    uint16_t meta_bytes
    int32_t rank
    Key key
    int64_t stamp
    int64_t nbytes            # of the object
    int64_t serial            # of an ASK or a LOOK, and of the answer; 0: to a holder
    int64_t first             # of streams: GRANT the first chunk, CREDIT and END what was told
    int64_t limit             # ... chunks below it have a posted receive
    int32_t tag
    int32_t pad

cdef struct Parcel:           # a letter that waits here
    Parcel* next
    int64_t nbytes
    int32_t peer
    int32_t pad

cdef struct Copy:             # bytes, as long as anybody needs them
    unsigned char* data
    int64_t nbytes
    int32_t refs              # its item, streams, gets that are answered, views of the program
    int32_t pad

cdef enum AskKind:
    ASK_PUT = 0
    ASK_GET = 1
    ASK_LOOK = 2
    ASK_DELETE = 3
    ASK_SCOUT = 4             # the owner of a result waits for an input, whole or not
    ASK_REDUCE = 5

cdef enum AskStatus:
    ASK_OK = 0
    ASK_EXISTS = 1
    ASK_LOST = 2
    ASK_DELETED = 3
    ASK_FULL = 4
    ASK_CLOSED = 5
    ASK_FAILED = 6            # of a reduction; the meta is a Why

cdef enum Reason:
    WHY_LOST = 1              # an input was
    WHY_DELETED = 2
    WHY_FAILED = 3            # ... which is itself the result of a reduction
    WHY_DIFFERENT = 4         # two inputs do not have one dtype and shape
    WHY_UNSUPPORTED = 5       # the operation is not for this dtype
    WHY_FULL = 6              # no memory for partial sums where this input is

cdef struct Why:
    int64_t reason
    Key input
    Key other                 # of two that differ

cdef enum WantKind:
    WANT_PUT = 1              # room for what the program puts
    WANT_PULL = 2             # ... for what an item is about to pull
    WANT_BACK = 3             # ... for a copy that is in a file alone
    WANT_SUMS = 4             # ... for the partial sums of a place

cdef struct Want:             # memory that something waits for, in the order of the store's list
    Want* next
    void* whose               # an Item, a Place or, of a put, an Ask
    int64_t nbytes
    int32_t kind              # 0: it waits for none
    int32_t pad
    Result result             # of a put: complete, when there is room, or will be none

cdef struct Ask:              # what the program waits for; in its memory
    Result result             # complete, once the status is there
    Want want                 # of a put, before it begins
    Ask* next                 # of its item
    int32_t kind
    int32_t status
    Key key
    int64_t stamp             # of what it is about; of a get or wait: what its ref knows, then got
    int64_t nbytes
    int64_t serial            # the letter of its item that speaks for it; 0: none does
    Copy* copy                # what a get got; the room of a put
    int32_t rank              # of a scout: who has it, or a part
    int32_t patient           # ... which waits for another object after one was lost
    int32_t meta_bytes
    unsigned char meta[META_MAX]

cdef enum ItemState:
    ITEM_NONE = 0
    ITEM_OFFERED = 1          # put here, and not accepted yet
    ITEM_PARTIAL = 2
    ITEM_COMPLETE = 3

cdef struct Stream:           # a pull, or a serve
    int32_t index             # in the table; its token is made of it
    int32_t is_pull           # 0: a serve
    int32_t stray             # a pull from a lost rank: nothing waits for its end
    int32_t pad
    int64_t stamp
    Grid grid
    Sink sink
    Spring spring
    Copy* copy                # NULL: a serve that was asked for before its bytes were
    Item* item                # NULL: it only drains
    Place* place              # of what comes from a child of a place of ours
    Stream* next              # of its item's serves, or of the free

cdef struct Item:             # what this rank has to do with a key
    Item* next                # in its bucket
    Key key
    int64_t stamp             # of the copy
    int64_t nbytes
    int64_t have              # chunks of the copy
    int64_t sent              # the number of the last letter by which something waits
    Grid grid
    Copy* copy
    Stream* pull
    Stream* serves
    Ask* asks
    int32_t state
    int32_t source            # whom we were named last, until it is no more; -1: nobody
    int32_t orphaned          # the owner was told that there is none
    int32_t deleting          # a deletion waits at the owner
    int64_t asked             # gets do: the last letter that is not answered; 0: none
    int64_t looked            # ... and waits
    int64_t scouted           # ... and scouts
    int32_t reduced           # the stamp is that of an attempt of a reduction
    int32_t unsealed          # ... which may still come to nothing
    int32_t told              # that all of it came, by who makes it
    int32_t bad_rank          # a scout found that this rank does not have
    int32_t bad_gone          # ... since it is gone
    int32_t pad
    int64_t bad_stamp         # ... this
    Want want
    Item* older               # of the copies in memory that are complete, by their last use
    Item* newer
    int32_t listed
    int32_t touched           # it was used since a file of it was begun
    Job* job                  # under way for it
    int64_t file              # which has the bytes, too; without a copy, alone.  0: none
    uint64_t checksum         # ... of it
    int32_t meta_bytes
    unsigned char meta[META_MAX]

cdef enum JobKind:
    JOB_WRITE = 1             # the bytes of a copy become a file
    JOB_READ = 2              # ... and come back
    JOB_REMOVE = 3            # the file goes

cdef struct Job:              # for the thread that looks after files; the store has no disk
    Job* next
    int32_t kind
    int32_t failed
    int32_t dropped           # its item has no use for it any more
    int32_t pad
    Key key
    int64_t file
    int64_t nbytes
    uint64_t checksum
    Copy* copy

cdef struct Feed:             # a child of a place
    int32_t rank              # -1: not known yet
    int32_t index             # which place it is
    int32_t slot              # chunks land in its window of slots; -1: in the output
    int32_t pad
    int64_t chunks            # all of them have come; 0: not yet
    Stream* stream
    Place* local              # it is of this rank

cdef struct Place:            # an input of a reduction and its partial sum, at who has the input
    Item out                  # comes first: the key of the result, the stamp of the attempt
    Place* next
    int32_t index
    int32_t filled            # 0: it was only asked for so far
    int32_t is_root
    int32_t dtype
    int32_t op
    int32_t count             # of the inputs of all places
    int32_t feeds_count
    int32_t failed
    int32_t input_whole
    int32_t pad
    Key input_key
    int64_t input_stamp
    Copy* input
    Copy* slots
    Feed* feeds

cdef struct Holder:           # at the owner: a copy of another, or of its own
    Holder* next
    int64_t stamp
    int32_t rank
    int32_t complete
    int32_t source            # whom it pulls from; -1: nobody
    int32_t asking            # ... and it has told so
    int32_t receiver          # who pulls from it; -1: nobody
    int32_t unsealed          # it has not been told that its attempt is the object
    int32_t fed               # it is the root of a reduction that runs

cdef struct Waiter:           # at the owner
    Waiter* next
    int32_t rank
    int32_t kind              # AskKind
    int64_t stamp             # of a put; else what is known to have been there
    int64_t serial            # of a get or a wait: its last letter, which the answer names
    int64_t nbytes            # of a put
    int32_t meta_bytes        # the meta comes behind it
    int32_t patient           # of a scout
    int32_t bad_rank          # ... which found that this rank does not have
    int32_t bad_gone          # ... since it is gone
    int64_t bad_stamp         # ... this

cdef enum EntryState:
    ENTRY_FREE = 0            # nothing is known but who waits
    ENTRY_PRESENT = 1
    ENTRY_DELETING = 2
    ENTRY_DELETED = 3
    ENTRY_LOST = 4
    ENTRY_FAILED = 5          # the meta is a Why

cdef struct Entry:            # at the owner: a key
    Entry* next
    Key key
    int64_t stamp             # the one that was accepted last; 0: none that is known
    int64_t nbytes
    Entry* older              # of a DELETED or LOST one: who came to that before it, and after
    Entry* newer
    Holder* holders
    Waiter* waiters
    Recipe* recipe            # of what it is to be made
    int64_t serial            # the highest of the attempts
    int64_t noted             # another owner says that this attempt may have been read
    int64_t note              # we say so of this one
    int32_t noted_at          # ... to this rank
    int32_t is_noted          # ... which has heard it
    int32_t caller            # 1 + who tells new owners how it is made; 0: nobody
    int32_t reduced
    int32_t unsealed          # the attempt may still come to nothing
    int32_t state
    int32_t meta_bytes
    unsigned char meta[META_MAX]

cdef enum InputState:
    INPUT_AWAITED = 0
    INPUT_READY = 1
    INPUT_LOST = 2            # another may be put in its place
    INPUT_ENDED = 3

cdef struct Input:            # of a reduction, at the owner of the result
    Ask ask
    int64_t known             # what its ref knows
    int32_t state
    int32_t place             # in the attempt; -1: none
    int32_t asked             # a scout is under way
    int32_t pad

cdef enum RecipeState:
    RECIPE_OPEN = 0
    RECIPE_SEALED = 1
    RECIPE_OVER = 2           # deleted, lost or failed

cdef struct Recipe:           # how an object is to be made, at its owner
    Recipe* next
    Entry* entry
    int64_t stamp             # of the attempt that runs; 0: none does
    int32_t state
    int32_t caller
    int32_t op
    int32_t count             # of so many inputs
    int32_t inputs_count
    int32_t ready
    int32_t placed
    int32_t begun             # its inputs were asked for
    int32_t* order            # inputs in the order in which they became ready
    int32_t* parent           # of each place
    int32_t* feeds            # ... how many children it has
    int32_t* slot             # ... which child of its parent it is
    int32_t* filled           # ... by which input; -1: none yet
    int32_t root
    int32_t next_place        # those before it are filled, but for the root
    Input* inputs

cdef struct Called:           # at the caller of a reduction; its letter comes behind it
    Called* next
    Key key
    int64_t nbytes
    int64_t pad

cdef struct StoreSettings:
    int64_t chunk_bytes
    int64_t inline_bytes
    int64_t limit_bytes
    int64_t scratch_bytes     # of all files
    int32_t window
    int32_t ended_max         # how many deleted or lost keys an owner remembers
    int32_t degree            # of the trees of reductions; 0: what costs the least time
    int64_t latency_ns        # of a message, and
    int64_t bytes_per_ms      # of a link: what that is reckoned from
    uint32_t sabotage

cdef enum StoreSabotage:
    BREAK_ROOTS = 1           # a copy is named whatever its chain of sources ends at
    BREAK_SETTLED = 2         # a new owner decides before all have told it what they have
    BREAK_REGISTER = 4        # who has a copy does not tell a new owner
    BREAK_OFFSET = 8          # a pull goes on behind what was posted, not behind what came
    BREAK_REACH = 16          # a deletion forgets partial copies
    BREAK_VOID = 32           # a stream that ends is not answered with voids
    BREAK_TRANSIT = 128       # lost as soon as no complete holder is known
    BREAK_WAITERS = 256       # a new owner is not told who waits
    BREAK_ALONE = 512         # a location is named while it serves another
    BREAK_SEAL = 1024         # the outcome of a reduction is told while one rank alone knows it
    BREAK_ATTEMPT = 2048      # what is there of an attempt that came to nothing is kept
    BREAK_HELD = 4096         # an input that may come to nothing is used up to its end
    BREAK_CALLER = 8192       # a new owner is not told of reductions
    BREAK_FAILED = 16384      # a reduction is said to have failed while its caller would repeat it
    BREAK_FILE = 32768        # a file is taken for the bytes of whatever its key has by then
    BREAK_UNREAD = 65536      # of a file that cannot be read the owner is not told
    BREAK_STALE = 131072      # who has dropped its part takes what a holder is told

cdef struct StoreCounters:
    int64_t puts
    int64_t gets
    int64_t deletes
    int64_t pulls
    int64_t resumed           # pulls that went on at an offset
    int64_t inlined           # objects that came inside a message
    int64_t voids
    int64_t chunks_sent
    int64_t chunks_received
    int64_t bytes_sent
    int64_t bytes_received
    int64_t letters_sent
    int64_t registered        # what was told to new owners
    int64_t settled           # times that a new owner knew all
    int64_t lost              # keys that were found to be lost
    int64_t held              # letters that came before we knew that they are for us
    int64_t reduces
    int64_t places            # that this rank filled
    int64_t attempts          # of reductions that are ours
    int64_t sealed
    int64_t early             # streams that were asked for before we had been told the object
    int64_t waited            # times that something waited for room
    int64_t spilled           # copies that went to files
    int64_t restored          # ... and came back
    int64_t unread            # ... or could not be read
    int64_t unwritten         # files that could not be written

cdef struct Store:
    Transport* transport
    int32_t* tags             # shared with the engines over this transport
    StoreSettings settings
    int32_t rank
    int32_t size
    int32_t used              # by us or by others; until then it only notes who is gone
    int32_t left              # we said good-bye
    int32_t broken            # no memory for what cannot be left out
    int32_t streams_used      # while this is not 0, something moves
    int32_t streams_made
    int32_t streams_room
    int32_t items_count
    int32_t entries_count
    int32_t ended_count
    int32_t item_buckets
    int32_t entry_buckets
    int64_t serial            # stamps given
    Entry* ended_first        # of the keys that were deleted or lost
    Entry* ended_last
    int64_t used_bytes        # of all copies
    int64_t filed_bytes       # of all files
    int64_t writing_bytes     # of copies whose files are being written
    int64_t files             # numbers given
    int32_t reading           # copies that come back
    int32_t putting           # copies that are being put: they can go when they are accepted
    int32_t disk_fails        # a file could not be written, for what waits now
    int32_t pad2
    Item* rescue              # whose copy came back over the limit, to be sent to others
    Want* wants
    Item* oldest              # used least recently
    Item* newest
    Job* jobs
    Job* jobs_last
    Job* ended                # whose end was told, and not looked at yet
    Stream** streams
    Stream* stream_free
    Item** items
    Entry** entries
    Parcel* inbox             # from ourselves
    Parcel* inbox_last
    Place* places
    Recipe* recipes
    Called* called            # reductions that this rank called, and that need it still
    int32_t recipes_dirty     # something has happened to one
    int32_t pad
    Parcel* early             # for keys that are not known to be ours
    Parcel* early_last
    Mask gone                 # dead, lost or left
    Mask dead
    Mask lost
    Mask settled              # the gone, when we last knew all of what is ours
    Mask* synced              # by rank: what its last marker covered
    uint16_t* host            # by rank
    unsigned char* outbox
    StoreCounters counters
    void (*notify)(void* context) noexcept nogil      # an ask was answered
    void* notify_context
    void (*disk)(void* context) noexcept nogil        # there is a job; NULL: there are no files
    void (*pong)(void* context, int64_t serial) noexcept nogil           # a ping came back
    void (*audit)(void* context, const Recipe* recipe) noexcept nogil    # a root is known
    void (*audit_seal)(void* context, const Entry* entry) noexcept nogil  # it can be read now
    void* audit_context

cdef inline bint key_equal(const Key* a, const Key* b) noexcept nogil:
    return a.high == b.high and a.low == b.low

cdef inline uint64_t mixed(uint64_t z) noexcept nogil:
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ULL
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBULL
    return z ^ (z >> 31)

cdef inline uint64_t hash_of(const Key* key) noexcept nogil:
    return mixed(key.high ^ mixed(key.low + 0x9E3779B97F4A7C15ULL))

cdef inline int owner_of(const Store* store, const Key* key, const Mask* gone) noexcept nogil:
    """The living rank of the highest hash.  It stays so in every larger set of the gone that it is
    not in."""
    cdef uint64_t base = hash_of(key), best = 0, one
    cdef int r, found = -1
    for r in range(store.size):
        if not mask_has(gone, r):
            one = mixed(base + 0x9E3779B97F4A7C15ULL * <uint64_t>(r + 1))
            if found < 0 or one > best:
                found = r
                best = one
    return found

cdef inline int64_t serial_of(int64_t stamp) noexcept nogil:
    return stamp & ((<int64_t>1 << 40) - 1)

cdef inline int rank_of(int64_t stamp) noexcept nogil:
    """Who gave the stamp."""
    return <int>(stamp >> 40) - 1

cdef inline int64_t new_stamp(Store* store, int64_t after) noexcept nogil:
    if store.serial < after:
        store.serial = after
    store.serial += 1
    return (<int64_t>store.rank + 1) << 40 | store.serial

cdef inline int owner_now(const Store* store, const Key* key) noexcept nogil:
    return owner_of(store, key, &store.gone)

cdef inline bint is_settled_for(const Store* store, const Key* key) noexcept nogil:
    """Whether what is decided about a key is ours to decide, and all is known of it."""
    return (owner_of(store, key, &store.settled) == store.rank
            or store.settings.sabotage & BREAK_SETTLED)
