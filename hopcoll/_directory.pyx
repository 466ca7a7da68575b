# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
"""The owner's side of the directory: who has what, who waits, and what follows from it.

What comes about a key is written down; `decide` then does all that can be done.  Of a key that was
a gone rank's nothing is decided before all who live have told what they have to do with it
(`settle_directory`).

A holder whose source is a holder, too, is fed by it; going from source to source one comes to a
*root*.  It is complete; or it has told that it has no source; or it will tell something soon, since
its source is gone.  Only copies with a complete root are named, so that no circle closes; and what
has no complete holder is lost once every root has told that it has no source.
"""
from libc.stdint cimport int64_t, int32_t
from libc.string cimport memcpy
from hopcoll._entries cimport (
    drop_holder, drop_waiter, drop_waiters_of, end_recipe, enter_state, find_holder, find_waiter,
    free_entry, leave_source, make_entry, make_holder, make_waiter, tell, tell_waiters)
from hopcoll._items cimport find_item
from hopcoll._letters cimport letter_of, send_letter, send_object
from hopcoll._store_state cimport *

cdef enum Root:
    ROOT_COMPLETE = 0
    ROOT_ASKS = 1
    ROOT_IN_TRANSIT = 2


# ---- locations ---------------------------------------------------------------------------

cdef Root root_of(const Store* store, const Entry* entry, const Holder* holder) noexcept nogil:
    cdef const Holder* source
    cdef int count = 0
    while not holder.complete and not holder.fed:
        if holder.source < 0:
            return ROOT_ASKS if holder.asking else ROOT_IN_TRANSIT
        source = find_holder(entry, holder.source)
        if source == NULL:
            # It was named by an owner that is gone, and has heard of it less than who pulls.
            return ROOT_ASKS if find_waiter(entry, holder.source, ASK_GET) != NULL \
                else ROOT_IN_TRANSIT
        holder = source
        count += 1
        if count > store.size:
            return ROOT_IN_TRANSIT         # a circle: only a broken variant makes one
    return ROOT_COMPLETE


cdef Holder* best_for(const Store* store, const Entry* entry, int rank) noexcept nogil:
    """A location for a receiver: complete rather than partial, of its host rather than of another,
    the first that came; NULL when all serve somebody."""
    cdef Holder* best = NULL
    cdef Holder* holder = entry.holders
    cdef int score, best_score = -1
    while holder != NULL:
        if (holder.rank != rank and holder.stamp == entry.stamp
                and (holder.receiver < 0 or store.settings.sabotage & BREAK_ALONE)
                and (root_of(store, entry, holder) == ROOT_COMPLETE
                     or store.settings.sabotage & BREAK_ROOTS)):
            score = 2 * holder.complete + (store.host[holder.rank] == store.host[rank])
            if score >= best_score:
                best = holder
                best_score = score
        holder = holder.next
    return best


# ---- decisions ----------------------------------------------------------------------------

cdef void accept(Store* store, Entry* entry, const Waiter* waiter) noexcept nogil:
    cdef Holder* holder
    if entry.state != ENTRY_PRESENT:
        enter_state(store, entry, ENTRY_PRESENT)
        entry.stamp = waiter.stamp
        entry.reduced = 0
        entry.noted = 0
    entry.nbytes = waiter.nbytes
    entry.meta_bytes = waiter.meta_bytes
    memcpy(entry.meta, waiter + 1, waiter.meta_bytes)
    holder = make_holder(store, entry, waiter.rank, waiter.stamp)
    if holder != NULL:
        holder.complete = 1
        holder.asking = 0
        leave_source(entry, holder)
    tell(store, entry, waiter.rank, LETTER_OK, waiter.stamp)


cdef void decide_puts(Store* store, Entry* entry) noexcept nogil:
    cdef Waiter** link = &entry.waiters
    cdef Waiter* waiter
    while link[0] != NULL:
        waiter = link[0]
        if waiter.kind != ASK_PUT:
            link = &waiter.next
            continue
        if entry.recipe == NULL and (entry.state != ENTRY_PRESENT
                                     or waiter.stamp == entry.stamp):
            accept(store, entry, waiter)
            drop_waiters_of(store, entry, waiter.rank, ASK_GET)
            link = &entry.waiters          # the list is another now
            while link[0] != waiter:
                link = &link[0].next
        else:
            tell(store, entry, waiter.rank, LETTER_EXISTS, waiter.stamp)
        drop_waiter(store, link)


