# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
"""Reductions, at the owner of the result: which inputs, in which places, in which attempt.

A *recipe* says of which objects the result is made, and of how many of them.  The owner asks for
each (a *scout* is answered by a rank that has it, or a part of it) and gives them places in the
order in which they become ready, until there are enough.  When all places are filled, what the
root makes becomes a partial copy of the result, which others may pull at once.

An attempt has a stamp of its own.  It comes to nothing when one of its ranks is gone or does not
have its input any more; then the next begins, with those that are ready, the spare ones among
them.  The first attempt of which all is known at two ranks is *sealed* (`hopcoll._directory`).

The recipe is also known to its caller, which tells it to a new owner of the result.
"""
from libc.stdint cimport int64_t, int32_t
from libc.string cimport memcmp, memcpy, memset
from cython_kernels.reduction cimport supported
from hopcoll._asks cimport tell_owner, wait_anew
from hopcoll._directory cimport decide, retry
from hopcoll._entries cimport (
    enter_state, find_holder, has_ended, make_entry, make_holder, tell)
from hopcoll._items cimport find_item, finish, finish_scouts, has_ask, make_item, settle_item
from hopcoll._letters cimport (
    give_memory, letter_of, post, send_letter, send_object, take_memory)
from hopcoll._store_state cimport *

cdef enum:
    NAME_BYTES = sizeof(Key) + sizeof(int64_t)     # an input in a letter: its key, what is known


# ---- the caller ---------------------------------------------------------------------------

cdef int inputs_max(const Store* store) noexcept nogil:
    """So many inputs have room in a letter, and their bits in the meta of the result."""
    cdef int64_t room = (store.transport.control_bytes_max - <int64_t>sizeof(Letter)) // NAME_BYTES
    return <int>room if room < 4 * META_MAX else 4 * META_MAX


cdef void tell_recipe(Store* store, const Called* called) noexcept nogil:
    cdef const unsigned char* letter = <const unsigned char*>(called + 1)
    post(store, owner_now(store, &called.key), letter, sizeof(Letter), letter + sizeof(Letter),
         called.nbytes - <int64_t>sizeof(Letter))


cdef void recipe_call(Store* store, Ask* ask, const Ask* inputs, int inputs_count, int count,
                      int op) noexcept nogil:
    """The object of `ask.key` is to be made of the first so many of these."""
    cdef int64_t nbytes = <int64_t>sizeof(Letter) + inputs_count * NAME_BYTES
    cdef Item* item = NULL if store.left else make_item(store, &ask.key)
    cdef Called* called
    cdef Letter letter
    cdef unsigned char* at
    cdef int i
    store.counters.reduces += 1
    called = NULL if item == NULL else <Called*>take_memory(store, sizeof(Called) + nbytes)
    if called == NULL:
        finish(store, item, ask, ASK_CLOSED, 0)
        return
    called.key = ask.key
    called.nbytes = nbytes
    called.next = store.called
    store.called = called
    letter = letter_of(LETTER_REDUCE, &ask.key, 0)
    letter.first = inputs_count
    letter.limit = count
    letter.tag = op
    at = <unsigned char*>(called + 1)
    memcpy(at, &letter, sizeof(Letter))
    at += sizeof(Letter)
    for i in range(inputs_count):
        memcpy(at, &inputs[i].key, sizeof(Key))
        memcpy(at + sizeof(Key), &inputs[i].stamp, sizeof(int64_t))
        at += NAME_BYTES
    ask.kind = ASK_REDUCE
    ask.next = item.asks
    item.asks = ask
    tell_recipe(store, called)


cdef void recipe_taken(Store* store, const Letter* letter) noexcept nogil:
    """The owner knows it; who gets the ref from now on is right to say that it exists."""
    cdef Item* item = find_item(store, &letter.key)
    cdef Ask** link = NULL if item == NULL else &item.asks
    cdef Ask* ask
    while link != NULL and link[0] != NULL:
        ask = link[0]
        if ask.kind == ASK_REDUCE:
            link[0] = ask.next
            finish(store, item, ask, ASK_OK, new_stamp(store, 0))
        else:
            link = &ask.next
    if item != NULL:
        settle_item(store, item)


