"""The command `hopcoll`: start a job, prove that fault tolerance is real, kill ranks on purpose."""

from __future__ import annotations

import importlib
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from hopcoll import __version__, launcher, restarts
from hopcoll.chaos import check_place

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

__all__ = ["main"]

#: Commands whose modules are loaded only when they are called: (module, attribute, summary).
_LAZY = {
    "chaos": ("hopcoll.chaos", "command", "Kill ranks of real MPI jobs and check every result."),
    "soak": ("hopcoll.soak", "command", "Run a hundred thousand simulated failures, and count."),
    "forecast": ("hopcoll.forecast", "command", "Time a collective on a modelled network."),
    "replay": ("hopcoll.replay", "command", "Tell the protocol again what real ranks were told."),
    "slurm": ("hopcoll.slurm", "command", "Submit jobs to Slurm that survive it; look at them."),
    "simulate": ("hopcoll.simulate", "command", "Run the protocol over a simulated network."),
}


def _further() -> dict[str, EntryPoint]:
    """Return the commands that packages above this one bring along."""
    # Here, since it is a third of what a launcher imports.
    from importlib.metadata import entry_points

    return {entry.name: entry for entry in entry_points(group="hopcoll.commands")}


class _Commands(click.Group):
    """A group that imports some of its commands late, and finds those of other packages."""

    def list_commands(self, context: click.Context) -> list[str]:
        return sorted({*super().list_commands(context), *_LAZY, *_further()})

    def get_command(self, context: click.Context, name: str) -> click.Command | None:
        if name in _LAZY:
            module, attribute, _ = _LAZY[name]
            command: click.Command = getattr(importlib.import_module(module), attribute)
            return command
        if name not in self.commands and name in (further := _further()):
            command = further[name].load()
            return command
        return super().get_command(context, name)

    def format_commands(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        rows = [(name, command.get_short_help_str()) for name, command in self.commands.items()]
        rows += [(name, summary) for name, (_, _, summary) in _LAZY.items()]
        rows += [(name, entry.load().get_short_help_str()) for name, entry in _further().items()]
        with formatter.section("Commands"):
            formatter.write_dl(sorted(rows))


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="hopcoll", message="%(prog)s %(version)s")
def main() -> None:
    """MPI collectives that go on when a rank is killed.

    \b
    hopcoll doctor                  is fault tolerance real on this machine?
    hopcoll run -n 4 script.py      start a job that survives deaths
    """


