# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
"""Runs of simulated worlds: by random numbers, and every order that there is."""
from libc.stdint cimport int64_t, int16_t, int32_t, uint64_t, uint32_t
from libc.stdlib cimport malloc, calloc, free
from libc.string cimport memset
from hopcoll._state cimport *
from hopcoll._network cimport *
from hopcoll._world cimport *
from hopcoll._script cimport *
from hopcoll._checks cimport check_end
from hopcoll._describe cimport describe
from hopcoll._explorer cimport *

cdef enum:
    TRACE_MAX = 1 << 16
    STEPS_MAX = 4000000

VIOLATIONS = {
    FINE: None, HANG: "hang",
    WRONG_VALUE: "a result is not that of its contributors",
    DIFFERENT_OUTCOMES: "two ranks have different contributors, epochs or statuses",
    CONTRIBUTORS_GREW: "contributors grew from one operation to the next",
    LIVING_LEFT_OUT: "a living rank was left out of a result",
    INPUT_CHANGED: "an input was changed",
    BAD_UNEXPECTED_DATA: "data came that no receive waited for",
    BAD_BORROWED_CHANGED: "memory was changed while a send read it",
    BAD_BORROWED_FREED: "memory was released while a request held it",
    STABLE_TOO_EARLY: "an operation was called stable while a living rank had not done it",
    STABLE_WENT_BACK: "what was stable is no longer",
    ENGINE_BROKEN: "an engine gave up (protocol error or out of memory)",
    WRONG_STATUS: "a status does not fit the fate of the root or the calls",
    RAISED_WRONGLY: "an operation raised without a death, or did not although it should",
    OUT_OF_ROOM: "the world is too small for this script",
    LEAK: "a record, a stream or memory was never given back",
    TOUCHED_AFTER_RETURN: "a buffer was written after its operation had returned",
    TOO_MANY_MESSAGES: "more control messages than the script can explain",
    MISMATCH_MISSED: "different calls went unnoticed",
    LIVELOCK: "the world came back to where it was",
    SPLIT: "two groups went on without each other",
    NO_QUORUM: "a result of fewer ranks than were there",
    LEFT_THE_HEALTHY: "a rank was stopped although all could be heard",
}
ACTIONS = {ACT_CALL: "call", ACT_CONTROL: "control", ACT_DATA: "data", ACT_LATE: "late",
           ACT_DETECT: "detect", ACT_KILL: "kill", ACT_TICK: "tick", ACT_LEAVE: "leave",
           ACT_GO: "go", ACT_PAUSE: "pause", ACT_RESUME: "resume", ACT_CUT: "cut",
           ACT_HEAL: "heal"}
ACTION_NAMES = {name: action for action, name in ACTIONS.items()}
KINDS = {"bcast": BCAST, "reduce": REDUCE, "allreduce": ALLREDUCE, "barrier": BARRIER,
         "gather": GATHER, "allgather": ALLGATHER, "scatter": SCATTER, "alltoall": ALLTOALL,
         "reduce_scatter": REDUCE_SCATTER, "scan": SCAN, "exscan": EXSCAN}
SABOTAGES = {"freeze": BREAK_FREEZE, "ballot_order": BREAK_BALLOT_ORDER,
             "ordered_cut": BREAK_ORDERED_CUT, "taint": BREAK_TAINT, "voids": BREAK_VOIDS,
             "retention": BREAK_RETENTION, "seal": BREAK_SEAL, "lost": BREAK_LOST,
             "asked": BREAK_ASKED, "minority": BREAK_MINORITY, "ballot": BREAK_BALLOT,
             "stand": BREAK_STAND, "stable": BREAK_STABLE, "own_raise": BREAK_OWN_RAISE,
             "drain": BREAK_DRAIN, "accept": BREAK_ACCEPT,
             "carry": BREAK_CARRY, "roll": BREAK_ROLL, "former": BREAK_FORMER,
             "chain": BREAK_CHAIN, "merge": BREAK_MERGE, "speak": BREAK_SPEAK,
             "cover": BREAK_COVER, "attempt": BREAK_ATTEMPT, "run": BREAK_RUN,
             "slots": BREAK_SLOTS, "sides": BREAK_SIDES}