cdef void recipe_made(Store* store, const Letter* letter) noexcept nogil:
    cdef Letter answer = letter_of(LETTER_FORGOT, &letter.key, 0)
    cdef Called** link = &store.called
    cdef Called* called
    while link[0] != NULL:
        called = link[0]
        if key_equal(&called.key, &letter.key):
            link[0] = called.next
            give_memory(store, called)
        else:
            link = &called.next
    send_letter(store, owner_now(store, &letter.key), &answer)


cdef void recipes_register(Store* store, int rank, const Mask* before) noexcept nogil:
    """A rank is gone: the new owners of what it owned are told what is to be made."""
    cdef Called* called = store.called
    while called != NULL:
        if (owner_of(store, &called.key, before) == rank
                and not store.settings.sabotage & BREAK_CALLER):
            store.counters.registered += 1
            tell_recipe(store, called)
        called = called.next


# ---- the list of recipes ------------------------------------------------------------------

cdef void take_recipe(Store* store, Entry* entry, int caller, const Letter* letter,
                      const unsigned char* body) noexcept nogil:
    cdef int m = <int>letter.first, k = <int>letter.limit, i
    cdef Recipe* recipe = <Recipe*>take_memory(
        store, sizeof(Recipe) + m * (sizeof(Input) + sizeof(int32_t))
        + 4 * k * sizeof(int32_t))
    if recipe == NULL:
        return
    recipe.entry = entry
    recipe.caller = caller
    recipe.op = letter.tag
    recipe.count = k
    recipe.inputs_count = m
    recipe.inputs = <Input*>(recipe + 1)
    recipe.order = <int32_t*>(recipe.inputs + m)
    recipe.parent = recipe.order + m
    recipe.feeds = recipe.parent + k
    recipe.slot = recipe.feeds + k
    recipe.filled = recipe.slot + k
    for i in range(m):
        memcpy(&recipe.inputs[i].ask.key, body, sizeof(Key))
        memcpy(&recipe.inputs[i].known, body + sizeof(Key), sizeof(int64_t))
        body += NAME_BYTES
        recipe.inputs[i].ask.kind = ASK_SCOUT
        recipe.inputs[i].place = -1
    recipe.next = store.recipes
    store.recipes = recipe
    entry.recipe = recipe
    entry.caller = 1 + caller
    store.recipes_dirty = 1


cdef void call_off(Store* store, Input* input) noexcept nogil:
    """Nobody waits for it any more."""
    cdef Item* item = find_item(store, &input.ask.key) if input.asked else NULL
    cdef Ask** link = NULL if item == NULL else &item.asks
    input.asked = 0
    if item == NULL:
        return
    while link[0] != NULL and link[0] != &input.ask:
        link = &link[0].next
    if link[0] != NULL:
        link[0] = input.ask.next
    if item.scouted and not has_ask(item, ASK_SCOUT):
        item.scouted = 0
        tell_owner(store, item, LETTER_UNSCOUT, 0, -1)
    settle_item(store, item)


cdef void free_recipe(Store* store, Recipe* recipe) noexcept nogil:
    cdef Recipe** link = &store.recipes
    cdef int i
    while link[0] != recipe:
        link = &link[0].next
    link[0] = recipe.next
    recipe.entry.recipe = NULL
    for i in range(recipe.inputs_count):
        call_off(store, &recipe.inputs[i])
    give_memory(store, recipe)


cdef void recipes_free(Store* store) noexcept nogil:
    cdef Called* called
    while store.recipes != NULL:
        free_recipe(store, store.recipes)
    while store.called != NULL:
        called = store.called
        store.called = called.next
        give_memory(store, called)


# ---- the tree -----------------------------------------------------------------------------

cdef int grow(Recipe* recipe, int low, int high, int degree, int parent, int slot) noexcept nogil:
    """Places [low, high) become a tree, filled from left to right: the first child's part, the
    root, the parts of the others.  Of degree 1 it is a chain, and the last to come is the root."""
    cdef int rest = high - low - 1, children = degree if degree < rest else rest
    cdef int at = low, i, size, root = low
    for i in range(children):
        size = rest // children + (i < rest % children)
        if i == 0:
            root = low + size
            grow(recipe, low, root, degree, root, 0)
            at = root + 1
        else:
            grow(recipe, at, at + size, degree, root, i)
            at += size
    recipe.parent[root] = parent
    recipe.slot[root] = slot
    recipe.feeds[root] = children
    return root