@main.command(
    context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False},
    short_help="Start a job that survives the death of ranks.",
)
@click.option(
    "-n",
    "--ranks",
    type=click.IntRange(min=1),
    help="How many ranks. Without it: one a slot of the hosts or of the batch allocation.",
)
@click.option("--host", "hosts", multiple=True, metavar="NAME[:SLOTS],...", help="Hosts to run on.")
@click.option(
    "--hostfile",
    type=click.Path(exists=True, dir_okay=False),
    help="A file that lists them, one 'name slots=n' a line.",
)
@click.option("--oversubscribe", is_flag=True, help="Allow more ranks than slots on the hosts.")
@click.option(
    "-x",
    "export",
    multiple=True,
    metavar="NAME[=VALUE]",
    help="Give the ranks on other hosts this environment variable. HOPCOLL_* are always given.",
)
@click.option(
    "--mpirun",
    metavar="PATH",
    envvar="HOPCOLL_MPIRUN",
    help="Which mpirun. Without it: the one of this Python environment, then that on PATH.",
)
@click.option("--mpirun-args", metavar="WORDS", help="Further switches for mpirun, quoted as one.")
@click.option(
    "--restarts",
    "restart_count",
    type=click.IntRange(min=0),
    default=0,
    metavar="N",
    help="When a host or mpirun is lost, or every rank dies: start again, N times at the most.",
)
@click.option(
    "--restart-failures",
    is_flag=True,
    help="With --restarts: start again after a failure of the script, too.",
)
@click.option(
    "--min-ranks",
    type=click.IntRange(min=1),
    default=1,
    metavar="N",
    help="Do not start with fewer. With it, -n counts at the most: there may be fewer slots.",
)
@click.option(
    "--stop-within",
    "stop_within_s",
    type=click.FloatRange(min=0),
    metavar="SECONDS",
    help="SIGUSR1 asks the ranks to commit and to stop. Who has not after so long is ended.",
)
@click.option("--dry-run", is_flag=True, help="Print the command, and why each switch is there.")
@click.argument("program", nargs=-1, type=click.UNPROCESSED, required=True)
def run(
    ranks: int | None,
    hosts: tuple[str, ...],
    hostfile: str | None,
    oversubscribe: bool,
    export: tuple[str, ...],
    mpirun: str | None,
    mpirun_args: str | None,
    restart_count: int,
    restart_failures: bool,
    min_ranks: int,
    stop_within_s: float | None,
    dry_run: bool,
    program: tuple[str, ...],
) -> None:
    """Run PROGRAM on several ranks by mpirun, with every switch that surviving a death needs.

    PROGRAM is a Python script and its arguments, '-m module' and its arguments, or any other
    executable. Inside a Slurm allocation mpirun takes the hosts from there.

    \b
    hopcoll run -n 4 train.py --epochs 3
    hopcoll run --host n1:8,n2:8 train.py
    hopcoll run --host n1:8,n2:8 --restarts 5 train.py
    hopcoll run -n 4 --dry-run train.py

    With --restarts, a job that was lost is started again on those hosts that answer (the launch
    agent runs 'true' there within 15 s), after 1 s, 2 s, 4 s and so on. The script finds how
    often in HOPCOLL_RESTART, and has to go on from its newest checkpoint by itself. No restart
    follows when the newest durable step, in the file HOPCOLL_PROGRESS_FILE, is that of the loss
    before, and no host has gone.

    With --stop-within, training sessions commit after SIGUSR1, and the exit code is 75: start the
    job again, and it goes on. Other programs end at once.

    Exit code: 0 if the job ended well, even though ranks died on the way; else that of the script;
    128 plus its number if a signal ended the job; 1 if every rank died or a host was lost.
    """
    try:
        words = shlex.split(mpirun_args or "")
    except ValueError as error:
        raise click.BadParameter(f"{mpirun_args!r}: {error}", param_hint="--mpirun-args") from error
    how: dict[str, Any] = {
        "ranks": ranks,
        "hosts": [host for word in hosts for host in word.split(",")],
        "hostfile": hostfile,
        "oversubscribe": oversubscribe,
        "export": export,
        "mpirun": mpirun,
        "mpirun_args": words,
    }
    if restart_failures and not restart_count:
        raise click.UsageError("--restart-failures says what --restarts N is for: how often?")
    try:
        if dry_run:
            click.echo(launcher.plan(program, **how).describe())
        elif restart_count or min_ranks > 1 or stop_within_s is not None:
            sys.exit(
                restarts.run(
                    program,
                    restarts=restart_count,
                    failures=restart_failures,
                    min_ranks=min_ranks,
                    stop_within_s=stop_within_s,
                    **how,
                )
            )
        else:
            sys.exit(launcher.run(launcher.plan(program, **how)))
    except launcher.LauncherError as error:
        raise click.UsageError(str(error)) from error


@main.command(short_help="Prove that fault tolerance is real on this machine.")
@click.option("--mpirun", metavar="PATH", envvar="HOPCOLL_MPIRUN", help="As for 'hopcoll run'.")
@click.option(
    "--json",
    "json_path",
    type=click.Path(path_type=Path, dir_okay=False),
    callback=lambda context, option, path: check_place(path),
    help="Write the findings here as well.",
)
def doctor(mpirun: str | None, json_path: Path | None) -> None:
    """Prove that fault tolerance is real on this machine.

    Looks at Python, mpi4py, the kernels and the MPI library under both, then starts a tiny job of
    three ranks, kills one of them and watches that the others notice and go on. For each thing
    that is missing it says what to do. Exit code: 0 if all is well, else 1.
    """
    # Only here: `hopcoll run` should not have to import NumPy.
    from hopcoll import doctor as examination

    findings = examination.examine(mpirun)
    click.echo(examination.report(findings))
    if json_path is not None:
        json_path.write_text(examination.as_json(findings))
    sys.exit(0 if all(finding.ok for finding in findings) else 1)


if __name__ == "__main__":
    main(prog_name="hopcoll")
