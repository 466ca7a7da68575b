"""The hosts of a lab and the wires between them, by ip and tc."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

__all__ = ["HOSTS_MAX", "LabError", "Layout", "bits_per_s", "check", "make", "remove"]

#: More hosts than this say more about the processors than about the wires.
HOSTS_MAX = 64
MTU_RANGE = (576, 65535)
NETNS = Path("/run/netns")
#: A bucket holds what its link carries in so long, whatever the rate: the share of a message that
#: passes without a wait is then the same on a slow link.
_BUCKET_S = 1.05e-3
_BUCKET_BYTES_MIN = 16384
_QUEUE_MS = 20
_PATIENCE_S = 10.0
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_BINARY_UNITS = {"ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}
_RATE = re.compile(r"(\d+(?:\.\d*)?|\.\d+)\s*(?:([kmgt]i?)?(bit|bps))?", re.IGNORECASE)


# ip and tc are for administrators, and not on everyone's PATH.
os.environ["PATH"] = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"])


class LabError(Exception):
    """The lab cannot do this; the message says why and what to do."""


def bits_per_s(rate: str) -> int:
    """Return the bits a second that tc understands by a rate, such as 1gbit or 12.5mbps.

    Parameters
    ----------
    rate : str
        A number and bit, kbit, mbit, gbit or tbit; with bps instead of bit it counts bytes, and
        kibit or mibps count in powers of 1024. A bare number is bits a second.

    Raises
    ------
    LabError
        It is none.
    """
    match = _RATE.fullmatch(rate.strip())
    bits = 0.0
    if match:
        prefix = (match[2] or "").lower()
        factor = {**_UNITS, **_BINARY_UNITS}[prefix]
        bits = float(match[1]) * factor * (8 if (match[3] or "").lower() == "bps" else 1)
    if bits < 1:
        raise LabError(
            f"rate {rate!r} is none that tc understands: a number with kbit, mbit or gbit, "
            "such as 100mbit (none: no limit)"
        )
    return round(bits)


@dataclass(frozen=True)
class Layout:
    """What a lab consists of. Immutable; every name in it follows from `name`.

    Parameters
    ----------
    name : str
        A letter, then at most nine letters and digits, all lower case.
    rates : tuple of (str or None)
        What each host's link carries, in either direction, as tc spells it; None: no limit.
    mtu : int
        Bytes of the longest packet.
    subnet : str
        The first three numbers of the hosts' addresses, such as 10.203.7.

    Raises
    ------
    LabError
        A parameter is out of its range.
    """

    name: str
    rates: tuple[str | None, ...]
    mtu: int
    subnet: str

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[a-z][a-z0-9]{0,9}", self.name):
            raise LabError(
                f"name {self.name!r} must be a letter and at most nine letters and digits, "
                "in lower case: the kernel's names of links are short"
            )
        if not 1 <= len(self.rates) <= HOSTS_MAX:
            raise LabError(f"hosts must be 1 to {HOSTS_MAX}, not {len(self.rates)}")
        if not MTU_RANGE[0] <= self.mtu <= MTU_RANGE[1]:
            raise LabError(f"mtu must be {MTU_RANGE[0]} to {MTU_RANGE[1]}, not {self.mtu}")
        numbers = self.subnet.split(".")
        if len(numbers) != 3 or not all(n.isdecimal() and int(n) < 256 for n in numbers):
            raise LabError(f"subnet {self.subnet!r} must be three numbers, such as 10.203.7")
        for rate in filter(None, self.rates):
            bits_per_s(rate)

    @property
    def hosts(self) -> range:
        """The hosts' numbers, from 1."""
        return range(1, len(self.rates) + 1)

    @property
    def bridge(self) -> str:
        """The link that joins all cables."""
        return self.name

    def namespace(self, host: int) -> str:
        """The network namespace of a host, which is its host name as well."""
        return f"{self.name}-{host}"

    def wire(self, host: int) -> str:
        """The end of a host's cable at the bridge; the other end is its eth0."""
        return f"{self.name}v{host}"

    def address(self, host: int) -> str:
        """The address of a host."""
        return f"{self.subnet}.{host}"


def subnet_of(name: str) -> str:
    """A subnet that hangs on the name alone: 10.200 to 10.249."""
    digest = zlib.crc32(name.encode())
    return f"10.{200 + digest % 50}.{digest // 50 % 256}"


def call(*words: str) -> str:
    """Run ip or tc, and return what it says; a failure is a `LabError` with its reason."""
    # In a session of its own: Ctrl-C must not stop the tool half way through a teardown.
    done = subprocess.run(
        words,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        start_new_session=True,
    )
    if done.returncode:
        reason = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise LabError(f"{' '.join(words)}: {'; '.join(reason)}")
    return done.stdout