cdef void end_waits(Store* store, Entry* entry, int kind, int type) noexcept nogil:
    cdef Waiter** link = &entry.waiters
    while link[0] != NULL:
        if link[0].kind == kind:
            tell(store, entry, link[0].rank, type, entry.stamp)
            drop_waiter(store, link)
        else:
            link = &link[0].next


cdef void start_deleting(Store* store, Entry* entry) noexcept nogil:
    cdef Holder* holder = entry.holders
    cdef Holder* next
    enter_state(store, entry, ENTRY_DELETING)
    end_recipe(store, entry, RECIPE_OVER)
    tell_waiters(store, entry, LETTER_DELETED, entry.stamp)
    while holder != NULL:
        next = holder.next
        if store.settings.sabotage & BREAK_REACH and not holder.complete:
            drop_holder(store, entry, holder)
        else:
            tell(store, entry, holder.rank, LETTER_DROP, holder.stamp)
        holder = next


cdef bint is_lost(Store* store, const Entry* entry) noexcept nogil:
    cdef const Holder* holder = entry.holders
    cdef Root root
    while holder != NULL:
        root = root_of(store, entry, holder)
        if root == ROOT_COMPLETE or (root == ROOT_IN_TRANSIT
                                     and not store.settings.sabotage & BREAK_TRANSIT):
            return False
        holder = holder.next
    return True


cdef void end_lost(Store* store, Entry* entry) noexcept nogil:
    """No complete copy is left; what there is of it is thrown away."""
    enter_state(store, entry, ENTRY_LOST)
    store.counters.lost += 1
    while entry.holders != NULL:
        tell(store, entry, entry.holders.rank, LETTER_LOST, entry.holders.stamp)
        drop_holder(store, entry, entry.holders)
    tell_waiters(store, entry, LETTER_LOST, entry.stamp)


cdef const Copy* own_copy(Store* store, const Entry* entry) noexcept nogil:
    """The bytes that the owner has itself, if they fit into a message."""
    cdef Item* item = find_item(store, &entry.key)
    if entry.nbytes > store.settings.inline_bytes:
        return NULL
    if (item == NULL or item.stamp != entry.stamp
            or (item.state != ITEM_COMPLETE and item.state != ITEM_OFFERED)):
        return NULL
    return item.copy


cdef bint give_location(Store* store, Entry* entry, int rank, int64_t serial) noexcept nogil:
    """Tells a receiver where to pull, or gives it the bytes; False while there is no place."""
    cdef Holder* location
    cdef Holder* receiver
    cdef const Copy* copy = own_copy(store, entry)
    cdef Letter letter
    if copy == NULL:
        location = best_for(store, entry, rank)
        if location == NULL:
            return False
    receiver = make_holder(store, entry, rank, entry.stamp)
    if receiver == NULL:
        return False
    receiver.asking = 0
    if copy != NULL:
        receiver.complete = 1
        receiver.source = -1
        letter = letter_of(LETTER_HAVE, &entry.key, entry.stamp)
    else:
        receiver.source = location.rank
        location.receiver = rank
        letter = letter_of(LETTER_NAME, &entry.key, entry.stamp)
        letter.rank = location.rank
    letter.nbytes = entry.nbytes
    letter.serial = serial
    letter.flags |= flags_of(entry)
    send_object(store, rank, &letter, entry.meta, entry.meta_bytes, copy)
    return True


cdef int flags_of(const Entry* entry) noexcept nogil:
    return (LETTER_IS_REDUCED * (entry.reduced != 0)
            | LETTER_IS_UNSEALED * (entry.unsealed != 0))


cdef bint answer_scout(Store* store, const Entry* entry, const Waiter* waiter) noexcept nogil:
    """Names a copy, whole if there is one, but for what the scout did not find: it was about to
    come there, and is not whole yet, or the rank is gone."""
    cdef const Holder* holder = entry.holders
    cdef const Holder* best = NULL
    cdef Letter letter
    while holder != NULL:
        if (holder.stamp == entry.stamp and root_of(store, entry, holder) == ROOT_COMPLETE
                and not (holder.rank == waiter.bad_rank and holder.stamp == waiter.bad_stamp
                         and (waiter.bad_gone or not holder.complete))
                and (best == NULL or holder.complete >= best.complete)):
            best = holder
        holder = holder.next
    if best == NULL:
        return False
    letter = letter_of(LETTER_SCOUTED, &entry.key, entry.stamp)
    letter.rank = best.rank
    letter.nbytes = entry.nbytes
    letter.serial = waiter.serial
    send_object(store, waiter.rank, &letter, entry.meta, entry.meta_bytes, NULL)
    return True


