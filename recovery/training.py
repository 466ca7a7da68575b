"""A training loop that goes on when ranks die, and goes on from its last commit when all do.

A step begins with who is left, and ends with `TrainingSession.commit`. What a rank does in between
must follow from the state, the step and what its session tells it; then all ranks stay alike, and a
job that was interrupted does what it would have done, bit for bit.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final

import numpy as np

import hopcoll
from hopcoll.errors import (
    CheckpointError,
    CheckpointMismatchError,
    CheckpointNotFoundError,
    HopcollError,
    RankFailedError,
    TooFewRanksError,
)
from hopcoll.launcher import STOPPED
from hopcoll.restarts import tell_progress
from recovery import live
from recovery.history import History
from recovery.interval import Measured, next_interval
from recovery.metrics import Metrics
from recovery.replays import Replay
from recovery.stopping import Stop
from recovery.store import CheckpointStore

if TYPE_CHECKING:
    from hopcoll import Communicator
    from recovery.places import Level

__all__ = ["TrainingSession"]

#: How long a call waits for the disk that the log is on.
_DISK_TIMEOUT_S = 600.0
#: A session goes on with those who are left, whatever the communicator does by default.
_SURVIVORS: Final = {"on_failure": "survivors"}
#: What the seed is used for: the two streams never meet.
_STEP_STREAM, _ORDER_STREAM = 0, 1


class TrainingSession:
    """The steps of a job, over all of its starts. Collective over the communicator.

    ::

        with recovery.TrainingSession(comm, state, "checkpoints", min_ranks=4) as session:
            for step in session.steps(10_000):
                mine = session.batch(len(images), 256)          # this rank's part of the batch
                gradient[:] = compute_gradient(weights, images[mine])
                session.Allreduce(gradient, mean)               # whoever dies in here
                weights -= 0.1 * mean
                session.commit(step)

    **Deaths.** A step goes on without the ranks that die in it. The samples of a dead rank are in
    nobody's gradient in the step in which it died (they come again with the next epoch), and the
    mean is that of the others; from the next step on the whole batch is cut among the ranks that
    are left. So each step takes the same samples in the same order, whoever lives: the data order
    depends on the seed and the step alone.

    **Commits.** A step is committed on all ranks or on none. Every so often it is also saved, in
    the background; a job that is started again goes on behind the last step that was saved, with
    the state, the history and the log of that moment.

    **Stops.** Under ``hopcoll run --stop-within S`` a SIGUSR1 (a batch system's word that the time
    is up) has all ranks save what they have behind the same step, the next but one at the latest,
    and leave by ``SystemExit`` with code 75. Started again, the job goes on. Without a store there
    is nothing to save, and the signal ends the ranks as it ends any program.

    **Replay.** The history says who contributed to what. A replay of it has as many ranks, and each
    of them stays out where the one of its number was lost; it ends with the same bits. So it is
    with other ranks and other hosts, as long as the settings that the value tree depends on
    (``chunk_bytes``, ``eager_bytes``) are the same.

    Parameters
    ----------
    comm : hopcoll.Communicator
    state : dict
        All that training changes, alike at all ranks: nested dicts and lists of arrays, tensors,
        generators, numbers, text, and of objects with ``state_dict`` and ``load_state_dict``. What
        is restored is put into the same arrays and generators; plain values are replaced in their
        dict or list.
    store : CheckpointStore, path or sequence of Level, optional
        Where to save. A store over `comm`, which stays the caller's to close; or what to make one
        of with the default settings. None: only deaths of ranks are survived.
    min_ranks : int, default 1
        With fewer the job stops.
    interval : int or "auto", default "auto"
        How many steps there are between two saves; ``"auto"``: see `recovery.interval`. The last
        step is always saved.
    seed : int, default 0
        Decides `rng` and `batch`. A job goes on with the seed that it had.
    log : path, optional
        A file for what is given to `log`, one line of JSON a step (follow it with ``tail -F``: when
        the rank that writes dies, the next one replaces it); on a file system that all hosts
        share.
    settings : dict, optional
        What must be alike when a job goes on: numbers, text, None. A job with others is refused.
    replay : History, optional
        Run the job again that has this history, up to its last step. `store` must be None, and
        what the ranks tell each other inside of the loop has to go through the session.

    Raises
    ------
    TypeError, ValueError
        An argument.
    TooFewRanksError
        There are fewer ranks than `min_ranks` from the start.
    CheckpointMismatchError
        What the store holds was saved by another kind of job: other settings, another seed, arrays
        of other shapes or dtypes.
    CheckpointError
        As `CheckpointStore` and `CheckpointStore.restore` raise them. Or the log cannot be written.

    Attributes
    ----------
    first : int
        The first step that is made now: 1, or the one behind the last commit.
    contributors : tuple of int
        The ranks of the last operation: who is left, alike at all. They are numbered as in `comm`.
    rng : numpy.random.Generator
        Of the seed and the step alone, so alike at all ranks, and new in every step.
    history : History
    store : CheckpointStore or None
    """

    def __init__(
        self,
        comm: Communicator,
        state: dict[Any, Any],
        store: CheckpointStore | str | os.PathLike[str] | Sequence[Level] | None = None,
        *,
        min_ranks: int = 1,
        interval: int | str = "auto",
        seed: int = 0,
        log: str | os.PathLike[str] | None = None,
        settings: dict[str, Any] | None = None,
        replay: History | None = None,
    ) -> None:
        if not isinstance(state, dict):
            raise TypeError(f"state must be a dict, not {type(state).__name__}")
        if not 1 <= min_ranks <= comm.size:
            raise ValueError(f"min_ranks must be from 1 to {comm.size}, not {min_ranks}")
        if not (interval == "auto" or (isinstance(interval, int) and interval >= 1)):
            raise ValueError(f"interval must be 'auto' or 1 or more, not {interval!r}")
        if replay is not None and store is not None:
            raise ValueError("store must be None in a replay, which goes on from nothing")
        self.comm = comm
        self.min_ranks = min_ranks
        self.seed = seed
        self.first = 1
        self.history = History()
        self.contributors: tuple[int, ...] = ()
        self._state = state
        self._cut = live.has_cut(state)
        self._settings = dict(settings or {})
        self._interval = interval
        self._rng: tuple[int, np.random.Generator] | None = None
        self._orders: dict[tuple[int, int], np.ndarray] = {}
        self._step: int | None = None  # the one that is under way
        self._last: int | None = None  # of `steps`
        self._operations = 0  # of this step
        self._sharers: tuple[int, ...] = ()
        self._line: dict[str, Any] = {}
        self._replay = None if replay is None else Replay(comm, replay, state)
        self._stop_asked: Stop | None = None
        self._saves = _Saves()

        self._owns_store = store is not None and not isinstance(store, CheckpointStore)
        self.store: CheckpointStore | None = (
            CheckpointStore(store, comm) if self._owns_store else store
        )
        self._metrics = None if log is None else Metrics(log, _DISK_TIMEOUT_S)
        try:
            self._restore()
            if self._cut and self.first == 1 and self.store is not None:
                self._save(0, final=False)  # to go back to
        except BaseException:
            self._end()
            raise
        if self.store is not None:
            self.store.on_durable(self._on_durable)
        if replay is None and self.store is not None:
            self._stop_asked = Stop(comm)

    def __enter__(self) -> TrainingSession:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if kind is None:
                self._finish()
        finally:
            self._end(well=kind is None)

    # The loop

    def steps(self, last: int) -> Iterator[int]:
        """Yield the steps that are still to be made, up to `last`; each has to be committed.

        When it ends, the last step is durable. A replay ends with its history.

        Raises
        ------
        ValueError
            A step was not committed when the next one is asked for.
        CheckpointError
            The last save went wrong.
        """
        self._last = last
        if self._replay is None:
            yield from self._each(self.history.last + 1, last)
            self._finish()
            return
        for index in range(len(self._replay.history.eras)):
            self.comm, first, end = self._replay.begin(index)
            self.history.last = first - 1
            yield from self._each(first, min(end, last))
        self._replay.end()
        self.history.last = min(self._replay.history.last, last)  # also where this rank was out

    def _each(self, first: int, last: int) -> Iterator[int]:
        step = first
        while step <= last:
            if self._replay is not None:
                if self._replay.stays_out(step, 0):
                    return
                self.contributors = self._replay.contributors(step, -1)
            self._step, self._operations, self._line = step, 0, {}
            self._sharers = self.contributors
            yield step
            if self._step is not None:
                raise ValueError(f"step {step} was not committed: session.commit({step}) ends it")
            step = self.history.last + 1

    def commit(self, step: int) -> bool:
        """End a step. Collective; waits for the disk only if the last save is not over yet.

        Parameters
        ----------
        step : int
            The one that is under way.

        Returns
        -------
        bool
            False if a piece of a cut array died with its rank: then the state is that of the last
            save again, and the loop goes on behind that one.

        Raises
        ------
        ValueError
            It is another one.
        RankFailedError
            A piece of a cut array died, and nothing is saved.
        TooFewRanksError
            Fewer than `min_ranks` ranks are left.
        SystemExit
            The job was asked to stop, and this step is durable.
        CheckpointError
            A save went wrong, alike at all ranks. The step is made all the same: who catches this
            goes on, and the next save is tried when it is due. Or the log cannot be written, at
            the rank that writes it alone; if it leaves, the next one writes.
        """
        if step != self._step:
            raise ValueError(f"step {step} is not under way: the step is {self._step}")
        if self._operations == 0 and not self._out(step):
            self._note(self.comm.Barrier(**_SURVIVORS).contributors)
        self._step = None
        stops = self._stop_asked is not None and self._stop_asked.is_agreed()
        if self._cut and self.contributors != self.history.eras[-1].ranks:
            self._go_back(step)
            return False
        self.history.last = step
        if self._metrics is not None and self._line:
            self._metrics.add(step, self._line, self.reports)
        if self.store is not None and (stops or self._due(step)):
            try:
                self._save(step, final=stops or step == self._last)
            except TooFewRanksError:
                raise
            except RankFailedError:  # of this save, or of the one before it
                if not self._cut:
                    raise
                self.contributors = self.comm.Barrier(**_SURVIVORS).contributors
                self._go_back(step)
                return False
        if stops and step != self._last:
            if self.reports:
                print(f"hopcoll: asked to stop, did so behind step {step}", file=sys.stderr)
            raise SystemExit(STOPPED)
        return True

    def Allreduce(
        self,
        sendbuf: Any,
        recvbuf: Any,
        op: Any = hopcoll.AVG,
        *,
        timeout_s: float | None = None,
        check: str | None = None,
    ) -> tuple[int, ...]:
        """Reduce the ranks' inputs, and give the result to all. Collective, blocking.

        As `hopcoll.Communicator.Allreduce` with ``order="rank"``: equal contributors give equal
        bits. The contributors go into the history, so that the step can be made again.

        Parameters
        ----------
        sendbuf, recvbuf, op, timeout_s, check
            As there; the mean over the contributors by default.

        Returns
        -------
        tuple of int
            The contributors, alike at all ranks.

        Raises
        ------
        ValueError
            No step is under way; and as `hopcoll.Communicator.Allreduce` raises it.
        TooFewRanksError
            Fewer than `min_ranks` ranks contributed; `recvbuf` has their result.
        DivergedError
            In a replay: a rank was lost that was not lost then.
        RankFailedError, TransferTimeoutError, ClosedError, MpiError
            As `hopcoll.Communicator.Allreduce` raises them.
        """
        if self._step is None:
            raise ValueError("step: none is under way; Allreduce belongs into the loop over steps")
        if self._out(self._step):
            if sendbuf is not None and sendbuf is not hopcoll.IN_PLACE:
                np.copyto(np.asarray(recvbuf).reshape(-1), np.asarray(sendbuf).reshape(-1))
            return self.contributors
        outcome = self.comm.Allreduce(
            sendbuf, recvbuf, op, order="rank", timeout_s=timeout_s, check=check, **_SURVIVORS
        )
        self._note(outcome.contributors)
        return self.contributors

    def _out(self, step: int) -> bool:
        """Tell whether this rank stays out of the next operation, in a replay."""
        if self._replay is None or not self._replay.stays_out(step, self._operations):
            return False
        self.contributors = self._replay.contributors(step, self._operations)
        return True

    def _note(self, contributors: tuple[int, ...]) -> None:
        """Take note of who contributed to an operation of this step."""
        step, index = self._step, self._operations
        assert step is not None
        before = self.contributors
        self._operations += 1
        self.contributors = contributors
        if self._replay is None:
            self.history.record(step, index, contributors)
        else:
            self._replay.check(step, index, contributors)
        if len(contributors) < self.min_ranks:
            self._stop(step, sorted({*before} - {*contributors}))

    def _stop(self, step: int, lost: list[int]) -> None:
        losses, left = [], self.history.eras[-1].ranks
        for at, _, ranks in self.history.eras[-1].losses:
            gone = ", ".join(str(rank) for rank in left if rank not in ranks)
            losses.append(f"rank {gone} in step {at}")
            left = ranks
        count = len(self.contributors)
        raise TooFewRanksError(
            f"{count} of {self.comm.size} ranks {'is' if count == 1 else 'are'} left, and "
            f"min_ranks is {self.min_ranks}; lost: {'; '.join(losses[-8:]) or 'before the start'}. "
            "If it was the input that killed them, look at what they had in these steps"
            + (
                ""
                if self.store is None
                else f"; the last durable step is {self.store.durable_step or 'none'}"
            ),
            lost,
            self.comm.epoch,
        )

    # What a step is made from

    @property
    def reports(self) -> bool:
        """Whether this rank is the one that reports for all: the lowest that is left."""
        return self.contributors[:1] == (self.comm.rank,)

    @property
    def durable_step(self) -> int | None:
        """The last step that is known to outlive a power cut; may differ between ranks. Local."""
        return None if self.store is None else self.store.durable_step

    @property
    def rng(self) -> np.random.Generator:
        step = self.history.last if self._step is None else self._step
        if self._rng is None or self._rng[0] != step:
            self._rng = step, self._random(_STEP_STREAM, step)
        return self._rng[1]

    def share(self, count: int) -> slice:
        """Return this rank's part of `count` things: they are cut among the ranks of this step.

        Local. These are the contributors of the last operation before the step. The parts follow
        each other in the order of the ranks, and differ by one at most.
        """
        ranks = self._sharers if self._step is not None else self.contributors
        place = ranks.index(self.comm.rank)
        return slice(place * count // len(ranks), (place + 1) * count // len(ranks))

    def batch(self, samples: int, size: int) -> np.ndarray:
        """Return which samples this rank takes in this step. Local.

        The samples are drawn in an order of the seed's, anew in each epoch, `size` in a step; the
        batch of a step is the same whoever lives, and is cut by `share`.

        Parameters
        ----------
        samples : int
            How many there are.
        size : int
            How many all ranks take together in a step.

        Returns
        -------
        ndarray of int64
            Indices below `samples`.

        Notes
        -----
        Memory: 16 bytes a sample.
        """
        if samples < 1 or size < 1:
            raise ValueError(f"samples and size must be 1 or more, not {samples} and {size}")
        step = self.history.last if self._step is None else self._step
        part = self.share(size)
        places = (step - 1) * size + np.arange(part.start, part.stop)
        epochs, places = np.divmod(places, samples)
        indices = np.empty(len(places), np.int64)
        for epoch in np.unique(epochs):
            indices[epochs == epoch] = self._order(samples, int(epoch))[places[epochs == epoch]]
        return indices

    def _order(self, samples: int, epoch: int) -> np.ndarray:
        key = samples, epoch
        if key not in self._orders:
            self._orders = {k: v for k, v in self._orders.items() if k[1] == epoch - 1}
            self._orders[key] = self._random(_ORDER_STREAM, epoch).permutation(samples)
        return self._orders[key]

    def _random(self, *key: int) -> np.random.Generator:
        return np.random.default_rng(np.random.SeedSequence(self.seed, spawn_key=key))

    def log(self, **fields: Any) -> None:
        """Note something for the log's line of this step, if there is a log. Local.

        The line is written when the step is committed, once: a job that goes on from a commit
        cuts off what came after it. It has ``step``, the fields, and ``time_ns``.

        Parameters
        ----------
        **fields
            What JSON carries, alike at all ranks (such as what came out of a reduction).
        """
        if self._step is None:
            raise ValueError("step: none is under way; log belongs into the loop over steps")
        self._line.update(fields)

    # Saving and restoring

    def _restore(self) -> None:
        while True:
            before = self.comm.Barrier(**_SURVIVORS).contributors if self._cut else ()
            saved = None
            if self.store is not None:
                with suppress(CheckpointNotFoundError):
                    saved = self.store.restore()
            self.contributors = self.comm.Barrier(**_SURVIVORS).contributors
            if not self._cut or self.contributors == before:
                break  # else a piece may have died again
        step = 0
        carried: dict[str, Any] | None = None
        if saved is not None:
            step = saved.step
            ours = saved.state.get("session") if isinstance(saved.state, dict) else None
            if ours is None:
                raise CheckpointMismatchError(
                    f"{self.store.path} was not saved by a TrainingSession", self.store.path
                )
            self._check_settings(ours)
            live.put_back(self._state, saved.state["state"])
            self.history = History.from_json(json.loads(ours["history"]))
            self._saves.running_s = ours["running_s"]
            failures = max(ours["failures"], self._saves.failures)
            self._saves.failures = failures + (0 if ours["over"] else 1)
            carried = ours["log"] and json.loads(ours["log"])
        self.first = step + 1
        if self._replay is not None:
            self.history = History.from_json(self._replay.history.to_json())
            self.contributors = self._sharers = self._replay.contributors(1, -1)
            return
        self._sharers = self.contributors
        self.history.begin(self.first, self.comm.size, self.contributors)
        self._saves.start(step)
        if self._metrics is not None:
            self._metrics.go_on(step, carried)
            self._open_log(step)
        if len(self.contributors) < self.min_ranks:
            self._stop(step, [])

    def _open_log(self, step: int) -> None:
        """Have the log written up to a step; raise alike at all ranks where that cannot be done."""
        failure = None
        if self.reports:
            try:
                self._metrics.write(step)
            except CheckpointError as error:
                failure = error
        for error in self.comm.allgather(failure, **_SURVIVORS):
            if error is not None:
                raise error

    def _go_back(self, step: int) -> None:
        """Go back to the last save, because a piece of a cut array is lost."""
        lost = sorted({*self.history.eras[-1].ranks} - {*self.contributors})
        if self.store is not None:
            with suppress(HopcollError):
                self.store.wait()  # a save in which the piece died
            if self.store.steps():
                self._restore()
                return
        raise RankFailedError(
            f"step {step}: a piece of a cut array died with rank {', '.join(map(str, lost))}, and "
            "there is no save to go back to",
            lost,
            self.comm.epoch,
        )

    def _check_settings(self, saved: dict[str, Any]) -> None:
        theirs = {**saved["settings"], "seed": saved["seed"]}
        ours = {**self._settings, "seed": self.seed}
        for name in sorted({*theirs, *ours}):
            if theirs.get(name) != ours.get(name):
                raise CheckpointMismatchError(
                    f"{self.store.path}: setting '{name}' was {theirs.get(name)!r}, and is "
                    f"{ours.get(name)!r} now: give it as it was, or start in another directory",
                    self.store.path,
                )

    def _due(self, step: int) -> bool:
        if step == self._last:
            return True
        if isinstance(self._interval, int):
            return step % self._interval == 0
        return step >= self._saves.due

    def _save(self, step: int, *, final: bool) -> None:
        """Hand the state to the store, and choose the next step to be saved.

        The last save is at all levels, and is waited for.
        """
        saves = self._saves
        begin_s = time.monotonic()
        session = {
            "settings": self._settings,
            "seed": self.seed,
            "history": json.dumps(self.history.to_json()),
            "running_s": saves.running_s,
            "failures": saves.failures,
            "over": final,  # a job that goes on from here did not fail
            "log": None,
        }
        saves.due = step + 1  # should this go wrong
        if self._metrics is not None:
            session["log"] = json.dumps(self._metrics.committing(step))
        saves.begin(step, begin_s)
        state = {"state": live.take(self._state), "session": session}
        if final:
            self.store.save_sync(step, state)
        else:
            self.store.save(step, state)
        saves.last = step
        if self._interval == "auto" and not final:
            seen = saves.seen(step, begin_s)
            agreed = np.empty_like(seen)
            outcome = self.comm.Allreduce(seen, agreed, hopcoll.MAX, **_SURVIVORS)
            saves.choose(step, agreed)
            self._step = step
            try:
                self._note(outcome.contributors)
            finally:
                self._step = None

    def _on_durable(self, step: int) -> None:
        """In the store's thread: a save is durable."""
        self._saves.durable(step)
        if self.reports:
            tell_progress(
                step,
                epoch=self.comm.epoch,
                ranks=len(self.contributors),
                began=self.comm.size,
            )

    def _finish(self) -> None:
        """See to it that the last committed step is saved, and durable."""
        if self.store is not None:
            step = self.history.last
            if self._step is None and step >= self.first and step > self._saves.last:
                self._save(step, final=True)
            self.store.wait()

    def _end(self, well: bool = False) -> None:
        actions: list[Callable[[], Any]] = []
        if self._stop_asked is not None:
            actions.append(partial(self._stop_asked.close, well))
        if self._metrics is not None:
            actions.append(self._metrics.close)
        if self._owns_store and self.store is not None:
            actions.append(self.store.close)
        first: Exception | None = None
        for action in actions:
            try:
                action()
            except Exception as error:  # what is behind it is closed all the same
                first = first or error
        if well and first is not None:  # else the error that ended the block is on its way
            raise first


