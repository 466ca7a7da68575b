"""A store of many ranks, which are threads here: N to M, deaths at every disk call, lost hosts."""

from __future__ import annotations

import shutil
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import h5py
import numpy as np
import pytest

from hopcoll.errors import (
    CheckpointCorruptError,
    CheckpointError,
    CheckpointFencedError,
    CheckpointNotFoundError,
    DivergedError,
    RankFailedError,
)
from recovery import CheckpointStore, Cut, Disk, Level, places, saving
from recovery.group import Group
from recovery.levels import Levels
from tests.fake_comm import FakeComm, Killed, World, run

WHOLE = np.arange(13 * 7 * 3.0).reshape(13, 7, 3)
WEIGHTS = np.arange(20_000.0)
CALLS = ("create", "write", "truncate", "fsync", "close", "link", "unlink", "fsync_folder")


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    """In memory: these tests make thousands of files, and none of them cuts the power."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as made:
        yield Path(made)


class MortalDisk(Disk):
    """Kills its rank before or after the k-th call, counted from when it is armed."""

    def __init__(self, world: World | None = None, rank: int = 0, at: int | None = None) -> None:
        self.world, self.rank, self.at = world, rank, at
        self.armed = self.fired = False
        self.count = 0
        self.lock = threading.Lock()

    def _die(self) -> None:
        self.fired = True
        self.world.kill(self.rank)
        raise Killed

    def _around(self, call, *arguments):
        with self.lock:
            if self.fired:
                raise Killed
            if self.armed:
                self.count += 1
                if self.at == 2 * self.count - 1:
                    self._die()
            result = call(*arguments)
            if self.armed and self.at == 2 * self.count:
                self._die()
            return result


def _mortal(name):
    def call(self, *arguments):
        return self._around(getattr(super(MortalDisk, self), name), *arguments)

    return call


for _name in CALLS:
    setattr(MortalDisk, _name, _mortal(_name))


def state_of(rank: int, ranks: list[int], step: int, *, cut: bool = True, axis: int = 0) -> dict:
    made = {"weights": WEIGHTS + step, "lr": 0.5 * step, "more": [np.array(step), None]}
    if cut:
        part = np.array_split(WHOLE + step, len(ranks), axis=axis)[ranks.index(rank)]
        made["cut"] = Cut(np.ascontiguousarray(part), axis, length=WHOLE.shape[axis])
    return made


def check(states: list[dict], step: int, *, cut: bool = True, axis: int = 0) -> None:
    for state in states:
        assert np.array_equal(state["weights"], WEIGHTS + step)
        assert state["lr"] == 0.5 * step and state["more"][0] == step
    if cut:
        parts = [state["cut"].array for state in states]
        assert np.array_equal(np.concatenate(parts, axis=axis), WHOLE + step)


def store(where, comm, **more) -> CheckpointStore:
    return CheckpointStore(where, comm, **{"timeout_s": 20.0, **more})


def good(ended: list) -> list:
    """What the ranks returned; raises what one of them raised."""
    for one in ended:
        if isinstance(one, BaseException):
            raise one
    return ended


def save(where, ranks: int, steps, **more) -> None:
    def program(comm: FakeComm) -> None:
        with store(where, comm) as made:
            for step in steps:
                made.save(step, state_of(comm.rank, list(range(ranks)), step, **more)).wait()

    good(run(ranks, program))


def load(where, ranks: int, step=None, host=lambda rank: None, **more) -> tuple[int, list[dict]]:
    def program(comm: FakeComm):
        with store(where, comm, host=host(comm.rank)) as made:
            return made.restore(step, **more)

    ended = good(run(ranks, program))
    assert len({one.step for one in ended}) == 1
    return ended[0].step, [one.state for one in ended]


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("ranks", [1, 2, 5, 8, 13])
def test_n_to_m(tmp_path, ranks, axis):
    path = tmp_path / "store"
    save(path, ranks, [1, 2], axis=axis)
    for others in (1, 3, 8, 13):
        for along in (axis, (axis + 1) % 3):
            step, states = load(path, others, cut={"cut": along})
            assert step == 2
            check(states, 2, axis=along)


def test_pieces_of_any_length_stay_as_they_were_on_as_many_ranks(tmp_path):
    spans = [(5, 13), (0, 0), (0, 5)]

    def program(comm):
        start, stop = spans[comm.rank]
        with store(tmp_path / "s", comm) as made:
            made.save_sync(4, {"cut": Cut(WHOLE[start:stop], offset=start)})

    good(run(3, program))
    _, states = load(tmp_path / "s", 3)
    for state, (start, stop) in zip(states, spans, strict=True):
        assert np.array_equal(state["cut"].array, WHOLE[start:stop])
        assert (state["cut"].offset, state["cut"].length) == (start, 13)


def test_whole_or_at_offsets_where_asked(tmp_path):
    save(tmp_path / "s", 3, [1])
    _, states = load(tmp_path / "s", 2, cut={"cut": None, "weights": (0, [0, 100])})
    for state in states:
        assert np.array_equal(state["cut"], WHOLE + 1)
    assert [len(state["weights"].array) for state in states] == [100, len(WEIGHTS) - 100]
    with pytest.raises(ValueError, match="no array"):
        load(tmp_path / "s", 2, cut={"cuts": None})
    with pytest.raises(ValueError, match="offsets"):
        load(tmp_path / "s", 2, cut={"cut": (0, [0, 14])})


def test_an_index_for_people_shows_the_cut_array_in_one_piece(tmp_path):
    save(tmp_path / "s", 4, [1], axis=1)
    (index,) = (tmp_path / "s" / "shards").glob("*index*")
    with h5py.File(index, "r", locking=False) as file:
        assert np.array_equal(file["cut"][:], WHOLE + 1)
    (tmp_path / "s" / "shards" / index.name).unlink()
    check(load(tmp_path / "s", 2)[1], 1, axis=1)


def test_replicated_arrays_are_written_once_and_spread_over_the_hosts(tmp_path):
    def program(comm):
        with store(tmp_path / "s", comm, host=f"host{comm.rank // 2}") as made:
            made.save_sync(1, {f"w{i}": np.full(1000, i) for i in range(4)})

    good(run(6, program))
    written = {}
    for shard in (tmp_path / "s" / "shards").iterdir():
        with h5py.File(shard, "r", locking=False) as file:
            written[int(shard.stem.split("-")[2])] = len(file)
    assert written == {0: 2, 2: 1, 4: 1}


def test_states_that_differ_are_an_error_that_names_the_place_and_the_ranks(tmp_path):
    def program(comm, what):
        with store(tmp_path / "s", comm) as made:
            state = state_of(comm.rank, [0, 1, 2], 1)
            if comm.rank == 2:
                state |= what
            with pytest.raises(DivergedError) as caught:
                made.save_sync(1, state)
            made.save_sync(2, state_of(comm.rank, [0, 1, 2], 2))
            return str(caught.value), caught.value.groups

    changed = WEIGHTS + 1
    changed[7] = 0
    for what, place in (
        ({"weights": changed}, "array weights"),
        ({"lr": 0.75}, "lr"),
        ({"weights": WEIGHTS[1:]}, "array weights"),
    ):
        ended = good(run(3, lambda comm, what=what: program(comm, what)))
        assert len(set(ended)) == 1
        assert place in ended[0][0]
        assert ended[0][1] == ((0, 1), (2,))
        shutil.rmtree(tmp_path / "s")


@pytest.mark.parametrize(
    ("piece", "match"),
    [
        (lambda rank: Cut(np.zeros((2, 3 + rank))), "differ in more than axis 0"),
        (lambda rank: Cut(np.zeros(4), offset=rank * 3), "overlap at 3"),
        (lambda rank: Cut(np.zeros(4), offset=rank * 5), "gap at 4"),
        (lambda rank: Cut(np.zeros(4), offset=rank * 4 or None), "no offset"),
        (lambda rank: Cut(np.zeros(4), length=7), "end at 8 of 7"),
        (lambda rank: Cut(np.zeros(4), length=8 + rank), "different lengths"),
    ],
)
def test_pieces_that_do_not_fit_are_an_error_at_all_ranks(tmp_path, piece, match):
    def program(comm):
        with store(tmp_path / "s", comm) as made, pytest.raises(ValueError, match=match):
            made.save_sync(1, {"c": piece(comm.rank)})

    good(run(2, program))


def test_a_rank_that_has_nothing_to_save_is_an_error_at_all_ranks(tmp_path):
    def program(comm):
        with store(tmp_path / "s", comm) as made:
            if comm.rank == 1:
                with pytest.raises(TypeError, match="allow_pickle"):
                    made.save(1, {"x": object()})
            else:
                made.save(1, {"x": 1})
            with pytest.raises(CheckpointError, match="rank 1: TypeError: state has a"):
                made.save(2, {"x": 1})
            made.save_sync(3, {"x": 1})
            return made.steps()

    assert good(run(3, program)) == [[3]] * 3


# Deaths


@pytest.mark.parametrize("length", [None, 13])
def test_a_piece_is_missing_since_its_rank_died_after_the_array_was_cut(tmp_path, length):
    world = World(3)

    def program(comm):
        with store(tmp_path / "s", comm) as made:
            parts = np.array_split(WHOLE, 3)
            made.save_sync(1, {"c": Cut(parts[comm.rank], length=length)})
            if comm.rank == 1:
                return None
            with pytest.raises(RankFailedError, match=r"step 2 is not committed: ranks \[1\]"):
                made.save_sync(2, {"c": Cut(parts[comm.rank], length=length)})
            piece = made.restore().state["c"]
            assert (piece.offset, piece.length) == ((0, 13) if comm.rank == 0 else (7, 13))
            made.save_sync(2, {"c": piece})
            return made.steps()

    ended = good(run(3, program, world))
    assert ended == [[1, 2], None, [1, 2]]


def die_at(path, at, victim, *, cut, levels=None, hosts=2, ranks=4):
    """Save step 1, then 2, in which the victim dies; go on with 3. What each survivor saw of 2."""
    world = World(ranks)
    disks = [MortalDisk(world, r, at if r == victim else None) for r in range(ranks)]

    def program(comm):
        disk = disks[comm.rank]
        with store(levels or path, comm, host=f"h{comm.rank % hosts}", disk=disk) as made:
            made.save_sync(1, state_of(comm.rank, list(range(ranks)), 1, cut=cut))
            disk.armed = True
            seen = "durable"
            ticket = made.save(2, state_of(comm.rank, list(range(ranks)), 2, cut=cut))
            try:
                ticket.wait()
            except RankFailedError:
                seen = "lost"
            assert ticket.safe_on(made.levels[0]) == (seen == "durable")
            disk.armed = False
            left = [rank for rank in range(ranks) if rank not in world.dead]
            if disks[victim].fired and comm.rank != victim:
                made.save_sync(3, state_of(comm.rank, left, 3, cut=cut))
            return seen

    ended = run(ranks, program, world)
    survivors = [one for rank, one in enumerate(ended) if rank != victim or not disks[victim].fired]
    good(survivors)
    assert len(set(survivors)) == 1, survivors
    return disks[victim].fired, survivors[0]


@pytest.mark.parametrize("cut", [False, True])
@pytest.mark.parametrize("victim", [0, 1, 3])
def test_a_rank_dies_at_each_of_its_disk_calls_in_a_save(tmp_path, victim, cut):
    fired, at, seen = True, 0, set()
    while fired:
        at += 1
        path = tmp_path / str(at)
        fired, verdict = die_at(path, at, victim, cut=cut)
        if fired:
            seen.add(verdict)
            step, states = load(path, 2)
            assert step == 3
            check(states, 3, cut=cut)
            if verdict == "durable":
                check(load(path, 2, step=2)[1], 2, cut=cut)
            else:
                assert load(path, 2, step=1)[0] == 1
        shutil.rmtree(path)
    writes = cut or victim in (0, 1)
    assert (at > 2) == writes
    if not cut:
        assert seen <= {"durable"}
    elif victim == 0:
        assert seen == {"durable", "lost"}


@pytest.mark.parametrize("kind", ["shared", "host"])
def test_the_whole_job_dies_with_one_rank_and_is_started_again(tmp_path, kind):
    """The next job has the step before or the one that was under way, and that if any rank knew."""
    fired, at, seen = True, 0, set()
    while fired:
        at += 1
        root = tmp_path / str(at)
        levels = [Level(root / "{host}", kind="host")] if kind == "host" else root
        world = World(3)
        disks = [MortalDisk(world, r, at if r == 0 else None) for r in range(3)]
        knew = []

        def program(comm, levels=levels, world=world, disks=disks, knew=knew):
            disk = disks[comm.rank]
            made = store(levels, comm, host=f"h{comm.rank}", disk=disk)
            made.save_sync(1, state_of(comm.rank, [0, 1, 2], 1))
            disk.armed = True
            made.on_durable(lambda step: world.dead or knew.append(step))

            def die_all() -> None:
                for rank in range(3):
                    disks[rank].fired = True
                    world.kill(rank)

            disk._die_alone = die_all
            ticket = made.save(2, state_of(comm.rank, [0, 1, 2], 2))
            ticket.wait()

        def die(self):
            for disk in disks:
                disk.fired = True
            for rank in range(3):
                self.world.kill(rank)
            raise Killed

        disks[0]._die = die.__get__(disks[0])
        run(3, program, world)
        fired = disks[0].fired
        step, states = load(levels, 3, host=lambda rank: f"h{rank}")
        check(states, step)
        assert step in (1, 2)
        assert step == 2 or not knew
        if fired:
            seen.add(step)
    assert seen == {1, 2}


# Levels


def on_host(rank: int) -> str:
    return f"h{rank}"


def levels_of(root: Path, every: int = 3) -> list[Level]:
    return [Level(root / "{host}" / "fast", kind="host"), Level(root / "shared", every=every)]


def save_levels(levels, ranks: int, steps, resume: bool = False) -> list:
    def program(comm):
        with store(levels, comm, host=on_host(comm.rank)) as made:
            if resume:
                made.restore()
            tickets = []
            for step in steps:
                tickets.append(made.save(step, state_of(comm.rank, list(range(ranks)), step)))
                made.wait()
            return (
                [t.durable for t in tickets],
                [t.safe_on(levels[0]) for t in tickets],
                made.durable_step,
            )

    return good(run(ranks, program))


def test_each_level_has_its_interval_and_durable_means_the_shared_one(tmp_path):
    levels = levels_of(tmp_path)
    for seen in save_levels(levels, 3, range(1, 6)):
        assert seen == ([True, False, False, True, False], [True] * 5, 4)
    step, states = load(levels, 3, host=on_host)
    assert step == 5
    check(states, 5)


@pytest.mark.parametrize("lost", [0, 1, 2])
def test_a_host_is_lost_with_its_directories_and_nothing_else(tmp_path, lost):
    levels = levels_of(tmp_path)
    save_levels(levels, 3, range(1, 6))
    shutil.rmtree(tmp_path / f"h{lost}")
    left = [rank for rank in range(3) if rank != lost]
    step, states = load(levels, 2, host=lambda rank: on_host(left[rank]))
    assert step == 5
    check(states, 5)


def test_two_hosts_are_lost_and_the_shared_level_is_left(tmp_path):
    levels = levels_of(tmp_path)
    save_levels(levels, 3, range(1, 6))
    shutil.rmtree(tmp_path / "h0")
    shutil.rmtree(tmp_path / "h1")
    step, states = load(levels, 2, host=lambda rank: on_host(rank + 2))
    assert step == 4
    check(states, 4)


def test_a_host_that_comes_back_with_a_dead_branch_is_not_listened_to(tmp_path):
    levels = levels_of(tmp_path)
    save_levels(levels, 3, range(1, 6))  # shared: 1, 4; hosts: 5
    for rank in range(3):
        (tmp_path / f"h{rank}").rename(tmp_path / f"away{rank}")
    save_levels(levels, 3, [5], resume=True)  # from 4; hosts only
    shutil.rmtree(tmp_path / "h0")
    (tmp_path / "away0").rename(tmp_path / "h0")
    save_levels(levels, 3, [6, 7], resume=True)
    for rank in (1, 2):
        shutil.rmtree(tmp_path / f"h{rank}")
        (tmp_path / f"away{rank}").rename(tmp_path / f"h{rank}")
    step, states = load(levels, 3, host=on_host)
    assert step == 7
    check(states, 7)


def test_an_older_step_is_asked_for_and_later_ones_die_at_all_levels(tmp_path):
    levels = levels_of(tmp_path, every=4)  # shared: 1, 5, 9

    def program(comm):
        with store(levels, comm, host=on_host(comm.rank), keep_last=9) as made:
            for step in range(1, 11):
                made.save(step, state_of(comm.rank, [0, 1], step)).wait()
            assert made.restore(6).step == 6
            assert made.durable_step == 5
            made.save(7, state_of(comm.rank, [0, 1], 7)).wait()
            return made.steps()

    assert good(run(2, program)) == [[1, 2, 3, 4, 5, 6, 7]] * 2
    assert load(levels, 2, host=on_host)[0] == 7
    for rank in range(2):
        shutil.rmtree(tmp_path / f"h{rank}")
    assert load(levels, 2, host=on_host)[0] == 5


def test_a_host_dies_in_the_middle_of_a_save_to_hosts(tmp_path):
    fired, at = True, 0
    while fired:
        at += 1
        root = tmp_path / str(at)
        levels = levels_of(root, every=100)
        fired, verdict = die_at(None, at, 2, cut=False, levels=levels, hosts=3, ranks=3)
        if fired:
            shutil.rmtree(root / "h2")
            step, states = load(levels, 2, host=on_host)
            assert step == 3
            check(states, 3, cut=False)
        shutil.rmtree(root)
    assert at > 10


def test_hosts_that_share_a_directory_by_mistake_are_told(tmp_path):
    with pytest.raises(CheckpointError, match="use kind='shared'"):
        load([Level(tmp_path / "s", kind="host")], 2, host=on_host)


def test_a_second_job_fences_all_ranks_of_the_first(tmp_path):
    path = tmp_path / "s"

    def program(comm):
        with store(path, comm) as made:
            made.save_sync(1, state_of(comm.rank, [0, 1], 1))
            if comm.rank == 0:
                CheckpointStore(path).close()
            with pytest.raises(CheckpointFencedError):
                made.save_sync(2, state_of(comm.rank, [0, 1], 2))
            with pytest.raises(CheckpointFencedError):
                made.restore()

    good(run(2, program))
    assert load(path, 1)[0] == 1


def test_a_flipped_bit_at_one_level_leaves_the_other(tmp_path):
    levels = levels_of(tmp_path, every=1)
    save_levels(levels, 2, [1])
    shards = sorted((tmp_path / "shared" / "shards").iterdir())
    for fast in (tmp_path / "h0", tmp_path / "h1"):
        for shard in (fast / "fast" / "shards").iterdir():
            spoil(shard)
    check(load(levels, 2, host=on_host)[1], 1)
    for shard in shards:
        spoil(shard)
    with pytest.raises(CheckpointCorruptError, match="dataset"):
        load(levels, 2, host=on_host)


def spoil(path: Path) -> None:
    data = bytearray(path.read_bytes())
    for place in range(0, len(data), 64):
        data[place] ^= 1
    path.write_bytes(data)


def test_an_empty_store_has_nothing_to_restore(tmp_path):
    with pytest.raises(CheckpointNotFoundError, match="holds no checkpoint"):
        load(tmp_path / "s", 2)
    with pytest.raises(CheckpointNotFoundError, match="holds no checkpoint store"):
        run_readonly = run(2, lambda comm: store(tmp_path / "t", comm, readonly=True))
        good(run_readonly)


def test_wrong_arguments(tmp_path):
    with pytest.raises(ValueError, match="kind of a Level"):
        Level(tmp_path, kind="far")
    with pytest.raises(ValueError, match="every of a Level"):
        Level(tmp_path, every=0)
    with pytest.raises(ValueError, match="writers must be"):
        CheckpointStore(tmp_path / "s", writers="all")
    with pytest.raises(ValueError, match="levels must be"):
        CheckpointStore([])
    with pytest.raises(TypeError, match="levels must be Level"):
        CheckpointStore([tmp_path])
    with pytest.raises(TypeError, match="array of a Cut"):
        Cut([1, 2])
    with pytest.raises(ValueError, match="no axis"):
        Cut(np.array(1))
    with pytest.raises(ValueError, match="axis of a Cut"):
        Cut(np.zeros(3), axis=1)


# The checks are awake


def no_duty_of_the_dead(duties):
    def broken(self):
        try:
            return duties(self)
        except RankFailedError:
            return None

    return broken


BROKEN = {
    "the next committer does not look": (
        (saving._Save, "_adopted", lambda old: lambda self: None),
        lambda path: test_a_rank_dies_at_each_of_its_disk_calls_in_a_save(path, 0, False),
    ),
    "a piece that died is committed": (
        (saving._Save, "_duties", no_duty_of_the_dead),
        lambda path: test_a_rank_dies_at_each_of_its_disk_calls_in_a_save(path, 3, True),
    ),
    "a rank that died before the save is not missed": (
        (Group, "expected", lambda old: property(lambda self: (), lambda self, ranks: None)),
        lambda path: test_a_piece_is_missing_since_its_rank_died_after_the_array_was_cut(
            path, None
        ),
    ),
    "no copies at partners": (
        (saving._Save, "_copies_missing", lambda old: lambda self: False),
        lambda path: test_a_host_is_lost_with_its_directories_and_nothing_else(path, 1),
    ),
    "generations are not told apart": (
        (places, "generation_of", lambda old: lambda incarnation: 0),
        test_a_host_that_comes_back_with_a_dead_branch_is_not_listened_to,
    ),
    "later steps live on": (
        (Levels, "_let_die", lambda old: lambda self, key, done: None),
        test_an_older_step_is_asked_for_and_later_ones_die_at_all_levels,
    ),
    "hashes are not compared": (
        (saving._Save, "_hash_replicas", lambda old: lambda self: ""),
        test_states_that_differ_are_an_error_that_names_the_place_and_the_ranks,
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_store_is_noticed(tmp_path, monkeypatch, name):
    (where, attribute, broken), test = BROKEN[name]
    monkeypatch.setattr(where, attribute, broken(getattr(where, attribute, None)), raising=False)
    with pytest.raises((AssertionError, CheckpointError, ValueError, pytest.fail.Exception)):
        test(tmp_path)
