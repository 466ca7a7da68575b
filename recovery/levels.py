"""All levels of a store, and the ranks that share it: taken over, saved to, restored from."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from hopcoll.errors import CheckpointError, CheckpointNotFoundError, HopcollError
from recovery.disk import Disk
from recovery.group import Group
from recovery.level import Problem
from recovery.log import Commit, Record
from recovery.places import Key, Level, Place, generation_of, name_incarnation
from recovery.restoring import Found, Lists, find, take_stock
from recovery.saving import Job, Settings, agree, save_at

__all__ = ["Levels", "Verdict"]

_OPENS_MAX = 10


@dataclass
class Verdict:
    """How a save ended; alike at all ranks.

    Attributes
    ----------
    done : set of int
        The levels that have it.
    errors : list of Exception
        Why others have not.
    """

    done: set[int] = field(default_factory=set)
    errors: list[BaseException] = field(default_factory=list)


class Levels:
    """The directories of a store. Every method is collective over the group, and blocks.

    Attributes
    ----------
    group : Group
    places : list of Place
    key : (int, int) or None
        Of the commit that the next save goes on from; alike at all ranks, like what follows.
    step : int or None
        Its step.
    """

    def __init__(
        self,
        group: Group,
        levels: Sequence[Level],
        disk: Disk,
        *,
        retain: Callable[[list[Commit]], list[Commit]],
        compression: str | None,
        writers: str,
        check_replicas: bool,
        readonly: bool,
    ) -> None:
        self.group = group
        self.places = [Place(i, level, group.host, disk) for i, level in enumerate(levels)]
        shared = [place for place in self.places if place.shared]
        #: What is here is durable.
        self.highest = (shared or self.places)[-1]
        self.how = Settings("", retain, compression, writers, check_replicas)
        self.key: Key | None = None
        self.step: int | None = None
        self._forked_from: Key | None = None
        self._readonly = readonly
        if not readonly:
            self._take_over()
        self._go_on_from(take_stock(group, self.places, self._owner), None)
        if readonly and self.key is None:
            self._check_there()

    @property
    def _owner(self) -> str | None:
        return None if self._readonly else self.how.incarnation

    # Opening

    def _take_over(self) -> None:
        generation = 1 + self._ask(self._highest_generation)
        for _ in range(_OPENS_MAX):
            tokens = self.group.everyone(secrets.token_hex(8))
            self.how.incarnation = name_incarnation(generation, tokens[min(tokens)])
            for place in self.places:
                place.open(self.how.incarnation, str(self.group.rank))
            seen = self._take_all()
            if seen < generation:
                return
            generation = seen + 1  # another job opened it at the same moment
        raise CheckpointError(f"{self.highest.path} is opened by others all the time")

    def _highest_generation(self) -> int:
        """Return the highest generation that this rank finds; only leaders look. Local."""
        found = 0
        for place in self.places:
            if self._leads(place):
                try:
                    record = place.directory.look()
                except CheckpointNotFoundError:
                    continue
                if record is not None:
                    found = max(found, generation_of(record.owner))
        return found

    def _take_all(self) -> int:
        """Have every directory taken, whoever dies; return the generation of who had it before."""
        taken: set[tuple[int, str]] = set()
        seen = 0
        while True:
            members = self.group.members
            mine: Any = []
            try:
                for place in self.places:
                    unit = self._unit(place)
                    if unit not in taken and self._leads(place):
                        mine.append((unit, self._take(place)))
            except CheckpointError as error:
                mine = error
            answers = self.group.everyone(mine)
            self._raise_first(answers)
            for told in answers.values():
                for unit, generation in told:
                    taken.add(unit)
                    seen = max(seen, generation)
            if self.group.members == members:
                break
        self._raise_first(self.group.everyone(self._shared_by_mistake()))
        return seen

    def _take(self, place: Place) -> int:
        record = place.directory.take()
        place.leads = True
        if record.number == 1:
            return 0
        try:
            return generation_of(place.directory.log.read(record.number - 1).owner)
        except FileNotFoundError:
            return 0  # a prune took all that was before: it was old

    def _shared_by_mistake(self) -> CheckpointError | None:
        """Look whether two hosts took the same directory for their own."""
        for place in self.places:
            if place.leads and not place.shared:
                before = place.directory.log.head
                now = place.directory.look()
                if before is not None and now is not None and now.number != before.number:
                    return CheckpointError(
                        f"{place.path} is on a file system that several hosts share: use "
                        "kind='shared', or {host} in the path",
                        place.path,
                    )
        return None

    def _check_there(self) -> None:
        """Raise, at all ranks alike, where there is no store at all."""

        def look() -> bool:
            there = False
            for place in self.places:
                try:
                    place.directory.look()
                    there = True
                except CheckpointNotFoundError:
                    pass
            return there

        if not self._ask(look):
            path = self.highest.path
            raise CheckpointNotFoundError(f"{path} holds no checkpoint store", path)

    def _ask(self, question: Callable[[], Any]) -> Any:
        """Have every rank answer; return the highest answer, or raise the first error."""
        try:
            mine = question()
        except CheckpointError as error:
            mine = error
        answers = self.group.everyone(mine)
        self._raise_first(answers)
        return max(answers.values())

    def _raise_first(self, answers: dict[int, Any]) -> None:
        for rank, answer in answers.items():
            if isinstance(answer, CheckpointError):
                if self.group.size == 1:
                    raise answer
                raise type(answer)(f"rank {rank}: {answer}", answer.path)

    def _leads(self, place: Place) -> bool:
        group = self.group
        leader = min(group.members) if place.shared else group.leader(group.host)
        return group.rank == leader

    def _unit(self, place: Place) -> tuple[int, str]:
        return place.index, "" if place.shared else self.group.host

    # Saving

    def is_due(self, step: int) -> bool:
        """Whether some level wants a save of this step. Local, alike at all ranks."""
        return any(place.is_due(step) for place in self.places)

    @property
    def always_due(self) -> bool:
        """Whether some level wants a save of every step. Local, alike at all ranks."""
        return any(place.level.every == 1 for place in self.places)

    def save(self, job: Job, *, everywhere: bool) -> Verdict:
        """Save at the levels that are due, or at all of them.

        Raises
        ------
        CheckpointError, DivergedError, ValueError
            There is nothing that could be saved at any level; alike at all ranks.
        """
        verdict = Verdict()
        due = [place for place in self.places if everywhere or place.is_due(job.step)]
        layout = agree(self.group, job, check_replicas=self.how.check_replicas)
        for place in due:
            try:
                save_at(self.group, place, job, layout, self.how, self.key)
            except HopcollError as error:
                verdict.errors.append(error)
                continue
            verdict.done.add(place.index)
        if verdict.done:
            if self._forked_from is not None:
                self._let_die(self._forked_from, verdict.done)
                self._forked_from = None
            self.key = (generation_of(self.how.incarnation), job.save)
            self.step = job.step
        return verdict

    def clean(self) -> None:
        """Remove what the last save let die, for those who were told of its end already.

        Raises
        ------
        CheckpointError
            A disk refused; alike at all ranks. The clean-up behind the next save tries again.
        """

        def clean() -> None:
            failures = []
            for place in self.places:
                try:
                    place.clean()
                except CheckpointError as error:
                    failures.append(error)
            if failures:
                raise failures[0]

        self._do(clean)

    def _let_die(self, key: Key, done: set[int]) -> None:
        """After a restore of an older commit: at the other levels, later ones die now."""

        def prune() -> None:
            for place in self.places:
                if place.index not in done and place.leads:
                    offers = place.offers(place.directory.look())
                    dead = {offer.slot for offer in offers if offer.key > key}
                    if dead:
                        place.directory.prune(_all_but(dead))

        self._do(prune)

    def _do(self, action: Callable[[], None]) -> None:
        failure: CheckpointError | None = None
        try:
            action()
        except CheckpointError as error:
            failure = error
        self._raise_first(self.group.everyone(failure))

    # Reading

    def restore(self, step: int | None, cut: dict[str, Any]) -> Found:
        """Choose a commit and read it; the next save goes on from it."""
        found = find(self.group, self.places, self._owner, step, cut)
        self._go_on_from(found.lists, found)
        self.group.expected = self.group.members
        return found

    def _go_on_from(self, lists: Lists, found: Found | None) -> None:
        keys = lists.keys()
        self.key = found.key if found else next(iter(keys), None)
        self.step = None if self.key is None else lists.step_of(self.key)
        self._forked_from = self.key if found and keys and keys[0] > found.key else None
        for place in self.places:
            place.last_step = lists.last_step(place.index, self.key)
            place.base = None
        if found and found.place.shared:
            found.place.base = Record(0, "commit", "", 0, 0, (), found.body)

    def steps(self) -> list[int]:
        """Return the steps that some level has."""
        lists = take_stock(self.group, self.places, self._owner)
        return list(dict.fromkeys(lists.step_of(key) for key in reversed(lists.keys())))

    def verify(self) -> Iterator[Problem]:
        """Read what this rank's host sees of all levels. Local."""
        for place in self.places:
            yield from place.directory.verify(partial=not place.shared)

    def prune(self, retain: Callable[[list[Commit]], list[Commit]]) -> None:
        def prune() -> None:
            for place in self.places:
                if self._leads(place):
                    place.directory.prune(retain)

        self._do(prune)


def _all_but(slots: set[int]) -> Callable[[list[Commit]], list[Commit]]:
    return lambda chain: [commit for commit in chain if commit.slot not in slots]