class _Saves:
    """When the session saved, and what that cost: for ``interval="auto"``."""

    def __init__(self) -> None:
        self.running_s = 0.0  # of all starts, up to the last save
        self.failures = 0
        self.last = 0  # the last step that was saved
        self.due = 1
        self._interval = 1
        self._since_s = time.monotonic()  # the end of the last save's call
        self._begun = 0, self._since_s
        self._worked_s = self._step_s = self._durable_s = 0.0

    def start(self, step: int) -> None:
        self.last, self.due, self._interval = step, step + 1, 1
        self._since_s = time.monotonic()

    def begin(self, step: int, now_s: float) -> None:
        self._worked_s = now_s - self._since_s
        self._step_s = self._worked_s / max(step - self.last, 1)
        self._begun = step, now_s

    def durable(self, step: int) -> None:
        begun, begun_s = self._begun
        if step == begun:
            self._durable_s = time.monotonic() - begun_s

    def seen(self, step: int, begin_s: float) -> np.ndarray:
        """Return what this rank measured, to be agreed on."""
        self._since_s = time.monotonic()
        stall_s = self._since_s - begin_s
        return np.array([self._step_s, stall_s, self._durable_s, self._worked_s + stall_s])

    def choose(self, step: int, agreed: np.ndarray) -> None:
        """Choose the next step, from what all measured."""
        step_s, stall_s, durable_s, spent_s = map(float, agreed)
        self.running_s += spent_s
        measured = Measured(step_s, stall_s, durable_s, self.running_s, self.failures)
        self._interval = next_interval(measured, self._interval)
        self.due = step + self._interval

