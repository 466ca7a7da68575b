"""What every transport must keep (cython_kernels/transport.pxd), as scenarios for ranks.

A scenario is the program of one rank, as a generator: ``yield`` lets the others go on, ``yield
DIE`` is this rank's death, there and then. Whoever binds the scenarios to a transport runs one for
every rank and gives up when they do not end.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass
from typing import Protocol

DIE = "die"
Steps = Generator[str | None, None, None]
Condition = Callable[[], bool]

TAG = 3
OTHER_TAG = 4
#: Around the limits at which an MPI changes its protocol.
SIZES_BYTES = (0, 1, 7, 4000, 4096, 4097, 65_000, 65_536, 70_000, 300_000, 1 << 20)


class Probe(Protocol):
    """One rank's end of a transport: `cython_kernels._probe.Probe`, or something like it."""

    rank: int
    size: int
    control_bytes_max: int
    open_count: int

    def send_control(self, dest: int, head: bytes, body: bytes = b"") -> None: ...
    def send_data(self, dest: int, tag: int, data: bytes, token: int) -> None: ...
    def recv_data(self, source: int, tag: int, data: bytearray, token: int) -> None: ...
    def poll(self) -> tuple | None: ...


class Rank:
    """A rank in a scenario: sorts the events, and checks what must hold for all of them."""

    def __init__(self, probe: Probe) -> None:
        self.probe = probe
        self.rank = probe.rank
        self.peers = [peer for peer in range(probe.size) if peer != probe.rank]
        self.inbox: dict[int, deque[bytes]] = {peer: deque() for peer in self.peers}
        self.ended: dict[int, tuple] = {}  # token -> event
        self.order: list[int] = []  # tokens of receives, as their events came
        self.dead: list[int] = []
        self.tokens = 0

    def step(self) -> None:
        """Take the events that are there."""
        while (event := self.probe.poll()) is not None:
            kind, peer = event[:2]
            assert peer in self.peers, event
            if kind == "control":
                assert peer not in self.dead, f"a control message after its sender's death: {event}"
                self.inbox[peer].append(event[2])
            elif kind == "dead":
                assert peer not in self.dead, f"rank {peer} died twice"
                self.dead.append(peer)
            else:
                token = event[2]
                assert token not in self.ended, f"a second event for one token: {event}"
                self.ended[token] = event
                if kind != "sent":
                    self.order.append(token)

    def until(self, condition: Condition) -> Steps:
        self.step()
        while not condition():
            yield None
            self.step()

    def send(self, dest: int, tag: int, data: bytes) -> int:
        self.tokens += 1
        self.probe.send_data(dest, tag, data, self.tokens)
        return self.tokens

    def receive(self, source: int, tag: int, memory: bytearray) -> int:
        self.tokens += 1
        self.probe.recv_data(source, tag, memory, self.tokens)
        return self.tokens

    def say(self, dest: int, text: bytes = b"go") -> None:
        self.probe.send_control(dest, text)

    def hear(self, source: int) -> Generator[str | None, None, bytes]:
        """Wait for the next control message of a peer."""
        yield from self.until(lambda: bool(self.inbox[source]))
        return self.inbox[source].popleft()

    def all_ended(self, tokens: Iterable[int]) -> Steps:
        tokens = list(tokens)
        yield from self.until(lambda: all(token in self.ended for token in tokens))

    def meet(self, peers: Iterable[int]) -> Steps:
        """Wait until all of these ranks are here; nothing is left that no one asked for."""
        peers = list(peers)
        for peer in peers:
            self.say(peer, b"met")
        for peer in peers:
            said = yield from self.hear(peer)
            assert said == b"met", f"rank {peer} said what nobody waited for: {said!r}"
        assert self.probe.open_count == 0


_CYCLE = bytes(range(251))


