"""`Lab`: a lab as an object, and as a context for tests and benchmarks."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.lab import network, state
from benchmarks.lab.network import LabError, Layout

__all__ = ["Lab"]

NAME = "hoplab"
MTU = 9000
_AGENT = """\
#!/bin/sh
# mpirun calls it instead of ssh: ADDRESS COMMAND...
host=$1; shift
name={name}-${{host##*.}}
reached='read carrier < /sys/class/net/eth0/carrier && test $carrier = 1 || exit 255'
exec ip netns exec $name unshare --uts sh -c "$reached; hostname $name; $*"
"""


class Lab:
    """Several hosts on this machine. Nothing is made before `up`, or the entry into a ``with``.

    Parameters
    ----------
    hosts : int
        How many; they are numbered from 1.
    rate : str, optional
        What each link carries in either direction, as tc spells it; None: no limit.
    rates : mapping of int to (str or None), optional
        Hosts whose links differ.
    mtu : int, default 9000
        Bytes of the longest packet; long ones keep the processors' share low.
    name : str, default "hoplab"
        What its namespaces and links are called after; two labs at a time need two names.
    subnet : str, optional
        Of the hosts' addresses, such as 10.203.7; follows from the name by default.

    Raises
    ------
    LabError
        A parameter is out of its range; the message starts with its name.

    Examples
    --------
    >>> with Lab(3, "100mbit", rates={3: "10mbit"}) as lab:  # doctest: +SKIP
    ...     job = lab.start("train.py", ranks=6)
    ...     lab.cable(3, plugged=False)
    """

    def __init__(
        self,
        hosts: int,
        rate: str | None = None,
        *,
        rates: Mapping[int, str | None] | None = None,
        mtu: int = MTU,
        name: str = NAME,
        subnet: str | None = None,
    ) -> None:
        if not 1 <= hosts <= network.HOSTS_MAX:
            raise LabError(f"hosts must be 1 to {network.HOSTS_MAX}, not {hosts}")
        for host in rates or ():
            if not 1 <= host <= hosts:
                raise LabError(f"host {host} of a rate is none of 1 to {hosts}")
        each = tuple((rates or {}).get(host, rate) for host in range(1, hosts + 1))
        self.layout = Layout(name, each, mtu, subnet or network.subnet_of(name))

    @classmethod
    def opened(cls, name: str = NAME) -> Lab:
        """Return the lab of this name that is up, whoever made it.

        Raises
        ------
        LabError
            None is up, or an `up` was broken off.
        """
        known = state.load(name)
        if known is None:
            raise LabError(f"no lab {name!r} is up: python -m benchmarks.lab up --hosts 8")
        layout, complete = known
        if not complete:
            raise LabError(f"lab {name!r} was broken off while it was made: {_down(name)}")
        return cls._of(layout)

    @classmethod
    def _of(cls, layout: Layout) -> Lab:
        lab = cls.__new__(cls)
        lab.layout = layout
        return lab

    @staticmethod
    def take_down(name: str = NAME) -> bool:
        """Kill all processes of a lab and remove it, complete or not.

        Blocking; an interrupt waits until it is done.

        Returns
        -------
        bool
            Whether there was one.

        Raises
        ------
        LabError
            Something cannot be removed; the lab is still known, for another try.
        """
        network.check_rights()
        with _uninterrupted(), state.locked(name):
            known = state.load(name)
            if known is not None:
                network.remove(known[0])
                state.forget(name)
            return known is not None

    @property
    def name(self) -> str:
        """What its namespaces and links are called after."""
        return self.layout.name

    @property
    def hosts(self) -> range:
        """The hosts' numbers, from 1."""
        return self.layout.hosts

    def __enter__(self) -> Lab:
        self.up()
        return self

    def __exit__(self, *error: object) -> None:
        self.down()

    def up(self) -> None:
        """Make it. Blocking; after any error or interrupt nothing is left of it.

        Raises
        ------
        LabError
            Not root, a tool or tbf missing, a name in use, a lab of this name up already.
        """
        network.check_rights()
        with state.locked(self.name):
            known = state.load(self.name)
            if known is not None:
                what = f"is up already, with {len(known[0].rates)} hosts"
                what = what if known[1] else "was broken off while it was made"
                raise LabError(f"lab {self.name!r} {what}: {_down(self.name)}")
            network.check(self.layout)
            try:
                state.save(self.layout, complete=False)
                self._agent.write_text(_AGENT.format(name=self.name))
                network.make(self.layout)
                state.save(self.layout, complete=True)
            except BaseException:
                with _uninterrupted():
                    network.remove(self.layout)
                    state.forget(self.name)
                raise

    def down(self) -> None:
        """Kill all its processes and remove it; see `take_down`."""
        self.take_down(self.name)

    @property
    def _agent(self) -> Path:
        return state.folder(self.name) / "agent"

    def inside(self, host: int, *words: str) -> list[str]:
        """Return the command line that runs a command on a host, under the host's name."""
        return network.inside(self.layout, self._known(host), words)

    def mpirun_words(self, ranks: int) -> tuple[str, list[str]]:
        """Return what mpirun gets to spread ranks evenly: its hosts, and its further switches."""
        if ranks < 1:
            raise LabError(f"ranks must be at least 1, not {ranks}")
        count = len(self.hosts)
        slots = [ranks // count + (host <= ranks % count) for host in self.hosts]
        hosts = [
            f"{self.layout.address(host)}:{slot}"
            for host, slot in zip(self.hosts, slots, strict=True)
            if slot
        ]
        # By sh, because /run may be mounted without the right to execute.
        agent = ["--prtemca", "plm_ssh_agent", f"/bin/sh {self._agent}"]
        sessions = ["--prtemca", "prte_tmpdir_base", str(state.folder(self.name))]
        return ",".join(hosts), agent + sessions

    def command(
        self,
        program: Sequence[str],
        ranks: int | None = None,
        mpirun_args: Sequence[str] = (),
        options: Sequence[str] = (),
    ) -> list[str]:
        """Return the command line of `hopcoll run` over the hosts, from inside the first.

        Parameters
        ----------
        program : sequence of str
            As for ``hopcoll run``: a script, or -m and a module, and arguments.
        ranks : int, optional
            One a host by default. Ranks that follow each other share a host.
        mpirun_args : sequence of str
            Further words for mpirun.
        options : sequence of str
            Further options of ``hopcoll run``.
        """
        ranks = len(self.hosts) if ranks is None else ranks
        hosts, words = self.mpirun_words(ranks)
        run = [sys.executable, "-m", "hopcoll.cli", "run", "-n", str(ranks), "--host", hosts]
        if ranks > len(os.sched_getaffinity(0)):
            run += ["--oversubscribe"]  # the hosts share the processors
        run += [word for name in ("PYTHONPATH",) if name in os.environ for word in ("-x", name)]
        run += ["--mpirun-args", shlex.join([*words, *mpirun_args])]
        return self.inside(self.hosts[0], *run, *options, *program)

    def start(
        self,
        *program: str,
        ranks: int | None = None,
        options: Sequence[str] = (),
        **how: Any,
    ) -> subprocess.Popen[str]:
        """Start `command` in a session of its own; the caller ends it.

        Parameters
        ----------
        *program : str
        ranks : int, optional
        options : sequence of str
            Further options of ``hopcoll run``.
        **how
            Of `subprocess.Popen`.
        """
        how = {"stdin": subprocess.DEVNULL, "text": True, "start_new_session": True, **how}
        return subprocess.Popen(self.command(program, ranks, options=options), **how)

    def cable(self, host: int, plugged: bool) -> None:
        """Pull a host's cable, or plug it in again. Connections outlive a short while of it."""
        with state.locked(self.name):
            network.set_cable(self.layout, self._known(host), plugged)

    def has_cable(self, host: int) -> bool:
        """Whether a host's cable is plugged in."""
        return network.has_cable(self.layout, self._known(host))

    def lose(self, host: int) -> int:
        """Kill every process on a host at once: launcher's daemon, ranks and all.

        Its connections are closed, as when a host is rebooted; with its cable pulled before, other
        ranks hear nothing of it. mpirun notices either way, by its agent's end, where a real ssh to
        a host without power would linger. The host is there again at once, with nothing running;
        the launch agent does not reach it while its cable is pulled.

        Returns
        -------
        int
            How many processes there were.
        """
        return network.kill(self.layout, self._known(host))

    def pids(self, host: int) -> list[int]:
        """Return the processes on a host."""
        return network.pids(self.layout, self._known(host))

    def reaches(self, source: int, dest: int, within_s: float = 1.0) -> bool:
        """Whether a host gets an answer from another one; blocks for so long at the most."""
        return network.reaches(self.layout, self._known(source), self._known(dest), within_s)

    def _known(self, host: int) -> int:
        if host not in self.hosts:
            raise LabError(f"host {host} is none of 1 to {self.hosts[-1]}")
        return host


def _down(name: str) -> str:
    option = "" if name == NAME else f" --name {name}"
    return f"python -m benchmarks.lab down{option}"


@contextmanager
def exits_when_told() -> Iterator[None]:
    """Make SIGTERM and SIGHUP an exit in good order, as Ctrl-C is, so that teardowns run."""

    def leave(number: int, _: object) -> None:
        sys.exit(128 + number)

    before = {number: signal.signal(number, leave) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Let signals that would end this process go by, so that a teardown comes to its end."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    ends = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.signal(number, signal.SIG_IGN) for number in ends}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