def check_rights() -> None:
    """Raise `LabError` unless this process is root and iproute2 is there."""
    if os.geteuid() != 0:
        raise LabError("the lab needs root, to make network namespaces: run it with sudo")
    for tool, package in (("ip", "iproute2"), ("unshare", "util-linux"), ("hostname", "hostname")):
        if shutil.which(tool) is None:
            raise LabError(f"{tool} is missing: apt install {package}")


def check(layout: Layout) -> None:
    """Look whether a lab can be made here; changes nothing.

    Raises
    ------
    LabError
        Not root, a tool is missing, or a name is in use.
    """
    check_rights()
    if any(layout.rates) and shutil.which("tc") is None:
        raise LabError("tc is missing, which limits rates: apt install iproute2, or --rate none")
    links = [layout.bridge, *map(layout.wire, layout.hosts)]
    taken = [f"link {link}" for link in links if _link_exists(link)]
    taken += [f"namespace {name}" for name in _namespaces(layout) if (NETNS / name).exists()]
    if taken:
        raise LabError(
            f"{taken[0]} exists already and is not known as part of a lab: "
            "take another --name, or remove it"
        )


def make(layout: Layout) -> None:
    """Make the bridge, the hosts and their cables; what `check` looks at must hold.

    Raises
    ------
    LabError
        A step failed. What was made so far is left to `remove`.
    """
    call("ip", "link", "add", layout.bridge, "mtu", str(layout.mtu), "type", "bridge")
    call("ip", "link", "set", layout.bridge, "up")
    for host in layout.hosts:
        namespace, wire = layout.namespace(host), layout.wire(host)
        call("ip", "netns", "add", namespace)
        call(
            *("ip", "link", "add", wire, "mtu", str(layout.mtu), "type", "veth"),
            *("peer", "name", "eth0", "mtu", str(layout.mtu), "netns", namespace),
        )
        call("ip", "link", "set", wire, "master", layout.bridge, "up")
        address = f"{layout.address(host)}/24"
        call("ip", "-n", namespace, "addr", "add", address, "dev", "eth0")
        call("ip", "-n", namespace, "link", "set", "eth0", "up")
        call("ip", "-n", namespace, "link", "set", "lo", "up")
        rate = layout.rates[host - 1]
        if rate is not None:
            _limit(rate, layout.mtu, "-n", namespace, "qdisc", "add", "dev", "eth0")
            _limit(rate, layout.mtu, "qdisc", "add", "dev", wire)
    last = layout.hosts[-1]
    if last > 1 and not reaches(layout, last, 1, _PATIENCE_S):
        raise LabError(
            f"host {last} does not reach host 1 over bridge {layout.bridge}: does a firewall "
            "drop what a bridge forwards (sysctl net.bridge.bridge-nf-call-iptables=0)?"
        )


def _limit(rate: str, mtu: int, *where: str) -> None:
    bits = bits_per_s(rate)
    bucket = max(round(bits / 8 * _BUCKET_S), 2 * mtu, _BUCKET_BYTES_MIN)
    # A bare number would do, but tc takes a fraction of one for nothing.
    tbf = ["tbf", "rate", f"{bits}bit", "burst", str(bucket), "latency", f"{_QUEUE_MS}ms"]
    try:
        call("tc", *where, "root", *tbf)
    except LabError as error:
        if re.search("qdisc kind is unknown|Cannot find|No such file", str(error)):
            raise LabError(
                "tbf is missing, which limits rates: this kernel has no sch_tbf (modprobe "
                f"sch_tbf, or --rate none for links without a limit); {error}"
            ) from error
        raise


def remove(layout: Layout) -> None:
    """Kill all processes of a lab and remove what `make` made, all of it or the part there is.

    Raises
    ------
    LabError
        Something is still there; all the rest is gone.
    """
    failures = []
    with _networks(layout, layout.hosts) as networks:
        _kill_all(networks)
        for link in (*map(layout.wire, layout.hosts), layout.bridge):
            if _link_exists(link):
                failures += _failure("ip", "link", "del", link)
        for namespace in _namespaces(layout):
            if (NETNS / namespace).exists():
                failures += _failure("ip", "netns", "del", namespace)
        # Who came in meanwhile was the last: the names are gone, the networks not yet.
        _kill_all(networks)
    _remove_segments(layout, layout.hosts)
    if failures:
        raise LabError("\n".join(failures))


def _failure(*words: str) -> list[str]:
    try:
        call(*words)
    except LabError as error:
        return [str(error)]
    return []


def _link_exists(link: str) -> bool:
    return Path("/sys/class/net", link).exists()


def _namespaces(layout: Layout) -> list[str]:
    return [layout.namespace(host) for host in layout.hosts]