def pattern(nbytes: int, salt: int = 0) -> bytes:
    """Bytes that differ from place to place and from salt to salt."""
    start = salt * 31 % len(_CYCLE)
    return (_CYCLE * ((start + nbytes) // len(_CYCLE) + 1))[start : start + nbytes]


# ---- nobody dies --------------------------------------------------------------------------


def control_in_order(rank: Rank) -> Steps:
    """Control messages of a pair arrive whole, in the order sent, head and body joined."""
    longest = rank.probe.control_bytes_max
    lengths = [0, 1, 2, 8, longest - 1, longest] * 5 + [8] * 100
    for number, length in enumerate(lengths):
        for peer in rank.peers:
            text = pattern(length, number + rank.rank)
            rank.probe.send_control(peer, text[: length // 3], text[length // 3 :])
    for peer in rank.peers:
        for number, length in enumerate(lengths):
            said = yield from rank.hear(peer)
            assert said == pattern(length, number + peer), (peer, number)
    yield from rank.meet(rank.peers)


def control_is_copied(rank: Rank) -> Steps:
    """The memory of a control message belongs to the caller again at once."""
    memory = bytearray(b"0123")
    for number in range(50):
        memory[:] = b"%04d" % number
        for peer in rank.peers:
            rank.probe.send_control(peer, memory, memory)
    memory[:] = b"????"
    for peer in rank.peers:
        for number in range(50):
            said = yield from rank.hear(peer)
            assert said == b"%04d%04d" % (number, number)
    yield from rank.meet(rank.peers)


def data_of_all_sizes(rank: Rank) -> Steps:
    """Data of every size arrives once, in the receive that was posted for it."""
    memories = {(peer, n): bytearray(n) for peer in rank.peers for n in SIZES_BYTES}
    receives = {key: rank.receive(key[0], TAG, memory) for key, memory in memories.items()}
    for peer in rank.peers:
        rank.say(peer)
    sends = {}
    for peer in rank.peers:
        assert (yield from rank.hear(peer)) == b"go"
        for n in SIZES_BYTES:
            sends[peer, n] = rank.send(peer, TAG, pattern(n, rank.rank))
    yield from rank.all_ended([*receives.values(), *sends.values()])
    for (peer, n), token in receives.items():
        assert rank.ended[token] == ("received", peer, token, n)
        assert memories[peer, n] == pattern(n, peer)
    for (peer, _), token in sends.items():
        assert rank.ended[token] == ("sent", peer, token)
    yield from rank.meet(rank.peers)


def oldest_receive_first(rank: Rank) -> Steps:
    """A message matches the oldest receive of its (peer, tag); their events come in that order."""
    count, length = 24, 5000
    keys = [(peer, tag, i) for i in range(count) for tag in (TAG, OTHER_TAG) for peer in rank.peers]
    memories = {key: bytearray(length) for key in keys}
    receives = {key: rank.receive(*key[:2], memories[key]) for key in keys}
    for peer in rank.peers:
        rank.say(peer)
    sends = []
    for peer in rank.peers:
        assert (yield from rank.hear(peer)) == b"go"
        for tag in (OTHER_TAG, TAG):
            sends += [rank.send(peer, tag, pattern(length - i, tag + i)) for i in range(count)]
    yield from rank.all_ended([*receives.values(), *sends])
    for (peer, tag, i), token in receives.items():
        assert rank.ended[token] == ("received", peer, token, length - i)
        assert memories[peer, tag, i][: length - i] == pattern(length - i, tag + i)
    for peer in rank.peers:
        for tag in (TAG, OTHER_TAG):
            tokens = [receives[peer, tag, i] for i in range(count)]
            assert [token for token in rank.order if token in tokens] == tokens
    yield from rank.meet(rank.peers)


def voids(rank: Rank) -> Steps:
    """A void ends a receive of any length with no bytes, and leaves its memory alone."""
    memories = {peer: [bytearray(pattern(n)) for n in (0, 10, 100_000)] for peer in rank.peers}
    tokens = {
        peer: [rank.receive(peer, TAG, memory) for memory in memories[peer]] for peer in rank.peers
    }
    for peer in rank.peers:
        rank.say(peer)
    sends = []
    for peer in rank.peers:
        assert (yield from rank.hear(peer)) == b"go"
        sends += [rank.send(peer, TAG, b"") for _ in range(3)]
    yield from rank.all_ended(sum(tokens.values(), sends))
    for peer in rank.peers:
        for token, memory in zip(tokens[peer], memories[peer]):
            assert rank.ended[token] == ("received", peer, token, 0)
            assert memory == pattern(len(memory))
    yield from rank.meet(rank.peers)


def a_long_stream(rank: Rank) -> Steps:
    """A window of receives stays posted while control messages go both ways between the chunks."""
    chunks, window, length = 300, 4, 9000
    source, dest = (rank.rank - 1) % rank.probe.size, (rank.rank + 1) % rank.probe.size
    memories = [bytearray(length) for _ in range(window)]
    receives: deque[int] = deque()
    sends: list[int] = []
    granted = sent = received = 0
    while received < chunks or len(sends) < chunks:
        while len(receives) < window and received + len(receives) < chunks:
            place = (received + len(receives)) % window
            receives.append(rank.receive(source, TAG, memories[place]))
            rank.say(source, b"one")
        rank.step()
        while granted < chunks and rank.inbox[dest]:
            assert rank.inbox[dest].popleft() == b"one"
            granted += 1
        while sent < granted:
            sends.append(rank.send(dest, TAG, pattern(length, sent)))
            sent += 1
        while receives and receives[0] in rank.ended:
            assert rank.ended[receives.popleft()][3] == length
            assert memories[received % window] == pattern(length, received), received
            received += 1
        yield None
    yield from rank.all_ended(sends)
    yield from rank.meet(rank.peers)


# ---- somebody dies ------------------------------------------------------------------------


def survivors_still_talk(rank: Rank, dead: Iterable[int]) -> Steps:
    """After deaths the others exchange all sizes, and the dead only get silence."""
    dead = set(dead)
    memory = bytearray(10)
    tokens = []
    for peer in dead:
        rank.say(peer)
        tokens += [rank.receive(peer, TAG, memory), rank.send(peer, TAG, b"x" * 10)]
        tokens += [rank.receive(peer, OTHER_TAG, memory), rank.send(peer, TAG, b"")]
    yield from rank.all_ended(tokens)
    assert {rank.ended[token][0] for token in tokens} <= {"lost"}
    rank.peers = [peer for peer in rank.peers if peer not in dead]
    yield from data_of_all_sizes(rank)
    assert set(rank.dead) == dead, "DEAD was wrong"


def death_is_told_once(rank: Rank) -> Steps:
    """Before its death a rank's control messages arrive in order, but for the last; then DEAD."""
    victim = 1
    if rank.rank == victim:
        for peer in rank.peers:
            yield from rank.hear(peer)
        for number in range(40):
            for peer in rank.peers:
                rank.say(peer, b"%d" % number)
        yield DIE
    memory = bytearray(100)
    tokens = [rank.receive(victim, TAG + i % 3, memory) for i in range(9)]
    rank.say(victim)
    yield from rank.until(lambda: victim in rank.dead)
    assert [int(said) for said in rank.inbox[victim]] == list(range(len(rank.inbox[victim])))
    yield from rank.all_ended(tokens)
    assert all(rank.ended[token][0] == "lost" for token in tokens)
    yield from survivors_still_talk(rank, {victim})


def death_in_a_stream(rank: Rank) -> Steps:
    """Receives from the dead end as RECEIVED with the right bytes, and then as LOST."""
    victim, chunks = rank.probe.size - 1, 12
    memories = [bytearray(20_000) for _ in range(chunks)]
    if rank.rank != victim:
        tokens = [rank.receive(victim, TAG, memory) for memory in memories]
        rank.say(victim)
        yield from rank.until(lambda: victim in rank.dead)
        yield from rank.all_ended(tokens)
        kinds = [rank.ended[token][0] for token in tokens]
        came = kinds.count("received")
        assert kinds == ["received"] * came + ["lost"] * (chunks - came)
        assert came <= chunks // 2
        assert [token for token in rank.order if token in tokens] == tokens
        for number in range(came):
            assert rank.ended[tokens[number]][3] == 20_000
            assert memories[number] == pattern(20_000, number)
        yield from survivors_still_talk(rank, {victim})
        return
    for peer in rank.peers:
        assert (yield from rank.hear(peer)) == b"go"
    for number in range(chunks // 2):
        for peer in rank.peers:
            rank.send(peer, TAG, pattern(20_000, number))
    yield DIE


def death_of_the_receiver(rank: Rank) -> Steps:
    """What nobody will take any more ends, as SENT or LOST, however long it is."""
    victim = 0
    if rank.rank == victim:
        for peer in rank.peers:
            yield from rank.hear(peer)
        yield DIE
    tokens = [rank.send(victim, TAG, pattern(n)) for n in (1, 1000, 100_000, 1 << 21) * 3]
    rank.say(victim)
    yield from rank.until(lambda: victim in rank.dead)
    yield from rank.all_ended(tokens)
    assert {rank.ended[token][0] for token in tokens} <= {"sent", "lost"}
    yield from survivors_still_talk(rank, {victim})


def deaths_of_many(rank: Rank) -> Steps:
    """All but the first and the last die, each as soon as it has heard, or lost, all others."""
    dead = set(range(1, rank.probe.size - 1))
    memory = bytearray(1000)
    tokens = [rank.receive(peer, TAG, memory) for peer in rank.peers if peer in dead]
    for peer in rank.peers:
        rank.say(peer)
    for peer in rank.peers:
        yield from rank.until(lambda peer=peer: bool(rank.inbox[peer]) or peer in rank.dead)
    if rank.rank in dead:
        for peer in rank.peers:
            rank.send(peer, TAG, pattern(1000))
        yield DIE
    yield from rank.until(lambda: set(rank.dead) == dead)
    yield from rank.all_ended(tokens)
    for peer in set(rank.peers) - dead:
        rank.inbox[peer].popleft()
    yield from survivors_still_talk(rank, dead)


@dataclass(frozen=True)
class Scenario:
    """A program for every rank of a world of `size` ranks, `deaths` of which do not survive it."""

    program: Callable[[Rank], Steps]
    size: int
    deaths: int = 0

    @property
    def name(self) -> str:
        return f"{self.program.__name__}-{self.size}"


SCENARIOS = {
    scenario.name: scenario
    for scenario in [
        *(
            Scenario(program, size)
            for program in (
                control_in_order,
                control_is_copied,
                data_of_all_sizes,
                oldest_receive_first,
                voids,
                a_long_stream,
            )
            for size in (2, 3, 5)
        ),
        Scenario(death_is_told_once, 3, deaths=1),
        Scenario(death_in_a_stream, 3, deaths=1),
        Scenario(death_of_the_receiver, 3, deaths=1),
        Scenario(deaths_of_many, 5, deaths=3),
    ]
}