cdef void give_locations(Store* store, Entry* entry) noexcept nogil:
    """To who has begun before who has not."""
    cdef Holder* holder = entry.holders
    cdef Waiter** link = &entry.waiters
    cdef Letter letter
    while holder != NULL:
        if not holder.complete and holder.asking:
            give_location(store, entry, holder.rank, 0)
        holder = holder.next
    while link[0] != NULL:
        if link[0].kind == ASK_SCOUT:
            if answer_scout(store, entry, link[0]):
                drop_waiter(store, link)
            else:
                link = &link[0].next
        elif link[0].kind == ASK_LOOK and not entry.unsealed:
            letter = letter_of(LETTER_LOOKED, &entry.key, entry.stamp)
            letter.nbytes = entry.nbytes
            letter.serial = link[0].serial
            send_object(store, link[0].rank, &letter, entry.meta, entry.meta_bytes, NULL)
            drop_waiter(store, link)
        elif link[0].kind == ASK_GET and (find_holder(entry, link[0].rank) != NULL
                                          or give_location(store, entry, link[0].rank,
                                                           link[0].serial)):
            drop_waiter(store, link)
        else:
            link = &link[0].next


cdef bint knows_better(const Entry* entry) noexcept nogil:
    """Whether a ref of somebody who waits says that there was an object."""
    cdef const Waiter* waiter = entry.waiters
    while waiter != NULL:
        if waiter.kind != ASK_PUT and waiter.kind != ASK_DELETE and waiter.stamp:
            return True
        waiter = waiter.next
    return False


# ---- results of reductions ----------------------------------------------------------------

cdef void seal(Store* store, Entry* entry) noexcept nogil:
    """Two ranks know the outcome: it is the object, whoever dies next."""
    cdef Holder* holder = entry.holders
    entry.unsealed = 0
    store.counters.sealed += 1
    if store.audit_seal != NULL:
        store.audit_seal(store.audit_context, entry)
    while holder != NULL:
        if holder.stamp == entry.stamp:
            tell(store, entry, holder.rank, LETTER_SEALED, entry.stamp)
        holder.fed = 0
        holder = holder.next
    end_recipe(store, entry, RECIPE_SEALED)


cdef void retry(Store* store, Entry* entry) noexcept nogil:
    """The attempt came to nothing: who has anything of it drops it, and waits anew."""
    while entry.holders != NULL:
        tell(store, entry, entry.holders.rank, LETTER_RETRY, entry.holders.stamp)
        drop_holder(store, entry, entry.holders)
    enter_state(store, entry, ENTRY_FREE)
    entry.stamp = 0
    store.recipes_dirty = 1


cdef void write_note(Store* store, Entry* entry) noexcept nogil:
    """Only we have the outcome: before anybody is told, who owns the key after us has to know."""
    cdef Mask gone = store.gone
    cdef int next
    mask_add(&gone, store.rank)
    next = owner_of(store, &entry.key, &gone)
    if next < 0 or (entry.note == entry.stamp and entry.noted_at == next and entry.is_noted):
        seal(store, entry)
    elif entry.note != entry.stamp or entry.noted_at != next:
        if entry.note and entry.noted_at != next:
            tell(store, entry, entry.noted_at, LETTER_UNNOTE, entry.note)
        entry.note = entry.stamp
        entry.noted_at = next
        entry.is_noted = 0
        tell(store, entry, next, LETTER_NOTE, entry.stamp)


cdef void decide_attempt(Store* store, Entry* entry) noexcept nogil:
    cdef const Holder* holder = entry.holders
    cdef bint whole = False
    while holder != NULL:
        if holder.complete and holder.stamp == entry.stamp:
            if holder.rank != store.rank or store.settings.sabotage & BREAK_SEAL:
                seal(store, entry)
                return
            whole = True
        holder = holder.next
    if whole:
        write_note(store, entry)
    elif entry.recipe == NULL or entry.recipe.stamp != entry.stamp:
        retry(store, entry)                # it ran under an owner that is gone


cdef void on_note(Store* store, int peer, const Letter* letter) noexcept nogil:
    """We are told as who would own the key next."""
    cdef Entry* entry = make_entry(store, &letter.key)
    if entry == NULL:
        return
    if letter.type == LETTER_NOTE:
        entry.noted = letter.stamp
        tell(store, entry, peer, LETTER_NOTED, letter.stamp)
    else:
        if entry.noted == letter.stamp:
            entry.noted = 0
        if (entry.state == ENTRY_FREE and entry.holders == NULL and entry.waiters == NULL
                and entry.recipe == NULL and not entry.noted and not entry.caller):
            free_entry(store, entry)