def inside(layout: Layout, host: int, words: Sequence[str]) -> list[str]:
    """The command line that runs a command on a host, under the host's name."""
    name = layout.namespace(host)
    script = f'hostname {name}; exec "$@"'
    return ["ip", "netns", "exec", name, "unshare", "--uts", "sh", "-c", script, "sh", *words]


def reaches(layout: Layout, source: int, dest: int, within_s: float) -> bool:
    """Whether a host gets an answer from another one; blocks for so long at the most."""
    # An answer is also that nobody listens on the port.
    program = (
        "import socket, sys\n"
        "try: socket.create_connection((sys.argv[1], 9), float(sys.argv[2]))\n"
        "except ConnectionRefusedError: pass\n"
        "except OSError: sys.exit(1)\n"
    )
    words = [sys.executable, "-S", "-c", program, layout.address(dest), str(within_s)]
    command = ["ip", "netns", "exec", layout.namespace(source), *words]
    return subprocess.run(command, stdin=subprocess.DEVNULL, check=False).returncode == 0


def set_cable(layout: Layout, host: int, plugged: bool) -> None:
    """Pull a host's cable, or plug it in again; the host sees its eth0 lose the carrier."""
    call("ip", "link", "set", layout.wire(host), "up" if plugged else "down")
    if plugged:
        # Else who asked for an address in vain, over the pulled cable, is told a little later that
        # there is no such host, and so is whoever asks for it now.
        for one in layout.hosts:
            call("ip", "-netns", layout.namespace(one), "neigh", "flush", "dev", "eth0")


def has_cable(layout: Layout, host: int) -> bool:
    """Whether a host's cable is plugged in."""
    try:
        flags = int(Path("/sys/class/net", layout.wire(host), "flags").read_text(), 16)
    except FileNotFoundError:
        return False
    return bool(flags & 1)  # IFF_UP


@contextmanager
def _networks(layout: Layout, hosts: Sequence[int]) -> Iterator[dict[int, int]]:
    """The inode of each host's network, and the host; no network gets these while it is held."""
    handles: dict[int, int] = {}
    try:
        for host in hosts:
            with suppress(FileNotFoundError):  # not made, or gone
                handles[host] = os.open(NETNS / layout.namespace(host), os.O_RDONLY)
        yield {os.fstat(handle).st_ino: host for host, handle in handles.items()}
    finally:
        for handle in handles.values():
            os.close(handle)


def _network_of(pid: int) -> int:
    """The inode of a process's network; 0 when it is gone, or a zombie."""
    try:
        return os.stat(f"/proc/{pid}/ns/net").st_ino
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return 0


def _pids(networks: Mapping[int, int]) -> dict[int, int]:
    """The processes in these networks, and the host of each."""
    every = (int(entry.name) for entry in os.scandir("/proc") if entry.name.isdecimal())
    return {pid: networks[inode] for pid in every if (inode := _network_of(pid)) in networks}


def pids(layout: Layout, host: int) -> list[int]:
    """Return the processes on a host: a process gets there only through the lab."""
    with _networks(layout, [host]) as networks:
        return sorted(_pids(networks))


def kill(layout: Layout, host: int) -> int:
    """Kill all processes on a host at once, and what they start meanwhile.

    Blocking until they are gone. Files of theirs that Open MPI leaves in /dev/shm go with them, and
    its directories in /tmp: a daemon that later gets the number of a dead one would not start.

    Returns
    -------
    int
        How many there were.

    Raises
    ------
    LabError
        A process does not go.
    """
    with _networks(layout, [host]) as networks:
        count = _kill_all(networks)
    _remove_segments(layout, [host])
    return count


def _kill_all(networks: Mapping[int, int]) -> int:
    killed: set[int] = set()
    deadline_s = time.monotonic() + _PATIENCE_S
    while left := set(_pids(networks)) - {os.getpid()}:
        if time.monotonic() > deadline_s:
            raise LabError(f"processes {sorted(left)} do not end")
        killed |= {pid for pid in left if _kill(networks, pid)}
        time.sleep(0.005)
    for pid in killed:
        shutil.rmtree(Path(tempfile.gettempdir(), f"ompi.{pid}"), ignore_errors=True)
    return len(killed)


def _kill(networks: Mapping[int, int], pid: int) -> bool:
    """Kill a process if it is still one of these, and not another of the same number."""
    try:
        handle = os.pidfd_open(pid)
    except ProcessLookupError:
        return False
    try:
        if _network_of(pid) in networks:
            signal.pidfd_send_signal(handle, signal.SIGKILL)
            return True
    except ProcessLookupError:
        pass
    finally:
        os.close(handle)
    return False


def _remove_segments(layout: Layout, hosts: Sequence[int]) -> None:
    """Remove what killed ranks of Open MPI leave in shared memory, named after their host."""
    for host in hosts:
        for segment in Path("/dev/shm").glob(f"sm_segment.{layout.namespace(host)}.*"):
            segment.unlink(missing_ok=True)