cdef int64_t cost_ns(const Store* store, int n, int64_t nbytes, int degree) noexcept nogil:
    """What a tree of so many places takes: its depth in messages, and the links of its roots."""
    cdef int64_t chunk = (nbytes if nbytes < store.settings.chunk_bytes
                          else store.settings.chunk_bytes)
    cdef int64_t rate = store.settings.bytes_per_ms if store.settings.bytes_per_ms else 1
    cdef int64_t depth = n - 1, reach = 1, level = 1
    if degree > 1:
        depth = 0
        while reach < n:
            level *= degree
            reach += level
            depth += 1
    return (depth * (store.settings.latency_ns + chunk * 1000000 // rate)
            + degree * (nbytes * 1000000 // rate))


cdef int degree_for(const Store* store, int n, int64_t nbytes) noexcept nogil:
    """Hoplite, section 4.3: the degree of the least cost, by the latency and the bandwidth."""
    cdef int best = 1, degree = 2
    if store.settings.degree:
        return store.settings.degree
    while degree < 2 * n:
        if cost_ns(store, n, nbytes, degree) < cost_ns(store, n, nbytes, best):
            best = degree
        degree *= 2
    return best


# ---- inputs -------------------------------------------------------------------------------

cdef void send_scout(Store* store, Input* input) noexcept nogil:
    cdef Item* item = make_item(store, &input.ask.key)
    if item == NULL:
        return
    input.asked = 1
    input.ask.result.complete = 0
    input.ask.serial = 0
    input.ask.patient = input.state == INPUT_LOST
    input.ask.stamp = 0 if input.ask.patient else input.known
    input.ask.next = NULL
    if item.state == ITEM_COMPLETE or item.state == ITEM_PARTIAL:
        input.ask.rank = store.rank
        finish(store, item, &input.ask, ASK_OK, item.stamp)
        return
    input.ask.next = item.asks
    item.asks = &input.ask
    if item.state == ITEM_NONE:
        wait_anew(store, item)


cdef void on_scouted(Store* store, Item* item, const Letter* letter,
                     const unsigned char* meta) noexcept nogil:
    """The owner of an input names a rank that has it, or a part of it."""
    cdef Ask* ask = item.asks
    if item.scouted > letter.serial:
        return                             # we have asked again since
    item.scouted = 0
    while ask != NULL:
        if ask.kind == ASK_SCOUT:
            ask.nbytes = letter.nbytes
            ask.meta_bytes = letter.meta_bytes
            memcpy(ask.meta, meta, letter.meta_bytes)
        ask = ask.next
    finish_scouts(store, item, letter.rank, letter.stamp)


cdef void send_again(Store* store, Input* input) noexcept nogil:
    """The rank that was named is gone, or does not have it."""
    cdef Item* item = make_item(store, &input.ask.key)
    input.state = INPUT_AWAITED
    input.place = -1
    if item != NULL:
        item.bad_rank = input.ask.rank
        item.bad_stamp = input.ask.stamp
        item.bad_gone = mask_has(&store.gone, input.ask.rank)
        send_scout(store, input)


cdef void forget_ready(Recipe* recipe, int input) noexcept nogil:
    cdef int i, to = 0
    for i in range(recipe.ready):
        if recipe.order[i] != input:
            recipe.order[to] = recipe.order[i]
            to += 1
    recipe.ready = to


cdef int prefix_of(const Ask* ask) noexcept nogil:
    """So many bytes of a meta are the dtype and the shape."""
    return ask.meta[1] if ask.meta_bytes >= 2 and ask.meta[1] <= ask.meta_bytes else ask.meta_bytes


cdef void fail(Store* store, Recipe* recipe, int reason, const Key* input,
               const Key* other) noexcept nogil:
    cdef Entry* entry = recipe.entry
    cdef Why why
    memset(&why, 0, sizeof(Why))
    why.reason = reason
    why.input = input[0]
    if other != NULL:
        why.other = other[0]
    if entry.state == ENTRY_PRESENT:
        retry(store, entry)
    memcpy(entry.meta, &why, sizeof(Why))
    entry.meta_bytes = sizeof(Why)
    enter_state(store, entry, ENTRY_FAILED)


cdef bint hear_scouts(Store* store, Recipe* recipe) noexcept nogil:
    """Takes what scouts have found; False: so the result cannot be."""
    cdef Input* input
    cdef Input* first
    cdef int i, ended = 0, last = -1
    for i in range(recipe.inputs_count):
        input = &recipe.inputs[i]
        if input.asked and input.ask.result.complete:
            input.asked = 0
            if input.ask.status == ASK_OK:
                input.state = INPUT_READY
                recipe.order[recipe.ready] = i
                recipe.ready += 1
            elif input.ask.status == ASK_LOST:
                input.state = INPUT_LOST
                send_scout(store, input)
            elif input.ask.status != ASK_CLOSED:
                input.state = INPUT_ENDED
        if input.state == INPUT_READY and mask_has(&store.gone, input.ask.rank):
            abandon(store, recipe, input.place)
            forget_ready(recipe, i)
            send_again(store, input)
            store.recipes_dirty = 1
        if input.state == INPUT_LOST or input.state == INPUT_ENDED:
            ended += 1
            last = i
    if recipe.inputs_count - ended < recipe.count:
        input = &recipe.inputs[last]
        fail(store, recipe, WHY_LOST if input.state == INPUT_LOST
             else WHY_DELETED if input.ask.status == ASK_DELETED else WHY_FAILED,
             &input.ask.key, NULL)
        return False
    for i in range(recipe.ready):
        input = &recipe.inputs[recipe.order[i]]
        first = &recipe.inputs[recipe.order[0]]
        if (input.ask.nbytes != first.ask.nbytes or prefix_of(&input.ask) != prefix_of(&first.ask)
                or memcmp(input.ask.meta, first.ask.meta, prefix_of(&first.ask)) != 0):
            fail(store, recipe, WHY_DIFFERENT, &first.ask.key, &input.ask.key)
            return False
        if not supported(input.ask.meta[0], recipe.op):
            fail(store, recipe, WHY_UNSUPPORTED, &input.ask.key, NULL)
            return False
    return True


# ---- attempts -----------------------------------------------------------------------------

cdef void leave_places(Store* store, Recipe* recipe) noexcept nogil:
    """All who have a place of the attempt are told that it is over."""
    cdef Letter letter = letter_of(LETTER_LEAVE, &recipe.entry.key, recipe.stamp)
    cdef Mask told = mask_none()
    cdef int i, rank
    for i in range(recipe.inputs_count):
        rank = recipe.inputs[i].ask.rank
        if recipe.inputs[i].place >= 0 and not mask_has(&told, rank):
            mask_add(&told, rank)
            if not mask_has(&store.gone, rank):
                send_letter(store, rank, &letter)
        recipe.inputs[i].place = -1
    recipe.placed = 0


cdef bint is_made(const Recipe* recipe) noexcept nogil:
    """Whether somebody has all of the attempt."""
    cdef const Holder* holder = recipe.entry.holders
    while holder != NULL and not (holder.complete and holder.stamp == recipe.stamp):
        holder = holder.next
    return holder != NULL


cdef void abandon(Store* store, Recipe* recipe, int place) noexcept nogil:
    """The attempt comes to nothing, if this place belongs to it; unless all of it was made."""
    if place < 0 or recipe.stamp == 0 or is_made(recipe):
        return
    leave_places(store, recipe)
    if recipe.entry.state == ENTRY_PRESENT and recipe.entry.stamp == recipe.stamp:
        retry(store, recipe.entry)
    recipe.stamp = 0
    store.recipes_dirty = 1


cdef Input* input_at(Recipe* recipe, int place) noexcept nogil:
    return NULL if recipe.filled[place] < 0 else &recipe.inputs[recipe.filled[place]]


cdef void begin_attempt(Store* store, Recipe* recipe) noexcept nogil:
    cdef Input* first = &recipe.inputs[recipe.order[0]]
    cdef int i
    recipe.stamp = new_stamp(store, recipe.entry.serial)
    recipe.entry.serial = serial_of(recipe.stamp)
    store.counters.attempts += 1
    recipe.next_place = 0
    for i in range(recipe.count):
        recipe.filled[i] = -1
    recipe.root = grow(recipe, 0, recipe.count,
                       degree_for(store, recipe.count, first.ask.nbytes), -1, 0)


cdef void link_child(Store* store, Recipe* recipe, int child) noexcept nogil:
    """Tells the parent of a place, when both are filled."""
    cdef int parent = recipe.parent[child]
    cdef Letter letter
    if parent < 0 or input_at(recipe, parent) == NULL or input_at(recipe, child) == NULL:
        return
    letter = letter_of(LETTER_FEED, &recipe.entry.key, recipe.stamp)
    letter.rank = parent
    letter.first = recipe.slot[child]
    letter.limit = input_at(recipe, child).ask.rank
    letter.tag = child
    send_letter(store, input_at(recipe, parent).ask.rank, &letter)


cdef int place_for(Recipe* recipe, const Input* input) noexcept nogil:
    """The next one; but the root is for the caller, who is likely to want the result: elsewhere
    its link would carry all of it in a second time."""
    if input.ask.rank == recipe.caller and input_at(recipe, recipe.root) == NULL:
        return recipe.root
    recipe.next_place += recipe.next_place == recipe.root
    if recipe.next_place == recipe.count:
        return recipe.root
    recipe.next_place += 1
    return recipe.next_place - 1


cdef void fill(Store* store, Recipe* recipe, Input* input) noexcept nogil:
    """Gives a place to an input."""
    cdef Letter letter = letter_of(LETTER_PLACE, &recipe.entry.key, recipe.stamp)
    cdef int place = place_for(recipe, input), i
    input.place = place
    recipe.filled[place] = <int32_t>(input - recipe.inputs)
    recipe.placed += 1
    letter.rank = place
    letter.nbytes = input.ask.nbytes
    letter.serial = recipe.count
    letter.first = recipe.feeds[place]
    letter.limit = input.ask.stamp
    letter.tag = input.ask.meta[0] | recipe.op << 8 | (recipe.parent[place] < 0) << 16
    post(store, input.ask.rank, &letter, sizeof(Letter), &input.ask.key, sizeof(Key))
    link_child(store, recipe, place)
    for i in range(recipe.count):
        if recipe.parent[i] == place:
            link_child(store, recipe, i)


cdef void name_root(Store* store, Recipe* recipe) noexcept nogil:
    """All places are filled: what the root makes is a copy of the result, and its meta says of
    which inputs."""
    cdef Entry* entry = recipe.entry
    cdef Letter letter = letter_of(LETTER_ROOT, &entry.key, recipe.stamp)
    cdef const Ask* root = &input_at(recipe, recipe.root).ask
    cdef Holder* holder
    cdef int i
    letter.rank = recipe.root
    letter.nbytes = root.nbytes
    enter_state(store, entry, ENTRY_PRESENT)
    entry.stamp = recipe.stamp
    entry.nbytes = letter.nbytes
    entry.reduced = entry.unsealed = 1
    entry.meta_bytes = prefix_of(root)
    memcpy(entry.meta, root.meta, entry.meta_bytes)
    memset(entry.meta + entry.meta_bytes, 0, (recipe.inputs_count + 7) // 8)
    for i in range(recipe.inputs_count):
        if recipe.inputs[i].place >= 0:
            entry.meta[entry.meta_bytes + i // 8] |= 1 << i % 8
    entry.meta_bytes += (recipe.inputs_count + 7) // 8
    holder = make_holder(store, entry, root.rank, recipe.stamp)
    if holder != NULL:
        holder.fed = 1
    if store.audit != NULL:
        store.audit(store.audit_context, recipe)
    send_object(store, root.rank, &letter, entry.meta, entry.meta_bytes, NULL)
    decide(store, entry)


cdef bint has_root(const Recipe* recipe) noexcept nogil:
    """Whether somebody still makes the result."""
    cdef const Holder* holder = recipe.entry.holders
    while holder != NULL and not (holder.stamp == recipe.stamp and holder.fed):
        holder = holder.next
    return holder != NULL


cdef Input* next_to_fill(Recipe* recipe, int last) noexcept nogil:
    """Of the inputs that are taken next: one of the rank that got the last place, since what is at
    one rank need not pass its link; one of the caller's rank, where the root is, after all others;
    else the first to be ready."""
    cdef Input* best = NULL
    cdef Input* input
    cdef int i, score, best_score = 0, left = recipe.count - recipe.placed
    for i in range(recipe.ready):
        input = &recipe.inputs[recipe.order[i]]
        if input.place >= 0:
            continue
        score = 3 if input.ask.rank == last else 1 if input.ask.rank == recipe.caller else 2
        if score > best_score:
            best = input
            best_score = score
        left -= 1
        if left == 0:
            break
    return best


cdef void step(Store* store, Recipe* recipe) noexcept nogil:
    cdef Entry* entry = recipe.entry
    cdef Input* input
    cdef int i
    if entry.state == ENTRY_PRESENT and not entry.unsealed:
        recipe.state = RECIPE_SEALED       # it was made under an owner that is gone
        return
    if entry.state == ENTRY_DELETING or has_ended(entry):
        recipe.state = RECIPE_OVER
        return
    if not recipe.begun:
        recipe.begun = 1
        for i in range(recipe.inputs_count):
            send_scout(store, &recipe.inputs[i])
    if recipe.stamp and is_made(recipe):
        return                             # what becomes of its inputs does not matter any more
    if not hear_scouts(store, recipe):
        return
    if recipe.stamp and recipe.placed == recipe.count and not has_root(recipe):
        abandon(store, recipe, 0)
    if entry.state == ENTRY_PRESENT and entry.stamp != recipe.stamp:
        return                             # the attempt of another owner is about to be sealed
    if recipe.stamp == 0 and recipe.ready:
        begin_attempt(store, recipe)
    if recipe.stamp == 0 or recipe.placed == recipe.count:
        return
    input = next_to_fill(recipe, -1)
    while input != NULL and recipe.placed < recipe.count:
        fill(store, recipe, input)
        input = next_to_fill(recipe, input.ask.rank)
    if recipe.placed == recipe.count:
        name_root(store, recipe)


cdef void end(Store* store, Recipe* recipe) noexcept nogil:
    """Its object is sealed, or will not be: all who have to do with it are told."""
    cdef Entry* entry = recipe.entry
    if recipe.stamp:
        leave_places(store, recipe)
    if not mask_has(&store.gone, recipe.caller):
        tell(store, entry, recipe.caller, LETTER_MADE, 0)
    free_recipe(store, recipe)
    if is_settled_for(store, &entry.key):
        decide(store, entry)


cdef void recipes_step(Store* store) noexcept nogil:
    """Goes on with all of which something has happened."""
    cdef Recipe* recipe
    cdef Recipe* next
    while store.recipes_dirty and not store.broken:
        store.recipes_dirty = 0
        recipe = store.recipes
        while recipe != NULL:
            next = recipe.next
            if recipe.state == RECIPE_OPEN and is_settled_for(store, &recipe.entry.key):
                step(store, recipe)
            if recipe.state != RECIPE_OPEN:
                end(store, recipe)
            recipe = next


cdef void on_recipe_letter(Store* store, int peer, const Letter* letter,
                           const unsigned char* body) noexcept nogil:
    """A recipe, or a place of one that came to nothing."""
    cdef Entry* entry = make_entry(store, &letter.key)
    cdef Input* input
    if entry == NULL:
        return
    if letter.type == LETTER_FORGOT:
        if entry.caller == 1 + peer and entry.recipe == NULL:
            entry.caller = 0
        if is_settled_for(store, &letter.key):
            decide(store, entry)
        return
    if letter.type == LETTER_REDUCE:
        tell(store, entry, peer, LETTER_TAKEN, 0)
        if entry.recipe == NULL:
            take_recipe(store, entry, peer, letter, body)
        return
    if entry.recipe == NULL or entry.recipe.stamp != letter.stamp:
        if is_settled_for(store, &letter.key):
            decide(store, entry)
        return
    input = input_at(entry.recipe, letter.rank)
    if input == NULL:
        return
    if letter.first == WHY_FULL and not is_made(entry.recipe):
        fail(store, entry.recipe, WHY_FULL, &input.ask.key, NULL)
        store.recipes_dirty = 1
        return
    abandon(store, entry.recipe, letter.rank)
    if entry.recipe.stamp == 0:
        forget_ready(entry.recipe, <int>(input - entry.recipe.inputs))
        send_again(store, input)
        store.recipes_dirty = 1