cdef void on_noted(Entry* entry, int peer, const Letter* letter) noexcept nogil:
    if entry.note == letter.stamp and entry.noted_at == peer:
        entry.is_noted = 1


# ---- all together -------------------------------------------------------------------------

cdef void decide(Store* store, Entry* entry) noexcept nogil:
    """Does what can be done about a key that is ours, and of which all is known."""
    if entry.state == ENTRY_DELETING:
        if entry.holders != NULL or entry.caller:
            return
        enter_state(store, entry, ENTRY_DELETED)
        end_waits(store, entry, ASK_DELETE, LETTER_GONE)
    decide_puts(store, entry)
    if entry.unsealed and not find_delete(entry):
        decide_attempt(store, entry)
    if entry.state != ENTRY_PRESENT:
        if find_delete(entry) and entry.caller:
            start_deleting(store, entry)
            return
        if find_delete(entry):
            enter_state(store, entry, ENTRY_DELETED)
            end_waits(store, entry, ASK_DELETE, LETTER_GONE)
        elif entry.state == ENTRY_FREE and entry.noted:
            # Its result may have been read, and it cannot be made a second time.
            entry.stamp = entry.noted
            enter_state(store, entry, ENTRY_LOST)
            store.counters.lost += 1
        elif entry.state == ENTRY_FREE and entry.recipe == NULL and knows_better(entry):
            entry.stamp = 0
            enter_state(store, entry, ENTRY_LOST)
            store.counters.lost += 1
        if entry.state == ENTRY_DELETED:
            tell_waiters(store, entry, LETTER_DELETED, entry.stamp)
        elif entry.state == ENTRY_LOST:
            tell_waiters(store, entry, LETTER_LOST, entry.stamp)
        elif entry.state == ENTRY_FAILED:
            # Its caller has to forget it first, or would have a new owner try once more.
            if not entry.caller or store.settings.sabotage & BREAK_FAILED:
                tell_waiters(store, entry, LETTER_FAILED, entry.stamp)
        elif (entry.waiters == NULL and entry.recipe == NULL and not entry.noted
              and not entry.caller):
            free_entry(store, entry)
    elif find_delete(entry):
        start_deleting(store, entry)
        if entry.holders == NULL:
            decide(store, entry)
    elif not entry.unsealed and is_lost(store, entry):
        end_lost(store, entry)
    else:
        give_locations(store, entry)


cdef bint find_delete(const Entry* entry) noexcept nogil:
    cdef const Waiter* waiter = entry.waiters
    while waiter != NULL and waiter.kind != ASK_DELETE:
        waiter = waiter.next
    return waiter != NULL


# ---- what comes ---------------------------------------------------------------------------

cdef void on_hold(Store* store, Entry* entry, int peer, const Letter* letter,
                  const unsigned char* meta) noexcept nogil:
    """Another owner had accepted this object.  Of two stamps the one with a complete copy is the
    later: the other was lost."""
    cdef bint complete = letter.flags & LETTER_IS_COMPLETE
    cdef bint reduced = letter.flags & LETTER_IS_REDUCED
    cdef bint later = complete
    cdef Holder* holder = make_holder(store, entry, peer, letter.stamp)
    cdef Holder* source
    if holder == NULL:
        return
    if reduced and entry.serial < serial_of(letter.stamp):
        entry.serial = serial_of(letter.stamp)
    if reduced and entry.reduced and entry.state == ENTRY_PRESENT:
        # Of attempts all but the last came to nothing, also those of which all was made.
        later = serial_of(letter.stamp) >= serial_of(entry.stamp)
    if entry.state == ENTRY_FREE or later:
        if entry.state != ENTRY_PRESENT:
            enter_state(store, entry, ENTRY_PRESENT)
        # Whoever knows that it is sealed is right.
        entry.unsealed = (letter.flags & LETTER_IS_UNSEALED) != 0 and (
            entry.unsealed or entry.stamp != letter.stamp)
        entry.reduced = reduced
        entry.stamp = letter.stamp
        entry.nbytes = letter.nbytes
        entry.meta_bytes = letter.meta_bytes
        memcpy(entry.meta, meta, letter.meta_bytes)
    holder.complete = complete
    holder.unsealed = letter.flags & LETTER_IS_UNSEALED
    holder.asking = letter.flags & LETTER_ASKS
    holder.source = -1 if complete else letter.rank
    if holder.source >= 0:
        source = find_holder(entry, holder.source)
        if source != NULL:
            source.receiver = peer


