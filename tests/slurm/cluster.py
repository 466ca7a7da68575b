"""A real Slurm on one machine: a controller and nodes, each a host of the lab with its own name.

Everything that it writes (configuration, state, logs, munge's key and socket) is in one directory;
a Slurm of the system is not touched. The nodes are network namespaces, so that a cable can be
pulled, and a node can lose all its processes at once. They share the file system.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sysconfig
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from benchmarks.lab import Lab
from tests import launch

__all__ = ["NODES", "Cluster", "CannotStart", "why_no_slurm"]

NODES = 4
#: Slots of a node; the processors of this machine are fewer than all of them.
CPUS = 2
_TOOLS = ("slurmctld", "slurmd", "munged", "mungekey", "sbatch", "scontrol", "squeue", "srun")
_CONF = """\
ClusterName=hopcoll
SlurmctldHost={controller}({controller_address})
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CryptoType=crypto/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmctldLogFile={folder}/slurmctld.log
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdLogFile={folder}/slurmd-%n.log
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmdSpoolDir={folder}/spool-%n
SlurmdParameters=config_overrides
SlurmdTimeout=10
SlurmctldTimeout=5
MessageTimeout=10
TCPTimeout=2
BatchStartTimeout=10
KillWait=4
MinJobAge=600
ReturnToService=2
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=2,bf_interval=2,defer
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
# A job that asked for a signal before its end gets it when it is preempted as well.
SlurmctldParameters=preempt_send_user_signal
JobRequeue=1
EnforcePartLimits=ALL
{nodes}
PartitionName=main Nodes=ALL Default=YES MaxTime=60 PriorityTier=1 PreemptMode=REQUEUE GraceTime=30
PartitionName=urgent Nodes=ALL MaxTime=60 PriorityTier=10 PreemptMode=OFF
PartitionName=short Nodes=ALL MaxTime=5
"""


def why_no_slurm() -> str:
    """Why no Slurm can be started here; empty if one can."""
    if reason := launch.why_no_lab(limits_rates=False):
        return reason
    missing = [tool for tool in _TOOLS if shutil.which(tool) is None]
    if missing:
        return f"{', '.join(missing)} missing: make test-slurm (as root, it installs them)"
    return ""


class CannotStart(Exception):
    """Slurm is here, but its daemons do not come up on this machine; the message says which."""


class Cluster:
    """A controller and `NODES` nodes; a context.

    Parameters
    ----------
    folder : Path
        For all its files. Its path must be short: it has a socket.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.lab = Lab(NODES + 1, name=f"hs{os.getpid()}")
        self.nodes = [self.lab.layout.namespace(host) for host in range(1, NODES + 1)]
        self._hidden: list[tuple[str, Path]] = []
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> Cluster:
        self.lab.up()
        try:
            self._start()
        except (AssertionError, OSError, subprocess.SubprocessError) as error:
            self.__exit__()
            raise CannotStart(f"Slurm does not come up here: {error}") from error
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        self.lab.down()  # which kills all that run on its hosts
        for daemon in self._daemons.values():
            daemon.kill()
            daemon.wait()

    def _start(self) -> None:
        os.chmod(self.folder, 0o755)
        layout = self.lab.layout
        rows = [
            f"NodeName={name} NodeHostname={name} NodeAddr={layout.address(host)} CPUs={CPUS}"
            for host, name in enumerate(self.nodes, 1)
        ]
        controller = NODES + 1
        (self.folder / "slurm.conf").write_text(
            _CONF.format(
                folder=self.folder,
                controller=layout.namespace(controller),
                controller_address=layout.address(controller),
                nodes="\n".join(rows),
            )
        )
        for name in ("state", *(f"spool-{node}" for node in self.nodes)):
            (self.folder / name).mkdir()
        key = self.folder / "munge.key"
        subprocess.run(["mungekey", "--create", "--keyfile", key], check=True)
        self._daemons["munged"] = subprocess.Popen(
            ["munged", "--foreground", "--force", "--num-threads=2", f"--key-file={key}"]
            + [
                f"--{what}={self.folder}/munge.{end}"
                for what, end in (
                    *(("socket", "socket"), ("pid-file", "pid")),
                    *(("log-file", "log"), ("seed-file", "seed")),
                )
            ],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        self.wait_for((self.folder / "munge.socket").exists, "munged makes its socket", 10)
        self._daemon("slurmctld", controller, "slurmctld", "-D", "-c")
        for node in self.nodes:
            self.start_node(node)
        self.wait_for(lambda: set(self.states().values()) == {"idle"}, "all nodes are idle", 30)

    def _daemon(self, name: str, host: int, *words: str) -> None:
        with open(self.folder / f"{name}.out", "ab") as output:
            self._daemons[name] = subprocess.Popen(
                self.inside(host, *words),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=self.environment(),
                start_new_session=True,
            )

    def environment(self, settings: Mapping[str, str] | None = None) -> dict[str, str]:
        """The environment of its daemons and commands: this Python's programs come first."""
        kept = launch.environment()
        kept = {name: value for name, value in kept.items() if not name.startswith("SLURM_")}
        kept["PATH"] = os.pathsep.join([sysconfig.get_path("scripts"), kept["PATH"]])
        return {**kept, "SLURM_CONF": f"{self.folder}/slurm.conf", **(settings or {})}

    def call(
        self,
        *words: str,
        cwd: Path | None = None,
        check: bool = True,
        settings: Mapping[str, str] | None = None,
    ) -> subprocess.CompletedProcess[str]:
        """Run a command beside the controller."""
        done = subprocess.run(
            self.inside(NODES + 1, *words),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            cwd=cwd,
            env=self.environment(settings),
            check=False,
            timeout=60,
        )
        if check and done.returncode:
            raise AssertionError(f"{' '.join(words)}: {done.returncode}\n{done.stderr}")
        return done

    def wait_for(self, holds: Callable[[], bool], what: str, within_s: float) -> None:
        """Wait until something holds; an `AssertionError` when it never does."""
        deadline_s = time.monotonic() + within_s
        while not holds():
            if time.monotonic() > deadline_s:
                raise AssertionError(f"not within {within_s:g} s: {what}\n{self.report()}")
            pause(0.2)

    def states(self) -> dict[str, str]:
        """The state of each node, as sinfo says it."""
        said = self.call("sinfo", "-h", "-N", "-p", "main", "-o", "%N %T", check=False).stdout
        return dict(line.split() for line in said.splitlines())

    def job(self, number: str) -> dict[str, str]:
        """What scontrol knows of a job."""
        said = self.call("scontrol", "-o", "show", "job", number).stdout
        return dict(re.findall(r"(\w+)=(\S*)", said))

    def inside(self, host: int, *words: str) -> list[str]:
        """The command line that runs a command on a host, under its name.

        Not by ``ip netns exec``, which hides /sys/fs/cgroup: slurmd does not start without it.
        """
        name = self.lab.layout.namespace(host)
        script = f'hostname {name}; exec "$@"'
        enter = ["nsenter", f"--net=/run/netns/{name}"]
        return [*enter, "unshare", "--uts", "--mount", "sh", "-c", script, "sh", *words]

    # Faults

    def host_of(self, node: str) -> int:
        return self.nodes.index(node) + 1

    def start_node(self, node: str) -> None:
        """Start the daemon of a node."""
        self._daemon(f"slurmd-{node}", self.host_of(node), "slurmd", "-D")

    def kill_node(self, node: str) -> None:
        """Kill everything on a node at once, its slurmd included."""
        assert self.lab.lose(self.host_of(node)) > 0

    def freeze_controller(self, frozen: bool) -> None:
        """Have the controller answer nobody, as while another takes over, or go on."""
        daemon = self._daemons["slurmctld"]
        os.killpg(daemon.pid, signal.SIGSTOP if frozen else signal.SIGCONT)

    def cable(self, node: str, plugged: bool) -> None:
        """Pull a node's cable, or plug it in again. Its disk is still that of all."""
        self.lab.cable(self.host_of(node), plugged)

    def hide(self, node: str, folder: Path) -> None:
        """Have a node see an empty folder in the place of this one, until it is healed."""
        pid = self._daemons[f"slurmd-{node}"].pid
        subprocess.run(
            ["nsenter", "--mount", f"--target={pid}", "mount", "-t", "tmpfs", "none", folder],
            check=True,
        )
        self._hidden.append((node, folder))

    def processes(self, node: str) -> list[int]:
        """The processes on a node."""
        return self.lab.pids(self.host_of(node))

    def ranks(self, node: str) -> list[int]:
        """The ranks on a node, of whatever job."""

        def words(pid: int) -> bytes:
            try:
                return Path(f"/proc/{pid}/cmdline").read_bytes()
            except OSError:
                return b""

        return [pid for pid in self.processes(node) if b"_rank.py\0" in words(pid)
                and b"prterun" not in words(pid)]  # fmt: skip

    def heal(self) -> None:
        """Have all nodes idle again, and no job left."""
        self.freeze_controller(False)
        self.call("scancel", "--user=root", check=False)
        for node, folder in self._hidden:
            pid = self._daemons[f"slurmd-{node}"].pid
            subprocess.run(
                ["nsenter", "--mount", f"--target={pid}", "umount", folder], check=False
            )
        self._hidden.clear()
        for node in self.nodes:
            if not self.lab.has_cable(self.host_of(node)):
                self.cable(node, plugged=True)
                self.kill_node(node)  # a slurmd that starts is back at once
                self._daemons[f"slurmd-{node}"].wait()
            if self._daemons[f"slurmd-{node}"].poll() is not None:
                self.start_node(node)
        broken = [node for node, state in self.states().items() if "drain" in state]
        if broken:
            self.call("scontrol", "update", f"NodeName={','.join(broken)}", "state=resume")
        self.wait_for(lambda: not self.call("squeue", "-h").stdout, "no job is left", 60)
        self.wait_for(lambda: set(self.states().values()) == {"idle"}, "all nodes are idle", 60)

    def report(self) -> str:
        """What is known, for a test that failed."""
        parts = [
            self.call(*words, check=False).stdout
            for words in (("sinfo", "-N", "-l"), ("squeue", "-l"), ("scontrol", "show", "job"))
        ]
        for name in ("slurmctld.log", "slurmctld.out"):
            if (file := self.folder / name).exists():
                parts.append("\n".join([f"-- {name}", *file.read_text().splitlines()[-40:]]))
        return "\n".join(parts)


def pause(wait_s: float) -> None:
    """Look again a little later."""
    threading.Event().wait(wait_s)