DELAYS = {"none": DELAY_NONE, "eager": DELAY_EAGER, "late": DELAY_LATE, "any": DELAY_ANY}
ORDERS = {"every": EVERY_ORDER, "lowest": LOWEST_FIRST, "turns": IN_TURNS}
IN_PLACE = FLAG_IN_PLACE
RAISE = FLAG_RAISE
VECTOR = FLAG_VECTOR
ORDERED = FLAG_ORDERED
PARTIAL = FLAG_PARTIAL
CARRY = FLAG_CARRY
ARRIVAL = FLAG_ARRIVAL
MIXED = STEP_MIXED


# ---- random runs --------------------------------------------------------------------------

cdef struct Mood:             # what one random run favours
    uint64_t slow             # ranks that call late and whose messages come late
    int32_t slow_percent
    int32_t slow_pair         # one link that is slower still, or -1
    int32_t detect_percent
    int32_t kill_every
    int32_t aim_percent       # deaths in the middle of a ballot
    int32_t tick_percent


cdef bint choose_delivery(World* world, const Mood* mood, Choice* choice,
                          bint anything) noexcept nogil:
    cdef Network* network = &world.network
    cdef int n = world.size, pairs = n * n, start, tries, i, dest
    cdef Channel* channel
    start = next_random(network) % pairs
    for tries in range(pairs):
        i = start + tries if start + tries < pairs else start + tries - pairs
        channel = &network.channels[i]
        if channel.used == 0 and channel.data_count == 0:
            continue
        dest = i % n
        if (not acts(world, dest) or (i == mood.slow_pair and not anything)
                or is_cut(world, i // n, dest)):
            continue
        if (not anything and (mood.slow >> dest & 1 or mood.slow >> (i // n) & 1)
                and <int>(next_random(network) % 100) < mood.slow_percent):
            continue
        choice.a = i // n
        choice.b = dest
        if channel.data_count and (channel.used == 0 or next_random(network) & 1):
            choice.action = ACT_DATA
            choice.c = next_random(network) % channel.data_count
            while not first_of_tag(channel, choice.c):
                choice.c -= 1
        else:
            choice.action = ACT_CONTROL
        return True
    return False


cdef bint choose_late(World* world, Choice* choice) noexcept nogil:
    cdef Network* network = &world.network
    cdef int start = next_random(network) % world.size, tries, r
    for tries in range(world.size):
        r = (start + tries) % world.size
        if network.ports[r].late_count and acts(world, r):
            choice.action = ACT_LATE
            choice.a = r
            choice.b = next_random(network) % network.ports[r].late_count
            while not first_of_token(&network.ports[r], choice.b):
                choice.b -= 1
            return True
    return False


cdef bint choose_any(World* world, Choice* choice, int action) noexcept nogil:
    """The first thing of this kind that can happen, from a random rank on."""
    cdef int start = next_random(&world.network) % world.size, tries, r, peer
    for tries in range(world.size):
        r = (start + tries) % world.size
        choice.action = action
        choice.a = r
        if action == ACT_CALL and can_call(world, r):
            return True
        if action == ACT_LEAVE and can_leave(world, r):
            return True
        if action == ACT_GO and can_go(world, r):
            return True
        if action == ACT_DETECT:
            for peer in range(world.size):
                if can_detect(world, r, peer):
                    choice.b = peer
                    return True
    return False


cdef bint choose(World* world, const Mood* mood, Choice* choice) noexcept nogil:
    """The next step; False when nothing can happen any more."""
    cdef Network* network = &world.network
    cdef int n = world.size
    cdef uint64_t dice = next_random(network) % 100
    memset(choice, 0, sizeof(Choice))
    choice.budget = -1
    if world.deaths_left > 0 and world.alive > 1 and next_random(network) % mood.kill_every == 0:
        choice.action = ACT_KILL
        choice.a = next_random(network) % n
        if is_here(world, choice.a):
            return True
    if dice < 12:
        choice.a = next_random(network) % n
        choice.action = ACT_CALL
        if can_call(world, choice.a) and not mood.slow >> choice.a & 1:
            return True
    elif dice < 20:
        if choose_late(world, choice):
            return True
    elif dice < 23:
        if choose_any(world, choice, ACT_LEAVE if dice == 20 else ACT_GO):
            return True
    if <int>(next_random(network) % 100) < mood.detect_percent:
        choice.a = next_random(network) % n
        choice.b = next_random(network) % n
        choice.action = ACT_DETECT
        if can_detect(world, choice.a, choice.b):
            return True
    if <int>(next_random(network) % 100) < mood.tick_percent:
        choice.a = next_random(network) % n
        choice.action = ACT_TICK
        choice.b = 300000 if next_random(network) & 1 else 2000
        if is_here(world, choice.a) and not world.silence:
            return True
    choice.b = choice.c = 0
    return (choose_delivery(world, mood, choice, False) or choose_any(world, choice, ACT_CALL)
            or (mood.slow_pair >= 0 and choose_any(world, choice, ACT_DETECT))
            or choose_delivery(world, mood, choice, True) or choose_late(world, choice)
            or choose_any(world, choice, ACT_DETECT) or choose_any(world, choice, ACT_LEAVE)
            or choose_any(world, choice, ACT_GO))


cdef void choose_mood(World* world, Mood* mood, int kill_every) noexcept nogil:
    cdef Network* network = &world.network
    memset(mood, 0, sizeof(Mood))
    mood.kill_every = kill_every
    if next_random(network) & 1:
        mood.slow = next_random(network) & next_random(network)
        mood.slow_percent = 100 if next_random(network) & 1 else 90
    mood.slow_pair = next_random(network) % (world.size * world.size) \
        if next_random(network) & 1 else -1
    mood.detect_percent = 8
    if next_random(network) % 3 == 0:
        mood.detect_percent = 50 if next_random(network) & 1 else 0
    if next_random(network) & 1:
        mood.aim_percent = 25
    if next_random(network) % 4 == 0:
        mood.tick_percent = 5 if next_random(network) & 1 else 30


cdef void keep(Choice* trace, int* trace_count, const Choice* choice) noexcept nogil:
    if trace_count[0] < TRACE_MAX:
        trace[trace_count[0]] = choice[0]
        trace_count[0] += 1


cdef uint64_t whole_hosts(const World* world, uint64_t side) noexcept nogil:
    """A side of a cut, made of whole hosts: no cable is between two ranks of one."""
    cdef uint64_t whole = 0
    cdef int r, first
    for r in range(world.size):
        first = 0
        while world.host[first] != world.host[r]:
            first += 1
        whole |= (side >> first & 1) << r
    return whole


cdef bint disturb(World* world, Choice* choice) noexcept nogil:
    """Something that only silence tells of: a rank stops or goes on, a link is cut or heals."""
    cdef Network* network = &world.network
    cdef uint64_t dice = next_random(network) % 8, side
    memset(choice, 0, sizeof(Choice))
    choice.budget = -1
    choice.a = next_random(network) % world.size
    if dice < 3:
        choice.action = ACT_PAUSE
        return acts(world, choice.a)
    if dice < 5:
        choice.action = ACT_RESUME
        return is_here(world, choice.a) and world.paused >> choice.a & 1
    if dice < 7:
        choice.action = ACT_CUT
        side = next_random(network)
        if next_random(network) & 1:
            side &= next_random(network)       # few against many
        side = whole_hosts(world, side)
        choice.a = <int32_t><uint32_t>side
        choice.b = <int32_t>(side >> 32)
        return world.side == 0 and side != 0
    choice.action = ACT_HEAL
    return world.side != 0


cdef bint just_ended(const World* world) noexcept nogil:
    """Whether a rank that gave up has ended, and the link is still cut."""
    cdef int r
    for r in range(world.size):
        if world.side and world.network.ports[r].left:
            return True
    return False


cdef int silent_run(World* world, Choice* trace, int* trace_count, int kill_every,
                    int disturb_every) noexcept nogil:
    """A run with a common clock, which goes on when nothing else happens: what is heard in time
    depends on who is stopped and which links are cut, and on nothing else."""
    cdef int steps = 0, r
    cdef int64_t until = 200 * world.settings.detect_us
    cdef bint calm
    cdef Choice choice
    cdef Mood mood
    choose_mood(world, &mood, kill_every)
    mood.tick_percent = 0
    while world.violation == FINE and steps < STEPS_MAX:
        calm = world.clock_us > until // 2         # in the end they must come to one
        if (not calm and next_random(&world.network) % disturb_every == 0
                and disturb(world, &choice)):
            keep(trace, trace_count, &choice)
            perform(world, &choice)
        if choose(world, &mood, &choice):
            if (choice.action != ACT_KILL and world.deaths_left > 0 and world.alive > 1
                    and next_random(&world.network) % (4 * kill_every) == 0):
                choice.budget = next_random(&world.network) % 4
            keep(trace, trace_count, &choice)
            perform(world, &choice)
            steps += 1
            continue
        if is_settled(world):
            break
        if world.clock_us > until:
            world.violation = HANG
            break
        if just_ended(world) and next_random(&world.network) % 4 == 0:
            memset(&choice, 0, sizeof(Choice))
            choice.budget = -1
            choice.action = ACT_HEAL       # before the others have given up as well
            keep(trace, trace_count, &choice)
            perform(world, &choice)
        elif (not calm and next_random(&world.network) % 64 == 0
              and disturb(world, &choice)):
            keep(trace, trace_count, &choice)
            perform(world, &choice)
        world.clock_us += world.settings.detect_us // 20
        for r in range(world.size):
            if not acts(world, r) or world.violation != FINE:
                continue
            memset(&choice, 0, sizeof(Choice))
            choice.budget = -1
            choice.action = ACT_TICK
            choice.a = r
            choice.b = <int32_t>(world.clock_us - world.ranks[r].engine.now_us)
            keep(trace, trace_count, &choice)
            perform(world, &choice)
    if world.violation == FINE:
        if steps >= STEPS_MAX:
            world.violation = LIVELOCK
        else:
            check_end(world)
    return steps


cdef int random_run(World* world, Choice* trace, int* trace_count, int kill_every,
                    int aim_percent) noexcept nogil:
    """One run by the world's own random numbers; returns the number of steps."""
    cdef int steps = 0, quiet = 0, actor
    cdef Choice choice
    cdef Mood mood
    cdef Engine* engine
    choose_mood(world, &mood, kill_every)
    if aim_percent >= 0:
        mood.aim_percent = aim_percent
    while world.violation == FINE and steps < STEPS_MAX:
        if choose(world, &mood, &choice):
            quiet = 0 if choice.action != ACT_TICK else quiet
        else:
            if quiet >= 3 * world.size:
                break
            memset(&choice, 0, sizeof(Choice))
            choice.budget = -1
            choice.action = ACT_TICK
            choice.a = quiet % world.size
            choice.b = 300000
            quiet += 1
            if not is_here(world, choice.a):
                continue
        if choice.action != ACT_KILL and world.deaths_left > 0 and world.alive > 1:
            actor = choice.b if (choice.action == ACT_CONTROL or choice.action == ACT_DATA) \
                else choice.a
            engine = world.ranks[actor].engine
            if next_random(&world.network) % (4 * kill_every) == 0:
                choice.budget = next_random(&world.network) % 4
            elif ((engine.stage or (choice.action == ACT_CALL
                                        and next_random(&world.network) & 1))
                    and <int>(next_random(&world.network) % 100) < mood.aim_percent):
                choice.budget = next_random(&world.network) % world.size
        keep(trace, trace_count, &choice)
        perform(world, &choice)
        steps += 1
    if world.violation == FINE:
        if steps >= STEPS_MAX:
            world.violation = LIVELOCK
        else:
            check_end(world)
    return steps


# ---- Python -------------------------------------------------------------------------------

cdef void fill_step(Step* step, item) except *:
    kind, count, root, flags = item[:4]
    step.deadline_us = item[4] if len(item) > 4 else 0
    step.kind = KINDS[kind]
    step.count = count
    step.root = root
    step.flags = flags


cdef void fill_plan(World* plan, int size, script, dict options) except *:
    """A world without its memory; takes from `options` what it knows and refuses the rest."""
    cdef int64_t chunks = 0
    cdef int deaths
    memset(plan, 0, sizeof(World))
    if not 1 <= size <= 64:
        raise ValueError(f"size: {size} is not in 1..64")
    if len(script) > OPERATIONS_MAX:
        raise ValueError(f"script: {len(script)} operations, at most {OPERATIONS_MAX}")
    deaths = options.pop("deaths", 1)
    plan.size = size
    plan.deaths_left = deaths
    plan.depth = options.pop("depth", 2)
    plan.leaving = options.pop("leaving", False)
    plan.exits = options.pop("exits", False)
    plan.steps_count = len(script)
    for k, item in enumerate(script):
        fill_step(&plan.script[k], item)
    plan.odd_rank = plan.early_leaver = -1
    odd = options.pop("odd", None)
    if odd is not None:
        plan.odd_rank, plan.odd_step = odd[0], odd[1]
        fill_step(&plan.odd, odd[2])
    early = options.pop("early", None)
    if early is not None:
        plan.early_leaver, plan.early_steps = early
    plan.network.sent_delay = DELAYS[options.pop("sent", "any")]
    plan.network.lost_delay = DELAYS[options.pop("lost", "any")]
    plan.settings.chunk_bytes = options.pop("chunk_bytes", 16)
    plan.settings.eager_bytes = options.pop("eager_bytes", 8)
    plan.settings.retain_bytes_max = options.pop("retain_bytes_max", 48)
    plan.settings.retain_budget_bytes = options.pop("retain_budget_bytes", 96)
    plan.settings.late_budget_bytes = options.pop("late_budget_bytes", 400)
    plan.settings.window = options.pop("window", 2)
    plan.settings.ring = options.pop("ring", 8)
    plan.settings.active = options.pop("active", 2)
    plan.settings.degree = options.pop("degree", DEGREE_MAX)
    if not 2 <= plan.settings.degree <= DEGREE_MAX:
        raise ValueError(f"degree: {plan.settings.degree} is not in 2..{DEGREE_MAX}")
    plan.settings.outlets_max = options.pop(
        "outlets_max", 8 * size * (plan.settings.active + plan.depth) + 64)
    plan.settings.detect_us = options.pop("detect_us", 0)
    for rank, host in enumerate(options.pop("hosts", ())):
        plan.host[rank] = host
    plan.settings.announce_us = 250000
    plan.settings.report_us = 10000000
    plan.settings.flush_us = 1000
    plan.settings.patience_us = 2000
    if plan.settings.chunk_bytes > COPY_MAX:
        raise ValueError(f"chunk_bytes: {plan.settings.chunk_bytes} is more than {COPY_MAX}")
    for name in options.pop("sabotage", ()):
        plan.settings.sabotage |= SABOTAGES[name]
    if options:
        raise TypeError(f"unknown options: {', '.join(sorted(options))}")
    for k in range(plan.steps_count):
        chunks += (plan.script[k].count + 3) * size * 8 // plan.settings.chunk_bytes \
            + BLOCKS_MAX + size
    # Per epoch: a ballot, watermarks and, in every operation, all to all, grants and credits.
    plan.controls_max = (2 * deaths + 3) * (
        20 * size * size * (plan.steps_count + 1) + 8 * size * chunks + 1000)


cdef list trace_of(const Choice* trace, int count):
    return [(ACTIONS[trace[i].action], trace[i].a, trace[i].b, trace[i].c, trace[i].budget)
            for i in range(count)]


cdef void check_choice(World* world, const Choice* choice) except *:
    """Refuses a step that cannot happen: a trace of another version."""
    cdef Network* network = &world.network
    cdef int action = choice.action, a = choice.a, b = choice.b
    cdef bint fits = 0 <= a < world.size
    if action == ACT_TICK:
        fits = fits and is_here(world, a)
    elif action == ACT_CALL:
        fits = fits and can_call(world, a)
    elif action == ACT_KILL:
        fits = fits and is_here(world, a) and world.deaths_left > 0
    elif action == ACT_LATE:
        fits = fits and 0 <= b < network.ports[a].late_count
    elif action == ACT_LEAVE:
        fits = fits and can_leave(world, a)
    elif action == ACT_GO:
        fits = fits and can_go(world, a)
    elif not (fits and 0 <= b < world.size):
        fits = False
    elif action == ACT_DETECT:
        fits = can_detect(world, a, b)
    elif action == ACT_CONTROL:
        fits = channel_of(network, a, b).used > 0 and is_here(world, b)
    else:
        fits = (0 <= choice.c < channel_of(network, a, b).data_count and is_here(world, b)
                and first_of_tag(channel_of(network, a, b), choice.c))
    if not fits:
        raise ValueError(f"first: {ACTIONS[action]} {a} {b} {choice.c} cannot happen")


def simulate(int size, script, seed, *, int kill_every=60, int aim_percent=-1,
             int disturb_every=0, first=(), want_trace=False, **options):
    """Runs one random order of everything, chosen by `seed`.

    Parameters
    ----------
    size : int
        Number of ranks, at most 64.
    script : list of (kind, count, root, flags[, deadline_us])
        The operations that every rank calls: items of 8 bytes; kind is one of `KINDS`. In a PARTIAL
        one the root is the quorum.
    seed : int
        Decides everything; the same seed gives the same run.
    kill_every : int
        One step in so many kills a rank, as long as `deaths` lasts.
    aim_percent : int
        So many of the steps of a rank that coordinates a ballot kill it; -1: the seed decides.
    disturb_every : int
        One step in so many stops a rank or lets it go on, cuts links or heals them; 0: none does.
    first : list of (action, a, b, c, budget)
        Steps to begin with, as a trace names them; the rest is random.
    want_trace : bool
        Also return every choice, not only after a violation.
    **options
        deaths (at most so many ranks die), depth (a rank calls its next operation while fewer are
        not finished), leaving (ranks leave when they are through), exits (and are seen as dead
        then), early (rank, steps: leaves after so many operations), odd (rank, step, operation:
        calls this one instead), sent and lost (`DELAYS`), detect_us
        (silence after which a rank is suspected), hosts (of each rank, by number), sabotage
        (`SABOTAGES` to switch off, so
        that checkers prove themselves awake), and the engine's settings.

    Returns
    -------
    dict
        violation (None or what was broken), steps, deaths, epochs, counters; after a violation
        also blamed (rank, operation), the trace and what the ranks were at.
    """
    cdef World plan
    cdef World* world
    cdef int64_t total = 0
    cdef int trace_count = 0, steps, r
    cdef Choice* trace
    cdef Choice choice
    fill_plan(&plan, size, script, options)
    plan.silence = disturb_every > 0
    plan.network.random = <uint64_t>(seed & 0xffffffffffffffff)
    world = make_world(&plan, &total)
    trace = <Choice*>malloc(TRACE_MAX * sizeof(Choice))
    try:
        if world == NULL or trace == NULL or world.violation != FINE:
            raise MemoryError("simulation: no memory for the world")
        for item in first:
            choice.action = ACTION_NAMES[item[0]]
            choice.a, choice.b, choice.c, choice.budget = item[1:]
            if world.violation == FINE:
                check_choice(world, &choice)
                trace[trace_count] = choice
                trace_count += 1
                perform(world, &choice)
        with nogil:
            if disturb_every:
                steps = silent_run(world, trace, &trace_count, kill_every, disturb_every)
            else:
                steps = random_run(world, trace, &trace_count, kill_every, aim_percent)
        counters = {}
        epochs = 0
        for r in range(size):
            for name, value in (<dict>world.ranks[r].engine.counters).items():
                counters[name] = counters.get(name, 0) + value
            epochs = max(epochs, world.ranks[r].engine.epoch)
        out = {"violation": VIOLATIONS[world.violation], "steps": steps,
               "deaths": size - world.alive, "epochs": epochs, "counters": counters,
               "controls": world.network.controls, "controls_max": world.controls_max,
               "statuses": [[world.ranks[r].results[k].status
                             for k in range(world.ranks[r].checked)] for r in range(size)]}
        if want_trace or world.violation != FINE:
            out["blamed"] = (world.blamed_rank, world.blamed_step)
            out["trace"] = trace_of(trace, trace_count)
            out["ranks"] = describe(world)
        return out
    finally:
        free_world(world)
        free(trace)


def explore_all(int size, script, *, order="every", raw=False, int64_t states_max=1 << 22,
                int depth_max=600, **options):
    """Visits every order of everything.

    Parameters
    ----------
    size, script, **options
        As in `simulate`; sent and lost are not "any".
    order : str
        "every", or one order of calls and deliveries ("lowest" rank first, or in "turns") with
        every death and detection, at every point in the life of its rank.
    raw : bool
        Tell worlds apart by all their bytes: slow, to check the digest.
    states_max, depth_max : int
        Where to stop.

    Returns
    -------
    dict
        violation, states, transitions, ends (worlds in which nothing more can happen), verdicts
        (number and digest of the set of outcomes), complete (False when a bound stopped it), and
        the trace of the violation.
    """
    cdef World plan
    cdef Explorer* x
    cdef int64_t total = 0
    options.setdefault("sent", "eager")
    options.setdefault("lost", "none")
    options.setdefault("outlets_max", 16)
    fill_plan(&plan, size, script, options)
    if plan.network.sent_delay != DELAY_EAGER and plan.network.sent_delay != DELAY_LATE:
        raise ValueError("sent: an exploration needs eager or late")
    if plan.network.lost_delay == DELAY_ANY:
        raise ValueError("lost: an exploration needs none or late")
    if not size <= 8 or plan.settings.outlets_max > 128:
        raise ValueError("size: explorations are for at most 8 ranks and 128 outlets")
    plan.fixed = 1
    x = <Explorer*>calloc(1, sizeof(Explorer))
    if x == NULL:
        raise MemoryError("exploration: no memory")
    try:
        x.world = make_world(&plan, &total)
        x.world_bytes = total
        x.seen_room = 1024
        while x.seen_room < 2 * states_max + 2:
            x.seen_room *= 2
        x.states_max = states_max
        x.stack_room = depth_max
        x.order = ORDERS[order]
        x.canonical_states = not raw
        x.seen = <uint64_t*>calloc(x.seen_room, sizeof(uint64_t))
        x.verdicts = <uint64_t*>calloc(VERDICTS_ROOM, sizeof(uint64_t))
        x.stack = <unsigned char*>malloc(total * depth_max)
        x.trace = <Choice*>calloc(depth_max + 1, sizeof(Choice))
        x.choices = <Choice*>calloc(depth_max * CHOICES_MAX, sizeof(Choice))
        if (x.world == NULL or x.seen == NULL or x.verdicts == NULL or x.stack == NULL
                or x.trace == NULL or x.choices == NULL):
            raise MemoryError("exploration: no memory for the worlds")
        with nogil:
            explore(x)
        out = {"violation": VIOLATIONS[x.world.violation], "states": x.states,
               "transitions": x.transitions, "ends": x.ends,
               "verdicts": (x.verdicts_count, x.verdicts_digest),
               "complete": x.stopped == 0 and x.world.violation == FINE, "stopped": x.stopped}
        if x.world.violation != FINE or x.stopped == 2:
            out["blamed"] = (x.world.blamed_rank, x.world.blamed_step)
            out["trace"] = trace_of(x.trace, x.trace_count)
            out["ranks"] = describe(x.world)
        return out
    finally:
        free(x.seen)
        free(x.verdicts)
        free(x.stack)
        free(x.trace)
        free(x.choices)
        free_world(x.world)
        free(x)