cdef void on_orphan(Store* store, Entry* entry, int peer, const Letter* letter) noexcept nogil:
    """A partial copy has no source any more.  If that is gone, it is none for anybody."""
    cdef Holder* holder = find_holder(entry, peer)
    cdef Holder* source
    if holder == NULL or holder.stamp != letter.stamp or holder.complete:
        return
    leave_source(entry, holder)
    holder.asking = 1
    source = find_holder(entry, letter.rank) if letter.flags & LETTER_IS_GONE else NULL
    if source != NULL:
        drop_holder(store, entry, source)


cdef void on_owner_letter(Store* store, int peer, const Letter* letter,
                          const unsigned char* meta) noexcept nogil:
    """Something about a key that is ours."""
    cdef Entry* entry = make_entry(store, &letter.key)
    cdef Holder* holder
    if entry == NULL:
        return
    if letter.type == LETTER_PUT:
        make_waiter(store, entry, peer, ASK_PUT, letter, meta)
    elif letter.type == LETTER_HOLD:
        on_hold(store, entry, peer, letter, meta)
    elif letter.type == LETTER_ASK:
        make_waiter(store, entry, peer, ASK_GET, letter, meta)
    elif letter.type == LETTER_LOOK:
        make_waiter(store, entry, peer, ASK_LOOK, letter, meta)
    elif letter.type == LETTER_DELETE:
        make_waiter(store, entry, peer, ASK_DELETE, letter, meta)
    elif letter.type == LETTER_UNLOOK:
        drop_waiters_of(store, entry, peer, ASK_LOOK)
    elif letter.type == LETTER_SCOUT:
        make_waiter(store, entry, peer, ASK_SCOUT, letter, meta)
    elif letter.type == LETTER_UNSCOUT:
        drop_waiters_of(store, entry, peer, ASK_SCOUT)
    elif letter.type == LETTER_NOTED:
        on_noted(entry, peer, letter)
    elif letter.type == LETTER_ORPHAN:
        on_orphan(store, entry, peer, letter)
    else:
        holder = find_holder(entry, peer)
        if holder != NULL and holder.stamp == letter.stamp:
            if letter.type == LETTER_DROPPED:
                drop_holder(store, entry, holder)
            else:
                leave_source(entry, holder)
                holder.complete = 1
                holder.asking = 0
    if is_settled_for(store, &letter.key):
        decide(store, entry)


cdef void forget_gone(Store* store, int rank) noexcept nogil:
    """A rank is gone: what it had, what it waited for, and who gave to it."""
    cdef Entry* entry
    cdef Entry* next
    cdef Holder* holder
    cdef int32_t i
    for i in range(store.entry_buckets):
        entry = store.entries[i]
        while entry != NULL:
            next = entry.next
            holder = find_holder(entry, rank)
            if holder != NULL:
                drop_holder(store, entry, holder)
            drop_waiters_of(store, entry, rank, -1)
            if entry.caller == 1 + rank:
                entry.caller = 0
            if is_settled_for(store, &entry.key):
                decide(store, entry)
            entry = next


cdef void settle_others(Store* store, Entry* entry) noexcept nogil:
    """Copies of a stamp that was lost, as the owner before had found, or sealed."""
    cdef Holder* holder = entry.holders
    cdef Holder* next
    while holder != NULL:
        next = holder.next
        if holder.stamp == entry.stamp:
            if holder.unsealed and not entry.unsealed and entry.state == ENTRY_PRESENT:
                tell(store, entry, holder.rank, LETTER_SEALED, entry.stamp)
            holder.unsealed = 0
        else:
            tell(store, entry, holder.rank, LETTER_RETRY if entry.reduced else LETTER_LOST,
                 holder.stamp)
            drop_holder(store, entry, holder)
        holder = next


cdef void settle_directory(Store* store) noexcept nogil:
    """Once every living rank has told what it has to, as far as we know who is gone: decides."""
    cdef Entry* entry
    cdef Entry* next
    cdef int32_t i
    cdef int r
    if mask_equal(&store.settled, &store.gone):
        return
    for r in range(store.size):
        if (r != store.rank and not mask_has(&store.gone, r)
                and not mask_within(&store.gone, &store.synced[r])):
            return
    store.settled = store.gone
    store.recipes_dirty = 1
    store.counters.settled += 1
    for i in range(store.entry_buckets):
        entry = store.entries[i]
        while entry != NULL:
            next = entry.next
            if is_settled_for(store, &entry.key):      # else it has only a note about it
                settle_others(store, entry)
                decide(store, entry)
            entry = next
